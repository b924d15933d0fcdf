"""Score a model on rows: Avg@K, pass@k, length, truncation and format, by domain or benchmark.

    python eval.py --model toy --data toy --held-out 40 --out scores/start
    python eval.py --model Qwen2.5-7B-Instruct --benchmarks math500 humaneval bfcl --k 4 \\
        --temperature 0.6 --top-p 0.95 --out scores/base
    python eval.py --model Qwen2.5-7B-Instruct --data train.jsonl --rated rated.jsonl \\
        --out scores/base                                  # pass rates for --curriculum self-paced
    python eval.py --compare scores/start scores/joint     # finished evaluations side by side

--out gets items.jsonl (one line per prompt, with every response), samples.txt (a few prompts and
responses to read), scores.json and args.json. The same command continues an evaluation that was
stopped.

    Avg@K  = mean over prompts of the share of right responses among K, with its standard error
             over prompts (WritingBench: of the mean score / 10 instead of the share) and a 95 %
             interval (Wilson's, for as many trials as prompts: see interval())
    pass@k = 1 − C(n − c, k) / C(n, k) for c right responses of n        (Chen et al. 2021)

A response without a verdict (its verifier failed) is unknown: it is left out of both and counted
apart. A prompt with fewer than k verdicts is left out of pass@k, and the table says over how many
prompts pass@k is. If all responses of a prompt are unknown, the same command samples and scores
that prompt again.

With --benchmarks a response without <think> counts as all answer (--reward-scheme lenient).
Otherwise the format of training is required (--reward-scheme cgpo).
"""

import collections
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path

import mpmath
import numpy as np
import torch

import data
import grpo
import rewards
from common import ranks
from common.cli import (
    Parser,
    add_flags,
    natural,
    non_negative_float,
    positive_int,
    run_main,
    share,
)
from common.engines import canary_ids, open_engine
from common.errors import UserError
from common.files import (
    append_jsonl,
    check_output_file,
    check_output_folder,
    read_jsonl,
    write_jsonl,
    write_text,
)
from common.formats import system_prompt
from common.keys import hash_of, rng
from common.models import context_of
from common.reports import unknown_text
from common.rows import DOMAINS, prompt_text
from common.runs import changed_flags, comparable, date_of, read_flags
from sources import benchmarks
from sources.load import load_rows
from sources.models import resolve_model

# ---------------- arguments ----------------

# The flags of a command that samples from a model and scores the responses: of this one, and of
# `studies.analyze kl`.
SAMPLING = (
    "--model",
    "--data",
    "--domains",
    "--system-prompt",
    "--date",
    "--max-prompt-tokens",
    "--max-new-tokens",
    "--temperature",
    "--engine",
    "--engine-memory",
    "--rollout-tokens",
    "--dtype",
    "--reward-scheme",
    "--reward-format",
    "--verifier-url",
    "--judge-url",
    "--judge-both-orders",
    "--sandbox-url",
    "--allow-unsafe-code",
    "--seed",
    "--threads",
)
# Those of them that have another range here than in training: 0 is allowed.
ZERO_ALLOWED = {
    "--max-prompt-tokens": {
        "type": natural,
        "default": 0,
        "help": "longer prompts are dropped and counted, but those of a benchmark are refused; "
        "0: as many tokens as the model has room for",
    },
    "--temperature": {
        "type": non_negative_float,
        "default": 1.0,
        "help": "temperature of the sampler; 0: always the most likely token",
    },
}
# Tokens. Without --max-prompt-tokens a prompt may be this long at most, even if the model has more
# room, because the engine's memory grows with the longest prompt.
LONGEST_PROMPT = 16384


