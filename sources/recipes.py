"""Training mixtures: the CGPO paper's and the M2RL paper's public data sets, and generated prompts.

    python -m sources.recipes cgpo --out cgpo.jsonl
    python -m sources.recipes m2rl --out m2rl.jsonl
    python -m sources.recipes gym --tasks chain_sum syllogism --out gym.jsonl

cgpo  Guru's math, code and STEM rows, and three writing sets (CGPO paper, appendix C.1)
m2rl  five domains of Nemotron-3-Nano-RL-Training-Blend (M2RL paper, section 3.2)
gym   prompts that reasoning-gym generates, offline

The data sets come from the Hugging Face hub (pip install datasets), or from files:
--source guru-math=rows.jsonl. A converter turns a row of a source into a row of ours and does
nothing else. A row that cannot be converted is left out and counted by its reason.
"""

import json
import re
from collections import Counter
from pathlib import Path

from common import hub
from common.cli import Parser, add_flags, positive_int, run_main
from common.errors import UserError
from common.files import RUNS, check_output_file, write_jsonl
from common.keys import rng
from common.rows import DOMAINS, check_row, read_json_lines, read_rows
from sources.packaged import gym_domains, gym_rows

GURU = "LLM360/guru-RL-92k"
GURU_CODE_FILES = [
    "train/codegen__leetcode2k_1.3k.parquet",
    "train/codegen__livecodebench_440.parquet",
    "train/codegen__primeintellect_7.5k.parquet",
    "train/codegen__taco_8.8k.parquet",
]
# {name: (data set on the hub, arguments of datasets.load_dataset besides split="train")}
SOURCES = {
    "guru-math": (GURU, {"data_files": "train/math__combined_54.4k.parquet"}),
    "guru-code": (GURU, {"data_files": GURU_CODE_FILES}),
    "guru-stem": (GURU, {"data_files": "train/stem__web_3.6k.parquet"}),
    "litbench": ("SAA-Lab/LitBench-Train", {}),
    "sharegpt": (
        "Nitral-AI/Creative_Writing-ShareGPT",
        {"data_files": "Creative_Writing-ShareGPT.jsonl"},
    ),
    "wildchat": ("kevinshin/wildchat-creative-writing-3k-rft", {"name": "ranking-definitive"}),
    "nemotron": ("nvidia/Nemotron-3-Nano-RL-Training-Blend", {"data_files": "train.jsonl"}),
    "dapo": ("BytedTsinghua-SIA/DAPO-Math-17k", {}),
    "skywork": ("Skywork/Skywork-OR1-RL-Data", {"split": "math"}),
}


class Skip(Exception):
    """A row cannot be converted; the text is the reason."""


# ---------------- fields that several sources share ----------------


def text_of(value, field: str) -> str:
    """The value itself. Raises Skip if it is blank or is not a text."""
    if not isinstance(value, str) or not value.strip():
        raise Skip(f"{field} is empty")
    return value


def messages_of(messages, field: str) -> list[dict]:
    """The messages with their role and content alone. Raises Skip if one has no content."""
    if not messages:
        raise Skip(f"{field} is empty")
    return [
        {"role": message["role"], "content": text_of(message["content"], field)}
        for message in messages
    ]


def constraints_of(ids: list[str], arguments: list[dict | None] | None) -> list[dict]:
    """IFEval's two parallel lists as our constraints, without arguments that are null (padding)."""
    constraints = []
    for name, kwargs in zip(ids, arguments or [None] * len(ids), strict=True):
        present = {key: value for key, value in (kwargs or {}).items() if value is not None}
        constraints.append({"id": name, "kwargs": present})
    return constraints


# ---------------- Guru (CGPO's math, code, science) ----------------


def guru_fields(row: dict) -> dict:
    """The fields of all Guru rows: the prompt, and Qwen2.5-7B-Instruct's pass rate if known."""
    pass_rate = row.get("qwen2.5_7b_pass_rate")
    fields = {"prompt": messages_of(row["prompt"], "prompt")}
    if pass_rate is not None:
        fields["pass_rate"] = float(pass_rate)
    return fields


