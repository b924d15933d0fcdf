"""The row: one JSON object per prompt. Its schema, its checks, and how files of rows are read.

    {"id", "domain", "prompt": str | [{"role", "content"}, …], …} and, per domain,
    math, science  "answer": str
    code           "tests": {"asserts": str, "setup": str} (functions)
                   or {"inputs": […], "outputs": […]} (programs that read stdin)
    writing        "reference": str
    if             "constraints": [{"id": str, "kwargs": {…}}, …] (IFEval's instruction ids)
    agent          "gold_calls": [{"name", "arguments"}, …], optional "tools"

Optional: "response" (sft.py trains on it), "pass_rate". Generated rows may carry "gym" instead of
an answer: reasoning-gym checks those.
"""

import json
import re
import sys
from pathlib import Path

from common.errors import UserError

DOMAINS = ("math", "code", "science", "writing", "if", "agent")
REQUIRED_FIELD = {
    "math": "answer",
    "code": "tests",
    "science": "answer",
    "writing": "reference",
    "if": "constraints",
    "agent": "gold_calls",
}


# ---------------- text of a row ----------------


def prompt_text(row: dict) -> str:
    """The prompt as plain text, without the system's message."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message["content"] for message in prompt if message["role"] != "system")


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


# ---------------- checks of a row ----------------
# Each takes a row and returns what is wrong with it, or None.


def check_domain(row: dict) -> str | None:
    domain = row.get("domain")
    if domain not in DOMAINS:
        return f'field "domain" is {domain!r}, not one of {" ".join(DOMAINS)}'
    return None


def is_message(message) -> bool:
    if not isinstance(message, dict):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def check_prompt(row: dict) -> str | None:
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return None
    if isinstance(prompt, list) and prompt and all(is_message(message) for message in prompt):
        return None
    return 'field "prompt" must be a text or a list of {"role", "content"}'


def check_gym(row: dict) -> str | None:
    if "gym" not in row:
        return None
    gym = row["gym"]
    if isinstance(gym, dict) and isinstance(gym.get("task"), str):
        if all(isinstance(gym.get(name), int) for name in ("size", "seed", "index")):
            return None
    return 'field "gym" needs "task", and the numbers "size", "seed" and "index"'


def check_required_field(row: dict) -> str | None:
    name = REQUIRED_FIELD[row["domain"]]
    if name not in row and "gym" not in row:
        return f'field "{name}" is missing (domain {row["domain"]} needs it)'
    return None


def check_answer(row: dict) -> str | None:
    if REQUIRED_FIELD[row["domain"]] != "answer":
        return None
    answer = row.get("answer", "")
    if not isinstance(answer, str):
        return f'field "answer" must be a text, not {type(answer).__name__}'
    if "gym" not in row and not answer.strip():
        return 'field "answer" is empty: no response would be right'
    return None


def are_paired_texts(inputs, outputs, any_type: bool) -> bool:
    """Are these two lists of the same length, not empty, and (unless any_type) all texts?"""
    if not isinstance(inputs, list) or not isinstance(outputs, list):
        return False
    if not inputs or len(inputs) != len(outputs):
        return False
    return any_type or all(isinstance(value, str) for value in [*inputs, *outputs])


def check_tests(row: dict) -> str | None:
    if row["domain"] != "code" or "tests" not in row:
        return None
    tests = row["tests"]
    if isinstance(tests, dict):
        any_type = "expression" in tests  # the toy's tests hold numbers
        if are_paired_texts(tests.get("inputs"), tests.get("outputs"), any_type):
            return None
        if isinstance(tests.get("asserts"), str):
            return None
    return 'field "tests" needs "asserts", or "inputs" and as many "outputs", all texts'


def check_pass_rate(row: dict) -> str | None:
    rate = row.get("pass_rate", 0)
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not is_number or not 0 <= rate <= 1:
        return f'field "pass_rate" is {rate!r}, not a number from 0 to 1'
    return None


def check_letters(row: dict) -> str | None:
    if re.search("[\ud800-\udfff]", str(row["prompt"])):
        return 'field "prompt" holds half a surrogate pair, which no tokenizer takes'
    return None


def check_lists(row: dict) -> str | None:
    name = REQUIRED_FIELD[row["domain"]]
    if name not in ("constraints", "gold_calls"):
        return None
    values = row.get(name, [])
    if not isinstance(values, list):
        return f'field "{name}" must be a list'
    if name == "gold_calls":
        for call in values:
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return 'field "gold_calls" needs a "name" in each call'
    return None


CHECKS = (
    check_domain,
    check_prompt,
    check_gym,
    check_required_field,
    check_answer,
    check_tests,
    check_pass_rate,
    check_letters,
    check_lists,
)


def check_row(row, where: str) -> dict:
    """The row itself. Raises UserError that names the place (`where`), the field and the fault."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is a JSON object, not {type(row).__name__}")
    for check in CHECKS:
        fault = check(row)
        if fault:
            raise UserError(f"{where}: {fault}")
    return row


# ---------------- files of rows ----------------


def read_json_lines(path: Path, check) -> list:
    """check(object, line number, "file line number") for each line that is not blank.

    Raises UserError for malformed lines, after all of them were named on stderr.
    """
    values, faults = [], []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        where = f"{path} line {number}"
        try:
            if line.strip():
                values.append(check(json.loads(line.decode("utf-8")), number, where))
        except UnicodeDecodeError as error:
            faults.append(f"{where}: not UTF-8 at byte {error.start}")
        except json.JSONDecodeError as error:
            faults.append(f"{where}: not JSON ({error.msg} at column {error.colno})")
        except UserError as error:
            faults.append(str(error))
    if len(faults) == 1:
        raise UserError(faults[0])
    if faults:
        print("\n".join(faults), file=sys.stderr)
        total = len(values) + len(faults)
        raise UserError(
            f"{path}: {len(faults)} of {total} lines are malformed (each is named above): "
            "correct or remove them"
        )
    return values


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file, their ids prefixed with its name. Raises UserError."""

    def with_id(row, number, where):
        row = check_row(row, where)
        return {**row, "id": f"{path.stem}/{row.get('id', number)}"}

    rows = read_json_lines(path, with_id)
    if not rows:
        raise UserError(f"{path}: no rows in this file")
    return rows
