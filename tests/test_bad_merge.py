"""Bad inputs of merge.py."""

import json
import shutil

import pytest

import merge
from bad_inputs import TOKENIZER_FAULTS, WEIGHT_FAULTS, assert_refused, bad_model, outputs


@pytest.mark.parametrize("part", ["base", "expert"])
@pytest.mark.parametrize("name", [*WEIGHT_FAULTS, *TOKENIZER_FAULTS])
def test_models(name, part, toy, tmp_path, capsys):
    bad = bad_model(name, toy, tmp_path)
    base, expert = (bad, toy) if part == "base" else (toy, bad)
    argv = ["--base", base, "--experts", expert, toy, "--method", "ta", "--out", tmp_path / "out"]
    if name == "no tokenizer":  # the other one's is copied
        merge.main([str(word) for word in argv])
        assert (tmp_path / "out" / "tokenizer.json").exists()
        return
    assert_refused(merge, argv, capsys, tmp_path, str(bad))


@pytest.mark.parametrize("name", ["a file", "below a file", "full", "nowhere"])
def test_outputs(name, toy, tmp_path, capsys):
    out = outputs(tmp_path)[name]
    argv = ["--base", toy, "--experts", toy, "--method", "ta", "--out", out]
    assert_refused(merge, argv, capsys, tmp_path, "--out")


def test_out_is_none_of_the_models(toy, tmp_path, capsys):
    expert = shutil.copytree(toy, tmp_path / "expert")
    argv = ["--base", toy, "--experts", expert, "--method", "ta", "--out", expert]
    assert_refused(merge, argv, capsys, tmp_path, "one of the models to merge")


def test_a_folder_that_is_named_like_a_temporary_one_stays(toy, tmp_path):
    (tmp_path / ".out-partial").mkdir()
    (tmp_path / ".out-partial" / "thesis.txt").write_text("thesis")
    argv = ["--base", toy, "--experts", toy, "--method", "ta", "--lambda", "-1e-3"]
    merge.main([str(word) for word in [*argv, "--out", tmp_path / "out"]])
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out-partial", "out"]
    assert (tmp_path / ".out-partial" / "thesis.txt").read_text() == "thesis"


def test_a_config_that_computes_something_else_is_told(toy, tmp_path, capsys):
    expert = shutil.copytree(toy, tmp_path / "expert")
    config = json.loads((expert / "config.json").read_text())
    (expert / "config.json").write_text(json.dumps(config | {"n_head": 1}))
    argv = ["--base", toy, "--experts", expert, "--method", "ta", "--out", tmp_path / "out"]
    merge.main([str(word) for word in argv])
    assert "has another config.json than the base: n_head 1, not 4" in capsys.readouterr().out


FLAGS = [
    ("--method mean", "--method"),
    ("--method ta --lambda inf", "--lambda"),
    ("--method ta --lambda x", "--lambda"),
    ("--method ta --dare 1", "--dare"),
    ("--method ta --dare -0.1", "--dare"),
    ("--method sce --dare 0.5", "--dare"),
    ("--method ties --density 0", "--density"),
    ("--method ties --density 1.1", "--density"),
    ("--method ta --density 0.5", "--density"),
    ("--method ta --weights 1 2", "--weights"),
    ("--method ta --weights nan", "--weights"),
    ("--method average --weights -1", "--weights"),
    ("--method sce --weights 1", "--weights"),
    ("--method average --lambda 2", "--lambda"),
    ("--method ta --seed -1", "--seed"),
    ("--method ta --threads -1", "--threads"),
    ("--method ta --threads 1000000", "--threads"),
    ("--method ta --lambda -1e38", "--lambda -1e38: must lie between"),
    ("--method average --weights 1e308", "--weights 1e308: must lie between"),
    ("--method ta --dtype F64", "--dtype"),
]


@pytest.mark.parametrize("flags, named", FLAGS)
def test_flags(flags, named, toy, tmp_path, capsys):
    argv = ["--base", toy, "--experts", toy, "--out", tmp_path / "out", *flags.split()]
    assert_refused(merge, argv, capsys, tmp_path, named)
