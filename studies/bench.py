"""What training costs: speed and memory of model shapes with random weights, and what fits where.

    python -m studies.bench speed --model toy
        tokens per second, FLOP/s, and each method's step against GRPO's
    python -m studies.bench speed --model qwen2.5-0.5b qwen2.5-1.5b qwen2.5-7b --loop
        the same on a GPU, and three whole steps
    python -m studies.bench fit --model qwen2.5-7b --ranks 8 --device-gb 80
        memory per rank, by part, and the flags that make it fit
    python -m studies.bench speed --model peer --peer trl
        seconds per step of grpo.py and of TRL's GRPOTrainer, if it is installed
    python -m studies.bench merge --model qwen2.5-0.5b --peer mergekit
        time and memory of merge.py, of cp and of mergekit-yaml

Nothing is downloaded. Each shape runs in a process of its own. FLOP are those of the model: 6 per
weight and token for forward and backward together, and those of attention. Recomputation does not
count. The device's rate of matrix products is measured in the same run.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common.cli import Parser, add_flags, non_negative_float, positive_int, run_main
from common.errors import UserError
from common.files import check_output_file, write_text
from common.memory import count_parameters, memory_by_part, peaks
from studies.bench_merge import measure_merging
from studies.bench_peer import measure_trl
from studies.bench_speed import measure_speed, run_loops
from studies.shapes import SHAPES, config_of

# ---------------- fit ----------------

# Flags that save memory, in the order in which they are tried, each in addition to those before:
# (name in args, value, text).
SAVINGS = (
    ("checkpoint_activations", True, "--checkpoint-activations"),
    ("micro_batch_tokens", 4096, "--micro-batch-tokens 4096"),
    ("optim", "adamw8bit", "--optim adamw8bit"),
    ("engine_memory", 0.1, "--engine-memory 0.1"),
    ("cpu_offload", True, "--cpu-offload"),
)
USABLE = 0.92  # share of a device's memory; CUDA and fragmentation take the rest

# algorithm: what it keeps during the update and grpo.py does not
EXTRA_PARTS = {
    "cgpo": "φ_0 (cgpo)",
    "pcgrad": "gradient copies (pcgrad)",
    "opd": "teacher (opd)",
}


def extra_parts(args) -> dict[str, int]:
    """{each of EXTRA_PARTS: bytes per parameter}; 0 except for --algorithm's."""
    fp32 = 0 if args.cpu_offload else 4
    sizes = {
        "cgpo": fp32,
        "pcgrad": fp32 * (args.domains - 1),
        "opd": 2,  # one teacher at a time, in bf16
    }
    parts = dict.fromkeys(EXTRA_PARTS.values(), 0)
    if args.algorithm in EXTRA_PARTS:
        parts[EXTRA_PARTS[args.algorithm]] = sizes[args.algorithm]
    return parts


def memory(config, args) -> dict[str, float]:
    """{part: GiB per rank}, the algorithm's own parts included."""
    return memory_by_part(config, args, args.ranks, args.device_gb, extra_parts(args))


def memory_peaks(parts: dict[str, float]) -> dict[str, float]:
    """{phase: GiB at its peak}, of the update and of the rollout."""
    return peaks(parts, update_only=tuple(EXTRA_PARTS.values()))


def fit(args) -> dict:
    """Print a rank's memory by part, its two peaks, and the first flags with which it fits.

    Returns {"parts", "phases", "fits_with"}; fits_with is None if no flags are enough. Raises
    UserError for an unknown model.
    """
    name = args.model[0]
    config = config_of(name)
    parts = memory(config, args)
    phases = memory_peaks(parts)
    billions = count_parameters(config)["all"] / 1e9
    print(
        f"{name}: {billions:.2f} B parameters, {args.ranks} rank(s), {args.algorithm}, "
        f"{args.device_gb:g} GB a device\n"
    )
    for part, size in parts.items():
        print(f"  {part:<26}{size:8.1f} GB")
    for phase, size in phases.items():
        print(f"  {f'peak of the {phase}':<26}{size:8.1f} GB")

    flags, peak = flags_that_fit(config, args)
    if peak <= USABLE * args.device_gb:
        flags_text = " ".join(flags) or "these flags"
        print(f"\nfits ({peak:.0f} GB at the peak) with: {flags_text}")
        return {"parts": parts, "phases": phases, "fits_with": flags}
    print(
        f"\ndoes not fit ({peak:.0f} GB at the peak) even with {' '.join(flags)}: use more ranks "
        "or larger devices"
    )
    return {"parts": parts, "phases": phases, "fits_with": None}


def flags_that_fit(config, args) -> tuple[list[str], float]:
    """(the flags to add, the peak in GiB with them): the first ones of SAVINGS that fit, or all."""
    tried = argparse.Namespace(**vars(args))
    flags = []
    peak = max(memory_peaks(memory(config, tried)).values())
    for name, value, text in SAVINGS:
        if peak <= USABLE * args.device_gb:
            break
        if getattr(args, name) != value:
            flags.append(text)
        setattr(tried, name, value)
        peak = max(memory_peaks(memory(config, tried)).values())
    return flags, peak


# ---------------- speed of several shapes ----------------


