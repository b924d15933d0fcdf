"""How far a multi-domain model is from each expert on each domain's prompts, and which experts are
a domain's policy neighbours (M2RL, section 3.4, equation 1, Figure 4).

    python -m studies.analyze kl --experts math=runs/math code=runs/code \\
        --models ties=merged/ties --data toy --held-out 40 --out analyses/kl

    KL(B, A)      = E_{x ∼ A, y ∼ π_B(·|x)} Σ_t log π_B(y_t | x, y_<t) − log π_multi(y_t | x, y_<t)
                    for expert B and data domain A
    neighbour     B ≠ A is a policy neighbour of A where KL(B, A) < ε, with ε = --factor · KL(A, A):
                    the paper's "comparing" made a number
    score change  the multi-domain model's accuracy on A minus that of A's expert

One model's weights at a time are in memory: they change places in one policy.

Tensor suffixes: P prompts, B sequences, T tokens, K experts, D data domains.
"""

import numpy as np

import data
import eval as evaluation
import grpo
from common.checkpoints import load_weights
from common.cli import add_flags, natural, non_negative_float, positive_int
from common.errors import UserError
from common.reports import by_domain, domain_metrics
from common.rows import DOMAINS
from sources.models import resolve_model
from studies import pictures
from studies.folders import named_folders


def parse_args(parser, argv):
    add = parser.add_argument
    add("--experts", nargs="+", required=True, help="DOMAIN=FOLDER …")
    add("--models", nargs="+", required=True, help="multi-domain models, NAME=FOLDER …")
    add("--k", type=positive_int, default=4, help="responses per prompt")
    add(
        "--held-out",
        type=natural,
        default=0,
        help="use only the prompts that training holds out with --eval-prompts N; 0: all",
    )
    add(
        "--factor",
        type=non_negative_float,
        default=1.5,
        help="ε as a multiple of the KL of the domain's own expert",
    )
    add_flags(parser, "--micro-batch-tokens", *evaluation.SAMPLING)
    # load_asked_rows() and rollout() ask for these
    parser.set_defaults(benchmarks=[], mini_batch_prompts=1 << 60)
    return evaluation.parse_sampling(parser, argv)


def run(args):
    """(numbers, figure). numbers: {experts, domains, models: {model: kl [K, D] in nats, error
    (standard error over prompts) [K, D], neighbours, score_change}, accuracy}.

    Raises UserError.
    """
    experts, models = named_folders(args.experts), named_folders(args.models)
    for name in experts:
        if name not in DOMAINS:
            raise UserError(
                f"--experts {name}=…: an expert is named by its domain ({' '.join(DOMAINS)})"
            )
    rows = [row for row in evaluation.load_asked_rows(args) if row["domain"] in experts]
    args.model = next(iter(experts.values()))
    name, tokenizer, policy = evaluation.open_model(args)
    rows = data.encode_prompts(rows, tokenizer, args.system_prompt, args.max_prompt_tokens)
    engine = evaluation.open_sampler(name, policy, rows, args)
    print(
        f"engine {engine}; {len(rows)} prompts × {args.k} responses of each of {len(experts)} "
        f"experts and {len(models)} models",
        flush=True,
    )
    rows_of = rows_by_domain(rows)
    responses, accuracy = sample(policy, tokenizer, rows_of, experts, models, args)

    model_numbers = {}
    for model, folder in models.items():
        load_weights(policy, resolve_model(folder))
        kl_KD, error_KD = kl_of_experts(policy, responses, list(experts), list(rows_of), args)
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
    """{domain: its rows}, in DOMAINS' order."""
    rows_of = {}
    for domain in DOMAINS:
        domain_rows = [row for row in rows if row["domain"] == domain]
        if domain_rows:
            rows_of[domain] = domain_rows
    return rows_of


def sample(policy, tokenizer, rows_of: dict, experts: dict, models: dict, args):
    """Let every expert and model answer every domain's prompts.

    Returns {(expert, domain): (batch, the expert's logp_BT)} and {(expert or model, domain):
    accuracy}, which is NaN where no response could be scored.
    """
    responses, accuracy = {}, {}
    for name, folder in {**experts, **models}.items():
        load_weights(policy, resolve_model(folder))
        for domain, rows in rows_of.items():
            batch, columns, _, _ = grpo.rollout(
                policy, tokenizer, rows, args.k, (args.seed, "kl"), args.temperature, args
            )
            accuracies = by_domain(domain_metrics(columns), "accuracy")
            accuracy[name, domain] = accuracies.get(domain, float("nan"))
            if name in experts:
                logp_BT, _, _ = grpo.log_probs(policy, batch, args)
                responses[name, domain] = batch, logp_BT
        accuracies = " ".join(f"{domain} {accuracy[name, domain]:.2f}" for domain in rows_of)
        print(f"{name}: {accuracies}", flush=True)
    return responses, accuracy


def kl_of_experts(policy, responses: dict, experts: list[str], domains: list[str], args):
    """(KL(expert ‖ policy) in nats, its standard error over prompts), both [K, D]."""
    kl_KD, error_KD = np.zeros((2, len(experts), len(domains)))
    for (expert, domain), (batch, expert_logp_BT) in responses.items():
        logp_BT, _, _ = grpo.log_probs(policy, batch, args)
        gap_B = (expert_logp_BT - logp_BT).sum(1).double().numpy()
        gap_P = gap_B.reshape(-1, args.k).mean(1)  # a prompt's responses are not independent
        place = experts.index(expert), domains.index(domain)
        kl_KD[place] = gap_P.mean()
        if len(gap_P) > 1:
            error_KD[place] = gap_P.std(ddof=1) / len(gap_P) ** 0.5
    return kl_KD, error_KD


def find_neighbours(kl_KD, experts: list[str], domains: list[str], factor: float) -> dict:
    """{domain: the other experts whose KL is below `factor` times its own expert's}."""
    neighbours = {}
    for j, domain in enumerate(domains):
        epsilon = factor * kl_KD[experts.index(domain), j]
        neighbours[domain] = []
        for i, expert in enumerate(experts):
            if expert != domain and kl_KD[i, j] < epsilon:
                neighbours[domain].append(expert)
    return neighbours


def print_model(model: str, kl_KD, neighbours: dict, change: dict, experts: list[str]) -> None:
    for j, domain in enumerate(change):
        own = kl_KD[experts.index(domain), j]
        print(
            f"{model}, {domain}: KL of its own expert {own:.3f}; neighbours "
            f"{' '.join(neighbours[domain]) or 'none'}; score change {change[domain]:+.3f}"
        )


def draw(numbers: dict):
    """A heat map per model: KL by expert and data domain, with the score change below."""
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
        axis.set_xlabel("data domain, score change")
        if i % columns == 0:
            axis.set_ylabel("expert")
    for axis in axes.flat[len(models) :]:
        axis.set_visible(False)
    return figure
