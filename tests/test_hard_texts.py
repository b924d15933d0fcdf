"""What no text may do to a checker: break it, or keep it busy for more than linear time."""

import ast
import random
import re
import resource
import subprocess
import sys

import pytest

import rewards
from common.errors import UserError
from conftest import ROOT

SUM = {"domain": "code", "tests": {"asserts": "assert add(1, 2) == 3"}}
PROGRAM = {"domain": "code", "tests": {"inputs": ["1"], "outputs": ["2"]}}
POEM = {"domain": "writing", "judge": "rhyme", "topic": "cat", "reference": "hat bat"}
CALL = {"domain": "agent", "gold_calls": [{"name": "f", "arguments": {"x": 1}}]}
NO_CALL = {"domain": "agent", "gold_calls": []}
CONSTRAINTS = [
    {"id": "keywords:existence", "kwargs": {"keywords": ["sun"]}},
    {"id": "length_constraints:number_paragraphs", "kwargs": {"num_paragraphs": 2}},
    {"id": "detectable_content:number_placeholders", "kwargs": {"num_placeholders": 1}},
    {"id": "detectable_content:postscript", "kwargs": {"postscript_marker": "P.S."}},
    {"id": "detectable_format:number_bullet_lists", "kwargs": {"num_bullets": 2}},
    {"id": "detectable_format:number_highlighted_sections", "kwargs": {"num_highlights": 1}},
    {
        "id": "detectable_format:multiple_sections",
        "kwargs": {"section_spliter": "SECTION", "num_sections": 2},
    },
    {"id": "detectable_format:json_format", "kwargs": {}},
    {"id": "detectable_format:title", "kwargs": {}},
    {"id": "combination:two_responses", "kwargs": {}},
    {"id": "startend:quotation", "kwargs": {}},
    {"id": "detectable_format:sentence_hyphens", "kwargs": {}},
    {"id": "copy:repeat_phrase", "kwargs": {"phrase": "a b c", "small_n": 2}},
    {"id": "keywords:start_end", "kwargs": {}},
    {"id": "first_word:first_word_sent", "kwargs": {"first_word": "a"}},
    {"id": "count:counting_composition", "kwargs": {"n_sent": 2, "n_words": 3}},
]
# Rows for every checker of this process and of the worker processes, but those of servers.
ROWS = {
    "math number": {"domain": "math", "answer": "3"},
    "math expression": {"domain": "math", "answer": "2x+1"},
    "math list": {"domain": "math", "answer": "(1,2)"},
    "math words": {"domain": "math", "answer": "Friday"},
    "science letter": {"domain": "science", "answer": "B"},
    "science number": {"domain": "science", "answer": "2.5 m"},
    "science text": {"domain": "science", "answer": "the cell"},
    "function": SUM,
    "program": PROGRAM,
    "poem": POEM,
    "call": CALL,
    "no call": NO_CALL,
    **{item["id"]: {"domain": "if", "constraints": [item]} for item in CONSTRAINTS},
}
# Pieces that mean something to a checker.
PIECES = (
    "<think> </think> <answer> </answer> <tool_call> </tool_call> \\boxed{ \\fbox{ \\text{ \\frac{ "
    "{ } [ ] ( ) [[ ]] << >> * ** *** ****** - # ``` ~~~ ```python $ \\( \\[ \" ' , . ; : ? ! / \\ "
    "A B (C) answer Answer: or and not is 1 2.5 .5 1,000 1/2 e5 % ° × − SECTION P.S. sun x = < > "
    '{"name": "arguments": "f" null true NaN def return print( ^ _ \\pm \\overline{3} … \u200b'
).split(" ") + ["\n", "\n\n", "\r\n", " ", "\t", "\x00", "\ud800"]


def row_of(name: str) -> dict:
    """The row of ROWS with an id and a prompt."""
    return {"id": "r", "prompt": "?", **ROWS[name]}


def is_known(name: str) -> bool:
    """Can the row be judged here? A constraint may need data that is not installed."""
    try:
        rewards.check_rows([row_of(name)], "", "")
    except UserError as error:
        assert "NLTK" in str(error)
        return False
    return True


def random_texts(count: int, seed: int) -> list[str]:
    """Texts of PIECES, and of any characters."""
    generator = random.Random(seed)
    texts = []
    for i in range(count):
        if i % 4:
            texts.append("".join(generator.choices(PIECES, k=generator.randint(0, 20))))
        else:
            length = generator.randint(0, 40)
            texts.append("".join(chr(generator.randrange(1, 0x3000)) for _ in range(length)))
    return texts


