"""The laptop's sampler: a loop over the trainer's own model with a KV cache (--engine hf).

Suffixes: P prompts, B sequences (responses), T tokens of a response, V vocabulary, W tokens of the
longest prompt, K blocks of the vocabulary.
"""

import contextlib

import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from common.errors import UserError
from common.prompts import run_prompts
from common.reports import shown

# ---------------- one token per sequence ----------------

BLOCK = 256  # tokens of the vocabulary that are summed up together


def sample(logits_BV, uniform_B, temperature: float, top_p: float = 1.0):
    """(token_B, logp_B): one token per sequence, and its log-prob in the distribution drawn from.

    The token is where the cumulative distribution passes uniform_B, a number in [0, 1) per
    sequence. temperature 0: the most likely token, with its log-prob at temperature 1. top_p < 1:
    only the smallest set of tokens whose probabilities reach top_p (in evaluation).
    """
    logits_BV = logits_BV.float()
    if temperature and top_p < 1:
        logits_BV = nucleus(logits_BV, temperature, top_p)
    scaled_BV = (logits_BV - logits_BV.amax(1, keepdim=True)) / (temperature or 1.0)
    weight_BV = scaled_BV.exp()  # the probabilities, but for a factor
    # In float64, in which sums of many small weights are exact enough; block by block, so that only
    # one block's weights become float64 one by one.
    block = min(BLOCK, weight_BV.shape[1])
    padding = -weight_BV.shape[1] % block
    weight_BKV = torch.nn.functional.pad(weight_BV, (0, padding)).unflatten(1, (-1, block))
    cumulative_BK = weight_BKV.sum(2, dtype=torch.float64).cumsum(1)
    total_B1 = cumulative_BK[:, -1:]
    if temperature:
        threshold_B1 = uniform_B[:, None] * total_B1
        token_B = token_at(threshold_B1, weight_BKV, cumulative_BK)
    else:
        token_B = logits_BV.argmax(1)
    logp_B1 = scaled_BV.gather(1, token_B[:, None]) - total_B1.log()
    return token_B, logp_B1[:, 0].float()


def token_at(threshold_B1, weight_BKV, cumulative_BK):
    """[B]: the tokens at which the sum of the weights passes the threshold: block, then place.

    cumulative_BK: the sum of the weights up to the end of each block. A token of weight 0 is never
    returned.
    """
    block_B1 = torch.searchsorted(cumulative_BK, threshold_B1, right=True)
    before_B1 = torch.nn.functional.pad(cumulative_BK, (1, 0)).gather(1, block_B1)
    row_B = torch.arange(len(block_B1), device=block_B1.device)
    cumulative_BV = weight_BKV[row_B, block_B1[:, 0]].double().cumsum(1)  # V: of one block
    # Rounding could put the threshold at the block's end: the largest number below it, then.
    end_B1 = cumulative_BV[:, -1:]
    below_end_B1 = end_B1.nextafter(torch.zeros_like(end_B1))
    rest_B1 = torch.minimum(threshold_B1 - before_B1, below_end_B1)
    place_B1 = torch.searchsorted(cumulative_BV, rest_B1, right=True)
    return (block_B1 * weight_BKV.shape[2] + place_B1)[:, 0]


def nucleus(logits_BV, temperature: float, top_p: float):
    """The logits with −∞ for every token outside the smallest set that reaches top_p."""
    p_BV, order_BV = torch.softmax(logits_BV / temperature, -1).sort(-1, descending=True)
    beyond_BV = p_BV.cumsum(-1) - p_BV >= top_p  # more likely tokens alone reach top_p
    return logits_BV.masked_fill(beyond_BV.gather(-1, order_BV.argsort(-1)), -torch.inf)


# ---------------- the KV cache, and attention to it ----------------


class Buffer(DynamicLayer):
    """A layer of the KV cache with room for all tokens: new ones are written in place.

    (transformers' own layer makes a new, longer tensor at every token.)
    """

    def __init__(self, layer: DynamicLayer, group_size: int, room: int):
        """The prompts' layer, each prompt `group_size` times, with room for `room` tokens more."""
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.length = layer.get_seq_length()
        self.buffers = []  # of keys and of values: [B, heads, tokens, head's width]
        for tensor in (layer.keys, layer.values):
            P, heads, _, width = tensor.shape
            buffer = tensor.new_empty(P * group_size, heads, self.length + room, width)
            buffer[:, :, : self.length] = tensor.repeat_interleave(group_size, 0)
            self.buffers.append(buffer)

    def update(self, key_states, value_states, *args, **kwargs):
        """Write the new tokens' keys and values; return those of all tokens so far."""
        start, self.length = self.length, self.length + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states)):
            buffer[:, :, start : self.length] = states
        self.keys, self.values = (buffer[:, :, : self.length] for buffer in self.buffers)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        return self.length

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self.buffers = [buffer[indices] for buffer in self.buffers]


def make_room(cache: DynamicCache, group_size: int, room: int) -> None:
    """Repeat each prompt's keys and values, and make room for `room` more tokens, in place.

    A sliding window, which forgets, stays transformers' own.
    """
    for i, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            cache.layers[i] = Buffer(layer, group_size, room)
        else:
            layer.batch_repeat_interleave(group_size)


def attend_in_groups(module, query, key, value, attention_mask, scaling=None, **options):
    """transformers' "sdpa", but the query heads that share a key do not get copies of it.

    query [B, heads, 1, width] becomes [B, key heads, heads per key head, width]: as one head's
    queries at several places, which all see the same keys.
    """
    B, heads, tokens, width = query.shape
    key_heads = key.shape[1]
    is_plain = options.get("position_bias") is None
    has_one_mask = attention_mask is None or attention_mask.shape[1] == 1  # for all heads
    if tokens > 1 or key_heads == heads or not is_plain or not has_one_mask:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **options
        )
    grouped = query.reshape(B, key_heads, heads // key_heads, width)
    output = torch.nn.functional.scaled_dot_product_attention(
        grouped, key, value, attn_mask=attention_mask, scale=scaling
    )
    return output.reshape(B, 1, heads, -1), None


GROUPED = "attention in groups"
transformers.AttentionInterface.register(GROUPED, attend_in_groups)
transformers.AttentionMaskInterface.register(GROUPED, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


@contextlib.contextmanager
def grouped_attention(model):
    """While it lasts, a model that uses "sdpa" uses attend_in_groups."""
    config = model.base_model.config
    own = config._attn_implementation
    if own == "sdpa":
        config._attn_implementation = GROUPED
    try:
        yield
    finally:
        config._attn_implementation = own


# ---------------- sampling ----------------


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

    with policy.autocast(), grouped_attention(model):
        cache, logits_PV, mask_PW = start_cache(model, prompts_P, device)
        make_room(cache, group_size, T)
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


def start_cache(model, prompts_P: list[list[int]], device):
    """(KV cache, logits_PV of the next token, mask_PW) of the prompts. Raises UserError."""
    output, mask_PW = run_prompts(model, prompts_P, device, logits_to_keep=1)
    cache = getattr(output, "past_key_values", None)
    if type(cache) is not DynamicCache:
        raise UserError(
            f"{type(model).__name__}: its cache ({type(cache).__name__}) is not a plain KV cache, "
            "the only one that --engine hf knows: use --engine vllm"
        )
    return cache, output.logits[:, -1], mask_PW
