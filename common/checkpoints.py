"""Checkpoints: a folder that from_pretrained and vLLM open, with the trainer's state beside it.

A kill at any moment leaves the last whole one. Any number of ranks can resume it.
"""

import copy
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed.checkpoint as sharded_files
from safetensors.torch import save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from transformers import AutoModelForCausalLM

from common import ranks
from common.errors import UserError
from common.files import write_text

# ---------------- folders ----------------


def save_folder(link: Path, tag: str, write) -> None:
    """Fill a new folder `<link>-<tag>` by write(folder), then let `link` point to it.

    `link` moves by one rename, and older folders are deleted after it. So a kill at any moment
    leaves `link` at the last whole folder; what a killed save left behind, the next one deletes.
    Every rank calls this and writes; the first makes the folder and the rename. Raises UserError.
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
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot save {folder}: {error}; the last whole checkpoint is kept"
        ) from error
    pointer = link.with_name(f"{link.name}.tmp")
    pointer.unlink(missing_ok=True)
    pointer.symlink_to(folder.name)
    os.replace(pointer, link)
    for old in link.parent.glob(f"{link.name}-*"):
        if old.name != folder.name:
            shutil.rmtree(old, ignore_errors=True)


def save_model(folder: Path, model, tokenizer, tensors, shard_bytes: int = 4 << 30) -> None:
    """Write a model folder from (name, tensor) pairs as they come.

    One shard of at most `shard_bytes` is in memory at a time. Only the first rank writes; the
    others draw their pairs too, because drawing them may be a collective.
    """
    if not ranks.is_first():
        for _ in tensors:
            pass
        return

    shards = []  # the shard files written so far
    shard = {}  # name → tensor, of the shard that is being filled
    shard_of, size = {}, 0  # name → the number of its shard; bytes of all tensors
    dtype = None

    def flush():
        path = folder / f"model-{len(shards) + 1:05d}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        shards.append(path)
        shard.clear()

    for name, tensor in tensors:
        shard_size = sum(held.nbytes for held in shard.values())
        if shard and shard_size + tensor.nbytes > shard_bytes:
            flush()
        shard[name] = tensor.cpu().contiguous()
        shard_of[name] = len(shards)
        size += tensor.nbytes
        dtype = tensor.dtype
    flush()

    if len(shards) == 1:
        shards[0].rename(folder / "model.safetensors")
    else:
        file_names = []
        for number, path in enumerate(shards, 1):
            file_names.append(f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            path.rename(folder / file_names[-1])
        weight_map = {name: file_names[number] for name, number in shard_of.items()}
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1))

    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = dtype
    config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ---------------- a trainer's checkpoint ----------------


def save_checkpoint(out: Path, step: int, policy, tokenizer, optimizer, state: dict) -> None:
    """out/checkpoint: the model's folder, the optimizer in shards, and trainer.pt.

    The model is written by rank 0 from whole tensors as they come. trainer.pt holds the step and
    the algorithm's state. Raises UserError.
    """

    def write(folder: Path):
        tensors = ranks.weights(policy, torch.float32, cut=False)
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
    """Put another checkpoint of the same shape into the policy. Raises UserError otherwise."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    options = StateDictOptions(full_state_dict=True)
    try:
        set_model_state_dict(policy.model, model.state_dict(), options=options)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(
            f"{folder} is of another shape than the model before it: {reason}"
        ) from error
    policy.updates += 1  # the sampler's copy is old now


def load_checkpoint(folder: Path, policy, optimizer, state: dict) -> int:
    """Restore the policy, the optimizer and the algorithm's state; return the last step."""
    load_weights(policy, folder)
    shards = {"optimizer": get_optimizer_state_dict(policy, optimizer)}
    sharded_files.load(shards, checkpoint_id=folder / "optimizer")
    set_optimizer_state_dict(policy, optimizer, shards["optimizer"])
    saved = torch.load(folder / "trainer.pt", map_location="cpu", weights_only=True)
    for name, value in saved["state"].items():
        if hasattr(state[name], "load_state_dict"):
            state[name].load_state_dict(value)
        else:
            state[name] = value
    return saved["step"]
