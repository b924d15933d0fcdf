"""Checkers of other packages: math-verify, reasoning-gym, IFEval, IFBench, BFCL, WritingBench.

All packages are imported late, because only rows that need one ask for it. The functions import_*
do nothing else, so that a worker process (checkers.workers) does not count it as a job's time. A
job is a dict of plain JSON.
"""

import ast
import collections
import functools
import re
import sys
import types

from common.packages import package_path

# ---------------- math: math-verify ----------------


def import_math_verify():
    """The package's module."""
    import math_verify

    return math_verify


def math_equal(job: dict) -> bool:
    """Are "gold" and "answer" equal as mathematics? In a box, each is read as one expression."""
    math_verify = import_math_verify()
    gold, answer = [
        math_verify.parse(f"\\boxed{{{job[name].strip('$ ')}}}", parsing_timeout=None)
        for name in ("gold", "answer")
    ]
    return bool(gold) and math_verify.verify(gold, answer, timeout_seconds=None)


# ---------------- generated rows: reasoning-gym ----------------


def import_reasoning_gym():
    """The package's module."""
    import reasoning_gym

    return reasoning_gym


@functools.cache
def gym_dataset(task: str, size: int, seed: int):
    """The dataset of these arguments; it is made only once."""
    return import_reasoning_gym().create_dataset(task, size=size, seed=seed)


def gym_right(job: dict) -> bool:
    """Is "answer" right for row "index" of {"task", "size", "seed"}? The task's own checker says.

    Partial credit, anything under 1, is wrong.
    """
    dataset = gym_dataset(job["task"], job["size"], job["seed"])
    return dataset.score_answer(job["answer"], dataset[job["index"]]) >= 1.0


# ---------------- instructions: if-verifiable (IFEval, IFBench) ----------------


def if_registry() -> dict:
    """{id: checker class} of IFEval and IFBench. Raises UserError if the package is missing."""
    package_path("if_verifiable")
    from if_verifiable.ifbench import instructions_registry as ifbench
    from if_verifiable.ifeval import instructions_registry as ifeval

    return {**ifbench.INSTRUCTION_DICT, **ifeval.INSTRUCTION_DICT}


def import_if_verifiable():
    """(if_registry(), evaluate_instructions) of the package."""
    registry = if_registry()
    from if_verifiable.common import evaluate_instructions

    return registry, evaluate_instructions


def if_met(job: dict) -> bool:
    """Does "answer" meet all "constraints", each by the package's own checker?

    "mode" is strict or loose. Loose: one of the package's looser readings of the answer, such as
    without its first line, may meet them instead.
    """
    registry, evaluate_instructions = import_if_verifiable()
    ids = [constraint["id"] for constraint in job["constraints"]]
    arguments = [constraint.get("kwargs") or {} for constraint in job["constraints"]]
    results, scores = evaluate_instructions(job["answer"], ids, arguments, job["prompt"], registry)
    if len(results) != len(ids):
        return False
    return bool(scores.binary_loose if job["mode"] == "loose" else scores.binary_strict)


# ---------------- function calls: bfcl-eval ----------------


def import_bfcl():
    """(ast_checker, Language) of the package.

    The package imports every vendor's SDK to fill one table of model names. Here a module that
    needs no SDK takes that table's place, with one setting for every model.
    """
    package_path("bfcl_eval")
    model_config = types.ModuleType("bfcl_eval.constants.model_config")
    model_config.MODEL_CONFIG_MAPPING = collections.defaultdict(
        lambda: types.SimpleNamespace(underscore_to_dot=False)
    )
    sys.modules.setdefault(model_config.__name__, model_config)
    from bfcl_eval.constants.enums import Language
    from bfcl_eval.eval_checker.ast_eval.ast_checker import ast_checker

    return ast_checker, Language


def calls_right(job: dict) -> bool:
    """Are "calls", [{"name", "arguments"}], among the "possible" ones? BFCL's AST checker says."""
    ast_checker, Language = import_bfcl()
    if "relevance" in job["category"]:
        # "irrelevance": no function fits, so none may be called. "relevance": some call is right.
        return bool(job["calls"]) == ("irrelevance" not in job["category"])
    calls = [{call["name"]: call["arguments"]} for call in job["calls"]]
    verdict = ast_checker(
        job["functions"],
        calls,
        job["possible"],
        Language[job["language"].upper()],
        job["category"],
        "any-model",
    )
    return verdict["valid"]


# ---------------- writing: WritingBench's critic ----------------


def critic_prompts(row: dict, response: str) -> list[str]:
    """A prompt per criterion of the row (five per task), in the words the critic was trained on.

    inspect-evals has these words, in a module that imports packages no row here needs. So only the
    one function that makes the prompt is taken out of its source. Raises UserError if the package
    is missing.
    """
    path = package_path("inspect_evals", "writingbench/writingbench.py")
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name == "create_scoring_prompt":
            functions.append(node)
    namespace = {}
    exec(compile(ast.Module(functions, []), "writingbench", "exec"), namespace)

    prompts = []
    for i in range(len(row["checklist"])):
        template = namespace["create_scoring_prompt"](i)
        prompts.append(
            template.format(checklist=row["checklist"], question=row["prompt"], answer=response)
        )
    return prompts


def critic_score(reply: str) -> float | None:
    """The critic's score, from 1 to 10; None if the reply names none."""
    match = re.search(r"\"score\"\s*:\s*\"?(\d+(?:\.\d+)?)", reply)
    if match is None:
        return None
    score = float(match[1])
    return score if 1 <= score <= 10 else None
