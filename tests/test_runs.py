"""Whole runs: they learn, and leave what they should."""

import ast
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import cgpo
import data
import famo
import grpo
import pcgrad
import rewards
import sft
from common import reports, sampler
from common.errors import UserError
from common.files import write_jsonl
from common.formats import in_form
from conftest import tiny_model
from helpers import ALGORITHMS, mean_accuracy, metrics, read_samples, strings
from sources.toy import toy_rows, toy_tokenizer

SOME_SLOW = [
    *("grpo", "cgpo"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("famo", "pcgrad", "mcpo")),
]
TOY_DOMAINS = ("math", "code", "science", "writing", "if")


# ---------------- learning ----------------


def assert_metrics_are_complete(line: dict) -> None:
    for kind in ("reward", "accuracy", "invalid", "truncated", "zero_variance"):
        assert {f"{kind}/{d}" for d in TOY_DOMAINS} <= line.keys()
    for kind in ("verifier_errors", "prompts"):
        assert {f"{kind}/{d}" for d in TOY_DOMAINS} <= line.keys()
    assert {"loss", "kl", "entropy", "clip_fraction", "grad_norm", "tokens_per_s"} <= line.keys()
    assert 0 < line["mismatch/max"] < 1e-4
    assert {"seconds/rollout", "seconds/reward", "seconds/update"} <= line.keys()
    assert line["mismatch/max"] < 1e-4
    assert [line[f"prompts/{d}"] for d in TOY_DOMAINS] == [4] * 5


@pytest.mark.parametrize("name", SOME_SLOW)
def test_accuracy_rises_on_held_out_toy_prompts(name, toy, tmp_path, capsys):
    out = ALGORITHMS[name].main(["--steps", "25", "--out", str(tmp_path / "run")])
    lines = metrics(out, timings=True)
    assert [line["step"] for line in lines] == list(range(26))
    assert mean_accuracy(lines[-1]) > mean_accuracy(lines[0]) + 0.25
    for line in lines[1:]:
        assert_metrics_are_complete(line)

    printed = capsys.readouterr().out
    assert "20 prompts × 8 samples = 160 responses" in printed
    assert "step   25/25" in printed
    assert "→" in printed
    assert (out / "curves.png").stat().st_size > 10_000
    assert {"step", "prompt", "response", "reward", "verdict"} <= read_samples(out)[0].keys()
    assert json.loads((out / "args.json").read_text())["algorithm"] == name

    model = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    start = AutoModelForCausalLM.from_pretrained(toy)
    for after, before in zip(model.parameters(), start.parameters(), strict=True):
        assert (after != before).any()
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (out / "checkpoint", toy)]
    ids = [tokenizer("poem on cat").input_ids for tokenizer in tokenizers]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("name", SOME_SLOW)
def test_nothing_is_learned_from_advantages_shuffled_across_rows(name, toy, tmp_path, monkeypatch):
    module, draw = ALGORITHMS[name], torch.Generator().manual_seed(0)
    honest = module.advantages

    def shuffled(batch, state, args):
        advantage_B = honest(batch, state, args).sum(1) / batch["mask"].sum(1)
        order_B = torch.randperm(len(advantage_B), generator=draw)
        return advantage_B[order_B][:, None] * batch["mask"]

    monkeypatch.setattr(module, "advantages", shuffled)
    lines = metrics(module.main(["--steps", "25", "--out", str(tmp_path / "run")]))
    # It drifts; honest runs gain 0.4 and more.
    assert mean_accuracy(lines[-1]) < mean_accuracy(lines[0]) + 0.15


@pytest.mark.parametrize("module, extra", [(cgpo, ["--alpha", "1"]), (famo, []), (pcgrad, [])])
def test_one_domain_gives_grpos_run(module, extra, toy, tmp_path):
    flags = ["--domains", "math", "--steps", "3", "--lr", "3e-4"]
    flags += ["--batch-prompts", "8", "--mini-batch-prompts", "4"]
    a = metrics(grpo.main([*flags, "--out", str(tmp_path / "a")]))
    b = metrics(module.main([*flags, "--out", str(tmp_path / "b"), *extra]))
    assert len(a) == 4
    for ours, theirs in zip(a, b, strict=True):
        own = [name for name in theirs if name.startswith(("domain_weight/", "extra_gradients"))]
        for name in own:
            del theirs[name]
        assert ours == theirs


