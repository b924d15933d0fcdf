"""The row: one JSON object per prompt. Its schema, its checks, and the reading of files of rows.

    {"id", "domain", "prompt": str | [{"role", "content"}, …], …} and, per domain,
    math, science  "answer": str
    code           "tests": {"asserts": str, "setup": str} (functions)
                   or {"inputs": […], "outputs": […]} (programs that read stdin)
    writing        "reference": str
    if             "constraints": [{"id": str, "kwargs": {…}}, …] (IFEval's instruction ids)
    agent          "gold_calls": [{"name", "arguments"}, …], optional "tools"

Optional: "response" (sft.py trains on it), "pass_rate" (of a reference model, 0 to 1). A row of
reasoning-gym has "gym" instead of the required field: reasoning-gym's own checker scores it.
"checker", "match", "judge" and "mode" change how the response is checked (rewards.py).
"""

import ast
import codecs
import gzip
import json
import re
import sys
import warnings
import zlib
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
    """The prompt as plain text, without its system messages."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(message["content"] for message in prompt if message["role"] != "system")


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    return re.findall(r"\w+", text)


# ---------------- checks of a row ----------------
MOST_SECONDS = 3600  # that a test of code may take

# Each check takes a row and returns what is wrong with it, or None. The order of CHECKS matters:
# later checks rely on earlier ones.


def check_domain(row: dict) -> str | None:
    """The domain is one of DOMAINS."""
    domain = row.get("domain")
    if domain not in DOMAINS:
        return f'field "domain" is {domain!r:.40}, not one of {" ".join(DOMAINS)}'
    return None


def is_message(message) -> bool:
    """Is this a {"role", "content"} of two texts?"""
    if not isinstance(message, dict):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def check_prompt(row: dict) -> str | None:
    """The prompt is a text that is not blank, or a list of messages."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        return None
    if isinstance(prompt, list) and prompt and all(is_message(message) for message in prompt):
        if any(message["content"].strip() for message in prompt):
            return None
    return 'field "prompt" must be a text or a list of {"role", "content"}'


def check_gym(row: dict) -> str | None:
    """ "gym" says which of reasoning-gym's entries the row is."""
    if "gym" not in row:
        return None
    gym = row["gym"]
    if isinstance(gym, dict) and isinstance(gym.get("task"), str):
        numbers = all(isinstance(gym.get(name), int) for name in ("size", "seed", "index"))
        if numbers and isinstance(gym.get("settings", {}), dict):
            return None
    return 'field "gym" needs "task", and the numbers "size", "seed" and "index"'


def check_required_field(row: dict) -> str | None:
    """The domain's field is there, or "gym" instead of it."""
    name = REQUIRED_FIELD[row["domain"]]
    if name not in row and "gym" not in row:
        return f'field "{name}" is missing (domain {row["domain"]} needs it)'
    return None


def check_answer(row: dict) -> str | None:
    """The answer of math and science is a text, and not blank."""
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
    """The tests of code are asserts, or pairs of inputs and outputs."""
    if row["domain"] != "code" or "tests" not in row:
        return None
    tests = row["tests"]
    if isinstance(tests, dict):
        any_type = "expression" in tests  # the toy's tests hold numbers
        if not isinstance(tests.get("expression", ""), str):
            return 'field "tests": "expression" must be the name of a variable'
        if are_paired_texts(tests.get("inputs"), tests.get("outputs"), any_type):
            return None
        if isinstance(tests.get("asserts"), str) and isinstance(tests.get("setup", ""), str):
            return fault_of_asserts(tests["asserts"], tests.get("setup", ""))
    return (
        'field "tests" needs "asserts" (and perhaps "setup"), or "inputs" and as many "outputs", '
        "all texts"
    )


LONGEST_ASSERTS = 100_000  # characters that are parsed: it takes a second for ten times as many


def fault_of_asserts(asserts: str, setup: str) -> str | None:
    """What is wrong with the tests of a function: no answer would be right."""
    if not asserts.strip():
        return 'field "tests": "asserts" is empty: no response would be right'
    for name, text in (("asserts", asserts), ("setup", setup)):
        if len(text) > LONGEST_ASSERTS:
            continue
        try:
            with warnings.catch_warnings(action="ignore"):  # of odd escapes
                ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            return f'field "tests": "{name}" is not Python ({error})'
    return None


def check_test_options(row: dict) -> str | None:
    """How code is compared and how long it may run are known, if the tests say so."""
    if row["domain"] != "code" or "tests" not in row:
        return None
    compare = row["tests"].get("compare", "numbers")
    if compare not in ("numbers", "livecodebench"):
        return f'field "tests": "compare" is {compare!r:.40}, not "numbers" or "livecodebench"'
    seconds = row["tests"].get("seconds", 1)
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not 0 < seconds <= MOST_SECONDS:
        return f'field "tests": "seconds" is {seconds!r:.40}, not above 0 and up to {MOST_SECONDS}'
    return None


