"""Fixtures and helpers: the toy's folder, tiny random models of three architectures, batches.

Suffixes as in grpo.py: P prompts, B sequences, T tokens.
"""

import os
import subprocess
import sys
from pathlib import Path

# This must stand before torch is imported; scripts that tests start inherit it. The models are so
# small that a second thread only waits, and on a busy machine the waiting took 20 to 40 times as
# long as the work.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network
ROOT = Path(__file__).resolve().parent.parent
os.chdir(ROOT)  # the toy is kept in runs/, as for a user

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import grpo
from common import ranks
from common.files import RUNS
from sources.toy import build_toy, folder_name, toy_tokenizer

ranks.start()  # the losses' denominators are counted over a group of one

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


# ---------------- models ----------------


@pytest.fixture(scope="session")
def toy() -> str:
    """The toy's folder, built at most once."""
    return build_toy()  # waits while pytest_collection_finish's process holds the toy's lock


def pytest_collection_modifyitems(items):
    """Unit tests first, the tests that train the toy last."""
    items.sort(key=lambda item: "toy" in item.fixturenames)


def pytest_collection_finish(session):
    """If the toy is missing, another process builds it while the first tests run without it."""
    needs_toy = any("toy" in item.fixturenames for item in session.items)
    if needs_toy and not (RUNS / folder_name(seed=0)).exists():
        command = [sys.executable, "sft.py", "--model", "toy"]
        session.toy_builder = subprocess.Popen(command, stdout=subprocess.DEVNULL)


@pytest.fixture(params=["gpt2", "qwen2", "qwen3"])
def architecture(request) -> str:
    """A test that takes this runs once per architecture."""
    return request.param


def tiny_model(architecture: str, vocab: int = 40, seed: int = 0, positions: int = 128):
    """A random model of 2 layers and width 32, in eval mode; its weights depend on the seed."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": vocab,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "initializer_range": 0.1,
    }
    if architecture == "gpt2":
        config = GPT2Config(n_layer=2, n_embd=32, n_head=4, n_positions=positions, **options)
        return GPT2LMHeadModel(config).eval()
    options |= {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": positions,
    }
    if architecture == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **options)).eval()
    return Qwen3ForCausalLM(Qwen3Config(head_dim=8, **options)).eval()


@pytest.fixture
def tiny_folder(tmp_path):
    """A function that saves a tiny random model with the toy's tokenizer and returns its folder."""

    def make(architecture: str, chat: bool = True) -> Path:
        tokenizer = toy_tokenizer()
        if chat:
            tokenizer.chat_template = CHAT_TEMPLATE
        folder = tmp_path / architecture
        # The embedding has more rows than the tokenizer has ids, as in Qwen's checkpoints.
        tiny_model(architecture, vocab=len(tokenizer) + 7).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def make_policy(architecture="gpt2", dtype=torch.float32, **options) -> grpo.Policy:
    """A tiny policy over 40 token ids; id 0 ends a response."""
    return grpo.Policy(tiny_model(architecture).to(dtype), 40, [0], **options)


# ---------------- arguments and batches ----------------


def flags(*extra: str):
    """grpo.py's parsed arguments for the toy, without clipping of gradients."""
    return grpo.parse_args(["--max-grad-norm", "0", *extra])


def make_batch(
    policy, prompts=(2, 3), group=4, seed=0, vocab=40, dtype=torch.float32
) -> grpo.Batch:
    """A batch of random responses of several lengths with random rewards, as update() takes it.

    prompts: number of prompts per domain. group: responses per prompt. old_logp is the policy's own
    (ratio ρ = 1), the importance weight is 1, and each response ends with id 0, which is also the
    padding.
    """
    generator = torch.Generator().manual_seed(seed)
    P = sum(prompts)
    B = P * group
    start_B = torch.randint(1, 5, (P,), generator=generator).repeat_interleave(group)
    length_B = start_B + torch.randint(1, 8, (B,), generator=generator)
    T = int(length_B.max())
    position_T = torch.arange(T)
    is_token_BT = position_T < length_B[:, None]
    domain_P = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(prompts))
    batch = {
        "ids": torch.randint(1, vocab, (B, T), generator=generator) * is_token_BT,
        "mask": is_token_BT & (position_T >= start_B[:, None]),
        "length": length_B,
        "group": torch.arange(P).repeat_interleave(group),
        "domain": domain_P.repeat_interleave(group),
        "reward": torch.randint(0, 2, (B,), generator=generator).double(),
    }
    # the responses of a group have one prompt, its first row's
    in_prompt_BT = position_T < start_B[:, None]
    first_rows_BT = batch["ids"][::group].repeat_interleave(group, 0)
    batch["ids"] = torch.where(in_prompt_BT, first_rows_BT, batch["ids"])
    batch["ids"][position_T == length_B[:, None] - 1] = 0
    batch["advantage"] = grpo.advantages(batch, {}, flags()).to(dtype)
    batch["importance"] = torch.ones_like(batch["advantage"])
    batch["correct"] = batch["reward"] > 0
    with torch.no_grad():
        batch["old_logp"], mean_h_BH = policy(batch["ids"], batch["mask"])
    batch["old_h"] = mean_h_BH[:, None]
    noise_BT = torch.randn(B, T, generator=generator, dtype=dtype)
    batch["ref_logp"] = batch["old_logp"] + 0.1 * noise_BT * batch["mask"]
    return batch


# ---------------- one vector of all parameters ----------------


def gradients(policy) -> torch.Tensor:
    """All gradients in one vector. The policy's gradients are cleared."""
    vector = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
    policy.zero_grad(set_to_none=True)
    return vector


def parameters(policy) -> torch.Tensor:
    """A copy of all parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in policy.parameters()]).clone()
