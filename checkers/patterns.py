"""Searches for a regular expression that a row gives, in a model's text.

Most keywords are plain words, and are searched for here. With a repetition or alternatives the
search could go on for hours on the wrong text, so a worker does it, under a time limit.
"""

import re

from checkers.workers import ask_workers

COSTLY = set("\\*+?{[(|")  # an expression without these takes time in proportion to the text


class Undecided(Exception):
    """Nobody knows the verdict; the text is the reason."""


class Indigestible(Exception):
    """The search takes too long on this text."""


def count_matches(
    expression: str, text: str, before: str = "", after: str = "", flags: int = re.IGNORECASE
) -> int:
    """How often the row's expression occurs, between our own `before` and `after`.

    Raises Indigestible or Undecided.
    """
    whole = f"{before}{expression}{after}"
    if not COSTLY & set(expression):
        return len(re.findall(whole, text, flags))
    job = {"check": "pattern", "pattern": whole, "text": text, "flags": int(flags)}
    (verdict,) = ask_workers([job])
    if verdict.isdecimal():
        return int(verdict)
    if verdict.startswith("unknown"):
        raise Undecided(verdict)
    raise Indigestible(verdict)
