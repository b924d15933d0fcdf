"""What a run reports: metrics per step, the lines it prints, the closing table, the curves."""

import math
import re
import resource
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common import ranks
from common.rows import DOMAINS

# ---------------- metrics ----------------


def by_domain(line: dict, prefix: str) -> dict[str, float]:
    """{domain: value} of the metrics named <prefix>/<domain>, in the order of DOMAINS."""
    values = {}
    for domain in DOMAINS:
        if f"{prefix}/{domain}" in line:
            values[domain] = line[f"{prefix}/{domain}"]
    return values


def domain_metrics(columns: dict) -> dict[str, float]:
    """A batch's metrics, named <metric>/<domain>, from its columns [B].

    reward, accuracy    means over the scored responses
    invalid, truncated  shares of the responses
    length              mean number of tokens per response
    zero_variance       share of the groups whose rewards are all equal
    verifier_errors     number of responses without a verdict (their reward is NaN)
    prompts             number of groups

    A mean without any scored response is left out.
    """
    metrics = {}
    for k in columns["domain"].unique().tolist():
        row_B = columns["domain"] == k
        reward_B, group_B = columns["reward"][row_B], columns["group"][row_B]
        scored_B = ~reward_B.isnan()
        groups = group_B.unique()
        all_equal = 0
        for group in groups:
            if reward_B[scored_B & (group_B == group)].unique().numel() < 2:
                all_equal += 1
        values = {
            "reward": reward_B[scored_B].mean(),
            "accuracy": columns["correct"][row_B][scored_B].double().mean(),
            "invalid": (~columns["valid"][row_B]).double().mean(),
            "truncated": columns["truncated"][row_B].double().mean(),
            "length": columns["tokens"][row_B].double().mean(),
            "zero_variance": all_equal / len(groups),
            "verifier_errors": int((~scored_B).sum()),
            "prompts": len(groups),
        }
        for name, value in values.items():
            if not math.isnan(value):
                metrics[f"{name}/{DOMAINS[k]}"] = float(value)
    return metrics


def mean_stats(stats_of_updates: list[dict]) -> dict[str, float]:
    """{name: mean over the updates that have it, weighted by their "tokens"}.

    The value of "tokens" is the sum, that of a name that ends in "/max" the largest.
    """
    updates_with = {}  # name → the updates' statistics that have it
    for stats in stats_of_updates:
        for name in stats:
            updates_with.setdefault(name, []).append(stats)
    updates_with.pop("tokens", None)
    means = {}
    for name, updates in updates_with.items():
        if name.endswith("/max"):
            means[name] = max(stats[name] for stats in updates)
            continue
        total = sum(stats[name] * stats["tokens"] for stats in updates)
        means[name] = total / sum(stats["tokens"] for stats in updates)
    means["tokens"] = sum(stats["tokens"] for stats in stats_of_updates)
    return means


def step_metrics(
    seconds: dict, columns: dict, stats_of_updates: list[dict], per_token: list[dict]
) -> dict[str, float]:
    """A step's metrics, as metrics.jsonl holds them.

    seconds: by phase. columns: the batch's columns [B], of all ranks. per_token: for each rank, a
    value per sampled token [N], taken before any update:
        old_logp log π_old; its negative mean estimates the policy's entropy, in nats
        log_w    log π_old/π_sampler, not clipped, if they are not the same by definition
    """
    values_N = {}
    for name in per_token[0]:
        values_N[name] = torch.cat([values[name] for values in per_token])
    token_metrics = {"entropy": -values_N["old_logp"].mean()}
    if "log_w" in values_N:
        log_w_N = values_N["log_w"]
        w_N = log_w_N.exp()
        token_metrics |= {
            "mismatch/mean": log_w_N.abs().mean(),
            "mismatch/max": log_w_N.abs().max(),
            "is_ratio/mean": w_N.mean(),
            "is_ratio/min": w_N.min(),
            "is_ratio/max": w_N.max(),
            # outside the band that --is-correction mask keeps
            "is_ratio/outside": ((w_N < 0.5) | (w_N > 2)).float().mean(),
        }

    tokens = int(columns["tokens"].sum())
    metrics = mean_stats(stats_of_updates)
    for phase, value in seconds.items():
        metrics[f"seconds/{phase}"] = value
    metrics["tokens"] = tokens
    metrics["tokens_per_s"] = tokens / seconds["rollout"]
    metrics |= domain_metrics(columns)
    metrics |= {name: value.item() for name, value in token_metrics.items()}
    return metrics


