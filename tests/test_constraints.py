"""Instruction constraints: what meets each, which arguments they take, and how long they may take.

The official checkers are if-verifiable's. Tests that need it are skipped where it is not installed.
"""

import importlib.util
import random
import subprocess
import sys
import time

import pytest

import rewards
from checkers import constraint_arguments, ifeval, ifevalg, patterns, sentences, third_party
from common.errors import UserError
from conftest import ROOT
from sources import recipes

needs_package = pytest.mark.skipif(
    importlib.util.find_spec("if_verifiable") is None, reason="needs the package if_verifiable"
)


def holds(name: str, kwargs: dict, text: str) -> bool | None:
    """The verdict on a constraint whose arguments are padded, as in real rows."""
    return ifeval.holds({"id": name, "kwargs": kwargs | {"unused": None}}, text)


def check(name: str, kwargs, by_package: bool = False) -> bool:
    """What check_constraint says of a constraint of row r."""
    return ifeval.check_constraint({"id": name, "kwargs": kwargs}, "r", by_package)


# ---------------- the constraints of IFEvalG, met and broken ----------------

PHRASE = {"phrase": "Time flies when having fun", "small_n": 2}
REPEAT = {"prompt_to_repeat": " Say hi. "}
CASES = [  # (id, kwargs, texts that meet it, texts that break it)
    (
        "copy:repeat_phrase",
        PHRASE,
        [
            "Time crawls when having fun, then Time flies when eating fun",
            "Time flies when having fun. Time flies while having fun.",  # the first is unchanged
        ],
        [
            "Time flies when having fun",
            "Time flies when having fun. Time flies when having fun.",  # so is the last one
            "Time flies while having fun. Time flies when having fun.",
            "Time crawls while having fun. Time flies when eating fun.",
            "Time crawls when having fun. Time flies when having much fun.",
            "Time crawls when having\nfun. Time flies when eating fun.",
        ],
    ),
    ("copy:copy", REPEAT, ["Say hi.", "  say HI.\n"], ["Say hi. Hi", "Say hi", '"Say hi."']),
    ("copy:copying_simple", REPEAT, ["SAY hi."], ["hi", "Say  hi."]),
    (
        "copy:copying_multiple",
        REPEAT | {"N": 2},
        ["Say hi.\n******\nsay hi.", "Say hi.******Say hi."],
        ["Say hi.", "Say hi.******Say hi.******", "Say hi.***Say hi.", "Say hi.******Hi."],
    ),
    (
        "new:copy_span_idx",
        {"prompt_to_repeat": "The quick fox", "n_start": 4, "n_end": 9},
        ["quick", " QUICK\n"],
        ["quick f", "uick", "The quick fox"],
    ),
    (
        "new:copy_span_idx",
        {"prompt_to_repeat": "The quick fox", "n_start": 0, "n_end": 4},
        ["the"],
        ["The q"],
    ),
    (
        "detectable_format:sentence_hyphens",
        {},
        ["One here.-Two there.", "One alone.", "Mr. Ray left.-He ran 3.5 miles!"],
        ["One here. Two there.", "One here. -Two there.", "A well-known fact."],
    ),
    (
        "detectable_format:square_brackets",
        {},
        ["[One] [two]", "[One]\n[two.]"],
        ["[One two]", "[One] two", "[One]."],
    ),
    (
        "detectable_format:bigram_wrapping",
        {},
        ["<<I am>> <<at home>>", "<<I am>> here", "alone", "<<I>> <<am>>"],
        ["<<I am", "I am", "<<I am>> <<at home"],
    ),
    (
        "keywords:no_adjacent_consecutive",
        {},
        ["apple cherry", "zebra apple", "Bear apple", "apple apple"],
        ["apple bear", "Apple bear", "cat Dog"],
    ),
    (
        "keywords:word_once",
        {"keyword": "sun"},
        ["The Sun is up", "Sunny"],
        ["moon", "sun sun", "sunny sun"],
    ),
    (
        "keywords:word_count_different_numbers",
        {"keyword": "sun", "frequency": 2, "relation": "at least"},
        ["sun SUN", "sunny sunset sun"],
        ["sun", "moon"],
    ),
    (
        "keywords:word_count_different_numbers",
        {"keyword": "sun", "frequency": 2, "relation": "less than"},
        ["sun", "moon"],
        ["sun SUN"],
    ),
    (
        "keywords:exclude_word_harder",
        {"keyword": "sun"},
        ["sun is up", "The Sun is up", "The sun.", "sunny"],
        ["The sun is up"],
    ),
    ("keywords:palindrome", {}, ["so level it is", "a word"], ["Level up", "no level."]),
    (
        "keywords:keyword_specific_position",
        {"keyword": "sun", "n": 2, "m": 3},
        ["Hi. See the sun.", "Hi! Well , sun", "Hi. Well, sun", "Dr. Ray left. See the sun."],
        ["Hi. The sun.", "Hi. See the Sun.", "See the sun.", "Hi. See, the sun."],
    ),
    (
        "keywords:start_end",
        {},
        ["Sun is a sun", "Stop. We must stop", "! so it is !"],
        ["Sun is a sun.", "sun", "The sun"],
    ),
    (
        "count:lowercase_counting",
        {"N": 2},
        ["one two THREE", "ONE", "Mixed One two", "a1 b2 c3 d4"],
        ["one two three", "it's so"],
    ),
    (
        "count:count_unique",
        {},
        ["One two three.", "One one", 'Say "yes"', "U.S. and UK"],
        ["one two one", "One. Two.", "a, b, c"],
    ),
    (
        "count:count_increment_word",
        {"keyword1": "sun", "keyword2": "sea"},
        ["sun sea Sea", "Sunny seasea"],
        ["sun sea", "sun sun sea sea", "sun sea sea sea", "sea sea"],
    ),
    (
        "count:counting_composition",
        {"n_sent": 2, "n_words": 3},
        ["I ran. I sat.\n***\nWe ran! We sat!\n***\nIs it? Go on."],
        [
            "I ran. I sat.\n***\nWe ran! We sat!",
            "I ran. I sat.\n***\nWe ran!\n***\nIs it? Go on.",
            "I ran. I sat.\n***\nWe all ran! We sat!\n***\nIs it? Go on.",
            "***I ran. I sat.\n***\nWe ran! We sat!\n***\nIs it? Go on.",
        ],
    ),
    (
        "letters:letter_counting",
        {"N": 4, "relation": "at least"},
        ["a, b, C, D", "words"],
        ["abc 123", "é é é é"],
    ),
    ("letters:letter_counting", {"N": 4, "relation": "less than"}, ["abc 123"], ["abcd"]),
    (
        "letters:letter_counting2",
        {"letter": "E", "let_frequency": 2, "let_relation": "less than"},
        ["e", "none"],
        ["eE", "see"],
    ),
    (
        "letters:letter_counting2",
        {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
        ["## a"],
        ["# a"],
    ),
    (
        "paragraphs:paragraphs",
        {},
        ["a\n***\nb", "***\na\n***\nb", "a***b***"],
        ["a", "a\n\nb", "a***b***c", "a******b"],
    ),
    (
        "paragraphs:paragraphs2",
        {},
        ["a\n\nb", "a\n\nb\nc", "a\n\n\nb"],
        ["a\nb", "a\n\nb\n\nc", "a\n\n\n\nb", "a\n***\nb"],
    ),
    (
        "first_word:first_word_sent",
        {"first_word": "the"},
        ["The sun is up. the sea is low!", "The U.S. sun."],
        ["The sun is up. A sea.", "Then it is.", "The sun. 'The' sea."],
    ),
    (
        "first_word:first_word_answer",
        {"first_word": "The"},
        ["the sun. A sea."],
        ["A sun", "The, a"],
    ),
    (
        "last_word:last_word_sent",
        {"last_word": "sun"},
        ["I see the sun. Is it a Sun?", "the (sun)."],
        ["I see the sun. It is.", "sunny sun a."],
    ),
    (
        "last_word:last_word_answer",
        {"last_word": "sun"},
        ["I see the sun", "It is. The *Sun*!!"],
        ["sun it is", "a sun !"],
    ),
    ("punctuation:punctuation_dot", {}, ["One! Two?"], ["One.", "3.5"]),
    ("punctuation:punctuation_exclamation", {}, ["One. Two?"], ["One!", "a != b"]),
]


@pytest.mark.parametrize("name, kwargs, met, broken", CASES, ids=[case[0] for case in CASES])
def test_what_meets_and_what_breaks_a_constraint(name, kwargs, met, broken):
    assert not check(name, kwargs)
    assert {text: holds(name, kwargs, text) for text in met} == dict.fromkeys(met, True)
    assert {text: holds(name, kwargs, text) for text in broken} == dict.fromkeys(broken, False)


@pytest.mark.parametrize("name, kwargs, met, broken", CASES, ids=[case[0] for case in CASES])
def test_an_empty_response_meets_nothing(name, kwargs, met, broken):
    assert [holds(name, kwargs, text) for text in ("", " \n\t")] == [False, False]


def test_the_cases_cover_the_table():
    assert {case[0] for case in CASES} == set(ifevalg.CONSTRAINTS)
    assert set(ifevalg.CONSTRAINTS) == set(constraint_arguments.IFEVALG)
    assert set(ifeval.CONSTRAINTS) <= set(constraint_arguments.TYPES_OF)


def test_constraints_on_sentences_and_capitals_need_no_data():
    sentences = {"num_sentences": 2, "relation": "at least"}
    assert holds("length_constraints:number_sentences", sentences, "Dr. Ray left. He ran.")
    assert not holds("length_constraints:number_sentences", sentences, "Dr. Ray left at 3.5 p.m.")
    capitals = {"capital_frequency": 2, "capital_relation": "less than"}
    assert holds("change_case:capital_word_frequency", capitals, "The BIG sun.")
    assert not holds("change_case:capital_word_frequency", capitals, "A BIG sun.")


# ---------------- arguments ----------------

WORDS = "length_constraints:number_words"
REFUSED = [  # (id, kwargs, what the error says)
    ("keywords:existence", {"keywords": ["sun", "a(b"]}, "keywords is .*regular expression"),
    ("keywords:existence", {"keywords": ["sun", 5]}, "keywords is .*text"),
    ("keywords:existence", {"keywords": ["sun", None]}, "keywords is .*text"),
    ("keywords:existence", {"keywords": []}, "keywords is .*at least one"),
    ("keywords:existence", {"keywords": "sun"}, "keywords is 'sun'; it must be a list"),
    ("keywords:existence", None, "keywords is missing"),
    ("keywords:forbidden_words", {"forbidden_words": ["[a"]}, "forbidden_words is "),
    ("keywords:forbidden_words", {"forbidden_words": [" "]}, "forbidden_words is "),
    ("keywords:frequency", {"keyword": "*", "frequency": 1, "relation": "at least"}, "keyword is "),
    ("keywords:frequency", {"keyword": "a", "relation": "at least"}, "frequency is missing"),
    (WORDS, {"num_words": 2.5, "relation": "at least"}, "num_words is 2.5; .*whole number"),
    (WORDS, {"num_words": "2", "relation": "at least"}, "num_words is '2'"),
    (WORDS, {"num_words": True, "relation": "at least"}, "num_words is True"),
    (WORDS, {"num_words": -1, "relation": "at least"}, "num_words is -1"),
    (WORDS, {"num_words": float("nan"), "relation": "at least"}, "num_words is nan"),
    (WORDS, {"num_words": float("inf"), "relation": "at least"}, "num_words is inf"),
    (WORDS, {"num_words": [2], "relation": "at least"}, "num_words is "),
    (WORDS, {"num_words": 2, "relation": "at most"}, "relation is 'at most'; .*less than"),
    (WORDS, {"num_words": 2, "relation": ["at least"]}, "relation is "),
    (WORDS, {"num_words": 2, "relation": None}, "relation is missing"),
    (WORDS, {"num_words": 2, "relation": "at least", "numwords": 3}, "no argument 'numwords'"),
    (WORDS, ["at least", 2], "kwargs is "),
    ("paragraphs:paragraphs", {"num_paragraphs": 3}, "no argument 'num_paragraphs'"),
    (
        "letters:letter_counting2",
        {"letter": "ab", "let_frequency": 1, "let_relation": "at least"},
        "letter is 'ab'",
    ),
    ("startend:end_checker", {"end_phrase": ""}, "end_phrase is ''"),
    ("combination:repeat_prompt", {}, "prompt_to_repeat is missing"),
    ("detectable_format:multiple_sections", {"num_sections": 2}, "section_spliter is missing"),
    ("detectable_content:postscript", {"postscript_marker": "P(S"}, "postscript_marker is "),
    ("copy:repeat_phrase", {"phrase": "a b", "small_n": 0}, "small_n is 0; .*1 or more"),
    ("copy:copying_multiple", {"prompt_to_repeat": "a"}, "N is missing"),
    ("keywords:word_once", {"keyword": "a("}, "keyword is "),
    ("keywords:keyword_specific_position", {"keyword": "a", "n": 0, "m": 1}, "n is 0"),
    ("first_word:first_word_sent", {"first_word": ["a", "b"]}, "first_word is "),
]
REFUSED_BY_PACKAGE = [
    ("language:response_language", {}, "language is missing"),
    ("language:response_language", {"language": "german"}, "language is 'german'; .* de "),
    ("count:unique_word_count", {}, "N is missing"),
    ("count:unique_word_count", {"N": "5"}, "N is '5'"),
    ("count:word_count_range", {"min_words": 3}, "max_words is missing"),
    ("sentence:keyword", {"word": "a"}, "N is missing"),
    ("format:list", {"sep": ""}, "sep is ''"),
    ("format:options", {"options": ["yes", "no"]}, "options is "),
    ("repeat:repeat_span", {"prompt_to_repeat": "a b", "n_start": 0, "n_end": 0}, "n_end is 0"),
    ("custom:multiples", {"N": 7}, "no argument 'N'"),
]


@pytest.mark.parametrize("name, kwargs, message", REFUSED)
def test_arguments_that_no_checker_takes_are_refused(name, kwargs, message):
    whole_message = f"^row r: constraint {name} cannot be checked .*{message}"
    with pytest.raises(UserError, match=whole_message) as error:
        check(name, kwargs)
    assert "\n" not in str(error.value)


@needs_package
@pytest.mark.parametrize("name, kwargs, message", REFUSED_BY_PACKAGE)
def test_arguments_that_the_package_would_draw_are_refused(name, kwargs, message):
    with pytest.raises(UserError, match=f"^row r: constraint {name} cannot .*{message}"):
        check(name, kwargs)
    row = {
        "id": "r",
        "domain": "if",
        "prompt": "?",
        "constraints": [{"id": name, "kwargs": kwargs}],
    }
    with pytest.raises(UserError, match=f"^row r: constraint {name} cannot .*{message}"):
        rewards.check_rows([row | {"checker": "constraints"}], "", "")


@pytest.mark.parametrize("constraint", ["x", 5, None, {}, {"id": None}, {"id": ["a"]}, {"id": 5}])
def test_what_is_no_constraint_is_refused(constraint):
    with pytest.raises(UserError, match="^row r: unknown constraint"):
        ifeval.check_constraint(constraint, "r", by_package=False)


def test_an_unknown_id_names_those_that_are_like_it():
    with pytest.raises(UserError, match="keywords:word; known are .*keywords:word_once") as error:
        check("keywords:word", {})
    assert "paragraphs:" not in str(error.value)
    with pytest.raises(UserError, match="unknown constraint a:b; ids begin with .*keywords"):
        check("a:b", {})


@pytest.mark.parametrize("name", sorted(constraint_arguments.TYPES_OF))
def test_every_number_may_be_a_whole_float_and_every_argument_is_required(name):
    types = constraint_arguments.TYPES_OF[name]
    kwargs = {argument: EXAMPLES[to_type] for argument, to_type in types.items()}
    numbers = (constraint_arguments.natural, constraint_arguments.positive)
    floats = {}
    for argument, value in kwargs.items():
        floats[argument] = float(value) if types[argument] in numbers else value
    arguments = constraint_arguments.arguments_of({"id": name, "kwargs": floats})
    assert arguments == kwargs
    assert [type(value) for value in arguments.values()] == [type(v) for v in kwargs.values()]
    for argument in kwargs:
        without = {other: value for other, value in kwargs.items() if other != argument}
        with pytest.raises(UserError, match=f"{argument} is missing"):
            constraint_arguments.arguments_of({"id": name, "kwargs": without})


EXAMPLES = {
    constraint_arguments.natural: 3,
    constraint_arguments.positive: 2,
    constraint_arguments.text: "then",
    constraint_arguments.mark: "-",
    constraint_arguments.word: "then",
    constraint_arguments.pattern: "sun",
    constraint_arguments.patterns: ["sun", "sea"],
    constraint_arguments.relation: "at least",
    constraint_arguments.letter: "e",
    constraint_arguments.language: "de",
}


def test_arguments_that_change_nothing():
    kwargs = {"keyword": "sun", "instruction": "Name the sun.", "N": None}
    assert holds("keywords:exclude_word_harder", kwargs, "the moon")
    assert holds("first_word:first_word_sent", {"first_word": ["the"]}, "The sun.")


# ---------------- time ----------------

SPECIAL = [
    *("[", "*", "<<", "<", "\n\n", "\n", "SECTION 1 ", '"', "'", ".", ". ", "a.", "A. ", "!"),
    *(" ", "`", "a", "- ", "***", "******", "P.S", "p. ", "then ", ">>", "\t", "{", "[", "1"),
    *("x-", "\n[", " \n", "<<a", "*a", "a. Then ", "U.S. He "),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ifeval.CONSTRAINTS))
