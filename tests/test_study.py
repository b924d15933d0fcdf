"""studies/study.py: the statistics against known answers, which runs are done in which order, the
report from a file of results, and a real run."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import cgpo
from common.errors import UserError
from common.files import RUNS, read_jsonl
from helpers import ROOT, run, run_and_kill
from studies import study
from studies.study import METHODS, TUNING_SEED


def make_result(method, seed, lr, accuracy, setting="balanced"):
    return {
        "setting": setting,
        "method": method,
        "seed": seed,
        "lr": lr,
        "before": {"math": 0.2, "code": 0.2},
        "accuracy": {"math": accuracy, "code": accuracy},
        "moved": 2.0,
        "step_s": 0.2,
        "peak_gib": 0.5,
        "reward": {"math": [0.0, 0.5], "code": [0.1, None]},
        "alignment": [0.1, 0.2],
        "commit": "x",
        "date": "2026-11-21",
    }


def tuning_results(method, best):
    """The results with which `best` is the method's learning rate."""
    results = []
    for rate in sorted({*METHODS[method].rates, best / 2, best, best * 2}):
        accuracy = 0.9 if rate == best else 0.5
        results.append(make_result(method, TUNING_SEED, rate, accuracy))
    return results


@pytest.fixture
def write_results(tmp_path, monkeypatch):
    """Results and figure are in a temporary folder; the fixture writes the results."""
    monkeypatch.setattr(study, "RESULTS", tmp_path / "study.jsonl")
    monkeypatch.setattr(study, "FIGURE", tmp_path / "study.png")

    def write(results):
        study.RESULTS.write_text("".join(json.dumps(result) + "\n" for result in results))

    return write


# ---------------- statistics ----------------


@pytest.mark.parametrize(
    "t, n, p",
    [(2.776, 5, 0.05), (12.706, 2, 0.05), (1.0, 3, 0.4226), (4.604, 5, 0.01), (0.0, 4, 1.0)],
)
def test_p_values_are_students(t, n, p):
    """Against the printed tables of Student's t."""
    noise = np.arange(n) - (n - 1) / 2
    differences = noise + t * np.std(noise, ddof=1) / n**0.5
    assert study.evaluation.p_value(differences) == pytest.approx(p, abs=2e-4)
    assert study.evaluation.p_value(-differences) == pytest.approx(p, abs=2e-4)


def test_errors_need_two_values():
    assert math.isnan(study.evaluation.p_value([0.1]))
    assert study.evaluation.standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / 3**0.5)


def test_holm_by_hand():
    # in order: 0.005 < 0.0125, 0.01 < 0.0167, 0.03 > 0.025
    assert study.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == {"a", "d"}
    assert study.holm({"a": 0.02, "b": 0.6}) == {"a"}
    assert study.holm({"a": 0.03, "b": float("nan"), "c": 0.04}) == set()


# ---------------- which runs, in which order ----------------


@pytest.fixture
def two_methods():
    flags = ["--seeds", "2", "--methods", "joint GRPO", "CGPO", "--settings", "balanced"]
    return study.parse_args(flags)


def test_tuning_comes_first(two_methods):
    runs = study.missing_runs([], two_methods)
    joint, cgpo_runs = runs[:3], runs[3:]
    assert [(run["method"], run["seed"]) for run in joint] == [("joint GRPO", TUNING_SEED)] * 3
    assert [(run["method"], run["seed"]) for run in cgpo_runs] == [("CGPO", TUNING_SEED)] * 3
    assert len({run["lr"] for run in runs}) == 4


def test_a_learning_rate_is_chosen_when_all_were_tried_and_only_then_seeds_run(two_methods):
    results = tuning_results("joint GRPO", 2.5e-4)
    results += [make_result("CGPO", TUNING_SEED, rate, rate) for rate in (5e-4, 1e-3)]
    for rate in (2e-3, 4e-3, 8e-3, 1.6e-2):  # the best is the largest: on, until six are tried
        assert study.choose_rate(results, "balanced", "CGPO") == (None, [rate])
        runs = study.missing_runs(results, two_methods)
        assert [(run["method"], run["seed"], run["lr"]) for run in runs] == [
            ("CGPO", TUNING_SEED, rate),
            ("joint GRPO", 0, 2.5e-4),
            ("joint GRPO", 1, 2.5e-4),
        ]
        results.append(make_result("CGPO", TUNING_SEED, rate, rate))
    assert study.choose_rate(results, "balanced", "CGPO") == (1.6e-2, [])


