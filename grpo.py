"""GRPO: group relative policy optimization (Shao et al. 2024), as the CGPO paper uses it (Eq. 1, sections 2 and 4.1).

Several domains in --data: joint (mixed multi-task) RL. One domain: an expert. For a prompt and G responses y_1 … y_G:
    A_i   = (r_i − mean r) / (std r + 1e-6)                                     std unbiased, over the prompt's group
    ρ_it  = π_θ(y_it | x, y_i<t) / π_old(y_it | x, y_i<t)
    L     = −1/B Σ_i 1/|y_i| Σ_t [ min(ρ_it A_i, clip(ρ_it, 1 − ε_low, 1 + ε_high) A_i) − β KL_it ]
    KL_it = π_ref/π_θ − log(π_ref/π_θ) − 1                                      the k3 estimator
The ratio is per token, as in the CGPO authors' code (their Eq. 1 writes a sequence ratio). Removed against PPO: the
value network, GAE, the learned reward. Every other algorithm file is this one with other ALGO blocks: read the `diff`.

    python grpo.py                                                                  # the toy, ~2 minutes on 2 cores
    python grpo.py --model Qwen2.5-7B-Instruct --data train.jsonl --judge-url http://localhost:8000

Tensor suffixes: P prompts, G group size, B sequences (P·G), T tokens, N response tokens, V vocabulary, H hidden,
K domains.
"""
# ---------------- SHARED: imports ----------------
import copy
import resource
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, LogitsProcessor

import analyze
import data
import rewards
from data import DOMAINS, UserError, rng

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
ALGORITHM = Path(__file__).stem
Batch = dict[str, torch.Tensor]  # every tensor has one line per sequence: [B] or [B, T]; never changed in place


# ---------------- SHARED: arguments ----------------
TOY = {"steps": 160, "batch_prompts": 20, "mini_batch_prompts": 20, "max_prompt_tokens": 16, "max_new_tokens": 18,
       "lr": 5e-4, "adam_betas": (0.9, 0.99), "system_prompt": "", "data": ["toy"],
       "domain_mix": "equal", "eval_prompts": 40, "eval_samples": 8}


