"""Which engine samples, and the proof that vLLM holds the trainer's weights.

Every transfer is proved twice:
- by fingerprints of each tensor as the trainer has it, as it was sent, and as the engine holds it
  (unless vLLM has packed it away);
- by the canary: the log-probs of a fixed text, as the trainer and the engine compute them. It sees
  what fingerprints cannot see, such as rows of a tensor that have changed places.
"""

import torch

from common import ranks
from common.errors import UserError

# How far the canary's mean |Δ log-prob| may be off, in nats. In bfloat16 honest engines were off by
# 0.005 to 0.087, and engines with shuffled embeddings by 0.6 to 4.9 (docs/notes.md).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}
# How far the hf sampler's log-prob of any token may be off the trainer's in float32, in nats.
FP32_GAP = 1e-3


# ---------------- fingerprints ----------------


def fingerprint(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bit patterns, read as integers.

    It is exact, and fusing, transposing and padding with zeros do not change it.
    """
    integer_types = {2: torch.int16, 4: torch.int32}  # by bytes per element
    bits = tensor.contiguous().view(integer_types[tensor.element_size()]).flatten()
    # in pieces, because the sum may need a copy in int64
    return sum(int(piece.sum(dtype=torch.int64)) for piece in bits.split(2**24))


def record_fingerprints(tensors, sent: dict, spoil_first: bool = False):
    """Yield the (name, tensor) pairs, and put each tensor's fingerprint into `sent`.

    spoil_first: the rows of the first tensor (the embeddings) change places. Its fingerprint stays
    the same, so only the canary can detect it.
    """
    for name, tensor in tensors:
        if spoil_first and not sent:
            tensor = tensor.roll(1, 0)
        sent[name] = fingerprint(tensor)
        yield name, tensor


def engine_fingerprints(model, dtype: torch.dtype) -> dict[tuple, int]:
    """{names of the checkpoint's tensors that are fused into one: fingerprint} of vLLM's model.

    It runs inside the engine. Empty parameters are left out: vLLM has packed those away.
    """
    fused_modules = getattr(model, "packed_modules_mapping", {})
    fingerprints = {}
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        module = name.split(".")[-2]
        sources = fused_modules.get(module, [module])
        names = tuple(name.replace(f".{module}.", f".{source}.") for source in sources)
        fingerprints[names] = fingerprint(parameter.to(dtype))
    return fingerprints


def wrong_weights(tensors, sent: dict[str, int], held: dict[tuple, int]) -> list[str]:
    """Names of the weights that differ from the trainer's.

    tensors: the trainer's (name, tensor) pairs. sent: {name: fingerprint} when they were sent.
    held: {names: fingerprint} in the engine, from engine_fingerprints(). The canary has to judge
    the engine's tensors whose names the trainer does not know.
    """
    expected = {name: fingerprint(tensor) for name, tensor in tensors}
    wrong = [name for name in expected if sent.get(name) != expected[name]]
    has_compared = False
    for names, value in held.items():
        if not expected.keys() >= set(names):
            continue
        has_compared = True
        if sum(expected[name] for name in names) != value:
            wrong.append(names[0])
    if not has_compared:
        wrong.append("(none could be read back)")
    return wrong


# ---------------- the canary ----------------


def canary_ids(rows: list[dict], args) -> list[int]:
    """The canary's text: the first prompts' tokens, at most 64 to keep the forward pass short."""
    ids = [token for row in rows[:64] for token in row["ids"]]
    return ids[: min(64, args.max_prompt_tokens)]


def check_engine(policy, engine, sent: dict, held: dict, engine_logp_T, spoiled: bool) -> None:
    """Raise UserError if the engine does not hold the trainer's weights.

    sent, held: see wrong_weights. engine_logp_T: the canary's log-probs as the engine computes
    them. spoiled: the weights were spoiled on purpose, so the canary must fire.
    """
    wrong = wrong_weights(ranks.weights(policy, engine.dtype), sent, held)
    tolerance = TOLERANCE[engine.dtype]
    gap = (policy.own_logp(engine.canary) - engine_logp_T).abs().mean().item()
    is_quiet = gap <= tolerance  # False if the gap is NaN
    if spoiled:
        as_expected = not is_quiet
    else:
        as_expected = is_quiet and not wrong
    if not as_expected:
        raise UserError(
            f"vllm does not hold the {'spoiled' if spoiled else 'right'} weights: {len(wrong)} "
            f"wrong tensors {wrong[:2]}; the canary is off by {gap:.2g} nats (at most "
            f"{tolerance:g})"
        )


# ---------------- the hf sampler ----------------


def check_hf_sampler(gap: float) -> None:
    """Raise UserError if the hf sampler's log-probs are not the trainer's.

    Both use the same weights. In fp32 they differ by rounding alone, so more than FP32_GAP nats
    prove that the sampler's cache does not fit this model. gap: the largest difference of a step's
    tokens. (vLLM and bfloat16 are left to the importance weights.)
    """
    if gap > FP32_GAP:
        raise UserError(
            f"the sampler's log-probs differ from the trainer's by up to {gap:.2g} nats, where "
            f"fp32 allows {FP32_GAP:g}: the hf engine does not support this model"
        )


# ---------------- the choice ----------------


def open_engine(engine_class, name: str, policy, canary: list[int], args):
    """(engine, text that says which engine samples and why), the same on every rank.

    The engine is None if the hf loop samples. engine_class: the algorithm file's Engine. canary:
    the tokens of canary_ids(). The canary must first fire on shuffled embeddings, and then be quiet
    on the right ones. When one rank fails, all ranks take hf with --engine auto, and all raise
    UserError with --engine vllm.
    """
    if args.engine == "hf":
        return None, "hf"
    engine = None

    def start():
        nonlocal engine
        engine = engine_class(name, policy, canary, args)

    def show_that_the_canary_fires():
        engine.sync_weights(policy, spoiled=True)

    def load_the_right_weights():
        engine.sync_weights(policy)

    for step in (start, show_that_the_canary_fires, load_the_right_weights):
        failure = ""
        try:
            step()
        except UserError as error:
            failure = str(error)
        failures = [text for text in ranks.gather(failure) if text]
        if failures and args.engine == "auto":
            return None, f"hf ({failures[0]})"
        if failures:
            raise UserError(failures[0])
    return engine, "vllm"
