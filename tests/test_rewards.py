"""Rewards: tables of right, wrong, invalid and tricky responses, and mistakes of other projects."""

import contextlib
import http.server
import json
import os
import queue
import sqlite3
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

import rewards
from checkers import code, ifeval, ifevalg, servers, workers
from checkers.option_letters import option_of_response
from common.errors import UserError
from conftest import ROOT
from rewards import extract_answer
from sources.packaged import gym_rows, humaneval_rows

# (--reward-format released: test_formats.py)
score = partial(rewards.score, reward_format="strict")


def wrap(answer: str, thought: str = "so") -> str:
    """The answer as a response in the format of CGPO."""
    return f"<think>{thought}</think><answer>{answer}</answer>"


def score_one(response: str, row: dict, **options) -> rewards.Score:
    """The score of one response to a row that gets an id and a prompt."""
    return score([response], [{"id": "r", "prompt": "?", **row}], **options)[0]


MATH = {"domain": "math", "answer": "3"}
SCIENCE = {"id": "r", "domain": "science", "prompt": "Why?", "answer": "the truth"}
EXPRESSION = {
    "domain": "code",
    "tests": {"inputs": [0, 1, 5], "outputs": [6, 8, 16], "expression": "x"},
}
FUNCTION = {
    "domain": "code",
    "entry_point": "add",
    "tests": {"asserts": "assert add(1, 2) == 3\nassert add(-1, 1) == 0"},
}
STDIN = {
    "domain": "code",
    "tests": {"inputs": ["1 2\n", "5 6\n"], "outputs": ["3\nok\n", "11\nok"]},
}


# ---------------- format ----------------


@pytest.mark.parametrize(
    "response, answer",
    [
        ("<think>a</think><answer>3</answer>", "3"),
        ("<think></think>\n<answer>\n 3 </answer>\n", "3"),
        ("<think>a</think>So <answer>it is \\boxed{\\frac{1}{2}}</answer>", "\\frac{1}{2}"),
        ("<think>a</think>Hence \\boxed{1} or rather \\boxed{x^{2}}.", "x^{2}"),
        ("<think>a</think> hence <answer>a < b</answer>", "a < b"),
    ],
)
def test_valid_formats(response, answer):
    assert extract_answer(response) == (answer, "")


@pytest.mark.parametrize(
    "response",
    [
        "",
        " ",
        "3",
        "<answer>3</answer>",
        "<think>a<answer>3</answer>",
        "a</think><answer>3</answer>",
        "<think>a</think>3",
        "<think>a</think><answer>3",
        "<think>a</think>3</answer>",
        "<think>a</think></answer>3<answer>",
        "<think>a</think><answer></answer>",
        "<think>a</think><answer>3</answer><answer>4</answer>",
        "<think>a<think>b</think></think><answer>3</answer>",
        "<think>a</think><think>b</think><answer>3</answer>",
        "<think>a</think><answer>3<answer>4</answer></answer>",
        "<think><answer>3</answer></think><answer>3</answer>",
        "<think>a</think><answer>3</answer> and more",
        "x<think>a</think><answer>3</answer>",
        "<think>a</think>\\boxed{3",
        "<think>a</think><answer>\\boxed{}</answer>",
        "<THINK>a</THINK><answer>3</answer>",
        "\ud800",
        "\x00" * 10,
        "a" * 100_000,
        "<think>" * 10_000,
        "<think>a</think>" + "\\boxed{" * 20_000,
    ],
)
def test_invalid_formats_cost_minus_one(response):
    assert extract_answer(response)[0] is None
    result = score_one(response, MATH)
    assert result[:3] == (-1.0, False, False)
    assert result.why.startswith("format: ")


@pytest.mark.parametrize(
    "row",
    [
        MATH,
        {"domain": "code", "tests": {"asserts": ""}},
        {"domain": "science", "answer": "3"},
        {"domain": "agent", "gold_calls": []},
        {"domain": "if", "constraints": [{"id": "punctuation:no_comma"}]},
    ],
)
@pytest.mark.parametrize("answer", ["\ud800", "4 \udcff", "\x00", "a" * 100_000])
def test_odd_texts_are_scored_not_raised(row, answer):
    assert score_one(wrap(answer), row).reward in (1.0, 0.0, -0.5, -1.0)


def test_m2rl_needs_only_the_closing_tag_and_pays_0_or_1():
    assert score_one("anything</think>3", MATH, scheme="m2rl")[:3] == (1.0, True, True)
    assert score_one("a</think>so \\boxed{3}", MATH, scheme="m2rl").reward == 1.0
    assert score_one(wrap("4"), MATH, scheme="m2rl").reward == 0.0
    assert score_one("3", MATH, scheme="m2rl")[:3] == (0.0, False, False)
    science = {"domain": "science", "answer": "Paris"}
    assert score_one(wrap("Paris"), science, scheme="m2rl").reward == 1.0
    with pytest.raises(UserError, match="dapo"):
        score_one("", MATH, scheme="dapo")