def test_time_grows_with_the_text_alone(name):
    types = constraint_arguments.TYPES_OF[name]
    kwargs = {argument: EXAMPLES[to_type] for argument, to_type in types.items()}
    for special in SPECIAL:
        text = f"x{special * (100_000 // len(special))}x"
        start = time.process_time()
        assert holds(name, kwargs, text) in (True, False)
        assert time.process_time() - start < 8  # a square of 100,000 takes minutes


def test_an_expression_of_a_row_cannot_hang_the_run():
    constraint = {"id": "keywords:forbidden_words", "kwargs": {"forbidden_words": ["(a+)+b"]}}
    assert not ifeval.check_constraint(constraint, "r", by_package=False)
    assert ifeval.holds(constraint, "a" * 5000) is False  # nobody can say that it is absent
    assert ifeval.holds(constraint, "a b") is True


@pytest.mark.parametrize(
    "keyword, text, count",
    [
        ("C++", "I like C++", 1),
        ("what?", "what? wha", 2),
        ("(a|b)c", "ac bc", 2),
        ("a.b", "axb", 1),
    ],
)
def test_keywords_are_regular_expressions(keyword, text, count):
    assert patterns.count_matches(keyword, text) == count


def test_a_failure_of_the_machine_is_no_verdict(monkeypatch):
    monkeypatch.setattr(patterns, "ask_workers", lambda jobs: ["unknown: no time"])
    assert holds("keywords:word_once", {"keyword": "a+"}, "a") is None


