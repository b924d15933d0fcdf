"""Bad inputs of sources.recipes, sources.stats and checkers.validate."""

import pytest

from bad_inputs import ROW_FAULTS, assert_refused, bad_rows, line, outputs
from checkers import validate
from sources import recipes, stats


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_rows_of_stats(name, tmp_path, capsys):
    rows = bad_rows(name, tmp_path)
    assert_refused(stats, ["--data", rows], capsys, tmp_path, str(rows))


@pytest.mark.parametrize("name", ROW_FAULTS)
def test_rows_of_validate(name, tmp_path, capsys):
    rows = bad_rows(name, tmp_path)
    assert_refused(validate, [rows], capsys, tmp_path, str(rows))


STATS_FLAGS = [
    (["--data", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--data", "toy", "--n", "0"], "--n"),
    (["--data", "toy", "--n", "-1"], "--n"),
    (["--data", "toy", "--against", "nonesuch"], "nonesuch"),
    (["--data", "toy", "--domains", "poetry"], "--domains"),
    (["--data", "toy", "--seed", "-1"], "--seed"),
    (["--data", "gym:nonesuch"], "nonesuch"),
]


@pytest.mark.parametrize("argv, message", STATS_FLAGS)
def test_flags_of_stats(argv, message, tmp_path, capsys):
    assert_refused(stats, argv, capsys, tmp_path, message)


# Rows of a source, whose fields are not this project's
SOURCE_FAULTS = {
    name: content for name, content in ROW_FAULTS.items() if b'"prompt"' not in content
}


@pytest.mark.parametrize("name", SOURCE_FAULTS)
def test_sources_of_recipes(name, tmp_path, capsys):
    path = tmp_path / "source.jsonl"
    path.write_bytes(SOURCE_FAULTS[name])
    argv = ["cgpo", "--domains", "math", "--source", f"guru-math={path}", "--any-count"]
    argv += ["--out", tmp_path / "out.jsonl"]
    assert_refused(recipes, argv, capsys, tmp_path)


RECIPE_FLAGS = [
    (["nonesuch"], "nonesuch"),
    (["gym", "--tasks", "nonesuch"], "nonesuch"),
    (["gym", "--domains", "poetry"], "--domains"),
    (["gym", "--domains", "writing"], "no row to write"),
    (["gym", "--size", "0"], "--size"),
    (["gym", "--seed", "-1"], "--seed"),
    (["cgpo", "--source", "guru-math"], "--source"),
    (["cgpo", "--source", "nonesuch=x.jsonl"], "--source"),
    (["cgpo", "--domains", "math", "--source", "guru-math=nowhere.jsonl"], "nowhere.jsonl"),
]


@pytest.mark.parametrize("argv, message", RECIPE_FLAGS)
def test_flags_of_recipes(argv, message, tmp_path, capsys):
    assert_refused(recipes, [*argv, "--out", tmp_path / "x.jsonl"], capsys, tmp_path, message)


@pytest.mark.parametrize("name", ["a file", "below a file", "full", "nowhere"])
def test_outputs_of_recipes(name, tmp_path, capsys):
    argv = ["gym", "--tasks", "chain_sum", "--size", "2", "--out", outputs(tmp_path)[name]]
    assert_refused(recipes, argv, capsys, tmp_path, "--out")


VALIDATE_FLAGS = [
    (["nowhere.jsonl"], "nowhere.jsonl"),
    ([], "file"),
    (["{rows}", "--sandbox-url", "http://127.0.0.1:9"], "http://127.0.0.1:9"),
    (["{rows}", "--workers", "2"], "--workers"),
]


@pytest.mark.parametrize("argv, message", VALIDATE_FLAGS)
def test_flags_of_validate(argv, message, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    tests = {"asserts": "assert f() == 1"}
    rows.write_bytes(line(domain="code", tests=tests, solution="def f(): return 1"))
    argv = [word.format(rows=rows) for word in argv]
    assert_refused(validate, argv, capsys, tmp_path, message)