def test_the_lenient_scheme_takes_all_as_answer_but_no_open_thought():
    row = {"id": "r", "domain": "math", "prompt": "?", "answer": "4"}
    responses = [
        "So \\boxed{4}",
        "<think>x</think>So \\boxed{4}",
        "<think>perhaps \\boxed{4} hmm",
        "4",
    ]
    scores = score(responses, [row] * 4, scheme="lenient")
    assert [result[:3] for result in scores] == [
        (1.0, True, True),
        (1.0, True, True),
        (0.0, False, False),
        (1.0, True, True),
    ]

    # Where the whole text counts, a box is only a piece of it.
    at_least_five = {
        "id": "length_constraints:number_words",
        "kwargs": {"relation": "at least", "num_words": 5},
    }
    row = {"domain": "if", "constraints": [at_least_five]}
    for scheme in ("lenient", "m2rl"):
        response = "</think>one two three four \\boxed{five}"
        assert score_one(response, row, scheme=scheme).correct


def test_a_box_hides_nothing_where_the_whole_answer_counts():
    no_comma = {"domain": "if", "constraints": [{"id": "punctuation:no_comma"}]}
    assert score_one(wrap("a, b, c \\boxed{ok}"), no_comma).reward == -0.5
    program = "def add(a, b):  # \\boxed{x}\n    return a + b"
    assert score_one(wrap(program), FUNCTION).reward == 1.0


# ---------------- math ----------------


