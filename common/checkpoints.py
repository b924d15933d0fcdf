"""Checkpoints: a folder that from_pretrained and vLLM open, with the trainer's state beside it.

A kill at any moment leaves the last complete checkpoint. Any number of ranks can resume it.
"""

import contextlib
import copy
import json
import logging
import os
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as sharded_files
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from common import ranks
from common.errors import UserError
from common.files import write_text
from common.models import load_network

# ---------------- folders ----------------


def save_folder(link: Path, tag: str, write) -> None:
    """Fill a new folder `<link>-<tag>` by write(folder), then let the symbolic link point to it.

    The link moves by one rename, and older folders are deleted after that. So the link points to a
    complete folder at every moment. The next save deletes what a killed save has left behind.
    Every rank calls this and runs write(); rank 0 alone makes and renames folders. Raises UserError
    if a file cannot be written.
    """
    temporary = link.with_name(f"{link.name}-{tag}.tmp")
    folder = link.with_name(f"{link.name}-{tag}")
    try:
        if ranks.is_first():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
        ranks.barrier()
        write(temporary)
        ranks.barrier()
        if not ranks.is_first():
            return
        make_durable(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
        point(link, folder)
    except (Exception, CheckpointException) as error:  # the latter is no Exception
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot save {folder}: {reason_of(error)}; the last whole checkpoint is kept"
        ) from error
    for old in link.parent.glob(f"{link.name}-*"):
        if old.name != folder.name:
            shutil.rmtree(old, ignore_errors=True)


def point(link: Path, folder: Path) -> None:
    """Let a symbolic link point to a folder beside it, by one rename."""
    pointer = link.with_name(f"{link.name}.tmp")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(folder.name)
    if link.is_dir() and not link.is_symlink():  # a copy of the run was made without links
        link.rename(link.with_name(f"{link.name}-copied"))
    os.replace(pointer, link)


def reason_of(error: BaseException) -> str:
    """An error's reason in one line. A CheckpointException has one error per rank."""
    if isinstance(error, CheckpointException):
        for rank, (failure, _) in sorted(error.failures.items()):
            return f"rank {rank}: {reason_of(failure)}"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0]


def make_durable(folder: Path) -> None:
    """Let the disk write all files of a folder: a power cut after the rename is then harmless."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_model(folder: Path, model, tokenizer, tensors, shard_bytes: int = 4 << 30) -> None:
    """Write a model's folder: weights, configuration, generation configuration, tokenizer.

    tensors: (name, tensor) pairs, written as they come: one shard of at most `shard_bytes` is in
    memory at a time. Only rank 0 writes. The other ranks take their pairs too, because the next
    pair may need a collective.
    """
    if not ranks.is_first():
        for _ in tensors:
            pass
        return
    dtype = save_weights(folder, tensors, shard_bytes)
    save_description(folder, model, tokenizer, dtype)


def save_description(folder: Path, model, tokenizer, dtype: torch.dtype) -> None:
    """Write all of a model's folder but the weights, which are of this dtype."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    # save_pretrained refuses what from_pretrained takes, such as a temperature of greedy decoding
    write_text(folder / "generation_config.json", model.generation_config.to_json_string())
    tokenizer.save_pretrained(folder)


def umask() -> int:
    """The permissions that this process takes from new files."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask


def save_weights(folder: Path, tensors, shard_bytes: int) -> torch.dtype:
    """Write model.safetensors, or several shards and their index. Returns the tensors' dtype."""
    shard_paths = []  # the files written so far
    shard = {}  # name → tensor, of the shard that is being filled
    shard_size = 0  # bytes of its tensors
    shard_numbers = {}  # tensor's name → the number of its shard, from 0
    total_size = 0  # bytes of all tensors
    dtype = None

    def write_shard():
        path = folder / f"model-{len(shard_paths) + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o666 & ~umask())  # the library makes it readable by its owner alone
        shard_paths.append(path)
        shard.clear()

    for name, tensor in tensors:
        if shard and shard_size + tensor.nbytes > shard_bytes:
            write_shard()
            shard_size = 0
        shard[name] = tensor.cpu().contiguous()
        shard_size += tensor.nbytes
        shard_numbers[name] = len(shard_paths)
        total_size += tensor.nbytes
        dtype = tensor.dtype
    write_shard()

    if len(shard_paths) == 1:
        shard_paths[0].rename(folder / "model.safetensors")
        return dtype
    file_names = []
    for number, path in enumerate(shard_paths, 1):
        file_names.append(f"model-{number:05d}-of-{len(shard_paths):05d}.safetensors")
        path.rename(folder / file_names[-1])
    weight_map = {name: file_names[number] for name, number in shard_numbers.items()}
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))
    return dtype


