"""A real language model, from its package to a trained checkpoint. (The prompts: test_real.py.)"""

import importlib.util
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cgpo
import eval as evaluation
from sources import smollm2
from sources.models import resolve_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        any(importlib.util.find_spec(package) is None for package in smollm2.PACKAGES),
        reason="needs requirements-real.txt",
    ),
]


@pytest.fixture(scope="module")
def raw():
    """(tokenizer, model) of the package, as transformers reads the folder."""
    folder = resolve_model("smollm2-raw")
    return AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)


def test_the_folder_is_an_ordinary_one_that_writes_english(raw):
    tokenizer, model = raw
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    answer = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1] == tokenizer.eos_token_id  # it stops by itself
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32


def test_digits_are_one_token_each(raw):
    tokenizer, _ = raw
    assert tokenizer.tokenize("12 + 345") == ["1", "2", "Ġ+", "Ġ", "3", "4", "5"]


def test_cgpo_trains_it_with_its_own_defaults(tmp_path, capsys):
    """Two steps; the first use also teaches the format (about three minutes on two cores)."""
    out = cgpo.main(
        [
            "--model",
            "smollm2",
            "--steps",
            "2",
            "--eval-prompts",
            "6",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    printed = capsys.readouterr().out
    assert "mix math 0.25, code 0.25, science 0.25, if 0.25" in printed
    start, *steps = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    # After the warm start it can answer, and not everything is right.
    accuracies = [start[f"eval/sampled/{domain}"] for domain in ("math", "code", "science", "if")]
    assert 0.1 < sum(accuracies) / 4 < 0.7
    for step in steps:
        assert 0 < step["mismatch/max"] < 1e-4  # the sampler's log-probs are the trainer's
        assert step["grad_norm"] > 0
    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    before = AutoModelForCausalLM.from_pretrained(resolve_model("smollm2"))
    moved = (model.lm_head.weight - before.lm_head.weight).abs().max()
    assert 0 < moved < 1e-3

    scores = tmp_path / "scores"
    flags = ["--benchmarks", "humaneval", "--limit", "3", "--k", "1", "--max-new-tokens", "64"]
    evaluation.main(["--model", str(out / "checkpoint"), *flags, "--out", str(scores)])
    assert json.loads((scores / "scores.json").read_text())["humaneval"]["prompts"] == 3