@pytest.mark.parametrize(
    "reference, answer, right",
    [
        ("3", "3", True),
        ("3", "3.0", True),
        ("1000", "1,000", True),
        ("3", "4", False),
        ("-3", "3", False),
        ("\\frac{1}{2}", "0.5", True),
        ("\\frac{1}{2}", "$\\dfrac12$", True),
        ("x^2+2x+1", "(x+1)^2", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("\\sqrt{2}", "1.5", False),
        ("\\{1,2\\}", "\\{2,1\\}", True),
        ("3", "1, 2, 3, 4", False),
        ("3", "2 or 3", False),
        ("3", "\\boxed{1}\\boxed{3}", False),
        ("3", "\\boxed{1}, so it is \\boxed{3}", True),
        ("3", "\\boxed{3}, so it is \\boxed{1}", False),
        ("1, 3", "$\\boxed{1}$ and $\\boxed{3}$", True),
        ("3", "three hundred words of prose about nothing", False),
        ("3", "\\text{no answer}", False),
        ("3", "{" * 500, False),
        ("12", "12 apples", True),
        ("6", "4+4-2", False),
        ("391", "17*23", False),
        ("120", "5!", False),
        ("7", "\\int_0^7 1 dx", False),
        ("3", "1=3", False),
        ("3", "x = 3", True),
        ("3000", "3 \\times 10^3", True),
        ("2", "\\sqrt{4}", True),
        ("-2", "-2.0", True),
        ("6", "$6$", True),
    ],
)
def test_math(reference, answer, right):
    result = score_one(wrap(answer), {"domain": "math", "answer": reference})
    assert result[:3] == ((1.0, True, True) if right else (-0.5, False, True))


@pytest.mark.parametrize(
    "answer, right",
    [
        ("113", True),
        ("$113$.", True),
        ("**113**", True),
        ("m+n=113", True),
        ("m + n = 113", True),
        ("\\alpha = 113", True),
        ("113.0", True),
        ("112", False),
        ("100+13", False),
        ("100 + 13 = 113", True),
        ("100 + 13 = 114", False),
        ("112 = 113", False),
        ("m = n = 113", False),
        ("113 or 114", False),
        ("x = 114", False),
    ],
)
def test_a_numbers_name_is_no_part_of_it(answer, right):
    assert score_one(wrap(answer), {"domain": "math", "answer": "113"}).correct is right


def test_a_pathological_answer_costs_seconds_and_its_neighbours_keep_their_verdicts():
    answers = [
        "x^{10^{10^{10}}}",
        "\\frac{x}{2}",
        "\\sum_{k=1}^{10^{12}} \\sin(k)!",
        "(1+x)^{99999999}",
        "\\frac{2x}{4}",
    ]
    rows = []
    for i in range(len(answers)):
        rows.append({"id": str(i), "domain": "math", "prompt": "?", "answer": "\\frac{x}{2}"})
    started = time.monotonic()
    scores = score([wrap(answer) for answer in answers], rows)
    assert [result.correct for result in scores] == [False, True, False, False, True]
    assert "cpu-limit" in [result.why for result in scores]
    assert time.monotonic() - started < 60  # without a time limit it would never end


def test_a_checker_that_cannot_start_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(workers, "idle_workers", queue.SimpleQueue())  # only new workers
    with pytest.raises(UserError, match="math checker cannot start"):
        score_one(wrap("\\frac{1}{2}"), {"domain": "math", "answer": "x"})


def test_gym_rows_are_scored_by_their_own_checker_without_partial_credit(monkeypatch):
    monkeypatch.setattr(workers, "WORKERS", 1)  # the package takes seconds to import
    rows = gym_rows(["chain_sum", "leg_counting"], seed=1, size=3)
    assert {row["domain"] for row in rows} == {"math"}
    right = [wrap(row["answer"]) for row in rows]
    assert all(result.reward == 1.0 for result in score(right, rows))
    wrong = [wrap(row["answer"] + "1") for row in rows]
    assert all(result.reward == -0.5 for result in score(wrong, rows))


# ---------------- code ----------------


@pytest.mark.parametrize(
    "row, program, reward",
    [
        (EXPRESSION, "(x+3)*2", 1.0),
        (EXPRESSION, "x*2+6", 1.0),
        (EXPRESSION, "x+3", -0.5),
        (EXPRESSION, "__import__('os')", -0.5),
        (EXPRESSION, "y*2+6", -0.5),
        (EXPRESSION, "x = 3", -0.5),
        (EXPRESSION, "(x+3)*", -1.0),
        (EXPRESSION, "9**9**9", -0.5),
        (FUNCTION, "def add(a, b):\n    return a + b", 1.0),
        (FUNCTION, "```python\ndef add(a, b):\n    return a + b\n```", 1.0),
        (FUNCTION, "Here:\n```\ndef add(a, b):\n    return a + b\n```\nDone.", 1.0),
        (FUNCTION, "def add(a, b):\n    return a", -0.5),
        (FUNCTION, "def add(a, b) return a", -1.0),
        (FUNCTION, "def add(a, b):\n    while True: pass", -0.5),
        (FUNCTION, "import sys\nsys.exit(0)", -0.5),
        (FUNCTION, "import os\nos._exit(0)", -0.5),
        (FUNCTION, "\x00", -1.0),
        (FUNCTION, "-" * 50_000 + "1", -1.0),
        (FUNCTION, "(" * 50_000, -1.0),
        (STDIN, "a, b = map(int, input().split())\nprint(a + b)\nprint('ok')", 1.0),
        # a right first line is not enough
        (STDIN, "a, b = map(int, input().split())\nprint(a + b)", -0.5),
        (STDIN, "a, b = map(int, input().split())\nprint(a + b)\nprint('ok')\nprint('ok')", -0.5),
    ],
)
def test_code(row, program, reward, monkeypatch):
    monkeypatch.setattr(code, "CODE_SECONDS", 2)
    result = score_one(wrap(program), row)
    assert (result.reward, result.valid) == (reward, reward != -1.0)


def test_humaneval_pays_for_all_canonical_solutions_and_for_no_broken_one():
    rows = humaneval_rows()
    assert len(rows) == 164
    canonical = [wrap(f"```python\n{row['solution']}```") for row in rows]
    assert all(result.reward == 1.0 for result in score(canonical, rows))
    for body in ("return None", "pass", "raise ValueError"):  # more of these in test_sandbox.py
        broken = []
        for row in rows:
            signature = row["prompt"].split("```python\n")[1].split("```")[0]
            broken.append(wrap(f"```python\n{signature}    {body}\n```"))
        assert all(result.reward == -0.5 for result in score(broken, rows))


# ---------------- science ----------------


@pytest.mark.parametrize(
    "reference, answer, right",
    [
        # option letters
        ("B", "B", True),
        ("B", "(B)", True),
        ("B", "B) the blue one", True),
        ("B", "b", True),
        ("B", "C", False),
        ("B", "A B C D", False),
        ("B", "B or C", False),
        ("B", "(A) (B)", False),
        ("B", "blue", False),
        ("B", "Option B", True),
        ("B", "\\text{B}", True),
        ("B", "**B**", True),
        ("B", "The answer is B", True),
        ("B", "b or c", False),
        ("B", "b, c", False),
        # numbers and units
        ("vitamin A", "vitamin", False),
        ("a", "the", False),
        ("1/2", "1", False),
        ("1/2", "0.5", True),
        ("2/3", "0.667", True),
        ("1.5 x 10^-3", "1.5", False),
        ("12 March 1905", "12", False),
        ("3:1", "3", False),
        ("10-20", "10", False),
        ("2 and 5", "2", False),
        ("3 sqrt(2)", "3", False),
        ("5", "5!", False),
        ("5", "5%", False),
        ("5", "5/7", False),
        ("3.20", "3.21", True),
        ("3.20", "3.9", False),
        ("4", "4", True),
        ("4", "4.03", False),
        ("1,000", "1000", True),
        ("5 m/s", "5", True),
        ("5 m/s", "5 m/s", True),
        ("5 m/s", "5 km/h", False),
        ("2e-3", "0.002", True),
        ("3", "3 or 4", False),
        ("3", "3, 4, 5", False),
        ("3", "3 apples", True),
        # texts
        ("Paris", "the paris.", True),
        ("Paris", "not Paris", False),
        ("Paris", "Rome, Paris, London", False),
        ("red", "red blue green", False),
    ],
)
def test_science_without_a_verifier(reference, answer, right):
    result = score_one(wrap(answer), {"domain": "science", "answer": reference})
    longer = abs(len(answer.split()) - len(reference.split()))
    if right:
        assert result[:3] == (pytest.approx(1.0 - 0.05 * longer), True, True)
    else:
        assert result[:3] == (0.0, False, True)


def test_science_pays_less_for_length_down_to_a_half():
    row = {"domain": "science", "answer": "red", "match": "last-word"}
    answers = ("red", "i think it is red", "so " * 40 + "red", "red blue")
    rewards_of_answers = [score_one(wrap(answer), row).reward for answer in answers]
    assert rewards_of_answers == [1.0, pytest.approx(0.8), 0.5, 0.0]


@pytest.mark.parametrize(
    "answer, letter",
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("\\mathrm{B}", "B"),
        ("\\textbf{B}", "B"),
        ("The answer is: B", "B"),
        ("**Answer: B**", "B"),
        ("Final answer: B", "B"),
        ("B. Vitamin C deficiency", "B"),
        ("(B) 5 J", "B"),
        ("Reasoning about A.\n\nThe answer is B.", "B"),
        ("First I said the answer is A. No: the answer is (C)", "C"),
        ("option D", "D"),
        ("B or C", None),
        ("A. B. C. D.", None),
        ("B) x, C) y", None),
        ("the answer is B or C", None),
        ("B, C", None),
        ("The answer is B and D", None),
        ("answer: A/B", None),
        ("B. C", None),
        ("a mitochondrion", None),
        ("the answer is a mitochondrion", None),
        ("", None),
        ("Because", None),
    ],
)
def test_an_option_is_named_or_hedged(answer, letter):
    assert option_of_response(answer) == letter


