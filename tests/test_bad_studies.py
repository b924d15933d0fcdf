"""Bad inputs of studies.analyze, studies.study and studies.bench."""

import json
import os
import shutil

import pytest

import eval as evaluation
import grpo
from bad_inputs import (
    WEIGHT_FAULTS,
    assert_refused,
    bad_model,
    cut,
    empty,
    garbage,
    no_object,
)
from studies import analyze, bench, study


@pytest.fixture(scope="module")
def made(toy, tmp_path_factory):
    """A folder with the folders of a run and of two evaluations."""
    folder = tmp_path_factory.mktemp("made")
    flags = "--data toy --steps 2 --batch-prompts 4 --mini-batch-prompts 4 --group-size 4".split()
    grpo.main([*flags, "--eval-prompts", "1", "--out", str(folder / "run")])
    rows = folder / "rows.jsonl"
    row = {"domain": "math", "answer": "2"}
    rows.write_text("".join(json.dumps({**row, "prompt": f"{i}+1="}) + "\n" for i in range(3)))
    flags = "--k 2 --max-prompt-tokens 16 --max-new-tokens 18 --threads 1 --engine hf".split()
    for name in ("start", "end"):
        argv = [*flags, "--system-prompt", "", "--model", toy, "--data", rows]
        evaluation.main([str(word) for word in [*argv, "--out", folder / name]])
    return folder


@pytest.fixture
def copied(made, tmp_path):
    return shutil.copytree(made, tmp_path / "copy", symlinks=True)


def with_field(name, value):
    """A change of the first line (or the whole) of a file of JSON: a field gets another value."""

    def damage(path):
        if path.suffix == ".json":
            path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
            return
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines[0][name] = value
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))

    damage.__name__ = f"with {name} {value}"
    return damage


def a_folder(path):
    path.unlink()
    path.mkdir()


RUN_FAULTS = [
    ("metrics.jsonl", empty),
    ("metrics.jsonl", garbage),
    ("metrics.jsonl", os.unlink),
    ("metrics.jsonl", a_folder),
    ("metrics.jsonl", with_field("step", "x")),
    ("metrics.jsonl", with_field("seconds/rollout", "x")),
    ("metrics.jsonl", with_field("tokens", None)),
    ("metrics.jsonl", with_field("reward/math", "high")),
    ("metrics.jsonl", with_field("reward/math", 10**400)),
    ("args.json", cut),
    ("args.json", empty),
    ("args.json", garbage),
    ("args.json", no_object),
    ("args.json", os.unlink),
    ("args.json", with_field("ranks", "x")),
    ("args.json", with_field("history", 3)),
]
SCORE_FAULTS = [
    ("items.jsonl", empty),
    ("items.jsonl", garbage),
    ("items.jsonl", os.unlink),
    ("items.jsonl", with_field("accuracy", "high")),
    ("items.jsonl", with_field("accuracy", {})),
    ("items.jsonl", with_field("accuracy", -1)),
    ("items.jsonl", with_field("accuracy", 5)),
    ("items.jsonl", with_field("accuracy", float("nan"))),
    ("items.jsonl", with_field("accuracy", float("inf"))),
    ("items.jsonl", with_field("group", 3)),
    ("items.jsonl", with_field("responses", ["x"])),
    ("items.jsonl", with_field("responses", [{}])),
    ("items.jsonl", with_field("domain", 3)),
    ("items.jsonl", with_field("id", None)),
]


def analysis(command, folder, out) -> list[str]:
    flags = {
        "curves": ["--runs", folder / "run"],
        "gains": ["--start", folder / "start", "--experts", folder / "end"]
        + ["--models", folder / "end"],
        "verify": ["--scores", folder / "end", "--engine", "hf", "--k", "1", "--threads", "1"]
        + ["--max-prompt-tokens", "46", "--max-new-tokens", "18"],
    }[command]
    return [str(word) for word in (command, *flags, "--out", out)]


@pytest.mark.parametrize("name, damage", RUN_FAULTS)
def test_runs(name, damage, copied, tmp_path, capsys):
    damage(copied / "run" / name)
    argv = analysis("curves", copied, tmp_path / "out")
    assert_refused(analyze, argv, capsys, tmp_path, str(copied / "run"))


@pytest.mark.parametrize("command", ["gains", "verify"])
@pytest.mark.parametrize("name, damage", SCORE_FAULTS)
def test_evaluations(command, name, damage, copied, tmp_path, capsys):
    damage(copied / "end" / name)
    argv = analysis(command, copied, tmp_path / "out")
    # without a whole line the folder is that of an evaluation which has just begun
    message = str(copied / "end") if damage in (empty, garbage) else "items.jsonl"
    assert_refused(analyze, argv, capsys, tmp_path, message)


@pytest.mark.parametrize("damage", [cut, empty, garbage, no_object])
def test_a_damaged_verify_json(damage, copied, tmp_path, capsys):
    path = copied / "end" / "verify.json"
    path.write_text(json.dumps({"asked": {}, "found": {}}))
    damage(path)
    argv = analysis("verify", copied, tmp_path / "out")
    assert_refused(analyze, argv, capsys, tmp_path, f"{path} is damaged")