def check_reference(row: dict) -> str | None:
    """The reference of writing is a text."""
    reference = row.get("reference", "")
    if row["domain"] == "writing" and not isinstance(reference, str):
        return f'field "reference" must be a text, not {type(reference).__name__}'
    return None


def check_pass_rate(row: dict) -> str | None:
    """The pass rate is a number from 0 to 1."""
    rate = row.get("pass_rate", 0)
    is_number = isinstance(rate, (int, float)) and not isinstance(rate, bool)
    if not is_number or not 0 <= rate <= 1:
        return f'field "pass_rate" is {rate!r}, not a number from 0 to 1'
    return None


def check_surrogates(row: dict) -> str | None:
    """Every text can be encoded as UTF-8. (JSON can write half of a surrogate pair.)"""
    for name, value in row.items():
        if re.search("[\ud800-\udfff]", name + json.dumps(value, ensure_ascii=False)):
            place = f"field {json.dumps(name)[:40]}"
            return f"{place} holds half a surrogate pair, which no tokenizer takes"
    return None


def check_tools(row: dict) -> str | None:
    """The tools, which a chat template writes, are a list of objects."""
    tools = row.get("tools")
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        return 'field "tools" must be a list of objects'
    return None


def check_lists(row: dict) -> str | None:
    """Constraints and gold calls are lists, and each gold call has a name."""
    name = REQUIRED_FIELD[row["domain"]]
    if name not in ("constraints", "gold_calls"):
        return None
    values = row.get(name, [])
    if not isinstance(values, list):
        return f'field "{name}" must be a list'
    if name == "constraints" and name in row and not values:
        return 'field "constraints" is empty: every response would be right'
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
    check_test_options,
    check_reference,
    check_pass_rate,
    check_surrogates,
    check_lists,
    check_tools,
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


# ---------------- mixtures of domains ----------------


def lagging_domain(shares: dict[str, float], counts: dict[str, int]) -> str:
    """The domain to draw the next row from: the one that is furthest below its share.

    shares: by domain, summing to 1. counts: rows drawn so far, by domain. A mixture that is drawn
    this way has each domain's share to within one row.
    """
    total = sum(counts.values()) + 1
    lags = {domain: share * total - counts[domain] for domain, share in shares.items()}
    return max(lags, key=lags.get)


# ---------------- files of rows ----------------


LONGEST_NUMBER = 4300  # digits: Python reads no longer ones


def read_plain(path: Path) -> bytes:
    """A file's bytes, without compression (gzip) and without a byte order mark.

    Raises UserError if it is damaged.
    """
    content = path.read_bytes()
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: it is damaged, or no gzip file ({error})") from None
    return content.removeprefix(codecs.BOM_UTF8)


def read_json_lines(path: Path, check) -> list:
    """The list of check(object, number, where), for each line of the file that is not blank.

    number: the line's number, from 1. where: "<path> line <number>". check returns the value to
    keep, or raises UserError. Raises UserError if lines are malformed; when there are several,
    each is first named on stderr.
    """
    values, faults = [], []
    for number, line in enumerate(read_plain(path).splitlines(), 1):
        where = f"{path} line {number}"
        try:
            if line.strip():
                values.append(check(json.loads(line.decode("utf-8")), number, where))
        except UnicodeDecodeError as error:
            faults.append(f"{where}: not UTF-8 at byte {error.start}")
        except json.JSONDecodeError as error:
            faults.append(f"{where}: not JSON ({error.msg} at column {error.colno})")
        except RecursionError:
            faults.append(f"{where}: its JSON is nested too deeply")
        except ValueError:
            faults.append(f"{where}: it has a number of more than {LONGEST_NUMBER} digits")
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


def stem_of(path: Path) -> str:
    """A file's name without .jsonl or .jsonl.gz."""
    return Path(path.name.removesuffix(".gz")).stem


def read_rows(path: Path, name: str = "") -> list[dict]:
    """The rows of a .jsonl file, which may be compressed (.jsonl.gz). Raises UserError.

    A row's new id is <name>/<its id, or its line's number if it has none>. name: the file's name
    without its ending, if nothing else is given.
    """
    name = name or stem_of(path)

    def with_id(row, number, where):
        row = check_row(row, where)
        return {**row, "id": f"{name}/{row.get('id', number)}"}

    rows = read_json_lines(path, with_id)
    if not rows:
        raise UserError(f"{path}: no rows in this file")
    return rows
