"""Rows with faults are refused before a run; what is not refused never ends it."""

import copy
import importlib.util

import pytest

import rewards
from common.errors import UserError
from common.rows import check_row

ADD = {
    "name": "add",
    "description": "adds",
    "parameters": {
        "type": "dict",
        "properties": {"a": {"type": "integer", "description": "x"}},
        "required": ["a"],
    },
}
ROWS = [
    {"domain": "math", "answer": "3"},
    {"domain": "science", "answer": "B"},
    {"domain": "science", "answer": "x y", "match": "last-word"},
    {"domain": "code", "tests": {"asserts": "assert f() == 1", "setup": "x = 1"}},
    {"domain": "code", "tests": {"inputs": ["1"], "outputs": ["1"]}},
    {"domain": "code", "tests": {"inputs": [1], "outputs": [2], "expression": "x"}},
    {"domain": "writing", "judge": "rhyme", "topic": "cat", "reference": "hat"},
    {"domain": "agent", "gold_calls": [{"name": "f", "arguments": {"x": 1}}]},
    {"domain": "math", "gym": {"task": "chain_sum", "size": 2, "seed": 1, "index": 0}},
    {
        "domain": "agent",
        "checker": "bfcl",
        "category": "simple_python",
        "functions": [ADD],
        "possible": [{"add": {"a": [3]}}],
        "language": "python",
        "gold_calls": [],
    },
]
for constraint, arguments in (
    ("keywords:existence", {"keywords": ["a"]}),
    ("keywords:frequency", {"keyword": "a", "relation": "at least", "frequency": 2}),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 1, "nth_paragraph": 1, "first_word": "a"},
    ),
    ("length_constraints:number_words", {"relation": "at least", "num_words": 3}),
    ("detectable_format:multiple_sections", {"section_spliter": "S", "num_sections": 1}),
    ("change_case:english_capital", {}),
    ("language:response_language", {"language": "de"}),
    ("copy:repeat_phrase", {"phrase": "a b", "small_n": 1}),
    ("keywords:keyword_specific_position", {"keyword": "a", "n": 1, "m": 1}),
    ("toy:say", {"word": "a", "count": 2, "mark": "-"}),
):
    ROWS.append({"domain": "if", "constraints": [{"id": constraint, "kwargs": arguments}]})

FAULTS = [None, 5, -1, 2.5, "", [], {}, "zzz", True, ["a", 5], {"a": 1}, [None], "a(b", "MISSING"]
RESPONSES = [
    "<think>a</think><answer>B</answer>",
    "<think>a</think><answer>a\n\nb</answer>",
    '<think>a</think><answer>[{"name": "add", "arguments": {"a": 3}}]</answer>',
    "<think>a</think><answer>```python\ndef f(): return 1\n```</answer>",
]


def paths_in(value, path=()):
    """Yield the path of every field and item in a row."""
    if path:
        yield path
    if isinstance(value, dict):
        for name in value:
            yield from paths_in(value[name], (*path, name))
    elif isinstance(value, list):
        for i in range(len(value)):
            yield from paths_in(value[i], (*path, i))


def with_fault(row: dict, path: tuple, fault) -> dict:
    """A copy of the row with another value at the path, or with none."""
    row = copy.deepcopy(row)
    holder = row
    for step in path[:-1]:
        holder = holder[step]
    if fault == "MISSING":
        del holder[path[-1]]
    else:
        holder[path[-1]] = fault
    return row


def is_refused(row) -> bool:
    """Is the row refused before a run, in one line?"""
    try:
        check_row(row, "rows.jsonl line 1")
        rewards.check_rows([row], "", "")
    except UserError as error:
        assert "\n" not in str(error)
        return True
    return False


def needs_missing_package(row: dict) -> bool:
    """Is the row judged by a package that is not installed?"""
    name = rewards.PACKAGES.get(row.get("checker"))
    for constraint in row.get("constraints", []):
        if constraint["id"] not in rewards.ifeval.CONSTRAINTS:
            name = "if_verifiable"
    return bool(name) and importlib.util.find_spec(name) is None


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(ROWS)))
def test_a_row_with_a_fault_is_refused_or_harmless(number):
    row = {"id": "r", "prompt": "?", **ROWS[number]}
    if needs_missing_package(row):
        pytest.skip("its package is not installed")
    assert not is_refused(row)
    for path in paths_in(row):
        for fault in FAULTS:
            if path == ("id",):
                continue
            faulty = with_fault(row, path, fault)
            if is_refused(faulty):
                continue
            for result in rewards.score(RESPONSES, [faulty] * len(RESPONSES)):
                assert result.correct is not None, (path, fault)


COMMA = {"id": "punctuation:no_comma", "kwargs": {}}


@pytest.mark.parametrize(
    "row, fault",
    [
        ({"domain": "math", "answer": "3", "checker": []}, "checker"),
        ({"domain": "science", "answer": "x y", "match": []}, "match"),
        ({"domain": "science", "answer": "x y", "match": "first-word"}, "match"),
        ({"domain": "if", "constraints": [COMMA], "mode": None}, "mode"),
        ({"domain": "writing", "judge": "rhymes", "reference": "a"}, "judge"),
        ({"domain": "writing", "judge": "rhyme", "topic": "xyz", "reference": "a"}, "rhyme"),
        ({"domain": "writing", "judge": "rhyme", "topic": "cat", "reference": 5}, "reference"),
        ({"domain": "code", "tests": {"asserts": "f()", "setup": 5}}, "setup"),
        ({"domain": "code", "tests": {"asserts": "f()", "compare": "text"}}, "compare"),
        ({"domain": "code", "tests": {"asserts": "f()", "compare": []}}, "compare"),
        ({"domain": "code", "tests": {"asserts": "f()", "seconds": "5"}}, "seconds"),
        ({"domain": "agent", "gold_calls": [{"name": "f", "arguments": 5}]}, "gold call"),
        (
            {"domain": "math", "gym": {"task": "nope", "size": 2, "seed": 1, "index": 0}},
            "reasoning-gym has no entry",
        ),
    ],
)
def test_faults_are_named(row, fault):
    with pytest.raises(UserError, match=fault):
        row = check_row({"id": "r", "prompt": "?", **row}, "rows.jsonl line 1")
        rewards.check_rows([row], "", "")
