"""Recipes: rows in the sources' own fields become ours, or are counted by reason; mixtures,
statistics, errors."""

import json
from collections import Counter

import pytest

import grpo
import rewards
from common.errors import UserError
from common.files import write_jsonl
from common.rows import check_row
from sources import recipes, stats
from sources.load import load_rows

GURU = {
    "data_source": "x",
    "ability": "math",
    "prompt": [{"role": "user", "content": "1+1? Put it in \\boxed{}."}],
    "apply_chat_template": True,
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {},
    "qwen2.5_7b_pass_rate": 0.5,
    "qwen3_30b_pass_rate": 1.0,
}
NO_PLACEHOLDERS = {"dapo": [], "skywork": []}


def guru(truth, rate=0.5, **extra):
    return GURU | {
        "reward_model": {"ground_truth": truth},
        "qwen2.5_7b_pass_rate": rate,
        "extra_info": extra,
    }


def nemotron(dataset, **fields):
    row = {
        "dataset": recipes.NEMOTRON_PREFIX + dataset,
        "responses_create_params": {"input": [{"role": "user", "content": "do it"}]},
    }
    return row | fields


def converted(converter, row, *rest):
    """The row through the converter and our own check."""
    return check_row({"id": "x"} | converter(row, *rest), "row")


# ---------------- converters ----------------


def test_guru_math():
    row = converted(recipes.guru_math, GURU)
    assert row == {
        "id": "x",
        "domain": "math",
        "prompt": GURU["prompt"],
        "answer": "2",
        "pass_rate": 0.5,
    }
    assert "pass_rate" not in converted(recipes.guru_math, guru("2", None))


def test_guru_code():
    program = converted(
        recipes.guru_code, guru(json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]}))
    )
    assert program["tests"] == {"inputs": ["1\n"], "outputs": ["2\n"]}

    asserts = "def check(f):\n    assert f(1) == 2\n\ncheck(Solution().up)"
    leetcode = converted(
        recipes.guru_code,
        guru(json.dumps({"functional": asserts}), prefix="from typing import *\n"),
    )
    solution = (
        "class Solution:\n    def up(self, x: int) -> Optional[int]:\n        return x + {}\n"
    )
    response = f"<think>x</think><answer>```python\n{solution}```</answer>"
    responses = [response.replace("{}", "1"), response.replace("{}", "2")]
    scores = rewards.score(responses, [leetcode] * 2)
    assert [score.reward for score in scores] == [1.0, -0.5]  # the prefix reaches the solution


def test_guru_stem():
    row = converted(recipes.guru_stem, guru("42 kg", question="How heavy?"))
    assert row["domain"] == "science"
    assert row["prompt"] == "How heavy?"
    assert row["answer"] == "42 kg"


def test_writing():
    story = {
        "prompt": "[WP] A door.",
        "chosen_story": "It opened.",
        "rejected_story": "No.",
        "chosen_upvotes": 3,
    }
    assert converted(recipes.litbench, story) == {
        "id": "x",
        "domain": "writing",
        "prompt": "A door.",
        "reference": "It opened.",
    }

    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "Write."},
        {"from": "gpt", "value": "Done."},
        {"from": "human", "value": "More"},
    ]
    row = converted(recipes.sharegpt, {"conversations": turns})
    assert (row["prompt"], row["reference"]) == ("Write.", "Done.")

    messages = [
        {"role": "user", "content": "Write."},
        {"role": "assistant", "content": "Done."},
    ]
    row = converted(recipes.wildchat, {"messages": messages})
    assert row["prompt"] == [{"role": "user", "content": "Write."}]
    assert row["reference"] == "Done."


def test_nemotron_science():
    source = nemotron("stem_mcqa", expected_answer="C", options=[{"A": "1"}, {"C": "3"}])
    row = converted(recipes.nemotron, source, NO_PLACEHOLDERS)
    assert row["domain"] == "science"
    assert row["answer"] == "C"


def test_nemotron_if():
    source = nemotron(
        "instruction_following",
        prompt="do it",
        instruction_id_list=["punctuation:no_comma", "keywords:existence"],
        kwargs=[None, {"keywords": ["a"], "num_words": None}],
    )
    row = converted(recipes.nemotron, source, NO_PLACEHOLDERS)
    assert row["constraints"] == [
        {"id": "punctuation:no_comma", "kwargs": {}},
        {"id": "keywords:existence", "kwargs": {"keywords": ["a"]}},
    ]


def test_nemotron_code():
    tests = {"inputs": ["1"], "outputs": ["2"]}
    source = nemotron("comp_coding_50tests", verifier_metadata={"unit_tests": tests})
    row = converted(recipes.nemotron, source, NO_PLACEHOLDERS)
    assert row["tests"] == tests


def test_nemotron_agent():
    calls = [{"name": "send", "arguments": '{"to": "a"}'}]
    source = nemotron("workbench", ground_truth=calls, category="c")
    source["responses_create_params"]["tools"] = [{"type": "function"}]
    row = converted(recipes.nemotron, source, NO_PLACEHOLDERS)
    assert row["gold_calls"] == [{"name": "send", "arguments": {"to": "a"}}]
    assert row["tools"] == [{"type": "function"}]


