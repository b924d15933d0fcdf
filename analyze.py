"""What a run says to a person: the live line, the closing table, the curves."""
import resource

import numpy as np
import torch
import torch.distributed as dist

from data import DOMAINS


def by_domain(line: dict, prefix: str) -> dict[str, float]:
    """{domain: value} of the metrics named <prefix>/<domain>, in DOMAINS' order."""
    return {d: line[f"{prefix}/{d}"] for d in DOMAINS if f"{prefix}/{d}" in line}


def domain_metrics(batch: dict) -> dict[str, float]:
    """A batch's metrics by domain: mean reward and accuracy of the scored responses; shares of invalid and truncated
    ones, and of groups whose rewards are all equal (zero_variance); numbers of verifier_errors and of prompts."""
    found = {}
    for k in batch["domain"].unique().tolist():
        mine = {name: batch[name][batch["domain"] == k]
                for name in ("reward", "correct", "valid", "truncated", "group")}
        known = ~mine["reward"].isnan()
        groups = mine["group"].unique()
        flat = [mine["reward"][known & (mine["group"] == g)].unique().numel() < 2 for g in groups]
        values = {"reward": mine["reward"][known].mean(), "accuracy": mine["correct"][known].double().mean(),
                  "invalid": (~mine["valid"]).double().mean(), "truncated": mine["truncated"].double().mean(),
                  "zero_variance": sum(flat) / len(groups), "verifier_errors": int((~known).sum()),
                  "prompts": len(groups)}
        found |= {f"{name}/{DOMAINS[k]}": float(value) for name, value in values.items() if value == value}
    return found


def mean_stats(parts: list[dict]) -> dict[str, float]:
    """Mean of statistics over updates, weighted by their tokens."""
    total = sum(part["tokens"] for part in parts)
    names = dict.fromkeys(name for part in parts for name in part if name != "tokens")
    means = {name: sum(p[name] * p["tokens"] for p in parts if name in p) / sum(p["tokens"] for p in parts if name in p)
             for name in names}
    return means | {"tokens": total}


def step_metrics(seconds: dict, whole: dict, stats: list[dict], per_token: list[dict]) -> dict[str, float]:
    """A step's line of metrics.jsonl. per_token: each rank's values of every sampled token, before any update:

    log_w: log π_old/π_sampler, unclipped (outside: the share of ratios outside [0.5, 2]); entropy; log_ref: log π_ref/π_old.
    """
    log_w_N, entropy_N, *log_ref = (torch.cat(values) for values in zip(*(part.values() for part in per_token)))
    w_N = log_w_N.exp()
    found = {"mismatch/mean": log_w_N.abs().mean(), "mismatch/max": log_w_N.abs().max(), "is_ratio/mean": w_N.mean(),
             "is_ratio/min": w_N.min(), "is_ratio/max": w_N.max(),
             "is_ratio/outside": ((w_N < 0.5) | (w_N > 2)).float().mean(), "entropy": entropy_N.mean()}
    if log_ref:
        found["kl"] = (log_ref[0].exp() - log_ref[0] - 1).mean()
    tokens = int(whole["tokens"].sum())
    return {**mean_stats(stats), **{f"seconds/{k}": v for k, v in seconds.items()}, "tokens": tokens,
            "tokens_per_s": tokens / seconds["rollout"], **domain_metrics(whole),
            **{name: value.item() for name, value in found.items()}}


def close_run(lines: list[dict], out, title: str) -> None:
    """The closing table, the curves, and where everything is."""
    print(closing_table(lines))
    plot_curves(lines, out / "curves.png", title)
    print(f"peak memory {peak_memory() / 2**30:.2f} GiB · curves {out / 'curves.png'} · samples "
          f"{out / 'samples.jsonl'} · model {out / 'checkpoint'}")


