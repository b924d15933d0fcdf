"""Kinds of models: those that run although something is unusual, and why others are refused."""

import pytest
import torch
import transformers as hf

import grpo
from common import hub, models
from common.errors import UserError
from conftest import make_batch, make_policy
from sources.toy import toy_tokenizer

VOCAB = len(toy_tokenizer())
IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **IDS,
}
STEP = (
    "--data toy --engine hf --steps 1 --batch-prompts 4 --mini-batch-prompts 4 --group-size 4 "
    "--max-prompt-tokens 16 --max-new-tokens 18 --eval-prompts 0 --threads 1"
).split()


@pytest.fixture
def saved(tmp_path):
    """A function that saves a model with the toy's tokenizer, and returns the folder's name."""

    def save(model) -> str:
        model.save_pretrained(tmp_path / "model")
        toy_tokenizer().save_pretrained(tmp_path / "model")
        return str(tmp_path / "model")

    return save


def train(folder: str, tmp_path) -> str:
    """One step on the model. Returns what a run prints of it in metrics.jsonl."""
    flags = [*STEP, "--system-prompt", "", "--model", folder, "--out", str(tmp_path / "run")]
    out = grpo.main(flags)
    return (out / "metrics.jsonl").read_text()


# ---------------- models that run ----------------


def with_a_projection():
    """opt-350m's head reads vectors that are narrower than the layers'."""
    config = hf.OPTConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        word_embed_proj_dim=16,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        do_layer_norm_before=False,
        **IDS,
    )
    return hf.OPTForCausalLM(config)


def with_a_smaller_embedding():
    """Gemma 3's tokenizer has an id for images that its text models do not know."""
    config = hf.Gemma3TextConfig(**SIZES | {"vocab_size": VOCAB - 1}, head_dim=8)
    return hf.Gemma3ForCausalLM(config)


@pytest.mark.parametrize("make", [with_a_projection, with_a_smaller_embedding])
def test_unusual_models_train(make, saved, tmp_path):
    torch.manual_seed(0)
    assert '"step": 1' in train(saved(make()), tmp_path)


def test_an_id_outside_the_embedding_is_refused_only_where_it_is_used(saved, tmp_path):
    folder = saved(with_a_smaller_embedding())
    last_token = toy_tokenizer().convert_ids_to_tokens(VOCAB - 1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(f'{{"id": "x", "domain": "math", "prompt": "{last_token}", "answer": "1"}}\n')
    flags = [*STEP, "--system-prompt", "", "--model", folder, "--out", str(tmp_path / "run")]
    flags[flags.index("toy")] = str(rows)
    with pytest.raises(UserError, match=f"row rows/x: its prompt has the token {VOCAB - 1}"):
        grpo.main(flags)


# ---------------- models that are refused ----------------


def mamba():
    config = hf.MambaConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, state_size=4, **IDS
    )
    return hf.MambaForCausalLM(config)


def xlstm():
    config = hf.xLSTMConfig(
        vocab_size=VOCAB, hidden_size=32, num_blocks=2, num_hidden_layers=2, num_heads=2
    )
    return hf.xLSTMForCausalLM(config)


def hybrid():
    config = hf.Lfm2Config(**SIZES, layer_types=["conv", "full_attention"])
    return hf.Lfm2ForCausalLM(config)


def mixture_of_experts():
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, num_local_experts=2))


def multimodal():
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    text = SIZES | {"head_dim": 8}
    config = hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    return hf.Gemma3ForConditionalGeneration(config)


def encoder_decoder():
    config = hf.T5Config(vocab_size=VOCAB, d_model=32, d_ff=48, num_layers=1, num_heads=4, d_kv=8)
    return hf.T5ForConditionalGeneration(config)


REASONS = [
    (mamba, "state-space or hybrid model"),
    (xlstm, "state-space or hybrid model"),
    (hybrid, "conv.conv.weight has 3 dimensions, as in a convolution"),
    (mixture_of_experts, "a mixture of experts"),
    (multimodal, r"as multimodal models have \(text_config, vision_config\)"),
    (encoder_decoder, "an encoder and a decoder"),
]


@pytest.mark.parametrize("make, reason", REASONS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_model_is_refused_for_its_true_reason(make, reason, saved):
    with pytest.raises(UserError, match=reason) as caught:
        models.load_model(saved(make()))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [0.1, 1, 5])
def test_capped_logits_are_refused_however_small_they_are(scale, saved):
    torch.manual_seed(0)
    model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**SIZES, head_dim=8))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)  # tied to the head
    with pytest.raises(UserError, match="not its output head times its last hidden state"):
        grpo.load_policy(saved(model), "float32")


def test_a_forward_pass_that_fails_is_one_line(saved, monkeypatch):
    folder = saved(hf.Qwen2ForCausalLM(hf.Qwen2Config(**SIZES)))

    def fail(*arguments, **options):
        raise IndexError("no such thing\nand more")

    monkeypatch.setattr(hf.Qwen2Model, "forward", fail)
    with pytest.raises(UserError, match="it cannot be run: no such thing$"):
        grpo.load_policy(folder, "float32")


# ---------------- longrope, and the sampler's log-probs ----------------


def phi3():
    """A Phi-3 whose positions change beyond 24 tokens."""
    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = hf.Phi3Config(**SIZES, original_max_position_embeddings=24, rope_scaling=scaling)
    torch.manual_seed(0)
    model = hf.Phi3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # so that attention is sharp enough to see a position
    return model


def test_lengths_that_cross_longropes_switch_are_refused(saved, tmp_path):
    folder = saved(phi3())
    with pytest.raises(UserError, match="exceed 24 tokens, the length at which longrope changes"):
        train(folder, tmp_path)


def test_a_sampler_that_is_not_the_trainers_model_stops_the_run(saved, tmp_path, monkeypatch):
    monkeypatch.setattr("data.context_of", lambda config: (128, ""))
    with pytest.raises(UserError, match="differ from the trainer's by up to .* nats, where fp32"):
        train(saved(phi3()), tmp_path)
    assert not (tmp_path / "run" / "checkpoint").exists()


@pytest.mark.parametrize("gap, is_refused", [(0.0, False), (9e-4, False), (2e-3, True)])
def test_how_far_the_hf_sampler_may_be_off(gap, is_refused):
    policy = make_policy()
    batch = make_batch(policy)
    batch["sampler_logp"] = batch["old_logp"].clone()
    batch["sampler_logp"][0, batch["length"][0] - 1] -= gap
    policy.sampled_after = policy.updates  # as a rollout leaves it
    args = grpo.parse_args([])
    if is_refused:
        with pytest.raises(UserError, match="does not support this model"):
            grpo.backward(policy, batch, args)
    else:
        stats = grpo.backward(policy, batch, args)
        assert stats["mismatch/max"] == pytest.approx(gap, abs=1e-5)
    policy.bf16 = True  # left to the importance weights
    grpo.backward(policy, batch, args)
    policy.bf16 = False
    policy.updates += 1  # π_θ is not what was sampled from any more
    assert "mismatch/max" not in grpo.backward(policy, batch, args)


# ---------------- the hub ----------------


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    """The libraries alone would ask for half a minute."""
    asked = []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "get_session", Session)
    hub.fault.cache_clear()
    try:
        for _ in range(2):
            with pytest.raises(UserError, match="does not answer: Name or service not known"):
                models.from_pretrained(hf.AutoConfig, "nobody/nothing")
        with pytest.raises(UserError, match="does not answer: Name or service not known"):
            models.find_model("nobody/nothing", fetch=True)
    finally:
        hub.fault.cache_clear()
    assert len(asked) == 1
