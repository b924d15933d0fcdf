"""grpo.py beside TRL's GRPOTrainer: seconds per step, in one process.

`python -m studies.bench speed --model peer --peer trl` runs it. Both train a GPT-2 of 4 layers and
width 128 in float32. A step has 8 prompts × 8 samples × 48 new tokens (the length is forced) and
one update with AdamW and beta 0.001. Both train on random rewards; grpo.py also runs the toy's
checker.
"""

import tempfile
import time

import torch
from transformers import GPT2LMHeadModel, TrainerCallback

import data
import grpo
from common import ranks
from common.errors import UserError
from common.keys import rng
from sources.toy import toy_rows, toy_tokenizer
from studies.bench_speed import training_args
from studies.shapes import config_of

PROMPTS, GROUP, NEW_TOKENS, STEPS = 8, 8, 48, 16
WARM_UP = 2  # first steps that do not count
TUNED = {  # the model's settings: no dropout, a fused GELU
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    "activation_function": "gelu_pytorch_tanh",
}


class StepClock(TrainerCallback):
    """A transformers Trainer's callback that records the seconds of each step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        self.started = time.perf_counter()

    def on_step_end(self, *_, **__):
        self.seconds.append(time.perf_counter() - self.started)


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
    tokenizer = toy_tokenizer()
    config = config_of("peer")
    draw = rng("peer")
    rows = [row for row in toy_rows() if row["domain"] == "if"][:PROMPTS]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        if tuned:
            config.update(TUNED)
        GPT2LMHeadModel(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        trl_seconds = time_trl(trl, datasets, folder, tokenizer, rows, draw, tuned)
        our_seconds = time_ours(args, folder, tokenizer, rows, draw)
    trl_s, our_s = median(trl_seconds), median(our_seconds)
    return {
        "peer": f"trl {trl.__version__}, {'tuned' if tuned else 'as it comes'}",
        "trl step s": trl_s,
        "our step s": our_s,
        "ours/trl": our_s / trl_s,
    }


def median(seconds: list[float]) -> float:
    """The median seconds of the steps after WARM_UP."""
    return sorted(seconds[WARM_UP:])[(STEPS - WARM_UP) // 2]


def time_trl(trl, datasets, folder: str, tokenizer, rows: list[dict], draw, tuned: bool) -> list:
    """Seconds of each of TRL's steps from the model in `folder`.

    trl, datasets: the modules, which are optional. draw: the generator of the rewards.
    """
    settings = {
        "output_dir": f"{folder}/trl",
        "per_device_train_batch_size": PROMPTS * GROUP,
        "num_generations": GROUP,
        "max_steps": STEPS,
        "max_completion_length": NEW_TOKENS,
        "beta": 0.001,
        "learning_rate": 1e-5,
        "use_cpu": True,
        "bf16": False,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 10 * STEPS,  # never
        "generation_kwargs": {"min_new_tokens": NEW_TOKENS},
    }
    if tuned:
        settings["gradient_checkpointing"] = False
    clock = StepClock()
    prompts = [{"prompt": row["prompt"]} for row in rows]
    trainer = trl.GRPOTrainer(
        model=folder,
        processing_class=tokenizer,
        args=trl.GRPOConfig(**settings),
        callbacks=[clock],
        train_dataset=datasets.Dataset.from_list(prompts * STEPS),
        reward_funcs=lambda completions, **_: draw.random(len(completions)).tolist(),
    )
    trainer.train()
    return clock.seconds


def time_ours(args, folder: str, tokenizer, rows: list[dict], draw) -> list[float]:
    """Seconds of each step of grpo.py from the model in `folder`."""
    ranks.start()
    flags = ["--max-new-tokens", NEW_TOKENS, "--group-size", GROUP, "--batch-prompts", PROMPTS]
    flags += ["--mini-batch-prompts", PROMPTS, "--beta", 0.001, "--lr", 1e-5]
    train_args = training_args(args, *map(str, flags))
    _, policy = grpo.load_policy(folder, "float32")
    _, reference = grpo.load_policy(folder, "float32")
    policy.stop_ids = [-1]  # no token ends a response
    optimizer = ranks.make_optimizer(policy, train_args)
    rows = data.encode_prompts(rows, tokenizer, "", 16)
    seconds = []
    for step in range(STEPS):
        started = time.perf_counter()
        batch, _, _, _ = grpo.rollout(policy, tokenizer, rows, GROUP, (0, step), 1.0, train_args)
        # Random weights earn nothing, and an update needs rewards that differ.
        batch["reward"] = torch.from_numpy(draw.random(PROMPTS * GROUP))
        batch["old_logp"], _, batch["old_h"] = grpo.log_probs(policy, batch, train_args)
        batch["ref_logp"], _, _ = grpo.log_probs(reference, batch, train_args)
        batch["importance"] = grpo.importance_weights(batch, train_args)
        batch["advantage"] = grpo.advantages(batch, {}, train_args)
        grpo.update(policy, optimizer, batch, 1e-5, (0, step, 0), {}, train_args)
        seconds.append(time.perf_counter() - started)
    return seconds
