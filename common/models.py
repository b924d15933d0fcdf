"""Models by name: folders, runs, names on the hub. A model that cannot be loaded is a UserError."""

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

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
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


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
    try:
        return snapshot_download(hub_name, allow_patterns=MODEL_FILES)
    except (OSError, ValueError) as error:  # the hub's own errors are among these
        reason = str(error).splitlines()[0]
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
    try:
        return cls.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        if Path(name).is_dir():
            place = "from that folder"
        else:
            place = "from the local cache or the hub (is the hub reachable?)"
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model {name}: cannot load it {place}: {reason}") from error


def load_model(name: str):
    """(tokenizer, model in fp32 on the CPU, sorted ids that end a response).

    Raises UserError if the model cannot be loaded or cannot be trained here.
    """
    tokenizer = from_pretrained(AutoTokenizer, name)
    model = from_pretrained(AutoModelForCausalLM, name, dtype=torch.float32)
    fuse_gelu(model)
    check_tensors(name, model)
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"--model {name}: its tokenizer has {len(tokenizer)} ids, its embedding fewer"
        )
    return tokenizer, model, find_stop_ids(name, tokenizer, model)


def fuse_gelu(model) -> None:
    """Replace GPT-2's GELU, which takes eight operations, by the same function in one kernel."""
    for module in model.modules():
        for child_name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, child_name, torch.nn.GELU("tanh"))


def check_tensors(name: str, model) -> None:
    """Raise UserError if checkpoints or vLLM know some weights by other names than the model."""
    misnamed = {key for key, _ in model.named_buffers()} & set(model.state_dict())
    for key, parameter in model.named_parameters():
        if parameter.ndim > 2 or ".experts." in key:
            misnamed.add(key)
    if misnamed:
        raise UserError(
            f"--model {name}: it keeps {sorted(misnamed)[0]}, a buffer or a stack of experts, "
            "which checkpoints and vLLM know by other names: only dense models whose weights are "
            "all parameters are supported"
        )


def find_stop_ids(name: str, tokenizer, model) -> list[int]:
    """The sorted ids that end a response: the generation config's and the tokenizer's.

    Raises UserError if there is none, or one that the tokenizer does not have.
    """
    eos = model.generation_config.eos_token_id  # an id, a list of ids, or None
    stop_ids = set(eos) if isinstance(eos, list) else {eos}
    stop_ids.add(tokenizer.eos_token_id)
    stop_ids.discard(None)
    if not stop_ids:
        raise UserError(
            f"--model {name}: neither its tokenizer nor its generation config names an end token"
        )
    if max(stop_ids) >= len(tokenizer):
        raise UserError(
            f"--model {name}: its end token {max(stop_ids)} is outside the tokenizer's "
            f"{len(tokenizer)} ids"
        )
    return sorted(stop_ids)
