"""A run's folder: args.json, metrics.jsonl, samples.jsonl; two runs never share one."""

import json
from pathlib import Path

import torch.distributed as dist

from common import ranks
from common.errors import UserError
from common.files import RUNS, append_jsonl, read_jsonl, write_jsonl, write_text
from common.keys import hash_of

# Flags that may change when a run is resumed. (--steps may not with a curriculum, which it shapes.)
FREE_FLAGS = {
    "out",
    "resume",
    "steps",
    "save_every",
    "eval_every",
    "threads",
    "wandb",
    "ranks",
}
SERVERS = ("verifier_url", "judge_url", "sandbox_url")


def comparable(flags: dict, free: set) -> dict:
    """What two runs' flags must share, as JSON would hold it.

    Of a server's address only that there is one: servers move.
    """
    flags = json.loads(json.dumps(flags))
    fixed = {}
    for name, value in flags.items():
        if name not in free:
            fixed[name] = bool(value) if name in SERVERS else value
    return fixed


def changed_flags(old: dict, new: dict) -> str:
    """ "--lr 0.1 → 0.2; …": the flags that differ, or ""."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            changes.append(f"--{name.replace('_', '-')} {old.get(name)} → {new.get(name)}")
    return "; ".join(changes)


def open_run(args, algorithm: str, write: bool = True) -> Path:
    """The run's folder, made with args.json in it; without `write` it is only checked.

    Default: runs/<algorithm>-<model>-<hash of the flags>, with -2, -3, … where that is taken. Two
    runs with different flags never share a folder: an existing one is only entered by --resume,
    with the same flags (except FREE_FLAGS). Raises UserError otherwise.
    """
    free = set(FREE_FLAGS)
    if getattr(args, "curriculum", "none") != "none":
        free.remove("steps")
    flags = comparable(vars(args) | {"algorithm": algorithm}, free)
    out = Path(args.out) if args.out else default_folder(args, algorithm, flags)
    check_folder(out, flags, free, args.resume, algorithm)
    if write:
        out.mkdir(parents=True, exist_ok=True)
        size = dist.get_world_size() if dist.is_initialized() else 1
        values = vars(args) | {"algorithm": algorithm, "out": str(out), "ranks": size}
        write_text(out / "args.json", json.dumps(values, indent=1))
    return out


def default_folder(args, algorithm: str, flags: dict) -> Path:
    """The first free name; with --resume the last one that is taken."""
    first = RUNS / f"{algorithm}-{Path(args.model).name}-{hash_of(flags)[:6]}"
    last_taken, number = first, 1
    folder = first
    while folder.exists():
        last_taken = folder
        number += 1
        folder = Path(f"{first}-{number}")
    return last_taken if args.resume else folder


def check_folder(out: Path, flags: dict, free: set, resume: bool, algorithm: str) -> None:
    """Raise UserError where a run with these flags may not enter this folder."""
    if (out / "args.json").exists():
        old = comparable(json.loads((out / "args.json").read_text()), free)
        changes = changed_flags(old, flags)
        if changes:
            raise UserError(f"{out} holds a run with other flags ({changes}): choose another --out")
        if not resume:
            advice = "another --out starts afresh"
            if algorithm != "sft":  # which cannot be resumed
                advice = f"--resume continues it, {advice}"
            raise UserError(f"{out} already holds this run: {advice}")
    elif resume:
        raise UserError(
            f"--resume: {out} holds no run of these flags; leave --resume out to start one"
        )
    elif out.exists() and any(out.iterdir()):
        raise UserError(f"--out {out} exists, is not empty and holds no run: choose another folder")


def read_steps(path: Path, last_step: int) -> list[dict]:
    """The lines of metrics.jsonl or samples.jsonl whose step is at most `last_step`."""
    return [line for line in read_jsonl(path) if line["step"] <= last_step]


class RunLog:
    """metrics.jsonl and samples.jsonl of a run, written by the first rank.

    `start`: the last step of the checkpoint. Lines that came after it are cut off first.
    """

    def __init__(self, out: Path, start: int, args):
        self.out = out
        self.lines = []  # metrics.jsonl, as dicts
        self.wandb = None
        if not ranks.is_first():
            return
        if start:
            self.lines = read_steps(out / "metrics.jsonl", start)
        write_jsonl(out / "metrics.jsonl", self.lines)
        write_jsonl(out / "samples.jsonl", read_steps(out / "samples.jsonl", start))
        if args.wandb:
            self.wandb = open_wandb(args, out)

    def write(self, line: dict, samples: list[dict] = ()) -> None:
        """Add a step's metrics and samples."""
        if not ranks.is_first():
            return
        self.lines.append(line)
        append_jsonl(self.out / "samples.jsonl", samples)
        append_jsonl(self.out / "metrics.jsonl", [line])
        if self.wandb:
            self.wandb.log(line, step=line["step"])


def open_wandb(args, out: Path):
    """A Weights & Biases run. Raises UserError if the package is missing."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install wandb") from None
    return wandb.init(project=args.wandb, name=out.name, config=vars(args))
