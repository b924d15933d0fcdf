"""Benchmarks: rows in the sources' own fields, their gold and mutated answers, and eval.py."""

import base64
import copy
import functools
import importlib.util
import io
import json
import pickle
import zlib

import pytest
import torch

import eval as evaluation
import rewards
from checkers import servers
from common import sampler
from common.errors import UserError
from common.files import write_jsonl
from sources import benchmarks
from sources.toy import toy_rows
from test_rewards import server  # noqa: F401  (a fixture)

# ---------------- a row of each benchmark ----------------


def program_case(text, result, kind):
    """A test case of LiveCodeBench: an input and the output that it should give."""
    return {"input": text, "output": result, "testtype": kind}


def compress(cases) -> str:
    """Private test cases as LiveCodeBench packs them: JSON in a pickle, compressed, in base64."""
    pickled = pickle.dumps(json.dumps(cases))
    return base64.b64encode(zlib.compress(pickled)).decode()


LIVECODEBENCH_PROGRAM = {
    "question_content": "Add.",
    "starter_code": "",
    "metadata": "{}",
    "public_test_cases": json.dumps([program_case("1 2\n", "3\n", "stdin")]),
    "private_test_cases": json.dumps([program_case("3 4\n", "7\n", "stdin")]),
}
PROGRAM = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
METHOD_STUB = "class Solution:\n    def add(self, a: int, b: List[int]) -> int:\n        "
LIVECODEBENCH_METHOD = {
    "question_content": "Add.",
    "starter_code": METHOD_STUB,
    "metadata": json.dumps({"func_name": "add"}),
    "public_test_cases": json.dumps([program_case("1\n[2, 3]", "6", "functional")]),
    "private_test_cases": compress([program_case("0\n[]", "0", "functional")]),
}
METHOD = f"```python\n{METHOD_STUB}return a + sum(b)\n```"
MBPP = {
    "task_id": 11,
    "text": "Write a function to double.",
    "code": "def double(x):\n    return 2 * x",
    "test_setup_code": "",
    "test_list": ["assert double(2) == 4", "assert double(0) == 0"],
}
GPQA = {
    "Question": "Which?",
    "Correct Answer": "right\n",
    "Incorrect Answer 1": "a",
    "Incorrect Answer 2": "b",
    "Incorrect Answer 3": "c",
}
SUPERGPQA = {
    "question": "Which?",
    "options": list("wxyz"),
    "answer_letter": "C",
    "discipline": "x",
}
HLE = {"id": "1", "question": "Who?", "image": "", "answer": "Emmy Noether"}
IFEVAL = {
    "key": 1000,
    "prompt": "Write without commas, twice 'sun'.",
    "instruction_id_list": ["punctuation:no_comma", "keywords:frequency"],
    "kwargs": [
        {"keyword": None, "relation": None, "frequency": None},
        {"relation": "at least", "keyword": "sun", "frequency": 2},
    ],
}
ROWS = [  # benchmark, a row of the source, a right answer, wrong ones
    (
        "math500",
        {"problem": "1/2 + 1/4?", "answer": "\\frac{3}{4}", "subject": "Algebra"},
        "\\boxed{0.75}",
        ["\\boxed{0.7501}", "\\boxed{4/3}", "3"],
    ),
    (
        "amc23",
        {"question": "What?", "answer": 27.0},
        "\\boxed{27}",
        ["\\boxed{27.1}", "\\boxed{-27}"],
    ),
    (
        "aime24",
        {"problem": "What?", "answer": "033"},
        "So it is \\boxed{33}.",
        ["\\boxed{34}"],
    ),
    ("aime25", {"problem": "What?", "answer": "70"}, "\\boxed{070}", ["\\boxed{7}"]),
    (
        "mbpp",
        MBPP,
        f"```python\n{MBPP['code']}\n```",
        ["```python\ndef double(x):\n    return x + 2\n```", "2 * x"],
    ),
    ("livecodebench-v5", LIVECODEBENCH_PROGRAM, PROGRAM, ["```python\nprint(3)\n```"]),
    (
        "livecodebench-v6",
        LIVECODEBENCH_METHOD,
        METHOD,
        [METHOD.replace("a + ", ""), METHOD.replace("add", "plus")],
    ),
    ("supergpqa", SUPERGPQA, "\\boxed{C}", ["\\boxed{D}", "\\boxed{CD}", "no idea"]),
    ("hle", HLE, "\\boxed{emmy noether}", ["\\boxed{Hilbert}"]),
]


