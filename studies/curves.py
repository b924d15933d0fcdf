"""Curves of reward and accuracy along training, by domain, of several runs side by side.

    python -m studies.analyze curves --runs runs/joint runs/math runs/code --out analyses/curves
    python -m studies.analyze curves --runs GRPO=runs/a CGPO=runs/b --kinds accuracy \\
        --out docs/grpo_cgpo

Curves are smoothed over a tenth of each run, and the raw values are faint. A run has a held-out
accuracy if it evaluated during training (--eval-every). With --eval-domains it has one on domains
that it does not train, too (M2RL, Figure 2). If one kind is drawn, the last panel is the mean over
the domains.

The command prints what each run cost (M2RL, Table 2): hours of its steps × ranks, without
evaluation.
"""

from pathlib import Path

import numpy as np

from common.errors import UserError
from common.runs import read_flags, read_metrics
from common.reports import smoothed
from common.rows import DOMAINS
from studies import pictures
from studies.folders import named_folders

# kind, of the metrics <kind>/<domain> in metrics.jsonl: its axis label
KINDS = {"reward": "reward", "accuracy": "accuracy", "eval/sampled": "held-out accuracy"}
ACCURACY_LIMITS = (-0.02, 1.02)  # of an axis: curves at 0 and at 1 stay visible


def parse_args(parser, argv):
    """The flags of this analysis; `parser` has --out already."""
    add = parser.add_argument
    add("--runs", nargs="+", required=True, help="folders of the runs, or NAME=FOLDER")
    add(
        "--mixed",
        default="",
        help="compare the cost of the run with this name with that of all others together",
    )
    add(
        "--kinds",
        nargs="+",
        choices=list(KINDS),
        default=list(KINDS),
        help="draw only these kinds: reward, accuracy (both of training), eval/sampled (held-out "
        "accuracy)",
    )
    return parser.parse_args(argv)


def run(args):
    """(numbers, figure). numbers: {run: {hours, steps, sampled_tokens, "<kind>/<domain>": points}}.

    hours: of steps × ranks. points: [(step, value)]. Raises UserError.
    """
    runs = {}
    for name, folder in named_folders(args.runs).items():
        runs[name] = read_run(Path(folder))
    for name, numbers in runs.items():
        print(
            f"{name:<16} {numbers['steps']:6d} steps  {numbers['sampled_tokens'] / 1e6:10.2f} M "
            f"sampled tokens  {numbers['hours']:10.4f} hours × ranks"
        )
    if args.mixed:
        compare_cost(runs, args.mixed)
    return runs, draw(runs, args.kinds)


def read_run(folder: Path) -> dict:
    """{hours, steps, sampled_tokens, "<kind>/<domain>": points} of a run. Raises UserError."""
    lines = read_metrics(folder)
    world_size = read_flags(folder).get("ranks", 1)
    if not isinstance(world_size, int):
        raise UserError(f"{folder / 'args.json'} is damaged: its ranks are {world_size!r:.40}")
    seconds = []
    for line in lines:
        seconds += [value for name, value in line.items() if name.startswith("seconds/")]
    numbers = {
        "hours": sum(seconds) * world_size / 3600,
        "steps": lines[-1]["step"],
        "sampled_tokens": sum(line.get("tokens", 0) for line in lines),
    }
    for kind in KINDS:
        for domain in DOMAINS:
            name = f"{kind}/{domain}"
            points = [(line["step"], line[name]) for line in lines if name in line]
            if points:
                numbers[name] = points
    return numbers


def compare_cost(runs: dict, mixed: str) -> None:
    """Add the mixed run's hours as a share of all others' together, and print it.

    Raises UserError if there is no such run or no other one.
    """
    if mixed not in runs or len(runs) < 2:
        raise UserError(f"--mixed {mixed}: not the name of one of several runs ({', '.join(runs)})")
    separate = sum(numbers["hours"] for name, numbers in runs.items() if name != mixed)
    share = runs[mixed]["hours"] / separate
    runs[mixed]["share_of_the_others"] = share
    print(f"{mixed} took {share:.1%} of the others' time together (M2RL: 63.7%)")