def test_several_mini_batches_take_the_ratio_off_one(toy, tmp_path):
    flags = ["--steps", "2", "--mini-batch-prompts", "5", "--lr", "3e-3", "--warmup-steps", "2"]
    lines = metrics(grpo.main([*flags, "--out", str(tmp_path / "run")]))
    assert lines[2]["clip_fraction"] > 0
    assert lines[1]["kl"] >= 0


@pytest.mark.parametrize(
    "flags",
    [
        ["--beta", "0"],
        ["--reward-scheme", "m2rl"],
        ["--loss-norm", "token"],
        ["--dtype", "bfloat16"],
        ["--rollout-tokens", "600"],
        ["--eval-every", "1", "--eval-domains", "math"],
    ],
)
def test_flags(flags, toy, tmp_path):
    out = grpo.main(["--steps", "2", "--out", str(tmp_path / "run"), *flags])
    lines = metrics(out)
    assert len(lines) == 3
    assert ("kl" in lines[1]) == ("--beta" not in flags)
    if "m2rl" in flags:
        rewards = [value for name, value in lines[1].items() if name.startswith("reward/")]
        assert all(0 <= reward <= 1 for reward in rewards)
    if "--eval-every" in flags:
        evaluated = [name for name in lines[1] if name.startswith("eval/sampled")]
        assert evaluated == ["eval/sampled/math"]
    moved = AutoModelForCausalLM.from_pretrained(out / "checkpoint").state_dict()
    start = AutoModelForCausalLM.from_pretrained(toy).state_dict()
    assert any((moved[name] != start[name]).any() for name in start)


# ---------------- other models and data ----------------


def test_real_rows_and_architectures_with_a_chat_template(architecture, tiny_folder, tmp_path):
    rows = []
    for a in range(1, 5):
        for b in range(1, 5):
            rows.append({"domain": "math", "prompt": f"{a}+{b}=?", "answer": str(a + b)})
    for i in range(8):
        messages = [{"role": "user", "content": f"hue of dedu {i}?"}]
        rows.append({"domain": "science", "prompt": messages, "answer": "red"})
    write_jsonl(tmp_path / "rows.jsonl", rows)
    out = cgpo.main(
        strings(
            *("--model", tiny_folder(architecture), "--data", tmp_path / "rows.jsonl"),
            *("--out", tmp_path / "run", "--batch-prompts", 6, "--mini-batch-prompts", 3),
            *("--group-size", 2, "--max-new-tokens", 8, "--max-prompt-tokens", 100),
            *("--system-prompt", "i think", "--eval-prompts", 1, "--lr", "1e-3"),
        )
    )
    assert len(metrics(out)) == 1 + (len(rows) - 2) // 6  # one epoch of what is not held out
    saved = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    assert saved.config.model_type == architecture
    # the system prompt came in by the template
    assert all("think" in sample["prompt"] for sample in read_samples(out))


@pytest.mark.parametrize("source", ["humaneval", "gym:chain_sum,syllogism"])
def test_third_party_prompts(source, tiny_folder, tmp_path):
    folder = tiny_folder("gpt2")
    longer = tiny_model("gpt2", vocab=len(toy_tokenizer()), positions=2048)
    longer.save_pretrained(folder)
    out = grpo.main(
        strings(
            *("--model", folder, "--data", source, "--out", tmp_path / "run", "--steps", 1),
            *("--batch-prompts", 4, "--mini-batch-prompts", 4, "--group-size", 2),
            *("--max-new-tokens", 8, "--eval-prompts", 2, "--eval-samples", 1),
            *("--max-prompt-tokens", 2000),
        )
    )
    domains = {name for name in metrics(out)[1] if name.startswith("accuracy/")}
    if source == "humaneval":
        assert domains == {"accuracy/code"}
    else:
        assert domains == {"accuracy/math", "accuracy/science"}


# ---------------- verifiers that fail ----------------


