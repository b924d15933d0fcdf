"""Speed of one shape: sampling, log-probs, each method's update against GRPO's, memory at the peak.

`python -m studies.bench speed` runs it. The toy is the trained one with its own prompts; other
shapes have random weights and random rows.

Suffixes: P prompts, G group size, B sequences (P·G), T tokens.
"""

import gc
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import cgpo
import data
import famo
import grpo
import mcpo
import pcgrad
from common import ranks
from common.checkpoints import save_model
from common.errors import UserError
from common.memory import count_parameters
from common.reports import peak_memory
from common.sampler import generate
from sources.models import resolve_model
from sources.toy import toy_rows, toy_tokenizer
from studies.shapes import config_of

ROOT = Path(__file__).resolve().parent.parent

# method: (its file, index of the mini-batch in its step). MCPO takes the first mini-batch's hidden
# states from π_old's forward pass, if there was one, and else computes them again.
METHODS = {
    "grpo": (grpo, 0),
    "cgpo": (cgpo, 0),
    "famo": (famo, 0),
    "pcgrad": (pcgrad, 0),
    "mcpo, h reused": (mcpo, 0),
    "mcpo, h anew": (mcpo, 1),
}


# ---------------- clocks ----------------


def median_seconds(device: torch.device, work, repeats: int = 3) -> float:
    """Median seconds of `repeats` runs of work(), after one run that does not count."""
    seconds = []
    for _ in range(repeats + 1):
        wait_for(device)
        started = time.perf_counter()
        work()
        wait_for(device)
        seconds.append(time.perf_counter() - started)
    return sorted(seconds[1:])[repeats // 2]


def wait_for(device: torch.device) -> None:
    """Wait until the device has finished; a CPU has already."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def device_name(device: torch.device) -> str:
    """The GPU's name, or the number of CPU threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one matrix product in this dtype."""
    # large enough for the full rate, small enough for a fraction of a second
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=dtype)
    b = torch.randn(size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_seconds(device, lambda: a @ b, 5)


# ---------------- what is measured ----------------


def training_args(args, *more: str, module=grpo):
    """An algorithm file's arguments: the toy's defaults, with this command's flags and `more`."""
    flags = ["--zero-advantage", "keep", "--is-correction", "none"]
    flags += ["--optim", args.optim, "--beta", str(args.beta), "--dtype", args.dtype]
    flags += ["--micro-batch-tokens", str(args.micro_batch_tokens)]
    if args.checkpoint_activations:
        flags.append("--checkpoint-activations")
    if args.cpu_offload:
        flags.append("--cpu-offload")
    return module.parse_args([*flags, *more])


def random_policy(name: str, dtype: str, train_args) -> grpo.Policy:
    """A policy of this shape with random weights. No token ends its responses."""
    device = ranks.device()
    config = config_of(name)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        policy = grpo.Policy(model.eval(), config.vocab_size, [-1])
    policy.bf16 = dtype == "bfloat16" or dtype == "auto" and device.type == "cuda"
    return ranks.place(policy, train_args)


def random_batch(
    policy, prompts: int, group: int, prompt_tokens: int, row_tokens: int
) -> grpo.Batch:
    """A batch of random rows [B, row_tokens] over five domains. The rewards of a group differ, so
    every row has an advantage."""
    generator = torch.Generator().manual_seed(0)
    B = prompts * group
    reward_PG = [torch.randperm(group, generator=generator) for _ in range(prompts)]
    reward_B = torch.stack(reward_PG).double().flatten()
    prompt_P = torch.arange(prompts)
    is_response_T = torch.arange(row_tokens) >= prompt_tokens
    return {
        "ids": torch.randint(1, policy.vocab, (B, row_tokens), generator=generator),
        "mask": is_response_T.expand(B, -1).clone(),
        "length": torch.full((B,), row_tokens),
        "group": prompt_P.repeat_interleave(group),
        "domain": (prompt_P % 5).repeat_interleave(group),
        "reward": reward_B,
        "correct": reward_B >= group / 2,
        "sampler_logp": torch.zeros(B, row_tokens),
    }


def batch_size(name: str, device: torch.device) -> tuple[int, int, int, int]:
    """(prompts, responses per prompt, tokens per prompt, tokens per response) of random rows.

    "peer" has the lengths of bench_peer.py. On a CPU the rows are short, so that a repeat takes
    seconds.
    """
    if name == "peer":
        return 10, 8, 8, 48
    if device.type == "cuda":
        return 10, 2, 512, 1536
    return 10, 2, 64, 64


def toy_rollout(args, train_args) -> tuple:
    """What random_rollout() returns, but of the trained toy and its own prompts."""
    tokenizer, policy = grpo.load_policy(resolve_model("toy"), args.dtype)
    ranks.place(policy, train_args)
    rows = data.encode_prompts(toy_rows(), tokenizer, "", train_args.max_prompt_tokens)
    mix = data.domain_mix(rows, "equal")
    rows = next(data.batches(rows, train_args.batch_prompts, mix, 0))
    rollout = partial(
        grpo.rollout, policy, tokenizer, rows, train_args.group_size, (0, 1), 1.0, train_args
    )
    rollout()  # the first one warms up
    batch, _, _, seconds = rollout()
    tokens_per_s = int(batch["mask"].sum()) / seconds["rollout"]
    return policy, batch, seconds["rollout"] + seconds["reward"], tokens_per_s


def random_rollout(name: str, args, train_args) -> tuple:
    """(policy, batch, seconds of a rollout, sampled tokens per second) of random weights and rows.

    At most 64 tokens per response are sampled, and the seconds of a rollout are extrapolated.
    """
    policy = random_policy(name, args.dtype, train_args)
    prompts, group, prompt_tokens, new_tokens = batch_size(name, policy.device)
    if policy.sharded:
        ranks.sync_sampler(policy)
    ids_P = []
    for p in range(prompts):
        ids_P.append([1 + (p * 7 + t) % 200 for t in range(prompt_tokens)])
    generator = torch.Generator().manual_seed(0)
    uniform_BT = torch.rand(prompts * group, min(new_tokens, 64), generator=generator)
    seconds = median_seconds(policy.device, lambda: generate(policy, ids_P, uniform_BT, 1.0))
    policy.sampler.clear()  # its copy of the weights would count in the peak of the updates
    gc.collect()
    batch = random_batch(policy, prompts, group, prompt_tokens, prompt_tokens + new_tokens)
    rollout_s = seconds * new_tokens / uniform_BT.shape[1]
    return policy, batch, rollout_s, uniform_BT.numel() / seconds


def update_seconds(policy, batch: grpo.Batch, args, train_args) -> dict[str, float]:
    """{method: median seconds of one update}."""
    optimizer = ranks.make_optimizer(policy, train_args)
    updates = {}
    for name, (module, mini_batch) in METHODS.items():
        method_args = training_args(args, module=module)
        state = module.init_state(method_args, policy)
        # The learning rate of 1e-9 keeps the weights where they are.
        updates[name] = partial(
            module.update, policy, optimizer, batch, 1e-9, (0, 1, mini_batch), state, method_args
        )
    seconds = {name: [] for name in METHODS}
    for _ in range(args.repeats):  # the methods take turns, so that a slow minute affects all
        for name, update in updates.items():
            seconds[name].append(median_seconds(policy.device, update, 1))
    return {name: sorted(values)[args.repeats // 2] for name, values in seconds.items()}


def model_flops(policy, batch: grpo.Batch) -> int:
    """FLOP of forward and backward over the batch: 6 per weight and token, and attention's."""
    tokens = int(batch["length"].sum())
    config = policy.model.config
    count = count_parameters(config)
    weights = count["all"]
    if not count["tied"]:  # a tied embedding is multiplied with, as the head; else it is looked up
        weights -= count["embedding"]
    attention = config.num_hidden_layers * config.hidden_size * batch["ids"].shape[1]
    return 6 * tokens * (weights + attention)


def measure_speed(args) -> dict:
    """One shape's measurements, by name. A step is a rollout, the log-probs and one update."""
    ranks.start()
    name = args.model[0]
    train_args = training_args(args)
    if name == "toy":
        policy, batch, rollout_s, tokens_per_s = toy_rollout(args, train_args)
    else:
        policy, batch, rollout_s, tokens_per_s = random_rollout(name, args, train_args)
    device = policy.device
    dtype = torch.bfloat16 if policy.bf16 else torch.float32
    result = {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "matrix FLOP/s": matrix_rate(device, dtype),
        "device": device_name(device),
        "rows x tokens": f"{len(batch['ids'])} x {batch['ids'].shape[1]}",
        "rollout tokens/s": tokens_per_s,
    }

    logprob_s = median_seconds(device, lambda: grpo.log_probs(policy, batch, train_args))
    batch["old_logp"], batch["old_h"] = grpo.log_probs(policy, batch, train_args)
    batch["ref_logp"] = batch["old_logp"]
    batch["importance"] = grpo.importance_weights(batch, train_args)
    batch["advantage"] = grpo.advantages(batch, {}, train_args)
    update_s = update_seconds(policy, batch, args, train_args)

    grpo_s = update_s.pop("grpo")
    flops = model_flops(policy, batch)
    result["update tokens/s"] = int(batch["length"].sum()) / grpo_s
    result["update model FLOP/s"] = flops / grpo_s
    result["share of the matrix rate"] = flops / grpo_s / result["matrix FLOP/s"]
    result["log-prob pass s"] = logprob_s
    result["grpo update s"] = grpo_s
    for method, seconds in update_s.items():
        result[f"{method}: update/grpo"] = seconds / grpo_s
    passes = 0 if policy.sampler_is_exact() else 1  # π_old's
    if args.beta:
        passes += 1  # the reference's, which this measures apart from the update
    rest_s = rollout_s + passes * logprob_s
    for method, seconds in update_s.items():
        result[f"{method}: step/grpo"] = (rest_s + seconds) / (rest_s + grpo_s)
    result["peak memory GB"] = peak_memory() / 2**30
    return result


# ---------------- the whole loop ----------------

LOOP_FLAGS = (
    "--data toy --steps 3 --engine hf --batch-prompts 20 --mini-batch-prompts 20 "
    "--max-prompt-tokens 16 --max-new-tokens 32 --domain-mix equal --eval-prompts 0"
).split()
# The metrics that are reported: those whose names begin with these.
LOOP_METRICS = ("seconds/", "tokens_per_s", "mismatch", "loss", "kl")


def run_loops(shape: str) -> dict[str, dict]:
    """{"grpo", "cgpo": the last step's metrics} of three steps, end to end, on the toy's prompts.

    The model has random weights of this shape. Raises UserError.
    """
    metrics = {}
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "model"
        write_random_model(shape, start)
        for script in ("grpo", "cgpo"):
            out = Path(folder) / script
            command = [sys.executable, f"{script}.py", "--model", start, *LOOP_FLAGS]
            command += ["--system-prompt", "", "--out", out]
            finished = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
            if finished.returncode:
                reason = finished.stderr.strip().splitlines()[-1]
                raise UserError(f"{script}.py did not run with random weights of {shape}: {reason}")
            line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
            metrics[script] = {
                name: value for name, value in line.items() if name.startswith(LOOP_METRICS)
            }
    return metrics


def write_random_model(name: str, folder: Path) -> None:
    """A checkpoint of this shape with random bf16 weights and the toy's tokenizer."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    folder.mkdir()
    tensors = ((key, parameter.detach()) for key, parameter in model.named_parameters())
    save_model(folder, model, toy_tokenizer(), tensors)
