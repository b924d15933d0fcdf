"""Named model shapes with their published configurations, for measurements with random weights."""

import re
from pathlib import Path

from transformers import AutoConfig, GPT2Config, Qwen2Config

from common.models import from_pretrained
from sources.models import resolve_model
from sources.toy import TOY_MODEL

# The vocabulary is the toy tokenizer's.
GPT2_COMMON = {"vocab_size": 285, "bos_token_id": 0, "eos_token_id": 0}
QWEN_COMMON = {
    "max_position_embeddings": 32768,
    "rope_theta": 1e6,
    "rms_norm_eps": 1e-6,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
SHAPES = {  # name: (class of the configuration, its values)
    "toy": (GPT2Config, GPT2_COMMON | TOY_MODEL),
    "peer": (
        GPT2Config,
        GPT2_COMMON | {"n_layer": 4, "n_embd": 128, "n_head": 4, "n_positions": 64},
    ),
    "qwen2.5-0.5b": (
        Qwen2Config,
        QWEN_COMMON
        | {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-1.5b": (
        Qwen2Config,
        QWEN_COMMON
        | {
            "vocab_size": 151936,
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2.5-7b": (
        Qwen2Config,
        QWEN_COMMON
        | {
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
}


def config_of(name: str):
    """A new configuration: that of SHAPES by its name, or that of any model by its name or folder.

    The organisation and the endings -Instruct and -Base of a name are ignored in SHAPES. Raises
    UserError if there is no such model.
    """
    short_name = re.sub(r"(-instruct|-base)$", "", Path(name).name.lower())
    if short_name in SHAPES:
        config_class, values = SHAPES[short_name]
        return config_class(**values)
    return from_pretrained(AutoConfig, resolve_model(name))
