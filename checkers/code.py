"""Judging code: the program in an answer, the toy's expressions, and programs run against tests."""

import ast
import functools
import http.client
import operator
import re
import warnings

from checkers import sandbox
from checkers.servers import http_json
from common.errors import UserError

CODE_SECONDS = 5  # wall-clock limit of one program on one input
CODE_MEGABYTES = 1024  # of address space
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def extract_code(answer: str) -> str:
    """The last fenced block, or the whole answer."""
    blocks = re.findall(r"```[ \t]*\w*[ \t]*\n(.*?)```", answer, re.DOTALL)
    return blocks[-1] if blocks else answer


def parse_code(code: str) -> ast.Module | None:
    """The syntax tree, or None where the code is not Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


# ---------------- expressions: the toy's code ----------------


def evaluate(tree: ast.Module, variable: str, value: int) -> int | None:
    """The value of a program that is one expression of +, − and · in one variable.

    It is computed on the syntax tree: nothing is run. None where the program is anything else.
    """
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.Expr):
        return None
    try:
        return evaluate_node(tree.body[0].value, variable, value)
    except (ValueError, RecursionError):
        return None


def evaluate_node(node: ast.expr, variable: str, value: int) -> int:
    """Raises ValueError for a node that does not belong into such an expression."""
    if isinstance(node, ast.Constant) and type(node.value) is int:  # True is no number here
        return node.value
    if isinstance(node, ast.Name) and node.id == variable:
        return value
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        left = evaluate_node(node.left, variable, value)
        right = evaluate_node(node.right, variable, value)
        return OPERATORS[type(node.op)](left, right)
    raise ValueError(f"no arithmetic: {type(node).__name__}")


# ---------------- programs ----------------


def run_program(code: str, tests: dict, url: str) -> tuple[bool | None, str]:
    """(does the code pass all tests, why), by checkers.sandbox or, with a url, SandboxFusion.

    None instead of True or False: the server failed, nobody knows. Raises UserError if this
    machine cannot seal code.
    """
    if url:
        return run_on_server(code, tests, url)
    if not sandbox.UNSAFE:
        check_sandbox()
    passed, why = sandbox.run(code, tests, CODE_SECONDS, CODE_MEGABYTES)
    return passed, "right" if passed else why


def run_on_server(code: str, tests: dict, url: str) -> tuple[bool | None, str]:
    """By SandboxFusion's HTTP API. The tests' asserts run in the program itself there."""
    if "asserts" in tests:
        program = "\n".join((tests.get("setup", ""), code, tests["asserts"]))
        return run_once_on_server(program, "", None, url)
    for stdin, expected in zip(tests["inputs"], tests["outputs"]):
        passed, why = run_once_on_server(code, stdin, expected, url)
        if not passed:
            return passed, why
    return True, "right"


def run_once_on_server(
    program: str, stdin: str, expected: str | None, url: str
) -> tuple[bool | None, str]:
    """One program and input. expected: what it must print (None: anything)."""
    request = {
        "code": program,
        "language": "python",
        "stdin": stdin,
        "run_timeout": CODE_SECONDS,
    }
    try:
        reply = http_json(f"{url.rstrip('/')}/run_code", request)
        status = reply["status"]
        result = reply.get("run_result") or {}
        if status == "SandboxError":
            return None, f"sandbox-error: {reply.get('message')}"
    except (
        OSError,
        http.client.HTTPException,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ) as error:
        return None, f"sandbox-error: {url}: {type(error).__name__} {error}"

    if status != "Success" or result.get("return_code") != 0:
        timed_out = result.get("status") == "TimeLimitExceeded"
        return False, "timeout" if timed_out else "exception"
    if expected is not None:
        printed = result.get("stdout") or ""
        if sandbox.lines_of(printed) != sandbox.lines_of(expected):
            return False, "assertion"
    return True, "right"


@functools.cache
def check_sandbox() -> None:
    """At first use: raise UserError where this machine cannot seal model-written code."""
    refused = sandbox.self_test()  # {name of a probe: was it refused, "sealed": were all}
    if refused["sealed"]:
        return
    allowed = [name for name, held in refused.items() if not held and name != "sealed"]
    raise UserError(
        "this machine cannot seal model-written code "
        f"(not refused: {', '.join(allowed)}): give --sandbox-url, a SandboxFusion server, "
        "or --allow-unsafe-code at your own risk"
    )