# ---------------- writing ----------------


@pytest.mark.parametrize(
    "poem, reward",
    [
        ("bat hat rat", 1.0),
        ("hat mat", 0.25),
        ("bat", -0.5),
        ("bat dog", -0.5),
        ("bat bat bat", -0.5),
        ("bat hat rat mat flat", 1.0),
        ("bat hat dog log", -0.5),
        ("cat cat cat", -0.5),
    ],
)
def test_the_toys_judge(poem, reward):
    row = {"domain": "writing", "judge": "rhyme", "topic": "cat", "reference": "bat rat"}
    assert score_one(wrap(poem), row).reward == reward


# ---------------- if ----------------

IF_CASES = [  # (id, kwargs, a text that meets it, a text that does not)
    ("keywords:existence", {"keywords": ["sun", "sea"]}, "Sun and SEA", "sun only"),
    (
        "keywords:frequency",
        {"keyword": "sun", "relation": "at least", "frequency": 2},
        "sun sun",
        "sun",
    ),
    (
        "keywords:frequency",
        {"keyword": "sun", "relation": "less than", "frequency": 2},
        "sun",
        "sun sun",
    ),
    ("keywords:forbidden_words", {"forbidden_words": ["sun"]}, "sunny", "the sun"),
    (
        "keywords:letter_frequency",
        {"letter": "e", "let_relation": "at least", "let_frequency": 3},
        "Eee",
        "ee",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "one\n***\ntwo",
        "one\n\ntwo",
    ),
    (
        "length_constraints:number_words",
        {"relation": "less than", "num_words": 3},
        "two words",
        "now three words",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "first\n\nThen, second",
        "first\n\nlast then",
    ),
    (
        "detectable_content:number_placeholders",
        {"num_placeholders": 2},
        "[name] and [date]",
        "[name]",
    ),
    (
        "detectable_content:postscript",
        {"postscript_marker": "P.S."},
        "text\nP. S. more",
        "text",
    ),
    (
        "detectable_format:number_bullet_lists",
        {"num_bullets": 2},
        "* a\n* b",
        "* a\n* b\n* c",
    ),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    (
        "detectable_format:number_highlighted_sections",
        {"num_highlights": 2},
        "*a* and *b*",
        "*a*",
    ),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "a: 1"),
    ("detectable_format:title", {}, "<<Ode>>\ntext", "<< >> text"),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:two_responses", {}, "******one\n******\ntwo", "a\n******\nb\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi"}, "say hi. hi", "hi"),
    ("startend:end_checker", {"end_phrase": "The end."}, "x the END.", "The end. x"),
    ("startend:quotation", {}, '"all of it"', '"some" of it'),
    ("punctuation:no_comma", {}, "no comma", "a, b"),
]


@pytest.mark.parametrize("name, kwargs, met, unmet", IF_CASES, ids=[case[0] for case in IF_CASES])
def test_constraints(name, kwargs, met, unmet):
    padded = kwargs | {"unused": None}
    row = {"domain": "if", "constraints": [{"id": name, "kwargs": padded}]}
    assert score_one(wrap(met), row).reward == 1.0
    assert score_one(wrap(unmet), row)[:2] == (-0.5, False)


def test_the_cases_cover_all_constraints():
    elsewhere = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
    elsewhere |= set(ifevalg.CONSTRAINTS)  # see test_constraints.py
    assert {case[0] for case in IF_CASES} | {"toy:say"} == set(ifeval.CONSTRAINTS) - elsewhere