def rows_of(tmp_path, name, *source_rows):
    """The benchmark's rows, read from a file of these source rows."""
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, source_rows)
    return benchmarks.rows_of(name, {name: str(path)})


def rewards_of(row, *answers) -> list[float]:
    """The reward of each answer to one row."""
    scores = rewards.score(list(answers), [row] * len(answers), "lenient")
    return [score.reward for score in scores]


def check_answers(row, right, wrong):
    """`right` is right with and without tags, `wrong` is wrong, and thoughts do not count."""
    right_responses = [
        right,
        f"<think>{wrong[0]}</think>{right}",
        f"<think>x</think><answer>{right}</answer>",
    ]
    wrong_responses = [*wrong, f"<think>{right}</think>{wrong[0]}"]
    assert rewards_of(row, *right_responses) == [1.0] * 3
    assert rewards_of(row, *wrong_responses) == [0.0] * (len(wrong) + 1)


@pytest.mark.parametrize("name, source_row, right, wrong", ROWS, ids=[case[0] for case in ROWS])
def test_a_row_of_each_benchmark(tmp_path, name, source_row, right, wrong):
    (row,) = rows_of(tmp_path, name, source_row)
    assert row["benchmark"] == name
    assert row["id"] == f"{name}/0"
    check_answers(row, right, wrong)


def test_a_row_of_gpqa(tmp_path):
    (row,) = rows_of(tmp_path, "gpqa-diamond", GPQA)
    assert row["benchmark"] == "gpqa-diamond"
    assert row["id"] == "gpqa-diamond/0"
    letter = row["answer"]
    assert f"{letter}. right\n" in row["prompt"] + "\n"
    wrong = [f"\\boxed{{{other}}}" for other in "ABCD" if other != letter]
    check_answers(row, f"\\boxed{{{letter}}}", wrong)


def test_gpqa_options_are_shuffled_by_the_question_and_the_places_are_even(tmp_path):
    questions = [GPQA | {"Question": f"Which {i}?"} for i in range(400)]
    letters = [row["answer"] for row in rows_of(tmp_path, "gpqa-diamond", *questions)]
    for letter in "ABCD":
        assert 70 <= letters.count(letter) <= 130
    (alone,) = rows_of(tmp_path, "gpqa-diamond", questions[7])
    assert letters[7] == alone["answer"]


def test_supergpqa_is_a_sample_the_same_each_time(tmp_path):
    questions = []
    for i in range(300):
        questions.append({"question": f"Which {i}?", "options": ["a", "b"], "answer_letter": "A"})
    ids = [row["id"] for row in rows_of(tmp_path, "supergpqa", *questions)]
    assert len(set(ids)) == 200
    assert ids == [row["id"] for row in rows_of(tmp_path, "supergpqa", *questions)]


def test_hle_leaves_out_questions_with_an_image(tmp_path):
    questions = []
    for i in range(3):
        image = "data:image/png" if i == 1 else ""
        questions.append({"question": f"{i}?", "image": image, "answer": "x"})
    assert [row["id"] for row in rows_of(tmp_path, "hle", *questions)] == ["hle/0", "hle/2"]


def test_wrong_fields_and_names(tmp_path):
    with pytest.raises(UserError, match="mbpp row 0: KeyError"):
        rows_of(tmp_path, "mbpp", {"task": 1})
    with pytest.raises(UserError, match="not one of math500"):
        benchmarks.rows_of("mmlu", {})


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    evil = base64.b64encode(zlib.compress(pickle.dumps(Evil()))).decode()
    with pytest.raises(UserError, match="private tests need"):
        rows_of(tmp_path, "livecodebench-v6", LIVECODEBENCH_PROGRAM | {"private_test_cases": evil})
    assert not (tmp_path / "made").exists()
    plain = io.BytesIO(pickle.dumps({"a": [1, "b"]}))
    assert benchmarks.PlainUnpickler(plain).load() == {"a": [1, "b"]}


