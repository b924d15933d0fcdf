"""grpo.py beside TRL's GRPOTrainer: seconds per step, in one process.

    python -m studies.bench speed --model peer --peer trl       a GPT-2 of 4 layers and width 128
    python -m studies.bench speed --model smollm2 --peer trl    SmolLM2-135M

Both train in float32 on the same prompts, with responses of a forced length, one update per step by
AdamW and beta 0.001. Both train on random rewards; grpo.py also runs its own checkers.
"""

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2LMHeadModel, TrainerCallback

import data
import grpo
from common import ranks
from common.errors import UserError
from common.formats import asking_for
from common.keys import rng
from sources.models import resolve_model
from sources.real import real_rows
from sources.toy import toy_rows, toy_tokenizer
from studies.bench_speed import training_args
from studies.shapes import config_of

PROMPTS, GROUP = 8, 8
TUNED = {  # a GPT-2's settings: no dropout, a fused GELU
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "activation_function": "gelu_pytorch_tanh",
}


@dataclass
class Work:
    """What both sides do."""

    folder: str  # the model
    tokenizer: object
    rows: list[dict]  # the prompts
    system: str  # the system prompt
    new_tokens: int  # per response
    steps: int
    warm_up: int  # first steps that do not count

    def median(self, seconds: list[float]) -> float:
        """The median seconds of the steps that count."""
        counted = sorted(seconds[self.warm_up :])
        return counted[len(counted) // 2]


def random_gpt2(folder: str, tuned: bool) -> Work:
    """A small GPT-2 with random weights, and prompts of the toy."""
    torch.manual_seed(0)
    config = config_of("peer")
    if tuned:
        config.update(TUNED)
    tokenizer = toy_tokenizer()
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    rows = [row for row in toy_rows() if row["domain"] == "if"][:PROMPTS]
    return Work(folder, tokenizer, rows, "", new_tokens=48, steps=16, warm_up=2)


def smollm2() -> Work:
    """SmolLM2-135M, and prompts of --data real."""
    folder = resolve_model("smollm2-raw")
    rows = [row for row in real_rows() if row["domain"] == "if"][:PROMPTS]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return Work(folder, tokenizer, rows, asking_for("text"), new_tokens=64, steps=6, warm_up=1)


class StepClock(TrainerCallback):
    """A transformers Trainer's callback that records the seconds of each step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.started)
        print(f"  trl step {len(self.seconds)}: {self.seconds[-1]:.1f} s", flush=True)


def measure_trl(args, tuned: bool) -> dict:
    """{"peer", "trl step s", "our step s", "ours/trl"}: medians, without the first steps.

    tuned: without dropout and gradient checkpointing, and with a fused GELU; else TRL's defaults.
    Raises UserError if TRL is not installed.
    """
    try:
        import datasets
        import trl
    except ImportError as error:
        raise UserError(f"--peer trl: {error}: pip install trl datasets accelerate") from error
    draw = rng("peer")
    with tempfile.TemporaryDirectory() as folder:
        if args.model == ["smollm2"]:
            work = smollm2()
        else:
            work = random_gpt2(folder, tuned)
        settings = trl_settings(work, tuned, str(Path(folder) / "trl"))
        flags = our_flags(work)
        print(f"TRL {trl.__version__}: {settings}\ngrpo.py: {' '.join(flags)}", flush=True)
        trl_seconds = time_trl(trl, datasets, work, settings, draw)
        our_seconds = time_ours(args, work, flags, draw)
    trl_s, our_s = work.median(trl_seconds), work.median(our_seconds)
    return {
        "peer": f"trl {trl.__version__}, {'tuned' if tuned else 'as it comes'}",
        "trl step s": trl_s,
        "our step s": our_s,
        "ours/trl": our_s / trl_s,
    }


def trl_settings(work: Work, tuned: bool, out: str) -> dict:
    """The arguments of trl.GRPOConfig."""
    settings = {
        "output_dir": out,
        "per_device_train_batch_size": PROMPTS * GROUP,
        "num_generations": GROUP,
        "max_steps": work.steps,
        "max_completion_length": work.new_tokens,
        "beta": 0.001,
        "learning_rate": 1e-5,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10 * work.steps,  # never
        "generation_kwargs": {"min_new_tokens": work.new_tokens},
    }
    if tuned:
        settings["gradient_checkpointing"] = False
    return settings


def our_flags(work: Work) -> list[str]:
    """grpo.py's flags for the same work."""
    flags = ["--max-new-tokens", work.new_tokens, "--max-prompt-tokens", 128]
    flags += ["--group-size", GROUP, "--batch-prompts", PROMPTS, "--mini-batch-prompts", PROMPTS]
    return [str(flag) for flag in [*flags, "--beta", 0.001, "--lr", 1e-5]]


def time_trl(trl, datasets, work: Work, settings: dict, draw) -> list[float]:
    """Seconds of each of TRL's steps.

    trl, datasets: the modules, which are optional. draw: the generator of the rewards.
    """
    prompts = []
    for row in work.rows:
        if work.system:  # as a conversation, which TRL gives to the chat template
            messages = data.add_system(data.to_messages(row), work.system)
            prompts.append({"prompt": messages})
        else:
            prompts.append({"prompt": row["prompt"]})
    clock = StepClock()
    trainer = trl.GRPOTrainer(
        model=work.folder,
        processing_class=work.tokenizer,
        args=trl.GRPOConfig(**settings),
        callbacks=[clock],
        train_dataset=datasets.Dataset.from_list(prompts * work.steps),
        reward_funcs=lambda completions, **_: draw.random(len(completions)).tolist(),
    )
    trainer.train()
    return clock.seconds


def time_ours(args, work: Work, flags: list[str], draw) -> list[float]:
    """Seconds of each step of grpo.py."""
    ranks.start()
    train_args = training_args(args, *flags)
    _, policy = grpo.load_policy(work.folder, "float32")
    _, reference = grpo.load_policy(work.folder, "float32")
    policy.stop_ids = [-1]  # no token ends a response
    ranks.place(policy, train_args)
    policy.reference = [ranks.place(reference.requires_grad_(False), train_args, frozen=True)]
    optimizer = ranks.make_optimizer(policy, train_args)
    limit = train_args.max_prompt_tokens
    rows = data.encode_prompts(work.rows, work.tokenizer, work.system, limit)
    seconds = []
    for step in range(work.steps):
        started = time.perf_counter()
        batch, _, _, _ = grpo.rollout(
            policy, work.tokenizer, rows, GROUP, (0, step), 1.0, train_args
        )
        # Random weights earn nothing, and an update needs rewards that differ.
        batch["reward"] = torch.from_numpy(draw.random(PROMPTS * GROUP))
        grpo.add_log_probs(policy, batch, train_args)
        batch["importance"] = grpo.importance_weights(batch, train_args)
        batch["advantage"] = grpo.advantages(batch, {}, train_args)
        grpo.update(policy, optimizer, batch, 1e-5, (0, step, 0), {}, train_args)
        seconds.append(time.perf_counter() - started)
        print(f"  our step {step + 1}: {seconds[-1]:.1f} s", flush=True)
    return seconds