@pytest.mark.parametrize("name", WEIGHT_FAULTS)
def test_models_of_weights(name, toy, tmp_path, capsys):
    model = bad_model(name, toy, tmp_path)
    argv = ["weights", "--base", toy, "--experts", f"a={toy}", f"b={model}"]
    assert_refused(analyze, [*argv, "--out", tmp_path / "out"], capsys, tmp_path, str(model))


ANALYZE_FLAGS = [
    ([], "must be one of"),
    (["nonesuch"], "must be one of"),
    (["curves"], "--out"),
    (["curves", "--out", "{out}"], "--runs"),
    (["curves", "--runs", "nowhere", "--out", "{out}"], "nowhere"),
    (["curves", "--runs", "{run}", "--mixed", "x", "--out", "{out}"], "--mixed"),
    (["curves", "--runs", "a={run}", "a={run}", "--out", "{out}"], "a"),
    (["curves", "--runs", "{run}", "--kinds", "x", "--out", "{out}"], "--kinds"),
    (["curves", "--runs", "{run}", "--out", "/proc/nowhere/out"], "--out"),
    (["weights", "--base", "toy", "--experts", "toy", "--out", "{out}"], "at least two"),
    (["weights", "--base", "x", "--experts", "toy", "toy", "--out", "{out}"], "write NAME=FOLDER"),
    (["weights", "--base", "x", "--experts", "a=toy", "b=toy", "--out", "{out}"], "model x"),
    (["weights", "--base", "toy", "--experts", "a=toy", "b=toy", "--layers", "-1"], "--layers"),
    (["kl", "--experts", "poetry=toy", "--models", "toy", "--out", "{out}"], "poetry"),
    (["kl", "--experts", "math=toy", "--models", "x", "--out", "{out}"], "--domains"),
    (["kl", "--experts", "math=toy", "--models", "x", "--data", "toy", "--out", "{out}"], "x"),
    (["kl", "--experts", "math=toy", "--models", "toy", "--k", "0"], "--k"),
    (["kl", "--experts", "math=toy", "--models", "toy", "--factor", "-1"], "--factor"),
    (["gains", "--start", "nowhere", "--experts", "a=nowhere", "--models", "b=x"], "--out"),
    (["verify", "--scores", "nowhere", "--out", "{out}"], "nowhere"),
    (["verify", "--scores", "nowhere", "--answers", "-1", "--out", "{out}"], "--answers"),
]


@pytest.mark.parametrize("argv, message", ANALYZE_FLAGS)
def test_flags_of_analyze(argv, message, made, tmp_path, capsys):
    argv = [word.format(out=tmp_path / "out", run=made / "run") for word in argv]
    assert_refused(analyze, argv, capsys, tmp_path, message)


STUDY_FLAGS = [
    (["--seeds", "0"], "--seeds"),
    (["--workers", "0"], "--workers"),
    (["--methods", "nonesuch"], "--methods"),
    (["--settings", "nonesuch"], "--settings"),
]


@pytest.mark.parametrize("argv, message", STUDY_FLAGS)
def test_flags_of_study(argv, message, tmp_path, capsys):
    assert_refused(study, argv, capsys, tmp_path, message)


STUDY_FAULTS = {
    "empty": "",
    "no object in the middle": '3\n{"a": 1}\n',
    "a result without fields": '{"a": 1}\n{"a": 2}\n',
    "garbage in the middle": 'x\n{"a": 1}\n',
}


@pytest.mark.parametrize("name", STUDY_FAULTS)
def test_results_of_study(name, tmp_path, capsys, monkeypatch):
    results = tmp_path / "study.jsonl"
    results.write_text(STUDY_FAULTS[name])
    monkeypatch.setattr(study, "RESULTS", results)
    monkeypatch.setattr(study, "FIGURE", tmp_path / "study.png")
    monkeypatch.setattr(study, "PAGE", tmp_path / "results.md")
    assert_refused(study, ["--report"], capsys, tmp_path, str(results))


BENCH_FLAGS = [
    (["nonesuch"], "nonesuch"),
    (["speed", "--model", "nonesuch"], "nonesuch"),
    (["speed", "--repeats", "0"], "--repeats"),
    (["fit", "--ranks", "0"], "--ranks"),
    (["fit", "--device-gb", "-1"], "--device-gb"),
    (["fit", "--micro-batch-tokens", "0"], "--micro-batch-tokens"),
    (["fit", "--engine-memory", "2"], "--engine-memory"),
    (["fit", "--max-new-tokens", "0"], "--max-new-tokens"),
]


@pytest.mark.parametrize("argv, message", BENCH_FLAGS)
def test_flags_of_bench(argv, message, tmp_path, capsys):
    assert_refused(bench, argv, capsys, tmp_path, message)
