"""Judging code: the program in an answer, the toy's expressions, and programs run against tests."""

import ast
import builtins
import functools
import http.client
import operator

from checkers import sandbox
from checkers.fences import parse
from checkers.livecodebench import graded
from checkers.printed import same_output
from checkers.programs import program_of
from checkers.servers import http_json
from common.errors import UserError

CODE_SECONDS = 5  # CPU limit of one program on one input, unless its tests say "seconds"
CODE_MEGABYTES = 1024  # of address space
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def extract_code(answer: str, tests: dict | None = None) -> str:
    """The program that an answer hands in: see checkers.programs.program_of."""
    return program_of(answer, wanted_names(tests or {}))


def parse_code(code: str) -> ast.Module | None:
    """The syntax tree; None if the code is not Python."""
    return parse(code)


def wanted_names(tests: dict) -> frozenset[str]:
    """The names that the asserts use and that neither they nor the setup define."""
    asserts = parse(tests.get("asserts", ""))
    if asserts is None:
        return frozenset()
    used = names_in(asserts, ast.Load)
    defined = names_in(asserts, ast.Store) | set(vars(builtins))
    defined |= names_in(parse(tests.get("setup", "")) or ast.Module([], []), ast.Store)
    return frozenset(used - defined)


def names_in(tree: ast.Module, context: type) -> set[str]:
    """The names that are read (context ast.Load) or bound (ast.Store) in a tree."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, context):
            names.add(node.id)
        elif context is ast.Store:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.arg):
                names.add(node.arg)
            elif isinstance(node, ast.alias):
                names.add((node.asname or node.name).split(".")[0])
    return names


# ---------------- expressions: the toy's code ----------------


def evaluate(tree: ast.Module, variable: str, value: int) -> int | None:
    """The value of a program that is one expression of +, − and · in one variable.

    It is computed on the syntax tree: nothing is run. None if the program is anything else.
    """
    if len(tree.body) != 1 or not isinstance(tree.body[0], ast.Expr):
        return None
    try:
        return evaluate_node(tree.body[0].value, variable, value)
    except (ValueError, RecursionError):
        return None


def evaluate_node(node: ast.expr, variable: str, value: int) -> int:
    """The value of a node. Raises ValueError for one that such an expression does not have."""
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

    None instead of True or False: the server or the machine failed, so nobody knows. Raises
    UserError if this machine cannot seal code.
    """
    if tests.get("compare") == "livecodebench":
        code, tests = graded(code, tests)
    if url:
        return run_on_server(code, tests, url)
    if not sandbox.UNSAFE:
        check_sandbox()
    passed, why = sandbox.run(code, tests, tests.get("seconds", CODE_SECONDS), CODE_MEGABYTES)
    return passed, "right" if passed else why


def run_on_server(code: str, tests: dict, url: str) -> tuple[bool | None, str]:
    """As run_program, by SandboxFusion's HTTP API.

    There the tests' asserts run in the same process as the code.
    """
    if "asserts" in tests:
        program = "\n".join((tests.get("setup", ""), code, tests["asserts"]))
        return run_once_on_server(program, "", None, tests, url)
    for stdin, expected in zip(tests["inputs"], tests["outputs"]):
        passed, why = run_once_on_server(code, stdin, expected, tests, url)
        if not passed:
            return passed, why
    return True, "right"


def run_once_on_server(
    program: str, stdin: str, expected: str | None, tests: dict, url: str
) -> tuple[bool | None, str]:
    """As run_program, for one input. expected: what the program must print (None: anything)."""
    request = {
        "code": program,
        "language": "python",
        "stdin": stdin,
        "run_timeout": tests.get("seconds", CODE_SECONDS),
    }
    try:
        result = result_of(http_json(f"{url.rstrip('/')}/run_code", request))
    except (OSError, http.client.HTTPException, ValueError) as error:
        return None, f"sandbox-error: {url}: {type(error).__name__} {error}"

    if result.get("status") == "TimeLimitExceeded":
        return False, "timeout"
    if result["return_code"] != 0:
        return False, "exception"
    if expected is not None:
        printed = result.get("stdout") or ""
        if not same_output(printed, expected, tests.get("compare", "numbers")):
            return False, "assertion"
    return True, "right"


def result_of(reply) -> dict:
    """What SandboxFusion says of the program's run. Raises ValueError if it says nothing of it."""
    if not isinstance(reply, dict):
        raise ValueError(f"its reply is {type(reply).__name__}, no object")
    result = reply.get("run_result")
    if reply.get("status") not in ("Success", "Failed") or not isinstance(result, dict):
        raise ValueError(f"status {reply.get('status')!r}: {reply.get('message')!r}")
    timed_out = result.get("status") == "TimeLimitExceeded"
    if not timed_out and not isinstance(result.get("return_code"), int):
        raise ValueError(f"the run's status is {result.get('status')!r}, without a return code")
    if not isinstance(result.get("stdout") or "", str):
        raise ValueError("the run's stdout is no text")
    return result


@functools.cache
def check_sandbox() -> None:
    """Raise UserError if this machine cannot seal model-written code. The test runs only once."""
    refused = sandbox.self_test()  # a probe's name → was it refused; "sealed" → were all refused
    if refused["sealed"]:
        return
    allowed = []
    for probe, was_refused in refused.items():
        if not was_refused and probe != "sealed":
            allowed.append(probe)
    raise UserError(
        "this machine cannot seal model-written code "
        f"(not refused: {', '.join(allowed)}): give --sandbox-url, a SandboxFusion server, "
        "or --allow-unsafe-code at your own risk"
    )