def guru_math(row: dict) -> dict:
    """The ground truth is the answer, sometimes as a number."""
    return {
        **guru_fields(row),
        "domain": "math",
        "answer": text_of(str(row["reward_model"]["ground_truth"]), "ground_truth"),
    }


def guru_code(row: dict) -> dict:
    """The tests are asserts ("functional", LeetCode's), or inputs and outputs of a program.

    LeetCode's rows have a prefix (imports) that both the solution and the asserts need.
    """
    truth = json.loads(row["reward_model"]["ground_truth"])
    if truth.get("functional"):
        extra = row.get("extra_info") or {}
        tests = {"asserts": truth["functional"], "setup": extra.get("prefix") or ""}
    else:
        tests = {"inputs": truth["inputs"], "outputs": truth["outputs"]}
    return {**guru_fields(row), "domain": "code", "tests": tests}


def guru_stem(row: dict) -> dict:
    """The prompt is the question alone, without a format, because the verifier reads it too."""
    extra = row.get("extra_info") or {}
    question = text_of(extra.get("question"), "extra_info.question")
    return {
        **guru_fields(row),
        "domain": "science",
        "prompt": question,
        "answer": text_of(str(row["reward_model"]["ground_truth"]), "ground_truth"),
    }


# ---------------- CGPO's three writing sets ----------------


def litbench(row: dict) -> dict:
    """A Reddit writing prompt without its tag [WP], and the story that readers preferred."""
    prompt = re.sub(r"^\s*\[\s*WP\s*\]\s*", "", text_of(row["prompt"], "prompt"))
    return {
        "domain": "writing",
        "prompt": text_of(prompt, "prompt"),
        "reference": text_of(row["chosen_story"], "chosen_story"),
    }


def sharegpt(row: dict) -> dict:
    """The first pair of turns."""
    turns = [turn for turn in row["conversations"] if turn["from"] in ("human", "gpt")]
    if [turn["from"] for turn in turns[:2]] != ["human", "gpt"]:
        raise Skip("does not begin with a human's and a gpt's turn")
    return {
        "domain": "writing",
        "prompt": text_of(turns[0]["value"], "human's turn"),
        "reference": text_of(turns[1]["value"], "gpt's turn"),
    }


def wildchat(row: dict) -> dict:
    """The assistant's last message is the reference; all messages before it are the prompt."""
    messages = messages_of(row["messages"], "messages")
    if messages[-1]["role"] != "assistant" or len(messages) < 2:
        raise Skip("does not end with an answer of the assistant")
    return {
        "domain": "writing",
        "prompt": messages[:-1],
        "reference": messages[-1]["content"],
    }


# ---------------- Nemotron's blend (M2RL) ----------------

NEMOTRON_PREFIX = "nano_v3_sft_profiled_"
NEMOTRON_DOMAINS = {  # {the blend's data set, without the prefix: our domain}
    "dapo17k": "math",
    "skywork_no_omni": "math",
    "stem_mcqa": "science",
    "instruction_following": "if",
    "comp_coding_50tests": "code",
    "workbench": "agent",
}


def nemotron(row: dict, placeholders: dict[str, list[dict]]) -> dict:
    """A row of the blend.

    placeholders: the rows of "dapo" and "skywork", to which the blend's math rows refer by number.
    """
    name = row["dataset"].removeprefix(NEMOTRON_PREFIX)
    if name not in NEMOTRON_DOMAINS:
        raise Skip(f"{name}: not used by the paper")
    domain = NEMOTRON_DOMAINS[name]
    if domain == "math":
        source = "dapo" if name == "dapo17k" else "skywork"
        return nemotron_math(row["_hf_placeholder"], placeholders[source])
    prompt = messages_of(row["responses_create_params"]["input"], "input")
    return {"domain": domain, "prompt": prompt, **NEMOTRON_FIELDS[domain](row)}


def nemotron_science(row: dict) -> dict:
    """A multiple-choice question: the right letter, and the options."""
    return {
        "answer": text_of(row["expected_answer"], "expected_answer"),
        "options": row["options"],
    }


def nemotron_if(row: dict) -> dict:
    """Constraints in IFEval's format. A row without any would pay for every response."""
    if not row["instruction_id_list"]:
        raise Skip("instruction_id_list is empty")
    return {"constraints": constraints_of(row["instruction_id_list"], row["kwargs"])}