def test_a_row_may_mix_our_constraints_and_a_package_s():
    pytest.importorskip("if_verifiable")
    constraints = [
        {"id": "last_word:last_word_answer", "kwargs": {"last_word": "wald"}},
        {"id": "language:response_language", "kwargs": {"language": "de"}},
    ]
    row = {"domain": "if", "constraints": constraints}
    verdict = score_one(wrap("Das ist ein schöner Tag und wir gehen in den Wald."), row)
    assert (verdict.correct, verdict.why) == (True, "right")
    verdict = score_one(wrap("This is a fine day and we are walking to the Wald."), row)
    assert (verdict.correct, verdict.why) == (False, "violates language:response_language")
    verdict = score_one(wrap("Das ist ein schöner Tag."), row)
    assert verdict.why == "violates last_word:last_word_answer"


def test_all_constraints_must_hold_and_unknown_ones_are_errors():
    constraints = [{"id": "punctuation:no_comma"}, {"id": "startend:quotation", "kwargs": None}]
    row = {"domain": "if", "constraints": constraints}
    assert score_one(wrap('"a"'), row).reward == 1.0
    assert score_one(wrap('"a, b"'), row).reward == -0.5
    with pytest.raises(UserError, match="language:no_such_id"):
        score_one(wrap("a"), {"domain": "if", "constraints": [{"id": "language:no_such_id"}]})


@pytest.mark.parametrize(
    "kwargs",
    [
        {"relation": "at least"},
        {"relation": "at most", "num_words": 5},
        {"relation": "at least", "num_words": "5"},
    ],
)
def test_arguments_that_a_constraint_cannot_take_are_errors(kwargs):
    name = "length_constraints:number_words"
    with pytest.raises(UserError, match=f"row r: constraint {name} cannot be checked"):
        score_one("", {"domain": "if", "constraints": [{"id": name, "kwargs": kwargs}]})


@pytest.mark.parametrize(
    "constraint",
    [
        "punctuation:no_comma",
        {"kwargs": {}},
        {"id": "keywords:existence", "kwargs": {"keywords": ["a(b"]}},
    ],
)
def test_malformed_constraints_are_errors(constraint):
    with pytest.raises(UserError, match="row r: "):
        score_one("", {"domain": "if", "constraints": [constraint]})


def test_what_a_packaged_checker_cannot_check_stops_before_sampling(monkeypatch):
    pytest.importorskip("if_verifiable")
    constraint = {"id": "count:unique_word_count", "kwargs": {"bogus": 1}}
    row = {"id": "r", "domain": "if", "prompt": "?", "constraints": [constraint]}
    message = "row r: constraint count:unique_word_count cannot be checked with these arguments"
    with pytest.raises(UserError, match=message):
        rewards.check_rows([row], "", "")

    constraint["kwargs"] = {"N": 1}
    monkeypatch.setattr(ifeval, "ask_workers", lambda jobs: ["error: LookupError"] * len(jobs))
    message = "row r: count:unique_word_count needs NLTK's data: python -m nltk.downloader"
    with pytest.raises(UserError, match=message):
        rewards.check_rows([row], "", "")
    with pytest.raises(UserError, match="checker 'mine' is not one of"):
        rewards.check_rows([row | {"checker": "mine"}], "", "")


# ---------------- agent ----------------


def test_calls_are_read_out_of_fences_and_prose():
    calls = [{"name": "f", "arguments": {"x": [1, 2]}}]
    plain = json.dumps(calls)
    texts = [
        plain,
        f"```json\n{plain}\n```",
        f"I will call f.\n{plain}\nThat is all.",
        f"Sure:\n```\n{plain}\n```",
        f"<tool_call>{json.dumps(calls[0])}</tool_call>",
        json.dumps(calls[0]),
    ]
    for text in texts:
        assert rewards.read_calls(text) == calls, text
    assert rewards.read_calls("[]") == []
    assert rewards.read_calls("none") is None
    assert rewards.read_calls("[1]") is None


GOLD_CALLS = [
    {"name": "move", "arguments": {"to": "a", "fast": True}},
    {"name": "stop", "arguments": "{}"},
]


@pytest.mark.parametrize(
    "calls, reward",
    [
        (json.dumps(GOLD_CALLS), 1.0),
        ('[{"name": "move", "arguments": {"fast": true, "to": "a"}}, {"name": "stop"}]', 1.0),
        (
            '<tool_call>{"name": "move", "arguments": {"to": "a", "fast": true}}</tool_call>'
            '<tool_call>{"name": "stop"}</tool_call>',
            1.0,
        ),
        ('[{"name": "stop"}, {"name": "move", "arguments": {"to": "a", "fast": true}}]', -0.5),
        ('[{"name": "move", "arguments": {"to": "a", "fast": 1}}, {"name": "stop"}]', -0.5),
        ("[]", -0.5),
        ("move(a)", -1.0),
        ('[{"arguments": {}}]', -1.0),
        ("[" * 50_000, -1.0),
    ],
)
def test_agent(calls, reward):
    row = {"domain": "agent", "gold_calls": GOLD_CALLS}
    assert score_one(wrap(calls), row).reward == reward


SAY = {"name": "say", "arguments": {"text": "a </tool_call> b"}}


