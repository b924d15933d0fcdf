r"""Rewards: score(responses, rows) → one Score per response, by the checker of the row's domain.

Schemes: "cgpo" (CGPO paper, appendix C.3; the default), "m2rl" (0 or 1; the response only needs
</think>), and eval.py's "lenient" (0 or 1; a response without </think> is all answer). The format
that "cgpo" asks for: common/formats.py. In "cgpo":

    domain     right                             wrong   invalid format     source
    math       1                                 −0.5    −1                 C.3, r_math
    code       1 (all tests)                     −0.5    −1 (or no syntax)  C.3, r_code
    science    1 − 0.05·min(| |a| − |ref| |, 10)  0       −1                 C.3, r_qa (tokens)
    writing    1 better, 0.25 tie                −0.5    −1                 C.3, r_writing
    if, agent  1                                 −0.5    −1                 as math; not in C.3

A failure of a verifier or judge is not a wrong answer: reward and correct are None, and the
response leaves its group. What could hang on a model's text (symbolic equality, third-party
checkers, code) runs in other processes, under a time limit: checkers/.
"""

import concurrent.futures
import json
import re
from collections import defaultdict
from typing import NamedTuple

from checkers import code, ifeval, sandbox
from checkers.calls import UNREADABLE, holds_call, normal_call, read_calls
from checkers.fences import blocks_of
from checkers.latex import paired_braces
from checkers.servers import ask_all
from checkers.math_answers import equal_at_sight, to_symbolic
from checkers.short_answers import LETTER, short_answer_equal
from checkers.third_party import critic_prompts, critic_score
from checkers.workers import WORKERS, ask_workers
from common.errors import UserError
from common.formats import FORMATS, form_of, format_of, runs_code
from common.keys import rng
from common.packages import package_path
from common.rows import DOMAINS, prompt_text
from sources.toy import RHYMES

SCHEMES = ("cgpo", "m2rl", "lenient")
# The scheme "cgpo", as in the table above.
RIGHT = 1.0
WRONG = {"math": -0.5, "code": -0.5, "science": 0.0, "writing": -0.5, "if": -0.5, "agent": -0.5}
INVALID = -1.0
BOTH_ORDERS = False  # --judge-both-orders: the judge sees each pair twice, A first and B first


class Score(NamedTuple):
    """What one response is worth."""

    reward: float | None  # None: the verifier failed, so nobody knows
    correct: bool | None
    valid: bool  # whether the response has the format
    why: str  # the verdict in a word or two; metrics count its first word


class Verdict(NamedTuple):
    """What a checker says of one answer."""

    correct: bool | None  # None: it could not tell
    why: str
    valid: bool = True  # whether the answer has the format
    reward: float | None = None  # if it is not the domain's value for right or wrong


def configure(args) -> None:
    """Set what holds for a whole run, from --allow-unsafe-code and --judge-both-orders."""
    global BOTH_ORDERS
    sandbox.allow_unsafe(args.allow_unsafe_code)
    BOTH_ORDERS = args.judge_both_orders


# ---------------- score ----------------


def count_words(text: str) -> int:
    """The length of a text for r_qa if there is no tokenizer."""
    return len(text.split())


