"""Arguments of the form NAME=FOLDER, by which the analyses name runs, models and evaluations."""

from pathlib import Path

from common.errors import UserError


def named_folders(pairs: list[str]) -> dict[str, str]:
    """{NAME: FOLDER}; the default NAME is the folder's own. Raises UserError for equal names."""
    folders = {}
    for pair in pairs:
        name, _, folder = pair.rpartition("=")
        name = name or Path(folder).name
        if name in folders:
            raise UserError(f"{pair}: another one is called {name}, too; write NAME=FOLDER")
        folders[name] = folder
    return folders