def test_a_failed_verifier_leaves_the_update(toy, tmp_path, monkeypatch):
    honest = grpo.rewards.score

    def failing(texts, rows, *options):
        scores = []
        for i, (row, score) in enumerate(zip(rows, honest(texts, rows, *options))):
            # half of all responses; of "if" seven of eight
            if i % 2 or row["domain"] == "if" and i % 8:
                score = score._replace(reward=None, correct=None, why="verifier-error: x")
            scores.append(score)
        return scores

    batches, update = [], grpo.update

    def seen(policy, optimizer, batch, *rest):
        batches.append(batch)
        return update(policy, optimizer, batch, *rest)

    monkeypatch.setattr(grpo.rewards, "score", failing)
    monkeypatch.setattr(grpo, "update", seen)
    line = metrics(grpo.main(["--steps", "1", "--out", str(tmp_path / "run")]))[1]
    assert line["verifier_errors/if"] == 28
    assert line["verifier_errors/math"] == 16
    assert np.isfinite(line["loss"])
    assert len(batches[0]["reward"]) == 68
    assert not batches[0]["reward"].isnan().any()

    def down(texts, rows, *options):
        scores = []
        for row, score in zip(rows, honest(texts, rows, *options)):
            if row["domain"] == "if" and score.valid:
                score = score._replace(reward=None, correct=None)
            scores.append(score)
        return scores

    monkeypatch.setattr(grpo.rewards, "score", down)
    flags = ["--steps", "1", "--eval-samples", "0", "--eval-prompts", "0"]
    message = "the verifier of if failed on all [0-9]+ responses of this step"
    with pytest.raises(UserError, match=message):
        grpo.main([*flags, "--out", str(tmp_path / "down")])
    assert len(batches) == 1  # nothing was trained on the rest


# ---------------- sft ----------------


def sft_flags(folder, tmp_path, *more) -> list[str]:
    return strings(
        *("--model", folder, "--data", tmp_path / "rows.jsonl", "--out", tmp_path / "run"),
        *("--system-prompt", "", *more),
    )


def test_sft_trains_on_responses_and_their_end(tiny_folder, tmp_path):
    row = {"domain": "math", "prompt": "1+1=?", "answer": "2"}
    row["response"] = "<think></think><answer>2</answer>"
    write_jsonl(tmp_path / "rows.jsonl", [row] * 4)
    more = ("--steps", 40, "--batch-rows", 4, "--lr", "1e-2", "--warmup-steps", 2)
    flags = sft_flags(tiny_folder("gpt2", chat=False), tmp_path, *more)
    saved = sft.main(flags)
    with pytest.raises(UserError, match="already holds this run: another --out"):
        sft.main(flags)
    tokenizer, policy = grpo.load_policy(saved, "float32")
    ids = tokenizer("1+1=?").input_ids
    ((tokens, _, _),) = sampler.generate(policy, [ids], torch.zeros(1, 12), 0.0)
    assert tokenizer.decode(tokens) == "<think></think><answer>2</answer><eos>"


def test_sft_cuts_at_the_models_context_and_begins_anew_when_it_was_ended(
    tiny_folder, tmp_path, monkeypatch, capsys
):
    row = {"domain": "math", "prompt": "1+1=?", "answer": "2", "response": "2 " * 300}
    write_jsonl(tmp_path / "rows.jsonl", [row] * 4)
    folder = tiny_folder("gpt2", chat=False)  # of 128 positions
    flags = sft_flags(folder, tmp_path, "--steps", 1)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(sft, "train", interrupted)
        sft.main(flags)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock", "args.json"}
    other = ["--max-tokens", "3", "--out", str(tmp_path / "other")]  # no room for a response
    with pytest.raises(UserError, match="every prompt is longer"):
        sft.main([*flags, *other])
    assert not (tmp_path / "other").exists()
    assert Path(sft.main(flags)).exists()
    assert "loss nan" not in capsys.readouterr().out
    with pytest.raises(SystemExit):
        sft.parse_args(["--model", "toy", "--data", "x"])
    assert "only builds the toy" in capsys.readouterr().err


# ---------------- no dead code ----------------