# ---------------- the same verdicts as the official checkers ----------------

PIECES = [
    *("word", "Word", "sun", "the", "a", "b", "I", " ", " ", " ", " ", "\n", "\n\n", ".", ". "),
    *("! ", "? ", "...", '"', "'", ",", "-", "*", "**", "***", "******", "<<", ">>", "[", "]"),
    *("<", ">", "P.S.", "p. s.", "P.P.S", "Section 1", "SECTION 2", "1", "(", '{"a":1}', "```json"),
    *("```", "```JSON", "My answer is yes.", "- x", "* y", "Say hi", "U.S. ", "Dr. ", "3.5", "é"),
    *("\t", "\r\n", "  ", "then"),
]
NEED_DATA = ("length_constraints:number_sentences", "change_case:capital_word_frequency")


def random_text(generator: random.Random) -> str:
    """A text of the special pieces, not blank, without space around it.

    Some have two paragraphs, some stand in quotes.
    """
    count = generator.randint(1, 12)
    text = "".join(generator.choices(PIECES, k=count)).strip() or "a"
    return generator.choice([text, text, f"word, {text}\n\nthen {text}", f'"{text}"'])


def random_arguments(name: str, generator: random.Random) -> dict:
    """Arguments of IFEval's constraint that the official checker takes as they are."""
    choices = {
        constraint_arguments.natural: [0, 1, 2, 3],
        constraint_arguments.positive: [1],
        constraint_arguments.text: ["word", "Say hi", " the ", "then"],
        constraint_arguments.pattern: ["sun", "a", ".", " the", "Section"],
        constraint_arguments.patterns: [["sun"], ["a", "."], ["b", "the"]],
        constraint_arguments.relation: ["at least", "less than"],
        constraint_arguments.letter: ["a", "T", "s"],
    }
    types = constraint_arguments.TYPES_OF[name]
    kwargs = {argument: generator.choice(choices[types[argument]]) for argument in types}
    if name == "detectable_content:postscript":
        kwargs["postscript_marker"] = generator.choice(["P.S.", "P.P.S", "P.S"])
    if name == "length_constraints:nth_paragraph_first_word":
        kwargs |= {"num_paragraphs": 2, "nth_paragraph": generator.choice([1, 2])}
    return kwargs


