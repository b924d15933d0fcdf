"""Rows → prompts → batches: files and other sources, held-out rows, prompts, mixes, curricula."""

import argparse
import codecs
import datetime
import gzip
import json
import re
from collections import Counter

import jinja2
import pytest

import data
import rewards
import sft
from common.errors import UserError
from common.rows import check_row
from sources.load import load_rows
from sources.packaged import gym_rows, humaneval_rows, split_tasks
from sources.toy import demonstrations, toy_rows, toy_tokenizer

GOOD = {"domain": "math", "prompt": "1+1", "answer": "2"}


def write(path, *rows) -> str:
    """A file of these rows; a row that is a text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines))
    return str(path)


# ---------------- files of rows ----------------


def test_files_and_folders_give_rows_with_unique_ids(tmp_path):
    a = write(tmp_path / "a.jsonl", {**GOOD, "id": "x"}, GOOD, "", GOOD)
    b = write(tmp_path / "b.jsonl", {**GOOD, "id": "x", "domain": "science"})
    assert [row["id"] for row in load_rows([a, b])] == ["a/x", "a/2", "a/4", "b/x"]
    assert load_rows([str(tmp_path)]) == load_rows([a, b])
    assert [row["id"] for row in load_rows([a, b], ["science"])] == ["b/x"]


def row_of(domain: str, **fields) -> dict:
    return {"domain": domain, "prompt": "?", **fields}


BAD_LINES = [
    ('{"domain": "math",', "not JSON"),
    ("[1]", "a row is a JSON object"),
    ({**GOOD, "domain": "maths"}, 'field "domain"'),
    (row_of("math"), 'field "answer"'),
    ({**GOOD, "prompt": ""}, 'field "prompt"'),
    ({**GOOD, "prompt": [{"role": "user"}]}, 'field "prompt"'),
    ({**GOOD, "prompt": [{"role": "user", "content": None}]}, ""),
    ({**GOOD, "prompt": "\ud800"}, 'field "prompt" holds half'),
    ({**GOOD, "answer": 2}, 'field "answer" must be a text'),
    ({**GOOD, "answer": " "}, 'field "answer" is empty'),
    ({**GOOD, "gym": "chain_sum"}, 'field "gym" needs'),
    ({**GOOD, "gym": {"task": "x", "size": 1}}, 'field "gym" needs'),
    (row_of("code", tests={"inputs": ["1"], "outputs": []}), 'field "tests"'),
    (row_of("code", tests={"inputs": [1], "outputs": [2]}), 'field "tests"'),
    (row_of("code", tests=5), 'field "tests"'),
    (row_of("writing"), 'field "reference"'),
    (row_of("if", constraints="x"), 'field "constraints" must be a list'),
    (row_of("agent"), 'field "gold_calls"'),
    (row_of("agent", gold_calls=[{"arguments": {}}]), 'field "gold_calls" needs a "name"'),
]


@pytest.mark.parametrize("line, fault", BAD_LINES)
def test_a_bad_line_names_file_line_and_field(tmp_path, line, fault):
    path = write(tmp_path / "rows.jsonl", *[GOOD] * 6, line, GOOD)
    with pytest.raises(UserError) as error:
        load_rows([path])
    message = f"{path} line 7: {fault}" if fault else f"{path} line 7"
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_hundred_malformed_lines_of_ten_thousand_are_each_named(tmp_path, capsys):
    kinds = [
        '{"domain": "math",',
        "[1]",
        "null",
        json.dumps({**GOOD, "domain": "maths"}),
        json.dumps({"domain": "math", "prompt": "?"}),
        "\x00",
    ]
    bad_lines = {number: kinds[number % 6] for number in range(37, 10_001, 100)}
    good_line = json.dumps(GOOD)
    path = tmp_path / "rows.jsonl"
    lines = [bad_lines.get(number, good_line) for number in range(1, 10_001)]
    path.write_text("".join(f"{line}\n" for line in lines))
    with pytest.raises(UserError, match=r"rows\.jsonl: 100 of 10000 lines are malformed"):
        load_rows([str(path)])
    named = []
    for message in capsys.readouterr().err.splitlines():
        named.append(int(re.search(r"rows\.jsonl line (\d+): ", message)[1]))
    assert named == sorted(bad_lines)

    path.write_text(f"{good_line}\n" * 9_900)
    assert len(load_rows([str(path)])) == 9_900


def test_other_bad_sources_are_one_line_errors(tmp_path):
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"domain": "\xff"}')
    empty_folder = tmp_path / "empty"
    empty_folder.mkdir()
    empty_file = write(tmp_path / "e.jsonl")
    same_ids = write(tmp_path / "same.jsonl", {**GOOD, "id": 1}, {**GOOD, "id": 1})
    for source, message in [
        ("nowhere", "no such file"),
        (empty_file, "no rows"),
        (str(empty_folder), "no .jsonl"),
        (str(latin), "not UTF-8"),
        (same_ids, "share the id"),
        ("gym:no_such_task", "no such task"),
    ]:
        with pytest.raises(UserError, match=message):
            load_rows([source])
    for domain, message in [("poetry", "not one of"), ("agent", "no row of this domain")]:
        with pytest.raises(UserError, match=message):
            load_rows(["toy"], [domain])


@pytest.mark.parametrize("rate", ["0.5", True, -0.1, 1.5, float("nan"), None])
def test_a_pass_rate_is_a_number_from_0_to_1(rate, tmp_path):
    bad = write(tmp_path / "a.jsonl", {**GOOD, "pass_rate": rate})
    with pytest.raises(UserError, match='line 1: field "pass_rate"'):
        load_rows([bad])
    good = write(tmp_path / "b.jsonl", {**GOOD, "pass_rate": 1})
    assert load_rows([good])[0]["pass_rate"] == 1


# ---------------- packaged rows and the toy ----------------


def test_humaneval_and_gym_rows_are_real_and_valid():
    gym = gym_rows(["chain_sum", "syllogism", "bf"], seed=3, size=4)
    rows = humaneval_rows() + gym
    assert all(check_row(row, "here") for row in rows)
    assert Counter(row["domain"] for row in rows) == {"code": 168, "math": 4, "science": 4}
    assert gym_rows(["chain_sum"], seed=3, size=4) == rows[164:168]
    assert gym_rows(["chain_sum"], seed=4, size=4) != rows[164:168]
    assert "from typing import List" in rows[0]["prompt"]


def test_toy_demonstrations_mix_habits_and_good_responses():
    rows = demonstrations(7000, seed=0)
    assert Counter(row["domain"] for row in rows)["math"] == 3000
    for domain in ("code", "writing"):
        good = sum(row["response"] == row["good"] for row in rows if row["domain"] == domain)
        assert 0.25 < good / 1000 < 0.42
    scores = rewards.score([row["response"] for row in rows], rows)
    invalid = sum(not score.valid for score in scores)
    assert 0.06 < invalid / 7000 < 0.11
    for score, row in zip(scores, rows, strict=True):
        if row["response"] == row["good"]:
            assert score.correct
    assert max(row["prompt"].count(" ") for row in rows) < 8


# ---------------- held-out rows ----------------


def ids_of(rows: list[dict]) -> set[str]:
    return {row["id"] for row in rows}


def prompts_of(rows: list[dict]) -> list[str]:
    return [row["prompt"] for row in rows]


def test_held_out_rows_are_disjoint_and_the_same_for_every_seed():
    training, held_out = data.hold_out(toy_rows(), 40)
    assert not ids_of(training) & ids_of(held_out)
    assert len(training) + len(held_out) == len(toy_rows())
    counts = Counter(row["domain"] for row in held_out)
    assert counts == {"math": 40, "code": 40, "science": 12, "writing": 40, "if": 40}

    repeated = []  # 10 prompts, each 10 times
    for i in range(100):
        repeated.append({"id": str(i), "domain": "math", "prompt": f"prompt {i % 10}"})
    training, held_out = data.hold_out(repeated, 40)
    assert len(held_out) == 2
    assert len(training) == 80
    assert not set(prompts_of(training)) & set(prompts_of(held_out))


def test_held_out_prompts_do_not_depend_on_the_files_name(tmp_path):
    rows = [{**GOOD, "prompt": f"{i}+1"} for i in range(40)]
    (tmp_path / "other").mkdir()
    held_out = []
    for name in ("a.jsonl", "other/b.jsonl"):
        path = write(tmp_path / name, *rows)
        held_out.append(prompts_of(data.hold_out(load_rows([path]), 5)[1]))
    assert held_out[0] == held_out[1]
    assert held_out[0] != sorted(prompts_of(rows))[:5]


def test_rows_that_are_passed_take_the_place_of_data_and_eval_data():
    args = argparse.Namespace(
        data=["nowhere"],
        eval_data=["nowhere"],
        domains=["math", "if"],
        eval_domains=["if"],
        verifier_url="",
        system_prompt="",
        date="",
        max_prompt_tokens=16,
        max_new_tokens=18,
    )
    training, held_out = data.hold_out(toy_rows(), 6)
    train_rows, eval_rows = data.train_and_eval_rows(
        args, toy_tokenizer(), rows=(training, held_out)
    )
    trained_on = [row["id"] for row in training if row["domain"] in ("math", "if")]
    assert [row["id"] for row in train_rows] == trained_on
    assert [row["id"] for row in eval_rows] == [
        row["id"] for row in held_out if row["domain"] == "if"
    ]
    assert all(row["ids"] for row in train_rows + eval_rows)


# ---------------- prompts ----------------


class Bytes:
    """A tokenizer of bytes whose template shows the messages as text."""

    eos_token_id = None
    chat_template = None

    def __call__(self, text, add_special_tokens=True):
        return argparse.Namespace(input_ids=list(text.encode()))

    def apply_chat_template(self, messages, tools, add_generation_prompt, **options):
        turns = "|".join(f"{message['role']}:{message['content']}" for message in messages)
        turn = f"|assistant:{self.chat_template}" if add_generation_prompt else ""
        return f"{turns}|{tools}{turn}"


class NoSystemRole(Bytes):
    """Refuses a system message, as Gemma's template does."""

    chat_template = "<think>\n"

    def apply_chat_template(self, messages, **options):
        if messages[0]["role"] == "system":
            raise jinja2.TemplateError("System role not supported")
        return super().apply_chat_template(messages, **options)