def nemotron_code(row: dict) -> dict:
    """Tests of a program that reads stdin."""
    tests = row["verifier_metadata"]["unit_tests"]
    return {"tests": {"inputs": tests["inputs"], "outputs": tests["outputs"]}}


def nemotron_agent(row: dict) -> dict:
    """The arguments of a call are JSON inside JSON."""
    fields = {
        "gold_calls": [
            {"name": call["name"], "arguments": json.loads(call["arguments"])}
            for call in row["ground_truth"]
        ]
    }
    tools = row["responses_create_params"].get("tools")
    if tools:
        fields["tools"] = tools
    return fields


NEMOTRON_FIELDS = {  # {domain: function that returns the row's fields besides the prompt}
    "science": nemotron_science,
    "if": nemotron_if,
    "code": nemotron_code,
    "agent": nemotron_agent,
}


def nemotron_math(placeholder: dict, source: list[dict]) -> dict:
    """A math row of the blend: a template, and the number of a row of another data set (source).

    DAPO's own request for a format, which is the first and the last paragraph of its prompt, is
    replaced by the template's.
    """
    original = source[int(placeholder["row"])]
    question = original["prompt"][0]["content"]
    template = placeholder["question_template"]
    if isinstance(template, dict):  # DAPO's
        question = "\n\n".join(question.split("\n\n")[1:-1])
        prefix, suffix = template.get("prefix") or "", template.get("suffix") or ""
        prompt = f"{prefix}{text_of(question, 'question')}{suffix}"
    else:  # Skywork's
        if "{question}" not in template:
            raise Skip("question_template has no {question}")
        prompt = template.replace("{question}", question)
    answer = first_answer(original["reward_model"]["ground_truth"])
    return {"domain": "math", "prompt": prompt, "answer": text_of(str(answer), "ground_truth")}


def first_answer(ground_truth: str):
    """The first answer if the text is a JSON list of answers; otherwise the text itself."""
    try:
        decoded = json.loads(ground_truth)
    except json.JSONDecodeError:
        return ground_truth
    if isinstance(decoded, list) and decoded:
        return decoded[0]
    return ground_truth


# ---------------- rows of a source, converted ----------------


def read_source(name: str, files: dict[str, str], sources: dict = SOURCES):
    """Yield a source's rows, from its file if there is one, else from the hub.

    files: {name: .jsonl file}. sources: a table like SOURCES. Raises UserError.
    """
    if name in files:
        yield from read_json_lines(Path(files[name]), lambda row, number, where: row)
    else:
        yield from read_hub(name, *sources[name])


