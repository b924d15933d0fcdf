"""torchrun: any number of ranks gives one rank's numbers, FSDP2 shards included.

Tests that start real processes are marked slow.
"""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import data
import grpo
from common import checkpoints, engines, ranks
from common.errors import UserError
from conftest import make_policy
from helpers import ALGORITHMS, metrics, run, torchrun
from sources.toy import toy_tokenizer

# five prompts per mini-batch, one of each domain
FLAGS = (
    *("--batch-prompts", 10, "--mini-batch-prompts", 5),
    *("--eval-samples", 1, "--save-every", 1),
)


def assert_same_numbers(a, b, within=1e-5):
    for line, other in zip(metrics(a), metrics(b), strict=True):
        assert line.keys() == other.keys()
        # of one of two ranks
        assert line.pop("extra_gradients_gib", 0) == 2 * other.pop("extra_gradients_gib", 0)
        line.pop("verdicts", None)
        other.pop("verdicts", None)
        assert line == pytest.approx(other, rel=within, abs=within)
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def alone(toy, tmp_path_factory):
    """{algorithm: the folder of a run by one plain process}"""
    folders = {}
    for name in ALGORITHMS:
        folders[name] = tmp_path_factory.mktemp(name) / "alone"
        flags = (*FLAGS, "--steps", 3, "--eval-every", 1, "--out", folders[name])
        done = run(f"{name}.py", *flags)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, count",
    [
        ("grpo", 2),
        ("cgpo", 2),
        ("cgpo", 1),
        ("grpo", 3),
        ("famo", 2),
        ("pcgrad", 2),
        ("mcpo", 3),
    ],
)
def test_ranks_give_one_ranks_numbers(name, count, alone, tmp_path):
    """Five domains of one prompt per mini-batch: not every rank has a row of every domain."""
    out = tmp_path / "run"
    flags = (*FLAGS, "--steps", 3, "--eval-every", 1, "--out", out)
    done = torchrun(count, f"{name}.py", *flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"; {count} rank(s)" in done.stdout
    assert done.stdout.count("step    3/3") == 1
    assert_same_numbers(alone[name], out)
    one = load_file(alone[name] / "checkpoint/model.safetensors")
    many = load_file(out / "checkpoint/model.safetensors")
    assert one.keys() == many.keys()
    for key in one:
        gap = (one[key] - many[key]).abs()
        if key.endswith("c_attn.bias"):
            gap[128:256] = (
                0  # a key's bias: its gradient is rounding alone, and Adam takes its sign
            )
        # One process runs a prompt once for all its responses, torchrun's ranks do not: they round
        # differently, and Adam scales that up where a gradient is next to 0.
        assert gap.max() < 1e-4
        assert gap.mean() < 1e-7


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_resume_on_another_number_of_ranks(first, then, alone, tmp_path):
    out = tmp_path / "run"
    flags = (*FLAGS, "--eval-every", 1, "--out", out)
    done = torchrun(first, "cgpo.py", *flags, "--steps", 2)
    assert done.returncode == 0, done.stderr[-3000:]
    done = torchrun(then, "cgpo.py", *flags, "--steps", 3, "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed after step 2" in done.stdout
    assert_same_numbers(alone["cgpo"], out)


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ("--checkpoint-activations",),
        ("--dtype", "bfloat16", "--mini-batch-prompts", 10),
        ("--beta", 0, "--loss-norm", "token"),
    ],
)
def test_flags_under_two_ranks(flags, toy, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for count, out in ((1, one), (2, two)):
        done = torchrun(count, "grpo.py", *FLAGS, "--steps", 2, *flags, "--out", out)
        assert done.returncode == 0, done.stderr[-3000:]
    if "bfloat16" in flags:  # sums in another order: other samples, soon
        line, other = metrics(one)[1], metrics(two)[1]
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)
        # in the first step's only update the reference is the policy
        assert line["kl"] < 1e-6
        assert other["kl"] < 1e-6
    else:
        assert_same_numbers(one, two)