# Without NLTK's data, which is downloaded, the official checkers of NEED_DATA do not run.
COMPARABLE = [name for name in ifeval.CONSTRAINTS if name in ifeval.IFEVAL.keys() - NEED_DATA]


@needs_package
@pytest.mark.parametrize("name", COMPARABLE)
def test_the_official_checker_says_the_same(name):
    generator = random.Random(name)
    verdicts = set()
    for _ in range(1500):
        constraint = {"id": name, "kwargs": random_arguments(name, generator)}
        text = random_text(generator)
        official = bool(third_party.if_checker(constraint).check_following(text))
        assert ifeval.holds(constraint, text) == official, (constraint, text)
        verdicts.add(official)
    assert verdicts == {True, False}


@needs_package
def test_the_table_of_arguments_holds_the_packages_ids():
    registry, _ = third_party.import_if_verifiable()
    assert set(registry) == set(ifeval.packaged_ids())


# ---------------- sentences and tokens ----------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Mr. Ray and Mrs. Ray met Dr. Lee.", ["Mr. Ray and Mrs. Ray met Dr. Lee."]),
        ("It costs 3.50 now. Good.", ["It costs 3.50 now.", "Good."]),
        ("J. R. Smith left. A. Hill too.", ["J. R. Smith left.", "A. Hill too."]),
        ('He said "Go." Then he left.', ['He said "Go".', "Then he left."]),
        ("Wait... what?", ["Wait...", "what?"]),
        ("See a.com or b.org today.", ["See a.com or b.org today."]),
        ("He has a Ph.D. in art.", ["He has a Ph.D. in art."]),
        ("In the U.S. He is new.", ["In the U.S.", "He is new."]),
        ("At Acme Inc. They sell.", ["At Acme Inc", "They sell."]),
        ("no mark\nat all", ["no mark at all"]),
        ("", []),
    ],
)
def test_sentences_by_ifevals_rules(text, expected):
    assert sentences.split_sentences(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ("Dr. Ray left at 3 p.m. on Nov. 5.", ["Dr. Ray left at 3 p.m. on Nov. 5."]),
        ("It is in the U.S. The sun is up.", ["It is in the U.S.", "The sun is up."]),
        ("J. Smith left. So did I. He ran.", ["J. Smith left.", "So did I.", "He ran."]),
        ('He said "Go." Then he left.', ['He said "Go."', "Then he left."]),
        ("(He left.) It rains.", ["(He left.)", "It rains."]),
        ("Wait... what? Yes!!! Ok", ["Wait... what?", "Yes!!!", "Ok"]),
        ("1. Buy tea.\n2. Sell it.", ["1.", "Buy tea.", "2.", "Sell it."]),
        ("It is 3.5 miles.", ["It is 3.5 miles."]),
        ("no mark\nat all", ["no mark\nat all"]),
        ("", []),
    ],
)
def test_sentences_by_punkt(text, expected):
    assert sentences.punkt_sentences(text) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("One, two. Three!", "One , two . Three !"),
        ("I don't; can't. We'll see.", "I do n't ; ca n't . We 'll see ."),
        ('Say "yes" (now).', "Say `` yes '' ( now ) ."),
        ("It costs $3.50, or 1,000 a day.", "It costs $ 3.50 , or 1,000 a day ."),
        ("Dr. Ray's dog--so big...", "Dr. Ray 's dog -- so big ..."),
        ("I cannot, gonna go", "I can not , gon na go"),
        ("well-known U.S. law", "well-known U.S. law"),
    ],
)
def test_tokens(text, expected):
    assert " ".join(sentences.tokenize(text)) == expected


