"""Errors: one line, a non-zero exit status, nothing half-written."""

import importlib
import json
import os
import re
import subprocess
import sys

import pytest

import famo
import grpo
import mcpo
from common.files import write_jsonl
from helpers import ALGORITHMS, ROOT, fails, run


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--alpha", "1"], "unrecognized arguments: --alpha"),
        (["--step", "1"], "unrecognized arguments: --step"),
        (["--steps", "x"], "--steps x: must be a whole number"),
        (["--lr", "x"], "--lr x: must be a number"),
        (["--domains", "poetry"], "--domains poetry: not one of"),
        (["--eval-domains", "poetry"], "--eval-domains poetry: not one of"),
        (["--domains", "agent"], "no row of this domain"),
        (["--domain-mix", "agent=1"], "no row of this domain"),
        (["--steps", "-1"], "must not be negative"),
        (["--eval-prompts", "-1"], "must not be negative"),
        (["--max-grad-norm", "-1"], "must not be negative"),
        (["--adam-betas", "1", "1"], "must be at least 0 and below 1"),
        (["--group-size", "1"], "at least 2 responses"),
        (["--mini-batch-prompts", "7"], "does not divide"),
        (["--lr", "-1"], "--lr -1: must be positive"),
        (["--lr", "nan"], "--lr nan: must be a finite number"),
        (["--max-new-tokens", "100"], "exceed 64 tokens, the model's context"),
        (["--max-prompt-tokens", "2"], "every prompt is longer than"),
        (["--data", "nowhere.jsonl"], "no such file"),
        (["--model", "Qwen2.5-7B-Instruct"], "cannot load it"),
        (["--model", "no-such-family", "--data", "toy"], "tried a folder"),
        (["--model", "Qwen2.5-7B-Instruct", "--data", "toy"], "Qwen2.5-7B-Instruct"),
        (["--top-p", "0.9"], "would be biased"),
        (["--top-k", "20"], "unrecognized arguments: --top-k"),
        (["--engine-memory", "2"], "at most 1"),
        (["--engine-memory", "0"], "--engine-memory 0: must be above 0"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
        (["--resume", "--out", "nowhere"], "holds no run"),
    ],
)
def test_bad_input_is_one_line(argv, message, toy, capsys):
    before = set(os.listdir("."))
    assert message in fails(argv, capsys)
    assert set(os.listdir(".")) == before


@pytest.mark.parametrize(
    "module, argv, message",
    [
        (mcpo, ["--tau", "0"], "--tau 0: must be positive"),
        (mcpo, ["--lambda-in", "-1"], "--lambda-in -1: must not be negative"),
        (mcpo, ["--pool-size", "0"], "--pool-size 0: must be positive"),
        (mcpo, ["--top-k", "0"], "--top-k 0: must be positive"),
        (famo, ["--reward-max", "1"], "above 1, the largest"),
        (famo, ["--famo-smooth", "1"], "--famo-smooth 1: must be at least 0 and below 1"),
        (famo, ["--famo-decay", "-1"], "must not be negative"),
        (grpo, ["--curriculum", "hard-first"], "invalid choice"),
    ],
)
def test_the_algorithms_own_flags_are_checked(module, argv, message, toy, capsys):
    assert message in fails(argv, capsys, module)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_help_explains_every_flag(name, capsys):
    with pytest.raises(SystemExit) as stop:
        ALGORITHMS[name].parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"python {name}.py" in text
    assert ALGORITHMS[name].__doc__.split(":")[0] in text
    assert max(len(line) for line in text.splitlines()) <= 120
    flags = text[text.index("--help") : text.index("In brackets")]
    entries = re.split(r"\n  --", flags)[1:]
    assert len(entries) > 40
    # --flag VALUE, two blanks or a new line, an explanation
    entry_pattern = r"[\w-]+( \S+| \S+ \[\S+ \.\.\.\])*?(  +|\n +)\S.{4,}"
    for entry in entries:
        assert re.fullmatch(entry_pattern, entry.strip(), re.DOTALL), entry


