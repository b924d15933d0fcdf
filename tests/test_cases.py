"""Hard cases with the verdict that is right, from people's bug reports: tests/cases/rewards.jsonl.

    {"kind", "scheme", "gold" or "row", "response", "expected", "source", …}

expected: true, false, "refused" (an error before anything is sampled), or null (people differ: it
must only not crash or hang). Rows of livecodebench are the source's own, and go through its
converter.
"""

import importlib.util
import json

import pytest

import rewards
from common.errors import UserError
from conftest import ROOT
from sources import benchmarks

# Its response has 40 words, which is less than 50. It says "expected": false, so it is not a case.
NOT_CASES = ("less than is enforced", "repeated id both count")

DOMAINS = {  # a case's kind → the domain of its row, if the row does not say
    "math": "math",
    "format": "math",
    "science": "science",
    "agent": "agent",
    "bfcl": "agent",
}


def read_cases() -> list[dict]:
    """The cases that are right themselves."""
    lines = (ROOT / "tests/cases/rewards.jsonl").read_text(encoding="utf-8").splitlines()
    cases = [json.loads(line) for line in lines]
    return [case for case in cases if case.get("name") not in NOT_CASES]


def row_of(case: dict) -> dict:
    """The row that the case's response answers."""
    if case["kind"] == "livecodebench":
        row = benchmarks.livecodebench(case["row"])
    else:
        row = case.get("row") or {"answer": case["gold"]}
        row = {"domain": DOMAINS.get(case["kind"], row.get("domain")), **row}
    return {"id": "case", "prompt": "?", **row}


def name_of(number_and_case: tuple[int, dict]) -> str:
    """The test's id, such as math-17."""
    number, case = number_and_case
    return f"{case['kind']}-{number}-{case.get('name', '')}".replace(" ", "_")


def missing_package(case: dict) -> str | None:
    """The optional package that judges the case's row, if it is not installed."""
    row = case.get("row", {})
    name = rewards.PACKAGES.get(row.get("checker"))
    for constraint in row.get("constraints", []):
        if constraint["id"] not in rewards.ifeval.CONSTRAINTS:
            name = "if_verifiable"
    if name and importlib.util.find_spec(name) is None:
        return name
    return None


@pytest.mark.parametrize("number_and_case", list(enumerate(read_cases())), ids=name_of)
def test_case(number_and_case):
    _, case = number_and_case
    package = missing_package(case)
    if package:
        pytest.skip(f"{package} is not installed")
    try:
        result = rewards.score([case["response"]], [row_of(case)], case["scheme"])[0].correct
    except UserError as error:
        needs_data = "NLTK" in str(error)  # the row is refused, with the command that brings it
        assert case["expected"] == "refused" or needs_data, error
        return
    if case["expected"] is not None:
        assert result is case["expected"]