def test_tokens_are_nltks():
    tokenizer = pytest.importorskip("nltk.tokenize").NLTKWordTokenizer()
    generator = random.Random(0)
    pieces = [*PIECES, "can't", "it's", "cannot", "we'll", "--", ":", ";", "1,000", "“", "”"]
    texts = []
    for _ in range(3000):
        texts.append(" ".join(generator.choices(pieces, k=6)).strip())
    different = [
        text for text in texts if sentences.tokens_of_sentence(text) != tokenizer.tokenize(text)
    ]
    assert len(different) <= 30, different[:5]  # odd neighbours, such as a quote behind a backtick


@needs_package
def test_sentences_are_the_packages():
    third_party.import_if_verifiable()
    from if_verifiable.ifeval.instructions_util import split_into_sentences

    generator = random.Random(0)
    pieces = [*PIECES, "Inc. ", "Ph.D.", "x.com", "He ", "J. ", "”", "1.2.3", "Mr."]
    for _ in range(3000):
        text = " ".join(generator.choices(pieces, k=8)).strip()
        text = text.replace("\t", " ")  # a tab before an initial becomes a space there
        assert sentences.split_sentences(text) == split_into_sentences(text), text


# ---------------- the package ----------------


def job(answer: str, *constraints: dict, mode: str = "strict") -> dict:
    """A job of third_party.if_met."""
    return {"answer": answer, "constraints": list(constraints), "mode": mode}