def test_rates_go_down_while_the_smallest_is_the_best():
    results = []
    for rate in METHODS["FAMO"].rates:
        results.append(make_result("FAMO", TUNING_SEED, rate, 1 - rate))
    assert study.choose_rate(results, "balanced", "FAMO") == (None, [1.25e-4])


def test_finished_runs_are_not_done_again(two_methods):
    results = tuning_results("joint GRPO", 2.5e-4) + tuning_results("CGPO", 2e-3)
    results.append(make_result("CGPO", 0, 2e-3, 0.8))
    runs = study.missing_runs(results, two_methods)
    assert [(run["method"], run["seed"]) for run in runs] == [
        ("joint GRPO", 0),
        ("joint GRPO", 1),
        ("CGPO", 1),
    ]


# ---------------- the report ----------------


def test_the_report_pairs_by_seed_and_leaves_tuning_and_other_rates_out(write_results):
    results = tuning_results("joint GRPO", 5e-4) + tuning_results("CGPO", 2e-3)
    results.append(make_result("CGPO", 0, 5e-4, 0.1))  # another rate than the chosen one
    for seed, (joint, cgpo_accuracy) in enumerate([(0.80, 0.82), (0.70, 0.73), (0.90, 0.93)]):
        results.append(make_result("joint GRPO", seed, 5e-4, joint))
        results.append(make_result("CGPO", seed, 2e-3, cgpo_accuracy))
    write_results(results)
    text = study.report()
    cells_of = {}
    for line in text.splitlines():
        if line.startswith("| "):
            cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
            cells_of[cells[0]] = cells
    joint, cgpo_cells = cells_of["joint GRPO"], cells_of["CGPO"]
    assert joint[1:6] == ["3", "0.0005", "0.80 ± 0.06", "0.80 ± 0.06", "0.800 ± 0.058"]
    differences = np.array([0.02, 0.03, 0.03])
    error = differences.std(ddof=1) / 3**0.5
    assert cgpo_cells[2] == "0.002"
    assert cgpo_cells[6] == f"+0.027 ± {error:.3f}"
    assert cgpo_cells[7] == f"{study.evaluation.p_value(differences):.2g}*"
    assert len(joint) == len(cgpo_cells) == 11
    assert study.FIGURE.stat().st_size > 10_000
    assert "imbalanced" not in text


def test_no_results_are_one_line(write_results):
    with pytest.raises(UserError, match="no results yet"):
        study.report()


def test_an_unknown_method_is_refused():
    with pytest.raises(SystemExit):
        study.parse_args(["--methods", "GRPO"])


def test_the_results_page_shows_the_report_of_the_results_in_the_repository(monkeypatch):
    monkeypatch.setattr(study, "draw", lambda results: None)
    page = Path(__file__).parent.parent / study.PAGE
    assert study.report() in page.read_text(encoding="utf-8")


# ---------------- a real run ----------------


class Stopped(Exception):
    """Raised where the model would be loaded."""


def prompts_of(rows):
    """The prompts of (training rows, held-out rows), as two sets."""
    training_rows, held_out_rows = rows
    return {row["prompt"] for row in training_rows}, {row["prompt"] for row in held_out_rows}


