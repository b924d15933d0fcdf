"""Bad inputs of eval.py: models, rows, folders of evaluations, flags."""

import json
import os
import shutil

import pytest

import eval as evaluation
from bad_inputs import (
    MODEL_FAULTS,
    ROW_FAULTS,
    assert_refused,
    bad_model,
    bad_rows,
    cut,
    empty,
    garbage,
    no_object,
    outputs,
)

SHORT = (
    "--k 2 --max-prompt-tokens 16 --max-new-tokens 18 --threads 1 --engine hf --temperature 1"
).split()


def command(model, data, out) -> list:
    return [*SHORT, "--system-prompt", "", "--model", model, "--data", data, "--out", out]


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The folder of an evaluation of three rows, and its command."""
    folder = tmp_path_factory.mktemp("evaluation")
    rows = folder / "rows.jsonl"
    row = {"domain": "math", "answer": "2"}
    rows.write_text("".join(json.dumps({**row, "prompt": f"{i}+1="}) + "\n" for i in range(3)))
    argv = [str(word) for word in command(toy, rows, folder / "scores")]
    evaluation.main(argv)
    return folder, argv


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_models(name, toy, tmp_path, capsys):
    model = bad_model(name, toy, tmp_path)
    argv = command(model, "toy", tmp_path / "out")
    assert_refused(evaluation, argv, capsys, tmp_path, str(model))


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_rows(name, toy, tmp_path, capsys):
    rows = bad_rows(name, tmp_path)
    argv = command(toy, rows, tmp_path / "out")
    assert_refused(evaluation, argv, capsys, tmp_path, str(rows))


@pytest.mark.parametrize("name", ["a file", "below a file", "full", "nowhere"])
def test_outputs(name, toy, tmp_path, capsys):
    argv = command(toy, "toy", outputs(tmp_path)[name])
    assert_refused(evaluation, argv, capsys, tmp_path, "--out")


def without_a_field(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    del lines[0]["accuracy"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def with_a_number_for_a_line(path):
    path.write_text("3\n" + path.read_text())


def with_other_flags(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"k": 3}))


FOLDER_FAULTS = [
    ("args.json", cut),
    ("args.json", empty),
    ("args.json", garbage),
    ("args.json", no_object),
    ("args.json", os.unlink),
    ("args.json", with_other_flags),
    ("items.jsonl", garbage),
    ("items.jsonl", without_a_field),
    ("items.jsonl", with_a_number_for_a_line),
]


@pytest.mark.parametrize("name, damage", FOLDER_FAULTS)
def test_folders_to_continue(name, damage, finished, tmp_path, capsys):
    folder, argv = finished
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy / "scores" / name)
    argv = [*argv, "--out", str(copy / "scores")]  # the last one counts
    if (name, damage) == ("items.jsonl", garbage):  # one cut line, as a kill leaves it
        evaluation.main(argv)
        assert len((copy / "scores" / "items.jsonl").read_text().splitlines()) == 3
        return
    assert_refused(evaluation, argv, capsys, tmp_path, str(copy / "scores"))


@pytest.mark.parametrize("name, damage", [*FOLDER_FAULTS, ("items.jsonl", os.unlink)])
def test_folders_to_compare(name, damage, finished, tmp_path, capsys):
    folder, _ = finished
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy / "scores" / name)
    argv = ["--compare", folder / "scores", copy / "scores"]
    # Evaluations of other flags may be compared, and items.jsonl alone may have been copied.
    if damage is with_other_flags or (name, damage) == ("args.json", os.unlink):
        evaluation.main([str(word) for word in argv])
        return
    assert_refused(evaluation, argv, capsys, tmp_path, str(copy / "scores"))


FLAGS = {
    "--k": ["0", "-1", "x"],
    "--temperature": ["-1", "nan"],
    "--top-p": ["0", "2"],
    "--pass-at": ["-1", "3"],
    "--held-out": ["-1"],
    "--limit": ["-1", "x"],
    "--batch-prompts": ["0"],
    "--benchmarks": ["nonesuch"],
    "--source": ["x", "humaneval=x"],
    "--domains": ["poetry"],
    "--max-new-tokens": ["0", "100"],
    "--seed": ["-1"],
    "--threads": ["-1"],
    "--date": ["x"],
    "--rated": ["/proc/nowhere/rated.jsonl"],
}
FLAG_CASES = [(flag, value) for flag, values in FLAGS.items() for value in values]


@pytest.mark.parametrize("flag, value", FLAG_CASES)
def test_flags(flag, value, toy, tmp_path, capsys):
    argv = [*command(toy, "toy", tmp_path / "out"), flag, value]
    assert_refused(evaluation, argv, capsys, tmp_path, flag)