def verdict_counts(samples: list[dict]) -> dict[str, int]:
    """{"<domain>: <first word of the verdict>": number of responses}."""
    counts = Counter()
    for sample in samples:
        word = sample["verdict"].split()[0].rstrip(":")
        counts[f"{sample['domain']}: {word}"] += 1
    return counts


def peak_memory() -> int:
    """Bytes at the peak: of tensors on the GPU, or of the process's resident memory on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


# ---------------- responses without a verdict ----------------

UNKNOWN_SHARE = 0.01  # a larger share of unknown verdicts is worth a warning


def warn_if_unknown(columns: dict) -> None:
    """Print a warning about a batch in which more than 1 % of the rewards are unknown (NaN)."""
    warning = unknown_warning(columns)
    if warning:
        print(warning, flush=True)


def unknown_warning(columns: dict) -> str | None:
    """A line about a batch in which more than 1 % of the rewards are unknown (NaN); else None.

    columns: the batch's columns [B], of all ranks.
    """
    unknown = Counter()  # domain → responses
    for domain, reward in zip(columns["domain"].tolist(), columns["reward"].tolist()):
        if math.isnan(reward):
            unknown[DOMAINS[domain]] += 1
    return unknown_text(unknown, len(columns["reward"]))


def unknown_text(unknown: dict[str, int], responses: int) -> str | None:
    """The warning, if more than 1 % of the responses are unknown; else None.

    unknown: {domain or benchmark: number of responses without a verdict}. responses: of all.
    """
    total = sum(unknown.values())
    if total <= UNKNOWN_SHARE * responses:
        return None
    counts = ", ".join(f"{name} {count}" for name, count in unknown.items() if count)
    return (
        f"warning: {total} of {responses} responses ({total / responses:.1%}) have no verdict "
        f"({counts}); they are left out"
    )


# ---------------- what goes wrong in a run ----------------

EQUAL_STEPS = 5  # so many steps without any difference between a domain's rewards


def print_warnings(lines: list[dict]) -> None:
    """Print what is wrong since the last of these steps, and was not wrong before it."""
    known = warnings(lines[:-1])
    for name, text in warnings(lines).items():
        if name not in known:
            print(f"warning: {text}", flush=True)


def warnings(lines: list[dict]) -> dict[str, str]:
    """{name of a fault: a line that says what it is and what to do}, after the last of the steps.

    lines: the run's metrics, an object per step.
    """
    steps = [line for line in lines if by_domain(line, "prompts")]
    if not steps:
        return {}
    last, found = steps[-1], {}
    for domain in by_domain(last, "prompts"):
        recent = [line for line in steps if f"prompts/{domain}" in line][-EQUAL_STEPS:]
        equal = [line.get(f"zero_variance/{domain}") == 1 for line in recent]
        if len(recent) == EQUAL_STEPS and all(equal):
            found[f"equal {domain}"] = (
                f"{domain}: in {EQUAL_STEPS} steps no group had two different rewards, so nothing "
                f"is learned: {way_out(last, domain)}"
            )
    truncated = mean_over_prompts(last, "truncated")
    if truncated > 0.5:
        found["truncated"] = (
            f"{truncated:.0%} of the responses were cut at --max-new-tokens, and are wrong for "
            "it: raise it, or ask for shorter answers"
        )
    first_length, length = mean_over_prompts(steps[0], "length"), mean_over_prompts(last, "length")
    for word, is_so in (("grew", length > 3 * first_length), ("shrank", 3 * length < first_length)):
        if is_so:
            found[f"length {word}"] = (
                f"responses {word} from {first_length:.0f} to {length:.0f} tokens: read "
                "samples.jsonl for what the rewards pay for"
            )
    return found


def way_out(line: dict, domain: str) -> str:
    """What to do about a domain whose rewards are all equal. line: its last step's metrics."""
    if line.get(f"truncated/{domain}", 0) > 0.5:
        return "raise --max-new-tokens, because most responses are cut"
    if line.get(f"invalid/{domain}", 0) > 0.5:
        return "warm the model up to the format (sft.py), or take --reward-scheme lenient"
    if line.get(f"accuracy/{domain}", 0) > 0.5:
        return "its prompts are too easy"
    return "its prompts are too hard, or the model needs a warm start (sft.py)"


