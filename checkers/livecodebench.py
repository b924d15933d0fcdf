"""A program as LiveCodeBench's own grader runs it, so that its numbers are comparable.

That grader (github.com/LiveCodeBench, testing_util.py at 28fef95) runs a program that reads stdin
as the body of a function, in one process with itself. What it passes is right here, and what it
refuses is wrong, quirks included:

- the imports of PRELUDE stand before the program, whose own imports are moved to the front
- names of the program are local to a function: `global` finds none of them
- `if __name__ == "__main__":` is run if it is the last statement, otherwise it is not
- stdin and stdout are texts: stdin.read() gives everything at any time, stdin.buffer.readline() the
  first line again and again; stdout has no buffer
- sys.exit() with any code ends the program well
- calls may nest 50,000 deep, and integers may be printed with 50,000 digits
"""

import ast

from checkers.fences import parse

MODULES = (
    "string re datetime collections heapq bisect copy math random statistics itertools functools "
    "operator io sys json"
).split()


def prelude() -> str:
    """The imports before every solution.

    All names of the modules come first, those of builtins later, and the modules themselves last:
    so pow(2, 10, 1000), copy.deepcopy and datetime.date are what a program means by them.
    """
    lines = [f"from {module} import *" for module in (*MODULES, "builtins", "typing")]
    lines += [f"import {module}" for module in MODULES]
    lines += ["sys.setrecursionlimit(50000)", "sys.set_int_max_str_digits(50000)"]
    return "\n".join(lines) + "\n"


PRELUDE = prelude()

# Runs before the program's imports: what they find as stdin is another object than the program's.
OPEN_STREAMS = '''
import builtins as _builtins, io as _io, sys as _sys
_text, _stdout = _sys.stdin.read(), _sys.stdout


class _Bytes:
    """stdin.buffer"""

    def read(self, *size):
        return _text.encode()

    def readline(self, *size):
        return _text.split("\\n")[0].encode() + b"\\n"


class _Stdin:
    """sys.stdin"""

    def __init__(self):
        self.file, self.buffer = _io.StringIO(_text), _Bytes()

    def read(self, *size):
        return _text

    def readlines(self, *size):
        return _text.split("\\n")

    def __getattr__(self, name):
        return getattr(self.file, name)


class _ImportedStdin(_io.StringIO):
    """stdin, of `from sys import stdin`"""

    lines = iter(_text.split("\\n"))

    def read(self, *size):
        return _text

    def readline(self, *size):
        return next(self.lines)

    def readlines(self, *size):
        return _text.split("\\n")


_sys.stdin, _sys.stdout = _ImportedStdin(), _io.StringIO()
_builtins.quit = None
'''
# Runs the program's function and prints what it has printed.
RUN = """


def _open(*path, **options):
    return _io.StringIO(_text)


_sys.stdin, _sys.stdout = _Stdin(), _io.StringIO()
_builtins.open = _open
try:
    _program()
except SystemExit:
    pass
_printed = _sys.stdout.getvalue()
_sys.stdout = _stdout
_stdout.write(_printed)
"""


def graded(program: str, tests: dict) -> tuple[str, dict]:
    """(program, tests) as they are run."""
    if "asserts" in tests:
        return program, {**tests, "setup": PRELUDE}
    return as_graded(program), tests


def as_graded(program: str) -> str:
    """The text of a program that reads stdin as it is run; itself if it is not Python."""
    tree = parse(program)
    if tree is None:
        return program
    body = without_main_guard(tree.body)
    imports = [node for node in body if isinstance(node, (ast.Import, ast.ImportFrom))]
    rest = [node for node in body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    arguments = ast.arguments([], [], None, [], [], None, [])
    function = ast.FunctionDef("_program", arguments, rest or [ast.Pass()], [], lineno=1)
    module = ast.fix_missing_locations(ast.Module([*imports, function], []))
    name = "__name__ = 'tmp_sol'\n"
    return OPEN_STREAMS + PRELUDE + name + ast.unparse(module) + RUN


def without_main_guard(body: list[ast.stmt]) -> list[ast.stmt]:
    """The statements, with the last one's own statements if it is the guard of a main program."""
    last = body[-1] if body else None
    if isinstance(last, ast.If) and ast.unparse(last.test) == "__name__ == '__main__'":
        return body[:-1] + last.body
    return body