NO_COMMA = {"id": "punctuation:no_comma", "kwargs": None}
TWO_WORDS = {"id": WORDS, "kwargs": {"num_words": 2.0, "relation": "at least", "keywords": None}}


@needs_package
def test_the_first_constraint_that_is_broken_is_named():
    assert third_party.if_met(job("a b", NO_COMMA, TWO_WORDS)) == "right"
    assert third_party.if_met(job("a, b", NO_COMMA, TWO_WORDS)) == "violates punctuation:no_comma"
    assert third_party.if_met(job("a", NO_COMMA, TWO_WORDS)) == f"violates {WORDS}"
    assert third_party.if_met(job("a,", NO_COMMA, TWO_WORDS)) == "violates punctuation:no_comma"
    assert third_party.if_met(job(" ", NO_COMMA)) == "violates punctuation:no_comma"
    with_preface = "Sure, here:\na b"
    assert third_party.if_met(job(with_preface, NO_COMMA)) == "violates punctuation:no_comma"
    assert third_party.if_met(job(with_preface, NO_COMMA, TWO_WORDS, mode="loose")) == "right"


@needs_package
@pytest.mark.parametrize(
    "constraint, met, broken",
    [
        (
            {
                "id": "keywords:letter_frequency",
                "kwargs": {"letter": "#", "let_frequency": 2, "let_relation": "at least"},
            },
            "## a",
            "abcdefghijklmnopqrstuvwxyz" * 3,
        ),
        (
            {
                "id": "repeat:repeat_span",
                "kwargs": {"prompt_to_repeat": "one two three four", "n_start": 0, "n_end": 2},
            },
            "one two",
            "two three",
        ),
    ],
)
def test_the_package_takes_the_rows_arguments_and_draws_none(constraint, met, broken):
    for _ in range(20):
        assert third_party.if_met(job(met, constraint)) == "right"
        assert third_party.if_met(job(broken, constraint)) != "right"


