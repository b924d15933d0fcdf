"""PCGrad: projecting conflicting gradients (Yu et al. 2020, Algorithm 1).

A baseline that ran out of memory in the CGPO paper (section 4). GRPO whose domains' gradients
lose, pair by pair, what opposes another domain's:

    L   = −1/B Σ_i 1/|y_i| Σ_t [ w_it min(ρ_it A_i, clip(ρ_it) A_i) − β KL_it ]
    g_k = the part of ∇L that comes from domain k's rows
    ĝ_i = g_i;  for j ≠ i in random order:  if ĝ_i·g_j < 0:  ĝ_i ← ĝ_i − (ĝ_i·g_j / ‖g_j‖²) g_j
    g   = Σ_i ĝ_i                                        A, ρ, KL and w are those of grpo.py

The products run over all parameters and ranks, and g_j is always the original. g is then clipped
and stepped along by AdamW, as in grpo.py. Choices:

- g_k is the gradient of domain k's own loss times its share of the rows (of the tokens with
  --loss-norm token). So without conflicts, or with one domain, g is GRPO's. Shares do not change
  who conflicts.
- Every ĝ_i is a combination of the g_k, so their K × K products, taken once, decide everything.
- The random orders are a function of (seed, step, mini-batch).

It makes K backward passes and keeps K gradients instead of one: `extra_gradients_gib` in
metrics.jsonl, per rank. This file differs from grpo.py in `update`.

    python pcgrad.py                                        # the toy, ~2 minutes on 2 cores
    python pcgrad.py --model Qwen2.5-7B-Instruct --data train.jsonl \\
        --judge-url http://localhost:8000

Suffixes and the batch's columns: see grpo.py.
"""

# ---------------- SHARED: imports ----------------
import copy
import os
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.checkpoint import checkpoint as recompute_in_backward

import data
import rewards
from common import checkpoints, cli, engines, models, prompts, ranks, reports, runs, sampler
from common.errors import UserError
from common.keys import rng
from data import micro_batches, take
from sources.models import resolve_model

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ALGORITHM = Path(__file__).stem

# A batch has one row per response: its prompt, the response, padding. Columns are added to it, but
# its tensors are never changed in place. The columns that this file works with:
#   ids, mask                [B, T]  token ids; True on the response, its end token included
#   length                   [B]     tokens of prompt and response
#   group                    [B]     the number of the row's prompt in this step, 0 … P − 1
#   domain                   [B]     the domain's place in DOMAINS
#   reward, correct          [B]     reward: NaN if the verifier failed
#   sampler_logp             [B, T]  log π_sampler of each token, 0 outside the mask
#   old_logp                 [B, T]  log π_old, likewise
#   advantage, importance    [B, T]  A and w of the header
#   old_h                    [B, 1, H]  for mcpo.py, if π_old took a forward pass
# and in a micro-batch, while it is worked on: ref_logp [B, T], log π_ref
Batch = dict[str, torch.Tensor]


# ---------------- SHARED: arguments ----------------
TOY = {
    "steps": 160,
    "batch_prompts": 20,
    "mini_batch_prompts": 20,
    "max_prompt_tokens": 16,
    "max_new_tokens": 18,
    "lr": 5e-4,
    "adam_betas": (0.9, 0.99),
    "system_prompt": "",
    "data": ["toy"],
    "domain_mix": "equal",
    "eval_prompts": 40,
    "eval_samples": 8,
    "engine": "hf",  # vllm takes longer to start than the toy takes to train
    "engine_memory": 0.02,  # if --engine vllm is given
}
SMOLLM2 = {  # for two CPU cores
    "steps": 36,
    "batch_prompts": 8,
    "mini_batch_prompts": 8,
    "beta": 0.0,
    "max_prompt_tokens": 128,
    "max_new_tokens": 64,
    "micro_batch_tokens": 4096,
    "lr": 3e-5,
    "warmup_steps": 8,  # Adam's first steps are the signs of a gradient that is mostly noise
    "data": ["real"],
    "domain_mix": "equal",
    "eval_prompts": 100,
    "eval_samples": 1,
    "engine": "hf",
}


def parse_args(argv: list[str] | None = None):
    """The flags. Defaults are the CGPO paper's (sections 4.1 and C.4), but for two models' own."""
    defaults_of = {"toy": TOY | ALGO_TOY, "smollm2": SMOLLM2 | ALGO_SMOLLM2}
    parser = cli.Parser(__doc__, defaults_of=defaults_of)
    add = parser.add_argument
    add("--steps", type=cli.natural, default=0, help="steps, each with one rollout; 0: one epoch")
    add("--batch-prompts", type=cli.positive_int, default=128, help="prompts per step")
    add(
        "--mini-batch-prompts",
        type=cli.positive_int,
        default=64,
        help="prompts per update; must divide --batch-prompts",
    )
    add(
        "--group-size",
        type=cli.positive_int,
        default=8,
        help="responses per prompt (G)",
    )
    add(
        "--beta",
        type=cli.non_negative_float,
        default=0.001,
        help="weight of the KL to the frozen start model; with 0 that model is not kept",
    )
    add("--clip-low", type=cli.non_negative_float, default=0.2, help="ε_low of the clipped ratio")
    add(
        "--clip-high", type=cli.non_negative_float, default=0.28, help="ε_high of the clipped ratio"
    )
    add(
        "--loss-norm",
        choices=["sequence", "token", "constant"],
        default="sequence",
        help="how the loss is averaged. sequence: over a sequence's tokens, then over sequences; "
        "token: over all tokens; constant: the sum is divided by sequences × --max-new-tokens",
    )
    add(
        "--is-correction",
        choices=["auto", "mask", "truncate", "none"],
        default="auto",
        help="how w = π_old/π_sampler is treated. mask: 0 outside [0.5, 2]; truncate: at most 2; "
        "none: 1; auto: mask with vllm, none with hf",
    )
    add(
        "--zero-advantage",
        choices=["auto", "keep", "drop"],
        default="auto",
        help="whether rows with an advantage of 0 take part in the update. auto: only if β > 0; at "
        "β = 0 their gradient is 0, and dropping them saves time",
    )
    cli.add_flags(parser, *cli.FLAGS)  # those that are not about the method: common/cli.py
    add_algo_arguments(parser.add_argument_group("this algorithm's own flags"))
    args = parser.parse_args(argv)
    if args.model in defaults_of:  # parse again, so that flags that were given still win
        parser.set_defaults(**defaults_of[args.model])
        args = parser.parse_args(argv)
    check_arguments(parser, args)
    return args


