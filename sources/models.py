"""Turns a model's name into what from_pretrained takes. What is missing of our own is built."""

from common.models import find_model
from sources.smollm2 import build_smollm2, warm_up_smollm2
from sources.toy import build_toy


def resolve_model(name: str, fetch: bool = False) -> str:
    """The folder of "toy", "smollm2" or "smollm2-raw"; see common.models.find_model for others.

    With `fetch` the result is always a folder, downloaded from the hub if necessary. Raises
    UserError.
    """
    if name == "toy":
        return build_toy()
    if name == "smollm2":
        return warm_up_smollm2()
    if name == "smollm2-raw":
        return build_smollm2()
    return find_model(name, fetch)
