"""A run's folder, with args.json, metrics.jsonl and samples.jsonl. Two runs never share one."""

import datetime
import fcntl
import json
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from common import ranks
from common.errors import UserError
from common.files import (
    RUNS,
    append_jsonl,
    check_output_folder,
    read_jsonl,
    write_jsonl,
    write_text,
)
from common.keys import hash_of

# Flags that may change when a run is resumed; args.json keeps the changes in "history". (With a
# curriculum --steps may not, because the curriculum depends on the run's length.)
FREE_FLAGS = {
    "date",
    "lr",
    "out",
    "resume",
    "steps",
    "save_every",
    "eval_every",
    "threads",
    "wandb",
    "ranks",
}
LOCK = ".lock"  # a file of the run's folder: the process that trains in it holds a lock on it
held_locks = {}  # {path of such a file: the file}, of this process
SERVERS = ("verifier_url", "judge_url", "sandbox_url")  # their addresses may change


def comparable(flags: dict, free: set) -> dict:
    """The flags that must be equal in two runs, as JSON would hold them.

    free: names that are left out. Of a server's address, only whether there is one counts.
    """
    flags = json.loads(json.dumps(flags))
    fixed = {}
    for name, value in flags.items():
        if name not in free:
            fixed[name] = bool(value) if name in SERVERS else value
    return fixed


def changed_flags(old: dict, new: dict) -> str:
    """The flags that differ, as a text such as "--lr 0.1 → 0.2; --seed 0 → 1"; "" if none do."""
    changes = []
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            changes.append(f"--{name.replace('_', '-')} {old.get(name)} → {new.get(name)}")
    return "; ".join(changes)


def open_run(args, algorithm: str, write: bool = True) -> Path:
    """Make the run's folder with args.json in it; with write=False, only check it. Returns it.

    The default is runs/<algorithm>-<model>-<hash of the flags>, followed by -2, -3, … if that
    exists. Two runs with different flags never share a folder: only --resume enters an existing
    one, with the same flags (except FREE_FLAGS). Raises UserError otherwise.
    """
    free = set(FREE_FLAGS)
    if getattr(args, "curriculum", "none") != "none":
        free.remove("steps")
    flags = comparable(vars(args) | {"algorithm": algorithm}, free)
    named_flags = comparable(vars(args) | {"algorithm": algorithm}, free - {"lr"})
    out = Path(args.out) if args.out else default_folder(args, algorithm, named_flags)
    check_folder(out, flags, free, args.resume, algorithm)
    if args.resume:
        check_checkpoint(out, args.steps)
    if write:
        out.mkdir(parents=True, exist_ok=True)
        lock(out)
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        values = vars(args) | {"algorithm": algorithm, "out": str(out), "ranks": world_size}
        values["history"] = history_of(out, values)
        write_text(out / "args.json", json.dumps(values, indent=1))
    return out


def lock(out: Path) -> None:
    """Keep other processes out of the run's folder as long as this one lives.

    Raises UserError if another one is in it.
    """
    path = str(out.resolve() / LOCK)
    if path in held_locks:
        return
    file = open(path, "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{out}: another process is training there: wait for it, or end it"
        ) from None
    held_locks[path] = file


def history_of(out: Path, values: dict) -> list[str]:
    """The changes of flags by the resumptions of a run so far, this one among them.

    values: what args.json is to hold now.
    """
    if not (out / "args.json").exists():
        return []
    old = read_flags(out)
    history = old.pop("history", [])
    changes = changed_flags(
        comparable(old, {"resume", "out"}), comparable(values, {"resume", "out"})
    )
    return [*history, changes] if changes else history


def read_flags(out: Path) -> dict:
    """The args.json of a run or an evaluation. Raises UserError if it is damaged."""
    try:
        flags = json.loads((out / "args.json").read_text())
    except FileNotFoundError:
        raise UserError(f"{out} holds no args.json, where a script writes its flags") from None
    except (ValueError, RecursionError):
        flags = None
    if not isinstance(flags, dict) or not isinstance(flags.get("history", []), list):
        raise UserError(f"{out / 'args.json'} is damaged: a script writes its flags there, as JSON")
    return flags


def date_of(out: Path) -> str:
    """The date that the prompts of a run or an evaluation tell, such as "2026-11-25".

    It is the one in the args.json that the folder has, or else today's.
    """
    recorded = read_flags(out).get("date") if (out / "args.json").exists() else None
    if not recorded:
        return datetime.date.today().isoformat()
    try:
        return datetime.date.fromisoformat(recorded).isoformat()
    except (ValueError, TypeError):
        raise UserError(f"{out / 'args.json'} is damaged: its date is {recorded!r:.40}") from None