def score(
    responses: list[str],
    rows: list[dict],
    scheme: str = "cgpo",
    verifier_url: str = "",
    judge_url: str = "",
    sandbox_url: str = "",
    count_tokens=count_words,
    truncated: list[bool] | None = None,
    reward_format: str = "released",
) -> list[Score]:
    """One Score per response; rows[i] is the row that responses[i] answers.

    count_tokens: text → its length, for r_qa. truncated: whether each response was cut at the limit
    of tokens; then it is invalid, whatever stands in it (None: none was cut). reward_format: what
    "cgpo" asks for (common/formats.py). Raises UserError for an unknown scheme or format, and for a
    row that no checker can judge (an unknown constraint id; writing without a judge).
    """
    if scheme not in SCHEMES:
        raise UserError(f"--reward-scheme {scheme}: not cgpo, m2rl or lenient")
    if reward_format not in FORMATS:
        raise UserError(f"--reward-format {reward_format}: not released or strict")
    check_rows(rows, judge_url, sandbox_url)

    # 1. The answer in each response. A response whose format is invalid is not judged.
    scores: list[Score | None] = [None] * len(rows)
    answers = {}
    to_judge = defaultdict(list)  # name of a checker → which responses it judges
    invalid_reward = INVALID if scheme == "cgpo" else 0.0
    for i, (response, row) in enumerate(zip(responses, rows, strict=True)):
        if truncated and truncated[i]:
            scores[i] = Score(invalid_reward, False, False, "truncated")
            continue
        answer, fault = read_answer(response, row, scheme, reward_format)
        if answer is None:
            scores[i] = Score(invalid_reward, False, False, f"format: {fault}")
        else:
            answers[i] = answer
            to_judge[checker_of(row)].append(i)

    # 2. Each checker judges its answers together.
    options = {"verifier_url": verifier_url, "judge_url": judge_url, "sandbox_url": sandbox_url}
    for name, indices in to_judge.items():
        check = CHECKERS[name]
        verdicts = check([answers[i] for i in indices], [rows[i] for i in indices], options)
        for i, verdict in zip(indices, verdicts, strict=True):
            scores[i] = to_score(verdict, answers[i], rows[i], scheme, count_tokens)
    return scores


def checker_of(row: dict) -> str:
    """The name, in CHECKERS, of the checker that judges the row's answers."""
    if "gym" in row:
        return "gym"
    return row.get("checker") or row["domain"]


def to_score(verdict: Verdict, answer: str, row: dict, scheme: str, count_tokens) -> Score:
    """The Score of a verdict by the table in the header.

    If it is right, r_qa = 1 − 0.05·min(| |o_ans| − |a| |, 10).
    """
    correct, why, valid, reward = verdict
    if correct is None:
        return Score(None, None, True, why)
    if scheme != "cgpo":
        if row.get("checker") != "critic":  # the critic's rewards are scores between 0 and 1
            reward = float(correct)
        return Score(reward, correct, valid, why)
    if not valid:
        return Score(INVALID, False, False, why)
    if reward is None:
        reward = RIGHT if correct else WRONG[row["domain"]]
        if correct and row["domain"] == "science":
            short = boxed(answer) or answer
            length_difference = abs(count_tokens(short) - count_tokens(row["answer"]))
            reward -= 0.05 * min(length_difference, 10)
    return Score(reward, correct, True, why)


def stop_if_down(columns: dict) -> None:
    """Raise UserError if a verifier or judge failed on all of a domain's responses in a step.

    columns: {"domain", "valid", "reward"}, each a tensor of shape [B], of all ranks. Fewer than
    eight responses prove nothing.
    """
    for k in columns["domain"].unique().tolist():
        judged = (columns["domain"] == k) & columns["valid"]
        if judged.sum() >= 8 and columns["reward"][judged].isnan().all():
            raise UserError(
                f"the verifier of {DOMAINS[k]} failed on all {int(judged.sum())} responses of this "
                "step: see that its server runs and its address is right, then give the command "
                "again (a training run: with --resume)"
            )


# ---------------- before a run: can these rows be judged? ----------------

# A row's "checker" → the package that it needs.
PACKAGES = {"bfcl": "bfcl_eval", "constraints": "if_verifiable"}
# A row's "checker" → the fields that it reads, with their types.
FIELDS = {
    "bfcl": {"category": str, "functions": list, "possible": list, "language": str},
    "critic": {"checklist": list},
}
# Fields that a row may have → the values that they may have.
VALUES = {
    "judge": ("rhyme",),
    "match": ("last-word",),
    "mode": ("strict", "loose"),
    "format": FORMATS,
}


