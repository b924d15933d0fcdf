"""The fenced blocks of an answer, however their fences are written.

Models leave a fence open, indent it in a list, write ~~~, or put a fence into a docstring. So a
block of Python ends where its text is Python, and otherwise at the next fence.
"""

import ast
import re
import textwrap
import warnings
from typing import NamedTuple

PYTHON = frozenset(("python", "py", "pypy", "ipython", "sage"))
MARKDOWN = frozenset(("markdown", "md"))
MOST_FENCES = 200  # fences that are looked at, from the end
MOST_ENDS = 16  # fences that are tried as the end of a block

# Spaces, the marks of quotes and the marker of a list, then the fence and what it says.
FENCE = re.compile(r"([ \t>]*(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?)(`{3,}|~{3,})[ \t]*([^`\n]*)$")
# A fence at the end of a line: "Here it is: ```python" and "return a + b```".
FENCE_AT_END = re.compile(r"```[A-Za-z0-9+#]{0,20}[ \t]*")
FIRST_WORD = re.compile(r"[{.\s]*([^\s{},:=]*)")  # of what a fence says
TRIPLE_QUOTES = ('"""', "'''")


class Fence(NamedTuple):
    """A line that opens or closes a block."""

    line: int  # its number among the answer's lines
    prefix: str  # what stands before the fence: spaces, marks of quotes, a list's marker
    mark: str  # the fence itself, such as ```
    language: str  # see language_of; "" if it says none


class Block(NamedTuple):
    """The text of a fenced block."""

    text: str
    language: str
    is_closed: bool
    tree: ast.Module | None  # None if the text is not Python


def parse(text: str) -> ast.Module | None:
    """The syntax tree; None if the text is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


# ---------------- lines and fences ----------------


def lines_of(answer: str) -> list[str]:
    """The answer's lines, whatever ends them. A fence at a line's end becomes a line of its own."""
    lines = []
    for line in answer.replace("\r\n", "\n").replace("\r", "\n").split("\n"):
        start = line.rfind("```")
        if start > 0 and has_text(line[:start]) and FENCE_AT_END.fullmatch(line, start):
            lines += [line[:start], line[start:]]
        else:
            lines.append(line)
    return lines


def has_text(prefix: str) -> bool:
    """Does more than a list's marker, or marks of quotes, stand before a fence?"""
    return "`" not in prefix and bool(prefix.strip(" \t>~-*+0123456789.)"))


def fences_in(lines: list[str]) -> list[Fence]:
    """The fences among the lines, at most the last MOST_FENCES."""
    fences = []
    for number in reversed(range(len(lines))):
        line = lines[number]
        # Most lines have no fence, and the pattern is slower than this.
        match = FENCE.match(line) if "```" in line or "~~~" in line else None
        if match:
            prefix, mark, said = match.groups()
            fences.append(Fence(number, prefix, mark, language_of(said)))
        if len(fences) == MOST_FENCES:
            break
    return fences[::-1]


def language_of(said: str) -> str:
    """The language in what an opening fence says, in lower case and without a version.

    "Python3 linenums", "{.python}", "python:add.py" and "add.py" all say "python".
    """
    word = FIRST_WORD.match(said)[1].lower()
    return "python" if word.endswith(".py") else word.rstrip("0123456789.")


def text_of(lines: list[str], opening: Fence, stop: int) -> str:
    """The text of the block that a fence opens, up to the line `stop`.

    The lines lose as much indentation as the fence has, and the mark of a quote.
    """
    kept = []
    for line in lines[opening.line + 1 : stop]:
        if ">" in opening.prefix:
            line = re.sub(r"^[ \t]{0,3}>[ \t]?", "", line)
        else:
            indentation = len(line) - len(line.lstrip(" \t"))
            line = line[min(indentation, len(opening.prefix)) :]
        kept.append(line)
    return "\n".join(kept) + "\n"


# ---------------- blocks ----------------


def blocks_of(answer: str) -> list[Block]:
    """The blocks of an answer, in order. A block of Markdown counts as the blocks in it."""
    lines = lines_of(answer)
    fences = fences_in(lines)
    blocks = []
    number = 0
    while number < len(fences):
        opening = fences[number]
        end = end_of_block(lines, fences, number)
        stop = fences[end].line if end < len(fences) else len(lines)
        text = text_of(lines, opening, stop)
        if opening.language in MARKDOWN:
            blocks += blocks_of(text)
        else:
            blocks.append(block_of(text, opening.language, is_closed=end < len(fences)))
        # A fence that names a language opens the next block, even if it ends this one.
        number = end if end < len(fences) and fences[end].language else end + 1
    return blocks


def block_of(text: str, language: str, is_closed: bool) -> Block:
    """The block with its tree. A text that is indented as a whole is Python without that."""
    tree = parse(text)
    if tree is None:
        dedented = textwrap.dedent(text)
        tree = parse(dedented)
        text = dedented if tree is not None else text
    return Block(text, language, is_closed, tree)


def end_of_block(lines: list[str], fences: list[Fence], number: int) -> int:
    """The number of the fence that ends the block of fence `number`; len(fences) if none does.

    Usually it is the next one. A fence inside a docstring does not end a block of Python.
    """
    opening = fences[number]
    later = later_fences(fences, number)
    if not opening.language or opening.language in PYTHON:
        for end in [*later[:MOST_ENDS], len(fences)]:
            stop = fences[end].line if end < len(fences) else len(lines)
            text = text_of(lines, opening, stop)
            if all(text.count(quotes) % 2 == 0 for quotes in TRIPLE_QUOTES):
                if block_of(text, opening.language, True).tree is not None:
                    return end
                break  # beyond this fence, the fence itself would be a line of the program
    if opening.language in MARKDOWN:
        later = [end for end in later if not fences[end].language]
    return later[0] if later else len(fences)


def later_fences(fences: list[Fence], number: int) -> list[int]:
    """The numbers of the fences that may end the block of fence `number`.

    They have its character, and are as long unless all are shorter.
    """
    mark = fences[number].mark
    later = [i for i in range(number + 1, len(fences)) if fences[i].mark[0] == mark[0]]
    as_long = [i for i in later if len(fences[i].mark) >= len(mark)]
    return as_long or later


def last_block(answer: str) -> str:
    """The last block's text, or the whole answer if it has none."""
    blocks = blocks_of(answer)
    return blocks[-1].text if blocks else answer
