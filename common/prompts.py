"""Prompts run once for all of their responses: in the sampler, and in the trainer's own passes.

Suffixes: P prompts, B sequences, T tokens (of prompt and response), W tokens of the longest prompt,
N sequences of a piece, R tokens of a piece's longest response, H hidden.
"""

import copy

import torch
from transformers import DynamicCache

PIECE_TOKENS = 1024  # of responses in one pass, padding included
TOLERANCE = 1e-3  # how far hidden states may be off those of a plain pass, relative to the largest


def run_prompts(model, prompts_P: list[list[int]], device, **options):
    """(the model's output, with its KV cache; mask_PW) of the prompts, padded on the left."""
    W = max(len(ids) for ids in prompts_P)
    ids_PW, mask_PW = [], []
    for ids in prompts_P:
        padding = [0] * (W - len(ids))
        ids_PW.append(padding + list(ids))
        mask_PW.append(padding + [1] * len(ids))
    mask_PW = torch.tensor(mask_PW, device=device)
    output = model(
        torch.tensor(ids_PW, device=device),
        attention_mask=mask_PW,
        position_ids=(mask_PW.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        **options,
    )
    return output, mask_PW


def hidden_states(model, ids_BT, mask_BT) -> torch.Tensor:
    """[B, T, H]: the last hidden states from each prompt's last token on, and 0 elsewhere.

    model: a transformer without its output head. mask: True on the response, which follows a prompt
    of at least one token. The prompts run first, then the responses, with their prompts' keys and
    values in the cache. The gradient flows through both.
    """
    # 1. The different prompts.
    start_B = mask_BT.int().argmax(1)  # where the response begins
    number_of = {}  # prompt → its number
    prompt_B = []
    for ids, start in zip(ids_BT.tolist(), start_B.tolist()):
        prompt = tuple(ids[:start])
        prompt_B.append(number_of.setdefault(prompt, len(number_of)))
    prompt_B = torch.tensor(prompt_B, device=ids_BT.device)
    output, mask_PW = run_prompts(model, list(number_of), ids_BT.device)
    cache, hidden_PWH = output.past_key_values, output.last_hidden_state
    hidden_BTH = hidden_PWH.new_zeros(*ids_BT.shape, hidden_PWH.shape[2])
    every_row_B = torch.arange(len(ids_BT), device=ids_BT.device)
    hidden_BTH[every_row_B, start_B - 1] = hidden_PWH[prompt_B, -1]

    # 2. The responses, those of similar length together.
    length_B = mask_BT.sum(1)
    for row_N in by_length(length_B):
        offset_R = torch.arange(int(length_B[row_N].max()), device=ids_BT.device)
        is_response_NR = offset_R < length_B[row_N, None]
        position_NR = start_B[row_N, None] + offset_R
        ids_NR = torch.zeros_like(position_NR)
        ids_NR[is_response_NR] = ids_BT[row_N][mask_BT[row_N]]
        output = model(
            ids_NR,
            attention_mask=torch.cat([mask_PW[prompt_B[row_N]], is_response_NR.long()], 1),
            position_ids=position_NR,
            past_key_values=select(cache, prompt_B[row_N]),
            use_cache=True,
        )
        is_here_BT = torch.zeros_like(mask_BT)
        is_here_BT[row_N] = mask_BT[row_N]
        # rows in ascending order, as boolean indices take them
        hidden_BTH[is_here_BT] = output.last_hidden_state[is_response_NR]
    return hidden_BTH


def by_length(length_B) -> list[torch.Tensor]:
    """The sequences' numbers, short ones first, in ascending pieces of at most PIECE_TOKENS."""
    numbers_of_pieces, numbers = [], []
    for b in length_B.argsort(stable=True).tolist():
        if numbers and (len(numbers) + 1) * int(length_B[b]) > PIECE_TOKENS:
            numbers_of_pieces.append(numbers)
            numbers = []
        numbers.append(b)
    numbers_of_pieces.append(numbers)
    return [torch.tensor(sorted(numbers), device=length_B.device) for numbers in numbers_of_pieces]


def select(cache: DynamicCache, prompt_N) -> DynamicCache:
    """A cache that holds for each sequence the keys and values of its prompt."""
    selection = copy.copy(cache)
    selection.layers = []
    for layer in cache.layers:
        layer = copy.copy(layer)
        layer.keys = layer.keys.index_select(0, prompt_N)
        layer.values = layer.values.index_select(0, prompt_N)
        selection.layers.append(layer)
    return selection


@torch.no_grad()
def are_equal_when_shared(model, vocab: int) -> bool:
    """Whether this model gives the same hidden states when responses share their prompts.

    A model whose cache is not a plain KV cache may not. Tried on two prompts of different lengths
    with two responses each. Not for positions that depend on the longest sequence of a pass.
    """
    rope = getattr(model.config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("longrope", "dynamic"):
        return False
    ids_BT = torch.arange(40).reshape(4, 10) % vocab
    ids_BT[1, :6], ids_BT[3, :3] = ids_BT[0, :6].clone(), ids_BT[2, :3].clone()
    mask_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for b, (start, end) in enumerate([(6, 10), (6, 8), (3, 9), (3, 10)]):
        mask_BT[b, start:end] = True
    plain_BTH = model(input_ids=ids_BT, use_cache=False).last_hidden_state
    try:
        shared_BTH = hidden_states(model, ids_BT, mask_BT)
    except Exception:  # whatever a model without such a cache raises
        return False
    gap_BTH = (shared_BTH - plain_BTH)[mask_BT]
    return bool(gap_BTH.abs().max() <= TOLERANCE * plain_BTH.abs().max())
