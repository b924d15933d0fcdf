"""Check code rows before training: does each row's own solution pass the row's own tests?

    python -m checkers.validate rows.jsonl

A row whose solution fails here teaches that right programs are wrong: its tests need what the
sandbox refuses (files, packages, processes) or more time, or they are wrong themselves. The
solution is the row's "solution", a program, or the program in its "response". Each failure is
named, then all are counted. Rows without a solution are counted too: nobody knows about those.
"""

import concurrent.futures
import os
import re
import sys
import time
from collections import Counter
from pathlib import Path

from checkers import sandbox
from checkers.code import extract_code, run_program
from common.cli import Parser, add_flags, run_main
from common.errors import UserError
from common.rows import read_rows

PROGRESS_SECONDS = 10  # between two lines of progress


def solution_of(row: dict) -> str | None:
    """The program of the row's own solution; None if it has none, or an empty one."""
    solution = row.get("solution")
    if isinstance(solution, str) and solution.strip():
        return solution
    response = row.get("response")
    if isinstance(response, str) and response.strip():
        return extract_code(answer_of(response), row["tests"])
    return None


def answer_of(response: str) -> str:
    """What a response says behind its thinking, without the tags of the answer."""
    answer = response.rpartition("</think>")[2]
    tagged = re.search(r"<answer>(.*)</answer>", answer, re.DOTALL)
    return tagged[1] if tagged else answer


def is_run(row: dict) -> bool:
    """Is this a row of code whose tests run programs? The toy's expressions are not run."""
    return row["domain"] == "code" and "tests" in row and "expression" not in row["tests"]


def validate(rows: list[dict], sandbox_url: str = "") -> list[tuple[dict, bool | None, str]]:
    """[(row, does its solution pass or None if nobody knows, why)] of those that have a solution.

    In the order of the rows. Progress goes to stderr. Raises UserError if this machine cannot seal
    code.
    """

    def check(job):
        row, solution = job
        passed, why = run_program(solution, row["tests"], sandbox_url)
        return row, passed, why

    jobs = [(row, solution_of(row)) for row in rows]
    jobs = [job for job in jobs if job[1] is not None]
    results = []
    next_report = time.monotonic() + PROGRESS_SECONDS
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for result in pool.map(check, jobs):
            results.append(result)
            if time.monotonic() > next_report:
                print(f"{len(results)} of {len(jobs)} solutions checked", file=sys.stderr)
                next_report = time.monotonic() + PROGRESS_SECONDS
    return results


def failure_lines(results: list[tuple[dict, bool | None, str]]) -> list[str]:
    """One line for each solution that does not pass: the row's id, and why."""
    lines = []
    for row, passed, why in results:
        if not passed:
            lines.append(f"{row['id']}: {why}")
    return lines


def summary(rows: list[dict], results: list[tuple[dict, bool | None, str]]) -> str:
    """One line that counts the rows by what became of their solutions."""
    counts = Counter(passed for _, passed, _ in results)
    return (
        f"rows of code whose tests run programs: {len(rows)}. Their own solutions: "
        f"{counts[True]} pass, {counts[False]} fail, {counts[None]} unknown (the machine failed), "
        f"{len(rows) - len(results)} missing"
    )


def parse_args(argv: list[str] | None = None):
    """The flags."""
    parser = Parser(__doc__)
    parser.add_argument("file", type=Path, help="a .jsonl file of rows")
    add_flags(parser, "--sandbox-url", "--allow-unsafe-code")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Print the failures and the counts. Raises UserError."""
    args = parse_args(argv)
    sandbox.allow_unsafe(args.allow_unsafe_code)
    rows = [row for row in read_rows(args.file) if is_run(row)]
    if not rows:
        raise UserError(f"{args.file}: no row of code whose tests run programs: nothing to check")
    results = validate(rows, args.sandbox_url)
    if args.sandbox_url and results and all(passed is None for _, passed, _ in results):
        raise UserError(f"--sandbox-url: no solution could be checked: {failure_lines(results)[0]}")
    for line in [*failure_lines(results), summary(rows, results)]:
        print(line)


if __name__ == "__main__":
    run_main(main, "nothing was written")
