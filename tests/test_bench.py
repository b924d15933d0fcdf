"""common/memory.py against hand computations and against what autograd keeps; studies/bench*.py run
through on the toy. No timing decides."""

import argparse
import importlib.util
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from common.memory import activation_bytes, count_parameters
from studies import bench
from studies.shapes import config_of

GIB = 2**30
PARAMETERS_7B = 7.6156e9


def memory_of_7b(**changed) -> dict[str, float]:
    """GB per part of qwen2.5-7b."""
    flags = {
        "ranks": 1,
        "algorithm": "grpo",
        "optim": "adamw",
        "beta": 0.001,
        "checkpoint_activations": False,
        "cpu_offload": False,
        "engine": "vllm",
        "engine_memory": 0.2,
        "device_gb": 80,
        "micro_batch_tokens": 4096,
        "rollout_tokens": 524288,
        "domains": 5,
    }
    return bench.memory(config_of("qwen2.5-7b"), argparse.Namespace(**(flags | changed)))


def test_published_parameter_counts():
    billions = {}
    for name in ("qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"):
        billions[name] = round(count_parameters(config_of(name))["all"] / 1e9, 2)
    assert billions == {"qwen2.5-0.5b": 0.49, "qwen2.5-1.5b": 1.54, "qwen2.5-7b": 7.62}
    assert config_of("Qwen/Qwen2.5-7B-Instruct").hidden_size == 3584


# ---------------- memory by hand ----------------


def gb(bytes_per_parameter: float):
    """GB of 7B parameters, to a thousandth."""
    return pytest.approx(bytes_per_parameter * PARAMETERS_7B / GIB, rel=1e-3)


def test_memory_of_cgpo_on_one_rank():
    parts = memory_of_7b(algorithm="cgpo")
    trained = parts["parameters (fp32)"] + parts["gradients (fp32)"] + parts["optimizer"]
    assert trained == gb(16)  # 122 GB in 10^9
    assert parts["reference (bf16)"] == gb(2)
    assert parts["φ_0 (cgpo)"] == gb(4)
    assert parts["engine: KV cache"] == 16
    assert parts["engine: weights (bf16)"] == gb(2)
    assert parts["hf sampler's copy (bf16)"] == 0


def test_memory_of_pcgrad_on_eight_ranks():
    parts = memory_of_7b(ranks=8, beta=0, algorithm="pcgrad")
    assert parts["optimizer"] == gb(1)
    assert parts["reference (bf16)"] == parts["φ_0 (cgpo)"] == 0
    assert parts["gradient copies (pcgrad)"] == gb(2)  # four more than the one: 4 · 4 / 8 bytes


def test_memory_with_the_hf_engine():
    parts = memory_of_7b(engine="hf")
    assert parts["engine: KV cache"] == 524288 * 2 * 2 * 28 * 4 * 128 / GIB
    assert parts["engine: weights (bf16)"] == 0
    # Its sampler's copy of the weights does not sleep during the update.
    with_vllm = bench.memory_peaks(memory_of_7b())["update"]
    assert bench.memory_peaks(parts)["update"] - with_vllm == gb(2)


def test_memory_with_cpu_offload():
    parts = memory_of_7b(cpu_offload=True)
    assert parts["parameters (fp32)"] == parts["optimizer"] == 0
    assert parts["engine: weights (bf16)"] > 0


# ---------------- activations ----------------


def kept_by_autograd(config, layers: int, tokens: int) -> int:
    """Bytes of the tensors that a forward pass keeps for backward, weights not counted."""
    config.num_hidden_layers = layers
    config.layer_types = ["full_attention"] * layers
    with torch.device("meta"):  # the weights' values do not matter, and drawing them takes long
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.to_empty(device="cpu")
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    ids = torch.randint(1, config.vocab_size, (2, tokens // 2))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # the result keeps the graph, and with it the kept tensors' storage, until they are counted
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    del hidden
    return sum(size for pointer, size in storages.items() if pointer not in weights)


@pytest.mark.parametrize("name", ["qwen2.5-0.5b", "qwen2.5-1.5b"])
def test_activations_are_what_autograd_keeps(name):
    """Bytes per token and layer, by the difference of a model of three layers and one of one."""
    tokens = 64
    config = config_of(name)
    config.vocab_size = 1000
    one_layer = kept_by_autograd(config, 1, tokens)
    three_layers = kept_by_autograd(config, 3, tokens)
    config.num_hidden_layers = 1
    formula = activation_bytes(config, tokens, False) - activation_bytes(config, 0, False)
    assert (three_layers - one_layer) / 2 == pytest.approx(formula, rel=0.05)


# ---------------- the commands ----------------


def fit(*flags) -> dict:
    (result,) = bench.main(["fit", "--model", "qwen2.5-7b", "--engine", "vllm", *flags])
    return result


def test_fit_names_the_flags_that_fit(capsys):
    result = fit("--device-gb", "140")
    saving = ["--checkpoint-activations", "--micro-batch-tokens 4096", "--optim adamw8bit"]
    assert result["fits_with"] == saving
    assert max(result["phases"].values()) > 140
    assert "fits (" in capsys.readouterr().out

    assert fit("--device-gb", "80", "--ranks", "8")["fits_with"] == ["--checkpoint-activations"]
    assert fit("--device-gb", "16")["fits_with"] is None
    with pytest.raises(UserError, match="tried a folder"):
        bench.main(["fit", "--model", "no-such-model"])


@pytest.mark.slow
def test_speed_and_loop_run_through_on_the_toy(toy, tmp_path, capsys):
    path = tmp_path / "results.json"
    bench.main(["speed", "--model", "toy", "--repeats", "1", "--loop", "--json", str(path)])
    (result,) = json.loads(path.read_text())
    for name in (
        "rollout tokens/s",
        "update tokens/s",
        "update model FLOP/s",
        "matrix FLOP/s",
        "cgpo: step/grpo",
        "mcpo, h anew: update/grpo",
        "peak memory GB",
    ):
        assert math.isfinite(result[name])
        assert result[name] > 0
    assert result["update model FLOP/s"] < result["matrix FLOP/s"] * 1.5
    assert {"grpo", "cgpo"} == json.loads(result["loop"]).keys()
    assert "share of the matrix rate" in capsys.readouterr().out


@pytest.mark.skipif(bool(importlib.util.find_spec("trl")), reason="trl is installed")
def test_a_missing_peer_is_one_line():
    with pytest.raises(UserError, match="pip install trl"):
        bench.main(["--peer", "trl"])
