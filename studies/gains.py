"""Do mixed, merged and distilled models gain on the same prompts as the experts? (M2RL, section
3.5, Figure 5)

    python -m studies.analyze gains --start scores/start --experts scores/math scores/code \\
        --models scores/ties --out analyses/gains

    g_m(i)      = max(accuracy_m(i) − accuracy_start(i), 0)    for model m and prompt i
    g_union(i)  = max over the experts of g_expert(i)
    gain consistency of model m on a domain = cosine(g_m, g_union) over the domain's prompts

The accuracies are those in eval.py's folders. Suffix: P prompts.
"""

import numpy as np

import eval as evaluation
from common.rows import DOMAINS
from studies import pictures
from studies.folders import named_folders


def parse_args(parser, argv):
    """The flags of this analysis; `parser` has --out already."""
    add = parser.add_argument
    add("--start", required=True, help="eval.py's folder of the model before RL")
    add("--experts", nargs="+", required=True, help="eval.py's folders of the experts")
    add(
        "--models",
        nargs="+",
        required=True,
        help="eval.py's folders of mixed, merged or distilled models, or NAME=FOLDER",
    )
    return parser.parse_args(argv)


def run(args):
    """(numbers, figure). numbers: {model: {domain: gain consistency}}. Raises UserError."""
    models = named_folders(args.models)
    folders = [args.start, *args.experts, *models.values()]
    accuracy, scored_ids = evaluation.same_prompts(folders)
    ids_of = ids_by_domain(evaluation.read_items(args.start), scored_ids)
    consistency = {}
    for name, folder in models.items():
        consistency[name] = {}
        for domain, ids in ids_of.items():
            expert_gains = []
            for expert in args.experts:
                expert_gains.append(gains(accuracy[args.start], accuracy[expert], ids))
            union_P = np.max(expert_gains, 0)
            model_P = gains(accuracy[args.start], accuracy[folder], ids)
            consistency[name][domain] = cosine(model_P, union_P)
    domains = list(ids_of)
    print_table(consistency, domains)
    return consistency, draw(consistency, domains)


def ids_by_domain(items: list[dict], scored_ids: list[str]) -> dict[str, list[str]]:
    """{domain: sorted ids of its prompts}, in DOMAINS' order."""
    scored = set(scored_ids)
    ids_of = {}
    for domain in DOMAINS:
        ids = []
        for item in items:
            if item["domain"] == domain and item["id"] in scored:
                ids.append(item["id"])
        if ids:
            ids_of[domain] = sorted(ids)
    return ids_of


def gains(start: dict, model: dict, ids: list[str]):
    """[P]: by how much the model is more accurate than the start; 0 if it is not.

    start, model: {prompt's id: accuracy}.
    """
    return np.array([max(model[i] - start[i], 0.0) for i in ids])


def cosine(a_P, b_P) -> float:
    """The cosine of two vectors; 0 if one of them is 0 everywhere."""
    norms = np.linalg.norm(a_P) * np.linalg.norm(b_P)
    return float(a_P @ b_P / norms) if norms else 0.0


def print_table(consistency: dict, domains: list[str]) -> None:
    """Print a row per model."""
    header = "".join(f"{domain:>10}" for domain in domains)
    print(f"{'gain consistency':<18}{header}      mean")
    for name, value_of in consistency.items():
        cells = "".join(f"{value_of[domain]:10.3f}" for domain in domains)
        print(f"{name:<18}{cells}{np.mean(list(value_of.values())):10.3f}")


def draw(consistency: dict, domains: list[str]):
    """A figure with a group of bars per domain and a bar per model."""
    figure, axes = pictures.grid(1, 1, panel_width=8, panel_height=3.4)
    axis = axes[0, 0]
    width = 0.8 / len(consistency)
    for i, (name, value_of) in enumerate(consistency.items()):
        offset = (i - (len(consistency) - 1) / 2) * width
        axis.bar(np.arange(len(domains)) + offset, list(value_of.values()), width, label=name)
    axis.set_xticks(range(len(domains)), domains)
    axis.set_xlabel("domain")
    axis.set_ylabel("gain consistency (cosine)")
    pictures.legend_below(figure, axes)
    return figure
