"""Can a model tell whether its own answers are right? (M2RL, section 3.6, Table 7, Figure 6)

    python -m studies.analyze verify --scores scores/start scores/math --out analyses/verify

    outcome   mode in which the model sees the question and its final answer
    process   mode in which it sees the question and its response, reasoning included
    Avg@K     share of right verdicts among K, mean over the answers. A reply without a verdict
              counts as a wrong one; the share of such replies is reported too
    r         Pearson's correlation, over the models, of mean accuracy and mean Avg@K

An answer that cannot be extracted from its response is not judged. The model, its answers and the
flags that are not given here come from eval.py's folder. A folder that has been judged with the
same flags (verify.json) is not judged again.
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
from common.formats import asking_for
from common.runs import read_flags
from common.keys import hash_of
from common.rows import DOMAINS
from sources.models import resolve_model
from studies import pictures
from studies.folders import named_folders

PROMPTS = {  # mode: template of the question to the model
    "outcome": "Question:\n{question}\n\nProposed answer:\n{answer}\n\n"
    "Is the proposed answer right? Answer yes or no.",
    "process": "Question:\n{question}\n\nProposed solution, with its reasoning:\n{response}\n\n"
    "Is its final answer right? Answer yes or no.",
}


def parse_args(parser, argv):
    """The flags of this analysis; `parser` has --out already."""
    add = parser.add_argument
    add("--scores", nargs="+", required=True, help="eval.py's folders, or NAME=FOLDER")
    add("--k", type=positive_int, default=8, help="verdicts per answer and per mode")
    add(
        "--answers",
        type=natural,
        default=1,
        help="judge only the first N responses to each prompt; 0: judge all",
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
        flags = read_flags(Path(folder))
        inputs = inputs_of_result(args, items, flags)
        result = finished_result(path, inputs)
        if result is None:
            questions = make_questions(items, args.answers, folder)
            # eval.py's flags, replaced by this command's
            settings = argparse.Namespace(**({"date": ""} | flags | vars(args)))
            judge, questions = open_judge(judge, questions, settings, folder)
            replies = judge_answers(*judge, questions, settings)
            result = result_of(items, questions, replies)
            write_text(path, json.dumps({"asked": inputs, "found": result}, indent=1))
            print(f"{name}: {len(questions)} questions judged", flush=True)
        results[name] = result
    print_table(results)
    correlation = {mode: correlate(mean_scores(results, mode)) for mode in PROMPTS}
    cells = []
    for mode, r in correlation.items():
        value = "–" if r is None else f"{r:+.2f}"
        cells.append(f"{mode} {value}")
    print(f"correlation of generating and judging over the models: {', '.join(cells)}")
    return {"models": results, "correlation": correlation}, draw(results, correlation, args.k)


# ---------------- questions ----------------


def inputs_of_result(args, items: list[dict], flags: dict) -> dict:
    """Everything that a result depends on. flags: eval.py's args.json."""
    inputs = {"templates": PROMPTS, "items": hash_of(items), "weights": flags.get("weights")}
    for name in ("k", "answers", "seed", "max_prompt_tokens", "max_new_tokens", "engine"):
        inputs[name] = getattr(args, name)
    return inputs


def finished_result(path: Path, inputs: dict) -> dict | None:
    """The result in verify.json, if it has the same inputs. Raises UserError if it is damaged."""
    if not path.exists():
        return None
    try:
        saved = json.loads(path.read_text())
        return saved["found"] if saved["asked"] == inputs else None
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged: remove it, and the answers are judged again") from None


