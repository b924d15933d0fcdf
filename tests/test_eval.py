"""eval.py's scores by hand: pass@k and unknown verdicts, intervals, and what it prints of them."""

import itertools
import collections
import json
import math

import numpy as np
import pytest
import torch

import eval as evaluation
from common import reports
from common.errors import UserError
from common.files import write_jsonl
from common.rows import DOMAINS
from helpers import fails

R, W, U = "right", "wrong", "unknown"  # what a response is


def make_item(name: str, verdicts: list[str], domain: str = "math") -> dict:
    """A prompt's line of items.jsonl, with a response per verdict."""
    known = [verdict for verdict in verdicts if verdict != U]
    responses = []
    for verdict in verdicts:
        responses.append(
            {
                "text": "",
                "reward": None if verdict == U else float(verdict == R),
                "verdict": verdict,
                "correct": verdict == R,
                "valid": True,
                "truncated": False,
                "tokens": 1,
            }
        )
    return {
        "id": name,
        "domain": domain,
        "prompt": name,
        "accuracy": known.count(R) / len(known) if known else None,
        "responses": responses,
    }


def make_items(*verdicts_of_prompts: list[str], domain: str = "math") -> list[dict]:
    """The items p0, p1, … of one domain."""
    items = []
    for i, verdicts in enumerate(verdicts_of_prompts):
        items.append(make_item(f"{domain}-p{i}", verdicts, domain))
    return items


# ---------------- pass@k ----------------


@pytest.mark.parametrize("n, c", [(n, c) for n in range(1, 7) for c in range(n + 1)])
def test_pass_at_k_counts_the_draws_of_k_that_hold_a_right_one(n, c):
    for k in range(1, n + 1):
        draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
        share = sum(any(draw) for draw in draws) / len(draws)
        assert evaluation.pass_at(n, c, k) == pytest.approx(share)
    assert evaluation.pass_at(n, c, n + 1) is None


@pytest.mark.parametrize("n", range(4))
def test_fewer_verdicts_than_k_give_no_pass_at_k(n):
    for c in range(n + 1):
        assert evaluation.pass_at(n, c, 4) is None


def test_a_prompt_with_fewer_verdicts_than_k_leaves_pass_at_k_and_is_counted():
    items = make_items([R, W, W, W], [W, W, W, W], [R, R, R, U], [W, U, U, U], [U, U, U, U])
    scores = evaluation.summarise(items, 4)["math"]
    assert scores["pass"] == 0.5  # of the first two
    assert scores["pass_prompts"] == 2
    assert scores["accuracy"] == pytest.approx((0.25 + 0 + 1 + 0) / 4)
    assert scores["scored"] == 4
    assert scores["prompts"] == 5
    assert scores["verifier_errors"] == 1 + 3 + 4

    at_2 = evaluation.summarise(items, 2)["math"]
    assert at_2["pass"] == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert at_2["pass_prompts"] == 3
    at_1 = evaluation.summarise(items, 1)["math"]
    assert at_1["pass"] == pytest.approx(at_1["accuracy"])
    assert at_1["pass_prompts"] == 4
    # the default k is all of a prompt's responses
    assert evaluation.summarise(items)["math"] == scores


def test_without_any_prompt_of_k_verdicts_there_is_no_pass_at_k():
    items = make_items([R, U], [W, U])
    scores = evaluation.summarise(items, 2)
    assert scores["math"]["pass"] is None
    assert scores["math"]["pass_prompts"] == 0
    assert scores["math"]["accuracy"] == 0.5
    assert json.loads(json.dumps(scores)) == scores
    row = evaluation.table(scores, 2, 2).splitlines()[1]
    assert "– (0)" in row
    assert "nan" not in row


def test_a_domain_without_any_verdict_has_no_scores():
    scores = evaluation.summarise(make_items([U, U], [U, U]) + make_items([R, W], domain="code"))
    assert list(scores) == ["code", "mean"]
    assert evaluation.summarise(make_items([U])) == {}


# ---------------- intervals ----------------


