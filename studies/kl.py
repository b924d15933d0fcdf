"""How far a multi-domain model is from every expert on every domain's prompts, and which experts
are a domain's policy neighbours (M2RL, section 3.4, equation 1, Figure 4).

    python -m studies.analyze kl --experts math=runs/math code=runs/code \\
        --models ties=merged/ties --data toy --held-out 40 --out analyses/kl

    KL(B, A)      = E_{x ∼ A, y ∼ π_B(·|x)} Σ_t log π_B(y_t | x, y_<t) − log π_multi(y_t | x, y_<t)
                    for expert B and data domain A
    neighbour     B ≠ A is a policy neighbour of A if KL(B, A) < ε, with ε = --factor · KL(A, A)
                    (the paper compares the two KLs and gives no factor)
    score change  the multi-domain model's accuracy on A minus that of A's expert

The weights of one model at a time are in memory: all models take turns in one policy.

Tensor suffixes: P prompts, B sequences, T tokens, K experts, D data domains.
"""

from functools import partial

import numpy as np

import data
import eval as evaluation
import grpo
from common.checkpoints import load_weights
from common.cli import add_flags, natural, non_negative_float, positive_int
from common.errors import UserError
from common.formats import system_prompt
from common.reports import by_domain, domain_metrics
from common.rows import DOMAINS
from sources.models import resolve_model
from studies import pictures
from studies.folders import named_folders


def parse_args(parser, argv):
    """The flags of this analysis; `parser` has --out already."""
    add = parser.add_argument
    add(
        "--experts",
        nargs="+",
        required=True,
        help="folders of the experts, each with its domain: DOMAIN=FOLDER",
    )
    add(
        "--models",
        nargs="+",
        required=True,
        help="folders of the multi-domain models, or NAME=FOLDER",
    )
    add("--k", type=positive_int, default=4, help="responses per prompt")
    add(
        "--held-out",
        type=natural,
        default=0,
        help="use only the prompts that training holds out with --eval-prompts N; 0: use all",
    )
    add(
        "--factor",
        type=non_negative_float,
        default=1.5,
        help="ε as a multiple of the KL from the domain's own expert",
    )
    add_flags(parser, "--micro-batch-tokens", *evaluation.SAMPLING)
    # load_evaluation_rows() and rollout() read these, which are no flags here: there are no
    # benchmarks, no limit, and all prompts are one mini-batch.
    parser.set_defaults(benchmarks=[], limit=0, mini_batch_prompts=1 << 60)
    return evaluation.parse_sampling(parser, argv)


def run(args):
    """(numbers, figure). Raises UserError. numbers:

    experts, domains  names, in the order of the rows and columns of kl
    models            {model: kl and error (its standard error over prompts), both [K, D] in nats;
                      neighbours {domain: experts}; score_change {domain: difference}}
    accuracy          {"<model or expert>/<domain>": accuracy}
    """
    experts = named_folders(args.experts)
    models = named_folders(args.models)
    for name in experts:
        if name not in DOMAINS:
            raise UserError(
                f"--experts {name}=…: an expert is named by its domain ({' '.join(DOMAINS)})"
            )
    rows = [row for row in evaluation.load_evaluation_rows(args) if row["domain"] in experts]
    args.model = next(iter(experts.values()))
    name, tokenizer, policy = evaluation.open_model(args)
    rows = data.encode_prompts(
        rows, tokenizer, partial(system_prompt, args=args), args.max_prompt_tokens, date=args.date
    )
    engine = evaluation.open_sampler(name, policy, rows, args)
    print(
        f"engine {engine}; {len(rows)} prompts × {args.k} responses by {len(experts)} experts and "
        f"{len(models)} models each",
        flush=True,
    )
    rows_of = rows_by_domain(rows)
    responses, accuracy = sample(policy, tokenizer, rows_of, experts, models, args)

    model_numbers = {}
    for model, folder in models.items():
        load_weights(policy, resolve_model(folder))
        kl_KD, error_KD = kl_of_experts(policy, responses, list(experts), list(rows_of), args)
        # domain d's own expert has the name d
        change = {d: accuracy[model, d] - accuracy[d, d] for d in rows_of}
        neighbours = find_neighbours(kl_KD, list(experts), list(rows_of), args.factor)
        print_model(model, kl_KD, neighbours, change, list(experts))
        model_numbers[model] = {
            "kl": kl_KD.tolist(),
            "error": error_KD.tolist(),
            "neighbours": neighbours,
            "score_change": change,
        }
    numbers = {
        "experts": list(experts),
        "domains": list(rows_of),
        "models": model_numbers,
        "accuracy": {f"{model}/{domain}": value for (model, domain), value in accuracy.items()},
    }
    return numbers, draw(numbers)