def make_questions(items: list[dict], answers: int, folder: str) -> list[dict]:
    """A row per answer and mode, with "truth": whether the answer is right.

    answers: how many responses to a prompt are judged; 0: all. Raises UserError if no response has
    an answer.
    """
    questions = []
    for item in items:
        responses = item["responses"][:answers] if answers else item["responses"]
        for i, response in enumerate(responses):
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
    """((tokenizer, policy), questions with their prompts' tokens). Raises UserError.

    judge: the tokenizer and policy of an earlier call; None in the first. The first model is opened
    with its engine. The weights of later ones are loaded into the same policy.
    """

    system = settings.system_prompt
    if system is None:
        system = asking_for("answer")

    def encode(tokenizer):
        return data.encode_prompts(
            questions,
            tokenizer,
            system,
            settings.max_prompt_tokens,
            folder,
            settings.date,
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
    """[questions][k]: the text of --k replies to each question."""
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
        sampled = [tokens for tokens, _, _ in responses_B[p * k : (p + 1) * k]]
        replies.append(data.response_texts([question] * k, sampled, tokenizer))
    return replies


def says_yes(reply: str) -> bool | None:
    """Whether the last yes or no after the reasoning is a yes; None if there is neither."""
    words = re.findall(r"\b(yes|no)\b", reply.split("</think>")[-1].lower())
    return words[-1] == "yes" if words else None


# ---------------- results ----------------


def result_of(items: list[dict], questions: list[dict], replies: list[list[str]]) -> dict:
    """One model's result:

    generation            {domain: accuracy, "mean": their mean}
    outcome, process      {domain: Avg@K of the verdicts, "mean": their mean}
    "<mode>, no verdict"  share of the replies without a verdict
    """
    scores = evaluation.summarise(items)
    result = {"generation": {name: values["accuracy"] for name, values in scores.items()}}
    for mode in PROMPTS:
        shares_of = {domain: [] for domain in DOMAINS}  # of right verdicts, one per answer
        all_verdicts = []
        for question, texts in zip(questions, replies):
            if question["mode"] != mode:
                continue
            verdicts = [says_yes(text) for text in texts]
            all_verdicts += verdicts
            share = np.mean([verdict == question["truth"] for verdict in verdicts])
            shares_of[question["domain"]].append(share)
        averages = {}
        for domain, shares in shares_of.items():
            if shares:
                averages[domain] = float(np.mean(shares))
        averages["mean"] = float(np.mean(list(averages.values())))
        result[mode] = averages
        no_verdict = float(np.mean([verdict is None for verdict in all_verdicts]))
        result[f"{mode}, no verdict"] = no_verdict
    return result


def mean_scores(results: dict, mode: str):
    """[models, 2]: mean accuracy, and mean Avg@K of the verdicts in this mode."""
    points = []
    for result in results.values():
        points.append((result["generation"]["mean"], result[mode]["mean"]))
    return np.array(points)


def correlate(points) -> float | None:
    """Pearson's r of points [models, 2]; None for fewer than 3, or if a coordinate is constant."""
    if len(points) < 3 or points.std(0).min() == 0:
        return None
    return float(np.corrcoef(points.T)[0, 1])


def print_table(results: dict) -> None:
    """Print a row per model, with a column per domain that all models have."""
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
        outcome_silent = result["outcome, no verdict"]
        process_silent = result["process, no verdict"]
        print(f"{name:<24}{cells}    {outcome_silent:.0%} / {process_silent:.0%}")


def draw(results: dict, correlation: dict, k: int):
    """A figure with a panel per mode: accuracy against Avg@K of judging, a point per model."""
    figure, axes = pictures.grid(1, len(correlation), panel_width=4.5, panel_height=3.2)
    for axis, (mode, r) in zip(axes[0], correlation.items()):
        points = mean_scores(results, mode)
        axis.scatter(*points.T)
        for point, name in zip(points, results):
            offset = {"xytext": (5, 4), "textcoords": "offset points"}
            axis.annotate(name, point, fontsize=pictures.FONT, **offset)
        title = f"{mode} verification"
        if r is not None:
            title += f", r = {r:.2f}"
        axis.set_title(title)
        axis.set(xlabel="mean accuracy", ylabel=f"judging: Avg@{k}")
    return figure