def check_rows(rows: list[dict], judge_url: str, sandbox_url: str) -> None:
    """Raise UserError, before anything is sampled, for rows that no checker here can judge."""
    if not sandbox_url and not sandbox.UNSAFE and any(runs_code(row) for row in rows):
        code.check_sandbox()
    packaged_constraints = []
    for row in {id(row): row for row in rows}.values():  # the responses of a group share a row
        check_checker_name(row)
        check_fields(row)
        check_judge(row, judge_url)
        check_gold_calls(row)
        packaged_constraints += check_constraints(row)
    ifeval.try_packaged(packaged_constraints)
    check_gym_rows(rows)


def check_checker_name(row: dict) -> None:
    """Raise UserError if the row's checker is unknown or its package is not installed."""
    name = row.get("checker", row["domain"])
    if not isinstance(name, str) or name not in CHECKERS:
        known = " ".join(CHECKERS)
        raise UserError(f"row {row['id']}: checker {name!r} is not one of {known}")
    if name in PACKAGES:
        package_path(PACKAGES[name])


def check_fields(row: dict) -> None:
    """Raise UserError if a field that the row's checker reads is missing or not as it must be."""
    for name, values in VALUES.items():
        if name in row and row[name] not in values:
            known = " or ".join(values)
            raise UserError(f"row {row['id']}: {name} must be {known}, not {row[name]!r:.80}")
    for name, kind in FIELDS.get(row.get("checker"), {}).items():
        if not isinstance(row.get(name), kind):
            raise UserError(
                f"row {row['id']}: checker {row['checker']} needs the field {name!r}, a "
                f"{kind.__name__}, and it is {row.get(name)!r:.80}"
            )


def check_judge(row: dict, judge_url: str) -> None:
    """Raise UserError if a writing row has no judge, or if its rule does not know the topic."""
    if row["domain"] != "writing" or "gym" in row:
        return
    if row.get("judge") != "rhyme":
        if not judge_url:
            raise UserError(
                "writing rows need --judge-url, an OpenAI-compatible server "
                "(the paper's judge is Qwen2.5-72B-Instruct)"
            )
    elif rhymes_with(row.get("topic")) is None:
        raise UserError(f"row {row['id']}: nothing is known to rhyme with {row.get('topic')!r:.80}")


made_entries: set[str] = set()  # those of reasoning-gym that check_gym_rows has made, as JSON


def check_gym_rows(rows: list[dict]) -> None:
    """Raise UserError if reasoning-gym cannot make the entry that a row speaks of."""
    new_rows = {}
    for row in rows:
        if "gym" in row:
            new_rows.setdefault(json.dumps(row["gym"]), row)
    for entry in made_entries & new_rows.keys():
        del new_rows[entry]
    replies = ask_workers([{"check": "gym-entry", **row["gym"]} for row in new_rows.values()])
    for row, reply in zip(new_rows.values(), replies):
        if reply.startswith("error"):
            raise UserError(f"row {row['id']}: reasoning-gym has no entry {row['gym']} ({reply})")
    made_entries.update(new_rows)


def check_gold_calls(row: dict) -> None:
    """Raise UserError if one of the row's gold calls is no call that an answer could equal."""
    for call in row.get("gold_calls", []):
        try:
            normal_call(call)
        except UNREADABLE as error:
            raise UserError(
                f"row {row['id']}: gold call {json.dumps(call)[:200]} cannot be read ({error}): it "
                'needs "name", and "arguments" as an object or as its JSON text'
            ) from error


def check_constraints(row: dict) -> list[tuple[str, dict]]:
    """Raise UserError if one of the row's constraints cannot be checked.

    Returns (row id, constraint) for each constraint that the package if-verifiable judges.
    """
    by_package = row.get("checker") == "constraints"
    packaged = []
    for constraint in row.get("constraints", []):
        if ifeval.check_constraint(constraint, row["id"], by_package):
            packaged.append((row["id"], constraint))
    return packaged


