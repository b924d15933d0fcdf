"""NAME=FOLDER arguments."""

from pathlib import Path

from common.errors import UserError


def named_folders(pairs: list[str]) -> dict[str, str]:
    """{NAME: FOLDER}; a bare folder is called by its last part. Raises UserError."""
    folders = {}
    for pair in pairs:
        name, _, folder = pair.rpartition("=")
        name = name or Path(folder).name
        if name in folders:
            raise UserError(f"{pair}: another one is called {name}, too; write NAME=FOLDER")
        folders[name] = folder
    return folders
