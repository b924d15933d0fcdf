"""Kill and resume: a run that was stopped repeats the numbers of one that was not."""

import functools
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import grpo
from common import checkpoints
from common.files import write_jsonl
from helpers import (
    ALGORITHMS,
    ROOT,
    SHORT,
    assert_same_run,
    fails,
    metrics,
    run,
    run_and_kill,
    strings,
)
from sources.toy import demonstrations, toy_rows

# Every file's loop is the same: one file without a state, and the one with the largest.
KILLED = ["grpo", pytest.param("mcpo", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def whole_run(toy, tmp_path_factory):
    """algorithm → the folder of an uninterrupted run."""

    @functools.cache
    def folder(name):
        out = tmp_path_factory.mktemp(name) / "whole"
        done = run(f"{name}.py", *SHORT, "--out", out)
        assert done.returncode == 0, done.stderr
        return out

    return folder


@pytest.mark.parametrize("name", KILLED)
def test_kill_9_mid_run_then_resume_repeats_the_numbers(name, whole_run, tmp_path):
    out = tmp_path / "run"
    run_and_kill("step    5", f"{name}.py", *SHORT, "--out", out)
    assert len(metrics(out)) < 8
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "los')  # a line cut by the kill
    done = run(f"{name}.py", *SHORT, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert "resumed after step 4" in done.stdout
    assert_same_run(out, whole_run(name))


KILL_IN_SAVE = """
import os, signal, sys, torch
import {name}

save, trainer_saves = torch.save, 0


def save_half(value, path, **options):
    global trainer_saves
    trainer_saves += str(path).endswith("trainer.pt")
    if trainer_saves == 3:
        open(path, "wb").write(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    save(value, path, **options)


torch.save = save_half
{name}.main(sys.argv[1:])
"""


@pytest.mark.parametrize("name", KILLED)
def test_kill_9_mid_save_leaves_the_last_whole_checkpoint(name, whole_run, tmp_path):
    out = tmp_path / "run"
    killed = run("-c", KILL_IN_SAVE.format(name=name), *SHORT, "--out", out)
    assert killed.returncode == -signal.SIGKILL
    assert torch.load(out / "checkpoint/trainer.pt", weights_only=True)["step"] == 4
    done = run(f"{name}.py", *SHORT, "--out", out, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(out, whole_run(name))
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "args.json",
        "checkpoint",
        "checkpoint-000007",
        "curves.png",
        "metrics.jsonl",
        "samples.jsonl",
    ]


@pytest.mark.slow
def test_two_resumes_at_once(whole_run, tmp_path):
    """One of them goes on, and the other one ends in a line."""
    out = tmp_path / "run"
    run_and_kill("step    5", "grpo.py", *SHORT, "--out", out)
    command = [sys.executable, "grpo.py", *strings(*SHORT, "--out", out, "--resume")]
    options = {"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [subprocess.Popen(command, **options) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    statuses = [process.returncode for process in both]
    assert sorted(statuses) == [0, 1], errors
    assert "another process is training there" in errors[statuses.index(1)]
    assert errors[statuses.index(1)].count("\n") == 1
    assert_same_run(out, whole_run("grpo"))


@pytest.mark.parametrize("script", ["grpo.py", "sft.py", "studies/study.py", "studies/bench.py"])
def test_resume_is_offered_only_where_it_exists(script):
    """After Ctrl-C, run_main says what the user can do."""
    text = (ROOT / script).read_text()
    end = text[text.index('if __name__ == "__main__":') :]
    assert ("run_main(main)" in end) == (script == "grpo.py")


KILL_SFT_IN_SAVE = """
import os, signal, sys
import sft
from common import checkpoints


def save_half(tensors, path, metadata):
    open(path, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


checkpoints.save_file = save_half
sft.main(sys.argv[1:])
"""
SFT = ("--steps", 40, "--batch-rows", 4, "--max-tokens", 32, "--system-prompt", "", "--seed", 3)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["mid-run", "mid-save"])
def test_kill_9_of_sft_then_the_same_command(moment, toy, tmp_path):
    """sft.py has no --resume: what was killed begins anew, in the same folder."""
    write_jsonl(tmp_path / "rows.jsonl", demonstrations(200, 0))
    flags = [*SFT, "--model", toy, "--data", tmp_path / "rows.jsonl", "--out"]
    assert run("sft.py", *flags, tmp_path / "whole").returncode == 0
    out = tmp_path / "killed"
    if moment == "mid-run":
        run_and_kill("  sft step    20", "sft.py", *flags, out)
    else:
        killed = run("-c", KILL_SFT_IN_SAVE, *flags, out)
        assert killed.returncode == -signal.SIGKILL
    assert not (out / "checkpoint").exists()
    done = run("sft.py", *flags, out)
    assert done.returncode == 0, done.stderr
    weights = "checkpoint/model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert sorted(path.name for path in out.iterdir()) == [
        ".lock",
        "args.json",
        "checkpoint",
        "checkpoint-000040",
    ]


@pytest.mark.parametrize(
    "name, flags",
    [
        ("cgpo", []),
        ("famo", []),
        ("pcgrad", []),
        ("mcpo", ["--lambda-in", "0"]),
        ("grpo", ["--curriculum", "omni-thinker"]),
    ],
)
def test_an_interrupted_run_resumes_exactly(name, flags, toy, tmp_path, monkeypatch):
    module, save_folder = ALGORITHMS[name], checkpoints.save_folder
    flags = [*strings(*SHORT[:-2]), *flags, "--out"]
    whole, out = module.main([*flags, str(tmp_path / "whole")]), tmp_path / "run"

    def stop_after_four(link, tag, write):
        save_folder(link, tag, write)
        if tag == "000004":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save_folder", stop_after_four)
        module.main([*flags, str(out)])
    assert len(metrics(out)) == 5
    module.main([*flags, str(out), "--resume"])
    assert_same_run(out, whole)
    # heads, logits, and their optimizers
    a = torch.load(whole / "checkpoint/trainer.pt", weights_only=True)
    b = torch.load(out / "checkpoint/trainer.pt", weights_only=True)
    assert str(a) == str(b)


def test_resuming_a_finished_run_with_more_steps_goes_on(whole_run, tmp_path):
    shutil.copytree(whole_run("grpo"), tmp_path / "run", symlinks=True)
    flags = [*strings(*SHORT), "--out", str(tmp_path / "run"), "--resume"]
    assert flags[:2] == ["--steps", "7"]
    flags[1] = "8"
    grpo.main(flags)
    assert [line["step"] for line in metrics(tmp_path / "run")] == list(range(9))


def test_a_folder_that_is_taken_is_told_before_the_model_is_loaded(whole_run, capsys, monkeypatch):
    monkeypatch.setattr(grpo, "load_policy", lambda *_: pytest.fail("loaded"))
    flags = [*strings(*SHORT), "--out", str(whole_run("grpo"))]
    assert "already holds this run" in fails(flags, capsys)


def test_a_curriculum_is_not_resumed_with_another_number_of_steps(toy, tmp_path, capsys):
    flags = ["--curriculum", "omni-thinker", "--batch-prompts", "5", "--mini-batch-prompts", "5"]
    flags += ["--eval-prompts", "0", "--out", str(tmp_path / "run"), "--steps"]
    lines = metrics(grpo.main([*flags, "5"]))
    stages = [name for line in lines[1:] for name in line if name.startswith("prompts/")]
    assert stages == [f"prompts/{d}" for d in ("code", "math", "science", "writing", "if")]
    assert "--steps 5 → 6" in fails([*flags, "6", "--resume"], capsys)


# ---------------- pass rates: eval.py measures them and orders a self-paced run ----------------


@pytest.fixture
def rate(toy, tmp_path):
    """rate(name, *flags): the file of rows with pass rates that eval.py writes."""
    rows = [row for row in toy_rows() if row["domain"] in ("science", "if")]
    constraint = {"id": "punctuation:no_comma", "kwargs": {}}
    too_long = {"id": "long", "domain": "if", "prompt": "say " * 30, "constraints": [constraint]}
    write_jsonl(tmp_path / "rows.jsonl", [*rows, too_long])

    def evaluate(name, *flags):
        evaluation.main(
            [
                *("--model", "toy", "--data", str(tmp_path / "rows.jsonl"), "--k", "4"),
                *("--batch-prompts", "64", "--out", str(tmp_path / name)),
                *("--rated", str(tmp_path / f"{name}.jsonl"), *flags),
            ]
        )
        return tmp_path / f"{name}.jsonl"

    evaluate.rows = rows
    return evaluate


def test_pass_rates_order_a_self_paced_run(rate, tmp_path, capsys):
    flags = ["--curriculum", "self-paced", "--out", str(tmp_path / "x")]
    assert 'no row has a "pass_rate"' in fails(flags, capsys)
    assert not (tmp_path / "x").exists()  # told before anything is made

    rated = rate("rated")
    printed = capsys.readouterr().out
    assert f"{len(rate.rows) + 1} rows, 1 without a pass rate" in printed
    assert "left" in printed
    rows = [json.loads(line) for line in rated.read_text().splitlines()]
    assert len(rows) == len(rate.rows) + 1
    assert "pass_rate" not in rows[-1]
    assert {row["pass_rate"] * 4 for row in rows[:-1]} == {0, 1, 2, 3, 4}

    flags = ["--data", str(rated), "--curriculum", "self-paced", "--steps", "12"]
    flags += ["--eval-samples", "0", "--lr", "1e-9", "--out", str(tmp_path / "run")]
    lines = metrics(grpo.main(flags))

    def accuracy(lines):
        values = []
        for line in lines:
            values += [value for name, value in line.items() if name.startswith("accuracy/")]
        return np.mean(values)

    assert accuracy(lines[1:4]) > accuracy(lines[-3:]) + 0.4
    flags = ["--out", str(tmp_path / "run")]  # which holds no evaluation
    assert "other flags or rows" in fails([], capsys, lambda: rate("new", *flags))


def test_a_killed_evaluation_goes_on_where_it_was(rate, tmp_path, capsys, monkeypatch):
    rated = rate("rated")
    rollout, calls = grpo.rollout, []

    def killed(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return rollout(*args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(grpo, "rollout", killed)
        rate("again")
    assert not (tmp_path / "again.jsonl").exists()
    with open(tmp_path / "again" / "items.jsonl", "a") as file:
        file.write('{"id": "cut off')  # as a kill in the middle of a line leaves it

    text = (tmp_path / "rows.jsonl").read_text()
    write_jsonl(tmp_path / "rows.jsonl", rate.rows[5:])
    message = fails([], capsys, lambda: rate("again"))
    assert "other flags or rows (--prompts 240 → 235; --rows" in message
    (tmp_path / "rows.jsonl").write_text(text)
    message = fails([], capsys, lambda: rate("again", "--k", "2"))
    assert "other flags or rows (--k 4 → 2)" in message

    rate("again", "--batch-prompts", "50")
    assert "; 128 are done" in capsys.readouterr().out
    assert rated.read_text() == (tmp_path / "again.jsonl").read_text()
    items = [(tmp_path / name / "items.jsonl").read_text() for name in ("rated", "again")]
    assert items[0] == items[1]

    for flags, message in (
        (["--rated", str(rated)], "it exists"),
        (["--temperature", "-1"], "must not be negative"),
        (["--k", "0"], "positive"),
        (["--max-new-tokens", "200"], "exceed 64 tokens, the model's context"),
        (["--out", str(tmp_path / "again")], "other flags or rows"),
    ):
        assert message in fails(flags, capsys, functools.partial(rate, "new", "--k", "2", *flags))
    assert not (tmp_path / "new.jsonl").exists()
