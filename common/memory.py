"""The arithmetic of memory: what a rank holds while it samples and while it updates, by part.

Nothing is measured and nothing is allocated. tests/test_bench.py compares activation_bytes with
what autograd keeps. A caller passes in what an algorithm keeps besides GRPO's parts.
"""

import torch
from transformers import AutoModelForCausalLM

GIB = 2**30  # bytes; a device of "80 GB" has 80 of these
OPTIMIZER_BYTES = {  # per parameter
    "adamw": 8,  # two fp32 moments
    "adamw8bit": 2.1,  # two moments of 8 bits, and their scales
}
HEAD_CHUNK = 2**26  # logits (tokens × vocabulary) at a time: Policy.CHUNK of the algorithm files

# Parts that exist in one phase only; all others are held all the time.
UPDATE_ONLY = ("gradients (fp32)", "gathered blocks (bf16)", "activations")
ROLLOUT_ONLY = ("engine: weights (bf16)", "engine: KV cache")


def count_parameters(config) -> dict[str, int]:
    """How many parameters a model with this configuration has, by part.

    "all"; "embedding": the input embedding; "block": the largest block; "root": all outside the
    blocks. "tied": True if the head shares the input embedding.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    blocks = []
    for module in model.modules():
        if type(module).__name__ in model._no_split_modules:
            blocks.append(sum(p.numel() for p in module.parameters()))
    total = sum(p.numel() for p in model.parameters())
    return {
        "all": total,
        "embedding": model.get_input_embeddings().weight.numel(),
        "block": max(blocks),
        "root": total - sum(blocks),
        "tied": model.config.tie_word_embeddings,
    }


def activation_bytes(config, tokens: int, checkpointed: bool) -> int:
    """Bytes that autograd keeps of a micro-batch of `tokens` tokens.

    It keeps, per token and layer in bf16, 10.5 values per unit of the hidden width (residuals,
    norms, q, k, v, the attention's output) and 4 per unit of the feed-forward width. The head works
    on chunks of HEAD_CHUNK logits.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    feed_forward = getattr(config, "intermediate_size", None) or 4 * hidden
    block = int(2 * tokens * (10.5 * hidden + 4 * feed_forward))
    # fp32: the logits, their log-probs, the gradients of both and the probabilities
    head = 4 * 4 * HEAD_CHUNK
    if checkpointed:  # the input of every block, and one block that is recomputed
        return head + 2 * tokens * hidden * layers + block
    return head + block * layers


def memory_by_part(
    config, args, world_size: int, device_gb: float, extra_parts: dict[str, int] | None = None
) -> dict[str, float]:
    """{part: GB of 2^30 bytes that one rank holds}.

    args: the parsed flags of an algorithm file. It reads optim, beta, checkpoint_activations,
    cpu_offload, engine, engine_memory, micro_batch_tokens and rollout_tokens; the engine "auto"
    counts as vllm. device_gb: the device's memory. extra_parts: {part: bytes per parameter} of what
    an algorithm keeps besides on the device, divided among the ranks.
    """
    counts = count_parameters(config)
    parameters = counts["all"]
    on_device = 0 if args.cpu_offload else 1  # factor of what --cpu-offload moves to the CPU
    uses_hf = args.engine == "hf"
    parts = {
        "parameters (fp32)": on_device * 4 * parameters / world_size,
        "gradients (fp32)": on_device * 4 * parameters / world_size,
        "optimizer": on_device * OPTIMIZER_BYTES[args.optim] * parameters / world_size,
        # FSDP2 gathers the current block, the next one, and all parameters outside the blocks.
        "gathered blocks (bf16)": 2 * (2 * counts["block"] + counts["root"]),
        "reference (bf16)": on_device * 2 * parameters / world_size if args.beta else 0,
    }
    for name, bytes_per_parameter in (extra_parts or {}).items():
        parts[name] = bytes_per_parameter * parameters / world_size
    parts["activations"] = activation_bytes(
        config, args.micro_batch_tokens, args.checkpoint_activations
    )
    parts["hf sampler's copy (bf16)"] = 2 * parameters if uses_hf else 0
    parts["engine: weights (bf16)"] = 0 if uses_hf else 2 * parameters
    if uses_hf:
        parts["engine: KV cache"] = kv_cache_bytes(config, args.rollout_tokens)
    else:
        parts["engine: KV cache"] = args.engine_memory * device_gb * GIB
    return {name: size / GIB for name, size in parts.items()}


def kv_cache_bytes(config, tokens: int) -> int:
    """Bytes of the keys and values of `tokens` tokens, in bf16."""
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", heads)
    width = config.hidden_size // heads * key_value_heads
    # keys and values, of 2 bytes each
    return 2 * 2 * tokens * config.num_hidden_layers * width


def peaks(parts: dict[str, float], update_only: tuple[str, ...] = ()) -> dict[str, float]:
    """{"update", "rollout"}: GB per rank at the peak of each phase.

    parts: as memory_by_part returns them. While the policy is updated, the engine sleeps. While it
    samples, there are no gradients, no activations and none of the extra parts in update_only.
    """
    not_in_rollout = (*UPDATE_ONLY, *update_only)
    return {
        "update": sum(size for name, size in parts.items() if name not in ROLLOUT_ONLY),
        "rollout": sum(size for name, size in parts.items() if name not in not_in_rollout),
    }