def parse_args(argv: list[str] | None = None):
    """The flags, checked. args.source is {benchmark: file}. A wrong flag ends the script."""
    parser = Parser(__doc__)
    add_own_flags(parser)
    for name in SAMPLING:
        if name in ZERO_ALLOWED:
            parser.add_argument(name, **ZERO_ALLOWED[name])
        else:
            add_flags(parser, name)
    parser.set_defaults(reward_scheme="")  # decided below
    args = parse_sampling(parser, argv)
    if not args.compare and not ((args.data or args.benchmarks) and args.out):
        parser.error("--data or --benchmarks, and --out are needed, or --compare alone")
    if not args.reward_scheme:
        args.reward_scheme = "lenient" if args.benchmarks else "cgpo"
    for name in args.benchmarks:
        if name not in benchmarks.NAMES:
            parser.error(f"--benchmarks {name}: not one of {' '.join(benchmarks.NAMES)}")
    args.source = parse_sources(parser, args)
    if not args.temperature and args.k > 1:
        parser.error(
            f"--temperature 0 with --k {args.k}: greedy responses are all alike; use --k 1"
        )
    if args.pass_at > args.k:
        parser.error(f"--pass-at {args.pass_at}: must be at most --k {args.k}")
    # Here a mini-batch is the whole batch: data.deal() deals its rows to the ranks.
    args.mini_batch_prompts = args.batch_prompts
    return args


def add_own_flags(parser) -> None:
    """Add the flags that no other script has."""
    add = parser.add_argument
    add("--k", type=positive_int, default=8, help="responses per prompt")
    names = " ".join(benchmarks.NAMES)
    add("--benchmarks", nargs="+", default=[], help=f"evaluate these benchmarks: {names}")
    add(
        "--source",
        nargs="+",
        default=[],
        help="read a benchmark's rows from a file instead of the hub: NAME=FILE.jsonl",
    )
    add(
        "--top-p",
        type=share,
        default=1.0,
        help="sample only from the most probable tokens that together reach this probability",
    )
    add("--pass-at", type=natural, default=0, help="k of pass@k; 0: the value of --k")
    add(
        "--held-out",
        type=natural,
        default=0,
        help="evaluate only the prompts that training holds out with --eval-prompts N; "
        "0: evaluate all",
    )
    add(
        "--limit",
        type=natural,
        default=0,
        help="at most this many prompts of each benchmark, and of each domain of --data, drawn by "
        "--seed; 0: all",
    )
    add("--batch-prompts", type=positive_int, default=512, help="prompts between two saves")
    add(
        "--rated",
        default="",
        help='also write the rows to this file, each with its accuracy as "pass_rate"',
    )
    add(
        "--compare",
        nargs="+",
        default=[],
        help="only compare the finished evaluations in these folders",
    )
    add("--out", default="", help="folder to write")


def parse_sampling(parser, argv):
    """The parsed flags of a parser that has the flags of SAMPLING.

    The defaults of the toy and of smollm2 hold for these models, and if the only rows are theirs:
    then the model is one that was trained from them.
    """
    # ranks.place() reads these two, which are flags in training only.
    parser.set_defaults(cpu_offload=False, checkpoint_activations=False)
    args = parser.parse_args(argv)
    for model, rows, defaults in (("toy", "toy", grpo.TOY), ("smollm2", "real", grpo.SMOLLM2)):
        if args.model == model or args.data == [rows]:
            own = {}
            for name, value in defaults.items():
                # --data has no default here, and --batch-prompts means something else
                if name in vars(args) and name not in ("data", "batch_prompts"):
                    own[name] = value
            parser.set_defaults(**own)
            return parser.parse_args(argv)
    return args


def parse_sources(parser, args) -> dict[str, str]:
    """{benchmark: file} of --source. A wrong value ends the script."""
    files = {}
    for pair in args.source:
        name, _, file = pair.partition("=")
        files[name] = file
    for name, file in files.items():
        if not file or name not in benchmarks.HUB or name not in args.benchmarks:
            parser.error(
                f"--source {name}: write NAME=FILE.jsonl, with a name of --benchmarks that is "
                "read from the hub"
            )
    return files


# ---------------- main ----------------


