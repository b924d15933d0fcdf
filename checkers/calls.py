"""Function calls in an answer: [{"name", "arguments": {…}}, …] from <tool_call> blocks or JSON.

Each text is read once, from left to right, so that a long one takes no more than linear time.
"""

import json

from checkers.fences import last_block

OPENING, CLOSING = "<tool_call>", "</tool_call>"
MOST_STARTS = 8  # brackets at which a JSON value in prose is looked for
UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, RecursionError)
DECODER = json.JSONDecoder()


def holds_call(answer: str) -> bool:
    """Does the answer try to call something? Prose does not."""
    return OPENING in answer or "{" in answer


def read_calls(answer: str) -> list[dict] | None:
    """The calls of an answer; None if it has none that can be read, or one that cannot.

    Calls stand in <tool_call> blocks, or are JSON objects or a list of them: the whole answer, its
    last fenced block, or what begins at a bracket after some prose.
    """
    try:
        if OPENING in answer and not answer.lstrip().startswith(("{", "[")):
            return tagged_calls(answer)
        return calls_in_json(last_block(answer))
    except UNREADABLE:
        return None


def tagged_calls(answer: str) -> list[dict]:
    """The calls of <tool_call> blocks.

    A block ends where its JSON ends, so a text in it may hold </tool_call>. The last block need not
    be closed. Raises ValueError and the like for a block that cannot be read.
    """
    calls = []
    position = 0
    while (tag := answer.find(OPENING, position)) >= 0:
        value, position = decode_at(answer, tag + len(OPENING))
        values = value if isinstance(value, list) else [value]
        calls += [normal_call(value) for value in values]
        rest = answer[position : position + 100].lstrip()
        if rest and not rest.startswith((CLOSING, OPENING)):
            raise ValueError("more than a call in a block")
    if '{"name"' in answer[position:]:
        raise ValueError("a call outside the blocks")
    return calls


def calls_in_json(text: str) -> list[dict]:
    """The calls of a list, or of one object or several. Raises ValueError and the like."""
    starts = []
    for i, character in enumerate(text):
        if character in "[{":
            starts.append(i)
        if len(starts) == MOST_STARTS:
            break
    for start in starts:
        try:
            value, position = decode_at(text, start)
        except ValueError:
            if text[start + 1 : start + 50].lstrip().startswith("{"):
                raise  # a list of calls that is cut off
            continue
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(value, dict) for value in values):
            continue  # such as [1] in prose
        calls = [normal_call(value) for value in values]
        if "{" in text[position:]:  # several objects, one after the other
            calls += calls_in_json(text[position:].lstrip(" \n\t,;"))
        return calls
    raise ValueError("no JSON")


def decode_at(text: str, position: int) -> tuple[object, int]:
    """(the JSON value that begins at the position, after white space; the position behind it)."""
    while position < len(text) and text[position].isspace():
        position += 1
    return DECODER.raw_decode(text, position)


def normal_call(call: dict) -> dict:
    """A call as {"name", "arguments": {…}}.

    Its arguments may be called "parameters", be left out, be null, or be a JSON text, as in
    OpenAI's API. Raises ValueError and the like if it is no call.
    """
    arguments = call["arguments"] if "arguments" in call else call.get("parameters")
    if isinstance(arguments, str):
        arguments = json.loads(arguments)
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict) or not isinstance(call["name"], str):
        raise ValueError("a call needs a name and arguments by name")
    return {"name": call["name"], "arguments": arguments}
