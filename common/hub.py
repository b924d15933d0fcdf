"""The Hugging Face hub: can it be reached? It is asked once, before libraries ask it many times."""

import functools

from huggingface_hub import constants, get_session

SECONDS = 5  # that the hub has to answer


@functools.cache
def fault() -> str:
    """Why the hub cannot be reached; "" if it can, or if HF_HUB_OFFLINE forbids to ask it.

    The libraries ask again and again for half a minute before they give up.
    """
    if constants.HF_HUB_OFFLINE:
        return ""
    try:
        get_session().head(constants.ENDPOINT, timeout=SECONDS)
    except Exception as error:  # of the library that it uses for HTTP
        reason = str(error).strip() or type(error).__name__
        return f"{constants.ENDPOINT} does not answer: {reason.splitlines()[0]}"
    return ""
