"""The study: every method on the toy, at equal rollouts, with controls, seeds and errors.

    python -m studies.study             # run what docs/study.jsonl lacks, then table and figure
    python -m studies.study --report    # table and figure alone, from docs/study.jsonl

All methods of a seed start from one warm start and see 160 steps × 20 prompts × 8 responses.
Accuracy is that of 8 sampled responses to prompts that no run trains on, after the last step.

Each method's learning rate is the best of three or more, by factors of two, until the best one lies
between others. It is chosen on a seed that is not reported, by prompts that are neither trained on
there nor reported. An equal rate for all would compare step sizes, because under Adam two methods
with equal learning rates move by different lengths (‖θ − θ_0‖ is in the table).

Differences from joint GRPO are paired by seed. p is a two-sided t-test's, starred where Holm's
correction over the setting's methods keeps it below 0.05. A finished run is one line of
docs/study.jsonl: stop at any moment, go on any day.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file

import cgpo
import data
import eval as evaluation
import famo
import grpo
import mcpo
import pcgrad
from common.cli import Parser, positive_int, run_main
from common.errors import UserError
from common.files import RUNS, append_jsonl, write_text
from common.reports import by_domain, peak_memory
from common.rows import DOMAINS
from sources.load import load_rows
from sources.toy import build_toy

RESULTS = Path("docs/study.jsonl")
FIGURE = Path("docs/study.png")
PAGE = Path("docs/results.md")
TABLE_BEGINS = "<!-- studies.study writes this table -->\n"
TABLE_ENDS = "\n<!-- to here -->"

TUNING_SEED = 1000
MOST_RATES = 6  # learning rates that a method may try
BIN = 8  # steps per point of a curve


class Method(NamedTuple):
    """One row of the study."""

    module: ModuleType  # the algorithm's file
    flags: list[str]
    rates: tuple[float, ...]  # the learning rates that are tried first


LOW = (1.25e-4, 2.5e-4, 5e-4)
MIDDLE = (2.5e-4, 5e-4, 1e-3)
HIGH = (5e-4, 1e-3, 2e-3)
METHODS = {  # another method is another line here
    "joint GRPO": Method(grpo, [], MIDDLE),
    "CGPO": Method(cgpo, [], HIGH),
    "CGPO, domains mixed": Method(cgpo, ["--order", "mixed"], HIGH),
    "CGPO, fixed order": Method(cgpo, ["--order", "fixed"], HIGH),
    "CGPO, α 0.9": Method(cgpo, ["--alpha", "0.9"], HIGH),
    "CGPO, α 1.5": Method(cgpo, ["--alpha", "1.5"], HIGH),
    "CGPO, loss weighted": Method(cgpo, ["--domain-weight", "loss"], LOW),
    "FAMO": Method(famo, [], MIDDLE),
    "PCGrad": Method(pcgrad, [], MIDDLE),
    "Omni-Thinker": Method(grpo, ["--curriculum", "omni-thinker"], LOW),
    "self-paced": Method(grpo, ["--curriculum", "self-paced"], LOW),
    "MCPO": Method(mcpo, [], MIDDLE),
    "MCPO, λ_cross 0": Method(mcpo, ["--lambda-cross", "0"], MIDDLE),
    "MCPO, λ_in 0": Method(mcpo, ["--lambda-in", "0"], MIDDLE),
}
BASELINE = "joint GRPO"
SETTINGS = {  # name: --domain-mix, of 20 prompts per step
    "balanced": "equal",
    "imbalanced": "math=9,code=5,science=3,writing=2,if=1",
}
PAIRS = [  # differences that the report gives besides those from joint GRPO
    ("CGPO", "CGPO, domains mixed"),
    ("CGPO", "CGPO, fixed order"),
    ("MCPO", "MCPO, λ_cross 0"),
    ("MCPO", "MCPO, λ_in 0"),
]
DRAWN = ("joint GRPO", "CGPO", "CGPO, domains mixed", "FAMO", "PCGrad", "MCPO")


# ---------------- one run ----------------
# A run is {"setting", "method", "seed", "lr"}; its result is the run with what came out of it.


def run_key(run: dict) -> tuple:
    """What tells a run from the others."""
    return run["setting"], run["method"], run["seed"], run["lr"]


def run_once(run: dict) -> dict:
    """Train and evaluate. Returns the result. In a process of its own, on one thread."""
    torch.set_num_threads(1)
    start = prepare(run["seed"])
    out = train(run, start)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    steps = lines[1:]  # the first line is the evaluation of the warm start
    seconds = []
    for line in steps:
        seconds.append(sum(value for name, value in line.items() if name.startswith("seconds/")))
    trained = [d for d in DOMAINS if any(f"reward/{d}" in line for line in lines)]
    result = run | {
        "before": by_domain(lines[0], "eval/sampled"),
        "accuracy": by_domain(lines[-1], "eval/sampled"),
        "moved": distance(start, out / "checkpoint"),
        "step_s": float(np.median(seconds)),
        "peak_gib": peak_memory() / 2**30,
        "reward": {d: binned(steps, f"reward/{d}") for d in trained},
        "alignment": binned(steps, "alignment"),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    shutil.rmtree(out)
    return result


def train(run: dict, start: str) -> Path:
    """Train the run's method from the checkpoint `start`. Returns the folder of what it wrote."""
    method = METHODS[run["method"]]
    name = [run["setting"], run["method"].replace(" ", "_"), str(run["seed"]), str(run["lr"])]
    folder = RUNS / "study" / "-".join(name)
    shutil.rmtree(folder, ignore_errors=True)
    flags = ["--model", "toy", "--seed", str(run["seed"]), "--lr", str(run["lr"])]
    flags += ["--domain-mix", SETTINGS[run["setting"]], "--threads", "1", *method.flags]
    flags += ["--save-every", "1000000", "--out", str(folder)]
    if "steps" in run:
        flags += ["--steps", str(run["steps"])]
    args = method.module.parse_args(flags)
    args.model = start
    rows = rows_of(run, args.eval_prompts)
    return method.module.train(method.module.setup(args, rows=rows), look=alignment)


