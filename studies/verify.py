"""Each model judges its own answers: right or wrong? (M2RL, section 3.6, Table 7, Figure 6)

    python -m studies.analyze verify --scores scores/start scores/math --out analyses/verify

    outcome   it sees the question and its final answer
    process   it sees the question and the whole response, reasoning included
    Avg@K     share of right verdicts among K, mean over the answers. A reply without a verdict is a
              wrong one, and counted
    r         Pearson's correlation, over the models, of mean accuracy and mean Avg@K

An answer that cannot be read out of its response is not judged. The model, its answers and the
flags not named here are those of eval.py's folders. A folder that is judged already (verify.json)
is not judged again.
"""

import argparse
import json
import re
from pathlib import Path

import numpy as np

import data
import eval as evaluation
import grpo
import rewards
from common import checkpoints, ranks
from common.cli import add_flags, natural, positive_int
from common.errors import UserError
from common.files import write_text
from common.keys import hash_of
from common.rows import DOMAINS
from sources.models import resolve_model
from studies import pictures
from studies.folders import named_folders

PROMPTS = {
    "outcome": "Question:\n{question}\n\nProposed answer:\n{answer}\n\n"
    "Is the proposed answer right? Answer yes or no.",
    "process": "Question:\n{question}\n\nProposed solution, with its reasoning:\n{response}\n\n"
    "Is its final answer right? Answer yes or no.",
}


def parse_args(parser, argv):
    add = parser.add_argument
    add("--scores", nargs="+", required=True, help="eval.py's folders, or NAME=FOLDER")
    add("--k", type=positive_int, default=8, help="verdicts per answer and mode")
    add(
        "--answers",
        type=natural,
        default=1,
        help="of each prompt's responses the first N are judged; 0: all",
    )
    names = ("--max-prompt-tokens", "--max-new-tokens", "--engine", "--engine-memory")
    add_flags(parser, *names, "--seed", "--threads", max_prompt_tokens=8192)
    return parser.parse_args(argv)


def run(args):
    """(numbers, figure). numbers: {models: {model: result_of()}, correlation: {mode: r or None}}.

    Raises UserError.
    """
    results = {}
    judge = None  # (tokenizer, policy), once they are opened
    for name, folder in named_folders(args.scores).items():
        path = Path(folder) / "verify.json"
        items = evaluation.read_items(folder)
        flags = json.loads((Path(folder) / "args.json").read_text())
        asked = what_is_asked(args, items, flags)
        result = finished_result(path, asked)
        if result is None:
            questions = ask_about(items, args.answers, folder)
            settings = argparse.Namespace(**{**flags, **vars(args), "model": flags["model"]})
            judge, questions = open_judge(judge, questions, settings, folder)
            replies = judge_answers(*judge, questions, settings)
            result = result_of(items, questions, replies)
            write_text(path, json.dumps({"asked": asked, "found": result}, indent=1))
            print(f"{name}: {len(questions)} questions judged", flush=True)
        results[name] = result
    print_table(results)
    correlation = {mode: correlate(mean_scores(results, mode)) for mode in PROMPTS}
    values = []
    for mode, r in correlation.items():
        values.append(f"{mode} {'–' if r is None else f'{r:+.2f}'}")
    print(f"correlation of generating and judging over the models: {', '.join(values)}")
    return {"models": results, "correlation": correlation}, draw(results, correlation, args.k)


# ---------------- questions ----------------


def what_is_asked(args, items: list[dict], flags: dict) -> dict:
    """All that a result depends on."""
    asked = {"templates": PROMPTS, "items": hash_of(items), "weights": flags.get("weights")}
    for name in ("k", "answers", "seed", "max_prompt_tokens", "max_new_tokens", "engine"):
        asked[name] = getattr(args, name)
    return asked


def finished_result(path: Path, asked: dict) -> dict | None:
    """The result in verify.json, if the same was asked."""
    if not path.exists():
        return None
    saved = json.loads(path.read_text())
    return saved["found"] if saved["asked"] == asked else None


def ask_about(items: list[dict], answers: int, folder: str) -> list[dict]:
    """A row per answer and mode, with "truth": is the answer right? Raises UserError for none."""
    questions = []
    for item in items:
        for i, response in enumerate(item["responses"][: answers or None]):
            answer, *_ = rewards.extract_answer(response["text"], strict=False)
            if response["reward"] is None or answer is None:
                continue
            for mode, template in PROMPTS.items():
                prompt = template.format(
                    question=item["prompt"], answer=answer, response=response["text"]
                )
                questions.append(
                    {
                        "id": f"{item['id']}/{i}/{mode}",
                        "domain": item["domain"],
                        "mode": mode,
                        "truth": response["correct"],
                        "prompt": prompt,
                    }
                )
    if not questions:
        raise UserError(f"{folder}: no response has an answer that could be judged")
    return questions


# ---------------- the judge ----------------