def parse_args(argv: list[str] | None = None):
    """Flags; the defaults are the CGPO paper's (sections 4.1 and C.4), and `--model toy` swaps in the toy's."""
    parser = data.Parser(__doc__)
    add = parser.add_argument
    add("--model", default="toy", help="a folder, organisation/name, a bare name such as Qwen2.5-7B-Instruct, or toy")
    add("--data", nargs="+", default=[], help=".jsonl files, folders, toy, humaneval, gym:<task>[,<task>…]")
    add("--eval-data", nargs="+", default=[], help="evaluate on these rows instead of held-out ones of --data")
    add("--domains", nargs="+", default=[], help=f"only these domains ({' '.join(DOMAINS)})")
    add("--domain-mix", default="", help="domains' shares of a batch: math=2,code=1; equal; default: as in the data")
    add("--system-prompt", default=data.SYSTEM_PROMPT, help="asks for <think> and <answer>")
    add("--steps", type=int, default=0, help="rollout steps; 0: one epoch")
    add("--batch-prompts", type=int, default=128, help="prompts a step")
    add("--mini-batch-prompts", type=int, default=64, help="prompts an update; divides --batch-prompts")
    add("--group-size", type=int, default=8, help="responses a prompt (G)")
    add("--max-prompt-tokens", type=int, default=1024, help="longer prompts are dropped, and counted")
    add("--max-new-tokens", type=int, default=4096, help="a response is cut here")
    add("--temperature", type=float, default=1.0, help="of the sampler and of every log-prob")
    add("--lr", type=float, default=1e-6, help="learning rate")
    add("--warmup-steps", type=int, default=0, help="updates of linear warm-up")
    add("--optim", choices=["adamw"], default="adamw", help="optimizer")
    add("--adam-betas", type=float, nargs=2, default=(0.9, 0.999), help="AdamW's betas")
    add("--weight-decay", type=float, default=0.0, help="AdamW's decoupled weight decay")
    add("--max-grad-norm", type=float, default=1.0, help="gradient clipping; 0: none")
    add("--beta", type=float, default=0.001, help="weight of the KL to the frozen start model; 0: none is kept")
    add("--clip-low", type=float, default=0.2, help="ε_low")
    add("--clip-high", type=float, default=0.28, help="ε_high")
    add("--loss-norm", choices=["sequence", "token", "constant"], default="sequence",
        help="mean per sequence then over sequences; over all tokens; or over sequences × --max-new-tokens")
    add("--engine", choices=["hf"], default="hf", help="the sampler: this file's KV-cached loop over the hf model")
    add("--rollout-tokens", type=int, default=524288, help="tokens that are sampled at once; bounds the KV cache")
    add("--micro-batch-tokens", type=int, default=16384, help="tokens of one forward and backward pass")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of compute; auto: bfloat16 on CUDA")
    add("--reward-scheme", choices=["cgpo", "m2rl"], default="cgpo", help="+1/−0.5/−1 of the CGPO paper, or 0/1")
    add("--verifier-url", default="", help="OpenAI-compatible server of the science verifier (general-verifier)")
    add("--judge-url", default="", help="OpenAI-compatible server of the writing judge (Qwen2.5-72B-Instruct)")
    add("--sandbox-url", default="", help="SandboxFusion server that runs code instead of the local sandbox")
    add("--allow-unsafe-code", action="store_true", help="run code although this machine cannot seal it")
    add("--seed", type=int, default=0, help="keys every random number")
    add("--threads", type=int, default=0, help="CPU threads; 0: torch's choice")
    add("--out", default="", help="folder of the run (default: runs/<algorithm>-<model>-<hash of the flags>)")
    add("--resume", action="store_true", help="continue the run in --out from its last checkpoint")
    add("--save-every", type=int, default=20, help="steps between checkpoints")
    add("--eval-every", type=int, default=0, help="steps between evaluations; 0: before and after only")
    add("--eval-prompts", type=int, default=32, help="held-out prompts a domain (at most a quarter of its rows)")
    add("--eval-samples", type=int, default=4, help="sampled responses an evaluation prompt, beside a greedy one")
    add("--eval-domains", nargs="+", default=[], help="evaluate only these domains")
    add("--wandb", default="", metavar="PROJECT", help="log to Weights & Biases too")
    add_algo_arguments(parser)
    args = parser.parse_args(argv)
    if args.model == "toy":
        parser.set_defaults(**(TOY | ALGO_TOY))
        args = parser.parse_args(argv)
    for flag in ("batch_prompts", "mini_batch_prompts", "max_prompt_tokens", "max_new_tokens", "micro_batch_tokens",
                 "rollout_tokens", "save_every", "temperature", "lr"):
        if not getattr(args, flag) > 0:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must be positive")
    for flag in ("steps", "threads", "eval_prompts", "eval_samples", "eval_every", "max_grad_norm", "weight_decay",
                 "beta"):
        if not getattr(args, flag) >= 0:
            parser.error(f"--{flag.replace('_', '-')} {getattr(args, flag)}: must not be negative")
    if not all(0 <= beta < 1 for beta in args.adam_betas):
        parser.error(f"--adam-betas {args.adam_betas}: each must be in [0, 1)")
    if args.batch_prompts % args.mini_batch_prompts:
        parser.error(f"--mini-batch-prompts {args.mini_batch_prompts} does not divide --batch-prompts "
                     f"{args.batch_prompts}")
    if args.group_size < 2:
        parser.error(f"--group-size {args.group_size}: a group's advantage needs at least 2 responses")
    if not args.data:
        parser.error(f"--model {args.model} needs --data (only the toy brings its own)")
    for domain in args.eval_domains:
        if domain not in DOMAINS:
            parser.error(f"--eval-domains {domain}: not one of {' '.join(DOMAINS)}")
    return args


# ---------------- ALGO: arguments ----------------
ALGO_TOY = {}


def add_algo_arguments(parser):
    pass


