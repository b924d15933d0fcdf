"""Checkers of other packages: math-verify, reasoning-gym, IFEval, IFBench, BFCL, WritingBench.

All packages are imported late, because only rows that need one ask for it. The functions import_*
do nothing else, so that a worker process (checkers.workers) does not count it as a job's time. A
job is a dict of plain JSON.
"""

import ast
import collections
import functools
import json
import re
import sys
import types

from checkers.constraint_arguments import arguments_of
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
def made_gym_dataset(task: str, size: int, seed: int, settings: str):
    """The dataset of these arguments; it is made only once. settings: as JSON."""
    return import_reasoning_gym().create_dataset(task, size=size, seed=seed, **json.loads(settings))


def gym_dataset(job: dict):
    """The dataset of {"task", "size", "seed"} and, perhaps, the task's "settings"."""
    settings = json.dumps(job.get("settings", {}), sort_keys=True)
    return made_gym_dataset(job["task"], job["size"], job["seed"], settings)


def gym_entry_exists(job: dict) -> bool:
    """Can row "index" of {"task", "size", "seed"} be made? Raises what reasoning-gym raises."""
    return bool(gym_dataset(job)[job["index"]])


def gym_right(job: dict) -> bool:
    """Is "answer" right for row "index" of {"task", "size", "seed"}? The task's own checker says.

    Partial credit, anything under 1, is wrong.
    """
    dataset = gym_dataset(job)
    return dataset.score_answer(job["answer"], dataset[job["index"]]) >= 1.0


# ---------------- instructions: if-verifiable (IFEval, IFBench) ----------------

# Arguments that IFEval's and IFBench's checkers replace by random ones in some rows, such as a
# letter that is none of a to z: id → {argument: the checker's attribute, where it is put back}.
REPLACED = {
    "keywords:letter_frequency": {"letter": "_letter"},
    "length_constraints:nth_paragraph_first_word": {"nth_paragraph": "_nth_paragraph"},
    "repeat:repeat_span": {"n_start": "_n_start"},
}


@functools.cache
def import_if_verifiable():
    """({id: checker class} of IFEval and IFBench, the package's module of readings).

    Language detection, which samples, gets a seed. Raises UserError if the package is missing.
    """
    package_path("if_verifiable")
    import langdetect
    import nltk

    langdetect.DetectorFactory.seed = 0
    download = nltk.download
    nltk.download = do_not_download
    try:
        from if_verifiable import common
        from if_verifiable.ifbench import instructions_registry as ifbench
        from if_verifiable.ifeval import instructions_registry as ifeval
    finally:
        nltk.download = download
    return {**ifbench.INSTRUCTION_DICT, **ifeval.INSTRUCTION_DICT}, common


def do_not_download(*names, **options) -> bool:
    """Stands for nltk.download while IFBench's part is imported, which asks for NLTK's data."""
    return False


def if_checker(constraint: dict):
    """The package's checker of a {"id", "kwargs"}, ready to check texts."""
    registry, _ = import_if_verifiable()
    name, arguments = constraint["id"], arguments_of(constraint)
    checker = registry[name](name)
    checker.build_description(**arguments)
    for argument, attribute in REPLACED.get(name, {}).items():
        value = arguments[argument]
        setattr(checker, attribute, value.lower() if isinstance(value, str) else value)
    return checker


def if_met(job: dict) -> str:
    """ "right" if "answer" meets all "constraints", each by the package's own checker.

    Otherwise "violates <id of the first that it breaks>". "mode" is strict or loose. Loose: one of
    the package's looser readings of the answer, such as without its first line, may meet a
    constraint instead. A blank reading meets none.
    """
    _, common = import_if_verifiable()
    answer = common.strip_thinking(job["answer"])
    readings = [answer]
    if job["mode"] == "loose":
        readings = common.get_loose_transformations(answer)
    readings = [reading for reading in readings if reading.strip()]
    for constraint in job["constraints"]:
        checker = if_checker(constraint)
        if not any(checker.check_following(reading) for reading in readings):
            return f"violates {constraint['id']}"
    return "right"


# ---------------- instructions: a regular expression of a row ----------------


def import_nothing() -> None:
    """The search needs no package."""


def count_matches(job: dict) -> str:
    """How often "pattern", with "flags", occurs in "text", as a text."""
    return str(len(re.findall(job["pattern"], job["text"], job["flags"])))


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
