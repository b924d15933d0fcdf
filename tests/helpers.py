"""Helpers for tests of complete runs: start a run, read its metrics, compare two runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import cgpo
import famo
import grpo
import mcpo
import pcgrad
from common import cli
from conftest import ROOT

# opd.py needs teachers: test_opd.py runs it.
ALGORITHMS = {"grpo": grpo, "cgpo": cgpo, "famo": famo, "pcgrad": pcgrad, "mcpo": mcpo}
# The flags of a run that takes seconds; the last step is no multiple of the save interval.
SHORT = (
    *("--steps", 7, "--save-every", 2, "--eval-every", 3, "--eval-samples", 1),
    *("--batch-prompts", 10, "--mini-batch-prompts", 5, "--threads", 1),
)


def strings(*values) -> list[str]:
    """A command's words; numbers and paths become texts."""
    return [str(value) for value in values]


def run(script: str, *flags, **options) -> subprocess.CompletedProcess:
    """Run a script of the repository in a process of its own. options: of subprocess.run."""
    command = [sys.executable, script, *strings(*flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def run_and_kill(at: str, script: str, *flags, **options) -> None:
    """Run a script, and kill -9 it when it prints a line that begins with `at`."""
    command = [sys.executable, script, *strings(*flags)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, **options)
    for line in process.stdout:
        if line.startswith(at):
            break
    process.kill()
    process.wait()
    process.stdout.close()


def torchrun(count: int, *command, **options) -> subprocess.CompletedProcess:
    """Run a script of the repository on `count` ranks of one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    return subprocess.run(
        [*launcher, *strings(*command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


def metrics(out, timings: bool = False) -> list[dict]:
    """The objects of a run's metrics.jsonl, without timings, because those differ between runs."""
    lines = []
    for text in (Path(out) / "metrics.jsonl").read_text().splitlines():
        line = json.loads(text)
        for name in list(line):
            if name.startswith(("seconds/", "tokens_per_s")) and not timings:
                del line[name]
        lines.append(line)
    return lines


def read_samples(out) -> list[dict]:
    """The objects of a run's samples.jsonl."""
    return [json.loads(line) for line in (Path(out) / "samples.jsonl").read_text().splitlines()]


def mean_accuracy(line: dict) -> float:
    """The mean over domains of the held-out accuracy of sampled responses."""
    values = [value for name, value in line.items() if name.startswith("eval/sampled/")]
    return float(np.mean(values))


def assert_same_run(a: Path, b: Path) -> None:
    """The two runs have the same metrics (but for timings), and the same samples and weights."""
    assert metrics(a) == metrics(b)
    for name in ("samples.jsonl", "checkpoint/model.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def fails(argv: list[str], capsys, script=grpo) -> str:
    """The one line of error with which a script fails; its exit status is not 0.

    script: a module with a main(argv), or a main function.
    """
    main = getattr(script, "main", script)
    sys_argv = sys.argv
    sys.argv = ["grpo.py", *argv]
    try:
        with pytest.raises(SystemExit) as stop:
            cli.run_main(main)
    finally:
        sys.argv = sys_argv
    status = stop.value.code
    line = capsys.readouterr().err if isinstance(status, int) else status
    assert status != 0
    assert line.strip().count("\n") == 0
    assert line.startswith(("grpo.py", "pytest", "__main__"))
    return line