def prepare(seed: int) -> str:
    """The folder of this seed's warm start. Builds it and rates the toy's prompts, if need be."""
    torch.set_num_threads(1)
    start = build_toy(seed)
    rated(seed).parent.mkdir(parents=True, exist_ok=True)
    if not rated(seed).exists():
        scores = RUNS / "study" / f"start-{seed}"
        shutil.rmtree(scores, ignore_errors=True)
        flags = ["--model", start, "--data", "toy", "--threads", "1", "--seed", str(seed)]
        evaluation.main([*flags, "--out", str(scores), "--rated", str(rated(seed))])
    return start


def rated(seed: int) -> Path:
    """The toy's prompts with their pass rates by this seed's warm start, for self-paced."""
    return RUNS / "study" / f"rated-{seed}.jsonl"


def rows_of(run: dict, held_out_per_domain: int) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows) of a run.

    A tuning run sees nothing of the reported held-out prompts: it neither trains on them nor is
    judged by them, but holds out others.
    """
    needs_rates = "self-paced" in METHODS[run["method"]].flags
    rows = load_rows([str(rated(run["seed"])) if needs_rates else "toy"])
    rows, held_out = data.hold_out(rows, held_out_per_domain)
    if run["seed"] == TUNING_SEED:
        rows, held_out = data.hold_out(rows, held_out_per_domain)
    return rows, held_out


def alignment(policy, mini_batch: dict, key: tuple, args) -> dict[str, float]:
    """{"alignment": mean cos(g_i, g_j) of the domains' gradients}, in every BIN-th step.

    key: (seed, step, mini-batch). Empty in the other steps, and where no two gradients have one.
    """
    if key[1] % BIN != 1:
        return {}
    cosines = cgpo.domain_cosines(policy, mini_batch, args)
    if not cosines:
        return {}
    return {"alignment": float(np.mean(list(cosines.values())))}


def distance(start: str, end: Path) -> float:
    """‖θ − θ_0‖ of two checkpoints of one shape."""
    before = load_file(f"{start}/model.safetensors")
    after = load_file(f"{end}/model.safetensors")
    squares = [(after[name] - tensor).square().sum().item() for name, tensor in before.items()]
    return sum(squares) ** 0.5


def binned(lines: list[dict], name: str) -> list[float | None]:
    """Means of a metric over BIN steps each; None where it was never logged."""
    means = []
    for i in range(0, len(lines), BIN):
        values = [line[name] for line in lines[i : i + BIN] if name in line]
        means.append(round(float(np.mean(values)), 4) if values else None)
    return means


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# ---------------- all runs ----------------


def read_results() -> list[dict]:
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def tuning(results: list[dict], setting: str, method: str) -> tuple[float | None, list[float]]:
    """(the learning rate with the highest mean accuracy on the tuning seed, those to try first).

    To try are the method's own rates; then, while the best is the largest or the smallest tried,
    the next one; MOST_RATES in all. The best is None until nothing is left to try.
    """
    accuracy = {}  # by learning rate
    for result in results:
        if run_key(result)[:3] == (setting, method, TUNING_SEED):
            accuracy[result["lr"]] = mean_accuracy(result)
    to_try = [rate for rate in METHODS[method].rates if rate not in accuracy]
    if to_try:
        return None, to_try
    best = max(accuracy, key=accuracy.get)
    if len(accuracy) < MOST_RATES:
        if best == max(accuracy):
            to_try.append(2 * best)
        if best == min(accuracy):
            to_try.append(best / 2)
    return (None, to_try) if to_try else (best, [])


def missing(results: list[dict], args) -> list[dict]:
    """The runs to do now: tuning runs, and seed by seed those of methods that have their rate."""
    runs = []
    for seed in (TUNING_SEED, *range(args.seeds)):
        for setting in args.settings:
            for method in args.methods:
                best, to_try = tuning(results, setting, method)
                rates = to_try
                if seed != TUNING_SEED:
                    rates = [best] if best else []
                for rate in rates:
                    runs.append({"setting": setting, "method": method, "seed": seed, "lr": rate})
    done = {run_key(result) for result in results}
    return [run for run in runs if run_key(run) not in done]


def run_all(args) -> None:
    """Do the missing runs, --workers at a time; each result is appended to RESULTS."""
    seeds = [TUNING_SEED, *range(args.seeds)]
    print(f"warm starts and pass rates of {len(seeds)} seeds", flush=True)
    with make_pool(args.workers) as pool:
        pool.map(prepare, seeds, chunksize=1)
    started = time.perf_counter()
    finished = 0
    while runs := missing(read_results(), args):
        runs_left = len(runs) + count_untuned(read_results(), args) * args.seeds
        with make_pool(args.workers) as pool:
            for result in pool.imap_unordered(run_once, runs):
                append_jsonl(RESULTS, [result])
                finished += 1
                runs_left -= 1
                seconds_left = (time.perf_counter() - started) / finished * runs_left
                print(
                    f"{result['setting']} · {result['method']} · seed {result['seed']} · "
                    f"lr {result['lr']:g}: mean accuracy {mean_accuracy(result):.3f}; "
                    f"{runs_left} runs, {seconds_left / 60:.0f} min left",
                    flush=True,
                )


def count_untuned(results: list[dict], args) -> int:
    """Number of methods, over the settings, that have no learning rate yet."""
    best = [tuning(results, s, m)[0] for s in args.settings for m in args.methods]
    return best.count(None)


def make_pool(workers: int):
    """Worker processes, a new one per task: nothing of one run reaches the next."""
    context = multiprocessing.get_context("fork")
    return context.Pool(workers, initializer=be_quiet, maxtasksperchild=1)


def be_quiet() -> None:
    sys.stdout = open(os.devnull, "w")


# ---------------- statistics ----------------


def holm(p_values: dict[str, float], level: float = 0.05) -> set[str]:
    """The names whose hypothesis Holm's step-down procedure rejects; a p of NaN is none."""
    ranked = sorted((name for name, p in p_values.items() if p == p), key=p_values.get)
    rejected = set()
    for i, name in enumerate(ranked):
        if p_values[name] > level / (len(ranked) - i):
            break
        rejected.add(name)
    return rejected


def mean_accuracy(result: dict) -> float:
    """Mean over the domains."""
    return float(np.mean(list(result["accuracy"].values())))


def paired(by_method: dict[str, dict[int, dict]], a: str, b: str) -> list[float]:
    """Differences of the mean accuracies of two methods, seed by seed, where both have the seed."""
    of_a, of_b = by_method.get(a, {}), by_method.get(b, {})
    seeds = sorted(of_a.keys() & of_b.keys())
    return [mean_accuracy(of_a[seed]) - mean_accuracy(of_b[seed]) for seed in seeds]


def reported(results: list[dict], setting: str) -> dict[str, dict[int, dict]]:
    """{method: {seed: its result at the chosen learning rate}} of one setting."""
    by_method = {method: {} for method in METHODS}
    for result in results:
        if result["setting"] != setting or result["seed"] == TUNING_SEED:
            continue
        best, _ = tuning(results, setting, result["method"])
        if result["lr"] == best:
            by_method[result["method"]][result["seed"]] = result
    return {method: by_seed for method, by_seed in by_method.items() if by_seed}


# ---------------- the report ----------------


def report() -> str:
    """The markdown tables and what they let one say. Draws the figure. Raises UserError."""
    results = read_results()
    if not results:
        raise UserError(f"{RESULTS} has no results yet: python -m studies.study runs them")
    sections = []
    for setting in SETTINGS:
        by_method = reported(results, setting)
        if by_method:
            sections.append(section(setting, by_method))
    draw(results)
    return "\n\n".join(sections)


def section(setting: str, by_method: dict[str, dict[int, dict]]) -> str:
    """One setting: a table with a row per method, and the differences of PAIRS."""
    p_values = {}
    for method in by_method:
        if method != BASELINE:
            p_values[method] = evaluation.p_value(paired(by_method, method, BASELINE))
    significant = holm(p_values)
    first_result = list(next(iter(by_method.values())).values())[0]
    domains = list(first_result["accuracy"])
    header = ["method", "seeds", "lr", *domains, "mean", f"− {BASELINE}", "p"]
    header += ["‖θ − θ_0‖", "s a step", "peak GiB"]
    lines = [f"**{setting}** ({SETTINGS[setting]})", "", table_row(header)]
    lines.append("|---" * len(header) + "|")
    for method, by_seed in by_method.items():
        results = list(by_seed.values())
        cells = [method, str(len(results)), f"{results[0]['lr']:g}"]
        for domain in domains:
            cells.append(mean_with_error([result["accuracy"][domain] for result in results], ".2f"))
        cells.append(mean_with_error([mean_accuracy(result) for result in results], ".3f"))
        gaps = paired(by_method, method, BASELINE) if method != BASELINE else []
        if gaps:
            star = "*" if method in significant else ""
            cells += [mean_with_error(gaps, "+.3f"), p_text(p_values[method]) + star]
        else:
            cells += ["–", "–"]
        for name in ("moved", "step_s", "peak_gib"):
            cells.append(f"{np.mean([result[name] for result in results]):.2f}")
        lines.append(table_row(cells))
    return "\n".join([*lines, "", pairs_line(by_method)])


def table_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def pairs_line(by_method: dict[str, dict[int, dict]]) -> str:
    """The differences of PAIRS in one sentence."""
    parts = []
    for a, b in PAIRS:
        gaps = paired(by_method, a, b)
        if gaps:
            p = p_text(evaluation.p_value(gaps))
            parts.append(f"{a} − {b}: {mean_with_error(gaps, '+.3f')} (p {p})")
    return "; ".join(parts) + "."


def mean_with_error(values: list[float], form: str) -> str:
    """Mean ± standard error; the mean alone of one value. form: of the mean, such as "+.3f"."""
    mean = f"{np.mean(values):{form}}"
    error = evaluation.standard_error(values)
    return mean if error is None else f"{mean} ± {error:{form.removeprefix('+')}}"


def p_text(p: float) -> str:
    return "–" if np.isnan(p) else f"{p:.2g}"


# ---------------- the figure ----------------


def draw(results: list[dict]) -> None:
    """Reward by domain along training, and the mean cosine of the domains' gradients.

    Per setting two rows of three panels. Curves are means over seeds, bands ± a standard error.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 3
    panels = [d for d in DOMAINS if any(d in result["reward"] for result in results)]
    panels.append("alignment")
    rows_per_setting = -(-len(panels) // columns)
    rows = rows_per_setting * len(SETTINGS)
    # GitHub shows the figure about 900 pixels wide, 100 per inch; drawn sharper than that.
    figure, axes = plt.subplots(
        rows, columns, figsize=(9, 2.5 * rows + 0.6), dpi=150, squeeze=False, sharex=True
    )
    handles = {}  # method: its curve, for the legend
    for s, setting in enumerate(SETTINGS):
        by_method = reported(results, setting)
        of_setting = axes[s * rows_per_setting : (s + 1) * rows_per_setting].flatten()
        for axis, panel in zip(of_setting, panels):
            handles |= draw_panel(axis, panel, by_method)
            axis.set_title(f"{setting}: {panel}", fontsize=11)
        for axis in of_setting[len(panels) :]:
            axis.set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step", fontsize=10)
    figure.legend(handles.values(), handles, loc="upper center", ncol=3, frameon=False, fontsize=11)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / figure.get_figheight()))
    figure.savefig(FIGURE)
    plt.close(figure)


def draw_panel(axis, panel: str, by_method: dict[str, dict[int, dict]]) -> dict:
    """One domain's reward, or the alignment, of the methods in DRAWN. Returns {method: curve}."""
    handles = {}
    for i, method in enumerate(DRAWN):
        if method not in by_method:
            continue
        curves = []
        for result in by_method[method].values():
            curve = result["alignment"] if panel == "alignment" else result["reward"].get(panel, [])
            curves.append(curve)
        curves = np.array(curves, dtype=float)  # [seeds, bins]
        steps = BIN * (np.arange(curves.shape[1]) + 0.5)
        mean = curves.mean(0)
        (handles[method],) = axis.plot(steps, mean, lw=1.5, color=f"C{i}")
        if len(curves) > 1:
            error = curves.std(0, ddof=1) / len(curves) ** 0.5
            axis.fill_between(steps, mean - error, mean + error, color=f"C{i}", alpha=0.2, lw=0)
    axis.set_ylabel(r"mean $\cos(g_i, g_j)$" if panel == "alignment" else "reward", fontsize=10)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=10)
    return handles


# ---------------- the command line ----------------


def parse_args(argv: list[str] | None = None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=5, help="number of reported seeds")
    add(
        "--methods",
        nargs="+",
        choices=list(METHODS),
        metavar="NAME",
        default=list(METHODS),
        help="run only these methods",
    )
    add(
        "--settings",
        nargs="+",
        choices=list(SETTINGS),
        metavar="NAME",
        default=list(SETTINGS),
        help="run only these settings",
    )
    add("--workers", type=positive_int, default=2, help="runs side by side, of one thread each")
    add("--report", action="store_true", help="run nothing; write the table and the figure")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if not args.report:
        run_all(args)
    table = report()
    page = PAGE.read_text(encoding="utf-8")
    before, begins, after = page.partition(TABLE_BEGINS)
    if begins:
        after = after[after.index(TABLE_ENDS) :]
        write_text(PAGE, before + begins + table + after)
    print(f"{table}\n\nfigure {FIGURE}")


if __name__ == "__main__":
    run_main(main)