@pytest.mark.parametrize(
    "right, prompts, low, high",
    [
        (25, 25, 0.8668, 1.0),
        (0, 25, 0.0, 0.1332),
        (10, 10, 0.7225, 1.0),
        (1, 1, 0.2065, 1.0),
        (81, 263, 0.2553, 0.3662),  # the examples of Newcombe 1998, Table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilsons_interval_against_published_values(right, prompts, low, high):
    bounds = evaluation.interval(right / prompts, prompts)
    assert bounds == pytest.approx([low, high], abs=6e-5)


@pytest.mark.parametrize("prompts", [1, 2, 7, 25, 172, 5000])
def test_an_interval_holds_the_accuracy_and_lies_within_0_and_1(prompts):
    for accuracy in (0.0, 1e-12, 0.1, 1 / 3, 0.5, 0.9, 1 - 1e-12, 1.0):
        low, high = evaluation.interval(accuracy, prompts)
        assert 0 <= low <= accuracy <= high <= 1
        assert high - low > 0
        mirrored = evaluation.interval(1 - accuracy, prompts)
        assert mirrored == pytest.approx([1 - high, 1 - low])


def test_the_bounds_are_where_the_accuracy_is_196_errors_away():
    """Wilson's interval holds the p for which |p̂ − p| is at most z · √(p(1 − p)/n)."""
    for accuracy, prompts in ((0.3, 40), (0.75, 12), (0.98, 500)):
        for p in evaluation.interval(accuracy, prompts):
            z = abs(accuracy - p) / math.sqrt(p * (1 - p) / prompts)
            assert z == pytest.approx(1.959964, abs=1e-5)


def test_the_interval_holds_the_true_accuracy_in_95_percent_of_evaluations():
    """Also where responses to a prompt are alike: the prompts are the trials, not the responses."""
    draw = np.random.default_rng(0)
    p, prompts, k, evaluations = 0.8, 60, 8, 2000
    for spread in ("equal within a prompt", "in between", "independent"):
        held = 0
        for _ in range(evaluations):
            if spread == "equal within a prompt":
                accuracy = (draw.random(prompts) < p).mean()
            elif spread == "in between":
                chances = draw.beta(4 * p, 4 * (1 - p), prompts)
                accuracy = (draw.random((k, prompts)) < chances).mean()
            else:
                accuracy = (draw.random((k, prompts)) < p).mean()
            low, high = evaluation.interval(accuracy, prompts)
            held += low <= p <= high
        assert held / evaluations > 0.935, spread


def test_the_interval_counts_scored_prompts_not_responses():
    items = make_items(*[[R] * 8] * 25, [U] * 8)
    scores = evaluation.summarise(items, 8)["math"]
    assert scores["error"] == 0
    assert scores["interval"] == evaluation.interval(1.0, 25)
    assert scores["interval"] == pytest.approx([0.8668, 1], abs=1e-4)


def test_the_interval_of_the_mean_by_hand():
    math_items = make_items(*[[R]] * 10)
    code_items = make_items(*[[R]] * 5, *[[W]] * 5, domain="code")
    scores = evaluation.summarise(math_items + code_items)
    below_math = 1 - 0.7225
    code_half = 0.5 - 0.2366  # 5 of 10: [0.2366, 0.7634]
    assert scores["mean"]["accuracy"] == 0.75
    expected = [0.75 - math.hypot(below_math, code_half) / 2, 0.75 + code_half / 2]
    assert scores["mean"]["interval"] == pytest.approx(expected, abs=1e-4)

    alone = evaluation.summarise(math_items)
    assert alone["mean"]["interval"] == pytest.approx(alone["math"]["interval"])
    perfect = evaluation.summarise(math_items + make_items([R], domain="code"))["mean"]
    assert perfect["error"] is None
    assert perfect["interval"][0] < 0.7
    assert perfect["interval"][1] == 1


def test_a_score_between_0_and_1_has_an_interval_too():
    """WritingBench: the accuracy of a prompt is the mean of the critic's scores / 10."""
    items = make_items([R], [R], [R])
    for item, accuracy in zip(items, (0.7, 0.6, 0.8)):
        item["accuracy"] = accuracy
    scores = evaluation.summarise(items)["math"]
    low, high = scores["interval"]
    assert low < 0.7 - 1.96 * scores["error"] < 0.7 + 1.96 * scores["error"] < high


# ---------------- the table ----------------


def test_the_table_shows_the_interval_and_over_how_many_prompts_pass_at_k_is():
    items = make_items(*[[R, R]] * 23, [R, U], [U, U]) + make_items([R, W], [W, W], domain="code")
    scores = evaluation.summarise(items, 2)
    header, math_row, code_row, mean_row = evaluation.table(scores, 2, 2).splitlines()
    assert "95 % interval" in header
    assert "pass@2 (prompts)" in header
    assert "1.000 ± 0.000  [0.862, 1.000]  1.000 (23)" in math_row
    assert math_row.endswith("24/25")
    assert "0.250 ± 0.250  [" in code_row
    assert "0.500 (2)" in code_row
    assert code_row.endswith("2/2")
    assert mean_row.startswith("mean    0.625 ± 0.125  [")
    assert len(header) == len(math_row) == len(code_row)
    columns = [line.index("[") for line in (math_row, code_row, mean_row)]
    assert set(columns) == {header.index("95 % interval")}


# ---------------- unknown verdicts ----------------


def batch_columns(unknown: dict[str, int], known: dict[str, int]) -> dict:
    """A batch's columns; the numbers of responses are by domain."""
    domains, rewards = [], []
    for counts, reward in ((unknown, math.nan), (known, -0.5)):
        for domain, count in counts.items():
            domains += [DOMAINS.index(domain)] * count
            rewards += [reward] * count
    return {"domain": torch.tensor(domains), "reward": torch.tensor(rewards).double()}


@pytest.mark.parametrize(
    "unknown, known, warned",
    [
        ({}, {"math": 100}, False),
        ({"math": 1}, {"math": 99}, False),  # 1 % is not above 1 %
        ({"math": 1}, {"math": 98}, True),
        ({"math": 1, "code": 1}, {"math": 140, "code": 50}, True),
        ({"math": 2}, {"code": 198}, False),
        ({"math": 3}, {}, True),
        ({}, {}, False),
    ],
)
def test_a_step_with_more_than_1_percent_unknown_is_worth_a_warning(unknown, known, warned):
    warning = reports.unknown_warning(batch_columns(unknown, known))
    if not warned:
        assert warning is None
        return
    total = sum(unknown.values()) + sum(known.values())
    assert f"{sum(unknown.values())} of {total} responses" in warning
    for domain, count in unknown.items():
        assert f"{domain} {count}" in warning
    assert "\n" not in warning


def test_unknown_responses_are_counted_by_group():
    items = make_items([R, U], [U, U], [W, W]) + make_items([R, U], domain="code")
    items[0]["group"] = "math500"
    counts = evaluation.unknown_counts(items + make_items([R, W], domain="science"))
    assert counts == {"math500": 1, "math": 2, "code": 1}


@pytest.mark.parametrize("failures, warned", [(0, False), (1, False), (5, True)])
def test_an_evaluation_with_unknown_verdicts(failures, warned, toy, tmp_path, capsys, monkeypatch):
    """Of 32 prompts × 4 responses; the last ones have no verdict."""
    honest = evaluation.rewards.score

    def score(texts, rows, *rest, **options):
        scores = honest(texts, rows, *rest, **options)
        for i in range(len(scores) - failures, len(scores)):
            scores[i] = scores[i]._replace(reward=None, correct=None, why="unknown: too slow")
        return scores

    monkeypatch.setattr(evaluation.rewards, "score", score)
    out = tmp_path / "out"
    flags = "--model toy --data toy --domains if --held-out 32 --k 4 --pass-at 3 --threads 1"
    evaluation.main([*flags.split(), "--out", str(out)])
    printed = capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())["if"]
    assert scores["verifier_errors"] == failures
    assert scores["prompts"] == 32
    assert scores["scored"] == 32 - failures // 4
    # one verdict too few still leaves three; a prompt without any leaves pass@3
    assert scores["pass_prompts"] == 32 - failures // 4
    low, high = scores["interval"]
    assert low < scores["accuracy"] < high
    assert f"[{low:.3f}, {high:.3f}]" in printed
    assert "pass@3 (prompts)" in printed
    assert f"({scores['pass_prompts']})" in printed
    assert ("warning: 5 of 128 responses (3.9%) have no verdict (if 5)" in printed) == warned


def test_a_limit_draws_rows_of_each_part_by_the_seed():
    rows = []
    for part in ({"domain": "math"}, {"domain": "code"}, {"domain": "code", "benchmark": "b"}):
        rows += [part | {"id": f"{len(rows) + i}"} for i in range(20)]
    drawn = evaluation.draw_rows(rows, 5, seed=0)
    parts = collections.Counter((row["domain"], row.get("benchmark")) for row in drawn)
    assert parts == {("math", None): 5, ("code", None): 5, ("code", "b"): 5}
    assert drawn == [row for row in rows if row in drawn]  # their order stays
    assert drawn == evaluation.draw_rows(rows, 5, seed=0)
    assert drawn != evaluation.draw_rows(rows, 5, seed=1)
    more = evaluation.draw_rows(rows, 9, seed=0)
    assert all(row in more for row in drawn)
    assert evaluation.draw_rows(rows, 100, seed=0) == rows


# ---------------- finished evaluations side by side ----------------


def write_evaluation(folder, items: list[dict]) -> str:
    """An evaluation's folder with these items."""
    folder.mkdir()
    write_jsonl(folder / "items.jsonl", items)
    return str(folder)


def test_compare_shows_the_intervals_below_the_accuracies(tmp_path):
    a = write_evaluation(tmp_path / "a", make_items(*[[R]] * 25))
    b = write_evaluation(tmp_path / "b", make_items(*[[R]] * 24, [W]))
    lines = evaluation.compare([a, b]).splitlines()
    assert "| math | **1.000 ± 0.000** | 0.960 ± 0.040 |" in lines
    second = lines.index("| 95 % interval | a | b |")
    assert lines[second + 2] == "| math | [0.867, 1.000] | [0.805, 0.993] |"
    assert lines[second - 1] == ""  # so that markdown sees two tables
    assert "b − a, over all 25 prompts: -0.040 ± 0.040 (p 0.33)" in lines


def test_compare_adds_up_in_the_order_of_the_first_evaluations_prompts(tmp_path):
    items = make_items(*[[R, W]] * 40)
    a = write_evaluation(tmp_path / "a", items)
    b = write_evaluation(tmp_path / "b", items[::-1])
    _, ids = evaluation.same_prompts([a, b])
    assert ids == [item["id"] for item in items]
    _, ids = evaluation.same_prompts([b, a])
    assert ids == [item["id"] for item in items[::-1]]


def test_compare_needs_a_prompt_with_verdicts_in_all_folders(tmp_path):
    a = write_evaluation(tmp_path / "a", make_items([R], [U]))
    b = write_evaluation(tmp_path / "b", make_items([U], [R]))
    with pytest.raises(UserError, match="no prompt has an accuracy in all of"):
        evaluation.compare([a, b])


# ---------------- evaluations of nothing ----------------


@pytest.mark.parametrize("name", ["bfcl-nope", "bfclx", "math", "MATH500", "", "math500,aime24"])
def test_an_unknown_benchmark_is_told_with_the_known_names(name, tmp_path, capsys):
    flags = ["--out", str(tmp_path / "out"), "--benchmarks", "humaneval", name]
    line = fails(flags, capsys, evaluation)
    assert f"--benchmarks {name}: not one of " in line
    for known in ("math500", "bfcl", "bfcl-irrelevance", "writingbench"):
        assert known in line.split()
    assert not (tmp_path / "out").exists()


def test_an_evaluation_without_rows_is_told(tmp_path, capsys, monkeypatch):
    row = {"domain": "math", "prompt": "1+1=?", "answer": "2"}
    write_jsonl(tmp_path / "rows.jsonl", [row | {"prompt": f"{i}+1=?"} for i in range(3)])
    monkeypatch.setattr(evaluation, "open_model", None)  # it must not come so far
    flags = ["--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "out")]
    line = fails([*flags, "--held-out", "8"], capsys, evaluation)
    assert "--held-out 8: training holds out at most a quarter" in line

    monkeypatch.setattr(evaluation.benchmarks, "rows_of", lambda name, files: [])
    flags = ["--benchmarks", "hle", *flags[2:]]
    assert "--benchmarks hle: it has no rows" in fails(flags, capsys, evaluation)


# ---------------- folders that are damaged ----------------

DAMAGES = {
    "args.json": ["[]", "{", ""],
    "items.jsonl": ["[]\n", "garbage\n{}\n", '{"id": "a"}\n', "5\n"],
}


@pytest.mark.parametrize(
    "name, text", [(name, text) for name, texts in DAMAGES.items() for text in texts]
)
def test_a_damaged_evaluation_is_named_in_one_line(tmp_path, name, text):
    (tmp_path / "args.json").write_text('{"prompts": 1}')
    item = {"id": "a", "domain": "math", "accuracy": 1.0, "responses": []}
    write_jsonl(tmp_path / "items.jsonl", [item])
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name}.* is damaged") as caught:
        evaluation.compare([str(tmp_path)])
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=f"{name}.* is damaged"):
        evaluation.open_folder(tmp_path, {"prompts": 1})
    assert (tmp_path / name).read_text() == text