@pytest.mark.parametrize(
    "package, name",
    [("inspect_evals", "writingbench"), ("bfcl_eval", "bfcl"), ("if_verifiable", "ifeval")],
)
def test_a_package_that_is_not_there_is_named_in_one_line(package, name, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec

    def find_all_but_the_package(asked, *rest):
        return None if asked == package else find_spec(asked, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", find_all_but_the_package)
    with pytest.raises(UserError, match=f"pip install .*{package.replace('_', '-')}"):
        rows = rows_of(tmp_path, name, IFEVAL)
        rewards.check_rows(rows, "", "")


# ---------------- instructions ----------------


@pytest.fixture(scope="module")
def packages():
    """Skip the test if a package with checkers is not installed."""
    for package in ("if_verifiable", "bfcl_eval", "inspect_evals"):
        if importlib.util.find_spec(package) is None:  # not imported here: that takes seconds
            pytest.skip(f"needs the package {package}")


CONSTRAINTS = [  # (id, kwargs, a text that meets it, a text that does not)
    ("punctuation:no_comma", {}, "One two", "One, two"),
    ("keywords:existence", {"keywords": ["moon", "sun"]}, "Moon and sun", "Moon and stars"),
    ("keywords:forbidden_words", {"forbidden_words": ["moon"]}, "Sun", "The moon"),
    (
        "keywords:frequency",
        {"keyword": "sun", "frequency": 2, "relation": "at least"},
        "sun sun",
        "sun",
    ),
    (
        "keywords:letter_frequency",
        {"letter": "q", "let_frequency": 3, "let_relation": "less than"},
        "quick",
        "qqq",
    ),
    (
        "length_constraints:number_words",
        {"num_words": 3, "relation": "less than"},
        "one two",
        "one two three",
    ),
    (
        "length_constraints:number_paragraphs",
        {"num_paragraphs": 2},
        "a\n***\nb",
        "a\n***\nb\n***\nc",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 1}, "[name]", "name"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye\nP.S. more", "Bye"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Yes."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "*a*", "a"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', '{"a": 1'),
    ("detectable_format:title", {}, "<<Ode>>\nx", "Ode"),
    ("combination:two_responses", {}, "a\n******\nb", "a"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say it."}, "Say it. Done", "Done"),
    ("startend:end_checker", {"end_phrase": "the end"}, "So is the end", "the end or not"),
    ("startend:quotation", {}, '"all"', 'all"'),
    (
        "change_case:english_lowercase",
        {},
        "this is a quiet sentence",
        "This is a quiet sentence",
    ),
    ("change_case:english_capital", {}, "THIS IS A LOUD SENTENCE", "THIS is a LOUD SENTENCE"),
    (
        "language:response_language",
        {"language": "de"},
        "Das ist ein deutscher Satz und noch einer dazu",
        "This is an English sentence and one more",
    ),
    # these are IFBench's
    ("count:unique_word_count", {"N": 3}, "one two three four", "one one one one"),
    ("format:parentheses", {}, "(a [b {c (d [e])}])", "(a)"),
    ("custom:multiples", {}, "14, 21, 28, 35, 42, 49", "14, 21, 28, 35, 42, 50"),
    ("format:no_whitespace", {}, "onetwo", "one two"),
]


@pytest.mark.parametrize(
    "name, arguments, met, broken", CONSTRAINTS, ids=[case[0] for case in CONSTRAINTS]
)
def test_constraints_met_and_broken(packages, tmp_path, name, arguments, met, broken):
    # The data is padded: each constraint has the arguments of all, null if they are another's.
    padded = {"num_words": None, "keywords": None, "N": None} | arguments
    source = {
        "key": 1,
        "prompt": "Write.",
        "instruction_id_list": [name],
        "kwargs": [padded],
    }
    (row,) = rows_of(tmp_path, "ifeval", source)
    with_thoughts = [f"<think>{broken}</think>{met}", f"<think>{met}</think>{broken}"]
    assert rewards_of(row, met, broken, *with_thoughts) == [1.0, 0.0, 1.0, 0.0]


def test_all_constraints_of_a_row_count_and_ifbench_is_loose(packages, tmp_path):
    (strict,) = rows_of(tmp_path, "ifeval", IFEVAL)
    (loose,) = rows_of(tmp_path, "ifbench", IFEVAL)
    # These answers meet both constraints, only the second, only the first.
    answers = ["sun and sun", "sun and, sun", "sun"]
    assert rewards_of(strict, *answers) == [1.0, 0.0, 0.0]
    assert rewards_of(loose, *answers) == [1.0, 0.0, 0.0]

    # Loose checks also try the answer without its first line.
    with_preface = "Sure, here it is:\nsun and sun"
    assert rewards_of(strict, with_preface) == [0.0]
    assert rewards_of(loose, with_preface) == [1.0]

    unknown = copy.deepcopy(IFEVAL)
    unknown["instruction_id_list"][0] = "punctuation:no_semicolon"
    with pytest.raises(UserError, match="unknown constraint punctuation:no_semicolon"):
        rewards.check_rows(rows_of(tmp_path, "ifeval", unknown), "", "")


# ---------------- BFCL: the gold calls ----------------
# BFCL's possible answers are [{function: {argument: [alternative, …]}}, …]. An alternative "" means
# that the argument may be left out. Alternatives nest: a dict's values are lists of alternatives.


def gold_calls(row) -> list[dict]:
    """Calls with the first alternative of each argument.

    An argument is left out if its first alternative is "" and its function allows that.
    """
    calls = []
    for possible_call in row["possible"]:
        for name, possible_arguments in possible_call.items():
            arguments = gold_arguments(row, name, possible_arguments)
            calls.append({"name": name, "arguments": arguments})
    return calls


def gold_arguments(row, name: str, possible: dict) -> dict:
    """The arguments of one gold call. possible: argument → its alternatives."""
    schema = next(
        function["parameters"] for function in row["functions"] if function["name"] == name
    )
    required, properties = schema["required"], schema["properties"]
    alternatives = {}
    for key, options in possible.items():
        if key not in properties and "" in options:
            continue
        if key in required:  # the first alternative must not be "", if there is another
            options = sorted(options, key=lambda option: option == "")
        alternatives[key] = options
    arguments = first_alternatives(alternatives)
    for key, options in alternatives.items():
        if key in required and options in ([], [""]):
            arguments[key] = [] if options == [] else ""
    if row["language"] != "python":
        for key, value in arguments.items():
            arguments[key] = source_literal(value, properties[key], row["language"])
    return arguments


def first_alternatives(value):
    """The value with each list of alternatives, under a dict's key, replaced by its first."""
    if isinstance(value, list):
        return [first_alternatives(item) for item in value]
    if not isinstance(value, dict):
        return value
    first = {}
    for key, options in value.items():
        if not isinstance(options, list):
            first[key] = first_alternatives(options)
        elif options[:1] not in ([], [""]):
            first[key] = first_alternatives(options[0])
    return first


def source_literal(value, schema: dict, language: str) -> str:
    """The value in the source code of Java or JavaScript, as the prompt asks for."""
    kind = schema["type"]
    if isinstance(value, str):  # a text, or a variable's name
        return value
    if kind == "ArrayList":
        return java_list(value, schema, language)
    if kind == "Array":
        return f"new Object[]{{{', '.join(array_items(value, schema, language))}}}"
    if kind == "HashMap":
        puts = [f'put("{key}", {json.dumps(item)});' for key, item in value.items()]
        return f"new HashMap<>() {{{{ {' '.join(puts)} }}}}"
    if isinstance(value, bool) or kind in ("array", "dict"):
        return json.dumps(value)
    java_suffix = "f" if language == "java" else ""
    suffix = {"long": "L", "float": java_suffix, "Bigint": "n"}.get(kind, "")
    return f"{value}{suffix}"


def array_items(values, schema: dict, language: str) -> list[str]:
    """source_literal of each value, by the schema's type of items."""
    item_schema = {"type": schema.get("items", {}).get("type") or "any"}
    return [source_literal(value, item_schema, language) for value in values]


def java_list(values, schema: dict, language: str) -> str:
    """The source code of a Java ArrayList."""
    if not values:
        return "new ArrayList<>()"
    if schema.get("items", {}).get("type") in (None, "String"):
        items = [json.dumps(value) for value in values]
    else:
        items = array_items(values, schema, language)
    return f"new ArrayList<>(Arrays.asList({', '.join(items)}))"


# ---------------- BFCL: mutants of the gold calls ----------------


def change(value):
    """Another value of the same type; None if this function knows none."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value + 10**6
    if isinstance(value, str):
        return value + " and something else"
    if isinstance(value, list) and len(value) > 1:
        return value[:-1]
    if isinstance(value, list) and value:
        return [change(item) for item in value]
    return None


def mutants(row, calls) -> list[tuple[str, list[dict]]]:
    """(kind, wrong calls) made from the right calls.

    There is one call less, one more, another name, an argument that nobody asked for, or a changed
    value that is not among an argument's alternatives.
    """
    first, others = calls[0], calls[1:]
    arguments = first["arguments"]
    mutated = [
        ("dropped", calls[:-1]),
        ("doubled", calls + calls[-1:]),
        ("renamed", [first | {"name": first["name"] + "_"}] + others),
        ("invented", [first | {"arguments": arguments | {"nobody_asked": 1}}] + others),
    ]
    if row["language"] != "python":
        return mutated
    possible = row["possible"][0][first["name"]]
    for key, value in arguments.items():
        new_value = change(value)
        if new_value is not None and new_value not in possible[key]:
            new_call = first | {"arguments": arguments | {key: new_value}}
            mutated.append(("argument", [new_call] + others))
    return mutated


# BFCL's own checker cannot accept the answers of these rows: they leave out what their schema
# requires, or name what it lacks.
CONTRADICTORY_ROWS = {
    "simple_java_36",
    "simple_java_64",
    "simple_java_65",
    "live_simple_106-63-0",
    "live_simple_112-68-0",
    "live_multiple_862-181-3",
    "live_multiple_964-207-0",
}
WITH_ANSWERS = [name for name in benchmarks.BFCL_CATEGORIES if "relevance" not in name]
WITHOUT_ANSWERS = [name for name in benchmarks.BFCL_CATEGORIES if "relevance" in name]


@functools.cache
def bfcl_rows(category: str) -> list[dict]:
    """The rows of one category; they are read only once."""
    return benchmarks.rows_of(f"bfcl-{category}", {})


def score_calls(rows, calls) -> list[float]:
    """A reward per row, of the response that makes these calls."""
    scores = rewards.score([json.dumps(call) for call in calls], rows, "lenient")
    return [score.reward for score in scores]


@pytest.mark.parametrize("category", WITHOUT_ANSWERS)
def test_bfcl_asks_for_no_call_where_no_function_fits(packages, category):
    rows = bfcl_rows(category)
    one_call = []  # for each row
    for row in rows:
        name = row["functions"][0]["name"] if row["functions"] else "f"
        one_call.append([{"name": name, "arguments": {}}])
    no_call = [[] for _ in rows]
    reward_of_silence = float("irrelevance" in category)
    assert score_calls(rows, no_call) == [reward_of_silence] * len(rows)
    assert score_calls(rows, one_call) == [1 - reward_of_silence] * len(rows)


@pytest.mark.parametrize("category", WITH_ANSWERS)
def test_bfcl_finds_its_own_answers_right_and_every_mutant_wrong(packages, category):
    rows = bfcl_rows(category)
    gold = [gold_calls(row) for row in rows]
    refused = set()
    for row, reward in zip(rows, score_calls(rows, gold), strict=True):
        if reward != 1.0:
            refused.add(row["id"].split("/")[1])
    assert refused == {name for name in CONTRADICTORY_ROWS if name.startswith(category + "_")}

    mutated = []
    for row, calls in zip(rows, gold, strict=True):
        for kind, wrong_calls in mutants(row, calls):
            mutated.append((row, kind, wrong_calls))
    mutant_rewards = score_calls([row for row, _, _ in mutated], [calls for _, _, calls in mutated])
    accepted = []
    for (row, kind, calls), reward in zip(mutated, mutant_rewards, strict=True):
        if reward != 0.0:
            accepted.append((row["id"], kind, calls))
    assert not accepted, (len(accepted), len(mutated), accepted[:5])


def test_bfcl_counts(packages):
    counts = {category: len(bfcl_rows(category)) for category in benchmarks.BFCL_CATEGORIES}
    assert counts["simple_python"] == 400
    assert counts["multiple"] == counts["parallel"] == counts["parallel_multiple"] == 200
    assert counts["simple_java"] == 100
    assert counts["simple_javascript"] == 50
    assert counts["irrelevance"] == 240
    assert len(benchmarks.rows_of("bfcl", {})) == sum(counts.values())


# ---------------- WritingBench ----------------


def test_writingbench_is_the_same_200_tasks_each_time(packages):
    rows = benchmarks.rows_of("writingbench", {})
    assert len({row["id"] for row in rows}) == 200
    assert all(len(row["checklist"]) == 5 for row in rows)
    assert [row["id"] for row in rows] == [
        row["id"] for row in benchmarks.rows_of("writingbench", {})
    ]
    assert all(row["benchmark"] == "writingbench" for row in rows)


def test_writingbench_is_scored_by_a_critic_over_http(packages, server):  # noqa: F811
    rows = benchmarks.rows_of("writingbench", {})
    prompts, scores = [], iter("89788")

    def reply(prompt):
        prompts.append(prompt)
        return f'{{"score": {next(scores)}, "reason": "fine"}}'

    server.reply = reply
    (result,) = rewards.score(["A poem."], rows[:1], "lenient", judge_url=server.url)
    assert result.reward == pytest.approx(0.8)
    assert result.correct
    assert len(prompts) == 5
    for prompt in prompts:
        assert rows[0]["prompt"] in prompt
        assert "A poem." in prompt
        assert "Scoring Rules" in prompt
    for criterion in rows[0]["checklist"]:
        assert any(str(criterion) in prompt for prompt in prompts)

    for bad_reply in ("no idea", '{"score": 11}', '{"score": 0}'):
        server.reply = lambda prompt: bad_reply  # noqa: B023  (called in this round only)
        response = f"Another {bad_reply}."  # a new request, which no cached reply answers
        (result,) = rewards.score([response], rows[:1], "lenient", judge_url=server.url)
        assert result.reward is None
        assert "critic-error" in result.why
    with pytest.raises(UserError, match="--judge-url"):
        rewards.check_rows(rows, "", "")


# ---------------- eval.py on them ----------------


@pytest.fixture
def evaluate_sums(toy, tmp_path):
    """evaluate(name, *flags): the items of an evaluation of the toy on two benchmarks of sums."""
    problems = []
    for row in toy_rows():
        if row["domain"] == "math":
            problems.append({"problem": row["prompt"], "answer": row["answer"]})
    path = tmp_path / "math.jsonl"
    write_jsonl(path, problems[:20])
    common_flags = f"""
        --model toy --benchmarks math500 aime24 --source math500={path} aime24={path}
        --k 4 --pass-at 2 --temperature 0.6 --top-p 0.95 --threads 1 --max-prompt-tokens 24
    """.split()

    def evaluate(name, *flags):
        out = str(tmp_path / name)
        return evaluation.read_items(evaluation.main([*common_flags, "--out", out, *flags]))

    return evaluate


def test_avg_at_k_does_not_depend_on_batches_or_restarts(evaluate_sums, tmp_path, capsys):
    """The items stay the same with other batch sizes, and after a stop in the middle."""
    sample_before = sampler.sample
    items = evaluate_sums("whole")
    printed = capsys.readouterr().out
    for word in ("math500", "aime24", "Avg@4", "pass@2", "truncated"):
        assert word in printed
    assert evaluate_sums("small", "--batch-prompts", "3") == items
    assert evaluate_sums("other", "--rollout-tokens", "600") == items
    assert {item["group"] for item in items} == {"math500", "aime24"}
    assert len(items) == 40
    assert 0 < sum(item["accuracy"] for item in items) < 40
    assert sampler.sample is sample_before

    # What a kill leaves: seven items and the beginning of the eighth.
    small = tmp_path / "small"
    lines = (small / "items.jsonl").read_text().splitlines(True)
    (small / "items.jsonl").write_text("".join(lines[:7]) + lines[7][:50])
    assert evaluate_sums("small", "--batch-prompts", "5") == items
    assert "7 are done" in capsys.readouterr().out
    scores = (small / "scores.json").read_text()
    assert scores == (tmp_path / "whole" / "scores.json").read_text()
    assert (tmp_path / "whole" / "samples.txt").read_text().count("accuracy") == 10


def test_greedy_evaluation_has_one_response_per_prompt(evaluate_sums):
    items = evaluate_sums("greedy", "--temperature", "0", "--k", "1", "--pass-at", "1")
    assert len(items) == 40
    assert all(len(item["responses"]) == 1 for item in items)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--temperature", "0"], "greedy responses are all alike"),
        (["--source", "gpqa=x"], "--source gpqa"),
        (["--top-p", "0"], "--top-p 0"),
        (["--pass-at", "5"], "--pass-at 5"),
    ],
)
def test_wrong_flags_of_an_evaluation(evaluate_sums, flags, message, capsys):
    with pytest.raises(SystemExit):
        evaluate_sums("x", *flags)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "top_p, allowed",
    [
        (0.6, [False, True, True]),  # 0.5 does not reach 0.6; with 0.4 it does
        (0.49, [False, True, False]),
    ],
)
def test_nucleus_keeps_the_smallest_set_that_reaches_p(top_p, allowed):
    logits_BV = torch.tensor([[0.1, 0.5, 0.4]]).log().repeat(3, 1)  # by size: 1 (0.5), 2 (0.9), 0
    assert sampler.nucleus(logits_BV, 1.0, top_p).isfinite().tolist() == [allowed] * 3


def test_a_verifier_that_is_down_stops_the_evaluation_and_its_failures_are_asked_again(
    toy, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(servers, "BACKOFF_SECONDS", 0.0)
    flags = """
        --model toy --data toy --domains math --held-out 8 --k 4 --threads 1 --out
    """.split()
    honest_score = rewards.score
    outage = {"responses": 32}  # the verifier fails for the first 32 responses, which are all

    def score_with_failures(texts, rows, *rest, **options):
        scores = honest_score(texts, rows, *rest, **options)
        for i in range(min(outage["responses"], len(scores))):
            scores[i] = scores[i]._replace(reward=None, correct=None)
        return scores

    monkeypatch.setattr(rewards, "score", score_with_failures)
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="the verifier of math failed on all"):
        evaluation.main([*flags, out])
    assert evaluation.read_items(out) == []

    # First the first prompt's four responses fail; then it is asked again; then nothing is left.
    for responses, done, unscored in ((4, 0, 1), (0, 7, 0), (0, 8, 0)):
        outage["responses"] = responses
        items = evaluation.read_items(evaluation.main([*flags, out]))
        assert f"; {done} are done" in capsys.readouterr().out
        assert len(items) == 8
        without_score = [item["accuracy"] is None for item in items]
        assert without_score == [True] * unscored + [False] * (8 - unscored)

    monkeypatch.setattr(rewards, "score", honest_score)
    without_outage = evaluation.main([*flags, str(tmp_path / "without-outage")])
    assert evaluation.read_items(without_outage) == items


def test_a_benchmark_with_prompts_that_do_not_fit_is_refused(toy, tmp_path):
    rows_of(
        tmp_path,
        "math500",
        {"problem": "1+1=?", "answer": "2"},
        {"problem": "1+1=? " * 40, "answer": "2"},
    )
    flags = f"""
        --model toy --benchmarks math500 --source math500={tmp_path}/rows.jsonl
        --max-prompt-tokens 24 --max-new-tokens 18 --out {tmp_path / "out"}
    """.split()
    message = "1 prompts of benchmarks are longer than --max-prompt-tokens 24, such as math500/1"
    with pytest.raises(UserError, match=message):
        evaluation.main(flags)