# ---------------- the picture ----------------


def draw(runs: dict, kinds: list[str]):
    """A figure. One kind: a panel per domain, and their mean. Several: a row of panels per kind.

    Raises UserError if no run has values of these kinds.
    """
    kinds = [kind for kind in kinds if domains_of(runs, [kind])]
    domains = domains_of(runs, kinds)
    if not domains:
        raise UserError("no run has values to draw: --kinds chooses what is drawn")
    if len(kinds) == 1:
        figure, axes = draw_one_kind(runs, kinds[0], domains)
    else:
        figure, axes = draw_kinds(runs, kinds, domains)
    pictures.legend_below(figure, axes)
    return figure


def domains_of(runs: dict, kinds: list[str]) -> list[str]:
    """The domains for which any run has values of these kinds, in DOMAINS' order."""
    domains = []
    for domain in DOMAINS:
        names = [f"{kind}/{domain}" for kind in kinds]
        if any(name in numbers for numbers in runs.values() for name in names):
            domains.append(domain)
    return domains


def draw_one_kind(runs: dict, kind: str, domains: list[str]):
    """(figure, axes): a panel per domain, and one of the mean if there are several domains."""
    panels = [*domains, "mean"] if len(domains) > 1 else domains
    rows, columns = pictures.grid_shape(len(panels))
    figure, axes = pictures.grid(rows, columns, sharey=True)
    for i, panel in enumerate(panels):
        axis = axes.flat[i]
        for color, (name, numbers) in enumerate(runs.items()):
            if panel == "mean":
                points = mean_points(numbers, kind, domains)
            else:
                points = numbers.get(f"{kind}/{panel}", [])
            draw_curve(axis, points, name, f"C{color}", kind)
        axis.set_title("mean over domains" if panel == "mean" else panel)
        if i + columns >= len(panels):  # no panel is below this one
            axis.set_xlabel("training step")
        if i % columns == 0:
            axis.set_ylabel(KINDS[kind])
    if kind != "reward":
        axes[0, 0].set_ylim(ACCURACY_LIMITS)
    return figure, axes


def draw_kinds(runs: dict, kinds: list[str], domains: list[str]):
    """(figure, axes): a row of panels per kind, with a panel per domain."""
    figure, axes = pictures.grid(len(kinds), len(domains), panel_height=2.0, sharey="row")
    for row, kind in enumerate(kinds):
        for column, domain in enumerate(domains):
            axis = axes[row, column]
            for color, (name, numbers) in enumerate(runs.items()):
                points = numbers.get(f"{kind}/{domain}", [])
                draw_curve(axis, points, name, f"C{color}", kind)
            if row == 0:
                axis.set_title(domain)
            if row == len(kinds) - 1:
                axis.set_xlabel("training step")
        axes[row, 0].set_ylabel(KINDS[kind])
        if kind != "reward":
            axes[row, 0].set_ylim(ACCURACY_LIMITS)
    return figure, axes


def draw_curve(axis, points: list[tuple], name: str, color: str, kind: str) -> None:
    """Draw a run's curve in a panel.

    Values of training are smoothed, and the raw ones are faint. Evaluations are few, so they are
    drawn as they are.
    """
    if not points:
        return
    steps, values = zip(*points)
    if kind == "eval/sampled":
        axis.plot(steps, values, lw=1.6, color=color, label=name, marker=".")
    else:
        width = max(1, len(values) // 10)
        axis.plot(steps, smoothed(values, width), lw=1.8, alpha=0.9, color=color, label=name)
        axis.plot(steps, values, lw=0.5, alpha=0.2, color=color)


def mean_points(numbers: dict, kind: str, domains: list[str]) -> list[tuple]:
    """[(step, mean over the domains)] of the steps that have a value for every domain."""
    value_of = {domain: dict(numbers.get(f"{kind}/{domain}", [])) for domain in domains}
    points = []
    for step in value_of[domains[0]]:
        if all(step in values for values in value_of.values()):
            mean = np.mean([values[step] for values in value_of.values()])
            points.append((step, float(mean)))
    return points
