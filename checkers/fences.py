"""Programs in fenced blocks: which one hands in the solution, however the fences are written.

Models close a fence or not, indent it in a list, write ~~~, or put a fence into a docstring. So a
block is not simply what stands between two fences: each text between an opening fence and one of
the next fences is tried, and what parses decides.
"""

import ast
import re
import textwrap
import warnings
from typing import NamedTuple

FENCE = re.compile(r"([ \t>]*)(?:(?:[-*+]|\d{1,9}[.)])[ \t]+)?(`{3,}|~{3,})[ \t]*([^`\n]*)$")
MOST_FENCES = 40  # fences that are looked at, from the end
MOST_ENDS = 8  # fences that are tried as the end of a block
PYTHON = frozenset(("python", "python3", "py", "py3", "pypy", "pypy3", "ipython", "sage"))


class Fence(NamedTuple):
    """A line that opens or closes a block."""

    line: int
    mark: str  # ``` or ~~~
    language: str  # the first word behind it, in lower case


class Block(NamedTuple):
    """A text that a fence may enclose."""

    text: str
    language: str
    is_closed: bool = True


# ---------------- fences and blocks ----------------


def lines_of_answer(answer: str) -> list[str]:
    """The answer's lines, whatever ends them."""
    return answer.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def split_inline(lines: list[str]) -> list[str]:
    """The lines, with fences at a line's end on lines of their own.

    "Here it is: ```python" and "return a + b```" are such lines.
    """
    separate = []
    for line in lines:
        start = line.rfind("```")
        if start > 0 and line[:start].strip(" \t>`~-*+0123456789.)") and "`" not in line[:start]:
            if re.fullmatch(r"```[A-Za-z0-9+#]{0,20}[ \t]*", line[start:]):
                separate += [line[:start], line[start:]]
                continue
        separate.append(line)
    return separate


def fences_in(lines: list[str]) -> list[Fence]:
    """The fences among the lines, at most the last MOST_FENCES."""
    fences = []
    for number, line in enumerate(lines):
        match = FENCE.match(line) if "```" in line or "~~~" in line else None
        if match:
            info = re.match(r"[{.\s]*([\w+#-]*)", match[3])
            fences.append(Fence(number, match[2][:3], info[1].lower()))
    return fences[-MOST_FENCES:]


def text_between(lines: list[str], start: int, stop: int) -> str:
    """The lines between two fences, without their common indentation."""
    return textwrap.dedent("\n".join(lines[start + 1 : stop])) + "\n"


def blocks_of(answer: str) -> list[Block]:
    """The blocks of an answer in order, each from its fence to the next of the same kind."""
    lines = split_inline(lines_of_answer(answer))
    fences = fences_in(lines)
    blocks = []
    i = 0
    while i < len(fences):
        opening = fences[i]
        end = next(
            (j for j in range(i + 1, len(fences)) if closes(fences[j], opening)), len(fences)
        )
        is_closed = end < len(fences)
        stop = fences[end].line if is_closed else len(lines)
        blocks.append(Block(text_between(lines, opening.line, stop), opening.language, is_closed))
        i = end + 1
    return blocks


def closes(fence: Fence, opening: Fence) -> bool:
    """Can the fence close the block that the other one opens?"""
    return fence.mark == opening.mark and not fence.language


def last_block(answer: str) -> str:
    """The last block's text, or the whole answer if it has none."""
    blocks = blocks_of(answer)
    return blocks[-1].text if blocks else answer


# ---------------- which block is the program ----------------


def program_of(answer: str, wanted: frozenset[str] = frozenset()) -> str:
    """The program that an answer hands in: its last block that is Python and defines a name of
    `wanted`; if there is none, its last block that is Python.

    wanted: the names that the tests ask for; none for a program that reads stdin. If the last block
    is a program that is cut off, it is what was handed in. Without fences it is the whole answer.
    """
    answer = "\n".join(lines_of_answer(answer))
    blocks = blocks_of(answer)
    if not blocks:
        return answer
    last = blocks[-1]
    if not last.is_closed and len(blocks) == 1 and not last.text.strip():
        return before_first_fence(answer)  # a closing fence alone
    if not last.is_closed and is_python(last) and parse(last.text) is None:
        rest = nested_program(answer, wanted)
        return rest if rest is not None else last.text

    candidates = [block for block in blocks if is_python(block) and parse(block.text) is not None]
    for names in [wanted] if wanted else []:
        for block in reversed(candidates):
            if defines(block.text, names):
                return block.text
        nested = nested_program(answer, wanted)
        if nested is not None:
            return nested
    # Tagged blocks before untagged ones, which may be a program's output.
    for is_good in (is_tagged_program, is_program, is_tagged):
        for block in reversed(candidates):
            if is_good(block):
                return block.text
    nested = nested_program(answer, wanted)
    if nested is not None:
        return nested
    python = [block for block in blocks if is_python(block)]
    return (python or blocks)[-1].text


def before_first_fence(answer: str) -> str:
    """The text before the first fence, from its first line that begins a program."""
    lines = split_inline(lines_of_answer(answer))
    lines = lines[: fences_in(lines)[0].line]
    for start in range(min(len(lines), MOST_FENCES)):
        text = "\n".join(lines[start:])
        if parse(text) is not None:
            return text
    return "\n".join(lines)


def nested_program(answer: str, wanted: frozenset[str]) -> str | None:
    """The last program whose own text has fences in it, as in a docstring; None if there is none.

    Each text from an opening fence to one of the fences after the next is tried.
    """
    lines = split_inline(lines_of_answer(answer))
    fences = fences_in(lines)
    for i in reversed(range(len(fences))):
        if fences[i].language and fences[i].language not in PYTHON:
            continue
        stops = [fence.line for fence in fences[i + 1 : i + 1 + MOST_ENDS]] + [len(lines)]
        for stop in stops[1:]:
            text = text_between(lines, fences[i].line, stop)
            if parse(text) is not None and (not wanted or defines(text, wanted)):
                if wanted or has_statement(text):
                    return text
    return None


def is_python(block: Block) -> bool:
    """Is the block's language Python, or not said?"""
    return not block.language or block.language in PYTHON


def is_tagged(block: Block) -> bool:
    """Does the block say that it is Python?"""
    return block.language in PYTHON


def is_program(block: Block) -> bool:
    """Does the block do something, unlike a program's output?"""
    return has_statement(block.text)


def is_tagged_program(block: Block) -> bool:
    """Does the block say that it is Python, and do something?"""
    return is_tagged(block) and is_program(block)


def parse(text: str) -> ast.Module | None:
    """The syntax tree; None if the text is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(text)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def has_statement(text: str) -> bool:
    """Is there more in a Python text than values and names?"""
    for statement in parse(text).body:
        if not isinstance(statement, ast.Expr) or isinstance(statement.value, ast.Call):
            return True
    return False


def defines(text: str, names: frozenset[str]) -> bool:
    """Does a Python text define one of the names?"""
    for statement in parse(text).body:
        if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if statement.name in names:
                return True
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            targets = getattr(statement, "targets", None) or [statement.target]
            for target in targets:
                if isinstance(target, ast.Name) and target.id in names:
                    return True
    return False