def rows_by_domain(rows: list[dict]) -> dict[str, list[dict]]:
    """{domain: its rows}, in DOMAINS' order, without domains that have none."""
    rows_of = {}
    for domain in DOMAINS:
        domain_rows = [row for row in rows if row["domain"] == domain]
        if domain_rows:
            rows_of[domain] = domain_rows
    return rows_of


def sample(policy, tokenizer, rows_of: dict, experts: dict, models: dict, args):
    """Let every expert and model answer every domain's prompts.

    Returns {(expert, domain): (batch, the expert's logp_BT)} and {(expert or model, domain):
    accuracy}. An accuracy is NaN if no response could be scored.
    """
    responses = {}
    accuracy = {}
    for name, folder in {**experts, **models}.items():
        load_weights(policy, resolve_model(folder))
        for domain, rows in rows_of.items():
            batch, columns, _, _ = grpo.rollout(
                policy, tokenizer, rows, args.k, (args.seed, "kl"), args.temperature, args
            )
            accuracies = by_domain(domain_metrics(columns), "accuracy")
            accuracy[name, domain] = accuracies.get(domain, float("nan"))
            if name in experts:
                logp_BT, _ = grpo.log_probs(policy, batch, args)
                responses[name, domain] = batch, logp_BT
        cells = " ".join(f"{domain} {accuracy[name, domain]:.2f}" for domain in rows_of)
        print(f"{name}: {cells}", flush=True)
    return responses, accuracy


def kl_of_experts(policy, responses: dict, experts: list[str], domains: list[str], args):
    """(KL(expert ‖ policy) in nats, its standard error over prompts), both [K, D].

    responses: those of sample(). The error is 0 for a single prompt.
    """
    kl_KD, error_KD = np.zeros((2, len(experts), len(domains)))
    for (expert, domain), (batch, expert_logp_BT) in responses.items():
        logp_BT, _ = grpo.log_probs(policy, batch, args)
        log_ratio_B = (expert_logp_BT - logp_BT).sum(1).double().numpy()
        # The error is over prompts, because a prompt's responses are not independent.
        log_ratio_P = log_ratio_B.reshape(-1, args.k).mean(1)
        cell = experts.index(expert), domains.index(domain)
        kl_KD[cell] = log_ratio_P.mean()
        if len(log_ratio_P) > 1:
            error_KD[cell] = log_ratio_P.std(ddof=1) / len(log_ratio_P) ** 0.5
    return kl_KD, error_KD


def find_neighbours(kl_KD, experts: list[str], domains: list[str], factor: float) -> dict:
    """{domain: the other experts whose KL is below `factor` times the KL of its own expert}."""
    neighbours = {}
    for j, domain in enumerate(domains):
        epsilon = factor * kl_KD[experts.index(domain), j]
        neighbours[domain] = []
        for i, expert in enumerate(experts):
            if expert != domain and kl_KD[i, j] < epsilon:
                neighbours[domain].append(expert)
    return neighbours


def print_model(model: str, kl_KD, neighbours: dict, change: dict, experts: list[str]) -> None:
    """Print a line per domain. change: {domain: score change}."""
    for j, domain in enumerate(change):
        own_kl = kl_KD[experts.index(domain), j]
        print(
            f"{model}, {domain}: KL of its own expert {own_kl:.3f}; neighbours "
            f"{' '.join(neighbours[domain]) or 'none'}; score change {change[domain]:+.3f}"
        )


def draw(numbers: dict):
    """A figure with a heat map per model: KL by expert and data domain, and the score changes."""
    models = numbers["models"]
    rows, columns = pictures.grid_shape(len(models))
    figure, axes = pictures.grid(rows, columns, panel_width=4.2, panel_height=3.2)
    for i, (model, values) in enumerate(models.items()):
        axis = axes.flat[i]
        labels = []
        for domain, change in values["score_change"].items():
            labels.append(f"{domain}\n{change:+.2f}")
        title = f"KL(expert ‖ {model}), nats"
        pictures.heat_map(axis, values["kl"], numbers["experts"], labels, title)
        axis.set_xlabel("data domain and score change")
        if i % columns == 0:
            axis.set_ylabel("expert")
    for axis in axes.flat[len(models) :]:
        axis.set_visible(False)
    return figure