def mean_over_prompts(line: dict, name: str) -> float:
    """A metric's mean over a step's responses, from its values by domain; 0 without any."""
    prompts = by_domain(line, "prompts")
    total = sum(prompts.values())
    return sum(prompts[domain] * value / total for domain, value in by_domain(line, name).items())


# ---------------- what a run prints ----------------

SECONDS_OF_SILENCE = 20  # a loop that takes longer says how far it is
SMALL_SHARE = 0.05  # of truncated or invalid responses: not worth a word


def shown(label: str, items):
    """Yield the items of a sequence. In a slow loop, a line now and then says how far it is."""
    started = printed = time.perf_counter()
    for number, item in enumerate(items):
        now = time.perf_counter()
        if now - printed > SECONDS_OF_SILENCE and ranks.is_first():
            printed = now
            left = (now - started) / number * (len(items) - number)
            print(f"  {label} {number} of {len(items)}, at most {left:.0f} s left", flush=True)
        yield item


def has_bfloat16_units() -> bool:
    """Has this CPU instructions for bfloat16? True if the machine does not tell."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return True
    flags = set(re.findall(r"[\w.]+", text))
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16"}) or "flags" not in flags


def opening(algorithm: str, run, engine: str, mix: dict[str, float], prompts: int) -> str:
    """The text that a run prints first: model, engine, and the arithmetic of its batches.

    run: the algorithm file's Run. engine: open_engine's text. mix: the domains' shares. prompts:
    the number of training prompts.
    """
    args, policy, steps = run.args, run.policy, len(run.plan)
    parameters = sum(p.numel() for p in policy.parameters())
    compute = "bf16" if policy.bf16 else "fp32"
    mini_batches = args.batch_prompts // args.mini_batch_prompts
    responses = args.batch_prompts * args.group_size
    shares = ", ".join(f"{domain} {share:.2f}" for domain, share in mix.items())
    lines = [
        f"{algorithm} · {args.model} ({parameters / 1e6:.2f} M parameters, "
        f"{policy.model.device.type}, {compute} compute) · {run.out}",
        f"engine {engine}; importance-sampling correction {args.is_correction}",
        f"{args.batch_prompts} prompts × {args.group_size} samples = {responses} responses a step; "
        f"{mini_batches} mini-batch(es) of {args.mini_batch_prompts} prompts; {steps} steps = "
        f"{steps * mini_batches} updates; {ranks.world_size()} rank(s); {prompts} training and "
        f"{len(run.eval_rows)} held-out prompts",
        f"mix {shares}",
    ]
    if policy.bf16 and policy.device.type == "cpu" and not has_bfloat16_units():
        lines.insert(1, "warning: this CPU has no bfloat16 units: --dtype float32 is faster")
    if run.steps_done:
        lines[-1] += f"; resumed after step {run.steps_done}"
    return "\n".join(lines)


def live_line(line: dict, steps: int, seconds: float, steps_taken: int) -> str:
    """One step in one line: mean reward over domains, accuracies, length, speed, time left.

    The shares of truncated and invalid responses are there if they are not small.

    line: the step's metrics. seconds: how long the last `steps_taken` steps took.
    """
    rewards = by_domain(line, "reward")
    mean = np.mean(list(rewards.values())) if rewards else math.nan  # nan: no response was scored
    accuracy = by_domain(line, "accuracy")
    accuracies = " ".join(f"{domain} {value:.2f}" for domain, value in accuracy.items())
    shares = ""
    for name in ("truncated", "invalid"):
        share = mean_over_prompts(line, name)
        if share > SMALL_SHARE:
            shares += f"  {name} {share:.0%}"
    length = mean_over_prompts(line, "length")
    seconds_left = int(seconds / steps_taken * (steps - line["step"]))
    return (
        f"step {line['step']:4d}/{steps}  reward {mean:+.2f}  {accuracies}  "
        f"{length:.0f} tokens{shares}  "
        f"{line['tokens_per_s']:,.0f} tok/s  {seconds_left // 60}:{seconds_left % 60:02d} left"
    )


def closing_table(lines: list[dict]) -> str:
    """Held-out accuracy by domain, before → after, and the number of prompts trained on.

    lines: the run's metrics, an object per step.
    """
    evaluated = [line for line in lines if any(name.startswith("eval/") for name in line)]
    if not evaluated:
        return "no held-out prompts: nothing evaluated"
    first, last = evaluated[0], evaluated[-1]
    prompts = {}  # domain → prompts trained on
    for domain in DOMAINS:
        prompts[domain] = sum(line.get(f"prompts/{domain}", 0) for line in lines)
    total = max(1, sum(prompts.values()))

    def arrow(before: float, after: float) -> str:
        return f"  {before:.2f} → {after:.2f}    "

    table = ["domain      sampled          greedy           prompts trained on"]
    values = []  # [domain][sampled, greedy][before, after]
    for domain in by_domain(first, "eval/greedy"):
        pairs = []
        for kind in ("sampled", "greedy"):
            name = f"eval/{kind}/{domain}"
            pairs.append([first.get(name, math.nan), last.get(name, math.nan)])
        values.append(pairs)
        cells = "".join(arrow(*pair) for pair in pairs)
        table.append(f"{domain:<10}{cells}  {prompts[domain]:.0f} ({prompts[domain] / total:.0%})")
    table.append(f"{'mean':<10}" + "".join(arrow(*pair) for pair in np.mean(values, 0)))
    return "\n".join(table)


def close_run(lines: list[dict], out: Path, title: str) -> None:
    """Print the closing table, draw the curves, and say where everything is."""
    print(closing_table(lines))
    plot_curves(lines, out / "curves.png", title)
    print(
        f"peak memory {peak_memory() / 2**30:.2f} GiB · curves {out / 'curves.png'} · samples "
        f"{out / 'samples.jsonl'} · model {out / 'checkpoint'}"
    )


# ---------------- curves ----------------


def smoothed(values: list[float], width: int) -> list[float]:
    """For each value, the mean of it and the values before it, `width` in all."""
    means = []
    for i in range(len(values)):
        means.append(float(np.mean(values[max(0, i - width + 1) : i + 1])))
    return means


def accuracy_curves(lines: list[dict]) -> dict[str, tuple[list, list]]:
    """{domain, and "mean" over domains: (steps, training accuracies)}."""
    curves = {}
    for domain in DOMAINS:
        points = [line for line in lines if f"accuracy/{domain}" in line]
        if points:
            steps = [line["step"] for line in points]
            curves[domain] = (steps, [line[f"accuracy/{domain}"] for line in points])
    means = [np.mean(list(by_domain(line, "accuracy").values())) for line in lines]
    curves["mean"] = ([line["step"] for line in lines], means)
    return curves


def plot_curves(lines: list[dict], path: Path, title: str) -> None:
    """Draw training accuracy by domain, smoothed over a tenth of the run; raw values are faint.

    Draws nothing if no step has an accuracy.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for line in lines if by_domain(line, "accuracy")]
    if not lines:
        return
    width = max(1, len(lines) // 10)
    figure, axis = plt.subplots(figsize=(7.2, 4.2), dpi=120)
    for name, (steps, values) in accuracy_curves(lines).items():
        style = {"lw": 2.6, "color": "black"} if name == "mean" else {"lw": 1.4}
        (curve,) = axis.plot(steps, smoothed(values, width), label=name, **style)
        axis.plot(steps, values, lw=0.5, alpha=0.2, color=curve.get_color())
    axis.set(xlabel="step", ylabel="accuracy of sampled responses", ylim=(0, 1.02), title=title)
    axis.grid(alpha=0.25)
    axis.legend(ncol=3, frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
