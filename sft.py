"""Supervised fine-tuning, the warm start: minimises −mean log π(response | prompt) over tokens.

A row (common/rows.py) needs a "response". The token that ends the response is trained too.

    python sft.py --model Qwen2.5-0.5B --data demonstrations.jsonl --steps 500
    python sft.py --model Qwen3-4B-Base --data blend.jsonl --lr 5e-5 --weight-decay 0.1 \\
        --warmup-share 0.1 --batch-rows 512 --max-tokens 32768    # the M2RL paper's, one epoch
    python sft.py --model smollm2-raw --format-warmup --out runs/warm    # the format alone
    python sft.py --model toy     # builds the toy, which every script does when it is missing

Suffixes: B sequences, T tokens.
"""

import math
import os
import re
import time
from functools import partial

import torch

import data
from common import checkpoints, cli, ranks, runs, sampler
from common.errors import UserError
from common.formats import in_form, system_prompt
from common.keys import rng
from common.models import context_of
from data import micro_batches, take
from grpo import load_policy
from sources.load import load_rows
from sources.models import resolve_model


def encode(rows: list[dict], tokenizer, limit: int) -> dict[str, torch.Tensor]:
    """A batch: {"ids" [B, T], "mask" [B, T], "length" [B]}, padded on the right.

    The mask covers the response and its end token. A sequence is cut after `limit` tokens.
    """
    ids_B, mask_B = [], []
    for row in rows:
        text = without_opened(row["response"], row["opened"])
        response = tokenizer(text, add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
        ids_B.append((row["ids"] + response)[:limit])
        mask_B.append(([False] * len(row["ids"]) + [True] * len(response))[:limit])
    T = max(len(ids) for ids in ids_B)
    return {
        "ids": torch.tensor([ids + [0] * (T - len(ids)) for ids in ids_B]),
        "mask": torch.tensor([mask + [False] * (T - len(mask)) for mask in mask_B]),
        "length": torch.tensor([len(ids) for ids in ids_B]),
    }


def without_opened(response: str, opened: str) -> str:
    """The response without what its prompt ends with already, in whatever white space."""
    if not opened:
        return response
    tags = r"\s*".join(map(re.escape, opened.split()))
    end = r"\s*" if opened[-1].isspace() else ""
    return re.sub(rf"^\s*{tags}{end}", "", response)


def train(
    policy,
    tokenizer,
    rows: list[dict],
    steps: int,
    batch_rows: int,
    lr: float,
    warmup_steps: int,
    seed: int,
    micro_batch_tokens: int,
    limit: int,
    betas=(0.9, 0.98),
    weight_decay: float = 0.0,
) -> None:
    """Train the policy in place for `steps` updates, and print the progress.

    AdamW with linear warm-up, then linear decay to 0; the gradient's norm is clipped to 1.
    limit: tokens per sequence. Raises UserError if the gradient's norm is not finite.
    """
    optimizer = torch.optim.AdamW(policy.parameters(), lr, betas, weight_decay=weight_decay)
    batches = data.batches(rows, batch_rows, data.domain_mix(rows, ""), seed)
    started = time.perf_counter()
    for step, step_rows in zip(range(1, steps + 1), batches):
        batch = encode(step_rows, tokenizer, limit)
        tokens = batch["mask"].sum()
        mean_loss = 0.0  # over the batch's response tokens
        for index in micro_batches(batch, micro_batch_tokens):
            micro = take(batch, index, policy.device)
            logp_BT, _ = policy(micro["ids"], micro["mask"])
            loss = -logp_BT.sum() / tokens
            loss.backward()
            mean_loss += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise UserError(
                f"the gradient's norm is {norm.item()} at step {step}: lower --lr (was {lr:g})"
            )
        warmup = step / max(1, warmup_steps)
        decay = 1 - (step - 1) / steps
        for group in optimizer.param_groups:
            group["lr"] = lr * min(warmup, decay)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % max(1, steps // 20) == 0 or step == steps:
            spent = time.perf_counter() - started
            left = spent / step * (steps - step)
            progress = f"sft step {step:5d}/{steps}  loss {mean_loss:.3f}"
            print(f"  {progress}  {spent:.0f} s, {left:.0f} s left", flush=True)


# ---------------- the warm start: rows in the format ----------------

WARM_UP = {"steps": 16, "batch_rows": 16, "lr": 5e-5, "warmup_steps": 3, "max_tokens": 512}
THOUGHT = "I answer as asked."  # of a row without a "thought"
OWN_ANSWER_TOKENS = 64  # of an answer that the model gives itself


def format_rows(args, tokenizer, policy) -> list[dict]:
    """Rows of --data with a "response" in the form that --reward-format pays (common/formats.py).

    The answer is the row's reference: its "answer", "reference" or "solution". A row that has none
    of them gets the model's own greedy answer to the bare prompt, right or wrong: what is taught is
    the form. A quarter of each domain's prompts is left out, among them all that a run may hold out
    for evaluation.
    """
    training, _ = data.hold_out(load_rows(args.data), per_domain=10**9)
    training = data.select_domains(training, args.domains)
    domains = data.domain_mix(training, "equal")
    count = math.ceil(args.steps * args.batch_rows / len(domains))  # rows per domain
    chosen = []
    for domain in domains:
        rows = data.select_domains(training, [domain])
        order = rng(args.seed, "format warm-up", domain).permutation(len(rows))[:count]
        chosen += [rows[i] for i in order]
    without = [row for row in chosen if not reference_answer(row)]
    own = own_answers(without, tokenizer, policy) if without else {}
    print(
        f"format warm-up: {len(chosen)} rows of {', '.join(domains)}; {len(without)} answers are "
        "the model's own"
    )
    warm = []
    for row in chosen:
        answer = reference_answer(row) or own[row["id"]]
        response = in_form(row, row.get("thought", THOUGHT), answer, args.reward_format)
        warm.append({**row, "response": response})
    return warm


def reference_answer(row: dict) -> str:
    """What the row itself holds as an answer; "" if it holds none."""
    if row["domain"] in ("math", "science"):
        return row.get("answer", "")
    if row["domain"] == "writing":
        return row.get("reference", "")
    return row.get("solution", "")


def own_answers(rows: list[dict], tokenizer, policy) -> dict[str, str]:
    """{row's id: the model's greedy answer to the row's prompt}, without a system prompt."""
    encoded = data.encode_prompts(rows, tokenizer, "", limit=1 << 30)
    uniform_BT = torch.zeros(len(encoded), OWN_ANSWER_TOKENS, dtype=torch.float64)
    prompts = [row["ids"] for row in encoded]
    responses = sampler.generate(policy, prompts, uniform_BT, temperature=0)
    texts = data.response_texts(encoded, [tokens for tokens, _, _ in responses], tokenizer)
    answers = {}
    for row, text, (_, _, truncated) in zip(encoded, texts, responses):
        if truncated:  # a text that stops in the middle of a sentence teaches to stop there
            text = re.sub(r"[^.!?]*$", "", text) or text
        text = text.rpartition("</think>")[2]  # of a model that has the format already
        answers[row["id"]] = re.sub(r"</?(?:think|answer)>", "", text).strip()
    return answers


# ---------------- the command ----------------


def parse_args(argv: list[str] | None = None):
    """The flags, checked. A wrong flag ends in parser.error."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    warm_up = " ".join(f"--{name.replace('_', '-')} {x:g}" for name, x in WARM_UP.items())
    add("--steps", type=cli.natural, default=0, help="number of updates; 0: one epoch")
    add("--batch-rows", type=cli.positive_int, default=64, help="rows per update")
    add(
        "--max-tokens",
        type=cli.positive_int,
        default=4096,
        help="prompt and response together are cut after this many tokens",
    )
    add(
        "--data",
        nargs="+",
        default=[],
        help='.jsonl files of rows with a "response", or folders; with --format-warmup, what a '
        "training takes as --data (default for smollm2-raw: real)",
    )
    add(
        "--format-warmup",
        action="store_true",
        help="teach only the form that --reward-format pays, by the prompts of --data and their "
        f"reference answers; its defaults: {warm_up}",
    )
    add(
        "--warmup-share",
        type=cli.fraction,
        default=0.0,
        help="warm up over this share of the updates, instead of --warmup-steps",
    )
    cli.add_flags(
        parser,
        "--model",
        "--domains",
        "--system-prompt",
        "--reward-format",
        "--max-prompt-tokens",
        "--lr",
        "--warmup-steps",
        "--weight-decay",
        "--micro-batch-tokens",
        "--dtype",
        "--seed",
        "--out",
        lr=1e-5,
        warmup_steps=30,
    )
    args = parser.parse_args(argv)
    if args.format_warmup:  # parse again, so that flags that were given still win
        parser.set_defaults(**WARM_UP)
        args = parser.parse_args(argv)
        if args.model in ("smollm2", "smollm2-raw") and not args.data:
            args.data = ["real"]
    if args.model != "toy" and not args.data:
        parser.error(f"--model {args.model} needs --data")
    if args.model == "toy" and (args.data or args.steps or args.out):
        parser.error(
            "--model toy only builds the toy; to train it further, give the folder that this "
            "prints as --model"
        )
    args.resume = False  # a run of this script is not resumed
    return args


def encode_rows(args, tokenizer, policy, limit: int) -> list[dict]:
    """The rows to train on with their prompts' tokens. Raises UserError."""
    if args.format_warmup:
        rows = format_rows(args, tokenizer, policy)
    else:
        rows = load_rows(args.data, args.domains)
    for row in rows:
        if not isinstance(row.get("response"), str):
            raise UserError(f'row {row["id"]}: field "response" is missing (sft.py trains on it)')
    longest = min(args.max_prompt_tokens, limit - 1)  # room for a token of the response
    return data.encode_prompts(rows, tokenizer, partial(system_prompt, args=args), longest)


def main(argv: list[str] | None = None) -> str:
    """Train as the flags say, and save. Returns the checkpoint's folder. Raises UserError."""
    args = parse_args(argv)
    name = resolve_model(args.model)
    if args.model == "toy":
        print(f"toy model: {name}")
        return name
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("sft.py runs in one process: leave torchrun out")
    out = runs.open_run(args, "sft", write=False)  # fail early if the folder is taken
    ranks.start()
    tokenizer, policy = load_policy(name, args.dtype)
    policy.device = ranks.device()
    policy.to(policy.device)
    context, _ = context_of(policy.model.config)
    limit = min(args.max_tokens, context)
    if tokenizer.eos_token_id is None:
        raise UserError(f"--model {name}: its tokenizer names no end token to train on")
    rows = encode_rows(args, tokenizer, policy, limit)
    data.check_ids(rows, policy.vocab)
    steps = args.steps or max(1, len(rows) // args.batch_rows)
    warmup = round(args.warmup_share * steps) or args.warmup_steps
    print(
        f"sft · {args.model} · {len(rows)} rows · {steps} updates of {args.batch_rows} rows, "
        f"{warmup} to warm up · {out}"
    )
    runs.open_run(args, "sft")
    checkpoints.check_saving(out, policy, tokenizer, optim="")
    train(
        policy,
        tokenizer,
        rows,
        steps=steps,
        batch_rows=args.batch_rows,
        lr=args.lr,
        warmup_steps=warmup,
        seed=args.seed,
        micro_batch_tokens=args.micro_batch_tokens,
        limit=limit,
        weight_decay=args.weight_decay,
    )

    def write(folder):  # nothing resumes this run, so its optimizer is not kept
        checkpoints.save_model(folder, policy.model, tokenizer, policy.model.named_parameters())

    checkpoints.save_folder(out / "checkpoint", f"{steps:06d}", write)
    print(f"model {out / 'checkpoint'}")
    return str(out / "checkpoint")


if __name__ == "__main__":
    cli.run_main(main, "the same command begins anew")