# ---------------- SHARED: setup ----------------
def load_policy(name: str, dtype: str):
    """(tokenizer, Policy) with fp32 master weights, on the GPU when there is one. Raises UserError."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = data.from_pretrained(AutoTokenizer, name)
    model = data.from_pretrained(AutoModelForCausalLM, name, dtype=torch.float32).to(device).eval()  # eval: no dropout
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(f"--model {name}: its tokenizer has {len(tokenizer)} ids, its embedding fewer")
    stop = model.generation_config.eos_token_id
    stop_ids = {*(stop if isinstance(stop, list) else [stop]), tokenizer.eos_token_id} - {None}
    if not stop_ids:
        raise UserError(f"--model {name}: neither its tokenizer nor its generation config names an end token")
    bf16 = dtype == "bfloat16" or dtype == "auto" and device.type == "cuda"
    policy = Policy(model, len(tokenizer), sorted(stop_ids))
    ids_BT = torch.arange(8, device=device)[None]
    with torch.no_grad():  # the chunked head against the model's own forward pass
        ours_T = policy(ids_BT, ids_BT > 0)[0][0, 1:]
        own_TV = model(ids_BT).logits[0, :-1, :policy.vocab].log_softmax(-1)
    policy.bf16 = bf16
    if not torch.allclose(own_TV.gather(-1, ids_BT[0, 1:, None])[:, 0], ours_T, atol=1e-3):
        raise UserError(f"--model {name}: its logits are not its output head times its last hidden state (soft-capped "
                        "or scaled, as in Gemma 2 and Granite); this file's log-probs would be wrong")
    return tokenizer, policy


# ---------------- ALGO: state ----------------
def init_state(args, policy) -> dict:
    """What the algorithm keeps from step to step besides the policy: GRPO nothing."""
    return {}


# ---------------- SHARED: rollout ----------------
def sample(logits_BV, uniform_B, temperature: float):
    """(token, log-prob) a line by inverting the distribution function at `uniform`; temperature 0: the most likely."""
    logp_BV = torch.log_softmax(logits_BV.float() / (temperature or 1.0), -1)
    cdf_BV = logp_BV.double().exp().cumsum(-1)
    token_B = torch.searchsorted(cdf_BV, uniform_B[:, None] * cdf_BV[:, -1:], right=True)[:, 0] if temperature else (
        logp_BV.argmax(-1))
    return token_B, logp_BV.gather(-1, token_B[:, None])[:, 0]


@torch.no_grad()
def generate(policy, prompts_P: list[list[int]], uniform_BT, temperature: float):
    """Sample B/P responses a prompt with a KV cache. Returns tokens [B, T], their log-probs [B, T], lengths [B].

    uniform_BT: one number in [0, 1) per token, so that a sample depends on nothing but its own numbers. The prompt is
    run once for its whole group; lines that stopped leave the cache once a quarter of them have.
    """
    model, device = policy.model, policy.model.device
    (B, T), group = uniform_BT.shape, len(uniform_BT) // len(prompts_P)
    width = max(map(len, prompts_P))
    uniform_BT = uniform_BT.to(device)
    ids_PW = torch.tensor([[0] * (width - len(ids)) + ids for ids in prompts_P], device=device)
    mask_BW = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts_P], device=device)
    stop = torch.tensor(policy.stop_ids, device=device)
    tokens_BT = torch.zeros(B, T, dtype=torch.long, device=device)
    logp_BT = torch.zeros(B, T, device=device)
    length_B = torch.zeros(B, dtype=torch.long, device=device)
    with policy.autocast():
        out = model(ids_PW, attention_mask=mask_BW, position_ids=(mask_BW.cumsum(1) - 1).clamp(min=0), use_cache=True,
                    logits_to_keep=1)
        cache = getattr(out, "past_key_values", None)
        if type(cache) is not DynamicCache:
            return generate_slowly(policy, ids_PW, mask_BW, uniform_BT, temperature)
        cache.batch_repeat_interleave(group)
        logits_BV, mask_BW = (x.repeat_interleave(group, 0) for x in (out.logits[:, -1], mask_BW))
        line = torch.arange(B, device=device)                       # the sequence that each line of the cache holds
        alive = torch.ones(B, dtype=torch.bool, device=device)
        for t in range(T):
            token, logp = sample(logits_BV[:, :policy.vocab], uniform_BT[line, t], temperature)
            tokens_BT[line[alive], t] = token[alive]
            logp_BT[line[alive], t] = logp[alive]
            length_B[line[alive]] += 1
            alive &= ~torch.isin(token, stop)
            living = int(alive.sum())
            if living == 0 or t + 1 == T:
                break
            if living < 0.75 * len(alive):
                cache.batch_select_indices(alive.nonzero()[:, 0])
                line, token, mask_BW, alive = line[alive], token[alive], mask_BW[alive], alive[alive]
            mask_BW = torch.cat([mask_BW, mask_BW.new_ones(len(mask_BW), 1)], 1)
            logits_BV = model(token[:, None], attention_mask=mask_BW, position_ids=mask_BW.sum(1, keepdim=True) - 1,
                              past_key_values=cache, use_cache=True).logits[:, -1]
    return tokens_BT, logp_BT, length_B


def generate_slowly(policy, ids_PW, mask_PW, uniform_BT, temperature: float):
    """The same by transformers' generate, for architectures whose cache is not a plain KV cache (Mamba, hybrids)."""
    (B, T), width = uniform_BT.shape, ids_PW.shape[1]
    logp_BT = torch.zeros(B, T, device=ids_PW.device)

    class Inverse(LogitsProcessor):
        def __call__(self, ids, scores):
            t = ids.shape[1] - width
            token, logp_BT[:, t] = sample(scores[:, :policy.vocab], uniform_BT[:, t], temperature)
            return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)
    ids_BW, mask_BW = (x.repeat_interleave(B // len(x), 0) for x in (ids_PW, mask_PW))
    out = policy.model.generate(ids_BW, attention_mask=mask_BW, logits_processor=[Inverse()], max_new_tokens=T,
                                do_sample=False, eos_token_id=policy.stop_ids, pad_token_id=policy.stop_ids[0])
    tokens_BT = torch.nn.functional.pad(out[:, width:], (0, T - (out.shape[1] - width)))
    stopped_BT = torch.isin(tokens_BT, torch.tensor(policy.stop_ids, device=ids_PW.device))
    length_B = torch.where(stopped_BT.any(1), stopped_BT.int().argmax(1) + 1, T)
    return tokens_BT, logp_BT * (torch.arange(T, device=ids_PW.device) < length_B[:, None]), length_B


def rollout(policy, tokenizer, rows_P: list[dict], group: int, key: tuple, temperature: float, args):
    """(batch, samples, seconds): `group` responses a row, scored. key: (seed, step or purpose) of the random numbers.

    batch: one line per response, see the comments. samples: what samples.jsonl shows.
    """
    copies = Counter()
    uniform = []
    for row in rows_P:  # a row that comes twice goes on with its stream of samples: it never repeats one
        first = copies[row["id"]] * group
        copies[row["id"]] += 1
        uniform += [rng(*key, row["id"], i, "sample").random(args.max_new_tokens) for i in range(first, first + group)]
    clock = [time.perf_counter()]
    tokens, logps, lengths = [], [], []
    at_once = max(1, args.rollout_tokens // (group * (args.max_prompt_tokens + args.max_new_tokens)))
    for p in range(0, len(rows_P), at_once):  # prompts
        numbers_BT = torch.tensor(np.stack(uniform[p * group:(p + at_once) * group]))
        parts = generate(policy, [row["ids"] for row in rows_P[p:p + at_once]], numbers_BT, temperature)
        for whole, part in zip((tokens, logps, lengths), parts):
            whole += part.tolist()
    clock.append(time.perf_counter())
    rows_B = [row for row in rows_P for _ in range(group)]
    responses = [ids[:n] for ids, n in zip(tokens, lengths)]
    texts = [row["opened"] + tokenizer.decode(ids, skip_special_tokens=True) for row, ids in zip(rows_B, responses)]
    scores = rewards.score(texts, rows_B, args.reward_scheme, args.verifier_url, args.judge_url, args.sandbox_url,
                           lambda text: len(tokenizer(text, add_special_tokens=False).input_ids))
    clock.append(time.perf_counter())
    whole = [row["ids"] + ids for row, ids in zip(rows_B, responses)]
    T = max(map(len, whole))

    def padded(lists, fill):
        return torch.tensor([line + [fill] * (T - len(line)) for line in lists])
    batch = {"ids": padded(whole, 0),                                           # [B, T] prompt, response, right padding
             "mask": padded([[0] * len(row["ids"]) + [1] * n for row, n in zip(rows_B, lengths)], 0).bool(),
             "sampler_logp": padded([[0.0] * len(r["ids"]) + lp[:n] for r, lp, n in zip(rows_B, logps, lengths)], 0.0),
             "length": torch.tensor([len(line) for line in whole]),
             "truncated": torch.tensor([ids[-1] not in policy.stop_ids for ids in responses]),
             "group": torch.arange(len(rows_P)).repeat_interleave(group),
             "domain": torch.tensor([DOMAINS.index(row["domain"]) for row in rows_B]),
             "reward": torch.tensor([np.nan if s.reward is None else s.reward for s in scores]).double(),
             "correct": torch.tensor([bool(s.correct) for s in scores]),
             "valid": torch.tensor([s.valid for s in scores])}
    samples = [{"id": row["id"], "domain": row["domain"], "prompt": tokenizer.decode(row["ids"]), "response": text,
                "reward": s.reward, "verdict": s.why} for row, text, s in zip(rows_B, texts, scores)]
    return batch, samples, {"rollout": clock[1] - clock[0], "reward": clock[2] - clock[1]}


def evaluate(policy, tokenizer, rows: list[dict], args) -> dict[str, float]:
    """Accuracy on held-out prompts by domain: eval/sampled/<d> (--eval-samples at --temperature) and eval/greedy/<d>.

    The random numbers do not depend on the step, so that before and after differ by the policy alone.
    """
    found = {}
    for name, group, temperature in (("sampled", args.eval_samples, args.temperature), ("greedy", 1, 0.0)):
        if not rows or not group:
            continue
        batch, _, _ = rollout(policy, tokenizer, rows, group, (args.seed, "evaluation"), temperature, args)
        known = ~batch["reward"].isnan()
        for k in batch["domain"].unique().tolist():
            mine = known & (batch["domain"] == k)
            if mine.any():
                found[f"eval/{name}/{DOMAINS[k]}"] = batch["correct"][mine].double().mean().item()
    return found


# ---------------- SHARED: log-probs ----------------
class Policy(torch.nn.Module):
    """A causal LM whose forward gives the response's log-probs; vocabulary-sized logits exist only in chunks."""

    def __init__(self, model, vocab: int, stop_ids: list[int], bf16: bool = False, temperature: float = 1.0):
        super().__init__()
        self.model, self.vocab, self.stop_ids, self.bf16, self.temperature = model, vocab, stop_ids, bf16, temperature

    def autocast(self):
        """bf16 compute on fp32 master weights."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bf16)

    def head(self, hidden_NH, target_N):
        """(log-prob of each target, entropy), over the tokenizer's ids only: a model may have more rows than that."""
        with self.autocast():
            logits_NV = self.model.get_output_embeddings()(hidden_NH)[:, :self.vocab]
        at_least_fp32 = torch.promote_types(logits_NV.dtype, torch.float32)
        logp_NV = torch.log_softmax(logits_NV.to(at_least_fp32) / self.temperature, -1)
        with torch.no_grad():
            entropy_N = -(logp_NV.exp() * logp_NV).sum(-1)
        return logp_NV.gather(-1, target_N[:, None])[:, 0], entropy_N

    def forward(self, ids_BT, mask_BT):
        """(logp_BT, entropy_BT, mean_h_BH). logp[b, t] is log π(ids[b, t] | ids[b, <t]) where mask, 0 elsewhere.

        mean_h is the mean of the last hidden layer over the response. Right padding needs no attention mask: causal
        attention never sees it.
        """
        with self.autocast():
            hidden_BTH = self.model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
        where = mask_BT[:, 1:]
        hidden_NH, target_N = hidden_BTH[:, :-1][where], ids_BT[:, 1:][where]
        chunk = max(1, 2**26 // self.vocab)
        parts = [checkpoint(self.head, h, y, use_reentrant=False) if torch.is_grad_enabled() else self.head(h, y)
                 for h, y in zip(hidden_NH.split(chunk), target_N.split(chunk))]
        found = []
        for values_N in map(torch.cat, zip(*parts)):
            values_BT = values_N.new_zeros(ids_BT.shape)
            values_BT[:, 1:][where] = values_N
            found.append(values_BT)
        mean_h_BH = (hidden_BTH * mask_BT[..., None]).sum(1) / mask_BT.sum(1, keepdim=True)
        return found[0], found[1], mean_h_BH


def take(batch: Batch, index, device=None) -> Batch:
    """Some lines of a batch, cut to their longest."""
    longest = int(batch["length"][index].max())
    return {k: (v[index][:, :longest] if v.ndim == 2 else v[index]).to(device or v.device) for k, v in batch.items()}


def micro_batches(length_B, budget: int) -> list[torch.Tensor]:
    """Line numbers, sorted by length, in pieces whose padded size is at most `budget` tokens (or one line)."""
    pieces, piece = [], []
    for i in length_B.argsort(stable=True).tolist():
        if piece and (len(piece) + 1) * int(length_B[i]) > budget:
            pieces.append(torch.tensor(piece))
            piece = []
        piece.append(i)
    return [*pieces, torch.tensor(piece)]


@torch.no_grad()
def log_probs(policy, batch: Batch, args) -> torch.Tensor:
    """logp_BT of a whole batch, on the CPU."""
    logp_BT = torch.zeros(batch["ids"].shape)
    for index in micro_batches(batch["length"], args.micro_batch_tokens):
        micro = take({k: batch[k] for k in ("ids", "mask", "length")}, index, policy.model.device)
        logp_BT[index, :micro["ids"].shape[1]] = policy(micro["ids"], micro["mask"])[0].cpu().float()
    return logp_BT


# ---------------- ALGO: advantages ----------------
def advantages(batch: Batch, args) -> torch.Tensor:
    """[B, T]: A_i = (r_i − mean r)/(std r + 1e-6) over the responses of one prompt, the same for every token.

    An all-equal group gives exactly 0; a response without a reward (NaN: its verifier failed) gets 0 and leaves the
    group's mean and std.
    """
    advantage_B = torch.zeros(len(batch["reward"]), dtype=torch.float64)
    for g in batch["group"].unique():
        mine = (batch["group"] == g) & ~batch["reward"].isnan()
        reward_G = batch["reward"][mine]
        if len(reward_G) > 1 and reward_G.min() < reward_G.max():
            advantage_B[mine] = (reward_G - reward_G.mean()) / (reward_G.std() + 1e-6)
    return advantage_B[:, None].float() * batch["mask"]


# ---------------- ALGO: loss ----------------
def policy_loss(logp_BT, micro: Batch, args):
    """(loss_BT, {statistic: [B, T]}): the clipped surrogate and the KL of the header, token by token."""
    ratio_BT = torch.exp(logp_BT - micro["old_logp"])
    clipped_BT = ratio_BT.clamp(1 - args.clip_low, 1 + args.clip_high)
    surrogate_BT = torch.minimum(ratio_BT * micro["advantage"], clipped_BT * micro["advantage"])
    stats = {"clip_fraction": surrogate_BT < ratio_BT * micro["advantage"]}
    if not args.beta:
        return -surrogate_BT, stats
    log_ratio_BT = micro["ref_logp"] - logp_BT
    kl_BT = torch.exp(log_ratio_BT) - log_ratio_BT - 1
    return -surrogate_BT + args.beta * kl_BT, stats | {"kl": kl_BT}


# ---------------- SHARED: backward ----------------
def token_weights(batch: Batch, args) -> torch.Tensor:
    """w_BT with loss = Σ w·loss_BT. The denominators are counted here, over all rows given, before any forward pass."""
    mask_BT = batch["mask"].double()
    if args.loss_norm == "token":
        return mask_BT / mask_BT.sum()
    per_row_B1 = mask_BT.sum(1, keepdim=True) if args.loss_norm == "sequence" else args.max_new_tokens
    return mask_BT / per_row_B1 / len(mask_BT)


def backward(policy, batch: Batch, args) -> dict[str, float]:
    """Add ∂loss/∂θ of these rows to .grad, micro-batch by micro-batch. Returns token means of the statistics."""
    batch = batch | {"weight": token_weights(batch, args)}
    totals = Counter({"tokens": int(batch["mask"].sum()), "loss": 0.0})
    for index in micro_batches(batch["length"], args.micro_batch_tokens):
        micro = take(batch, index, policy.model.device)
        logp_BT, entropy_BT, _ = policy(micro["ids"], micro["mask"])
        loss_BT, stats = policy_loss(logp_BT, micro, args)
        loss = (loss_BT * micro["weight"]).sum()
        loss.backward()
        totals["loss"] += loss.item()
        for name, value_BT in (stats | {"entropy": entropy_BT}).items():
            totals[name] += (value_BT.detach() * micro["mask"]).sum().item() / int(batch["mask"].sum())
    return dict(totals)


def optimizer_step(policy, optimizer, lr: float, args) -> float:
    """Clip, step with this learning rate, clear the gradients. Returns the norm before clipping."""
    norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm or float("inf")).item()
    if not torch.isfinite(torch.tensor(norm)):
        raise UserError(f"the gradient's norm is {norm}: the run diverged; lower --lr (was {lr:g}) and --resume")
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def mean_stats(parts: list[dict]) -> dict[str, float]:
    """Mean of statistics over updates, weighted by their tokens."""
    total = sum(part["tokens"] for part in parts)
    names = dict.fromkeys(name for part in parts for name in part if name != "tokens")
    means = {name: sum(p[name] * p["tokens"] for p in parts if name in p) / sum(p["tokens"] for p in parts if name in p)
             for name in names}
    return means | {"tokens": total}


# ---------------- ALGO: update ----------------
def update(policy, optimizer, batch: Batch, lr: float, key: tuple, state: dict, args) -> dict[str, float]:
    """One optimizer step on one mini-batch, all domains together. key: (seed, step, mini-batch)."""
    stats = backward(policy, batch, args)
    return stats | {"grad_norm": optimizer_step(policy, optimizer, lr, args)}


# ---------------- SHARED: checkpoint and logs ----------------
def save_checkpoint(out: Path, step: int, policy, tokenizer, optimizer, state: dict) -> None:
    """out/checkpoint: a model folder that from_pretrained opens, plus trainer.pt; a kill leaves the last whole one."""
    def write(folder):
        policy.model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        kept = {k: v.state_dict() if hasattr(v, "state_dict") else v for k, v in state.items()}
        torch.save({"step": step, "optimizer": optimizer.state_dict(), "state": kept}, folder / "trainer.pt")
    data.save_folder(out / "checkpoint", f"{step:06d}", write)


def load_trainer(folder: Path, optimizer, state: dict) -> int:
    """Restore the optimizer and the algorithm's state; returns the last finished step."""
    saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    for name, value in saved["state"].items():
        if hasattr(state[name], "load_state_dict"):
            state[name].load_state_dict(value)
        else:
            state[name] = value
    return saved["step"]


# ---------------- SHARED: main ----------------
def main(argv: list[str] | None = None) -> Path:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    name = data.toy_folder() if args.model == "toy" else data.resolve_model(args.model)
    tokenizer, policy = load_policy(name, args.dtype)
    policy.temperature = args.temperature
    context = getattr(policy.model.config, "max_position_embeddings", 1 << 30)
    train_rows, eval_rows = data.train_and_eval_rows(args, tokenizer, context)
    rewards.sandbox.UNSAFE = args.allow_unsafe_code
    rewards.check_rows(train_rows + eval_rows, args.judge_url, args.sandbox_url)
    mix = data.domain_mix(train_rows, args.domain_mix)
    steps = args.steps or max(1, len(train_rows) // args.batch_prompts)
    minis = args.batch_prompts // args.mini_batch_prompts
    out = data.open_run(args, ALGORITHM)
    reference = copy.deepcopy(policy).requires_grad_(False) if args.beta else None
    if args.resume and (out / "checkpoint").exists():
        saved = AutoModelForCausalLM.from_pretrained(out / "checkpoint", dtype=torch.float32)
        policy.model.load_state_dict(saved.state_dict())
        del saved
    optimizer = torch.optim.AdamW(policy.parameters(), args.lr, args.adam_betas, weight_decay=args.weight_decay)
    state = init_state(args, policy)
    start = load_trainer(out / "checkpoint", optimizer, state) if args.resume and (out / "checkpoint").exists() else 0
    log = data.RunLog(out, start, args)
    print(f"{ALGORITHM} · {args.model} ({sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters, "
          f"{policy.model.device.type}, {'bf16' if policy.bf16 else 'fp32'} compute) · engine {args.engine} · {out}")
    print(f"{args.batch_prompts} prompts × {args.group_size} samples = {args.batch_prompts * args.group_size} "
          f"responses a step; {minis} mini-batch(es) of {args.mini_batch_prompts} prompts; {steps} steps = "
          f"{steps * minis} updates; 1 rank; {len(train_rows)} training and {len(eval_rows)} held-out prompts")
    print("mix " + ", ".join(f"{domain} {share:.2f}" for domain, share in mix.items())
          + (f"; resumed after step {start}" if start else ""))
    if not log.lines:
        log.write({"step": 0} | evaluate(policy, tokenizer, eval_rows, args))
    started = time.perf_counter()
    stream = islice(data.batches(train_rows, args.batch_prompts, mix, args.seed), start, steps)
    for step, rows in enumerate(stream, start + 1):
        key = (args.seed, step)
        batch, samples, seconds = rollout(policy, tokenizer, rows, args.group_size, key, args.temperature, args)
        clock = time.perf_counter()
        batch["advantage"] = advantages(batch, args)
        batch["old_logp"] = log_probs(policy, batch, args)
        if reference:
            batch["ref_logp"] = log_probs(reference, batch, args)
        mismatch_N = (batch["old_logp"] - batch["sampler_logp"]).abs()[batch["mask"]]
        seconds["logprobs"] = time.perf_counter() - clock
        stats = []
        for m in range(minis):
            mine = (batch["group"] // args.mini_batch_prompts == m) & ~batch["reward"].isnan()
            if mine.any():  # every verifier call may have failed
                done = (step - 1) * minis + m + 1
                lr = args.lr * min(1.0, done / max(1, args.warmup_steps))
                stats.append(update(policy, optimizer, take(batch, mine), lr, (*key, m), state, args))
        seconds["update"] = time.perf_counter() - clock - seconds["logprobs"]
        tokens = int(batch["mask"].sum())
        line = {"step": step, **{f"seconds/{k}": v for k, v in seconds.items()}, "tokens": tokens,
                "tokens_per_s": tokens / seconds["rollout"], **analyze.domain_metrics(batch), **mean_stats(stats),
                "mismatch/mean": mismatch_N.mean().item(), "mismatch/max": mismatch_N.max().item()}
        if step == steps or args.eval_every and step % args.eval_every == 0:
            line |= evaluate(policy, tokenizer, eval_rows, args)
        verdicts = Counter(f"{s['domain']}: {s['verdict'].split()[0].rstrip(':')}" for s in samples)
        log.write(line | {"verdicts": verdicts}, [{"step": step, **s} for s in samples[::max(1, len(samples) // 20)]])
        print(analyze.live_line(line, steps, time.perf_counter() - started, step - start), flush=True)
        if step % args.save_every == 0 or step == steps:
            save_checkpoint(out, step, policy, tokenizer, optimizer, state)
    print(analyze.closing_table(log.lines))
    analyze.plot_curves(log.lines, out / "curves.png", f"{ALGORITHM} on {args.model}")
    peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    print(f"peak memory {peak / 2**30:.2f} GiB · curves {out / 'curves.png'} · samples {out / 'samples.jsonl'} · "
          f"model {out / 'checkpoint'}")
    return out


if __name__ == "__main__":
    data.run_main(main)