# ---------------- format ----------------


SPECIAL_TOKEN = re.compile(r"(?:<\|\w{1,20}\|>|</s>)\s{0,9}$")  # which no tokenizer took out


def read_answer(
    response: str, row: dict, scheme: str, reward_format: str = "released"
) -> tuple[str | None, str]:
    """Call extract_answer by the rules of the scheme, the format and the row's domain."""
    if scheme == "lenient":
        thought, closing, rest = response.rpartition("</think>")
        # A thought may speak of its own end: the last </think> counts. One that was opened, after
        # whatever text, must be closed.
        if closing or "<think>" not in response:
            response = f"</think>{SPECIAL_TOKEN.sub('', rest)}"
    # A box holds a short answer. Elsewhere it would hide the rest, and also where the answer is an
    # option's letter: "so \\boxed{x^2}. Answer: D", "\\boxed{A}, or maybe B".
    is_short = "gym" in row or row["domain"] in ("math", "science")
    if "gym" not in row and row["domain"] == "science" and LETTER.fullmatch(row["answer"].strip()):
        is_short = False
    is_strict = scheme == "cgpo" and format_of(row, reward_format) == "strict"
    answer, fault = extract_answer(response, is_strict, unwrap=is_short)
    if answer is None or scheme != "cgpo" or is_strict:
        return answer, fault
    rest = response.rpartition("</think>")[2]
    form = form_of(row, reward_format)
    if form == "answer" and "</answer>" not in rest and boxed(rest) is None:
        return None, "no <answer> and no \\boxed"
    if form == "code" and not blocks_of(answer):
        return None, "no block of code"
    return answer, ""


def extract_answer(
    response: str, strict: bool = True, unwrap: bool = True
) -> tuple[str | None, str]:
    r"""(answer, "") or (None, what is wrong with the format).

    strict (C.3): one <think>…</think> at the beginning; then one <answer>…</answer> with nothing
    after it or, without answer tags, text with a \boxed{…}. Not strict (M2RL): only one </think>
    is needed; the answer is what stands in the answer tags, or else all that follows.
    unwrap: if the answer has a \boxed{…}, the last box's content is the answer.
    """
    # 1. Divide the response into the thought and the rest.
    text = response.strip()
    if "</think>" not in text:
        return None, "no closed <think>"
    if text.count("</think>") > 1:
        return None, "several </think>"
    if strict and not (text.startswith("<think>") and text.count("<think>") == 1):
        return None, "response must begin with one <think>"
    thought, rest = text.split("</think>")
    if "<think>" in rest:
        return None, "a second <think>"

    # 2. The answer is in the rest: in tags, or without them all of it.
    opened, closed = rest.count("<answer>"), rest.count("</answer>")
    if opened == 0 and closed == 0:
        if strict and boxed(rest) is None:
            return None, "no <answer> and no \\boxed"
        answer = rest
        unwrap = unwrap or strict  # without tags, the box is what marks the answer
    elif opened != closed:
        return None, "<answer> tags do not pair"
    elif opened > 1 or rest.index("<answer>") > rest.index("</answer>"):
        return None, "several <answer>"
    else:
        answer, tail = rest.split("<answer>")[1].split("</answer>")
        if strict and tail.strip():
            return None, "text behind </answer>"
    if strict and ("<answer>" in thought or "</answer>" in thought):
        return None, "<answer> inside <think>"

    # 3. The last box in the answer.
    if unwrap:
        content = boxed(answer)
        if content is not None:
            answer = content
    answer = answer.strip()
    if not answer:
        return None, "empty answer"
    return answer, ""


# \\boxed{3}, \\boxed {3}, \\boxed 3
BOX = re.compile(r"\\(?:boxed|fbox|framebox)[ \t]*(\{|[-+]?\w[\w.,/]{0,40})?")
# What may stand between boxes that are one answer: \\boxed{3}, \\boxed{5} and \\boxed{7}.
BETWEEN_BOXES = re.compile(r"[\s,;$]{0,20}(?:\\text\{)?\s{0,3}(?:and|or)?\s{0,3}\}?[\s,;$]{0,20}")


def boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…} or \fbox{…}; None if there is none with paired braces.

    Boxes side by side are one answer, a list: \boxed{3}, \boxed{5} is "3, 5".
    """
    closing_of = paired_braces(text)
    contents: list[str] = []
    end = 0  # of the last box
    for box in BOX.finditer(text):
        start, stop = box.end(), box.end()
        if box[1] == "{":
            stop = closing_of.get(start - 1, -1)
        elif box[1]:  # \boxed 3
            start = box.start(1)
            stop = start + len(box[1].rstrip(".,"))
        else:
            stop = -1
        if stop < start:
            contents = []  # it is cut off
            continue
        if contents and box.start() < end:  # a box in a box
            contents.pop()
        elif not BETWEEN_BOXES.fullmatch(text, end, box.start()):
            contents = []
        contents.append(text[start:stop])
        end = max(end, stop + 1)
    return ", ".join(contents) if contents else None


# ---------------- math, and generated rows: compared in worker processes ----------------


def check_math(answers, rows, options) -> list[Verdict]:
    """verify_math(o_ans, a) of C.3.

    Texts and plain numbers are compared here; everything else symbolically, in worker processes.
    """
    verdicts: list[Verdict | None] = [None] * len(rows)
    to_compare, jobs = [], []
    for i, (answer, row) in enumerate(zip(answers, rows)):
        equal = equal_at_sight(answer, row["answer"])
        if equal is None:
            answer, reference = to_symbolic(answer, row["answer"])
            to_compare.append(i)
            jobs.append({"check": "math", "gold": reference, "answer": answer})
        else:
            verdicts[i] = right_or_wrong(equal)
    for i, verdict in zip(to_compare, worker_verdicts(jobs)):
        verdicts[i] = verdict
    return verdicts


def check_gym(answers, rows, options) -> list[Verdict]:
    """Right if reasoning-gym's own checker of the row's task says so."""
    jobs = []
    for answer, row in zip(answers, rows):
        jobs.append({"check": "gym", "answer": answer, **row["gym"]})
    return worker_verdicts(jobs)


def worker_verdicts(jobs: list[dict]) -> list[Verdict]:
    """The verdicts of worker processes.

    What is neither "right" nor unknown, such as an answer that takes too long, is wrong.
    """
    verdicts = []
    for reply in ask_workers(jobs):
        correct = None if reply.startswith("unknown") else reply == "right"
        verdicts.append(Verdict(correct, reply))
    return verdicts


def right_or_wrong(correct: bool) -> Verdict:
    """The Verdict that has no more to say than that."""
    return Verdict(correct, "right" if correct else "wrong")


# ---------------- code ----------------


def check_code(answers, rows, options) -> list[Verdict]:
    """exec(o_ans) ⊨ unittest, of C.3. Equal pairs of code and tests run once."""
    # Responses of a group share their row's tests, which may be megabytes: dump those only once.
    tests_as_json, wanted = {}, {}
    for row in rows:
        tests = row["tests"]
        if id(tests) not in tests_as_json:
            tests_as_json[id(tests)] = json.dumps(tests)
            wanted[id(tests)] = code.wanted_names(tests)
    pairs = []
    for answer, row in zip(answers, rows):
        tests = id(row["tests"])
        pairs.append((code.program_of(answer, wanted[tests]), tests_as_json[tests]))

    def check_pair(pair):
        program, tests = pair
        return check_program(program, json.loads(tests), options["sandbox_url"])

    different_pairs = list(dict.fromkeys(pairs))
    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        verdicts = dict(zip(different_pairs, pool.map(check_pair, different_pairs)))
    return [verdicts[pair] for pair in pairs]


def check_program(program: str, tests: dict, sandbox_url: str) -> Verdict:
    """The toy's tests compare an expression's values; all others run the program."""
    tree = code.parse_code(program)
    if tree is None:
        return Verdict(False, "syntax", valid=False)
    if "expression" in tests:
        for value, expected in zip(tests["inputs"], tests["outputs"]):
            if code.evaluate(tree, tests["expression"], value) != expected:
                return right_or_wrong(False)
        return right_or_wrong(True)
    passed, why = code.run_program(program, tests, sandbox_url)
    return Verdict(passed, why, valid=why != "syntax")


# ---------------- science ----------------

VERIFIER_PROMPT = """Question: {question}

