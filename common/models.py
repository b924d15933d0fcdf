"""Models by name: folders, runs, names on the hub. A model that cannot be loaded is a UserError."""

import json
import math
import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from common import hub
from common.errors import UserError
from common.files import RUNS

# {first word of a bare name: the organisation that publishes this family on the hub}
FAMILIES = {
    "qwen": "Qwen",
    "qwq": "Qwen",
    "llama": "meta-llama",
    "meta-llama": "meta-llama",
    "deepseek": "deepseek-ai",
    "gemma": "google",
    "mistral": "mistralai",
    "ministral": "mistralai",
    "phi": "microsoft",
    "olmo": "allenai",
    "smollm": "HuggingFaceTB",
    "gpt2": "openai-community",
    "granite": "ibm-granite",
    "nemotron": "nvidia",
}
# What from_pretrained needs; a repository may hold the same weights in other formats too.
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.tiktoken", "*.jinja"]


def find_model(name: str, fetch: bool = False) -> str:
    """What from_pretrained takes: a folder or a name on the hub.

    name: a folder, a run's folder (which means its checkpoint), `organisation/name`, or a bare name
    of a known family (Qwen2.5-7B-Instruct). With `fetch` the result is always a folder, downloaded
    from the hub if necessary. Raises UserError that lists what was tried.
    """
    folder = Path(name)
    if folder.is_dir():
        is_run = not (folder / "config.json").exists() and (folder / "checkpoint").exists()
        return str(folder / "checkpoint") if is_run else str(folder)
    if name.count("/") > 1 or folder.parts[:1] == RUNS.parts[:1]:
        raise UserError(f"model {name}: no such folder")
    hub_name = name_on_hub(name)
    if not hub_name:
        raise UserError(
            f"model {name}: tried a folder of that name (none) and the families "
            f"{', '.join(sorted(FAMILIES))} (no match): give a folder or organisation/name"
        )
    if not fetch:
        return hub_name
    fault = hub.fault()
    try:
        return snapshot_download(hub_name, allow_patterns=MODEL_FILES, local_files_only=bool(fault))
    except (OSError, ValueError) as error:  # the hub's own errors are among these
        reason = fault or str(error).splitlines()[0]
        raise UserError(
            f"{hub_name}: neither a folder here nor in the cache, and the hub gave: {reason}"
        ) from error


def name_on_hub(name: str) -> str | None:
    """`organisation/name` for such a name or a bare one; None if its family is unknown."""
    if "/" in name:
        return None if name.startswith((".", "/")) else name
    match = re.match(r"meta-llama|[a-z]+2?", name.lower())
    if not match:
        return None
    word = match[0]  # "qwen2" for Qwen2.5, "gpt2" for gpt2
    organisation = FAMILIES.get(word) or FAMILIES.get(word.rstrip("2"))
    return f"{organisation}/{name}" if organisation else None


def from_pretrained(cls, name: str, **options):
    """cls.from_pretrained(name, **options). Raises UserError of one line if that fails."""
    is_folder = Path(name).is_dir()
    fault = "" if is_folder else hub.fault()
    if fault:
        options["local_files_only"] = True
    try:
        return cls.from_pretrained(name, **options)
    # What a damaged file raises is up to the library that reads it.
    except Exception as error:
        if is_folder:
            place = "from that folder"
        elif fault:
            place = f"from the local cache, and {fault}"
        else:
            place = "from the local cache or the hub (is the hub reachable?)"
        lines = str(error).strip().splitlines() or [""]
        first = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
        reason = first if isinstance(error, OSError) else f"{type(error).__name__}: {first}"
        raise UserError(f"model {name}: cannot load it {place}: {reason}") from error


def load_model(name: str):
    """(tokenizer, model in fp32 on the CPU, sorted ids that end a response).

    Raises UserError if the model cannot be loaded or cannot be trained here.
    """
    tokenizer = from_pretrained(AutoTokenizer, name)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise UserError(f"model {name}: it has no tokenizer files (tokenizer.json or the like)")
    if not isinstance(tokenizer.model_max_length, (int, float)):
        raise UserError(f"model {name}: its tokenizer's model_max_length is no number")
    config = from_pretrained(AutoConfig, name)
    check_kind(name, config)
    check_generation_config(name)
    model = load_network(name)
    fuse_gelu(model)
    check_layers(name, model)
    return tokenizer, model, find_stop_ids(name, tokenizer, model)