def test_a_real_run_reports_prompts_that_no_run_trains_on(toy, monkeypatch, capfd):
    """And a tuning run neither trains on the reported held-out prompts nor looks at them."""
    monkeypatch.setattr(study, "prepare", lambda seed: toy)
    run = {"setting": "imbalanced", "method": "CGPO, domains mixed", "lr": 1e-3, "steps": 2}
    rows_seen = []
    setup = cgpo.setup

    def recording_setup(args, rows):
        rows_seen.append(rows)
        return setup(args, rows=rows)

    def stopping_setup(args, rows):
        rows_seen.append(rows)
        raise Stopped

    monkeypatch.setattr(cgpo, "setup", recording_setup)
    result = study.run_once(run | {"seed": 0})
    monkeypatch.setattr(cgpo, "setup", stopping_setup)
    with pytest.raises(Stopped):
        study.run_once(run | {"seed": TUNING_SEED})

    training, held_out = prompts_of(rows_seen[0])
    tuning_training, tuning_held_out = prompts_of(rows_seen[1])
    assert len(held_out) == 172
    assert not held_out & training
    assert not held_out & (tuning_training | tuning_held_out)
    assert not tuning_training & tuning_held_out
    assert len(tuning_held_out) > 100

    domains = {"math", "code", "science", "writing", "if"}
    assert result["moved"] > 0
    assert result["accuracy"].keys() == result["before"].keys() == domains
    assert len(result["alignment"]) == 1
    assert -1 < result["alignment"][0] < 1
    assert result["step_s"] > 0
    assert not list((RUNS / "study").glob("imbalanced-CGPO,_domains_mixed-*-0.001"))


# ---------------- kills ----------------

WORKER = """
import time
from studies import study
def sleep(seconds):
    import os, sys
    sys.stderr.write(f"{os.getpid()}\\n")  # one write: print makes two, which the workers may mix
    time.sleep(seconds)
with study.make_pool(2) as pool:
    pool.map(sleep, [1000, 1000], chunksize=1)
"""


def is_running(process_id: int) -> bool:
    """Is there such a process, and is it no zombie, which nobody has asked for its exit status?"""
    try:
        state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_workers_end_with_their_parent():
    command = [sys.executable, "-c", WORKER]
    parent = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    workers = [int(parent.stderr.readline()) for _ in range(2)]
    parent.kill()
    parent.wait()
    parent.stderr.close()
    deadline = time.monotonic() + 20
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.1)


THREE_RUNS = """
import sys
from pathlib import Path
from studies import study
toy, out = sys.argv[1:]
study.RUNS, study.RESULTS = Path(out), Path(out) / "study.jsonl"
study.RUNS.mkdir(exist_ok=True)
def prepare(seed):
    return toy
study.prepare = prepare
runs = []
for lr in (1e-4, 2e-4, 3e-4):
    runs.append({"setting": "balanced", "method": "joint GRPO", "seed": 0, "lr": lr, "steps": 4})
def missing_runs(results, args):
    finished = {study.run_key(result) for result in results}
    return [run for run in runs if study.run_key(run) not in finished]
study.missing_runs = missing_runs
study.run_all(study.parse_args(["--workers", "2", "--seeds", "1"]))
"""


@pytest.mark.slow
def test_kill_9_of_a_study_then_the_same_command(toy, tmp_path):
    """Killed after its first result, and once more in the middle of a line of the results."""
    toy = str(Path(ROOT, toy).resolve())
    assert run("-c", THREE_RUNS, toy, tmp_path / "whole").returncode == 0
    out = tmp_path / "killed"
    run_and_kill("balanced", "-c", THREE_RUNS, toy, out)
    assert 1 <= len(read_jsonl(out / "study.jsonl")) < 3
    with open(out / "study.jsonl", "a") as file:
        file.write('{"setting": "bal')
    assert run("-c", THREE_RUNS, toy, out).returncode == 0

    results = []
    for name in ("whole", "killed"):
        lines = read_jsonl(tmp_path / name / "study.jsonl", study.RESULT_FIELDS)
        results.append({line["lr"]: (line["accuracy"], line["moved"]) for line in lines})
        assert len(lines) == 3
    assert results[0] == results[1]
    assert not list((out / "study").iterdir())


def test_results_are_read_up_to_a_cut_line(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "study.jsonl")
    kinds = {int: 1, float: 0.5, str: "x", dict: {}}
    result = {name: kinds[types[0]] for name, types in study.RESULT_FIELDS.items()}
    line = json.dumps(result)
    study.RESULTS.write_text(f"{line}\n{line}\n{line[:30]}")
    assert study.read_results() == [result, result]