Ground truth: {reference}

Student answer: {answer}

Is the student's answer the same as the ground truth, whatever its form? \
Do not solve the question. End with the line "Final Decision: Yes" or "Final Decision: No"."""


def check_science(answers, rows, options) -> list[Verdict]:
    """Right if a verifier model says so or, without a URL, the rules of short_answer_equal."""
    url = options["verifier_url"]
    if not url:
        verdicts = []
        for answer, row in zip(answers, rows):
            equal = short_answer_equal(answer, row["answer"], row.get("match"))
            verdicts.append(right_or_wrong(equal))
        return verdicts

    prompts = []
    for answer, row in zip(answers, rows):
        prompts.append(
            VERIFIER_PROMPT.format(
                question=prompt_text(row), reference=row["answer"], answer=answer
            )
        )
    return [read_verifier(reply) for reply in ask_all(url, prompts, "verifier")]


def read_verifier(reply: str | UserError) -> Verdict:
    """The last decision of a reply.

    A failed call, or a reply without one, is not a wrong answer.
    """
    if isinstance(reply, UserError):
        return Verdict(None, f"verifier-error: {reply}")
    decisions = re.findall(r"Final Decision:[\s*]*(Yes|No)", reply, re.IGNORECASE)
    if not decisions:
        return Verdict(None, f"verifier-error: no decision in {reply[-80:]!r}")
    return right_or_wrong(decisions[-1].lower() == "yes")


# ---------------- writing ----------------

JUDGE_PROMPT = """Compare two responses to a writing task; judge quality, not length or position.

[Task]
{task}

[Response A]
{a}

[Response B]
{b}

Explain briefly, then end with [[A]] if A is better, [[B]] if B is better, [[C]] for a tie."""


def check_writing(answers, rows, options) -> list[Verdict]:
    """Better, tie or worse than the row's reference.

    A judge model decides; the toy has a rule instead.
    """
    verdicts: list[Verdict | None] = [None] * len(rows)
    to_judge = []
    for i, row in enumerate(rows):
        if row.get("judge") == "rhyme":
            verdicts[i] = rhyme_judge(answers[i], row)
        else:
            to_judge.append(i)
    if to_judge:
        judged = ask_judge(
            [answers[i] for i in to_judge], [rows[i] for i in to_judge], options["judge_url"]
        )
        for i, verdict in zip(to_judge, judged):
            verdicts[i] = verdict
    return verdicts


def ask_judge(answers, rows, url: str) -> list[Verdict]:
    """A judge model's verdicts. It sees the answers only, never the thoughts.

    Judges favour a position, so which response is shown as A is drawn from the row and the answer.
    With BOTH_ORDERS each pair is shown both ways, and a judge that contradicts itself gives a tie.
    """
    questions = []  # (i, is the answer shown as A?)
    for i, (answer, row) in enumerate(zip(answers, rows)):
        answer_is_a = bool(rng("judge", row["id"], answer).integers(2))
        questions.append((i, answer_is_a))
        if BOTH_ORDERS:
            questions.append((i, not answer_is_a))

    prompts = []
    for i, answer_is_a in questions:
        answer, reference = answers[i], rows[i]["reference"]
        a, b = (answer, reference) if answer_is_a else (reference, answer)
        prompts.append(JUDGE_PROMPT.format(task=prompt_text(rows[i]), a=a, b=b))

    verdicts_of = defaultdict(list)
    for (i, answer_is_a), reply in zip(questions, ask_all(url, prompts, "judge")):
        verdicts_of[i].append(read_judge(reply, answer_is_a))

    verdicts = []
    for i in range(len(answers)):
        failed = [verdict for verdict in verdicts_of[i] if verdict.correct is None]
        if failed:
            verdicts.append(failed[0])
        elif len(set(verdicts_of[i])) == 1:
            verdicts.append(verdicts_of[i][0])
        else:
            verdicts.append(pairwise(None))
    return verdicts


