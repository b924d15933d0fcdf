"""Many processes as one: torch.distributed's process group, and FSDP2 shards of a policy.

`torchrun --nproc_per_node 8 grpo.py …` and `python grpo.py …` run the same code; the latter is a
group of one. A process's number is its rank, and the number of processes is the world size.
"""

import atexit
import os
import sys
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from common.errors import UserError

# ---------------- the process group ----------------


def start() -> None:
    """Join torchrun's process group, or make a group of one. Only rank 0 prints from here on."""
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:  # a group of one needs no server and no port
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(leave_group)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w")


def leave_group() -> None:
    """Leave the process group at exit; otherwise gloo's threads may abort the exit."""
    # A vLLM engine leaves this group later, together with its own groups.
    if "vllm" not in sys.modules and dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank()


def world_size() -> int:
    """The number of processes."""
    return dist.get_world_size()


def is_first() -> bool:
    """Whether this process is the one that prints and writes."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def reduce(values: list, op: str = "sum") -> list[float]:
    """Each number's sum over the ranks (its maximum with op="max"), the same on every rank."""
    tensor = torch.tensor(values, dtype=torch.float64)
    if dist.get_world_size() > 1:
        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
        dist.all_reduce(tensor, operations[op])
    return tensor.tolist()


def gather(value) -> list:
    """[rank 0's value, rank 1's value, …], the same list on every rank."""
    values = [value] * dist.get_world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def device() -> torch.device:
    """This rank's device: its own GPU, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


# ---------------- a policy in shards ----------------


def place(policy, args, frozen: bool = False):
    """Move the policy to its device, in FSDP2 shards, and return it.

    The master weights are fp32; each block is gathered in the compute dtype when it is needed. A
    single process on a CPU keeps the policy unsharded. frozen: the policy is never updated, so bf16
    masters are enough. Raises UserError for --cpu-offload without a GPU.
    """
    block_names = policy.model._no_split_modules or ()
    blocks = [module for module in policy.model.modules() if type(module).__name__ in block_names]
    if args.checkpoint_activations:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    policy.device = device()
    policy.sharded = policy.device.type == "cuda" or "RANK" in os.environ
    policy.shares_prompts = (
        policy.can_share_prompts and not policy.sharded and not args.checkpoint_activations
    )
    if frozen and policy.bf16 and policy.sharded:
        # Buffers stay fp32: rotary frequencies in bf16 would be wrong at large positions.
        for parameter in policy.parameters():
            parameter.data = parameter.data.bfloat16()
    if args.cpu_offload and policy.device.type != "cuda":
        raise UserError("--cpu-offload: there is no GPU to offload from")
    if policy.sharded:
        dtype = torch.bfloat16 if policy.bf16 else torch.float32
        precision = MixedPrecisionPolicy(dtype, reduce_dtype=torch.float32)
        offload = CPUOffloadPolicy() if args.cpu_offload else OffloadPolicy()
        for module in [*blocks, policy]:
            # Without reshard_after_forward, a forward pass without gradients would leave the
            # root's gathered weights in place, and every later pass would use those.
            fully_shard(
                module, reshard_after_forward=True, mp_policy=precision, offload_policy=offload
            )
    return policy


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one; any other tensor unchanged. Every rank must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def weights(policy, dtype: torch.dtype, cut_to_vocab: bool = True):
    """Yield (name in checkpoints, full parameter in `dtype`); tied parameters come once.

    With cut_to_vocab, the embedding and the head have only the rows of the tokenizer's ids
    (policy.vocab). Every rank must draw all pairs.
    """
    head = policy.model.get_output_embeddings()
    embeddings = [policy.model.get_input_embeddings().weight, head.weight]
    embeddings.append(getattr(head, "bias", None))
    for name, parameter in policy.model.named_parameters():
        tensor = full_tensor(parameter)
        if cut_to_vocab and any(parameter is embedding for embedding in embeddings):
            tensor = tensor[: policy.vocab]
        yield name, tensor.detach().to(dtype)


@torch.no_grad()
def sync_sampler(policy) -> None:
    """Copy the sharded weights into an unsharded model, from which the hf engine samples.

    Ranks sample different numbers of tokens, so a collective in sampling would wait for ever.
    """
    dtype = torch.bfloat16 if policy.bf16 else torch.float32
    if not policy.sampler:  # a list, so that its model is no submodule of the policy
        with policy.device:
            model = AutoModelForCausalLM.from_config(policy.model.config, dtype=dtype)
        policy.sampler.append(model.eval())
    copies = policy.sampler[0].parameters()
    for copy, (_, tensor) in zip(copies, weights(policy, dtype, cut_to_vocab=False)):
        copy.copy_(tensor)


def make_optimizer(policy, args) -> torch.optim.Optimizer:
    """--optim over the policy's fp32 masters. Raises UserError if torchao is needed and missing."""
    if args.optim == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit as AdamW
        except ImportError as error:
            raise UserError(f"--optim adamw8bit: {error}: pip install torchao") from error
    else:
        AdamW = partial(torch.optim.AdamW, fused=True)
    return AdamW(policy.parameters(), args.lr, args.adam_betas, weight_decay=args.weight_decay)