@pytest.mark.parametrize(
    "answer, calls",
    [
        (f"<tool_call>{json.dumps(SAY)}</tool_call>", [SAY]),
        (f"<tool_call>{json.dumps(SAY)}", [SAY]),
        (f"<tool_call>{json.dumps(SAY)}</tool_call>\n<tool_call>{{", None),
        (f"<tool_call>{json.dumps(SAY)}</tool_call><tool_call>{json.dumps(SAY)[:-9]}", None),
        (f"<tool_call>{json.dumps(SAY)} and more</tool_call>", None),
        (f"Sure: {json.dumps(SAY)}", [SAY]),
        (f"Sure [as you like]: {json.dumps(SAY)}. Done.", [SAY]),
        (f"{json.dumps(SAY)}\n{json.dumps(SAY)}", [SAY, SAY]),
        (f"{json.dumps(SAY)}\n{json.dumps(SAY)[:-5]}", None),
        (f"[{json.dumps(SAY)},", None),
        (f"<tool_call>{json.dumps(SAY)}</tool_call>{json.dumps(SAY)}", None),
        (f"<tool_call>[{json.dumps(SAY)}, {json.dumps(SAY)}]</tool_call>", [SAY, SAY]),
        (f"By [1], {{x}} holds: {json.dumps(SAY)}", [SAY]),
        (
            '{"name": "f", "arguments": {"x": "<tool_call>"}}',
            [{"name": "f", "arguments": {"x": "<tool_call>"}}],
        ),
        ('{"name": "f", "parameters": {"x": 1}}', [{"name": "f", "arguments": {"x": 1}}]),
        ('{"name": "f", "arguments": null}', [{"name": "f", "arguments": {}}]),
        ('{"name": "f", "arguments": [1]}', None),
        ('{"name": 1, "arguments": {}}', None),
        ("say(text='a')", None),
    ],
)
def test_each_call_is_read_to_its_end(answer, calls):
    assert rewards.read_calls(answer) == calls


def test_prose_is_right_where_no_call_is_wanted():
    row = {"domain": "agent", "gold_calls": []}
    assert score_one(wrap("I cannot do that."), row).correct is True
    assert score_one(wrap('<tool_call>{"name": "f", </tool_call>'), row).correct is False
    assert score_one(wrap(json.dumps([SAY])), row).correct is False


def test_gold_calls_that_no_answer_can_equal_are_refused():
    row = {"domain": "agent", "gold_calls": [{"name": "f", "arguments": "{x"}]}
    with pytest.raises(UserError, match="gold call .* cannot be read"):
        score_one(wrap("[]"), row)