def read_judge(reply: str | UserError, answer_is_a: bool) -> Verdict:
    """The last [[A]], [[B]] or [[C]] of a reply.

    A failed call, or a reply without one, is not a wrong answer.
    """
    if isinstance(reply, UserError):
        return Verdict(None, f"judge-error: {reply}")
    choices = re.findall(r"\[\[([ABC])\]\]", reply, re.IGNORECASE)
    if not choices:
        return Verdict(None, f"judge-error: no decision in {reply[-80:]!r}")
    choice = choices[-1].upper()
    if choice == "C":
        return pairwise(None)
    return pairwise((choice == "A") == answer_is_a)


def pairwise(better: bool | None) -> Verdict:
    """r_writing: 1 better, 0.25 tie (better is None), −0.5 worse. Only "better" is correct."""
    if better is None:
        return Verdict(False, "tie", reward=0.25)
    return Verdict(better, "better" if better else "worse")


def rhyme_judge(answer: str, row: dict) -> Verdict:
    """The toy's judge: the poem with the higher rhyme_quality is better."""
    quality = rhyme_quality(answer, row["topic"])
    reference_quality = rhyme_quality(row["reference"], row["topic"])
    if quality == reference_quality:
        return pairwise(None)
    return pairwise(quality > reference_quality)


def rhymes_with(topic) -> list[str] | None:
    """The words that rhyme with the topic, itself included; None if none is known."""
    for words in RHYMES.values():
        if topic in words:
            return words
    return None


def rhyme_quality(poem: str, topic: str) -> int:
    """The number of distinct rhymes on the topic, minus the other words and repeats.

    Each word beyond the third costs one more, so that a long list does not win.
    """
    family = rhymes_with(topic)
    words = poem.split()
    rhymes = {word for word in words if word in family and word != topic}
    return 2 * len(rhymes) - len(words) - max(0, len(words) - 3)


# ---------------- if: IFEval's constraints ----------------


def check_if(answers, rows, options) -> list[Verdict]:
    """Right if every constraint is met, strictly.

    Unknown ids are errors (check_rows): to skip one would pay for nothing. The constraints that
    only if-verifiable knows are that package's to judge, if all others are met.
    """
    verdicts, jobs = [], {}
    for i, (answer, row) in enumerate(zip(answers, rows)):
        ours, packaged = [], []
        for constraint in row["constraints"]:
            is_ours = constraint["id"] in ifeval.CONSTRAINTS
            (ours if is_ours else packaged).append(constraint)
        verdict = met_without_package(answer, ours)
        verdicts.append(verdict)
        if packaged and verdict.correct:
            jobs[i] = if_job(answer, row, packaged)
    for i, verdict in zip(jobs, worker_verdicts(list(jobs.values()))):
        verdicts[i] = verdict
    return verdicts


def met_without_package(answer: str, constraints: list[dict]) -> Verdict:
    """Right if each of these is met; otherwise the verdict names the first that is not.

    The constraints' ids are all in ifeval.CONSTRAINTS.
    """
    for constraint in constraints:
        is_met = ifeval.holds(constraint, answer)
        if is_met is None:
            return Verdict(None, f"unknown: {constraint['id']}: the machine failed")
        if not is_met:
            return Verdict(False, f"violates {constraint['id']}")
    return Verdict(True, "right")


