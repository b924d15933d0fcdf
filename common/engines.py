"""Which engine samples, and the proof that vLLM holds the trainer's weights.

Two proofs after every transfer:
- fingerprints of each tensor as the trainer has it, as it was sent, and as the engine holds it
  (where vLLM did not pack it away);
- the canary: the log-probs of a fixed text, by trainer and engine. It sees what fingerprints
  cannot, such as rows of a tensor in each other's place.
"""

import torch

from common import ranks
from common.errors import UserError

# How far the canary's mean |Δ log-prob| may be off, in nats. In bfloat16 honest engines were off by
# 0.005 to 0.087, and engines with shuffled embeddings by 0.6 to 4.9 (docs/notes.md).
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.2}


# ---------------- fingerprints ----------------


def fingerprint(tensor: torch.Tensor) -> int:
    """The sum of a tensor's bit patterns: exact, and blind to fusing, transposing and padding."""
    integer_types = {2: torch.int16, 4: torch.int32}
    bits = tensor.contiguous().view(integer_types[tensor.element_size()]).flatten()
    return sum(int(piece.sum(dtype=torch.int64)) for piece in bits.split(2**24))


def record_fingerprints(tensors, sent: dict, spoil_first: bool = False):
    """Yield (name, tensor) as they come, and note each tensor's fingerprint in `sent`.

    spoil_first: rows of the first tensor (the embeddings) change places. Its fingerprint stays, so
    this is for the canary alone to find.
    """
    for name, tensor in tensors:
        if spoil_first and not sent:
            tensor = tensor.roll(1, 0)
        sent[name] = fingerprint(tensor)
        yield name, tensor


def engine_fingerprints(model, dtype: torch.dtype) -> dict[tuple, int]:
    """{names of the tensors that the engine fused into one: fingerprint} of vLLM's model.

    Runs inside the engine. Empty parameters are those that vLLM has packed away.
    """
    fused_modules = getattr(model, "packed_modules_mapping", {})
    held = {}
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            continue
        module = name.split(".")[-2]
        sources = fused_modules.get(module, [module])
        names = tuple(name.replace(f".{module}.", f".{source}.") for source in sources)
        held[names] = fingerprint(parameter.to(dtype))
    return held


def wrong_weights(tensors, sent: dict[str, int], held: dict[tuple, int]) -> list[str]:
    """Names of the weights that are not those of `tensors` (name, tensor), the trainer's.

    sent: {name: fingerprint} as they left. held: as engine_fingerprints() gives them. Engine
    tensors that have names of their own are left to the canary.
    """
    ours = {name: fingerprint(tensor) for name, tensor in tensors}
    wrong = [name for name in ours if sent.get(name) != ours[name]]
    could_read = False
    for names, value in held.items():
        if not ours.keys() >= set(names):
            continue
        could_read = True
        if sum(ours[name] for name in names) != value:
            wrong.append(names[0])
    if not could_read:
        wrong.append("(none could be read back)")
    return wrong


# ---------------- the canary ----------------


def canary_ids(rows: list[dict], args) -> list[int]:
    """The canary's text: the first tokens of the first prompts, 64 at most."""
    ids = [token for row in rows[:64] for token in row["ids"]]
    return ids[: min(64, args.max_prompt_tokens)]


def check_engine(policy, engine, sent: dict, held: dict, engine_logp_T, spoiled: bool) -> None:
    """Raise UserError where the engine does not hold the trainer's weights.

    engine_logp_T: the canary's log-probs by the engine. spoiled: the weights were spoiled on
    purpose, so the canary must fire.
    """
    wrong = wrong_weights(ranks.weights(policy, engine.dtype), sent, held)
    tolerance = TOLERANCE[engine.dtype]
    gap = (policy.own_logp(engine.canary) - engine_logp_T).abs().mean().item()
    is_quiet = gap <= tolerance  # False where the gap is NaN
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


# ---------------- the choice ----------------


def open_engine(engine_class, name: str, policy, canary: list[int], args):
    """(the sampler's engine, or None for the hf loop; which one and why), the same on every rank.

    engine_class: the algorithm file's Engine. Its canary is first shown to fire on shuffled
    embeddings, and then to be quiet on the right ones. With --engine auto a failure means hf; with
    --engine vllm it raises UserError, on every rank.
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