def read_hub(name: str, repository: str, options: dict):
    """Yield the rows of a data set on the hub.

    options: arguments of datasets.load_dataset. Raises UserError.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{name} is {repository} on the hub: pip install datasets, "
            f"or give --source {name}=FILE.jsonl"
        ) from None

    fault = hub.fault()
    if fault:
        datasets.config.HF_HUB_OFFLINE = True  # what the cache has is taken from there
    file_names = options.get("data_files")
    if not isinstance(file_names, list):
        file_names = [file_names]
    try:
        for file_name in file_names:  # one at a time, because their columns may differ in type
            arguments = {"split": "train"} | options
            if file_name:
                arguments["data_files"] = file_name
            yield from datasets.load_dataset(repository, **arguments)
    except Exception as error:  # the hub and the file's reader raise errors of many kinds
        reason = str(error).splitlines()[0] if str(error) else ""
        reason = fault or f"{type(error).__name__} {reason}"
        raise UserError(
            f"{name} ({repository}): {reason}; is the hub reachable? "
            f"--source {name}=FILE.jsonl (of sources.recipes and eval.py) reads a file instead"
        ) from error


def convert(name: str, rows, converter, skipped: Counter) -> list[dict]:
    """The rows that can be converted, with ids. The others are counted in `skipped` by reason."""
    converted = []
    for number, row in enumerate(rows):
        try:
            fields = {"id": f"{name}/{number}"} | converter(row)
            converted.append(check_row(fields, "row"))
        except Skip as reason:
            skipped[f"{name}: {reason}"] += 1
        except KeyError as error:
            skipped[f"{name}: field {error} is missing"] += 1
        except (UserError, TypeError, ValueError, IndexError, AttributeError) as error:
            skipped[f"{name}: {type(error).__name__} {str(error)[:80]}"] += 1
    return converted


def draw_rows(rows: list, count: int, *key) -> list:
    """`count` rows drawn at random by the key, in their old order; all rows if there are fewer."""
    drawn = rng(*key).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(drawn)]


# ---------------- recipes ----------------

CGPO_WRITING = {"litbench": litbench, "sharegpt": sharegpt, "wildchat": wildchat}


def pass_rate_or_lowest(row: dict) -> float:
    """The pass rate; a row without one counts as harder than all others."""
    return row.get("pass_rate", -1)


def cgpo(files: dict, domains: list[str], seed: int, skipped: Counter) -> list[dict]:
    """The CGPO paper's mixture (appendix C.1).

    math     the 5,000 easiest rows by Qwen2.5-7B-Instruct's pass rate, and 1,250 others
    code     all rows with a pass rate of at least 0.25 (the paper counts 3,791), and 949 others
    science  all rows of Guru's STEM part (3,591)
    writing  2,000 rows of each of three sets
    """

    def convert_source(name, converter):
        return convert(name, read_source(name, files), converter, skipped)

    rows = []
    if "math" in domains:
        math_rows = sorted(
            convert_source("guru-math", guru_math), key=pass_rate_or_lowest, reverse=True
        )
        rows += math_rows[:5000]
        rows += draw_rows(math_rows[5000:], 1250, seed, "guru-math")
    if "code" in domains:
        code_rows = convert_source("guru-code", guru_code)
        hard_rows = [row for row in code_rows if pass_rate_or_lowest(row) < 0.25]
        rows += [row for row in code_rows if pass_rate_or_lowest(row) >= 0.25]
        rows += draw_rows(hard_rows, 949, seed, "guru-code")
    if "science" in domains:
        rows += convert_source("guru-stem", guru_stem)
    if "writing" in domains:
        for name, converter in CGPO_WRITING.items():
            rows += draw_rows(convert_source(name, converter), 2000, seed, name)
    return rows


def m2rl(files: dict, domains: list[str], seed: int, skipped: Counter) -> list[dict]:
    """The blend's rows of our five domains (M2RL paper, section 3.2)."""
    placeholders = {"dapo": [], "skywork": []}
    if "math" in domains:
        for name in placeholders:
            placeholders[name] = list(read_source(name, files))

    def converter(row):
        return nemotron(row, placeholders)

    return convert("nemotron", blend_rows(files, domains), converter, skipped)


def blend_rows(files: dict, domains: list[str]):
    """Yield the blend's rows of these domains, and of data sets that have none, to be counted."""
    for row in read_source("nemotron", files):
        name = str(row.get("dataset")).removeprefix(NEMOTRON_PREFIX)
        if name not in NEMOTRON_DOMAINS or NEMOTRON_DOMAINS[name] in domains:
            yield row


RECIPES = {"cgpo": cgpo, "m2rl": m2rl}
PUBLISHED = {  # {recipe: {domain: number of rows in the paper}}
    "cgpo": {"math": 6250, "code": 4740, "science": 3591, "writing": 6000},
    "m2rl": {"math": 22056, "code": 19169, "science": 19670, "if": 16575, "agent": 10229},
}
# The default tasks of `gym`, from several categories.
GYM_TASKS = (
    "chain_sum simple_equations basic_arithmetic gcd lcm prime_factorization complex_arithmetic "
    "syllogism propositional_logic knights_knaves family_relationships number_sequence "
    "letter_counting word_sorting spell_backward string_manipulation base_conversion "
    "calendar_arithmetic count_primes binary_matrix"
).split()


def count_domains(rows: list[dict]) -> dict[str, int]:
    """{domain: number of rows}; domains without rows are left out."""
    counts = Counter(row["domain"] for row in rows)
    return {domain: counts[domain] for domain in DOMAINS if counts[domain]}