def test_nemotrons_other_data_sets_are_left_out():
    with pytest.raises(recipes.Skip, match="structured_outputs: not used"):
        recipes.nemotron(nemotron("structured_outputs", schema_str="{}"), NO_PLACEHOLDERS)


def test_nemotrons_math_rows_point_into_other_data_sets():
    dapo_prompt = "Solve this.\n\nWhat is 1+1?\n\nGive 2 lines.\n\nAnswer: $Answer"
    dapo_row = {"prompt": [{"content": dapo_prompt}], "reward_model": {"ground_truth": "2"}}
    skywork_row = {
        "prompt": [{"content": "What is 2+2?"}],
        "reward_model": {"ground_truth": '["4", "four"]'},
    }
    placeholders = {"dapo": [{}, dapo_row], "skywork": [skywork_row]}

    template = {"prefix": "Q: ", "suffix": " A:"}
    source = nemotron("dapo17k", _hf_placeholder={"row": 1, "question_template": template})
    row = converted(recipes.nemotron, source, placeholders)
    assert row["prompt"] == "Q: What is 1+1?\n\nGive 2 lines. A:"
    assert row["answer"] == "2"
    assert row["domain"] == "math"

    template = "Do: {question} !"
    source = nemotron("skywork_no_omni", _hf_placeholder={"row": 0, "question_template": template})
    row = converted(recipes.nemotron, source, placeholders)
    assert row["prompt"] == "Do: What is 2+2? !"
    assert row["answer"] == "4"


def test_what_does_not_convert_is_counted_by_reason():
    without_answer = {name: value for name, value in GURU.items() if name != "reward_model"}
    rows = [
        GURU,
        {**GURU, "prompt": []},
        without_answer,
        {**GURU, "prompt": None},
        guru(" "),
        guru("7", 1.5),
    ]
    skipped = Counter()
    good_rows = recipes.convert("guru-math", rows, recipes.guru_math, skipped)
    assert [row["id"] for row in good_rows] == ["guru-math/0"]
    assert sum(skipped.values()) == 5
    assert skipped["guru-math: prompt is empty"] == 2
    assert skipped["guru-math: field 'reward_model' is missing"] == 1
    assert skipped["guru-math: ground_truth is empty"] == 1
    assert any("pass_rate" in reason for reason in skipped)

    bad_rows = [guru("not JSON"), guru('{"inputs": ["1"], "outputs": []}')]
    assert recipes.convert("guru-code", bad_rows, recipes.guru_code, skipped) == []


# ---------------- mixtures ----------------


@pytest.fixture(scope="module")
def source_flags(tmp_path_factory):
    """--source flags for every data set of the CGPO recipe, in small."""
    folder = tmp_path_factory.mktemp("sources")
    answer = {"role": "assistant", "content": "a"}
    rows = {
        "guru-math": [guru(str(i), i / 8000) for i in range(8000)],
        "guru-code": [
            guru(json.dumps({"inputs": ["1"], "outputs": [str(i)]}), i / 4000) for i in range(4000)
        ],
        "guru-stem": [guru("x", question=f"q{i}") for i in range(5)],
        "sharegpt": [{"conversations": []}],
        "litbench": [{"prompt": f"[WP] p{i}", "chosen_story": "s"} for i in range(2100)],
        "wildchat": [
            {"messages": [{"role": "user", "content": f"w{i}"}, answer]} for i in range(3)
        ],
    }
    flags = ["--source"]
    for name, source_rows in rows.items():
        write_jsonl(folder / f"{name}.jsonl", source_rows)
        flags.append(f"{name}={folder / name}.jsonl")
    return flags


def test_the_cgpo_recipe_takes_the_papers_shares_and_says_what_differs(
    source_flags, tmp_path, capsys
):
    out = str(tmp_path / "out.jsonl")
    recipes.main(["cgpo", *source_flags, "--any-count", "--out", out])
    printed = capsys.readouterr().out
    rows = load_rows([out])

    math = [row for row in rows if row["domain"] == "math"]
    easy, hard = math[:5000], math[5000:]
    assert len(hard) == 1250
    assert min(row["pass_rate"] for row in easy) > max(row["pass_rate"] for row in hard)
    assert len({row["id"] for row in math}) == 6250

    code_rates = [row["pass_rate"] for row in rows if row["domain"] == "code"]
    assert sum(rate >= 0.25 for rate in code_rates) == 3000
    assert sum(rate < 0.25 for rate in code_rates) == 949

    counts = {"math": 6250, "code": 3949, "science": 5, "writing": 2003}
    assert recipes.count_domains(rows) == counts
    assert "math         6250 rows\n" in printed
    assert "science         5 rows; the paper has 3591" in printed
    assert "left out       1  sharegpt: does not begin with" in printed

    with pytest.raises(UserError, match="already|exists"):
        recipes.main(["cgpo", *source_flags, "--out", out])
    with pytest.raises(UserError, match="rows where the paper has"):
        recipes.main(["cgpo", *source_flags, "--out", str(tmp_path / "other.jsonl")])
    assert not (tmp_path / "other.jsonl").exists()

    # another seed draws other rows
    flags = ["cgpo", *source_flags, "--any-count", "--domains", "math", "--seed", "1"]
    recipes.main([*flags, "--out", str(tmp_path / "math.jsonl")])
    other = load_rows([str(tmp_path / "math.jsonl")])
    assert len(other) == 6250
    assert {row["id"] for row in other} != {row["id"].replace("out/", "math/") for row in math}