def opening(algorithm: str, policy, engine: str, args, out, steps: int, train: int, held_out: int, mix: dict, start: int):
    """What a run says first: model, engine, and the batch arithmetic in words."""
    minis = args.batch_prompts // args.mini_batch_prompts
    return (f"{algorithm} · {args.model} ({sum(p.numel() for p in policy.parameters()) / 1e6:.2f} M parameters, "
            f"{policy.model.device.type}, {'bf16' if policy.bf16 else 'fp32'} compute) · {out}\n"
            f"engine {engine}; importance-sampling correction {args.is_correction}\n"
            f"{args.batch_prompts} prompts × {args.group_size} samples = {args.batch_prompts * args.group_size} "
            f"responses a step; {minis} mini-batch(es) of {args.mini_batch_prompts} prompts; {steps} steps = "
            f"{steps * minis} updates; {dist.get_world_size()} rank(s); {train} training and {held_out} held-out prompts\n"
            "mix " + ", ".join(f"{domain} {share:.2f}" for domain, share in mix.items())
            + (f"; resumed after step {start}" if start else ""))


def peak_memory() -> int:
    """Bytes: the device's peak of tensors on CUDA, the process's peak resident size on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def live_line(line: dict, steps: int, seconds: float, done: int) -> str:
    """One step in one line: mean reward over domains, accuracy of each, sampler speed, time left."""
    reward, accuracy = by_domain(line, "reward"), by_domain(line, "accuracy")
    left = seconds / done * (steps - line["step"])
    mean = np.mean(list(reward.values())) if reward else float("nan")  # nan: every verifier call failed
    return (f"step {line['step']:4d}/{steps}  reward {mean:+.2f}  "
            + " ".join(f"{d} {a:.2f}" for d, a in accuracy.items())
            + f"  {line['tokens_per_s']:,.0f} tok/s  {int(left) // 60}:{int(left) % 60:02d} left")


def closing_table(lines: list[dict]) -> str:
    """Held-out accuracy by domain, before → after, sampled and greedy, and the prompts used for training."""
    evaluated = [line for line in lines if any(k.startswith("eval/") for k in line)]
    rows = ["domain      sampled          greedy           prompts trained on"]
    if not evaluated:
        return "no held-out prompts: nothing evaluated"
    trained = {d: sum(line.get(f"prompts/{d}", 0) for line in lines) for d in DOMAINS}
    total = sum(trained.values()) or 1
    means = []
    for d in by_domain(evaluated[0], "eval/greedy"):
        cells = [[line.get(f"eval/{kind}/{d}", float("nan")) for line in (evaluated[0], evaluated[-1])]
                 for kind in ("sampled", "greedy")]
        means.append(cells)
        rows.append(f"{d:<10}" + "".join(f"  {a:.2f} → {b:.2f}    " for a, b in cells)
                    + f"  {trained[d]:.0f} ({trained[d] / total:.0%})")
    rows.append(f"{'mean':<10}" + "".join(f"  {a:.2f} → {b:.2f}    " for a, b in np.mean(means, 0)))
    return "\n".join(rows)


def plot_curves(lines: list[dict], path, title: str) -> None:
    """Training accuracy by domain, smoothed over a tenth of the run, and their mean; raw values faint."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    trained = [line for line in lines if by_domain(line, "accuracy")]
    if not trained:
        return
    width = max(1, len(trained) // 10)
    figure, axis = plt.subplots(figsize=(7.2, 4.2), dpi=120)
    curves = {d: ([x["step"] for x in trained if f"accuracy/{d}" in x],
                  [x[f"accuracy/{d}"] for x in trained if f"accuracy/{d}" in x]) for d in DOMAINS}
    curves["mean"] = ([x["step"] for x in trained], [np.mean(list(by_domain(x, "accuracy").values())) for x in trained])
    for name, (steps, values) in curves.items():
        if not steps:
            continue
        smooth = [np.mean(values[max(0, i - width + 1):i + 1]) for i in range(len(values))]
        bold = {"lw": 2.6, "color": "black"} if name == "mean" else {"lw": 1.4}
        drawn, = axis.plot(steps, smooth, label=name, **bold)
        axis.plot(steps, values, lw=0.5, alpha=0.2, color=drawn.get_color())
    axis.set(xlabel="step", ylabel="accuracy of sampled responses", ylim=(0, 1.02), title=title)
    axis.grid(alpha=0.25)
    axis.legend(ncol=3, frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