# ---------------- a trainer's checkpoint ----------------


def check_saving(out: Path, policy, tokenizer, optim: str = "adamw") -> None:
    """Raise UserError before the first step if save_checkpoint would fail after the last one.

    Everything but the weights is written into a folder of its own, as a checkpoint is, and deleted.
    The disk must have room for two checkpoints, because the older one is deleted when the newer one
    is complete. Every rank calls this. optim: as the flag --optim; "" if the checkpoint will hold
    no optimizer.
    """

    def write(folder: Path):
        if ranks.is_first():
            save_description(folder, policy.model, tokenizer, torch.float32)

    trial = out / "trial"
    try:
        save_folder(trial, "0", write)
    finally:
        if ranks.is_first():
            trial.unlink(missing_ok=True)
            shutil.rmtree(f"{trial}-0", ignore_errors=True)
    moment_bytes = {"adamw": 8, "adamw8bit": 2, "": 0}[optim]  # per parameter, Adam's two
    size = sum(parameter.numel() for parameter in policy.parameters()) * (4 + moment_bytes)
    needed = 1 if (out / "checkpoint").exists() else 2  # checkpoints that must find room
    free = shutil.disk_usage(out).free
    if size > 2**27 and ranks.is_first():
        print(f"a checkpoint takes {size / 2**30:.1f} GiB; {free / 2**30:.1f} GiB are free")
    if free < needed * size:
        raise UserError(
            f"{out}: its disk has {free / 2**30:.1f} GiB free, and {needed} × {size / 2**30:.1f} "
            "GiB are needed for checkpoints: free some, or choose another --out"
        )


def save_checkpoint(out: Path, step: int, policy, tokenizer, optimizer, state: dict) -> None:
    """Save out/checkpoint: the model's folder, the optimizer in shards, and trainer.pt.

    Rank 0 writes the model from full tensors; every rank writes its shard of the optimizer.
    trainer.pt holds the step and the algorithm's state. Raises UserError.
    """

    def write(folder: Path):
        tensors = ranks.weights(policy, torch.float32, cut_to_vocab=False)
        save_model(folder, policy.model, tokenizer, tensors)
        shards = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
        sharded_files.save(shards, checkpoint_id=folder / "optimizer")
        if ranks.is_first():
            values = {}
            for name, value in state.items():
                values[name] = value.state_dict() if hasattr(value, "state_dict") else value
            torch.save({"step": step, "state": values}, folder / "trainer.pt")

    save_folder(out / "checkpoint", f"{step:06d}", write)


def load_weights(policy, folder) -> None:
    """Put a checkpoint's weights into the policy. Raises UserError if their shapes differ."""
    model = load_network(str(folder))
    options = StateDictOptions(full_state_dict=True)
    try:
        set_model_state_dict(policy.model, model.state_dict(), options=options)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{folder} is of another shape than the model before it: {reason}"
        ) from error
    policy.updates += 1  # so the sampler's copy is out of date


def load_checkpoint(folder: Path, policy, optimizer, state: dict) -> int:
    """Restore the policy, the optimizer and the algorithm's state in place.

    Returns the step of the checkpoint. Raises UserError if it is damaged or of another model.
    """
    load_weights(policy, folder)
    with readable(folder, "optimizer"):
        shards = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
        sharded_files.load(shards, checkpoint_id=folder / "optimizer")
        set_optimizer_state_dict(policy, optimizer, shards["optimizer"])
    with readable(folder, "trainer.pt"):
        saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
        for name, value in saved["state"].items():
            if hasattr(state[name], "load_state_dict"):
                state[name].load_state_dict(value)
            else:
                state[name] = value
        step = saved["step"]
        number = folder.resolve().name.rpartition("-")[2]
        if type(step) is not int or (number.isdecimal() and int(number) != step):
            raise ValueError(f"its step is {step!r:.40}")
        return step


@contextlib.contextmanager
def readable(folder: Path, part: str):
    """Raise UserError, instead of whatever else, if a part of a checkpoint cannot be read."""
    logging.disable()  # torch logs the traceback of an error that it also raises
    try:
        yield
    except (Exception, CheckpointException) as error:
        raise UserError(
            f"{folder}: {part} is damaged or of another model ({reason_of(error):.200}); "
            f"{other_checkpoints(folder)}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)


def other_checkpoints(folder: Path) -> str:
    """What a user can do without a checkpoint: which other folders of it are there."""
    current = folder.resolve()
    others = []
    for path in sorted(current.parent.glob(f"{folder.name}-*")):
        if path != current and (path / "trainer.pt").exists():
            others.append(str(path))
    if others:
        return f"{others[-1]} is there as well: let the link {folder} point to it"
    return "there is no older one: begin anew with another --out"
