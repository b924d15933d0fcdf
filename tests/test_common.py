"""common/: random streams, models by name, run folders, files that survive a kill, checkpoints."""

import argparse
import os

import pytest
from conftest import tiny_model
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from common.checkpoints import save_folder
from common.errors import UserError
from common.files import write_jsonl
from common.keys import rng
from common.models import load_model
from common.runs import open_run, read_steps
from sources.models import resolve_model
from sources.toy import toy_tokenizer


def test_random_streams_are_functions_of_their_key():
    assert rng(0, 1, "a").random() == rng(0, 1, "a").random()
    keys = [(0, 1, "a"), (0, 1, "b"), (1, 0, "a"), (0, 11), (0, "11"), (0, 1, 1)]
    assert len({rng(*key).random() for key in keys}) == 6


# ---------------- models ----------------


def test_model_names(tmp_path):
    assert resolve_model("Qwen2.5-7B-Instruct") == "Qwen/Qwen2.5-7B-Instruct"
    assert resolve_model("gpt2") == "openai-community/gpt2"
    assert resolve_model("someone/something") == "someone/something"
    assert resolve_model(str(tmp_path)) == str(tmp_path)
    tried = "tried a folder of that name .none. and the families .*qwen"
    for name in ("no-such-family-7B", "./missing"):
        with pytest.raises(UserError, match=tried):
            resolve_model(name)
    for name in ("./missing/folder", "/missing/folder", "runs/nope"):
        with pytest.raises(UserError, match=f"model {name}: no such folder"):
            resolve_model(name)


def test_models_that_checkpoints_know_by_other_names_are_refused(tmp_path):
    config = Qwen3MoeConfig(
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        num_experts=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=300,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="only transformers with dense layers"):
        load_model(str(tmp_path))


def test_an_end_token_outside_the_tokenizers_vocabulary_is_refused(tmp_path):
    model = tiny_model("gpt2", vocab=300)
    model.generation_config.eos_token_id = [0, 299]
    model.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="end token 299 is outside the 285 ids"):
        load_model(str(tmp_path))


# ---------------- run folders ----------------


def run_args(out, **changed):
    flags = {"model": "toy", "lr": 1.0, "steps": 3, "out": str(out), "resume": False}
    return argparse.Namespace(**(flags | changed))


def test_a_server_that_moved_does_not_stop_a_resume_but_one_that_is_gone_does(tmp_path):
    def open_with_server(url, resume=True):
        return open_run(run_args(tmp_path / "run", verifier_url=url, resume=resume), "grpo")

    open_with_server("http://a:1", resume=False)
    open_with_server("http://b:2")
    with pytest.raises(UserError, match="--verifier-url True → False"):
        open_with_server("")


def test_two_runs_with_different_flags_never_share_a_folder(tmp_path):
    out = open_run(run_args(tmp_path / "run"), "grpo")
    assert open_run(run_args(out, model="gpt2"), "grpo") == out  # the first has not begun
    open_run(run_args(out), "grpo")
    (out / "metrics.jsonl").touch()
    for changed, message in [
        ({"model": "gpt2"}, "--model toy → gpt2"),
        ({}, "--resume continues it"),
        ({"lr": 2.0}, "--resume continues it"),
        ({"model": "gpt2", "resume": True}, "choose another --out"),
    ]:
        with pytest.raises(UserError, match=message):
            open_run(run_args(out, **changed), "grpo")
    with pytest.raises(UserError, match="--algorithm grpo → cgpo"):
        open_run(run_args(out, resume=True), "cgpo")
    assert open_run(run_args(out, resume=True, steps=9), "grpo") == out
    (out / "checkpoint-000005").mkdir()
    (out / "checkpoint").symlink_to("checkpoint-000005")
    assert open_run(run_args(out, resume=True, steps=0), "grpo") == out  # one epoch
    with pytest.raises(UserError, match="has done 5 steps already"):
        open_run(run_args(out, resume=True, steps=4), "grpo")
    with pytest.raises(UserError, match="holds no run"):
        open_run(run_args(tmp_path / "new", resume=True), "grpo")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not empty"):
        open_run(run_args(tmp_path / "full"), "grpo")


def test_without_out_the_flags_name_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = open_run(run_args(""), "grpo").name
    second = open_run(run_args(""), "grpo").name
    other_flags = open_run(run_args("", lr=2.0), "grpo").name
    resumed = open_run(run_args("", resume=True), "grpo").name
    assert len({first, second, other_flags, resumed}) == 3
    assert second == f"{first}-2"
    assert resumed == second


# ---------------- files and checkpoints ----------------


def test_a_runs_lines_survive_every_character(tmp_path):
    lines = [
        {"step": 1, "response": "a\u2028b\x85c\u2029\x0c\x1c"},
        {"step": 2, "response": "é\n"},
        {"step": 3},
    ]
    write_jsonl(tmp_path / "samples.jsonl", lines)
    assert read_steps(tmp_path / "samples.jsonl", 2) == lines[:2]


def test_save_folder_is_all_or_nothing(tmp_path):
    link = tmp_path / "checkpoint"
    save_folder(link, "1", lambda folder: (folder / "x").write_text("one"))
    assert (link / "x").read_text() == "one"

    def write_half(folder):
        (folder / "x").write_text("tw")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        save_folder(link, "2", write_half)
    assert (link / "x").read_text() == "one"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "checkpoint-1"]

    save_folder(link, "3", lambda folder: (folder / "x").write_text("three"))
    assert (link / "x").read_text() == "three"
    assert sorted(os.listdir(tmp_path)) == ["checkpoint", "checkpoint-3"]