def main(argv: list[str] | None = None) -> Path | None:
    """Sample, score, write, and return the folder; with --compare only print a table.

    Raises UserError for rows, models, servers or folders that cannot be used.
    """
    args = parse_args(argv)
    if args.compare:
        print(compare(args.compare))
        return None
    check_outputs(args.out, args.rated)
    args.date = args.date or date_of(Path(args.out))

    # 1. rows, model, engine
    rows = load_evaluation_rows(args)
    name, tokenizer, policy = open_model(args)
    encoded = encode_rows(rows, tokenizer, args)
    data.check_ids(encoded, policy.vocab)
    # The engine makes room for the longest prompt only.
    args.max_prompt_tokens = max(len(row["ids"]) for row in encoded)
    engine = open_sampler(name, policy, encoded, args)

    # 2. the folder, and the prompts that are finished in it
    out = Path(args.out)
    finished = open_folder(out, flags_and_inputs(args, name, encoded))
    finished_ids = {item["id"] for item in finished}
    waiting = [row for row in encoded if row["id"] not in finished_ids]
    print_opening(args, engine, waiting, len(finished_ids), len(encoded))

    # 3. responses and their rewards
    answered = answer_rows(policy, tokenizer, waiting, len(finished), len(encoded), out, args)

    # 4. scores
    items = in_order_of(encoded, finished + answered)
    pass_k = args.pass_at or args.k
    scores = summarise(items, pass_k)
    if ranks.is_first():
        write_jsonl(out / "items.jsonl", items)
        write_text(out / "scores.json", json.dumps(scores, indent=1))
        write_text(out / "samples.txt", samples_text(items))
        if args.rated:
            write_rated(Path(args.rated), rows, items)
    print_results(scores, items, args.k, pass_k)
    print(out)
    return out


def print_opening(args, engine: str, waiting: list[dict], done: int, total: int) -> None:
    """Print how much there is to do, and how science is judged if no verifier is named."""
    print(
        f"{args.model}: {total} prompts × {args.k} responses, engine {engine}; {done} are done",
        flush=True,
    )
    if not args.verifier_url and any(row["domain"] == "science" for row in waiting):
        print("science without --verifier-url: letters, numbers and normalised texts are compared")


def print_results(scores: dict, items: list[dict], k: int, pass_k: int) -> None:
    """Print the table, the groups without a score, and a warning if many verdicts are unknown."""
    print(table(scores, k, pass_k))
    for group in sorted({item["group"] for item in items} - scores.keys()):
        print(
            f"{group}: the verifier failed on every response, so there is no score; the same "
            "command tries again"
        )
    warning = unknown_text(unknown_counts(items), len(items) * k)
    if warning:
        print(warning)


def answer_rows(
    policy, tokenizer, rows: list[dict], done: int, total: int, out: Path, args
) -> list[dict]:
    """The items of `rows`. They are added to items.jsonl in batches of --batch-prompts rows.

    done, total: prompts that were finished before, and all prompts; the live line shows them.
    """
    items = []
    started = time.perf_counter()
    for start in range(0, len(rows), args.batch_prompts):
        batch_rows = rows[start : start + args.batch_prompts]
        key = (args.seed, "evaluation")
        _, columns, samples, _ = grpo.rollout(
            policy, tokenizer, batch_rows, args.k, key, args.temperature, args, args.top_p
        )
        rewards.stop_if_down(columns)
        batch_items = []
        for p, row in enumerate(batch_rows):
            responses = range(p * args.k, (p + 1) * args.k)
            batch_items.append(make_item(row, samples, columns, responses))
        if ranks.is_first():
            append_jsonl(out / "items.jsonl", batch_items)
        items += batch_items
        seconds_per_row = (time.perf_counter() - started) / len(items)
        seconds_left = int(seconds_per_row * (len(rows) - len(items)))
        print(
            f"{done + len(items)}/{total}  {seconds_left // 60}:{seconds_left % 60:02d} left",
            flush=True,
        )
    return items


def make_item(row: dict, samples: list[dict], columns: dict, responses: range) -> dict:
    """A prompt's line of items.jsonl. `responses`: the indices of its responses in the rollout.

    "accuracy" is the share of right responses. It is None if the verifier failed on all of them.
    WritingBench's critic gives a score instead of right or wrong: there it is the mean reward.
    """
    item_responses = []
    for b in responses:
        response = {
            "text": samples[b]["response"],
            "reward": samples[b]["reward"],
            "verdict": samples[b]["verdict"],
        }
        for name in ("correct", "valid", "truncated", "tokens"):
            response[name] = columns[name][b].item()
        item_responses.append(response)
    score_name = "reward" if row.get("checker") == "critic" else "correct"
    scores = []
    for response in item_responses:
        if response["reward"] is not None:
            scores.append(response[score_name])
    return {
        "id": row["id"],
        "domain": row["domain"],
        "group": row.get("benchmark") or row["domain"],
        "prompt": prompt_text(row),
        "accuracy": float(np.mean(scores)) if scores else None,
        "responses": item_responses,
    }


# ---------------- rows, model, engine ----------------