def check_arguments(parser, args) -> None:
    """Check that the flags fit together (else parser.error), and fill in the default data."""
    if args.batch_prompts % args.mini_batch_prompts:
        parser.error(
            f"--mini-batch-prompts {args.mini_batch_prompts} does not divide --batch-prompts "
            f"{args.batch_prompts}"
        )
    check_algo_arguments(parser, args)
    if not args.data:
        args.data = ["cgpo"]  # the paper's mixture; writing needs a judge
        if not args.domains:
            args.domains = ["math", "code", "science"]
            if args.judge_url:
                args.domains.append("writing")


# ---------------- ALGO: arguments ----------------

from common.rows import DOMAINS

ALGO_TOY = {}
ALGO_SMOLLM2 = {}


def add_algo_arguments(group) -> None:
    """Flags of this algorithm alone: PCGrad has none."""


def check_algo_arguments(parser, args) -> None:
    if args.group_size < 2:
        parser.error(f"--group-size {args.group_size}: an advantage needs at least 2 responses")


# ---------------- SHARED: main ----------------
def main(argv: list[str] | None = None) -> Path:
    """Train as the flags say. Returns the run's folder."""
    return train(setup(parse_args(argv)))


@dataclass
class Run:
    """What the loop works with; setup() makes it."""

    args: object
    out: Path  # the run's folder
    policy: "Policy"
    tokenizer: object
    optimizer: torch.optim.Optimizer
    state: dict  # what the algorithm keeps from step to step
    plan: list[list[dict]]  # for each step, its rows
    eval_rows: list[dict]
    steps_done: int  # 0, or what --resume found
    log: runs.RunLog