CHAT = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
PROMPT_ROWS = [
    {"id": "a", "domain": "writing", "prompt": "hello"},
    {"id": "b", "domain": "agent", "prompt": CHAT, "tools": [1]},
]


def encoded_texts(rows, tokenizer, system, limit=999) -> list[str]:
    encoded = data.encode_prompts(rows, tokenizer, system, limit)
    return [bytes(row["ids"]).decode() for row in encoded]


def test_without_a_chat_template_a_prompt_is_plain_text():
    tokenizer = Bytes()
    assert encoded_texts(PROMPT_ROWS, tokenizer, "") == ["hello", "be kind\n\nhi"]
    assert encoded_texts(PROMPT_ROWS, tokenizer, "think") == [
        "think\n\nhello\n\n",
        "think\n\nbe kind\n\nhi\n\n",
    ]


def test_a_chat_template_gets_the_system_prompt_and_the_tools():
    tokenizer = Bytes()
    tokenizer.chat_template = "<think>\n"
    assert encoded_texts(PROMPT_ROWS, tokenizer, "think") == [
        "system:think|user:hello|None|assistant:<think>\n",
        "system:be kind\n\nthink|user:hi|[1]|assistant:<think>\n",
    ]
    encoded = data.encode_prompts(PROMPT_ROWS, tokenizer, "", 999)
    assert {row["opened"] for row in encoded} == {"<think>\n"}


