"""Turns a model's name into what from_pretrained takes. The toy is built when it is missing."""

from common.models import find_model
from sources.toy import build_toy


def resolve_model(name: str, fetch: bool = False) -> str:
    """The toy's folder for "toy"; for every other name see common.models.find_model.

    With `fetch` the result is always a folder, downloaded from the hub if necessary. Raises
    UserError.
    """
    if name == "toy":
        return build_toy()
    return find_model(name, fetch)