def measure_each(args, argv: list[str]) -> list[dict]:
    """A result per shape, each from a process of its own, so that no shape's memory counts in the
    next one's peak.

    argv: this command's flags. --loop applies to the first shape only. Raises UserError.
    """
    results = []
    for name in args.model:
        dropped = {*args.model, "--model", "speed"}
        if results:
            dropped.add("--loop")
        flags = [word for word in argv if word not in dropped]
        with tempfile.NamedTemporaryFile(suffix=".json") as file:
            command = [sys.executable, "-m", "studies.bench", "speed", "--model", name]
            finished = subprocess.run([*command, *flags, "--json", file.name])
            if finished.returncode:
                raise UserError(f"{name} did not run (see above)")
            results += json.loads(Path(file.name).read_text())
    return results


def measure_one(args) -> dict:
    """Measure one shape, print the result and return it. Its "loop" is JSON text."""
    result = measure_speed(args)
    if not args.loop:
        print(table([result]))
        return result
    loops = run_loops(args.model[0])
    print(table([result]))
    for script, metrics in loops.items():
        values = ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        print(f"{script}.py, three steps end to end: {values}")
    return result | {"loop": json.dumps(loops)}


# ---------------- the command line ----------------


def parse_args(argv: list[str] | None = None):
    """The flags. A wrong flag ends the script."""
    parser = Parser(__doc__, "[speed|fit|merge] ")
    add_measuring_flags(parser)
    add_fit_flags(parser)
    add_flags(
        parser,
        "--micro-batch-tokens",
        "--dtype",
        "--optim",
        "--checkpoint-activations",
        "--cpu-offload",
        "--engine",
        "--engine-memory",
        "--rollout-tokens",
        "--threads",
    )
    return parser.parse_args(argv)


def add_measuring_flags(parser) -> None:
    """Add the flags of speed and merge, and what all three share."""
    add = parser.add_argument
    add(
        "what",
        nargs="?",
        choices=["speed", "fit", "merge"],
        default="speed",
        help="what to measure or to compute",
    )
    add(
        "--model",
        nargs="+",
        default=["toy"],
        help=f"the shapes to measure: {' '.join(SHAPES)}; fit also accepts any model's name or "
        "folder",
    )
    add(
        "--repeats",
        type=positive_int,
        default=5,
        help="speed: number of timed repeats, of which the median is reported",
    )
    add(
        "--loop",
        action="store_true",
        help="speed: also run three steps of grpo.py and of cgpo.py with random weights",
    )
    add(
        "--peer",
        choices=["", "trl", "mergekit"],
        default="",
        help="speed: measure TRL's GRPOTrainer beside grpo.py; merge: measure mergekit too",
    )
    add(
        "--mergekit",
        default="mergekit-yaml",
        help="merge: mergekit's command, which may belong to another environment",
    )
    add("--experts", type=positive_int, default=3, help="merge: number of experts")
    add("--json", default="", help="also write the numbers to this file")


def add_fit_flags(parser) -> None:
    """Add the flags of fit."""
    add = parser.add_argument
    add("--ranks", type=positive_int, default=1, help="fit: number of ranks that share the model")
    add(
        "--device-gb",
        type=non_negative_float,
        default=0.0,
        help="fit: memory of a device in GB; 0: that of this machine's GPU, or 80 without one",
    )
    add(
        "--algorithm",
        choices=["grpo", "cgpo", "mcpo", "famo", "pcgrad", "opd"],
        default="cgpo",
        help="fit: the algorithm; some keep copies of the weights",
    )
    add(
        "--domains",
        type=positive_int,
        default=5,
        help="fit: number of domains; pcgrad keeps a gradient per domain",
    )
    add(
        "--beta",
        type=non_negative_float,
        default=0.001,
        help="weight of the KL; 0: keep no reference model",
    )


def device_memory() -> float:
    """GiB of this machine's GPU; without one 80, as large GPUs for training have."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return 80.0


def table(results: list[dict]) -> str:
    """One row per quantity, one column per result."""
    names = list(dict.fromkeys(name for result in results for name in result))
    lines = []
    for name in names:
        cells = [f"{format_value(result.get(name, '')):>28}" for result in results]
        lines.append(f"{name:<26}" + "".join(cells))
    return "\n".join(lines)


def format_value(value: float | str) -> str:
    """A cell of the table: three digits, or a whole number, or powers of ten."""
    if isinstance(value, str):
        return value
    if abs(value) < 1000:
        return f"{value:.3g}"
    return f"{value:,.0f}" if value < 1e7 else f"{value:.2e}"


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure or compute, print a table, and return its columns. Raises UserError."""
    args = parse_args(argv)
    if args.json:
        check_output_file("--json", args.json)
    if args.threads:
        torch.set_num_threads(args.threads)
    args.device_gb = args.device_gb or device_memory()
    if args.what == "fit":
        results = [fit(args)]
    elif args.what == "merge":
        results = measure_merging(args)
        print(table(results))
    elif args.peer:
        results = [measure_trl(args, tuned) for tuned in (False, True)]
        print(table(results))
    elif len(args.model) == 1:
        results = [measure_one(args)]
    else:
        results = measure_each(args, sys.argv[1:] if argv is None else argv)
    if args.json:
        write_text(Path(args.json), json.dumps(results, indent=1))
    return results


if __name__ == "__main__":
    run_main(main, "nothing was written")