@pytest.mark.parametrize(
    "flags, domains",
    [
        ([], ["math", "code", "science"]),
        (["--judge-url", "x"], ["math", "code", "science", "writing"]),
        (["--domains", "code"], ["code"]),
    ],
)
def test_a_real_model_without_data_gets_the_cgpo_recipe(flags, domains):
    args = grpo.parse_args(["--model", "Qwen2.5-7B-Instruct", *flags])
    assert (args.data, args.domains) == (["cgpo"], domains)


def test_a_recipe_is_read_once_and_then_from_runs(tiny_folder, tmp_path, monkeypatch, capsys):
    read_names = []

    def read_source(name, *rest):
        read_names.append(name)
        return [guru(str(i), 0.5, question=f"q{i}") for i in range(20)]

    monkeypatch.setattr(recipes, "read_source", read_source)
    monkeypatch.setattr(recipes, "RUNS", tmp_path)
    flags = f"""
        --model {tiny_folder("qwen2")} --engine hf --threads 1 --domains math science --steps 1
        --batch-prompts 4 --mini-batch-prompts 4 --group-size 2 --eval-prompts 2
        --max-prompt-tokens 100 --max-new-tokens 4
    """.split()
    grpo.main([*flags, "--out", str(tmp_path / "run")])
    printed = capsys.readouterr().out
    assert "science        20 rows; the paper has 3591" in printed
    assert "cgpo" in printed
    assert read_names == ["guru-math", "guru-stem"]

    grpo.main([*flags, "--out", str(tmp_path / "again")])
    assert len(read_names) == 2  # from runs/ now
    samples = (tmp_path / "run" / "samples.jsonl").read_text()
    assert samples == (tmp_path / "again" / "samples.jsonl").read_text()


def test_m2rl_reads_only_what_its_domains_need(tmp_path, capsys):
    blend = [
        nemotron("stem_mcqa", expected_answer="C", options=[]),
        nemotron("structured_outputs"),
        nemotron("workbench", ground_truth=[]),
    ]
    write_jsonl(tmp_path / "blend.jsonl", blend)
    source = f"nemotron={tmp_path / 'blend.jsonl'}"
    out = str(tmp_path / "o.jsonl")
    recipes.main(["m2rl", "--source", source, "--domains", "science", "--any-count", "--out", out])
    printed = capsys.readouterr().out
    assert "structured_outputs: not used by the paper" in printed
    assert "science         1 rows; the paper has 19670" in printed
    assert [row["domain"] for row in load_rows([out])] == ["science"]


# ---------------- statistics ----------------


def test_statistics_by_hand():
    rows = [
        {"id": "a", "domain": "math", "prompt": "one two three four five", "pass_rate": 0.5},
        {"id": "b", "domain": "math", "prompt": "one two three four five"},
        {"id": "c", "domain": "code", "prompt": "six"},
    ]
    benchmark = [
        {"id": "p", "prompt": "zero ONE, two three!"},
        {"id": "q", "prompt": "two one"},
    ]
    text = stats.stats(rows, {"bench": benchmark}, 3)
    overlap = "bench: 1 of 2 prompts share 3 words in a row with the rows, such as p"
    assert overlap in text
    math, code = (line.split() for line in text.splitlines()[1:3])
    # domain, rows, words: median, 95 %, longest, pass rates: known, mean, repeated prompts
    assert math == ["math", "2", "5", "5", "5", "1", "0.50", "1"]
    assert code == ["code", "1", "1", "1", "1", "0", "–", "0"]


# ---------------- errors ----------------


def test_a_file_that_is_not_json_is_named_with_its_line(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"a": 1}\nnot json\n')
    flags = [
        "--source",
        f"guru-math={bad}",
        "--domains",
        "math",
        "--out",
        str(tmp_path / "o.jsonl"),
    ]
    with pytest.raises(UserError, match="bad.jsonl line 2: not JSON"):
        recipes.main(["cgpo", *flags])


@pytest.mark.parametrize(
    "command, flags, message",
    [
        (recipes, ["cgpo"], "arguments are required: --out"),
        (recipes, ["cgpo", "--source", "x=y", "--out", "z"], "--source x"),
        (recipes, ["other"], "invalid choice"),
        (stats, [], "arguments are required: --data"),
    ],
)
def test_wrong_flags_end_in_one_line(command, flags, message, capsys):
    with pytest.raises(SystemExit):
        command.parse_args(flags)
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1