def open_judge(judge: tuple | None, questions: list[dict], settings, folder: str):
    """((tokenizer, policy), questions with their prompts' tokens).

    The first model is opened with its engine. Later ones put their weights into its policy.
    """

    def encode(tokenizer):
        return data.encode_prompts(
            questions, tokenizer, settings.system_prompt, settings.max_prompt_tokens, folder
        )

    if judge is None:
        name, tokenizer, policy = evaluation.open_model(settings)
        encoded = encode(tokenizer)
        print(f"engine {evaluation.open_sampler(name, policy, encoded, settings)}")
        return (tokenizer, policy), encoded
    tokenizer, policy = judge
    checkpoints.load_weights(policy, resolve_model(settings.model))
    return judge, encode(tokenizer)


def judge_answers(tokenizer, policy, questions: list[dict], settings) -> list[list[str]]:
    """--k replies to each question."""
    if policy.engine:
        policy.engine.sync_weights(policy)
    elif policy.sharded:
        ranks.sync_sampler(policy)
    prompts_P = [question["ids"] for question in questions]
    keys_P = [(settings.seed, "verify", question["id"], 0) for question in questions]
    k = settings.k
    responses_B = grpo.respond(policy, prompts_P, keys_P, k, settings.temperature, settings)
    replies = []
    for p, question in enumerate(questions):
        texts = []
        for tokens, _, _ in responses_B[p * k : (p + 1) * k]:
            texts.append(question["opened"] + tokenizer.decode(tokens, skip_special_tokens=True))
        replies.append(texts)
    return replies


def says_yes(reply: str) -> bool | None:
    """The last yes or no behind the reasoning; None: neither."""
    words = re.findall(r"\b(yes|no)\b", reply.split("</think>")[-1].lower())
    return words[-1] == "yes" if words else None


# ---------------- results ----------------


def result_of(items: list[dict], questions: list[dict], replies: list[list[str]]) -> dict:
    """{generation: accuracy by domain; and per mode: Avg@K by domain, and "<mode>, no verdict"}.

    generation, outcome and process also have their "mean" over domains.
    """
    scores = evaluation.summarise(items)
    result = {"generation": {name: values["accuracy"] for name, values in scores.items()}}
    for mode in PROMPTS:
        shares_of = {domain: [] for domain in DOMAINS}  # domain: share of right verdicts per answer
        all_verdicts = []
        for question, texts in zip(questions, replies):
            if question["mode"] != mode:
                continue
            verdicts = [says_yes(text) for text in texts]
            all_verdicts += verdicts
            share = np.mean([verdict == question["truth"] for verdict in verdicts])
            shares_of[question["domain"]].append(share)
        avg_of = {}
        for domain, shares in shares_of.items():
            if shares:
                avg_of[domain] = float(np.mean(shares))
        avg_of["mean"] = float(np.mean(list(avg_of.values())))
        result[mode] = avg_of
        silent = float(np.mean([verdict is None for verdict in all_verdicts]))
        result[f"{mode}, no verdict"] = silent
    return result


def mean_scores(results: dict, mode: str):
    """[models, 2]: mean accuracy and mean Avg@K of judging."""
    points = []
    for result in results.values():
        points.append((result["generation"]["mean"], result[mode]["mean"]))
    return np.array(points)


def correlate(points) -> float | None:
    """Pearson's r; None of fewer than three models, or where one coordinate is constant."""
    if len(points) < 3 or points.std(0).min() == 0:
        return None
    return float(np.corrcoef(points.T)[0, 1])


def print_table(results: dict) -> None:
    domains = []
    for name in (*DOMAINS, "mean"):
        if all(name in result["generation"] for result in results.values()):
            domains.append(name)
    head = "".join(f"{domain:>22}" for domain in domains)
    print(f"{'gen (outcome / process)':<24}{head}     no verdict")
    for name, result in results.items():
        cells = ""
        for domain in domains:
            outcome = result["outcome"].get(domain, np.nan)
            process = result["process"].get(domain, np.nan)
            cells += f"{result['generation'][domain]:8.3f} ({outcome:.2f} / {process:.2f})"
        silent = [result[f"{mode}, no verdict"] for mode in ("outcome", "process")]
        print(f"{name:<24}{cells}    {silent[0]:.0%} / {silent[1]:.0%}")


def draw(results: dict, correlation: dict, k: int):
    """A panel per mode: accuracy against judging, one point per model."""
    figure, axes = pictures.grid(1, len(correlation), panel_width=4.5, panel_height=3.2)
    for axis, (mode, r) in zip(axes[0], correlation.items()):
        points = mean_scores(results, mode)
        axis.scatter(*points.T)
        for point, name in zip(points, results):
            offset = {"xytext": (5, 4), "textcoords": "offset points"}
            axis.annotate(name, point, fontsize=pictures.FONT, **offset)
        axis.set_title(f"{mode} verification" + ("" if r is None else f", r = {r:.2f}"))
        axis.set(xlabel="mean accuracy", ylabel=f"judging: Avg@{k}")
    return figure