# What torch.compile and DistributedDataParallel put before each tensor's name
WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")
# Tensors of old checkpoints that are no weights: masks and the frequencies of rotary embeddings
OLD_BUFFERS = re.compile(r"(?:^|\.)(?:attn\.bias|masked_bias|rotary_emb\.inv_freq)$")


def load_network(name: str):
    """The model in fp32 on the CPU, with every weight from its files.

    transformers fills a weight that the files lack with random numbers, and drops one that the
    model lacks. Both raise UserError here. A head that is tied to the embedding may be absent.
    """
    check_files(name)
    model, report = load_with_report(name)
    wrapped = [key for key in report["unexpected_keys"] if WRAPPERS.match(key)]
    if wrapped:
        prefix = WRAPPERS.match(wrapped[0])[0]
        print(f"model {name}: the names of its tensors begin with {prefix}, which is left out")
        model, report = load_with_report(name, key_mapping={WRAPPERS.pattern: ""})

    faults = [f"its files have no tensor {key}" for key in sorted(report["missing_keys"])]
    for key, found, expected in sorted(report["mismatched_keys"]):
        faults.append(f"tensor {key} has the shape {list(found)}, not {list(expected)}")
    for key in sorted(report["unexpected_keys"]):
        if not OLD_BUFFERS.search(key):
            faults.append(f"its files have a tensor {key}, and {type(model).__name__} has none")
    if faults:
        more = f" (and {len(faults) - 1} more of such faults)" if len(faults) > 1 else ""
        raise UserError(
            f"model {name}: {faults[0]}{more}: its weights and its config.json do not belong "
            "together"
        )
    for key, parameter in model.named_parameters():
        # The sum is quick; it is not finite if a value is not, and if it overflows.
        if not parameter.sum().isfinite() and not parameter.isfinite().all():
            raise UserError(f"model {name}: its tensor {key} has a value that is not finite")
    return model


WEIGHT_TYPES = {"F64", "F32", "F16", "BF16"}  # as safetensors calls them


def check_files(name: str) -> None:
    """Raise UserError for files of weights that transformers would read in silence, but wrongly.

    Two tensors for one weight (it takes one of them), weights that are no floating-point numbers,
    and files of another size than config.json says (it makes up the rest). name: a folder; of a
    model on the hub nothing is checked here.
    """
    folder = Path(name)
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        return
    single = folder / "model.safetensors"
    paths = [single] if single in paths else paths
    config = from_pretrained(AutoConfig, name)
    try:
        with torch.device("meta"):  # no memory
            model = AutoModelForCausalLM.from_config(config)
    except Exception:  # what a wrong configuration raises is up to the model; loading tells it
        return
    is_quantized = hasattr(config, "quantization_config")
    place_of = {}  # weight → its name in the files
    elements = 0
    for path in paths:
        if not path.is_file():
            raise UserError(f"model {name}: {path} is no file")
        try:
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_slice(key) for key in file.keys()}
                kinds = {key: (part.get_dtype(), part.get_shape()) for key, part in tensors.items()}
        except Exception:  # of a file that is no safetensors file; loading tells it
            return
        for key, (dtype, shape) in kinds.items():
            if OLD_BUFFERS.search(key):
                continue
            if dtype not in WEIGHT_TYPES and not is_quantized:
                raise UserError(f"model {name}: its tensor {key} is of type {dtype}, no weights")
            weight = WRAPPERS.sub("", key).removeprefix(f"{model.base_model_prefix}.")
            if weight in place_of:
                raise UserError(
                    f"model {name}: {key} and {place_of[weight]} in its files are the same weight"
                )
            place_of[weight] = key
            elements += math.prod(shape)
    expected = sum(parameter.numel() for parameter in model.parameters())
    if expected > 2 * elements and not is_quantized:
        raise UserError(
            f"model {name}: its config.json describes {expected / 1e6:.2f} M parameters, its files "
            f"hold {elements / 1e6:.2f} M"
        )


