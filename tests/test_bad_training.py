"""Bad inputs of the algorithm files and of sft.py."""

import pytest

import sft
from bad_inputs import MODEL_FAULTS, ROW_FAULTS, assert_refused, bad_model, bad_rows, outputs
from helpers import ALGORITHMS

SHORT = (
    "--steps 1 --batch-prompts 4 --mini-batch-prompts 4 --group-size 4 --eval-prompts 0 "
    "--max-prompt-tokens 16 --max-new-tokens 18 --threads 1 --engine hf"
).split()
SCRIPTS = ALGORITHMS | {"sft": sft}


def command(script: str, model, data, out) -> list:
    """A short training; its rows are far from what the toy knows, but that is no fault."""
    flags = ["--steps", "1", "--batch-rows", "4"] if script == "sft" else SHORT
    return [*flags, "--system-prompt", "", "--model", model, "--data", data, "--out", out]


@pytest.mark.parametrize("name", MODEL_FAULTS)
@pytest.mark.parametrize("script", ["grpo", "sft"])
def test_models(script, name, toy, tmp_path, capsys):
    model = bad_model(name, toy, tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"domain": "math", "prompt": "1+1=", "answer": "2", "response": "2"}\n')
    argv = command(script, model, rows, tmp_path / "out")
    assert_refused(SCRIPTS[script], argv, capsys, tmp_path, str(model))


@pytest.mark.parametrize("name", ROW_FAULTS)
@pytest.mark.parametrize("script", ["grpo", "sft"])
def test_rows(script, name, toy, tmp_path, capsys):
    rows = bad_rows(name, tmp_path)
    argv = command(script, toy, rows, tmp_path / "out")
    assert_refused(SCRIPTS[script], argv, capsys, tmp_path, str(rows))


@pytest.mark.parametrize("name", ["a file", "below a file", "full", "nowhere"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_outputs(script, name, toy, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"domain": "math", "prompt": "1+1=", "answer": "2", "response": "2"}\n' * 8)
    argv = command(script, toy, rows, outputs(tmp_path)[name])
    assert_refused(SCRIPTS[script], argv, capsys, tmp_path, "--out")


NUMBERS = {
    "--lr": ["0", "-1", "inf", "nan", "x", ""],
    "--warmup-steps": ["-1", "1.5", "x"],
    "--weight-decay": ["-1", "inf", "nan"],
    "--max-prompt-tokens": ["0", "-1", "1e3"],
    "--micro-batch-tokens": ["0", "-1"],
    "--threads": ["-3", "x", "1000000", "99999999999999999999"],
    "--seed": ["-1", "1.5", "99999999999"],
    "--steps": ["-1", "x", "99999999999999999999"],
}
GRPO_NUMBERS = NUMBERS | {
    "--clip-low": ["-1", "nan"],
    "--clip-high": ["-1", "nan", "inf"],
    "--beta": ["-1", "inf"],
    "--temperature": ["0", "-1", "inf"],
    "--top-p": ["0", "0.9", "2"],
    "--group-size": ["0", "1", "-4", "99999999999999999999"],
    "--batch-prompts": ["0", "-1"],
    "--mini-batch-prompts": ["0", "3"],
    "--max-new-tokens": ["0", "-1"],
    "--engine-memory": ["0", "2", "-1"],
    "--rollout-tokens": ["0"],
    "--adam-betas": ["1", "nan"],
    "--max-grad-norm": ["-1", "inf"],
    "--save-every": ["0", "-1"],
    "--eval-every": ["-1"],
    "--eval-prompts": ["-1"],
    "--eval-samples": ["-1"],
    "--domains": ["poetry", ""],
    "--eval-domains": ["poetry"],
    "--domain-mix": ["math", "math=x", "math=0", "math=inf", "poetry=1"],
    "--date": ["today", "2026-13-01"],
    "--loss-norm": ["mean"],
    "--engine": ["sglang"],
    "--dtype": ["int8"],
}
SFT_NUMBERS = NUMBERS | {
    "--batch-rows": ["0", "-1"],
    "--max-tokens": ["0"],
    "--warmup-share": ["-1", "2", "nan"],
}
OWN_NUMBERS = {
    "grpo": GRPO_NUMBERS,
    "sft": SFT_NUMBERS,
    "mcpo": {
        "--tau": ["0", "nan"],
        "--lambda-in": ["-1", "inf"],
        "--pool-size": ["0"],
        "--top-k": ["0"],
    },
    "famo": {"--famo-smooth": ["1", "-1"], "--famo-decay": ["-1"], "--reward-max": ["1", "inf"]},
}


FLAG_CASES = [
    (script, flag, value)
    for script, numbers in OWN_NUMBERS.items()
    for flag, values in numbers.items()
    for value in values
]


@pytest.mark.parametrize("script, flag, value", FLAG_CASES)
def test_flags(script, flag, value, toy, tmp_path, capsys):
    values = [value, value] if flag == "--adam-betas" else [value]
    argv = command(script, toy, "toy", tmp_path / "out")
    if script == "sft":
        argv[argv.index("toy")] = str(tmp_path)
    assert_refused(SCRIPTS[script], [*argv, flag, *values], capsys, tmp_path, flag)


def test_a_row_without_a_response_is_no_demonstration(toy, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"domain": "math", "prompt": "1+1=", "answer": "2"}\n')
    argv = command("sft", toy, rows, tmp_path / "out")
    assert_refused(sft, argv, capsys, tmp_path, 'rows/1: field "response" is missing')