@pytest.mark.parametrize(
    "response, answer",
    [
        ("3", "3"),
        ("so</think>3", "3"),
        ("<think>it ends with </think>, later.</think>3", "3"),
        ("<think>so", None),
        ("Well.\n<think>so", None),
        ("\u200b<think>\\boxed{3}", None),
        ("The answer is \\fbox{3}.", "3"),
        ("$\\boxed 3$", "3"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{3} and \\boxed{4}", "3, 4"),
        ("\\boxed{3} is wrong, it is \\boxed{4}", "4"),
        ("\\boxed{", "\\boxed{"),
    ],
)
def test_lenient_answers(response, answer):
    read, fault = rewards.read_answer(response, {"domain": "math"}, "lenient")
    assert read == answer
    assert bool(fault) == (read is None)


# ---------------- the machine's faults, and the answer's ----------------


def test_an_answer_that_cannot_be_digested_is_wrong_and_says_why(monkeypatch):
    replies = ["right", "wrong", "cpu-limit", "error: RecursionError", "crashed", "unknown: killed"]
    monkeypatch.setattr(rewards, "ask_workers", lambda jobs: replies)
    verdicts = rewards.worker_verdicts([{}] * len(replies))
    assert [verdict.correct for verdict in verdicts] == [True, False, False, False, False, None]
    assert [verdict.why for verdict in verdicts] == replies


def test_a_worker_that_is_killed_is_replaced_once(monkeypatch):
    class Killed:
        """A worker that something outside kills over its job."""

        def ask(self, job):
            return None

        def close(self):
            return -9

    asked = []

    def new_worker():
        asked.append(1)
        return Killed()

    monkeypatch.setattr(workers, "idle_workers", queue.SimpleQueue())
    monkeypatch.setattr(workers, "Worker", new_worker)
    assert workers.ask_worker({"check": "math"}).startswith("unknown")
    assert len(asked) == 2


def test_a_worker_that_waits_is_not_out_of_time(monkeypatch):
    """A busy machine takes wall-clock time from a checker, not CPU time."""
    script = (
        "import signal, time; from checkers import workers;"
        "workers.CHECKS['math'] = (lambda: None, lambda job: time.sleep(1.5) is None);"
        "workers.CPU_SECONDS = 1; workers.worker_loop()"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        input='{"check": "math"}\n',
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.stdout == '"right"\n'


# ---------------- verifier and judge ----------------


class ModelHandler(http.server.BaseHTTPRequestHandler):
    """Complete a prompt with server.reply(prompt): a text, an HTTP error, "cut", or None.

    "cut" sends half a reply, None hangs up.
    """

    def send(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def do_GET(self):
        self.send({"data": [{"id": "judge-model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert body["model"] == "judge-model"
        assert body["temperature"] == 0
        self.server.asked.append(dict(self.headers))
        reply = self.server.reply(body["messages"][0]["content"])
        if isinstance(reply, int):
            self.send_error(reply)
        elif reply == "cut":  # promises more than it sends
            self.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{")
        elif reply is not None:
            self.send({"choices": [{"message": {"content": reply}}]})

    def log_message(self, *args):
        pass


class ModelServer(http.server.ThreadingHTTPServer):
    request_queue_size = 64  # with a full queue, a call would wait a second to connect again


@pytest.fixture
def server(tmp_path, monkeypatch):
    """An OpenAI-compatible server: .url, .reply (set by a test), .asked (headers of its calls)."""
    monkeypatch.setattr(servers, "REPLIES", tmp_path / "replies.sqlite")
    monkeypatch.setattr(servers, "BACKOFF_SECONDS", 0.01)
    server = ModelServer(("127.0.0.1", 0), ModelHandler)
    serve = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    serve.start()
    server.asked = []
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield server
    server.shutdown()
    server.server_close()


def test_the_verifier_decides_and_its_failures_are_not_wrong_answers(server):
    replies = {
        "yes": "Both agree.\nFinal Decision: Yes",
        "no": "Final Decision: **No**",
        "mute": "hm",
        "broken": 500,
        "gone": None,
        "cut": "cut",
    }
    server.reply = lambda text: replies[text.split("Student answer: ")[1].split("\n")[0]]
    scores = score([wrap(name) for name in replies], [SCIENCE] * 6, verifier_url=server.url)
    # "yes" is a word shorter than the truth
    assert [result.reward for result in scores] == [0.95, 0.0, None, None, None, None]
    assert [result.correct for result in scores] == [True, False, None, None, None, None]
    assert all(result.why.startswith("verifier-error") for result in scores[2:])


def test_a_verifier_that_refuses_is_no_wrong_answer_and_a_wrong_format_needs_none(server):
    nobody = "http://127.0.0.1:9"
    refused = score_one(wrap("yes"), SCIENCE, verifier_url=nobody)
    assert refused.reward is None
    assert "refused" in refused.why
    assert score_one("no format", SCIENCE, verifier_url=nobody).reward == -1.0


def writing_rows(count: int) -> list[dict]:
    """Different writing rows with the same reference, PLAIN."""
    rows = []
    for i in range(count):
        prompt = f"Write {i}."
        rows.append({"id": str(i), "domain": "writing", "prompt": prompt, "reference": "PLAIN"})
    return rows


def judge_that_prefers(response: str, prompts_seen: list[str]):
    """A judge that finds this response better, wherever it is shown."""

    def reply(prompt):
        prompts_seen.append(prompt)
        response_a = prompt.split("[Response A]\n")[1].split("\n")[0]
        return "so [[A]]" if response_a == response else "so [[B]]"

    return reply


def test_the_judge_sees_answers_only_in_drawn_order(server):
    rows = writing_rows(40)
    seen = []
    server.reply = judge_that_prefers("FINE", seen)
    scores = score([wrap("FINE", thought="SECRET")] * 40, rows, judge_url=server.url)
    assert {result.reward for result in scores} == {1.0}
    assert not any("SECRET" in prompt for prompt in seen)
    answer_is_first = [prompt.index("FINE") < prompt.index("PLAIN") for prompt in seen]
    assert 5 < sum(answer_is_first) < 35  # both orders occur

    servers.REPLIES.unlink()  # else the replies are known
    server.reply = judge_that_prefers("PLAIN", seen)
    scores = score([wrap("FINE")] * 40, rows, judge_url=server.url)
    assert {result[:2] for result in scores} == {(-0.5, False)}


def test_a_judge_may_write_small_letters_or_find_a_tie(server):
    rows = writing_rows(5)
    prefer_fine = judge_that_prefers("FINE", [])
    server.reply = lambda prompt: prefer_fine(prompt).lower()  # [[a]]
    scores = score([wrap("FINE")] * 5, rows, judge_url=server.url)
    assert {result.reward for result in scores} == {1.0}

    servers.REPLIES.unlink()
    server.reply = lambda prompt: "[[C]]"
    scores = score([wrap("FINE")] * 3, rows[:3], judge_url=server.url)
    assert {result[:2] for result in scores} == {(0.25, False)}
    with pytest.raises(UserError, match="--judge-url"):
        score([wrap("FINE")], rows[:1])


def test_both_orders_and_a_judge_that_only_sees_positions(server, monkeypatch):
    monkeypatch.setattr(rewards, "BOTH_ORDERS", True)
    rows = writing_rows(6)

    server.reply = lambda prompt: "[[A]]"  # whatever is shown first
    scores = score([wrap("FINE")] * 6, rows, judge_url=server.url)
    assert {result[:2] for result in scores} == {(0.25, False)}
    assert len(server.asked) == 12

    def prefer_best(prompt):
        return "[[A]]" if prompt.index("BEST") < prompt.index("PLAIN") else "[[B]]"

    server.reply = prefer_best
    scores = score([wrap("BEST")] * 6, rows, judge_url=server.url)
    assert {result[:2] for result in scores} == {(1.0, True)}

    def fail_in_one_order(prompt):
        return "[[A]]" if prompt.index("ODD") < prompt.index("PLAIN") else 500

    server.reply = fail_in_one_order
    scores = score([wrap("ODD")] * 6, rows, judge_url=server.url)
    assert {result.reward for result in scores} == {None}


def test_what_was_asked_once_is_not_asked_again_and_failures_are(server):
    server.reply = lambda prompt: "Final Decision: Yes" if "good" in prompt else 500
    responses = [wrap("good"), wrap("good"), wrap("bad")]
    scores = score(responses, [SCIENCE] * 3, verifier_url=server.url)
    assert [result.correct for result in scores] == [True, True, None]
    assert len(server.asked) == 1 + 4  # equal questions once; a failure with its retries

    server.reply = lambda prompt: "Final Decision: No"
    scores = score([wrap("good"), wrap("bad")], [SCIENCE] * 2, verifier_url=server.url)
    assert [result.correct for result in scores] == [True, False]
    assert len(server.asked) == 6
    other_row = {**SCIENCE, "answer": "another"}
    scores = score([wrap("good")], [other_row], verifier_url=server.url)
    assert scores[0].correct is False


def test_the_api_key_goes_to_the_verifier(server, monkeypatch):
    server.reply = lambda prompt: "Final Decision: No"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    score([wrap("good")], [SCIENCE], verifier_url=server.url)
    assert "Authorization" not in server.asked[-1]
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    score([wrap("new")], [SCIENCE], verifier_url=server.url)
    assert server.asked[-1]["Authorization"] == "Bearer sesame"


def test_a_call_that_fails_for_a_while_is_made_again(server):
    # an error, a dropped connection, half a reply
    replies = iter([500, None, "cut", "Final Decision: Yes"])
    server.reply = lambda prompt: next(replies)
    assert score([wrap("x")], [SCIENCE], verifier_url=server.url)[0].correct is True
    server.reply = lambda prompt: 401
    assert score([wrap("y")], [SCIENCE], verifier_url=server.url)[0].correct is None
    assert len(server.asked) == 5  # the last one once


def test_a_slow_server_times_out_and_is_not_asked_for_ever(server, monkeypatch):
    monkeypatch.setattr(servers, "HTTP_SECONDS", 0.05)

    def reply_late(prompt):
        time.sleep(0.2)
        return "Final Decision: Yes"

    server.reply = reply_late
    started = time.perf_counter()
    responses = [wrap(f"x{i}") for i in range(400)]
    scores = score(responses, [SCIENCE] * 400, verifier_url=server.url)
    assert {result.correct for result in scores} == {None}
    assert time.perf_counter() - started < 20
    assert any("timed out" in result.why for result in scores)
    assert "not asked, because it answered none" in scores[-1].why


def test_the_cache_is_free_for_others_while_calls_are_out(server):
    """During each call another connection writes to the cache, and it hardly waits."""

    def reply(prompt):
        connection = sqlite3.connect(servers.REPLIES, timeout=10, isolation_level=None)
        with contextlib.closing(connection) as cache:
            cache.execute("insert or replace into replies values (?, ?)", (prompt, "other's"))
        return "ours"

    server.reply = reply
    prompts = [f"ask {i}" for i in range(40)]
    assert servers.ask_all(server.url, prompts, "verifier", retries=0) == ["ours"] * 40
    with contextlib.closing(sqlite3.connect(servers.REPLIES)) as cache:
        counts = dict(cache.execute("select reply, count(*) from replies group by reply"))
    assert counts == {"ours": 40, "other's": 40}


# ---------------- processes ----------------
# The last test, because those before it share the workers that it ends.


def test_workers_start_in_any_directory_and_leave_nothing_behind(tmp_path, monkeypatch):
    workers.close_workers()
    monkeypatch.chdir(tmp_path)
    assert score_one(wrap("\\frac{4x}{2}"), {"domain": "math", "answer": "2x"}).correct
    program = "open('left-behind', 'w').write('x')\ndef add(a, b):\n    return a + b"
    score_one(wrap(program), FUNCTION)
    assert not os.path.exists("left-behind")

    def child_commands():
        """The command lines of this process's children."""
        with open(f"/proc/{os.getpid()}/task/{os.getpid()}/children") as file:
            children = file.read().split()
        commands = []
        for child in children:
            with open(f"/proc/{child}/cmdline") as file:
                commands.append(file.read())
        return commands

    assert any("checkers.workers" in command for command in child_commands())
    workers.close_workers()
    assert not any("checkers.workers" in command for command in child_commands())


# ---------------- truncated responses ----------------


@pytest.mark.parametrize("scheme, worth", [("cgpo", -1.0), ("m2rl", 0.0), ("lenient", 0.0)])
def test_a_truncated_response_is_never_right(scheme, worth):
    row = {"id": "x", "domain": "math", "prompt": "1+1=", "answer": "2"}
    response = "<think>sum</think><answer>2</answer>"
    whole, cut = rewards.score([response] * 2, [row] * 2, scheme, truncated=[False, True])
    assert whole.correct and whole.reward == 1
    assert cut == rewards.Score(worth, False, False, "truncated")