@needs_package
def test_language_is_a_function_of_the_text():
    texts = ["yes", "ok la", "no no", "das ist", "Das ist ein Tag.", "una casa de", "a b c d e"]
    german = {"id": "language:response_language", "kwargs": {"language": "de"}}
    english = {"id": "change_case:english_lowercase", "kwargs": {}}
    verdicts = []
    for order in (texts, texts[::-1], texts[3:] + texts[:3]):
        verdict_of = {}
        for text in order:
            verdict_of[text] = [third_party.if_met(job(text, c)) for c in (german, english)]
        verdicts.append(verdict_of)
    assert verdicts[0] == verdicts[1] == verdicts[2]


@needs_package
def test_the_import_prints_nothing_and_downloads_nothing():
    code = (
        "import nltk, checkers.third_party as third_party\n"
        "nltk.download = lambda *names, **options: print('downloads', names)\n"
        "third_party.import_if_verifiable()\n"
        "nltk.download('x')\n"  # it is itself again
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (result.stdout, result.stderr) == ("downloads ('x',)\n", "")


def test_the_trainer_does_not_import_the_package():
    code = (
        "import sys, rewards\n"
        "constraints = [{'id': 'last_word:last_word_answer', 'kwargs': {'last_word': 'a'}}]\n"
        "row = {'id': 'r', 'domain': 'if', 'prompt': '?', 'constraints': constraints}\n"
        "print(rewards.score(['</think>b a'], [row], 'm2rl')[0].why)\n"
        "print('nltk' in sys.modules, 'if_verifiable' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert (result.stdout, result.stderr) == ("right\nFalse False\n", "")


@needs_package
def test_missing_data_is_named_before_sampling(monkeypatch):
    asked = []

    def ask_workers(jobs):
        asked.extend(jobs)
        return ["error: LookupError"] * len(jobs)

    monkeypatch.setattr(ifeval, "ask_workers", ask_workers)
    kwargs = {"keyword": "a", "n": 7, "m": 2}
    constraint = {"id": "words:keywords_specific_position", "kwargs": kwargs}
    with pytest.raises(UserError, match="^row r: words:.* needs NLTK's data: python -m nltk"):
        ifeval.try_packaged([("r", constraint)])
    assert asked[0]["answer"].count("answer.") == 7  # the checker looks for the data there


# ---------------- rows of the data set ----------------


def test_rows_of_the_blend_can_be_checked():
    source = {
        "dataset": "nano_v3_sft_profiled_instruction_following",
        "responses_create_params": {"input": [{"role": "user", "content": "Write."}]},
        "instruction_id_list": [
            "paragraphs:paragraphs",
            "detectable_format:title",
            "last_word:last_word_answer",
            "length_constraints:number_sentences",
        ],
        "kwargs": [
            {},
            None,
            {"last_word": "end", "N": None, "keyword": None},
            {"num_sentences": 2.0, "relation": "at least", "last_word": None},
        ],
    }
    row = {"id": "r", **recipes.nemotron(source, {})}
    rewards.check_rows([row], "", "")
    scores = rewards.score(
        ["</think><<Sun>> It is. So.\n***\nThe end", "</think><<Sun>> It is. So.\n***\nThe end. x"],
        [row, row],
        "m2rl",
    )
    assert [score.why for score in scores] == ["right", "violates last_word:last_word_answer"]


def test_a_row_without_constraints_is_left_out():
    with pytest.raises(recipes.Skip, match="instruction_id_list is empty"):
        recipes.nemotron_if({"instruction_id_list": [], "kwargs": []})