def load_evaluation_rows(args) -> list[dict]:
    """The rows of --data and of --benchmarks; with --held-out only those that training holds out.

    Raises UserError if there are none, or if a row lacks what its reward needs.
    """
    rows = load_rows(args.data, args.domains, args.seed) if args.data else []
    for name in dict.fromkeys(args.benchmarks):
        benchmark_rows = benchmarks.rows_of(name, args.source)
        if not benchmark_rows:
            raise UserError(f"--benchmarks {name}: it has no rows (with --source: see that file)")
        for row in benchmark_rows:
            if not args.domains or row["domain"] in args.domains:
                rows.append(row)
    if not rows:
        raise UserError(
            f"--domains {' '.join(args.domains)}: no row of --data and --benchmarks is of these "
            "domains"
        )
    rewards.check_rows(rows, args.judge_url, args.sandbox_url)
    if args.held_out:
        _, rows = data.hold_out(rows, args.held_out)
        if not rows:
            raise UserError(
                f"--held-out {args.held_out}: training holds out at most a quarter of a domain's "
                "prompts, and no domain has four: leave out --held-out"
            )
    return draw_rows(rows, args.limit, args.seed) if args.limit else rows


def draw_rows(rows: list[dict], limit: int, seed: int) -> list[dict]:
    """At most `limit` rows of each benchmark and of each other domain, in their present order.

    Which ones depends on the seed and on the rows' ids alone, and a larger limit keeps them.
    """
    parts = collections.defaultdict(list)
    for row in rows:
        parts[row.get("benchmark", ""), row["domain"]].append(row["id"])
    kept = set()
    for ids in parts.values():
        kept.update(sorted(ids, key=lambda name: rng(seed, "limit", name).random())[:limit])
    return [row for row in rows if row["id"] in kept]


def open_model(args):
    """(folder or hub id, tokenizer, policy on its device).

    If args.max_prompt_tokens is 0, it is set to what the model has room for. Raises UserError if
    there is no such model, or if its context is too short.
    """
    if args.threads:
        torch.set_num_threads(args.threads)
    name = resolve_model(args.model)
    ranks.start()
    tokenizer, policy = grpo.load_policy(name, args.dtype)
    # Logits are divided by this. A temperature of 0 is greedy sampling and divides nothing.
    policy.temperature = args.temperature or 1.0
    context, _ = context_of(policy.model.config)
    if not args.max_prompt_tokens:
        args.max_prompt_tokens = max(1, min(LONGEST_PROMPT, context - args.max_new_tokens))
    data.check_context(args, policy.model.config)
    return name, tokenizer, ranks.place(policy, args)


def encode_rows(rows: list[dict], tokenizer, args) -> list[dict]:
    """The rows with their prompts' tokens. Raises UserError if a benchmark would lose rows."""
    encoded = data.encode_prompts(
        rows,
        tokenizer,
        partial(system_prompt, args=args),
        args.max_prompt_tokens,
        "--data and --benchmarks",
        args.date,
    )
    encoded_ids = {row["id"] for row in encoded}
    lost = [row["id"] for row in rows if "benchmark" in row and row["id"] not in encoded_ids]
    if lost:
        raise UserError(
            f"{len(lost)} prompts of benchmarks are longer than --max-prompt-tokens "
            f"{args.max_prompt_tokens}, such as {lost[0]}: raise it, because a part of a "
            "benchmark is not the benchmark"
        )
    return encoded


def open_sampler(name: str, policy, rows: list[dict], args) -> str:
    """Set up the rewards and start the policy's engine. Returns the engine's name, and why it."""
    rewards.configure(args)
    canary = canary_ids(rows, args)
    policy.engine, engine = open_engine(grpo.Engine, name, policy, canary, args)
    return engine


# ---------------- the folder ----------------


def check_outputs(out: str, rated: str) -> None:
    """Raise UserError if --out or --rated cannot be written, before anything large is loaded."""
    check_output_folder("--out", out)
    if not rated:
        return
    check_output_file("--rated", rated, may_exist=False)
    folder = Path(out).resolve()
    if Path(rated).resolve() in (folder, *folder.parents):
        raise UserError(f"--rated {rated}: it is the folder of --out: choose another file")