def train(run: Run, look=None) -> Path:
    """The loop over the run's steps. Returns the run's folder.

    look(policy, mini-batch, key, args) is called before each update, if given; the statistics that
    it returns are logged with the update's own. (for studies/study.py)
    """
    args, policy, tokenizer = run.args, run.policy, run.tokenizer
    steps = len(run.plan)
    mini_batches = args.batch_prompts // args.mini_batch_prompts
    if not run.steps_done:
        run.log.write({"step": 0} | evaluate(policy, tokenizer, run.eval_rows, args))
    started = time.perf_counter()
    for step, rows in enumerate(run.plan[run.steps_done :], run.steps_done + 1):
        key = (args.seed, step)  # every random number of this step is derived from it

        # 1. Sample responses and score them.
        batch, columns, samples, seconds = rollout(
            policy, tokenizer, rows, args.group_size, key, args.temperature, args
        )
        rewards.stop_if_down(columns)  # an error if a reward server answers nothing at all
        reports.warn_if_unknown(columns)

        # 2. The log-prob of every sampled token under π_old, before any update. (The sampler's own
        #    may differ a little: w corrects for that.)
        clock = time.perf_counter()
        per_token = add_log_probs(policy, batch, args)
        batch["importance"] = importance_weights(batch, args)

        # 3. How much better each response is than its group.
        batch["advantage"] = advantages(batch, run.state, args)
        seconds["logprobs"] = time.perf_counter() - clock

        # 4. One update per mini-batch.
        clock = time.perf_counter()
        stats = []
        for m in range(mini_batches):
            in_mini_batch_B = batch["group"] // args.mini_batch_prompts == m
            mini_batch = take(batch, in_mini_batch_B & is_trained_on(batch))
            if not ranks.reduce([len(mini_batch["group"])])[0]:
                continue  # no response of this mini-batch has a reward, on any rank
            update_number = (step - 1) * mini_batches + m + 1
            lr = args.lr * min(1.0, update_number / max(1, args.warmup_steps))
            update_key = (*key, m)
            extra = look(policy, mini_batch, update_key, args) if look else {}
            update_stats = update(
                policy, run.optimizer, mini_batch, lr, update_key, run.state, args
            )
            stats.append(update_stats | extra)
        seconds["update"] = time.perf_counter() - clock

        # 5. Log, evaluate, save.
        slowest = ranks.reduce(list(seconds.values()), "max")
        seconds = dict(zip(seconds, slowest))
        line = {"step": step} | reports.step_metrics(seconds, columns, stats, per_token)
        if step == steps or (args.eval_every and step % args.eval_every == 0):
            line |= evaluate(policy, tokenizer, run.eval_rows, args)
        line["verdicts"] = reports.verdict_counts(samples)
        shown = samples[:: max(1, len(samples) // 20)]  # about 20 of them
        run.log.write(line, [{"step": step} | sample for sample in shown])
        spent = time.perf_counter() - started
        reports.print_warnings(run.log.lines)
        print(reports.live_line(line, steps, spent, step - run.steps_done), flush=True)
        if step == steps or step % args.save_every == 0:
            checkpoints.save_checkpoint(run.out, step, policy, tokenizer, run.optimizer, run.state)
    if ranks.is_first():
        reports.close_run(run.log.lines, run.out, f"{ALGORITHM} on {args.model}")
    return run.out


# ---------------- ALGO: state ----------------
def init_state(args, policy) -> dict:
    """What the algorithm keeps from step to step besides the policy. GRPO keeps nothing."""
    return {}


# ---------------- ALGO: advantages ----------------
def advantages(batch: Batch, state: dict, args) -> torch.Tensor:
    """[B, T]: the header's A_i, the same for every token of a response.

    An all-equal group gives exactly 0: it has nothing to teach. A response without a reward (NaN:
    its verifier failed) gets 0, and is left out of its group's mean and std.
    """
    advantage_B = torch.zeros(len(batch["reward"]), dtype=torch.float64)
    for g in batch["group"].unique():
        in_group_B = (batch["group"] == g) & ~batch["reward"].isnan()
        reward_G = batch["reward"][in_group_B]
        if len(reward_G) > 1 and reward_G.min() < reward_G.max():
            advantage_B[in_group_B] = (reward_G - reward_G.mean()) / (reward_G.std() + 1e-6)
    return advantage_B[:, None].float() * batch["mask"]


# ---------------- ALGO: loss ----------------
def policy_loss(logp_BT, micro: Batch, args):
    """(loss_BT, {statistic: [B, T]}): the header's clipped surrogate and KL, token by token.

    micro: the rows of a micro-batch. backward() takes the mean, by the weights of token_weights().
    """
    advantage_BT, importance_BT = micro["advantage"], micro["importance"]
    ratio_BT = torch.exp(logp_BT - micro["old_logp"])
    clipped_BT = ratio_BT.clamp(1 - args.clip_low, 1 + args.clip_high)
    # min: the clip stops only moves that raise the objective; taking back a bad move stays free
    surrogate_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    is_clipped_BT = (surrogate_BT < ratio_BT * advantage_BT) & (importance_BT > 0)
    loss_BT = -importance_BT * surrogate_BT
    stats = {"clip_fraction": is_clipped_BT}
    if args.beta:
        log_ratio_BT = micro["ref_logp"] - logp_BT
        kl_BT = torch.exp(log_ratio_BT) - log_ratio_BT - 1
        loss_BT = loss_BT + args.beta * kl_BT
        stats["kl"] = kl_BT
    return loss_BT, stats


def is_trained_on(batch: Batch) -> torch.Tensor:
    """[B]: the rows to train on, those whose verifier did not fail."""
    return ~batch["reward"].isnan()


def moves_the_policy(batch: Batch) -> torch.Tensor:
    """[B]: at β = 0, the rows whose gradient is not exactly 0."""
    return (batch["advantage"] * batch["importance"] != 0).any(1)


# ---------------- SHARED: backward ----------------
def token_weights(batch: Batch, args) -> torch.Tensor:
    """[B, T]: the 1/B and 1/|y_i| of the header (or --loss-norm's), so that L = Σ weight · loss.

    The denominators are counted here, over all rows and ranks, before any forward pass. So the loss
    does not depend on how the rows are split into micro-batches.
    """
    mask_BT = batch["mask"].double()
    sequences, tokens = ranks.reduce([len(mask_BT), mask_BT.sum()])
    if args.loss_norm == "token":
        return mask_BT / tokens
    if args.loss_norm == "sequence":
        return mask_BT / mask_BT.sum(1, keepdim=True) / sequences
    return mask_BT / args.max_new_tokens / sequences


def backward(policy, batch: Batch, args, forward=None) -> dict[str, float]:
    """Add ∂L/∂θ of these rows to .grad, micro-batch by micro-batch.

    Returns {"loss", each statistic's mean over tokens, "tokens": how many}.
    forward: a function to call in place of the policy. (for opd.py)
    """
    # Before a step's first update, the pass shows whether π_old is what the hf engine sampled from.
    is_check = not forward and policy.sampler_is_exact() and policy.updates == policy.sampled_after
    largest_gap = 0.0
    forward = forward or policy
    batch = batch | {"weight": token_weights(batch, args)}
    (tokens,) = ranks.reduce([int(batch["mask"].sum())])  # the sum over ranks
    if args.zero_advantage == "drop":
        batch = take(batch, moves_the_policy(batch))
    sums = Counter(loss=0.0)
    # A micro-batch is a list of row numbers, with at most --micro-batch-tokens tokens together.
    pieces = same_count(micro_batches(batch, args.micro_batch_tokens, policy.shares_prompts))
    for row_numbers in reports.shown("update", pieces):
        micro = take(batch, row_numbers, policy.device)  # these rows, cut to the longest of them
        if policy.reference:
            # Here, on the very rows of the policy's own pass: while π_θ is π_ref, both round alike,
            # so that the gradient of the KL is exactly 0.
            with torch.no_grad():
                micro["ref_logp"], _ = policy.reference[0](micro["ids"], micro["mask"])
        logp_BT, mean_h_BH = forward(micro["ids"], micro["mask"])
        micro["mean_h"] = mean_h_BH  # for mcpo.py
        if is_check:
            gap_BT = (logp_BT.detach() - micro["sampler_logp"]).abs()
            largest_gap = max(largest_gap, gap_BT.max().item() if len(gap_BT) else 0.0)
        loss_BT, stats = policy_loss(logp_BT, micro, args)
        loss = (loss_BT * micro["weight"]).sum()
        # FSDP2, which shards the weights over ranks, takes the mean of the ranks' gradients.
        (loss * ranks.world_size()).backward()
        sums["loss"] += loss.item()
        for name, value_BT in stats.items():
            sums[name] += (value_BT.detach() * micro["mask"]).sum().item() / tokens
    means = dict(zip(sums, ranks.reduce(list(sums.values()))))
    if is_check:
        (means["mismatch/max"],) = ranks.reduce([largest_gap], "max")
        engines.check_hf_sampler(means["mismatch/max"])
    return means | {"tokens": tokens}


def optimizer_step(policy, optimizer, lr: float, args) -> float:
    """Clip the gradients, step with this learning rate, clear the gradients.

    Returns the norm before clipping. Raises UserError if the norm is not finite.
    """
    max_norm = args.max_grad_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm)
    norm = ranks.full_tensor(norm).item()
    if not np.isfinite(norm):
        raise UserError(
            f"the gradient's norm is {norm}: the run diverged; lower --lr (was {lr:g}) and --resume"
        )
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # as torchao's 8-bit optimizers keep it
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr
    if norm:  # with a gradient of 0 the moments alone would move the weights
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    policy.updates += 1  # an engine that still has older weights is found out by this
    return norm


# ---------------- ALGO: update ----------------
def update(policy, optimizer, batch: Batch, lr: float, key: tuple, state: dict, args) -> dict:
    """One optimizer step along the sum of the projected gradients. Returns the statistics.

    key: (seed, step, mini-batch).
    """
    # Each domain's gradient, times its share of the mini-batch.
    rows_in_K = [batch["domain"] == k for k in range(len(DOMAINS))]
    size_B = torch.ones(len(batch["mask"]))
    if args.loss_norm == "token":
        size_B = batch["mask"].sum(1)
    size_K = ranks.reduce([size_B[row_B].sum() for row_B in rows_in_K])
    present = [k for k, size in enumerate(size_K) if size]
    parameters = list(policy.parameters())
    stats, gradients, loss = [], [], 0
    for k in present:
        domain_share = size_K[k] / sum(size_K)
        stats.append(backward(policy, take(batch, rows_in_K[k]), args))
        loss += stats[-1]["loss"] * size_K[k] / sum(size_K)
        gradients.append([p.grad.mul_(domain_share) for p in parameters])
        policy.zero_grad(set_to_none=True)

    # Their sum, after the projections.
    dots_KK = products(gradients)
    weights = projection_weights(dots_KK, key)
    for p, *gradient_K in zip(parameters, *gradients):
        p.grad = gradient_K[0].mul_(weights[0])
        for gradient, weight in zip(gradient_K[1:], weights[1:]):
            p.grad.add_(gradient, alpha=weight)

    # GRPO keeps one gradient, too; a shard counts with the whole tensor's size
    extra_bytes = sum(g.numel() * g.element_size() for gradient in gradients[1:] for g in gradient)
    update_stats = reports.mean_stats(stats) | cosines(dots_KK, [DOMAINS[k] for k in present])
    update_stats["loss"] = loss
    update_stats["grad_norm"] = optimizer_step(policy, optimizer, lr, args)
    update_stats["extra_gradients_gib"] = extra_bytes / ranks.world_size() / 2**30
    return update_stats


def products(gradients: list[list[torch.Tensor]]) -> np.ndarray:
    """[K, K]: g_i·g_j over all parameters and ranks."""
    dots_KK = np.zeros((len(gradients), len(gradients)))
    for i, a in enumerate(gradients):
        for j, b in enumerate(gradients[: i + 1]):
            dot = sum((x * y).sum() for x, y in zip(a, b))
            dots_KK[i, j] = dots_KK[j, i] = ranks.full_tensor(dot).item()
    return dots_KK


def projection_weights(dots_KK, key: tuple) -> list[float]:
    """c [K] with Σ_i ĝ_i = Σ_k c_k g_k, given the products g_i·g_k."""
    K = len(dots_KK)
    total_K = np.zeros(K)
    for i in range(K):
        c_K = np.eye(K)[i]  # ĝ_i = Σ_k c_k g_k
        for j in rng(*key, "pcgrad", i).permutation(K):
            dot = c_K @ dots_KK[:, j]
            if j != i and dot < 0:
                c_K[j] -= dot / dots_KK[j, j]
        total_K += c_K
    return total_K.tolist()


def cosines(dots_KK, domains: list[str]) -> dict[str, float]:
    """{"cosine/<i>-<j>": cos(g_i, g_j)} of the pairs whose gradients are not 0."""
    norm_K = dots_KK.diagonal() ** 0.5
    values = {}
    for i, a in enumerate(domains):
        for j in range(i + 1, len(domains)):
            if norm_K[i] and norm_K[j]:
                values[f"cosine/{a}-{domains[j]}"] = dots_KK[i, j] / (norm_K[i] * norm_K[j])
    return values


# ---------------- SHARED: rollout ----------------
def respond(
    policy,
    prompts_P: list[list[int]],
    keys_P: list[tuple],
    group_size: int,
    temperature: float,
    args,
    top_p: float = 1.0,
) -> list[tuple]:
    """`group_size` responses to each prompt: a list of P·G tuples (tokens, log-probs, truncated).

    The responses to a prompt are adjacent. keys_P: for each prompt (seed, step or purpose, row id,
    number of its first sample), from which its random numbers are derived.
    """
    if policy.engine:
        return policy.engine.generate(
            policy, prompts_P, keys_P, group_size, temperature, top_p, args.max_new_tokens
        )
    # hf: in pieces, so that the KV cache holds at most --rollout-tokens tokens at a time
    tokens_per_prompt = group_size * (args.max_prompt_tokens + args.max_new_tokens)
    prompts_at_once = max(1, args.rollout_tokens // tokens_per_prompt)
    responses_B = []
    for start in range(0, len(prompts_P), prompts_at_once):
        stop = start + prompts_at_once
        # Each response gets its random numbers beforehand, one in [0, 1) per token that it may
        # have. So it does not depend on what is sampled beside it.
        uniform_B = []
        for key in keys_P[start:stop]:
            first_sample = key[-1]
            for g in range(group_size):
                stream = rng(*key[:-1], first_sample + g, "sample")
                uniform_B.append(stream.random(args.max_new_tokens))
        uniform_BT = torch.tensor(np.stack(uniform_B))  # T: of the response alone
        responses_B += sampler.generate(
            policy, prompts_P[start:stop], uniform_BT, temperature, top_p
        )
    return responses_B


def rollout(
    policy,
    tokenizer,
    rows_P: list[dict],
    group_size: int,
    key: tuple,
    temperature: float,
    args,
    top_p: float = 1.0,
):
    """Sample `group_size` responses to every row, score them, and pack them into a batch.

    key: (seed, step) or (seed, purpose). All randomness is a function of it, the row's id and the
    sample's number. top_p below 1 is for evaluations. Returns
        batch    this rank's responses; data.collate lists the columns
        columns  the batch's columns [B], of all ranks, for metrics
        samples  a dict per response, of all ranks, for samples.jsonl
        seconds  {"sync", "rollout", "reward"}
    """
    # a. The sampler gets the current weights. (A lone CPU process samples from the policy itself.)
    t0 = time.perf_counter()
    policy.sampled_after = policy.updates
    if policy.engine:
        policy.engine.sync_weights(policy)
    elif policy.sharded:
        ranks.sync_sampler(policy)

    # b. Each rank samples its share of the prompts. A row that is drawn twice in a step gets new
    #    responses the second time: it goes on with its random numbers.
    t1 = time.perf_counter()
    samples_drawn = Counter()  # row id → samples
    keys_P = []
    for row in rows_P:
        keys_P.append((*key, row["id"], samples_drawn[row["id"]]))
        samples_drawn[row["id"]] += group_size
    my_numbers = data.deal(rows_P, ranks.rank(), ranks.world_size(), args.mini_batch_prompts)
    my_prompts = [rows_P[p]["ids"] for p in my_numbers]  # token ids
    my_keys = [keys_P[p] for p in my_numbers]
    responses_B = respond(policy, my_prompts, my_keys, group_size, temperature, args, top_p)
    tokens_B, logps_B, truncated_B = zip(*responses_B)
    rows_B = [rows_P[p] for p in my_numbers for _ in range(group_size)]

    # c. Each text is scored as its row's domain says.
    t2 = time.perf_counter()
    texts_B = data.response_texts(rows_B, tokens_B, tokenizer)

    def count_tokens(text: str) -> int:  # some rewards depend on an answer's length
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    scores_B = rewards.score(
        texts_B,
        rows_B,
        args.reward_scheme,
        args.verifier_url,
        args.judge_url,
        args.sandbox_url,
        count_tokens,
        truncated_B,
        args.reward_format,
    )

    # d. The batch for this rank's updates; its columns [B], and samples to read, of all ranks.
    t3 = time.perf_counter()
    batch = data.collate(rows_B, my_numbers, group_size, tokens_B, logps_B, truncated_B, scores_B)
    samples = []
    for row, text, score in zip(rows_B, texts_B, scores_B):
        samples.append(
            {
                "id": row["id"],
                "domain": row["domain"],
                "prompt": tokenizer.decode(row["ids"]),
                "response": text,
                "reward": score.reward,
                "verdict": score.why,
            }
        )
    columns = {name: column for name, column in batch.items() if column.ndim == 1}
    columns, samples = data.join_ranks(ranks.gather((columns, samples)), group_size)
    return batch, columns, samples, {"sync": t1 - t0, "rollout": t2 - t1, "reward": t3 - t2}


def evaluate(policy, tokenizer, rows: list[dict], args) -> dict[str, float]:
    """Accuracy on held-out prompts by domain.

    eval/sampled/<domain>: mean over --eval-samples responses per prompt, at --temperature
    eval/greedy/<domain>: one response per prompt, at temperature 0
    The random numbers do not depend on the step, so before and after differ by the policy alone.
    """
    accuracies = {}
    for kind, group_size, temperature in (
        ("sampled", args.eval_samples, args.temperature),
        ("greedy", 1, 0.0),
    ):
        if rows and group_size:
            key = (args.seed, "evaluation")
            _, columns, _, _ = rollout(policy, tokenizer, rows, group_size, key, temperature, args)
            metrics = reports.domain_metrics(columns)
            for domain, accuracy in reports.by_domain(metrics, "accuracy").items():
                accuracies[f"eval/{kind}/{domain}"] = accuracy
    return accuracies


# ---------------- SHARED: log-probs ----------------
class Policy(torch.nn.Module):
    """A causal language model whose forward pass gives the log-probs of responses.

    model: from transformers. vocab: the number of token ids; a model's head may have more.
    stop_ids: the ids that end a response. Logits [N, V] of all tokens would not fit into memory, so
    they exist only in chunks.
    """

    CHUNK = 2**26  # logits at a time, tokens × vocabulary

    def __init__(self, model, vocab: int, stop_ids: list[int], bf16=False, temperature=1.0):
        super().__init__()
        self.model, self.vocab, self.stop_ids = model, vocab, stop_ids
        self.width = model.get_output_embeddings().weight.shape[1]  # of the head's input
        self.bf16 = bf16  # compute in bfloat16
        self.temperature = temperature  # of log-probs and sampler
        self.engine = None  # vLLM, if it is the sampler
        self.sampler = []  # the hf sampler's unsharded copy; in a list, so that it is no submodule
        self.reference = []  # the frozen start model, if β > 0; in a list for the same reason
        self.updates = 0  # optimizer steps made
        self.sampled_after = None  # what `updates` was at the last rollout
        self.can_share_prompts = False  # what load_policy() has tried
        # ranks.place() moves policy and model, and sets what follows
        self.device = model.device
        self.sharded = False
        self.shares_prompts = False  # a prompt runs once for all its responses (common/prompts.py)

    def sampler_is_exact(self) -> bool:
        """Does the hf engine sample in fp32? Then its log-probs are those of π_old."""
        return not self.engine and not self.bf16

    def autocast(self):
        """Compute in bfloat16; the weights stay in fp32, or small updates would be lost."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def head(self, hidden_NH, token_N, temperature: float):
        """(log-prob of each token,), over the tokenizer's ids only."""
        with self.autocast():
            logits_NV = self.model.get_output_embeddings()(hidden_NH)[:, : self.vocab]
        at_least_fp32 = torch.promote_types(logits_NV.dtype, torch.float32)
        logp_NV = torch.log_softmax(logits_NV.to(at_least_fp32) / temperature, -1)
        return (logp_NV.gather(-1, token_N[:, None])[:, 0],)

    def own_logp(self, ids_T: list[int]):
        """Log-probs of ids_T[1:] at temperature 1, on the CPU: for checks of model and engine."""
        ids_BT = torch.tensor([ids_T], device=self.device)
        all_but_one_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        all_but_one_BT[:, 0] = False
        return self(ids_BT, all_but_one_BT, 1.0)[0][0, 1:].cpu()

    def forward(self, ids_BT, mask_BT, temperature: float | None = None, head=None, target=None):
        """(logp_BT, mean_h_BH).

        logp[b, t] is log π(ids[b, t] | ids[b, <t]) if mask[b, t], else 0. mean_h is the mean of the
        last hidden layer over the response (for mcpo.py). Right padding needs no attention mask,
        because causal attention never sees it.

        head, target: a function to use in place of self.head, and its targets in place of the
        token ids, [B, T, …]. (for opd.py)
        """
        B = len(ids_BT)
        if not B:  # a rank without rows runs a blank one: FSDP2's collectives need every rank
            ids_BT, mask_BT = ids_BT.new_zeros(1, 2), mask_BT.new_zeros(1, 2)
            target = target if target is None else target.new_zeros(1, 2, *target.shape[2:])
        with self.autocast():
            if self.shares_prompts and B:
                hidden_BTH = prompts.hidden_states(self.model.base_model, ids_BT, mask_BT)
            else:
                output = self.model.base_model(input_ids=ids_BT, use_cache=False)
                hidden_BTH = output.last_hidden_state
        # The hidden state at t − 1 predicts the token at t: [B, T − 1, H] → [N, H]
        response_BT = mask_BT[:, 1:]
        hidden_NH = hidden_BTH[:, :-1][response_BT]
        target_N = (ids_BT if target is None else target)[:, 1:][response_BT]

        head = head or self.head
        temperature = self.temperature if temperature is None else temperature
        chunk = max(1, self.CHUNK // self.vocab)  # tokens
        # With several chunks, logits are computed again in the backward pass, to save memory.
        recompute = torch.is_grad_enabled() and len(hidden_NH) > chunk
        values = []  # for each chunk, the tuple that the head gives
        for hidden, targets in zip(hidden_NH.split(chunk), target_N.split(chunk)):
            if recompute:
                values.append(
                    recompute_in_backward(head, hidden, targets, temperature, use_reentrant=False)
                )
            else:
                values.append(head(hidden, targets, temperature))

        outputs = []  # the chunks joined, [N] → [B, T]
        for values_N in map(torch.cat, zip(*values)):
            values_BT = values_N.new_zeros(*ids_BT.shape, *values_N.shape[1:])
            values_BT[:, 1:][response_BT] = values_N
            outputs.append(values_BT)
        length_B1 = mask_BT.sum(1, keepdim=True).clamp(min=1)
        outputs.append((hidden_BTH * mask_BT[..., None]).sum(1) / length_B1)  # mean_h_BH
        if not B:
            outputs = [value[:0].clone() for value in outputs]
        return tuple(outputs)


def same_count(pieces: list[torch.Tensor]) -> list[torch.Tensor]:
    """The pieces, and as many empty ones as make every rank have the same number.

    Each piece is a round of collectives, in which all ranks must take part.
    """
    (most,) = ranks.reduce([len(pieces)], "max")
    missing = int(most) - len(pieces)
    return pieces + [torch.tensor([], dtype=torch.long)] * missing


@torch.no_grad()
def log_probs(policy, batch: Batch, args):
    """(logp_BT, mean_h_B1H) of a whole batch, on the CPU."""
    logp_BT = torch.zeros(batch["ids"].shape)
    mean_h_BH = torch.zeros(len(batch["ids"]), policy.width)
    inputs = {name: batch[name] for name in ("ids", "mask", "length")}
    pieces = same_count(micro_batches(batch, args.micro_batch_tokens, policy.shares_prompts))
    for row_numbers in reports.shown("log-probs", pieces):
        micro = take(inputs, row_numbers, policy.device)
        outputs = policy(micro["ids"], micro["mask"])
        micro_logp_BT, micro_h_BH = (x.to("cpu", logp_BT.dtype) for x in outputs)
        logp_BT[row_numbers, : micro_logp_BT.shape[1]] = micro_logp_BT
        mean_h_BH[row_numbers] = micro_h_BH
    # take() cuts columns of two dimensions to the longest row, hence a third one here
    return logp_BT, mean_h_BH[:, None]


def add_log_probs(policy, batch: Batch, args) -> list[dict]:
    """Add the column old_logp to the batch, and old_h (for mcpo.py) if it takes a forward pass.

    It takes none if the hf engine has sampled in fp32: its log-probs are π_old's own, and
    backward() compares them with the trainer's. Returns one dict per rank, of values per sampled
    token, which reports.step_metrics averages.
    """
    mask_BT = batch["mask"]
    per_token = {}
    if policy.sampler_is_exact():
        batch["old_logp"] = batch["sampler_logp"]
    else:
        batch["old_logp"], batch["old_h"] = log_probs(policy, batch, args)
        per_token["log_w"] = (batch["old_logp"] - batch["sampler_logp"])[mask_BT]
    per_token["old_logp"] = batch["old_logp"][mask_BT]
    return ranks.gather(per_token)


def importance_weights(batch: Batch, args) -> torch.Tensor:
    """[B, T]: the header's w, the weight of each token's policy gradient, from π_old/π_sampler.

    mask: 0 outside [0.5, 2] (M2RL's masked importance sampling). truncate: at most 2 (its scripts).
    none: 1, right for the hf engine, which samples from π_old itself.
    """
    w_BT = torch.exp((batch["old_logp"] - batch["sampler_logp"]) * batch["mask"])
    if args.is_correction == "mask":
        return torch.where((w_BT >= 0.5) & (w_BT <= 2.0), w_BT, 0.0)
    if args.is_correction == "truncate":
        return w_BT.clamp(max=2.0)
    return torch.ones_like(w_BT)


# ---------------- SHARED: engine ----------------
class Engine:
    """vLLM in this process: its start, the transfer of weights, and generation.

    It starts with random weights and receives all weights through sync_weights. Its vocabulary is
    cut to the tokenizer's, so no other id can be sampled. canary: token ids whose log-probs show
    whether the weights arrived (common/engines.py). Raises UserError if vLLM does not start.
    """

    def __init__(self, name: str, policy, canary: list[int], args):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine runs in this process
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # and shares its CPU cores
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        self.canary = canary
        self.synced = None  # after which of the trainer's updates its weights are
        self.cuda = policy.device.type == "cuda"
        self.dtype = torch.bfloat16 if policy.bf16 else torch.float32
        if self.cuda:
            memory = torch.cuda.mem_get_info()[1]
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        try:
            import vllm

            self.sampling_params = vllm.SamplingParams
            self.llm = vllm.LLM(
                name,
                dtype=self.dtype,
                load_format="dummy",
                hf_overrides={"vocab_size": policy.vocab},
                max_model_len=args.max_prompt_tokens + args.max_new_tokens,
                enable_sleep_mode=self.cuda,
                gpu_memory_utilization=args.engine_memory,
                kv_cache_memory_bytes=int(args.engine_memory * memory),
                logprobs_mode="processed_logprobs",
                skip_tokenizer_init=True,
                # Under torchrun each rank has an engine of its own, on its own GPU.
                distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,
            )
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"vllm did not start: {reason}; docs/scale.md says how to install it, and "
                f"--engine-memory {args.engine_memory} sets the size of its cache"
            ) from error

    @torch.no_grad()
    def sync_weights(self, policy, spoiled: bool = False) -> None:
        """Stream the trainer's parameters in, one at a time, and prove that they arrived.

        spoiled: corrupt the first tensor on its way, to see the proof fail. Raises UserError.
        """
        sent = {}  # name → fingerprint as it was sent
        weights = ranks.weights(policy, self.dtype)
        tensors = engines.record_fingerprints(weights, sent, spoil_first=spoiled)

        def read_back(model):  # runs in the engine
            if hasattr(model.lm_head, "quant_method"):
                # On a CPU a tied head is a packed copy, which would stay stale.
                model.lm_head.quant_method.process_weights_after_loading(model.lm_head)
            return engines.engine_fingerprints(model, self.dtype)

        self.llm.wake_up(tags=["weights"])
        try:
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": tensors})
            (held,) = self.llm.apply_model(read_back)
        except Exception as error:
            for _ in tensors:
                pass  # finish the gathers, because the other ranks take part in them
            reason = str(error)[:200]
            raise UserError(f"vllm does not take this model's weights: {reason}") from error
        self.llm.wake_up(tags=["kv_cache"])
        self.llm.reset_prefix_cache()

        # The proof: fingerprints of all tensors, and the canary's log-probs.
        prompt = {"prompt_token_ids": self.canary}
        params = self.sampling_params(max_tokens=1, prompt_logprobs=0)
        (output,) = self.llm.generate(prompt, params, use_tqdm=False)
        logps = []
        for position, token in enumerate(self.canary):
            if position:  # the first token has none
                logps.append(output.prompt_logprobs[position][token].logprob)
        engines.check_engine(policy, self, sent, held, torch.tensor(logps), spoiled)
        self.synced = None if spoiled else policy.updates

    def generate(
        self,
        policy,
        prompts_P: list[list[int]],
        keys_P: list[tuple],
        group_size: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
    ) -> list[tuple]:
        """Same as respond(). Raises UserError if the weights are not the trainer's current ones."""
        if self.synced != policy.updates:
            raise UserError(
                f"vllm holds the weights after update {self.synced}, the trainer made "
                f"{policy.updates} updates"
            )
        prompts, params = [], []
        for ids, key in zip(prompts_P, keys_P):
            prompts.append({"prompt_token_ids": ids})
            params.append(
                self.sampling_params(
                    n=group_size,
                    temperature=temperature,
                    top_p=top_p,
                    max_tokens=max_tokens,
                    stop_token_ids=policy.stop_ids,
                    ignore_eos=True,  # stop_token_ids holds every end token
                    # Sample j of a prompt uses seed + j, so hashes keep the seeds far apart.
                    seed=int(rng(*key, "vllm").integers(2**62)),
                    logprobs=0,
                    detokenize=False,
                )
            )
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        if self.cuda:
            self.llm.sleep(level=2)  # frees the memory of its weights and cache for the trainer
        responses_B = []
        for output in outputs:
            for response in output.outputs:
                tokens = list(response.token_ids)
                logps = [logp[token].logprob for logp, token in zip(response.logprobs, tokens)]
                responses_B.append((tokens, logps, response.finish_reason == "length"))
        return responses_B


# ---------------- SHARED: setup ----------------
def setup(args, rows: tuple[list[dict], list[dict]] | None = None) -> Run:
    """Everything before the first step. Raises UserError.

    rows: (training rows, held-out rows), instead of those of --data and --eval-data.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    ranks.start()
    out = runs.open_run(args, ALGORITHM, write=False)  # fail early if the folder is taken
    args.date = args.date or runs.date_of(out)

    # The model and its rows.
    name = resolve_model(args.model)
    tokenizer, policy = load_policy(name, args.dtype)
    policy.temperature = args.temperature
    data.check_context(args, policy.model.config)
    train_rows, eval_rows = data.train_and_eval_rows(args, tokenizer, rows)
    data.check_ids(train_rows + eval_rows, policy.vocab)
    rewards.configure(args)
    rewards.check_rows(train_rows + eval_rows, args.judge_url, args.sandbox_url)
    mix = data.domain_mix(train_rows, args.domain_mix)
    steps = args.steps or max(1, len(train_rows) // args.batch_prompts)
    plan = data.schedule(train_rows, mix, steps, args)
    if args.mini_batch_prompts < ranks.world_size():
        raise UserError(
            f"--mini-batch-prompts {args.mini_batch_prompts}: fewer than the "
            f"{ranks.world_size()} ranks (processes)"
        )

    # The policy and its frozen copy on their devices; the sampler; the optimizer.
    reference = copy.deepcopy(policy).requires_grad_(False) if args.beta else None
    ranks.place(policy, args)
    if reference:
        policy.reference = [ranks.place(reference, args, frozen=True)]
    canary = engines.canary_ids(train_rows, args)
    policy.engine, engine_text = engines.open_engine(Engine, name, policy, canary, args)
    optimizer = ranks.make_optimizer(policy, args)
    state = init_state(args, policy)

    # The run's folder, and where to begin.
    out = runs.open_run(args, ALGORITHM) if ranks.is_first() else None
    out = ranks.gather(out)[0]  # rank 0 makes it and tells the others
    if args.is_correction == "auto":
        args.is_correction = "mask" if policy.engine else "none"
    if args.zero_advantage == "auto":
        args.zero_advantage = "keep" if args.beta else "drop"
    checkpoints.check_saving(out, policy, tokenizer, args.optim)
    steps_done = 0
    if args.resume and (out / "checkpoint").exists():
        folder = out / "checkpoint"
        steps_done = checkpoints.load_checkpoint(folder, policy, optimizer, state)
    run = Run(
        args=args,
        out=out,
        policy=policy,
        tokenizer=tokenizer,
        optimizer=optimizer,
        state=state,
        plan=plan,
        eval_rows=eval_rows,
        steps_done=steps_done,
        log=runs.RunLog(out, steps_done, args),
    )
    print(reports.opening(ALGORITHM, run, engine_text, mix, len(train_rows)))
    print(f"tags {data.tags_text(tokenizer)}")
    return run


def load_policy(name: str, dtype: str):
    """(tokenizer, Policy) with fp32 master weights, on the CPU (ranks.place() moves it).

    Raises UserError for a model whose logits are not its output head applied to its hidden states.
    """
    tokenizer, model, stop_ids = models.load_model(name)
    model.eval()  # for good: dropout would make ρ differ from 1 without any update
    policy = Policy(model, models.known_ids(tokenizer, model), stop_ids)
    ids_BT = torch.arange(8)[None]  # any ids will do
    try:
        with torch.no_grad():
            # The head's output is made large first: a cap leaves small logits nearly as they are.
            factor = 300 / model(ids_BT).logits.abs().max()
            head = model.get_output_embeddings()
            magnify = head.register_forward_hook(lambda *call: factor * call[-1])
            policy_logp_T = policy.own_logp(ids_BT[0].tolist())
            logp_TV = model(ids_BT).logits[0, :-1, : policy.vocab].log_softmax(-1)
        magnify.remove()
    except Exception as error:  # what a wrong configuration raises is up to the model
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"--model {name}: it cannot be run: {reason[0]}") from error
    model_logp_T = logp_TV.gather(-1, ids_BT[0, 1:, None])[:, 0]
    if not torch.allclose(model_logp_T, policy_logp_T, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"--model {name}: its logits are not its output head times its last hidden state "
            "(as in Gemma 2, Granite and BERT); its log-probs would be wrong here"
        )
    policy.can_share_prompts = prompts.are_equal_when_shared(model.base_model, policy.vocab)
    policy.bf16 = dtype == "bfloat16" or (dtype == "auto" and torch.cuda.is_available())
    return tokenizer, policy


if __name__ == "__main__":
    cli.run_main(main)