def build(
    recipe: str, files: dict, domains: list[str], seed: int, exact: bool = True
) -> list[dict]:
    """The recipe's rows. Prints their number per domain, and how many were left out and why.

    With `exact`, raises UserError if the paper has another number of rows.
    """
    published = {}
    for domain, number in PUBLISHED[recipe].items():
        if domain in domains:
            published[domain] = number
    skipped = Counter()
    rows = RECIPES[recipe](files, list(published), seed, skipped)
    counts = count_domains(rows)

    for reason, count in skipped.most_common():
        print(f"left out {count:7d}  {reason}")
    for domain, number in published.items():
        count = counts.get(domain, 0)
        remark = "" if count == number else f"; the paper has {number}"
        print(f"{domain:<10}{count:7d} rows{remark}")
    if exact and counts != published:
        raise UserError(
            f"{recipe}: {counts} rows where the paper has {published} (reasons above): "
            "--any-count takes them as they are"
        )
    return rows


def published_rows(recipe: str, domain: str, seed: int) -> list[dict]:
    """A recipe's rows of one domain; [] if the recipe does not have the domain.

    The first call takes them from the hub and keeps them in runs/. Raises UserError if no row could
    be converted.
    """
    if domain not in PUBLISHED[recipe]:
        return []
    path = RUNS / f"{recipe}-{domain}-{seed}.jsonl"
    if not path.exists():
        rows = build(recipe, {}, [domain], seed, exact=False)
        if not rows:
            raise UserError(
                f"--data {recipe}: no {domain} row could be converted "
                "(the reasons are listed above)"
            )
        RUNS.mkdir(exist_ok=True)
        write_jsonl(path, rows)
    return read_rows(path)


# ---------------- main ----------------


def parse_args(argv: list[str] | None = None):
    """The flags; --source becomes {name: file}. A wrong flag ends in parser.error."""
    parser = Parser(__doc__, "{cgpo,m2rl,gym} ")
    parser.add_argument("recipe", choices=[*RECIPES, "gym"], help="which mixture to write")
    parser.add_argument("--out", required=True, help="the .jsonl file to write")
    parser.add_argument(
        "--source",
        nargs="+",
        default=[],
        help=f"NAME=FILE.jsonl: read this file instead of the hub; names: {' '.join(SOURCES)}",
    )
    parser.add_argument(
        "--any-count",
        action="store_true",
        help="write the rows even if their number differs from the paper's",
    )
    parser.add_argument(
        "--tasks", nargs="+", default=GYM_TASKS, help="for gym: the tasks of reasoning-gym"
    )
    parser.add_argument(
        "--size", type=positive_int, default=500, help="for gym: number of prompts per task"
    )
    add_flags(parser, "--domains", "--seed")
    args = parser.parse_args(argv)
    args.source = parse_sources(parser, args.source)
    return args


def parse_sources(parser, pairs: list[str]) -> dict[str, str]:
    """{name: file} of --source's pairs NAME=FILE. A wrong pair ends in parser.error."""
    files = {}
    for pair in pairs:
        name, _, file = pair.partition("=")
        if name not in SOURCES or not file:
            parser.error(
                f"--source {name}: write NAME=FILE.jsonl, with a name of {' '.join(SOURCES)}"
            )
        files[name] = file
    return files


def main(argv: list[str] | None = None) -> None:
    """Write the mixture to --out. Raises UserError."""
    args = parse_args(argv)
    out = Path(args.out)
    check_output_file("--out", args.out, may_exist=False)

    domains = args.domains or list(DOMAINS)
    if args.recipe == "gym":
        domain_of = gym_domains(args.tasks)
        tasks = [task for task in args.tasks if domain_of[task] in domains]
        rows = gym_rows(tasks, args.seed, args.size)
    else:
        rows = build(args.recipe, args.source, domains, args.seed, exact=not args.any_count)
    if not rows:
        raise UserError(f"--out {out}: there is no row to write")

    write_jsonl(out, rows)
    counts = ", ".join(f"{domain} {count}" for domain, count in count_domains(rows).items())
    print(f"{out}: {len(rows)} rows ({counts})")


if __name__ == "__main__":
    run_main(main, "nothing was written")
