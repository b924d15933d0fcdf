"""--reward-format: what is paid, what is asked for and what the warm start teaches agree."""

from types import SimpleNamespace

import pytest

import rewards
from common import formats
from common.errors import UserError
from rewards import score

MATH = {"id": "m", "domain": "math", "prompt": "2+2?", "answer": "4"}
SCIENCE = {"id": "s", "domain": "science", "prompt": "A or B?", "answer": "B"}
CODE = {"id": "c", "domain": "code", "prompt": "f?", "tests": {"asserts": "assert f() == 1"}}
EXPRESSION = {
    "id": "e",
    "domain": "code",
    "prompt": "3x?",
    "tests": {"expression": "x", "inputs": [1, 2], "outputs": [3, 6]},
}
NO_COMMA = [{"id": "punctuation:no_comma", "kwargs": {}}]
TEXT = {"id": "i", "domain": "if", "prompt": "Write.", "constraints": NO_COMMA}
PROGRAM = "def f():\n    return 1"
BLOCK = f"```python\n{PROGRAM}\n```"


@pytest.mark.parametrize(
    "row, response, released, strict",
    [
        # (right: 1 or more than 0; wrong form: −1)
        (MATH, "<think>so</think><answer>4</answer>", 1, 1),
        (MATH, "<think>so</think>It is \\boxed{4}.", 1, 1),
        (MATH, "so</think> <answer>4</answer> That is it.", 1, -1),
        (MATH, "<think>so</think>4", -1, -1),
        (MATH, "<answer>4</answer>", -1, -1),
        (MATH, "<think>\\boxed{4}</think>4", -1, -1),
        (SCIENCE, "<think>so</think><answer>B</answer>", 1, 1),
        (SCIENCE, "<think>so</think>B", -1, -1),
        (CODE, f"<think>so</think>\n{BLOCK}", 1, -1),
        (CODE, f"<think>so</think>Here it is:\n{BLOCK}\nDone.", 1, -1),
        (CODE, f"<think>so</think><answer>\n{BLOCK}\n</answer>", 1, 1),
        (CODE, f"<think>so</think><answer>{PROGRAM}</answer>", -1, 1),
        (CODE, f"<think>so</think>{PROGRAM}", -1, -1),
        (CODE, BLOCK, -1, -1),
        (EXPRESSION, "<think>so</think><answer>3*x</answer>", 1, 1),
        (EXPRESSION, "<think>so</think>3*x", -1, -1),
        (TEXT, "<think>so</think>It rains.", 1, -1),
        (TEXT, "<think>so</think><answer>It rains.</answer>", 1, 1),
        (TEXT, "<think>so</think>", -1, -1),
        (TEXT, "It rains.", -1, -1),
    ],
)
def test_what_each_format_pays(row, response, released, strict):
    for reward_format, expected in (("released", released), ("strict", strict)):
        (result,) = score([response], [row], reward_format=reward_format)
        assert result.reward == expected, (reward_format, result)
        assert result.valid == (expected != -1)


def test_a_rows_own_format_wins():
    response = "<think>so</think>It rains."
    (result,) = score([response], [TEXT | {"format": "strict"}])
    assert result.reward == -1
    with pytest.raises(UserError, match="format must be released or strict, not 'none'"):
        score([response], [TEXT | {"format": "none"}])
    with pytest.raises(UserError, match="--reward-format none: not released or strict"):
        score([response], [TEXT], reward_format="none")


@pytest.mark.parametrize("reward_format", formats.FORMATS)
@pytest.mark.parametrize(
    "row, answer", [(MATH, "4"), (SCIENCE, "B"), (CODE, PROGRAM), (TEXT, "It rains.")]
)
def test_what_the_warm_start_teaches_is_what_is_paid_and_asked_for(row, answer, reward_format):
    response = formats.in_form(row, "I answer.", answer, reward_format)
    (result,) = score([response], [row], reward_format=reward_format)
    assert result.correct and result.valid
    args = SimpleNamespace(system_prompt=None, reward_format=reward_format)
    asked = formats.system_prompt(row, args)
    for tag in ("<think>", "</think>", "<answer>", "</answer>", "```python"):
        assert (tag in asked) == (tag in response)


def test_a_given_system_prompt_replaces_the_formats_own():
    for given in ("", "Be brief."):
        args = SimpleNamespace(system_prompt=given, reward_format="released")
        assert formats.system_prompt(MATH, args) == given


def test_only_the_scheme_cgpo_asks_for_a_form():
    for scheme in ("m2rl", "lenient"):
        results = score(["so</think>4", "so</think>5"], [MATH] * 2, scheme)
        assert [result.reward for result in results] == [1.0, 0.0]
    assert rewards.read_answer("4", MATH, "lenient")[0] == "4"