def check_checkpoint(out: Path, steps: int) -> None:
    """Raise UserError if a resumed run's checkpoint is lost, or already further than `steps`.

    steps: 0 for one epoch, whose length is not known here.
    """
    link = out / "checkpoint"
    if link.exists() and not link.is_dir():
        raise UserError(f"{link} is no folder: it must be a checkpoint's, or a link to it")
    whole = sorted(path.name for path in out.glob("checkpoint-*") if (path / "trainer.pt").exists())
    if whole and not link.exists() and not link.is_symlink():
        raise UserError(
            f"{link}, a link to the last checkpoint, is not there, but {whole[-1]} is: make the "
            f"link again (ln -s {whole[-1]} {link})"
        )
    if not link.is_symlink():
        return
    target = os.readlink(link)
    if not link.exists():
        raise UserError(
            f"{link} points to {target}, which is not there: bring it back, or begin anew with "
            "another --out"
        )
    step = target.rpartition("-")[2]
    if steps and step.isdecimal() and int(step) > steps:
        raise UserError(f"--steps {steps}: {out} has done {int(step)} steps already")


def default_folder(args, algorithm: str, flags: dict) -> Path:
    """The first default name that is free; with --resume, the last one that exists."""
    base = RUNS / f"{algorithm}-{Path(args.model).name}-{hash_of(flags)[:6]}"
    last_existing = base
    folder = base
    number = 1
    while folder.exists():
        last_existing = folder
        number += 1
        folder = Path(f"{base}-{number}")
    return last_existing if args.resume else folder


def check_folder(out: Path, flags: dict, free: set, resume: bool, algorithm: str) -> None:
    """Raise UserError if a run with these flags may not use this folder."""
    check_output_folder("--out", str(out))
    files = {path.name for path in out.iterdir()} if out.exists() else set()
    if not resume and files <= {LOCK, "args.json"}:
        return  # a new folder, or that of a run which ended before it began
    if (out / "args.json").exists():
        old = comparable(read_flags(out), {*free, "history"})
        changes = changed_flags(old, flags)
        if changes:
            raise UserError(f"{out} holds a run with other flags ({changes}): choose another --out")
        if algorithm == "sft":  # sft.py has no --resume; what a kill has left begins anew
            if (out / "checkpoint").exists():
                raise UserError(f"{out} already holds this run: another --out starts afresh")
        elif not resume:
            raise UserError(
                f"{out} already holds this run: --resume continues it, another --out starts afresh"
            )
    elif resume:
        raise UserError(
            f"--resume: {out} holds no run of these flags; leave --resume out to start one"
        )
    else:
        raise UserError(f"--out {out} exists, is not empty and holds no run: choose another folder")


def read_steps(path: Path, last_step: float = math.inf) -> list[dict]:
    """The objects of metrics.jsonl or samples.jsonl whose step is at most `last_step`."""
    return [line for line in read_jsonl(path, {"step": (int,)}) if line["step"] <= last_step]


def read_metrics(out: Path) -> list[dict]:
    """The lines of a run's metrics.jsonl. Raises UserError if there is none, or no number in it."""
    path = out / "metrics.jsonl"
    lines = check_numbers(path, read_steps(path))
    if not lines:
        raise UserError(f"{out} holds no run: {path} has no complete line")
    return lines


def check_numbers(path: Path, lines: list[dict]) -> list[dict]:
    """The lines. Raises UserError if one of their values is no number that a float can hold."""
    for line in lines:
        for name, value in line.items():
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if isinstance(value, int):
                is_number = is_number and abs(value) < 1 << 1000
            if name != "verdicts" and not is_number:
                raise UserError(f"{path} is damaged: {name} of step {line['step']} is no number")
    return lines


class RunLog:
    """metrics.jsonl and samples.jsonl of a run, which rank 0 writes.

    start: the step of the checkpoint that the run continues from, or 0. Lines of later steps are
    cut off first, because the run repeats those steps.
    """

    def __init__(self, out: Path, start: int, args):
        self.out = out
        self.lines = []  # metrics.jsonl, as dicts
        self.wandb = None  # a Weights & Biases run, with --wandb
        if not ranks.is_first():
            return
        if start:
            path = out / "metrics.jsonl"
            self.lines = check_numbers(path, read_steps(path, start))
            if not self.lines or self.lines[-1]["step"] != start:
                print(f"warning: {path} lacks lines of steps that are done, up to step {start}")
        write_jsonl(out / "metrics.jsonl", self.lines)
        write_jsonl(out / "samples.jsonl", read_steps(out / "samples.jsonl", start))
        if args.wandb:
            self.wandb = open_wandb(args, out)

    def write(self, line: dict, samples: Iterable[dict] = ()) -> None:
        """Add a step's metrics (one object) and samples (one object per response)."""
        if not ranks.is_first():
            return
        self.lines.append(line)
        append_jsonl(self.out / "samples.jsonl", samples)
        append_jsonl(self.out / "metrics.jsonl", [line])
        if self.wandb:
            self.wandb.log(line, step=line["step"])


def open_wandb(args, out: Path):
    """A new Weights & Biases run. Raises UserError if the package wandb is missing."""
    try:
        import wandb
    except ImportError:
        raise UserError("--wandb needs the package wandb: pip install wandb") from None
    return wandb.init(project=args.wandb, name=out.name, config=vars(args))
