"""Models by name: folders, runs, names of the hub; failures to load one are told in a line."""

import re
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

from common.errors import UserError
from common.files import RUNS

# The organisations of the hub that publish a family, by the word its names begin with.
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
MODEL_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def find_model(name: str, fetch: bool = False) -> str:
    """What from_pretrained takes, for a folder, a run (its checkpoint), `organisation/name`, or a
    known family's bare name (Qwen2.5-7B-Instruct). With `fetch` always a folder, from the hub
    where need be.

    Raises UserError that lists what was tried.
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
    """`organisation/name`; a bare name gets its family's organisation, or None."""
    if "/" in name:
        return None if name.startswith((".", "/")) else name
    family = re.match(r"meta-llama|[a-z]+2?", name.lower())
    if not family:
        return None
    word = family[0]  # of Qwen2.5 "qwen2", of gpt2 "gpt2"
    organisation = FAMILIES.get(word) or FAMILIES.get(word.rstrip("2"))
    return f"{organisation}/{name}" if organisation else None


def from_pretrained(cls, name: str, **options):
    """cls.from_pretrained(name) with its failures told in one line (UserError)."""
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
    """(tokenizer, model in fp32 on the CPU, sorted ids that end a response). Raises UserError."""
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
    """Replace GPT-2's GELU of eight operations by the same function in one kernel."""
    for module in model.modules():
        for child_name, child in module.named_children():
            if type(child).__name__ == "NewGELUActivation":
                setattr(module, child_name, torch.nn.GELU("tanh"))


def check_tensors(name: str, model) -> None:
    """Raise UserError for weights that checkpoints and vLLM know by other names than the model."""
    odd = {key for key, _ in model.named_buffers()} & set(model.state_dict())
    for key, parameter in model.named_parameters():
        if parameter.ndim > 2 or ".experts." in key:
            odd.add(key)
    if odd:
        raise UserError(
            f"--model {name}: it keeps {sorted(odd)[0]}, a buffer or a stack of experts, which "
            "checkpoints and vLLM know by other names: only dense models whose weights are all "
            "parameters are supported"
        )


def find_stop_ids(name: str, tokenizer, model) -> list[int]:
    """The ids that end a response: the generation config's (one or several) and the tokenizer's."""
    stop = model.generation_config.eos_token_id
    stop_ids = set(stop) if isinstance(stop, list) else {stop}
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