def test_a_template_without_a_system_role_gets_its_text_in_the_users_turn():
    assert encoded_texts(PROMPT_ROWS[:1], NoSystemRole(), "think") == [
        "user:think\n\nhello|None|assistant:<think>\n"
    ]


def with_template(template):
    """The toy's tokenizer with this chat template."""
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


DATED = "{{ strftime_now('%d %b %Y') }} {{ messages[0]['content'] }}"


def test_a_template_that_asks_for_the_date_gets_the_one_that_is_given():
    tokenizer = with_template(DATED)
    row = {"id": "a", "domain": "math", "prompt": "1+1="}
    today = datetime.date.today().strftime("%d %b %Y")
    assert data.chat_text(row, tokenizer, "", "2024-02-03") == "03 Feb 2024 1+1="
    assert data.chat_text(row, tokenizer, "") == f"{today} 1+1="


def test_several_templates_without_a_default_end_in_one_line():
    row = {"id": "a", "domain": "math", "prompt": "1+1="}
    named = {"rag": "{{ messages[0]['content'] }}", "plan": "plan"}
    with pytest.raises(UserError, match="refuses this prompt .*no default") as caught:
        data.chat_text(row, with_template(named), "")
    assert "\n" not in str(caught.value)
    named["default"] = "{{ messages[0]['content'] }}!"
    assert data.chat_text(row, with_template(named), "") == "1+1=!"