def weights_version(name: str) -> str:
    """A text that differs between a checkpoint and a later one in the same folder.

    It is a hash of the weight files' names, sizes and times; for a model of the hub, its name.
    """
    versions = []
    for path in sorted(Path(name).glob("*.safetensors")):
        versions.append((path.name, path.stat().st_size, path.stat().st_mtime_ns))
    return hash_of(versions)[:12] if versions else name


def flags_and_inputs(args, name: str, rows: list[dict]) -> dict:
    """What args.json holds: everything that an evaluation's numbers depend on."""
    free = {"out", "threads", "rated", "compare", "batch_prompts", "mini_batch_prompts"}
    flags = comparable(vars(args), free)
    flags["rows"] = hash_of(rows)[:12]
    flags["weights"] = weights_version(name)
    flags["prompts"] = len(rows)
    return flags


def open_folder(out: Path, flags: dict) -> list[dict]:
    """Make the folder, or enter that of a stopped evaluation with the same flags.

    Returns its finished items: those that have an accuracy. Raises UserError if the folder holds
    something else.
    """
    if (out / "args.json").exists():
        changes = changed_flags(read_flags(out), flags)
        if changes:
            raise UserError(
                f"{out} holds an evaluation of other flags or rows ({changes}): choose another "
                "--out"
            )
    elif out.exists() and any(out.iterdir()):
        raise UserError(
            f"--out {out} exists, is not empty and holds no evaluation: choose another folder"
        )
    finished = []
    for item in read_checked(out / "items.jsonl"):
        if item["accuracy"] is not None:
            finished.append(item)
    ranks.barrier()  # all ranks have looked at the folder before the first one writes
    if ranks.is_first():
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / "args.json", json.dumps(flags, indent=1))
        write_jsonl(out / "items.jsonl", finished)
    return finished


def in_order_of(rows: list[dict], items: list[dict]) -> list[dict]:
    """The items, in the order of the rows that have the same ids."""
    item_of = {item["id"]: item for item in items}
    return [item_of[row["id"]] for row in rows]


def samples_text(items: list[dict]) -> str:
    """Text for a person: the first five prompts of each group, with two responses per prompt."""
    shown = collections.Counter()
    lines = []
    for item in items:
        shown[item["group"]] += 1
        if shown[item["group"]] > 5:
            continue
        lines.append("=" * 20 + f" {item['id']} · accuracy {item['accuracy']}")
        lines.append(item["prompt"])
        for response in item["responses"][:2]:
            lines.append("-" * 20 + f" reward {response['reward']} · {response['verdict']}")
            lines.append(response["text"])
    return "\n".join(lines) + "\n"


def write_rated(path: Path, rows: list[dict], items: list[dict]) -> None:
    """Write the rows with their accuracy as "pass_rate". A row without accuracy has none."""
    rates = {item["id"]: item["accuracy"] for item in items if item["accuracy"] is not None}
    rated = []
    for row in rows:
        row = {name: value for name, value in row.items() if name != "pass_rate"}
        if row["id"] in rates:
            row["pass_rate"] = rates[row["id"]]
        rated.append(row)
    write_jsonl(path, rated)
    print(f"{path}: {len(rows)} rows, {len(rows) - len(rates)} without a pass rate")


# ---------------- scores ----------------