def test_every_function_does_work_in_a_plain_run(toy, tmp_path):
    """A run, its resumption and one with β = 0 in bf16 enter all of grpo.py: no dead hooks."""
    entered = set()

    def profile(frame, event, _):
        if event == "call" and frame.f_code.co_filename == grpo.__file__:
            entered.add(frame.f_code.co_qualname)

    flags = ["--eval-samples", "1", "--out"]
    sys.setprofile(profile)
    try:
        grpo.main(["--steps", "1", *flags, str(tmp_path / "run")])
        grpo.main(["--steps", "2", *flags, str(tmp_path / "run"), "--resume"])
        other = [str(tmp_path / "other"), "--beta", "0", "--dtype", "bfloat16"]
        grpo.main(["--steps", "1", *flags, *other])
    finally:
        sys.setprofile(None)

    defined = set()
    for node in ast.parse(Path(grpo.__file__).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            defined.add(node.name)
        if isinstance(node, ast.ClassDef) and node.name == "Policy":
            methods = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            defined |= {f"Policy.{method.name}" for method in methods}
    assert defined - entered == set()


# ---------------- what goes wrong in a run ----------------


def step_line(step, **changes) -> dict:
    """A step's metrics: 8 prompts of math, 4 of code."""
    line = {"step": step}
    values = {"prompts": (8, 4), "accuracy": (0.5, 0.5), "reward": (0.0, 0.0), "length": (30, 60)}
    values |= {"truncated": (0.0, 0.0), "invalid": (0.0, 0.0), "zero_variance": (0.5, 0.5)}
    for name, pair in (values | changes).items():
        line[f"{name}/math"], line[f"{name}/code"] = pair
    return line


FAULTS = [
    ({"zero_variance": (0.5, 1.0), "invalid": (0, 1)}, "equal code", "warm the model up"),
    ({"zero_variance": (0.5, 1.0), "truncated": (0, 1)}, "equal code", "raise --max-new-tokens"),
    ({"zero_variance": (1.0, 0.5), "accuracy": (1, 0.5)}, "equal math", "too easy"),
    ({"zero_variance": (1.0, 0.5), "accuracy": (0, 0.5)}, "equal math", "too hard"),
    ({"truncated": (0.8, 0.1)}, "truncated", "57% of the responses were cut"),
    ({"length": (200, 60)}, "length grew", "from 40 to 153 tokens"),
    ({"length": (3, 15)}, "length shrank", "from 40 to 7 tokens"),
]


@pytest.mark.parametrize("changes, name, words", FAULTS)
def test_what_goes_wrong_is_told_once(changes, name, words, capsys):
    lines = [{"step": 0, "eval/greedy/math": 0.1}, step_line(1)]
    assert reports.warnings(lines) == {}
    lines += [step_line(2 + i, **changes) for i in range(reports.EQUAL_STEPS)]
    assert words in reports.warnings(lines)[name]
    for stop in range(2, len(lines) + 1):
        reports.print_warnings(lines[:stop])
    printed = capsys.readouterr().out.splitlines()
    assert [line for line in printed if words in line] == printed
    assert len(printed) == 1


def test_the_live_line_tells_of_lengths_and_of_shares_that_are_not_small():
    calm = step_line(1) | {"tokens_per_s": 100.0}
    text = reports.live_line(calm, 10, 1.0, 1)
    assert "40 tokens  100 tok/s" in text
    cut = step_line(1, truncated=(0.5, 0.0), invalid=(0.5, 0.5)) | {"tokens_per_s": 100.0}
    assert "40 tokens  truncated 33%  invalid 50%  100" in reports.live_line(cut, 10, 1.0, 1)


def test_a_slow_loop_says_how_far_it_is(monkeypatch, capsys):
    clock = iter(range(0, 1000, 15))  # 15 seconds per look
    monkeypatch.setattr(reports.time, "perf_counter", lambda: next(clock))
    assert list(reports.shown("update", ["a", "b", "c", "d"])) == ["a", "b", "c", "d"]
    assert capsys.readouterr().out.splitlines() == [
        "  update 1 of 4, at most 90 s left",
        "  update 3 of 4, at most 20 s left",
    ]


# ---------------- the format warm-up ----------------


def test_the_format_warm_up_teaches_the_format_by_prompts_that_no_run_holds_out(toy, capsys):
    flags = ["--model", str(toy), "--format-warmup", "--data", "toy", "--system-prompt", ""]
    args = sft.parse_args(
        [*flags, "--steps", "4", "--batch-rows", "5", "--domains", "math", "code"]
    )
    tokenizer, policy = grpo.load_policy(str(toy), "float32")
    rows = sft.format_rows(args, tokenizer, policy)
    assert Counter(row["domain"] for row in rows) == {"math": 10, "code": 10}
    held_out = {row["prompt"] for row in data.hold_out(toy_rows(), 10**9)[1]}
    assert not held_out & {row["prompt"] for row in rows}
    for row in rows:
        answer, fault = rewards.extract_answer(row["response"])
        assert not fault
        if row["domain"] == "math":
            assert answer == row["answer"]
    assert "10 answers are the model's own" in capsys.readouterr().out
    assert args.lr == sft.WARM_UP["lr"]


def test_a_reference_program_is_put_into_a_block_of_code():
    row = {"domain": "code", "solution": "def f(x):\n    return x\n", "tests": {"asserts": ""}}
    response = in_form(row, "so", sft.reference_answer(row), "released")
    assert response == "<think>so</think>\n```python\ndef f(x):\n    return x\n```"
    assert sft.reference_answer({"domain": "if"}) == ""