TURNS = (
    "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}[end]"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
OPENED_CASES = [
    ("[assistant]<think>", "<think>"),
    ("[assistant]<think>\n", "<think>\n"),
    ("[assistant]<think>\n\n</think>\n\n", "<think>\n\n</think>\n\n"),
    ("[assistant]", ""),
    ("[assistant]<think>Let me see", "<think>Let me see"),
    ("[assistant]<think>x</think><answer>", "<think>x</think><answer>"),
]


@pytest.mark.parametrize("end, opened", OPENED_CASES)
def test_what_the_prompt_has_begun_is_a_part_of_the_response(end, opened):
    tokenizer = Bytes()
    tokenizer.chat_template = end
    (row,) = data.encode_prompts([PROMPT_ROWS[0]], tokenizer, "", 999)
    assert row["opened"] == opened
    tokenizer.all_special_ids, tokenizer.added_tokens_decoder = [], {}
    tokenizer.decode = lambda ids: bytes(ids).decode()
    assert data.response_texts([row], [list(b"yes")], tokenizer) == [f"{opened}yes"]


@pytest.mark.parametrize("begun", ["<think>", "<think>\n", "<think>2", "so it is"])
@pytest.mark.parametrize("template", [TURNS, ""])
def test_a_last_message_of_the_assistant_is_continued(begun, template):
    messages = [{"role": "user", "content": "1 <think>?"}, {"role": "assistant", "content": begun}]
    row = {"id": "a", "domain": "math", "prompt": messages}
    tokenizer = with_template(template)
    (encoded,) = data.encode_prompts([row], tokenizer, "", 99)
    opened = encoded["opened"]
    assert opened.strip() == (begun.strip() if "<think>" in begun else "")
    assert data.response_texts([encoded], [[]], tokenizer) == [opened]
    if template:
        text = data.chat_text(row, tokenizer, "")
        assert text.rstrip() == f"[user]1 <think>?[end][assistant]{begun.strip()}"


def test_tags_that_the_request_speaks_of_are_not_the_responses():
    row = {"id": "a", "domain": "math", "prompt": "What is <think>?"}
    for template in (TURNS, ""):
        (encoded,) = data.encode_prompts([row], with_template(template), "Use <think>.", 99)
        assert encoded["opened"] == ""


@pytest.mark.parametrize("content", ["", "   "])
def test_a_prompt_without_a_word_is_refused(content):
    row = {**GOOD, "prompt": [{"role": "user", "content": content}]}
    with pytest.raises(UserError, match='field "prompt"'):
        check_row(row, "row")
    with pytest.raises(UserError, match="its prompt has no token"):
        data.encode_prompts([{**GOOD, "id": "a"}], with_template("{{ '' }}"), "", 99)


DEMONSTRATIONS = [
    ("<think>\nso</think>2", "", "<think>\nso</think>2"),
    ("<think>\nso</think>2", "<think>\n", "so</think>2"),
    ("<think>so</think>2", "<think>\n", "so</think>2"),
    ("<think>\nso</think>2", "<think>", "\nso</think>2"),
    ("<think></think>2", "<think>\n\n</think>\n\n", "2"),
    ("2", "<think>\n", "2"),
]


@pytest.mark.parametrize("response, opened, rest", DEMONSTRATIONS)
def test_a_demonstration_goes_on_where_its_prompt_ends(response, opened, rest):
    assert sft.without_opened(response, opened) == rest


def test_long_prompts_are_dropped_and_counted(capsys):
    tokenizer = Bytes()
    tokenizer.chat_template = ""  # as good as none
    assert encoded_texts(PROMPT_ROWS, tokenizer, "", limit=5) == ["hello"]
    message = "dropped 1 of 2 prompts longer than 5 tokens (agent 1)"
    assert message in capsys.readouterr().out
    with pytest.raises(UserError, match="--max-prompt-tokens 4"):
        encoded_texts(PROMPT_ROWS, tokenizer, "", limit=4)


SETTINGS = {
    "chain_sum": ["chain_sum"],
    "chain_sum,syllogism": ["chain_sum", "syllogism"],
    "chain_sum:min_terms=2,max_terms=3,syllogism": [
        "chain_sum:min_terms=2,max_terms=3",
        "syllogism",
    ],
    "gcd:max_value=9,lcm:max_value=8": ["gcd:max_value=9", "lcm:max_value=8"],
}


@pytest.mark.parametrize("text", SETTINGS)
def test_tasks_with_settings(text):
    assert split_tasks(text) == SETTINGS[text]


def test_settings_make_a_task_as_hard_as_they_say():
    source = "gym:chain_sum:min_terms=2,max_terms=2,min_digits=1,max_digits=1"
    rows = load_rows([source])[:20]
    for row in rows:
        assert len(re.findall(r"\d+", row["prompt"])) == 2, row["prompt"]
        check_row(row, "row")
    responses = [f"<think>sum</think><answer>{row['answer']}</answer>" for row in rows]
    assert all(score.correct for score in rewards.score(responses, rows))
    wrong = [response.replace("</answer>", "1</answer>") for response in responses]
    assert not any(score.correct for score in rewards.score(wrong, rows))


@pytest.mark.parametrize(
    "source, message",
    [
        ("gym:chain_sum:min_terms", "write the settings as chain_sum:name=value"),
        ("gym:chain_sum:terms=2", "reasoning-gym refuses it"),
        ("gym:chain_sum:min_terms=5,max_terms=2", "reasoning-gym refuses it"),
    ],
)
def test_wrong_settings_are_one_line(source, message):
    with pytest.raises(UserError, match=message) as caught:
        load_rows([source])
    assert "\n" not in str(caught.value)


# ---------------- batches ----------------


def make_rows(counts: dict[str, int], pass_rate=None) -> list[dict]:
    """`counts` rows per domain; pass_rate(domain, i) may be None, for a row without one."""
    rows = []
    for domain, count in counts.items():
        for i in range(count):
            row = {"id": f"{domain}{i}", "domain": domain}
            rate = pass_rate(domain, i) if pass_rate else None
            if rate is not None:
                row["pass_rate"] = rate
            rows.append(row)
    return rows


def domain_counts(rows: list[dict]) -> Counter:
    return Counter(row["domain"] for row in rows)


def flatten(batches: list[list[dict]]) -> list[dict]:
    return [row for batch in batches for row in batch]


def test_batches_keep_the_mix_and_are_a_function_of_the_seed():
    rows = make_rows({"math": 30, "code": 10})

    def first_batches(count, size, mix, seed=0):
        stream = data.batches(rows, size, data.domain_mix(rows, mix), seed)
        return [next(stream) for _ in range(count)]

    ten = first_batches(10, 8, "")
    assert ten == first_batches(10, 8, "")
    assert ten != first_batches(10, 8, "", seed=1)
    assert all(domain_counts(batch) == {"math": 6, "code": 2} for batch in ten)
    times_drawn = Counter(row["id"] for row in flatten(ten[:5]))
    assert times_drawn.most_common(1)[0][1] == 1  # an epoch repeats nothing
    for batch in first_batches(10, 8, "math=1,code=1"):
        assert domain_counts(batch[:4]) == {"math": 2, "code": 2}  # each mini-batch too
    odd_size = flatten(first_batches(30, 7, "math=2,code=1"))
    assert domain_counts(odd_size) == {"math": 140, "code": 70}
    assert domain_counts(first_batches(1, 8, "code=1")[0]).keys() == {"code"}


def test_a_domain_mix_is_checked():
    rows = make_rows({"math": 30, "code": 10})
    assert data.domain_mix(rows, "equal") == {"math": 0.5, "code": 0.5}
    for mix in ("math", "math=x", "math=-1", "science=1", "poetry=1"):
        with pytest.raises(UserError, match="--domain-mix"):
            data.domain_mix(rows, mix)


# ---------------- curricula ----------------


def scheduled(rows, curriculum="none", steps=12, size=5, mix="", seed=0) -> list[dict]:
    """The rows of a run, in order."""
    args = argparse.Namespace(curriculum=curriculum, batch_prompts=size, seed=seed)
    plan = data.schedule(rows, data.domain_mix(rows, mix), steps, args)
    assert [len(batch) for batch in plan] == [size] * steps
    return flatten(plan)


@pytest.mark.parametrize("curriculum", ["omni-thinker", "self-paced"])
@pytest.mark.parametrize("mix", ["", "equal"])
def test_a_curriculum_has_the_plain_runs_prompts_in_another_order(curriculum, mix):
    counts = {"math": 20, "agent": 5, "code": 30, "writing": 3, "science": 2}
    rows = make_rows(counts, pass_rate=lambda domain, i: i % 7 / 7)
    plain = scheduled(rows, mix=mix)
    ordered = scheduled(rows, curriculum, mix=mix)
    assert Counter(row["id"] for row in plain) == Counter(row["id"] for row in ordered)
    assert plain != ordered
    assert ordered == scheduled(rows, curriculum, mix=mix)  # a pure function
    assert ordered != scheduled(rows, curriculum, mix=mix, seed=1)


def test_omni_thinkers_stages_are_in_order_and_as_long_as_their_domains():
    rows = make_rows({"if": 6, "writing": 3, "math": 20, "science": 2, "agent": 5, "code": 24})
    ordered = scheduled(rows, "omni-thinker")  # 60 rows, 60 places: one epoch
    stages = {"code": 24, "math": 20, "science": 2, "writing": 3, "if": 6, "agent": 5}
    expected = []
    for domain, length in stages.items():
        expected += [domain] * length
    assert [row["domain"] for row in ordered] == expected
    assert len(ids_of(ordered)) == 60

    equal = scheduled(rows, "omni-thinker", mix="equal")
    expected = []
    for domain in ("code", "math", "science", "writing", "if", "agent"):
        expected += [domain] * 10
    assert [row["domain"] for row in equal] == expected


def test_self_paced_is_one_global_sort_and_spreads_rows_without_a_rate():
    def pass_rate(domain, i):
        return {"math": 1 - i / 40, "code": i / 30, "if": None}[domain]

    rows = make_rows({"math": 40, "code": 30, "if": 30}, pass_rate)
    ordered = scheduled(rows, "self-paced", steps=20)
    rates = [row["pass_rate"] for row in ordered if "pass_rate" in row]
    assert rates == sorted(rates, reverse=True)
    assert len(rates) == 70
    for start in (0, 25, 50, 75):
        unrated = domain_counts(ordered[start : start + 25])["if"]
        assert 3 <= unrated <= 13
    with pytest.raises(UserError, match="python eval.py --rated measures them"):
        scheduled(make_rows({"math": 60}), "self-paced")


# ---------------- files of rows: marks, compression, damage ----------------

LINE = json.dumps({"id": "a", "domain": "math", "prompt": "1 + 1?", "answer": "2"})


@pytest.mark.parametrize(
    "content",
    [
        codecs.BOM_UTF8 + LINE.encode(),
        gzip.compress(LINE.encode()),
        gzip.compress(codecs.BOM_UTF8 + LINE.encode()),
        f"\n{LINE}\r\n\n".encode(),
    ],
)
def test_marks_and_compression_are_read(tmp_path, content):
    (tmp_path / "rows.jsonl").write_bytes(content)
    (row,) = load_rows([str(tmp_path / "rows.jsonl")])
    assert row["id"] == "rows/a"
    assert row["answer"] == "2"


def test_a_folders_compressed_files_are_read(tmp_path):
    (tmp_path / "one.jsonl").write_text(LINE)
    (tmp_path / "two.jsonl.gz").write_bytes(gzip.compress(LINE.encode()))
    assert [row["id"] for row in load_rows([str(tmp_path)])] == ["one/a", "two/a"]


def with_field(text: str) -> bytes:
    """The line with one more field, as bytes of JSON."""
    return f"{LINE[:-1]}, {text}}}".encode()


@pytest.mark.parametrize(
    "content, message",
    [
        (gzip.compress(LINE.encode() * 1000)[:-20], "damaged, or no gzip file"),
        (b"\x1f\x8bnothing", "damaged, or no gzip file"),
        (with_field('"x": ' + "[" * 100_000 + "]" * 100_000), "line 1: .*nested too deeply"),
        (with_field('"x": ' + "9" * 5000), "line 1: .*more than 4300 digits"),
        (with_field(r'"response": "\ud800"'), 'field "response" holds half a surrogate'),
        (with_field(r'"x": [{"y": "\udfff"}]'), 'field "x" holds half a surrogate'),
        (with_field(r'"\udfff": 1'), "holds half a surrogate"),
        (with_field('"tools": 5'), 'field "tools" must be a list of objects'),
        (with_field('"tools": ["f"]'), 'field "tools" must be a list of objects'),
        (b"\xff\xfe" + LINE.encode("utf-16-le"), "not UTF-8 at byte 0"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_in_one_line(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_rows([str(tmp_path / "rows.jsonl")])
    assert "rows.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_one_name_are_told_apart_by_the_shortest_end_of_their_paths(tmp_path):
    sources = []
    for folder in ("x/a", "x/b", "y/b"):
        (tmp_path / folder).mkdir(parents=True)
        sources.append(tmp_path / folder / "train.jsonl")
    sources.append(tmp_path / "other.jsonl")
    for path in sources:
        path.write_text(LINE)
    ids = [row["id"] for row in load_rows([str(path) for path in sources])]
    assert ids == ["x/a/train/a", "x/b/train/a", "y/b/train/a", "other/a"]
    ids = [row["id"] for row in load_rows([str(path) for path in sources[:2]])]
    assert ids == ["a/train/a", "b/train/a"]
    with pytest.raises(UserError, match="share the id"):
        load_rows([str(sources[0])] * 2)


# ---------------- templates and tokenizers with habits ----------------

USERS_ALONE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% endif %}{% endfor %}"
)


def test_a_template_that_drops_the_system_prompt_is_named(capsys):
    tokenizer = toy_tokenizer()
    tokenizer.chat_template = USERS_ALONE
    rows = [{**GOOD, "id": "a"}, {**GOOD, "id": "b"}]
    data.encode_prompts(rows, tokenizer, "2 + 2", 64)
    assert "leaves out a part of 2 of 2 prompts" in capsys.readouterr().out
    data.encode_prompts(rows, tokenizer, "", 64)
    assert capsys.readouterr().out == ""


class EndsEveryText:
    """A tokenizer without a template, which appends two end tokens to every text."""

    chat_template = None
    eos_token_id = 0

    def __call__(self, text, add_special_tokens):
        return argparse.Namespace(input_ids=[*range(1, 1 + len(text)), 0, 0])


def test_the_end_token_of_a_prompt_without_a_template_is_cut_off():
    (row,) = data.encode_prompts([{**GOOD, "id": "a"}], EndsEveryText(), "", 64)
    assert row["ids"] == [1, 2, 3]