def standard_error(values) -> float | None:
    """The standard error of the values' mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def p_value(differences) -> float:
    """p of a two-sided paired t-test (Student): the chance of so large a mean difference if the
    true mean were 0. NaN if the error is 0 or unknown."""
    n = len(differences)
    error = standard_error(differences)
    if not error:
        return float("nan")
    t = np.mean(differences) / error
    x = (n - 1) / (n - 1 + t * t)
    return float(mpmath.betainc((n - 1) / 2, 0.5, 0, x, regularized=True))


def pass_at(n: int, c: int, k: int) -> float | None:
    """The chance that a right one is among k of n responses, c of which are right.

    None if k is above n: fewer responses than k say nothing of k. Chen et al. 2021, equation 1.
    """
    if k > n:
        return None
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


# The quantile of the normal distribution that leaves 2.5 % on either side: 1.96.
Z_95 = statistics.NormalDist().inv_cdf(0.975)


def interval(accuracy: float, prompts: int) -> list[float]:
    """[low, high]: the 95 % interval of a mean accuracy over prompts (Wilson 1927).

    The prompts are the trials, whatever K is, because the responses to a prompt are alike. For
    K = 1 this is Wilson's interval exactly. Otherwise it is on the safe side: no value in [0, 1]
    with mean p (a share of right responses, a critic's score) varies more than a trial that is
    right with probability p. Unlike the standard error it is not 0 where all prompts are right.
    """
    square = Z_95**2 / prompts
    centre = (accuracy + square / 2) / (1 + square)
    variance = accuracy * (1 - accuracy) / prompts + square / prompts / 4
    half = Z_95 * variance**0.5 / (1 + square)
    # At 0 and at 1 a bound is the accuracy itself, but for rounding.
    return [max(0.0, min(accuracy, centre - half)), min(1.0, max(accuracy, centre + half))]


def interval_of_mean(groups: list[dict]) -> list[float]:
    """[low, high]: the 95 % interval of the mean of groups' accuracies.

    groups: values of score_group(). The distances of the groups' bounds from their accuracies are
    added as errors are, in squares, on each side by itself (Newcombe 1998).
    """
    accuracy = np.mean([group["accuracy"] for group in groups])
    below = [group["accuracy"] - group["interval"][0] for group in groups]
    above = [group["interval"][1] - group["accuracy"] for group in groups]
    low = accuracy - np.linalg.norm(below) / len(groups)
    high = accuracy + np.linalg.norm(above) / len(groups)
    return [max(0.0, float(low)), min(1.0, float(high))]


def group_names(items: list[dict]) -> list[str]:
    """The items' domains in DOMAINS' order, then their benchmarks in the order of the items."""
    names = list(dict.fromkeys(group_of(item) for item in items))
    domains = [name for name in DOMAINS if name in names]
    return domains + [name for name in names if name not in DOMAINS]


def group_of(item: dict) -> str:
    """The benchmark or the domain that an item counts for."""
    return item.get("group", item["domain"])


def summarise(items: list[dict], k: int | None = None) -> dict:
    """{domain or benchmark: score_group()}, and "mean": {"accuracy", "error", "interval"}.

    "mean" is over the groups. A group is left out if none of its prompts could be scored.
    k: that of pass@k; default: all responses of a prompt.
    """
    scores = {}
    for name in group_names(items):
        group_items = [item for item in items if group_of(item) == name]
        if any(item["accuracy"] is not None for item in group_items):
            scores[name] = score_group(group_items, k)
    if not scores:
        return scores
    errors = [values["error"] for values in scores.values()]
    error = None
    if None not in errors:
        error = float(np.sum(np.square(errors)) ** 0.5 / len(errors))
    accuracy = float(np.mean([values["accuracy"] for values in scores.values()]))
    bounds = interval_of_mean(list(scores.values()))
    scores["mean"] = {"accuracy": accuracy, "error": error, "interval": bounds}
    return scores


def score_group(items: list[dict], k: int | None) -> dict:
    """The scores of one domain or benchmark, at least one of whose prompts could be scored.

    accuracy            Avg@K, over the scored prompts
    error               its standard error over prompts; None for one prompt
    interval            its 95 % interval: [low, high]
    pass                pass@k; None if no prompt has k verdicts
    pass_prompts        number of prompts that pass@k is over: those with k verdicts or more
    tokens              mean per response
    truncated, invalid  shares of the responses
    verifier_errors     number of responses without a verdict (unknown)
    scored              number of prompts with a verdict
    prompts             number of prompts
    """
    accuracies = [item["accuracy"] for item in items if item["accuracy"] is not None]
    accuracy = float(np.mean(accuracies))
    passes = prompt_passes(items, k)
    responses = [response for item in items for response in item["responses"]]
    return {
        "accuracy": accuracy,
        "error": standard_error(accuracies),
        "interval": interval(accuracy, len(accuracies)),
        "pass": float(np.mean(passes)) if passes else None,
        "pass_prompts": len(passes),
        "tokens": float(np.mean([response["tokens"] for response in responses])),
        "truncated": float(np.mean([response["truncated"] for response in responses])),
        "invalid": float(np.mean([not response["valid"] for response in responses])),
        "verifier_errors": sum(response["reward"] is None for response in responses),
        "scored": len(accuracies),
        "prompts": len(items),
    }


def prompt_passes(items: list[dict], k: int | None) -> list[float]:
    """pass@k of each prompt that has k verdicts or more. k None: as many as it has responses."""
    passes = []
    for item in items:
        is_correct = []
        for response in item["responses"]:
            if response["reward"] is not None:
                is_correct.append(response["correct"])
        needed = len(item["responses"]) if k is None else k
        chance = pass_at(len(is_correct), sum(is_correct), needed)
        if chance is not None:
            passes.append(chance)
    return passes


def unknown_counts(items: list[dict]) -> dict[str, int]:
    """{domain or benchmark: number of responses without a verdict}, where there are any."""
    counts = collections.Counter()
    for item in items:
        for response in item["responses"]:
            if response["reward"] is None:
                counts[group_of(item)] += 1
    return counts


def with_error(value: float, error: float | None, sign: str = "") -> str:
    """Text such as "0.906 ± 0.066". sign: "+" shows the plus of a positive value."""
    return f"{value:{sign}.3f} ± " + ("–" if error is None else f"{error:.3f}")


def with_interval(bounds: list[float]) -> str:
    """Text such as "[0.867, 1.000]"."""
    return f"[{bounds[0]:.3f}, {bounds[1]:.3f}]"


def table(scores: dict, k: int, pass_k: int) -> str:
    """What the evaluation prints: a row per domain or benchmark.

    The number in brackets after pass@k is that of the prompts it is over. The last column is the
    number of scored prompts of all prompts.
    """
    width = max(len(name) for name in ("domain", *scores))
    lines = [
        f"{'':<{width}}  {f'Avg@{k}':<13}  95 % interval   {f'pass@{pass_k} (prompts)':<18}  "
        "tokens  truncated  invalid  unknown  prompts"
    ]
    for name, values in scores.items():
        accuracy = with_error(values["accuracy"], values["error"])
        line = f"{name:<{width}}  {accuracy:<13}  {with_interval(values['interval'])}"
        if name != "mean":
            line += other_cells(values)
        lines.append(line)
    return "\n".join(lines)


def other_cells(values: dict) -> str:
    """The cells of a row of table() that its mean does not have. values: of score_group()."""
    chance = "–" if values["pass"] is None else f"{values['pass']:.3f}"
    passes = f"{chance} ({values['pass_prompts']})"
    prompts = f"{values['scored']}/{values['prompts']}"
    return (
        f"  {passes:<18}  {values['tokens']:6.1f}  {values['truncated']:9.1%}  "
        f"{values['invalid']:7.1%}  {values['verifier_errors']:7d}  {prompts:>7}"
    )


# ---------------- finished evaluations side by side ----------------


RESPONSE_FIELDS = {  # of an item's responses
    "text": (str,),
    "reward": (int, float, type(None)),
    "correct": (bool, type(None)),
    "valid": (bool,),
    "truncated": (bool,),
    "tokens": (int,),
}
ITEM_FIELDS = {  # of a line of items.jsonl
    "id": (str,),
    "domain": (str,),
    "accuracy": (int, float, type(None)),
    "responses": (list,),
}


def read_items(folder) -> list[dict]:
    """The items of an evaluation, without a last line that a kill has cut.

    Raises UserError if there is no evaluation, or if it is damaged.
    """
    path = Path(folder) / "items.jsonl"
    if not path.exists():
        raise UserError(
            f"{folder} holds no evaluation (items.jsonl): python eval.py --out {folder} … makes one"
        )
    return read_checked(path)


def read_checked(path: Path) -> list[dict]:
    """The items of an items.jsonl. Raises UserError if one is damaged."""
    items = read_jsonl(path, ITEM_FIELDS)
    for item in items:
        fault = item_fault(item)
        if fault:
            raise UserError(f"{path}: item {item['id']!r:.60} is damaged: {fault}")
    return items


def item_fault(item: dict) -> str:
    """What is wrong with an item whose fields have the right types; "" if nothing is."""
    if item["accuracy"] is not None and not 0 <= item["accuracy"] <= 1:
        return f"its accuracy is {item['accuracy']!r:.40}"
    for name in ("group", "prompt"):
        if not isinstance(item.get(name, ""), str):
            return f'its "{name}" is {item[name]!r:.40}'
    for response in item["responses"]:
        if not isinstance(response, dict):
            return "a response is no object"
        for name, types in RESPONSE_FIELDS.items():
            if not isinstance(response.get(name, ...), types):
                return f'its responses\' "{name}" is {response.get(name, "missing")!r:.40}'
    return ""


def same_prompts(folders: list[str]) -> tuple[dict[str, dict], list[str]]:
    """({folder: {prompt's id: accuracy}}, ids of the prompts that have an accuracy in all folders).

    The ids are in the order of the first folder's prompts, so a sum over them is always the same.
    Raises UserError for an unfinished evaluation, for different prompts, for a folder that is named
    twice, and if no prompt has an accuracy in all folders.
    """
    prompts = {}
    accuracy = {}
    for folder in folders:
        items = read_items(folder)
        check_finished(folder, items)
        prompts[folder] = {item["id"]: item["prompt"] for item in items}
        accuracy[folder] = {item["id"]: item["accuracy"] for item in items}
    first_prompts = prompts[folders[0]]
    same = all(other == first_prompts for other in prompts.values())
    if len(prompts) < len(folders) or not same:
        counts = [len(prompts_of_folder) for prompts_of_folder in prompts.values()]
        raise UserError(
            "these evaluations are not of the same prompts, or one is named twice: "
            f"{' '.join(folders)} ({counts} prompts)"
        )
    scored = []
    for prompt_id in first_prompts:
        if all(accuracy[folder][prompt_id] is not None for folder in folders):
            scored.append(prompt_id)
    if not scored:
        raise UserError(f"no prompt has an accuracy in all of {' '.join(folders)}")
    return accuracy, scored


def check_finished(folder: str, items: list[dict]) -> None:
    """Raise UserError if an evaluation has fewer items than prompts."""
    if not (Path(folder) / "args.json").exists():
        return
    prompts = read_flags(Path(folder)).get("prompts", 0)
    if len(items) < prompts:
        raise UserError(
            f"{folder} is not finished: {len(items)} of {prompts} prompts; the command that began "
            "it goes on"
        )


def compare(folders: list[str]) -> str:
    """A markdown table with one column per model, and one of the accuracies' 95 % intervals.

    Below them, for each further model: the mean difference from the first one over the same
    prompts, its standard error, and the p of a paired t-test. Raises UserError as same_prompts()
    does.
    """
    accuracy, scored_ids = same_prompts(folders)
    kept = set(scored_ids)
    scores_of_models = []
    for folder in folders:
        items = [item for item in read_items(folder) if item["id"] in kept]
        scores_of_models.append(summarise(items))
    names = [Path(folder).name for folder in folders]
    lines = markdown_table("accuracy", names, scores_of_models, accuracy_cells)
    lines += ["", *markdown_table("95 % interval", names, scores_of_models, interval_cells)]

    first_accuracy = accuracy[folders[0]]
    for name, folder in zip(names[1:], folders[1:]):
        differences = [accuracy[folder][i] - first_accuracy[i] for i in scored_ids]
        p = f"{p_value(differences):.2g}".replace("nan", "–")
        mean = with_error(np.mean(differences), standard_error(differences), "+")
        lines.append(f"\n{name} − {names[0]}, over all {len(scored_ids)} prompts: {mean} (p {p})")
    return "\n".join(lines)


def markdown_table(title: str, names: list[str], scores_of_models: list[dict], cells_of) -> list:
    """The lines of a table with a row per domain or benchmark and a column per model.

    cells_of: the models' scores in one domain or benchmark → the row's cells.
    """
    lines = [f"| {title} | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for group in scores_of_models[0]:
        cells = cells_of([scores[group] for scores in scores_of_models])
        lines.append(f"| {group} | " + " | ".join(cells) + " |")
    return lines


def accuracy_cells(group_scores: list[dict]) -> list[str]:
    """The models' accuracies with their standard errors; the highest is bold."""
    # compared as they are shown: with three digits
    best = max(round(values["accuracy"], 3) for values in group_scores)
    cells = []
    for values in group_scores:
        cell = with_error(values["accuracy"], values["error"])
        is_best = round(values["accuracy"], 3) == best
        cells.append(f"**{cell}**" if is_best else cell)
    return cells


def interval_cells(group_scores: list[dict]) -> list[str]:
    """The models' intervals."""
    return [with_interval(values["interval"]) for values in group_scores]


if __name__ == "__main__":
    run_main(main, "the same command goes on")