def score_all(name: str, texts: list[str], scheme: str) -> list[rewards.Score]:
    """The scores of the texts as answers, in the format of the scheme."""
    if scheme == "cgpo":
        texts = [f"<think>so</think><answer>{text}</answer>" for text in texts]
    return rewards.score(texts, [row_of(name)] * len(texts), scheme)


def check_scores(scores: list[rewards.Score]) -> None:
    """Each response has a verdict: nothing here is the machine's fault."""
    for result in scores:
        assert result.correct in (True, False)
        assert isinstance(result.reward, float)


@pytest.mark.parametrize("scheme", ["cgpo", "lenient"])
@pytest.mark.parametrize("name", ROWS)
def test_random_texts_have_verdicts(name, scheme):
    if is_known(name):
        check_scores(score_all(name, random_texts(100, seed=1), scheme))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_2000_random_texts_have_verdicts(name):
    if is_known(name):
        check_scores(score_all(name, random_texts(2000, seed=2), "cgpo"))


# ---------------- linear time ----------------

LONG = 100_000  # characters
CPU_SECONDS = 120  # for all of a row's texts; a pattern of quadratic time takes longer for one


def long_texts() -> list[str]:
    """100,000 characters of each piece, alone and after a text that a pattern could begin with."""
    texts = []
    for piece in PIECES:
        if piece and piece not in ("\x00", "\ud800"):
            texts.append(piece * (LONG // len(piece)))
    for start in ("\\boxed{", "```python\n", "<tool_call>", "answer is ", "[", "<<", '"', "1 "):
        for filler in (" ", "1", "a", "\n", "*", "[", "(A", "{"):
            texts.append(start + filler * (LONG // len(filler)))
    return texts


def judge_long_texts(name: str) -> None:
    """Score the long texts in every scheme. Run by a process of its own."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    for scheme in ("cgpo", "lenient"):
        check_scores(score_all(name, long_texts(), scheme))


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_long_texts_take_linear_time(name):
    """A checker that is not linear is ended by the kernel: it does not come to print "done"."""
    if not is_known(name):
        return
    program = f"import test_hard_texts as t; t.judge_long_texts({name!r}); print('done')"
    process = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": f"{ROOT}:{ROOT}/tests", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert process.stdout.endswith("done\n"), process.stderr[-1000:]


# Patterns with an unbounded lazy repeat, or an unbounded repeat in another, that may stay, because
# the texts that they meet are short: pattern → why.
CAPPED: dict[str, str] = {}
UNBOUNDED = re._constants.MAXREPEAT


def patterns_in(path) -> list[str]:
    """The constant patterns given to functions of re in a Python file."""
    patterns = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        module = node.func.value
        if isinstance(module, ast.Name) and module.id == "re" and node.args:
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                patterns.append(argument.value)
    return patterns


def is_risky(tree, inside_repeat: bool = False) -> bool:
    """Has a parsed pattern an unbounded lazy repeat, or an unbounded repeat inside another?"""
    for operation, argument in tree:
        name = str(operation)
        children = []
        is_unbounded = False
        if name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            _, most, body = argument
            is_unbounded = most is UNBOUNDED
            if is_unbounded and (inside_repeat or name == "MIN_REPEAT"):
                return True
            children = [body]
        elif name == "SUBPATTERN":
            children = [argument[-1]]
        elif name == "BRANCH":
            children = argument[1]
        elif name in ("ASSERT", "ASSERT_NOT"):
            children = [argument[1]]
        elif name == "ATOMIC_GROUP":
            children = [argument]
        for child in children:
            if is_risky(child, inside_repeat or is_unbounded):
                return True
    return False


def test_is_risky_sees_lazy_and_nested_repeats():
    risky = [r"<a>(.*?)</a>", r"(a+)+", r"(?:x|y*)*", r"\[.*?\]"]
    safe = [r"a*b+", r"[^\]]*", r"(?:ab){2,9}", r"a{1,9}?b"]
    assert all(is_risky(re._parser.parse(pattern)) for pattern in risky)
    assert not any(is_risky(re._parser.parse(pattern)) for pattern in safe)


def test_no_risky_pattern_meets_a_model_s_text():
    risky = set()
    for path in [ROOT / "rewards.py", *sorted((ROOT / "checkers").glob("*.py"))]:
        for pattern in patterns_in(path):
            if is_risky(re._parser.parse(pattern)):
                risky.add(pattern)
    assert risky == set(CAPPED)
