"""The laptop's sampler: a loop over the trainer's own model with a KV cache (--engine hf).

Suffixes: P prompts, B sequences (responses), T tokens of a response, V vocabulary, W tokens of the
longest prompt.
"""

import torch
from transformers import DynamicCache

from common.errors import UserError
from common.reports import shown


def sample(logits_BV, uniform_B, temperature: float, top_p: float = 1.0):
    """(token_B, logp_B): one token per sequence, and its log-prob in the distribution drawn from.

    The token is where the cumulative distribution passes uniform_B, a number in [0, 1) per
    sequence. temperature 0: the most likely token, with its log-prob at temperature 1. top_p < 1:
    only the smallest set of tokens whose probabilities reach top_p (in evaluation).
    """
    logits_BV = logits_BV.float()
    if not temperature:
        logp_BV = torch.log_softmax(logits_BV, -1)
        token_B = logp_BV.argmax(-1)
    else:
        if top_p < 1:
            logits_BV = nucleus(logits_BV, temperature, top_p)
        logp_BV = torch.log_softmax(logits_BV / temperature, -1)
        cumulative_BV = logp_BV.double().exp().cumsum(-1)
        # The sum's last entry is 1 up to rounding, so the uniform number is scaled by it.
        threshold_B1 = uniform_B[:, None] * cumulative_BV[:, -1:]
        token_B = torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0]
    return token_B, logp_BV.gather(-1, token_B[:, None])[:, 0]


def nucleus(logits_BV, temperature: float, top_p: float):
    """The logits with −∞ for every token outside the smallest set that reaches top_p."""
    p_BV, order_BV = torch.softmax(logits_BV / temperature, -1).sort(-1, descending=True)
    beyond_BV = p_BV.cumsum(-1) - p_BV >= top_p  # more likely tokens alone reach top_p
    return logits_BV.masked_fill(beyond_BV.gather(-1, order_BV.argsort(-1)), -torch.inf)


@torch.inference_mode()
def generate(
    policy, prompts_P: list[list[int]], uniform_BT, temperature: float, top_p: float = 1.0
) -> list[tuple]:
    """B/P responses to each prompt, side by side: B tuples (tokens, log-probs, truncated).

    prompts_P: token ids. uniform_BT: a number in [0, 1) per token, and T is the longest response.
    Each response depends on its own prompt and numbers alone. A prompt is run once for all of its
    responses. Raises UserError for models whose cache is not a plain KV cache.
    """
    model = policy.sampler[0] if policy.sampler else policy.model
    device = policy.device
    B, T = uniform_BT.shape
    group_size = B // len(prompts_P)
    uniform_BT = uniform_BT.to(device)
    stop_ids = torch.tensor(policy.stop_ids, device=device)

    tokens_BT = torch.zeros(B, T, dtype=torch.long, device=device)
    logp_BT = torch.zeros(B, T, device=device)
    length_B = torch.zeros(B, dtype=torch.long, device=device)
    truncated_B = torch.zeros(B, dtype=torch.bool, device=device)

    with policy.autocast():
        cache, logits_PV, mask_PW = run_prompts(model, prompts_P, device)
        cache.batch_repeat_interleave(group_size)
        logits_BV = logits_PV.repeat_interleave(group_size, 0)
        mask_BW = mask_PW.repeat_interleave(group_size, 0)
        row_B = torch.arange(B, device=device)  # the response that each row of the cache holds
        alive_B = torch.ones(B, dtype=torch.bool, device=device)
        for t in shown("sampling, tokens", range(T)):
            logits_BV = logits_BV[:, : policy.vocab]
            token_B, token_logp_B = sample(logits_BV, uniform_BT[row_B, t], temperature, top_p)
            tokens_BT[row_B[alive_B], t] = token_B[alive_B]
            logp_BT[row_B[alive_B], t] = token_logp_B[alive_B]
            length_B[row_B[alive_B]] += 1
            alive_B &= ~torch.isin(token_B, stop_ids)
            alive_count = int(alive_B.sum())
            if alive_count == 0 or t + 1 == T:
                truncated_B[row_B[alive_B]] = True
                break
            if alive_count < 0.75 * len(alive_B):  # ended responses leave the cache
                cache.batch_select_indices(alive_B.nonzero()[:, 0])
                row_B, token_B, mask_BW = row_B[alive_B], token_B[alive_B], mask_BW[alive_B]
                alive_B = torch.ones_like(row_B, dtype=torch.bool)
            mask_BW = torch.cat([mask_BW, mask_BW.new_ones(len(mask_BW), 1)], 1)
            logits_BV = model(
                token_B[:, None],
                attention_mask=mask_BW,
                position_ids=mask_BW.sum(1, keepdim=True) - 1,
                past_key_values=cache,
                use_cache=True,
            ).logits[:, -1]

    return to_responses(tokens_BT, logp_BT, length_B, truncated_B)


def to_responses(tokens_BT, logp_BT, length_B, truncated_B) -> list[tuple]:
    """The tensors as one (tokens, log-probs, truncated) per response, cut to its length."""
    responses = []
    columns = (tokens_BT.tolist(), logp_BT.tolist(), length_B.tolist(), truncated_B.tolist())
    for tokens, logps, length, truncated in zip(*columns):
        responses.append((tokens[:length], logps[:length], truncated))
    return responses


def run_prompts(model, prompts_P: list[list[int]], device):
    """(KV cache, logits_PV of the next token, mask_PW) of the prompts, padded on the left."""
    width = max(len(ids) for ids in prompts_P)
    ids_PW, mask_PW = [], []
    for ids in prompts_P:
        padding = [0] * (width - len(ids))
        ids_PW.append(padding + ids)
        mask_PW.append(padding + [1] * len(ids))
    ids_PW = torch.tensor(ids_PW, device=device)
    mask_PW = torch.tensor(mask_PW, device=device)
    output = model(
        ids_PW,
        attention_mask=mask_PW,
        position_ids=(mask_PW.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
        logits_to_keep=1,
    )
    cache = getattr(output, "past_key_values", None)
    if type(cache) is not DynamicCache:
        raise UserError(
            f"{type(model).__name__}: its cache ({type(cache).__name__}) is not a plain KV cache, "
            "the only one that --engine hf knows: use --engine vllm"
        )
    return cache, output.logits[:, -1], mask_PW
