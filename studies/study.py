"""The study: every method on the toy, at equal rollouts, with controls, seeds and errors.

    python -m studies.study             # do the missing runs, then write the tables and the figure
    python -m studies.study --report    # write the tables and the figure alone

All methods of a seed start from one warm start and train on 160 steps × 20 prompts × 8 responses.
Accuracy is that of 8 sampled responses to prompts that no run trains on, after the last step.

Each method's learning rate is the best of three or more that differ by factors of two. Further
rates are tried until the best one lies between two others. It is chosen on a seed that is not
reported, by prompts that are neither trained on there nor reported. An equal rate for all would
compare step sizes, because under Adam two methods with equal learning rates move by different
lengths (the table has ‖θ − θ_0‖).

Differences from joint GRPO are paired by seed. p is that of a two-sided t-test. It has a star if it
is significant at 0.05 after Holm's correction over the setting's methods. Every finished run is one
line of docs/study.jsonl, so the same command continues a study that was stopped.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
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
from common.files import RUNS, append_jsonl, read_jsonl, write_jsonl, write_text
from common.reports import by_domain, peak_memory
from common.rows import DOMAINS
from sources.load import load_rows
from sources.toy import build_toy
from studies import pictures

RESULTS = Path("docs/study.jsonl")
FIGURE = Path("docs/study.png")
PAGE = Path("docs/results.md")
TABLE_BEGINS = "<!-- studies.study writes this table -->\n"
TABLE_ENDS = "\n<!-- to here -->"

TUNING_SEED = 1000  # far from the reported seeds, which count from 0
MAX_RATES = (
    6  # learning rates that a method may try: a factor of 32 from the smallest to the largest
)
BIN = 8  # steps per point of a curve: 20 points for 160 steps


class Method(NamedTuple):
    """One row of the study."""

    module: ModuleType  # the algorithm's file
    flags: list[str]
    rates: tuple[float, ...]  # the learning rates that are tried first


LOW = (1.25e-4, 2.5e-4, 5e-4)
MIDDLE = (2.5e-4, 5e-4, 1e-3)
HIGH = (5e-4, 1e-3, 2e-3)
METHODS = {  # name: method; another method is another line here
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
PAIRS = [  # further differences that the report gives, besides those from joint GRPO
    ("CGPO", "CGPO, domains mixed"),
    ("CGPO", "CGPO, fixed order"),
    ("MCPO", "MCPO, λ_cross 0"),
    ("MCPO", "MCPO, λ_in 0"),
]
# The methods that the figure shows.
DRAWN = ("joint GRPO", "CGPO", "CGPO, domains mixed", "FAMO", "PCGrad", "MCPO")


# ---------------- one run ----------------
# A run is {"setting", "method", "seed", "lr"}, in tests also with "steps". Its result is the same
# dict with the measurements of run_once() added.


def run_key(run: dict) -> tuple:
    """What distinguishes a run from the others."""
    return run["setting"], run["method"], run["seed"], run["lr"]


def run_once(run: dict) -> dict:
    """Train and evaluate; returns the result. It needs a process of its own, and sets one thread.

    before, accuracy   {domain: held-out accuracy} of the warm start and after the last step
    moved              ‖θ − θ_0‖
    step_s, peak_gib   median seconds per step, and peak memory
    reward, alignment  curves: binned() values, by domain and over domains
    """
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
    """Train the run's method from the checkpoint `start`. Returns the trained run's folder."""
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
    """The folder of this seed's warm start; builds it and rates the toy's prompts if it is new."""
    torch.set_num_threads(1)
    start = build_toy(seed)
    rated_file(seed).parent.mkdir(parents=True, exist_ok=True)
    if not rated_file(seed).exists():
        scores = RUNS / "study" / f"start-{seed}"
        shutil.rmtree(scores, ignore_errors=True)
        flags = ["--model", start, "--data", "toy", "--threads", "1", "--seed", str(seed)]
        evaluation.main([*flags, "--out", str(scores), "--rated", str(rated_file(seed))])
    return start


def rated_file(seed: int) -> Path:
    """File of the toy's prompts with their pass rates by this seed's warm start, for self-paced."""
    return RUNS / "study" / f"rated-{seed}.jsonl"


def rows_of(run: dict, held_out_per_domain: int) -> tuple[list[dict], list[dict]]:
    """(training rows, held-out rows) of a run.

    A tuning run neither trains on the reported held-out prompts nor is judged by them: it holds out
    others.
    """
    needs_rates = "self-paced" in METHODS[run["method"]].flags
    rows = load_rows([str(rated_file(run["seed"])) if needs_rates else "toy"])
    training_rows, held_out = data.hold_out(rows, held_out_per_domain)
    if run["seed"] == TUNING_SEED:
        training_rows, held_out = data.hold_out(training_rows, held_out_per_domain)
    return training_rows, held_out


def alignment(policy, mini_batch: dict, key: tuple, args) -> dict[str, float]:
    """{"alignment": mean cos(g_i, g_j) of the domains' gradients}, in every BIN-th step.

    The dict is empty in the other steps, and if no two gradients have a cosine. key: (seed, step,
    mini-batch).
    """
    if key[1] % BIN != 1:
        return {}
    cosines = cgpo.domain_cosines(policy, mini_batch, args)
    if not cosines:
        return {}
    return {"alignment": float(np.mean(list(cosines.values())))}


def distance(start: str, end: Path) -> float:
    """‖θ − θ_0‖: the Euclidean distance of two checkpoints of one shape."""
    before = load_file(f"{start}/model.safetensors")
    after = load_file(f"{end}/model.safetensors")
    squares = [(after[name] - tensor).square().sum().item() for name, tensor in before.items()]
    return sum(squares) ** 0.5


def binned(lines: list[dict], name: str) -> list[float | None]:
    """Means of a metric over every BIN steps; None for steps without a value of it."""
    means = []
    for i in range(0, len(lines), BIN):
        values = [line[name] for line in lines[i : i + BIN] if name in line]
        means.append(round(float(np.mean(values)), 4) if values else None)
    return means


def commit() -> str:
    """The short hash of the repository's commit; "" outside a repository."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


# ---------------- all runs ----------------


RESULT_FIELDS = {  # of a line of RESULTS that everything here reads
    "setting": (str,),
    "method": (str,),
    "seed": (int,),
    "lr": (int, float),
    "before": (dict,),
    "accuracy": (dict,),
    "moved": (int, float),
    "reward": (dict,),
}


def read_results() -> list[dict]:
    """The results of all finished runs. A line that a kill has cut is no result."""
    return read_jsonl(RESULTS, RESULT_FIELDS)


def choose_rate(results: list[dict], setting: str, method: str) -> tuple[float | None, list[float]]:
    """(learning rate with the highest mean accuracy on the tuning seed, rates to try before).

    The method's own rates are tried first. Then, while the best is the largest or the smallest one,
    the next rate in that direction is tried; MAX_RATES in all. The best is None until no rate is
    left to try.
    """
    accuracy = {}  # by learning rate
    for result in results:
        if run_key(result)[:3] == (setting, method, TUNING_SEED):
            accuracy[result["lr"]] = mean_accuracy(result)
    to_try = [rate for rate in METHODS[method].rates if rate not in accuracy]
    if to_try:
        return None, to_try
    best = max(accuracy, key=accuracy.get)
    if len(accuracy) < MAX_RATES:
        if best == max(accuracy):
            to_try.append(2 * best)
        if best == min(accuracy):
            to_try.append(best / 2)
    if to_try:
        return None, to_try
    return best, []


def missing_runs(results: list[dict], args) -> list[dict]:
    """The runs to do now: tuning runs, then seed by seed those of methods that have their rate."""
    runs = []
    for seed in (TUNING_SEED, *range(args.seeds)):
        for setting in args.settings:
            for method in args.methods:
                best, to_try = choose_rate(results, setting, method)
                if seed == TUNING_SEED:
                    rates = to_try
                elif best is None:
                    rates = []
                else:
                    rates = [best]
                for rate in rates:
                    runs.append({"setting": setting, "method": method, "seed": seed, "lr": rate})
    finished = {run_key(result) for result in results}
    return [run for run in runs if run_key(run) not in finished]


def run_all(args) -> None:
    """Do the missing runs, --workers at a time. Each result is appended to RESULTS."""
    seeds = [TUNING_SEED, *range(args.seeds)]
    print(f"warm starts and pass rates of {len(seeds)} seeds", flush=True)
    with make_pool(args.workers) as pool:
        pool.map(prepare, seeds, chunksize=1)
    write_jsonl(RESULTS, read_results())  # nothing may be appended to a line that a kill has cut
    started = time.perf_counter()
    finished = 0
    while runs := missing_runs(read_results(), args):
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
    """Number of pairs of a setting and a method that have no learning rate yet."""
    count = 0
    for setting in args.settings:
        for method in args.methods:
            best, _ = choose_rate(results, setting, method)
            if best is None:
                count += 1
    return count


def make_pool(workers: int):
    """A pool of worker processes. Each task has a new process, so no run changes the next one."""
    context = multiprocessing.get_context("fork")
    initial = (os.getpid(),)
    return context.Pool(workers, initializer=begin_worker, initargs=initial, maxtasksperchild=1)


def begin_worker(parent_id: int) -> None:
    """In a new worker: print nothing, and end when the parent has ended, even by kill -9."""
    be_quiet()
    threading.Thread(target=end_with, args=(parent_id,), daemon=True).start()


def end_with(parent_id: int) -> None:
    """End this process when the process that started it has ended.

    Otherwise its run would write a folder beside that of the study that goes on.
    """
    while os.getppid() == parent_id:
        time.sleep(0.5)
    os._exit(1)


def be_quiet() -> None:
    """Discard what this process prints: a worker's runs print a line per step."""
    sys.stdout = open(os.devnull, "w")


# ---------------- statistics ----------------


def holm(p_values: dict[str, float], level: float = 0.05) -> set[str]:
    """The names whose hypothesis is rejected by Holm's step-down procedure (Holm 1979).

    A p of NaN does not count as a hypothesis.
    """
    names = [name for name, p in p_values.items() if not np.isnan(p)]
    names.sort(key=p_values.get)
    rejected = set()
    for i, name in enumerate(names):
        if p_values[name] > level / (len(names) - i):
            break
        rejected.add(name)
    return rejected


def mean_accuracy(result: dict) -> float:
    """A result's accuracy, mean over the domains."""
    return float(np.mean(list(result["accuracy"].values())))


def paired_differences(by_method: dict[str, dict[int, dict]], a: str, b: str) -> list[float]:
    """Mean accuracies of method a minus those of method b, by the seeds that both have."""
    results_a = by_method.get(a, {})
    results_b = by_method.get(b, {})
    differences = []
    for seed in sorted(results_a.keys() & results_b.keys()):
        differences.append(mean_accuracy(results_a[seed]) - mean_accuracy(results_b[seed]))
    return differences


def reported_results(results: list[dict], setting: str) -> dict[str, dict[int, dict]]:
    """{method: {seed: its result at the chosen learning rate}} of one setting."""
    by_method = {method: {} for method in METHODS}
    for result in results:
        if result["setting"] != setting or result["seed"] == TUNING_SEED:
            continue
        best, _ = choose_rate(results, setting, result["method"])
        if result["lr"] == best:
            by_method[result["method"]][result["seed"]] = result
    return {method: by_seed for method, by_seed in by_method.items() if by_seed}


# ---------------- the report ----------------


def report() -> str:
    """The markdown tables with the differences of PAIRS. Draws the figure.

    Raises UserError if there are no results.
    """
    results = read_results()
    if not results:
        raise UserError(f"{RESULTS} has no results yet: python -m studies.study runs them")
    sections = []
    for setting in SETTINGS:
        by_method = reported_results(results, setting)
        if by_method:
            sections.append(setting_section(setting, by_method))
    draw(results)
    return "\n\n".join(sections)


def setting_section(setting: str, by_method: dict[str, dict[int, dict]]) -> str:
    """The report of one setting: a table with a row per method, and the differences of PAIRS."""
    differences = {}
    p_values = {}
    for method in by_method:
        if method != BASELINE:
            differences[method] = paired_differences(by_method, method, BASELINE)
            p_values[method] = evaluation.p_value(differences[method])
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
        if differences.get(method):
            star = "*" if method in significant else ""
            difference = mean_with_error(differences[method], "+.3f")
            cells += [difference, p_text(p_values[method]) + star]
        else:  # the baseline itself, or no seed in common with it
            cells += ["–", "–"]
        for name in ("moved", "step_s", "peak_gib"):
            cells.append(f"{np.mean([result[name] for result in results]):.2f}")
        lines.append(table_row(cells))
    return "\n".join([*lines, "", pairs_sentence(by_method)])


def table_row(cells: list[str]) -> str:
    """A row of a markdown table."""
    return f"| {' | '.join(cells)} |"


def pairs_sentence(by_method: dict[str, dict[int, dict]]) -> str:
    """The differences of PAIRS in one sentence."""
    clauses = []
    for a, b in PAIRS:
        differences = paired_differences(by_method, a, b)
        if differences:
            p = p_text(evaluation.p_value(differences))
            clauses.append(f"{a} − {b}: {mean_with_error(differences, '+.3f')} (p {p})")
    return "; ".join(clauses) + "."


def mean_with_error(values: list[float], number_format: str) -> str:
    """Mean ± standard error as text; of one value the mean alone.

    number_format: that of the mean, such as "+.3f". The error has no sign.
    """
    mean = f"{np.mean(values):{number_format}}"
    error = evaluation.standard_error(values)
    if error is None:
        return mean
    return f"{mean} ± {error:{number_format.removeprefix('+')}}"


def p_text(p: float) -> str:
    """p with two significant digits; a dash if there is none."""
    return "–" if np.isnan(p) else f"{p:.2g}"


# ---------------- the figure ----------------


def draw(results: list[dict]) -> None:
    """Draw reward by domain along training, and the mean cosine of the domains' gradients.

    Each setting has rows of panels of its own. Curves are means over seeds, bands ± a standard
    error.
    """
    panels = [d for d in DOMAINS if any(d in result["reward"] for result in results)]
    panels.append("alignment")
    setting_rows, columns = pictures.grid_shape(len(panels))
    figure, axes = pictures.grid(setting_rows * len(SETTINGS), columns, sharex=True)
    for s, setting in enumerate(SETTINGS):
        by_method = reported_results(results, setting)
        setting_axes = axes[s * setting_rows : (s + 1) * setting_rows].flatten()
        for axis, panel in zip(setting_axes, panels):
            draw_panel(axis, panel, by_method)
            axis.set_title(f"{setting}: {panel}")
    for axis in axes[-1]:
        axis.set_xlabel("training step")
    pictures.legend_below(figure, axes)
    pictures.save(figure, FIGURE)


def draw_panel(axis, panel: str, by_method: dict[str, dict[int, dict]]) -> None:
    """Draw one domain's reward, or the alignment, of the methods in DRAWN."""
    for i, method in enumerate(DRAWN):
        if method not in by_method:
            continue
        curves = []
        for result in by_method[method].values():
            if panel == "alignment":
                curves.append(result["alignment"])
            else:
                curves.append(result["reward"].get(panel, []))
        values = np.array(curves, dtype=float)  # [seeds, bins]; None becomes NaN
        steps = BIN * (np.arange(values.shape[1]) + 0.5)  # the middle of each bin
        mean = values.mean(0)
        axis.plot(steps, mean, lw=1.5, color=f"C{i}", label=method)
        if len(values) > 1:
            error = values.std(0, ddof=1) / len(values) ** 0.5
            axis.fill_between(steps, mean - error, mean + error, color=f"C{i}", alpha=0.2, lw=0)
    axis.set_ylabel(r"mean $\cos(g_i, g_j)$" if panel == "alignment" else "reward")


# ---------------- the command line ----------------


def parse_args(argv: list[str] | None = None):
    """The flags. A wrong flag ends the script."""
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
    add("--workers", type=positive_int, default=2, help="parallel runs, of one thread each")
    add("--report", action="store_true", help="write the tables and the figure, and run nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Do the missing runs, and write the tables to docs/results.md and the figure.

    Raises UserError if there are no results.
    """
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
    run_main(main, "the same command goes on")