def test_a_missing_vllm_is_an_error_and_auto_says_why_it_takes_hf(
    toy, tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(sys.modules, "vllm", None)
    flags = ["--engine", "vllm", "--out", str(tmp_path / "run")]
    assert "docs/scale.md says how to install it" in fails(flags, capsys)
    assert not (tmp_path / "run").exists()

    flags = ["--engine", "auto", "--steps", "1", "--eval-prompts", "0"]
    out = grpo.main([*flags, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "engine hf (vllm did not start: " in printed
    assert "; importance-sampling correction none" in printed
    # as it was given, because --resume compares it
    assert json.loads((out / "args.json").read_text())["is_correction"] == "auto"


@pytest.mark.parametrize(
    "row, message",
    [
        ({"domain": "writing", "prompt": "Write.", "reference": "x"}, "need --judge-url"),
        (
            {"domain": "if", "prompt": "Write.", "constraints": [{"id": "language:no_such_id"}]},
            "unknown constraint language:no_such_id",
        ),
    ],
)
def test_rows_that_nobody_can_judge_stop_the_run_before_it_samples(
    row, message, toy, tmp_path, capsys
):
    write_jsonl(tmp_path / "rows.jsonl", [row])
    flags = ["--data", str(tmp_path / "rows.jsonl"), "--max-prompt-tokens", "40"]
    flags += ["--out", str(tmp_path / "run")]
    assert message in fails(flags, capsys)
    assert not (tmp_path / "run").exists()


def test_a_malformed_line_7_is_named(toy, tmp_path, capsys):
    good = json.dumps({"domain": "math", "prompt": "1", "answer": "1"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([good] * 6 + ["{"]))
    assert "rows.jsonl line 7: not JSON" in fails(["--data", str(path)], capsys)
    path.write_text("")
    assert "no rows in this file" in fails(["--data", str(path)], capsys)


NO_SPACE = """
import resource, signal
import grpo
from common import cli

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
cli.run_main(grpo.main)
"""


def test_no_space_on_the_device(toy, tmp_path):
    out = tmp_path / "run"
    done = run("-c", NO_SPACE, "--steps", 2, "--eval-prompts", 0, "--out", out)
    assert done.returncode == 1
    assert "cannot save" in done.stderr.splitlines()[-1]
    names = sorted(path.name for path in out.iterdir())
    assert names == [".lock", "args.json", "metrics.jsonl", "samples.jsonl"]


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(toy):
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    flags = ("--model", "Qwen2.5-7B-Instruct", "--data", "toy")
    done = run("cgpo.py", *flags, env=offline, timeout=300)  # seconds: it does not try for ever
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("cgpo.py: model Qwen/Qwen2.5-7B-Instruct: cannot load it")


# ---------------- numbers, terminals and pipes ----------------

SCRIPTS = [*ALGORITHMS, "sft", "eval", "merge", "studies.bench"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_number_may_be_infinite_or_none(name, capsys):
    module = importlib.import_module(name)
    before = ["fit"] if name == "studies.bench" else []
    with pytest.raises(SystemExit):
        module.parse_args([*before, "--help"])
    flags = re.findall(r"(--[\w-]+)((?: X)+)", capsys.readouterr().out)
    assert flags
    for flag, numbers in flags:
        for value in ("inf", "nan", "1e400"):
            with pytest.raises(SystemExit):
                module.parse_args([*before, flag, *[value] * numbers.count("X")])
            assert f"{flag} {value}: " in capsys.readouterr().err


def test_a_terminal_of_ascii_alone():
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "grpo.py", "--help"], cwd=ROOT, env=environment, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"?" in done.stdout


def test_a_reader_that_leaves_does_not_end_the_work():
    """Far more is printed than a pipe holds."""
    code = (
        "import sys\nfrom common.cli import run_main\n"
        "def main():\n    for i in range(50_000): print('a line of text', i)\n"
        "    print('worked', file=sys.stderr)\n"
        "run_main(main)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"worked\n"
    assert process.wait() == 0
    process.stderr.close()


@pytest.mark.parametrize("stream", ["1", "2"])
def test_a_stream_that_the_shell_has_closed(stream):
    command = f"{sys.executable} merge.py --help {stream}>&-"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