def test_a_bf16_reference_keeps_its_rotary_frequencies(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    policy = make_policy("qwen2", bf16=True)
    ranks.place(policy, grpo.parse_args([]), frozen=True)
    assert policy.sharded
    assert {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    frequencies = [buffer for name, buffer in policy.named_buffers() if "inv_freq" in name]
    assert {buffer.dtype for buffer in frequencies} == {torch.float32}
    again = make_policy("qwen2")
    ranks.sync_sampler(policy)
    copies = policy.sampler[0].parameters()
    for copy, parameter in zip(copies, again.model.parameters(), strict=True):
        assert torch.equal(copy, parameter.bfloat16())


def test_all_ranks_take_the_engine_that_every_rank_can(monkeypatch):
    """auto: one rank's failure is every rank's; an engine with wrong weights is as good as none."""
    calls = []

    class Fake:
        def __init__(self, *_):
            calls.append("start")

        def sync_weights(self, policy, spoiled=False):
            calls.append(spoiled)
            if not spoiled:
                raise UserError("the canary is off")

    auto, vllm = grpo.parse_args(["--engine", "auto"]), grpo.parse_args(["--engine", "vllm"])
    assert engines.open_engine(Fake, "x", None, [], auto) == (None, "hf (the canary is off)")
    assert calls == ["start", True, False]
    monkeypatch.setattr(ranks, "gather", lambda failure: [failure, "no memory there"])
    calls.clear()
    with pytest.raises(UserError, match="no memory there"):
        engines.open_engine(Fake, "x", None, [], vllm)
    assert calls == ["start"]


@pytest.mark.slow
def test_too_few_prompts_for_the_ranks_is_one_line(toy, tmp_path):
    flags = ("--batch-prompts", 2, "--mini-batch-prompts", 1, "--out", tmp_path / "run")
    done = torchrun(2, "grpo.py", *flags)
    assert done.returncode != 0
    assert "--mini-batch-prompts 1: fewer than the 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists()


# Runs on each rank. Arguments: a JSON object with the module's name, --loss-norm, the micro-batch's
# tokens, the head's chunk, each rank's groups, and the file for rank 0's result.
GRADIENTS = """
import json, sys
from importlib import import_module

import torch
from torch.distributed.tensor import DTensor

from common import cli, ranks
from conftest import make_batch, make_policy
from data import take

case = json.loads(sys.argv[1])
ranks.start()


def main():
    module = import_module(case["name"])
    flags = ["--micro-batch-tokens", str(case["budget"]), "--loss-norm", case["norm"]]
    args = module.parse_args(flags)
    policy = make_policy("qwen2")
    policy.CHUNK = case["chunk"]
    batch = make_batch(policy, prompts=(2, 3))
    ranks.place(policy, args)
    groups = torch.tensor(case["split"][ranks.rank()], dtype=torch.long)
    batch = take(batch, torch.isin(batch["group"], groups))
    head = torch.zeros(0)
    if case["name"] == "mcpo":
        args.lambda_cross = args.lambda_in = 3.0
        state = module.init_state(args, policy)
        state["head_optimizer"] = torch.optim.SGD(state["head"].parameters(), 1.0)
        batch["h_gradient"], _ = module.pool_gradient(policy, batch, (0, 1, 1), state, args)
        head = torch.cat([p.detach().flatten() for p in state["head"].parameters()])
    stats = module.backward(policy, batch, args)
    gradient = torch.cat([ranks.full_tensor(p.grad).flatten() for p in policy.parameters()])
    if ranks.is_first():
        result = {"gradient": torch.cat([gradient, head]), "stats": stats}
        result["sharded"] = isinstance(next(policy.parameters()), DTensor)
        torch.save(result, case["file"])


cli.run_main(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, norm", [("grpo", "sequence"), ("grpo", "token"), ("mcpo", "sequence")]
)
def test_gradients_do_not_depend_on_ranks_or_on_who_has_which_rows(name, norm, tmp_path):
    """To 1e-6 of the norm, for any micro-batch, and with a rank that has no row at all.

    MCPO: its pool is all ranks'.
    """
    everything = [0, 1, 2, 3, 4]
    cases = [  # (ranks, micro-batch's tokens, each rank's groups, the head's chunk in logits)
        (1, 10**6, [everything], 2**26),
        (2, 10**6, [[0, 2, 4], [1, 3]], 160),  # chunks of 4 tokens, recomputed
        (2, 12, [[0], [1, 2, 3, 4]], 2**26),
        (2, 30, [everything, []], 2**26),
    ]
    results = []
    for i, (count, budget, split, chunk) in enumerate(cases):
        case = {"name": name, "norm": norm, "budget": budget, "split": split, "chunk": chunk}
        case["file"] = str(tmp_path / f"{i}.pt")
        done = torchrun(count, "--no-python", sys.executable, "-c", GRADIENTS, json.dumps(case))
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(case["file"]))
    alone = results[0]
    for result in results[1:]:
        assert result["sharded"]
        gap = result["gradient"] - alone["gradient"]
        assert gap.norm() < 1e-6 * alone["gradient"].norm()
        assert result["stats"] == pytest.approx(alone["stats"], rel=1e-5, abs=1e-7)


def test_rows_are_dealt_by_domain_and_every_row_to_one_rank():
    domains = "math code math if code math science if math code".split()
    rows = [{"domain": domain} for domain in domains]
    for count in (1, 2, 3, 4):
        dealt = [data.deal(rows, rank, count, 5) for rank in range(count)]
        assert sorted(sum(dealt, [])) == list(range(10))
        for mini_batch in (range(5), range(5, 10)):
            for domain in ("math", "code", "if"):
                shares = []
                for numbers in dealt:
                    shares.append(
                        sum(rows[p]["domain"] == domain and p in mini_batch for p in numbers)
                    )
                assert max(shares) - min(shares) <= 1
            sizes = [sum(p in mini_batch for p in numbers) for numbers in dealt]
            assert max(sizes) - min(sizes) <= 1
    # more ranks than rows: a row twice, which join_ranks counts once
    assert data.deal(rows[:1], 1, 2, 5) == [0]


def test_ranks_are_joined_in_order_and_a_row_counts_once():
    def part(groups):
        group_B = torch.tensor(groups).repeat_interleave(2)
        samples = [f"{g}{letter}" for g in groups for letter in "ab"]
        return {"group": group_B, "reward": group_B * 1.0}, samples

    columns, samples = data.join_ranks([part([1, 3]), part([0, 2]), part([1])], 2)
    assert columns["group"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert samples == "0a 0b 1a 1b 2a 2b 3a 3b".split()


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_saved_model_is_what_transformers_opens(architecture, shard_bytes, tmp_path):
    policy = make_policy(architecture)
    tensors = ranks.weights(policy, torch.float32, cut_to_vocab=False)
    checkpoints.save_model(tmp_path, policy.model, toy_tokenizer(), tensors, shard_bytes)
    files = sorted(path.name for path in tmp_path.glob("model*"))
    if shard_bytes == 10**9:
        assert files == ["model.safetensors"]
    else:
        assert len(files) > 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    # vLLM finds a model by its architectures
    assert config["architectures"] == [type(policy.model).__name__]
    assert config["dtype"] == "float32"
    for saved, loaded in zip(policy.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(saved, loaded)
    if (
        architecture == "gpt2"
    ):  # transformers takes a foreign tokenizer beside a Qwen config for Qwen's
        tokenizer = AutoTokenizer.from_pretrained(tmp_path)
        assert tokenizer("poem on cat").input_ids == toy_tokenizer()("poem on cat").input_ids
    stop = policy.model.generation_config.eos_token_id
    assert again.generation_config.eos_token_id == stop


def test_a_lone_cpu_process_is_not_sharded_and_cannot_offload():
    policy = make_policy()
    ranks.place(policy, grpo.parse_args([]))
    assert not policy.sharded
    with pytest.raises(UserError, match="no GPU to offload from"):
        ranks.place(policy, grpo.parse_args(["--cpu-offload"]))