def check_generation_config(name: str) -> None:
    """Raise UserError for a damaged generation_config.json, which transformers would ignore.

    Its end tokens would be lost. name: a folder; of a model on the hub nothing is checked here.
    """
    path = Path(name) / "generation_config.json"
    if not path.exists():
        return
    try:
        config = json.loads(path.read_text())
        end = config.get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError):
        raise UserError(f"model {name}: {path} is damaged: correct or remove it") from None
    for token in end if isinstance(end, list) else [end]:
        if token is not None and (type(token) is not int or token < 0):
            raise UserError(f"model {name}: {path} has the end token {token!r:.40}, which is no id")


def load_with_report(name: str, **options):
    """(the model in fp32, transformers' report of the tensors that did not fit)."""
    return from_pretrained(
        AutoModelForCausalLM,
        name,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,  # they are in the report
        output_loading_info=True,
        **options,
    )


def fuse_gelu(model) -> None:
    """Replace GPT-2's GELU, which takes eight operations, by the same function in one kernel."""
    for module in model.modules():
        for child_name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, child_name, torch.nn.GELU("tanh"))


MODALITIES = re.compile("vision|audio|image|video|speech|text")  # in names of configurations


def check_kind(name: str, config) -> None:
    """Raise UserError if a configuration is not that of a model which continues a text."""
    kind = ""
    if config.is_encoder_decoder:
        kind = "an encoder and a decoder"
    parts = sorted(key for key in config.sub_configs if MODALITIES.search(key))
    if parts:
        kind = f"several parts, as multimodal models have ({', '.join(parts)})"
    if kind:
        raise UserError(f"--model {name}: it has {kind}: only causal models of text are supported")


def check_layers(name: str, model) -> None:
    """Raise UserError if a model has layers that the sampler or checkpoints cannot handle."""
    fault = ""
    if getattr(model, "_is_stateful", False):
        fault = "it is a state-space or hybrid model, whose recurrent state the sampler lacks"
    saved_buffers = {key for key, _ in model.named_buffers()} & set(model.state_dict())
    for key in sorted(saved_buffers):
        fault = fault or f"it saves {key}, a buffer, which vLLM knows by another name"
    for key, parameter in model.named_parameters():
        if ".experts." in key:
            fault = fault or f"it is a mixture of experts, and vLLM knows {key} by another name"
        elif parameter.ndim > 2:
            fault = fault or f"{key} has {parameter.ndim} dimensions, as in a convolution"
    if fault:
        raise UserError(
            f"--model {name}: {fault}: only transformers with dense layers are supported"
        )


def context_of(config) -> tuple[float, str]:
    """(how many tokens a prompt and its response may have, what sets that limit).

    inf if the configuration names no limit. A model with longrope has two sets of positions. Which
    one a token gets depends on the length of its batch, so beyond the switch the sampler and the
    trainer would disagree (by 2 nats per token in a Phi-3).
    """
    most = getattr(config, "max_position_embeddings", math.inf)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        switch = rope.get("original_max_position_embeddings", most)
        if switch < most:
            return switch, "the length at which longrope changes the positions"
    return most, "the model's context"


def known_ids(tokenizer, model) -> int:
    """How many ids both the tokenizer and the embedding have.

    Some embeddings have more rows (Qwen's); some tokenizers have more ids (Gemma 3's, for images).
    """
    return min(len(tokenizer), model.get_input_embeddings().num_embeddings)


def find_stop_ids(name: str, tokenizer, model) -> list[int]:
    """The sorted ids that end a response: the generation config's and the tokenizer's.

    Raises UserError if there is none, or one that the tokenizer or the embedding does not have.
    """
    eos = model.generation_config.eos_token_id  # an id, a list of ids, or None
    stop_ids = set(eos) if isinstance(eos, list) else {eos}
    stop_ids.add(tokenizer.eos_token_id)
    stop_ids.discard(None)
    if not stop_ids:
        raise UserError(
            f"--model {name}: neither its tokenizer nor its generation config names an end token"
        )
    ids = known_ids(tokenizer, model)
    if max(stop_ids) >= ids:
        raise UserError(
            f"--model {name}: its end token {max(stop_ids)} is outside the {ids} ids that its "
            "tokenizer and its embedding have"
        )
    return sorted(stop_ids)
