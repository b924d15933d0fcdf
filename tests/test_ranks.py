"""torchrun: any number of ranks gives one rank's numbers, FSDP2 shards included. Real processes, so marked slow."""
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import data
import grpo
import ranks
from conftest import ROOT, make_policy
from test_runs import ALGORITHMS, metrics, run

FLAGS = ("--batch-prompts", 10, "--mini-batch-prompts", 5, "--eval-samples", 1, "--save-every", 1)  # 5 prompts, 5 domains


def torchrun(count: int, *command, **kwargs):
    return subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count), *map(str, command)], cwd=ROOT,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
                          **kwargs)


def assert_same_numbers(a, b, within=1e-5):
    for one, two in zip(metrics(a), metrics(b), strict=True):
        assert one.keys() == two.keys()
        own = ("verdicts", "extra_gradients_gib")                       # the latter: of one of two ranks
        assert one.get("extra_gradients_gib", 0) == 2 * two.get("extra_gradients_gib", 0)
        assert {k: v for k, v in one.items() if k not in own} == pytest.approx(
            {k: v for k, v in two.items() if k not in own}, rel=within, abs=within)
    assert (a / "samples.jsonl").read_text() == (b / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def alone(toy, tmp_path_factory):
    """{algorithm: the folder of a run by one plain process}"""
    folders = {name: tmp_path_factory.mktemp(name) / "alone" for name in ALGORITHMS}
    for name, out in folders.items():
        done = run(f"{name}.py", *FLAGS, "--steps", 3, "--eval-every", 1, "--out", out)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("name, count", [("grpo", 2), ("cgpo", 2), ("cgpo", 1), ("grpo", 3), ("famo", 2), ("pcgrad", 2), ("mcpo", 3)])
def test_ranks_give_one_ranks_numbers(name, count, alone, tmp_path):
    """Five domains of one prompt a mini-batch: with two or three ranks some rank has no row of every domain."""
    out = tmp_path / "run"
    done = torchrun(count, f"{name}.py", *FLAGS, "--steps", 3, "--eval-every", 1, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"; {count} rank(s)" in done.stdout and done.stdout.count("step    3/3") == 1
    assert_same_numbers(alone[name], out)
    one, many = (load_file(folder / "checkpoint/model.safetensors") for folder in (alone[name], out))
    off = {k: (one[k] - many[k]).abs() for k in one}
    for k in off:
        if k.endswith("c_attn.bias"):                                   # a key's bias has no gradient but rounding: Adam
            off[k][128:256] = 0                                         # takes its sign
    assert one.keys() == many.keys() and max(x.max() for x in off.values()) < 5e-5


@pytest.mark.slow
@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_resume_on_another_number_of_ranks(first, then, alone, tmp_path):
    out = tmp_path / "run"
    done = torchrun(first, "cgpo.py", *FLAGS, "--steps", 2, "--eval-every", 1, "--out", out)
    assert done.returncode == 0, done.stderr[-3000:]
    done = torchrun(then, "cgpo.py", *FLAGS, "--steps", 3, "--eval-every", 1, "--out", out, "--resume")
    assert done.returncode == 0 and "resumed after step 2" in done.stdout, done.stderr[-3000:]
    assert_same_numbers(alone["cgpo"], out)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [("--checkpoint-activations",), ("--dtype", "bfloat16"), ("--beta", 0, "--loss-norm", "token")])
def test_flags_under_two_ranks(flags, toy, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = (*FLAGS, "--steps", 2, *flags)
    for count, out in ((1, one), (2, two)):
        done = torchrun(count, "grpo.py", *flags, "--out", out)
        assert done.returncode == 0, done.stderr[-3000:]
    if "bfloat16" in flags:                                             # sums in another order: other samples, soon
        first, other = (metrics(folder)[1] for folder in (one, two))
        assert first["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)
        assert first["kl"] < 1e-6 and other["kl"] < 1e-6                # at the first step the reference is the policy
    else:
        assert_same_numbers(one, two)


def test_a_bf16_reference_keeps_its_rotary_frequencies(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    policy = make_policy("qwen2", bf16=True)
    ranks.place(policy, grpo.parse_args([]), frozen=True)
    assert policy.sharded and {p.dtype for p in policy.parameters()} == {torch.bfloat16}
    assert {b.dtype for name, b in policy.named_buffers() if "inv_freq" in name} == {torch.float32}
    again = make_policy("qwen2")
    ranks.sync_sampler(policy)
    assert all(torch.equal(a, b.bfloat16()) for a, b in zip(policy.sampler[0].parameters(), again.model.parameters()))


def test_all_ranks_take_the_engine_that_every_rank_can(monkeypatch):
    """auto: a failure on any rank is every rank's; an engine that does not hold the weights is as good as none."""
    calls = []

    class Fake:
        def __init__(self, *_):
            calls.append("start")

        def sync_weights(self, policy, spoiled=False):
            calls.append(spoiled)
            if not spoiled:
                raise data.UserError("the canary is off")
    monkeypatch.setattr(grpo, "Engine", Fake)
    assert grpo.open_engine("x", None, [], grpo.parse_args(["--engine", "auto"])) == (None, "hf (the canary is off)")
    assert calls == ["start", True, False]
    monkeypatch.setattr(ranks, "gather", lambda why: [why, "no memory there"])
    calls.clear()
    with pytest.raises(data.UserError, match="no memory there"):
        grpo.open_engine("x", None, [], grpo.parse_args(["--engine", "vllm"]))
    assert calls == ["start"]


@pytest.mark.slow
def test_too_few_prompts_for_the_ranks_is_one_line(toy, tmp_path):
    done = torchrun(2, "grpo.py", "--batch-prompts", 2, "--mini-batch-prompts", 1, "--out", tmp_path / "run")
    assert done.returncode != 0 and "--mini-batch-prompts 1: fewer than the 2 ranks" in done.stderr
    assert not (tmp_path / "run").exists()


GRADIENTS = """
import json, sys, torch
import data, grpo, ranks
from conftest import make_batch, make_policy
from torch.distributed.tensor import DTensor
from importlib import import_module
ranks.start()
def work():
    module = import_module(sys.argv[6])
    args = module.parse_args(["--micro-batch-tokens", sys.argv[3], "--loss-norm", sys.argv[1]])
    policy = make_policy("qwen2")
    policy.CHUNK = int(sys.argv[5])
    batch = make_batch(policy, prompts=(2, 3))
    ranks.place(policy, args)
    mine = torch.isin(batch["group"], torch.tensor(json.loads(sys.argv[4])[ranks.mine()], dtype=torch.long))
    batch = grpo.take(batch, mine)
    head = torch.zeros(0)
    if module.ALGORITHM == "mcpo":
        args.lambda_cross = args.lambda_in = 3.0
        state = module.init_state(args, policy)
        state["head_optimizer"] = torch.optim.SGD(state["head"].parameters(), 1.0)
        batch["h_gradient"], _ = module.pool_gradient(policy, batch, (0, 1, 1), state, args)
        head = torch.cat([p.detach().flatten() for p in state["head"].parameters()])
    stats = module.backward(policy, batch, args)
    found = torch.cat([ranks.whole(p.grad).flatten() for p in policy.parameters()])
    if ranks.mine() == 0:
        torch.save({"gradient": torch.cat([found, head]), "stats": stats, "sharded": isinstance(next(policy.parameters()), DTensor)}, sys.argv[2])
data.run_main(work)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name, norm", [("grpo", "sequence"), ("grpo", "token"), ("mcpo", "sequence")])
def test_gradients_do_not_depend_on_ranks_or_on_who_has_which_rows(name, norm, tmp_path):
    """1e-6 of its norm, with micro-batches of any size, and with a rank that has no row at all. MCPO: its pool is all ranks'."""
    results = []
    for i, (count, budget, split, chunk) in enumerate([
            (1, 10**6, [[0, 1, 2, 3, 4]], 2**26), (2, 10**6, [[0, 2, 4], [1, 3]], 160),  # chunks of 4 tokens, recomputed
            (2, 12, [[0], [1, 2, 3, 4]], 2**26), (2, 30, [[0, 1, 2, 3, 4], []], 2**26)]):
        file = tmp_path / f"{i}.pt"
        done = torchrun(count, "--no-python", sys.executable, "-c", GRADIENTS, norm, file, budget, json.dumps(split), chunk, name)
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(torch.load(file))
    for other in results[1:]:
        assert other["sharded"]
        assert (other["gradient"] - results[0]["gradient"]).norm() < 1e-6 * results[0]["gradient"].norm()
        assert other["stats"] == pytest.approx(results[0]["stats"], rel=1e-5, abs=1e-7)


def test_rows_are_dealt_by_domain_and_every_row_to_one_rank():
    rows = [{"domain": d} for d in "math code math if code math science if math code".split()]
    for count in (1, 2, 3, 4):
        dealt = [data.deal(rows, rank, count, 5) for rank in range(count)]
        assert sorted(sum(dealt, [])) == list(range(10))
        for stretch in (range(5), range(5, 10)):
            for domain in ("math", "code", "if"):
                shares = [sum(rows[p]["domain"] == domain and p in stretch for p in mine) for mine in dealt]
                assert max(shares) - min(shares) <= 1
            sizes = [sum(p in stretch for p in mine) for mine in dealt]
            assert max(sizes) - min(sizes) <= 1
    assert data.deal(rows[:1], 1, 2, 5) == [0]                          # more ranks than rows: a row twice, counted once


def test_merge_is_in_order_and_counts_a_row_once():
    def part(groups):
        return {"group": torch.tensor(groups).repeat_interleave(2), "reward": torch.tensor(groups).repeat_interleave(2) * 1.0}, [
            f"{g}{i}" for g in groups for i in "ab"]
    columns, samples = data.merge([part([1, 3]), part([0, 2]), part([1])], 2)
    assert columns["group"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3] and samples == "0a 0b 1a 1b 2a 2b 3a 3b".split()


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_saved_model_is_what_transformers_opens(architecture, shard_bytes, tmp_path):
    from transformers import AutoTokenizer

    import sft
    policy = make_policy(architecture)
    data.save_model(tmp_path, policy.model, sft.toy_tokenizer(), ranks.weights(policy, torch.float32, cut=False), shard_bytes)
    files = sorted(p.name for p in tmp_path.glob("model*"))
    assert files == ["model.safetensors"] if shard_bytes == 10**9 else len(files) > 3
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())         # vLLM finds a model by its architectures
    assert config["architectures"] == [type(policy.model).__name__] and config["dtype"] == "float32"
    assert all(torch.equal(a, b) for a, b in zip(policy.model.parameters(), again.parameters(), strict=True))
    if architecture == "gpt2":  # transformers reads a foreign tokenizer beside a Qwen config as Qwen's
        assert AutoTokenizer.from_pretrained(tmp_path)("poem on cat").input_ids == sft.toy_tokenizer()("poem on cat").input_ids
    assert again.generation_config.eos_token_id == policy.model.generation_config.eos_token_id


def test_a_lone_cpu_process_is_not_sharded_and_cannot_offload():
    policy = make_policy()
    ranks.place(policy, grpo.parse_args([]))
    assert not policy.sharded
    with pytest.raises(data.UserError, match="no GPU to offload from"):
        ranks.place(policy, grpo.parse_args(["--cpu-offload"]))