def check_packaged_if(answers, rows, options) -> list[Verdict]:
    """Right if IFEval's and IFBench's own checkers, from the package if-verifiable, say so."""
    jobs = [if_job(answer, row, row["constraints"]) for answer, row in zip(answers, rows)]
    return worker_verdicts(jobs)


def if_job(answer: str, row: dict, constraints: list[dict]) -> dict:
    """A worker's job: are these constraints of the row met?"""
    return {
        "check": "if",
        "answer": answer,
        "constraints": constraints,
        "mode": row.get("mode", "strict"),
    }


# ---------------- agent: one turn of function calls ----------------


# Calls are compared as JSON, because in Python true equals 1.
to_json = json.JSONEncoder(sort_keys=True).encode


def check_agent(answers, rows, options) -> list[Verdict]:
    """Right if the calls equal the gold calls: order, names and arguments (true is not 1).

    Where no call is wanted, prose is right too.
    """
    verdicts = []
    for answer, row in zip(answers, rows):
        calls = read_calls(answer)
        gold_calls = [normal_call(call) for call in row["gold_calls"]]
        if calls is None and not gold_calls and not holds_call(answer):
            calls = []
        if calls is None:
            verdicts.append(Verdict(False, "unreadable calls", valid=False))
        else:
            verdicts.append(right_or_wrong(to_json(calls) == to_json(gold_calls)))
    return verdicts


# ---------------- benchmarks with checkers of their own ----------------


def check_bfcl(answers, rows, options) -> list[Verdict]:
    """Right if BFCL's AST checker (bfcl-eval) says so.

    Where no function fits (categories of irrelevance), whatever holds no readable call is right, as
    in BFCL. Elsewhere an answer without readable calls is wrong.
    """
    calls_of = [read_calls(answer) for answer in answers]
    jobs = []
    for calls, row in zip(calls_of, rows):
        jobs.append(
            {
                "check": "bfcl",
                "calls": calls or [],
                "category": row["category"],
                "functions": row["functions"],
                "possible": row["possible"],
                "language": row["language"],
            }
        )
    verdicts = worker_verdicts(jobs)
    for i, calls in enumerate(calls_of):
        if calls is None and "irrelevance" not in rows[i]["category"]:
            verdicts[i] = Verdict(False, "unreadable calls", valid=False)
    return verdicts


def check_critic(answers, rows, options) -> list[Verdict]:
    """WritingBench: the reward is a tenth of the critic's mean score; 6 or more is correct."""
    prompts_of = [critic_prompts(row, answer) for answer, row in zip(answers, rows)]
    prompts = [prompt for row_prompts in prompts_of for prompt in row_prompts]
    replies = ask_all(options["judge_url"], prompts, "critic")
    verdicts = []
    start = 0
    for row_prompts in prompts_of:
        stop = start + len(row_prompts)
        verdicts.append(read_critic(replies[start:stop]))
        start = stop
    return verdicts


def read_critic(replies: list[str | UserError]) -> Verdict:
    """The mean of the scores, one reply per criterion. Without all of them there is no verdict."""
    scores = []
    for reply in replies:
        if isinstance(reply, UserError):
            return Verdict(None, f"critic-error: {reply}")
        scores.append(critic_score(reply))
    if None in scores:
        return Verdict(None, "critic-error: no score in a reply")
    mean = sum(scores) / len(scores)
    return Verdict(mean >= 6, f"score {mean:.1f}", reward=mean / 10)


# checker_of(row) → the checker: (answers, rows, options) → one Verdict per answer.
CHECKERS = {
    "math": check_math,
    "gym": check_gym,
    "code": check_code,
    "science": check_science,
    "writing": check_writing,
    "if": check_if,
    "agent": check_agent,
    "constraints": check_packaged_if,
    "bfcl": check_bfcl,
    "critic": check_critic,
}
