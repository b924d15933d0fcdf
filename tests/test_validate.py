"""checkers/validate.py counts and names the rows whose own solution fails."""

import functools
import json
import subprocess
import sys

import pytest

from checkers import validate
from common.cli import run_main
from conftest import ROOT

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the seal needs Linux")

STDIN = {"inputs": ["2\n", "5\n"], "outputs": ["4\n", "25\n"]}
ASSERTS = {"asserts": "assert square(3) == 9"}
SQUARE = "def square(x):\n    return x * x"
PRINT_SQUARE = "print(int(input()) ** 2)"


def row(name: str, tests: dict, **fields) -> dict:
    """A row of code."""
    return {"id": name, "domain": "code", "prompt": "Square it.", "tests": tests, **fields}


def fenced(code: str) -> str:
    """A response whose answer is this code."""
    return f"<think>easy</think>Here.<answer>\n```python\n{code}\n```\n</answer>"


ROWS = [
    row("right", ASSERTS, solution=SQUARE),
    row("right program", STDIN, solution=PRINT_SQUARE),
    row("right response", ASSERTS, response=fenced(SQUARE)),
    row("right bare response", STDIN, response=f"```python\n{PRINT_SQUARE}\n```"),
    row("wrong", ASSERTS, solution="def square(x):\n    return x"),
    row("wrong response", STDIN, response=fenced("print(4)")),
    row("needs a package", STDIN, solution="import sqlite3\n" + PRINT_SQUARE),
    row("none", ASSERTS),
    row("blank", ASSERTS, solution=" \n", response=""),
    row("no text", ASSERTS, solution=None, response=None),
    {"id": "sum", "domain": "math", "prompt": "1 + 1?", "answer": "2", "response": "2"},
]
FAILURES = [
    "rows/wrong: assertion",
    "rows/wrong response: assertion",
    "rows/needs a package: import-missing",
]


def write_rows(path, rows: list[dict]):
    """The path, to which the rows are written."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_failures_are_named_and_all_are_counted(tmp_path, capsys):
    validate.main([str(write_rows(tmp_path / "rows.jsonl", ROWS))])
    *failures, summary = capsys.readouterr().out.splitlines()
    assert failures == FAILURES
    assert summary == (
        "rows of code whose tests run programs: 10. Their own solutions: "
        "4 pass, 3 fail, 0 unknown (the machine failed), 3 missing"
    )


def test_what_the_machine_cannot_judge_is_no_failure(tmp_path, capsys, monkeypatch):
    def run_program(code, tests, url):
        return None, "unknown: wall-clock"

    monkeypatch.setattr(validate, "run_program", run_program)
    validate.main([str(write_rows(tmp_path / "rows.jsonl", ROWS[:2]))])
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "rows/right: unknown: wall-clock",
        "rows/right program: unknown: wall-clock",
    ]
    assert "0 pass, 0 fail, 2 unknown (the machine failed), 0 missing" in lines[2]


def test_long_files_show_progress(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(validate, "PROGRESS_SECONDS", 0)
    validate.main([str(write_rows(tmp_path / "rows.jsonl", ROWS[:3]))])
    assert "2 of 3 solutions checked" in capsys.readouterr().err


def test_rows_that_are_not_run_are_not_counted():
    toy = {"expression": True, "inputs": [1], "outputs": [2]}
    gym = {"task": "chain_sum", "size": 1, "seed": 0, "index": 0}
    assert not validate.is_run(row("toy", toy))
    assert not validate.is_run({"id": "g", "domain": "code", "prompt": "?", "gym": gym})
    assert not validate.is_run(ROWS[-1])
    assert validate.is_run(ROWS[0])


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "No such file"),
        ("", "no rows in this file"),
        ("{", "line 1: not JSON"),
        ('{"domain": "code", "prompt": "?"}', 'line 1: field "tests" is missing'),
        (json.dumps(ROWS[-1]), "no row of code"),
    ],
)
def test_a_users_error_is_one_line(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as end:
        run_main(functools.partial(validate.main, [str(path)]))
    assert message in end.value.code
    assert "\n" not in end.value.code


def test_the_command(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", ROWS[:1])
    command = [sys.executable, "-m", "checkers.validate", str(path)]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert "programs: 1. Their own solutions: 1 pass," in process.stdout, process.stderr
    assert process.returncode == 0
