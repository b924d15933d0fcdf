"""Which program an answer hands in: the last block that does what the tests ask for."""

import ast
import re

from checkers.fences import PYTHON, Block, blocks_of, fences_in, lines_of, parse

MOST_STARTS = 40  # lines at which a program without an opening fence is looked for
# How a program begins, unlike prose and output.
PROGRAM_START = re.compile(r"\s*(?:@|(?:async def|def|class|import|from)\s)")
READING = frozenset(("input", "stdin", "open", "read", "fileinput"))
PRINTING = frozenset(("print", "stdout", "write", "writelines"))
COMPOUND = (ast.If, ast.For, ast.While, ast.With, ast.Try)
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def program_of(answer: str, wanted: frozenset[str] = frozenset()) -> str:
    """The program that an answer hands in; the whole answer if it has no fences.

    wanted: the names that the tests ask for; none for a program that reads stdin. If the last block
    is a program that is cut off, it is what was handed in. Blocks of other languages count only
    where there is no other block.
    """
    blocks = blocks_of(answer)
    if not blocks:
        return "\n".join(lines_of(answer))
    if is_cut_off(blocks[-1]):
        return blocks[-1].text
    python = [block for block in blocks if is_python(block)] or blocks
    parsed = [block for block in python if block.tree is not None]
    programs = unfenced_program(answer) + parsed
    return last_of_best(programs, wanted).text if programs else python[-1].text


def is_python(block: Block) -> bool:
    """Is the block's language Python, or not said?"""
    return not block.language or block.language in PYTHON


def is_cut_off(block: Block) -> bool:
    """Does the answer end inside a program?"""
    if block.is_closed or block.tree is not None:
        return False
    if block.language:
        return block.language in PYTHON
    return PROGRAM_START.match(block.text) is not None


def unfenced_program(answer: str) -> list[Block]:
    """The program before the first fence, as a list of one block; [] if there is none.

    So a closing fence alone ends a program too.
    """
    lines = lines_of(answer)
    lines = lines[: fences_in(lines)[0].line]
    for start in range(min(len(lines), MOST_STARTS)):
        text = "\n".join(lines[start:])
        tree = parse(text)
        if tree is not None:
            return [Block(text, "", True, tree)]
    return []


# ---------------- what a block does ----------------


def last_of_best(blocks: list[Block], wanted: frozenset[str]) -> Block:
    """The block that does most of what is asked; the last one if several do as much."""
    if len(blocks) == 1:
        return blocks[0]
    best, most = blocks[0], (0, 0)
    for block in blocks:
        worth = definitions(block, wanted) if wanted else (likeness(block), 0)
        if worth >= most:
            best, most = block, worth
    return best


def likeness(block: Block) -> int:
    """How much a block is like a program that reads stdin, from 0 to 4.

    An untagged block may be a program's output, and a block that reads nothing may be an example.
    """
    names = set()
    for node in ast.walk(block.tree):
        if isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute):
            names.add(node.attr)
        elif isinstance(node, ast.alias):
            names.add(node.name)
    if names & PRINTING and names & READING:
        return 4
    if names & PRINTING:
        return 3 if block.language else 2
    return 1 if block.language else 0


def definitions(block: Block, wanted: frozenset[str]) -> tuple[int, int]:
    """How many of the wanted names a block defines, and how many it imports."""
    defined, imported = set(), set()
    for statement in statements_of(block.tree.body):
        if isinstance(statement, DEFINITIONS):
            defined.add(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)):
            defined |= assigned_names(statement)
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            imported |= {alias.asname or alias.name for alias in statement.names}
    return len(wanted & defined), len(wanted & imported)


def statements_of(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements of a module, with those in its conditions, loops and so on."""
    statements = []
    waiting = list(reversed(body))
    while waiting:
        statement = waiting.pop()
        statements.append(statement)
        if isinstance(statement, COMPOUND):
            waiting += [node for node in ast.iter_child_nodes(statement) if is_statement(node)]
    return statements


def is_statement(node: ast.AST) -> bool:
    """Can the node stand in a module's body, or does it hold such nodes?"""
    return isinstance(node, (ast.stmt, ast.ExceptHandler))


def assigned_names(statement: ast.Assign | ast.AnnAssign) -> set[str]:
    """The names that an assignment binds; none if the value is a constant, as in `n = 3`.

    Such lines are what programs print, too.
    """
    if statement.value is None or isinstance(statement.value, ast.Constant):
        return set()
    names = set()
    for node in ast.walk(statement):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names
