"""Time and memory of merge.py: random bf16 checkpoints of one shape, a base and its experts.

`python -m studies.bench merge` runs it. MB/s are megabytes of checkpoints per second; `cp` copies
the same files just before, for comparison. TIES reads the checkpoints three times and SCE twice,
but their bytes count once. With --peer mergekit its command runs with its own defaults; its TIES
chooses a threshold per tensor, ours one per model.
"""

import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from common.errors import UserError
from studies.shapes import config_of

ROOT = Path(__file__).resolve().parent.parent

# method of merge.py: mergekit's name for it
METHODS = {"average": "linear", "ta": "task_arithmetic", "ties": "ties", "sce": "sce"}


def measure_merging(args) -> list[dict]:
    """A result per method of merge.py, with mergekit's numbers if --peer is mergekit.

    Raises UserError if a command fails.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = [f"{folder}/{i}" for i in range(args.experts + 1)]  # the base first
        build_checkpoints(args.model[0], checkpoints)
        total_bytes = 0
        for checkpoint in checkpoints:
            for file in Path(checkpoint).glob("*.safetensors"):
                total_bytes += file.stat().st_size
        for method in METHODS:
            result = {"method": method, "read GB": total_bytes / 1e9}
            result["cp MB/s"] = total_bytes / 1e6 / copying_seconds(checkpoints, Path(folder))
            result |= measure_merge(method, checkpoints, total_bytes)
            if args.peer == "mergekit":
                result |= measure_mergekit(args.mergekit, method, checkpoints, result)
            results.append(result)
            print(f"{method} done", flush=True)
    return results


def build_checkpoints(name: str, folders: list[str]) -> None:
    """Run write_checkpoints in a process of its own.

    A process's peak is at least its parent's size at its start. So checkpoints in this process's
    memory would count in the peaks that are measured. Raises UserError.
    """
    context = multiprocessing.get_context("spawn")
    builder = context.Process(target=write_checkpoints, args=(name, folders))
    builder.start()
    builder.join()
    if builder.exitcode:
        raise UserError(
            f"no checkpoints of the shape {name} could be written to {Path(folders[0]).parent}"
        )


def write_checkpoints(name: str, folders: list[str]) -> None:
    """Write a random base to the first folder and experts near it to the others, in bf16.

    The weights have a standard deviation of 0.02, the task vectors one of 0.001, as is common.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for i, folder in enumerate(folders):
        distance = 0.001 if i > 0 else 0.0
        for n, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(n)  # the same base each time
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.data = 0.02 * noise
            parameter.data += distance * torch.randn_like(parameter)
        model.tie_weights()
        model.save_pretrained(folder)


def run_timed(command: list[str]) -> tuple[float, float]:
    """(seconds, peak memory in GiB) of a process. If it fails: UserError with its last line."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            lines = log.read().strip().splitlines() or ["?"]
            raise UserError(f"{command[0]} failed: {lines[-1]}")
    return time.perf_counter() - started, usage.ru_maxrss / 2**20


def copying_seconds(checkpoints: list[str], folder: Path) -> float:
    """How many seconds cp takes to copy all checkpoints."""
    copies = folder / "copies"
    copies.mkdir()
    seconds, _ = run_timed(["cp", "-r", *checkpoints, str(copies)])
    shutil.rmtree(copies)
    return seconds


def measure_merge(method: str, checkpoints: list[str], total_bytes: int) -> dict:
    """merge.py's seconds, MB/s of the checkpoints' `total_bytes`, and peak memory."""
    base, *experts = checkpoints
    out = f"{Path(base).parent}/out"
    command = [sys.executable, "merge.py", "--base", base, "--experts", *experts]
    seconds, peak = run_timed([*command, "--method", method, "--out", out])
    shutil.rmtree(out)
    return {
        "merge.py s": seconds,
        "merge.py MB/s": total_bytes / 1e6 / seconds,
        "merge.py peak GiB": peak,
    }


def measure_mergekit(command: str, method: str, checkpoints: list[str], merge_result: dict) -> dict:
    """mergekit's seconds and peak, and those of `merge_result` (measure_merge's) over them."""
    folder = Path(checkpoints[0]).parent
    config = folder / "mergekit.yml"
    out = folder / "peer"
    config.write_text(mergekit_config(method, checkpoints))
    seconds, peak = run_timed([command, str(config), str(out)])
    shutil.rmtree(out)
    return {
        "mergekit s": seconds,
        "mergekit peak GiB": peak,
        "time, ours/theirs": merge_result["merge.py s"] / seconds,
        "peak, ours/theirs": merge_result["merge.py peak GiB"] / peak,
    }


def mergekit_config(method: str, checkpoints: list[str]) -> str:
    """The YAML text that asks mergekit for what merge.py does by default."""
    base, *experts = checkpoints
    lines = [f"merge_method: {METHODS[method]}"]
    if method != "average":
        normalize = "true" if method == "ties" else "false"
        lines += [f"base_model: {base}", f"parameters: {{normalize: {normalize}}}"]
    lines += ["dtype: float32", "out_dtype: bfloat16", "models:"]
    density = "density: 0.2, " if method == "ties" else ""
    for expert in experts:
        lines.append(f"  - {{model: {expert}, parameters: {{{density}weight: 1.0}}}}")
    return "\n".join(lines) + "\n"
