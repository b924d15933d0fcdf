"""The arguments of instruction constraints: which each has, and what each must be.

TYPES_OF: id → {argument: type}, of IFEval, IFBench, IFEvalG and the toy. A type is a function:
value → the value as the checker takes it; it raises ValueError that says what the value must be.
Every argument is required, because the official checkers draw a missing one at random.
"""

import re

from common.errors import UserError

# ---------------- types ----------------


def natural(value) -> int:
    """A whole number from 0 up. One that a data frame has made a float (3.0) is converted."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 0:  # True is an int, too
        raise ValueError("a whole number, 0 or more")
    return value


def positive(value) -> int:
    """A whole number from 1 up."""
    try:
        number = natural(value)
    except ValueError:
        number = 0
    if number < 1:
        raise ValueError("a whole number, 1 or more")
    return number


def text(value) -> str:
    """A text that is not blank: a blank one would stand in every response, or in none."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError("a text that is not blank")
    return value


def mark(value) -> str:
    """Any text."""
    if not isinstance(value, str):
        raise ValueError("a text")
    return value


def word(value) -> str:
    """A word. Some data sets write it as a list of one word."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return text(value).strip()


def pattern(value) -> str:
    """A regular expression that compiles, alone and inside a longer one."""
    try:
        expression = text(value).strip()
        re.compile(expression)
        re.compile(rf"\s?{expression}\b")
    except (ValueError, re.error, RecursionError, OverflowError) as error:
        reason = f" ({error})" if isinstance(error, re.error) else ""
        raise ValueError(f"a text that is a regular expression{reason}") from None
    return value


def patterns(value) -> list[str]:
    """A list of regular expressions, at least one."""
    if not isinstance(value, list) or not value:
        raise ValueError("a list of texts, at least one")
    try:
        return [pattern(entry) for entry in value]
    except ValueError as error:
        raise ValueError(f"a list, and each entry {error}") from None


def relation(value) -> str:
    """One of IFEval's two relations."""
    if value not in ("at least", "less than"):
        raise ValueError('"at least" or "less than"')
    return value


def letter(value) -> str:
    """One character."""
    if not isinstance(value, str) or len(value.strip()) != 1:
        raise ValueError("one letter or mark")
    return value.strip()


LANGUAGES = frozenset(
    "ar bg bn de en es fa fi fr gu he hi it ja kn ko ml mr ne pa pl pt ru sw ta te th uk ur "
    "vi".split()
)


def language(value) -> str:
    """The code of a language that IFEval knows."""
    if not isinstance(value, str) or value not in LANGUAGES:
        raise ValueError(f"one of {' '.join(sorted(LANGUAGES))}")
    return value


# ---------------- tables ----------------

IFEVAL = {
    "keywords:existence": {"keywords": patterns},
    "keywords:frequency": {"keyword": pattern, "frequency": natural, "relation": relation},
    "keywords:forbidden_words": {"forbidden_words": patterns},
    "keywords:letter_frequency": {
        "letter": letter,
        "let_frequency": natural,
        "let_relation": relation,
    },
    "language:response_language": {"language": language},
    "length_constraints:number_sentences": {"num_sentences": natural, "relation": relation},
    "length_constraints:number_paragraphs": {"num_paragraphs": natural},
    "length_constraints:number_words": {"num_words": natural, "relation": relation},
    "length_constraints:nth_paragraph_first_word": {
        "num_paragraphs": natural,
        "nth_paragraph": positive,
        "first_word": text,
    },
    "detectable_content:number_placeholders": {"num_placeholders": natural},
    "detectable_content:postscript": {"postscript_marker": pattern},
    "detectable_format:number_bullet_lists": {"num_bullets": natural},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": natural},
    "detectable_format:multiple_sections": {"section_spliter": pattern, "num_sections": natural},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": text},
    "startend:end_checker": {"end_phrase": text},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {
        "capital_frequency": natural,
        "capital_relation": relation,
    },
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
}

IFBENCH = {
    "count:word_count_range": {"min_words": natural, "max_words": natural},
    "count:unique_word_count": {"N": natural},
    "count:conjunctions": {"small_n": natural},
    "count:person_names": {"N": natural},
    "count:numbers": {"N": natural},
    "count:punctuation": {},
    "count:words_japanese": {"N": positive},
    "count:pronouns": {"N": natural},
    "count:keywords_multiple": {
        "keyword1": text,
        "keyword2": text,
        "keyword3": text,
        "keyword4": text,
        "keyword5": text,
    },
    "ratio:stop_words": {"percentage": natural},
    "ratio:sentence_type": {},
    "ratio:sentence_balance": {},
    "ratio:overlap": {"reference_text": text, "percentage": natural},
    "ratio:sentence_words": {},
    "words:alphabet": {},
    "words:vowel": {},
    "words:consonants": {},
    "words:palindrome": {},
    "words:prime_lengths": {},
    "words:start_verb": {},
    "words:repeats": {"small_n": natural},
    "words:odd_even_syllables": {},
    "words:last_first": {},
    "words:paragraph_last_first": {},
    "words:no_consecutive": {},
    "words:keywords_specific_position": {"keyword": text, "n": positive, "m": positive},
    "words:words_position": {"keyword": text},
    "sentence:alliteration_increment": {},
    "sentence:keyword": {"word": text, "N": positive},
    "sentence:increment": {"small_n": natural},
    "format:parentheses": {},
    "format:quotes": {},
    "format:options": {"options": text},
    "format:newline": {},
    "format:emoji": {},
    "format:line_indent": {},
    "format:quote_unquote": {},
    "format:list": {"sep": text},
    "format:thesis": {},
    "format:sub-bullets": {},
    "format:no_bullets_bullets": {},
    "format:title_case": {},
    "format:output_template": {},
    "format:no_whitespace": {},
    "custom:multiples": {},
    "custom:mcq_count_length": {},
    "custom:reverse_newline": {},
    "custom:word_reverse": {},
    "custom:character_reverse": {},
    "custom:sentence_alphabet": {},
    "custom:european_capitals_sort": {},
    "custom:csv_city": {},
    "custom:csv_special_character": {},
    "custom:csv_quotes": {},
    "custom:date_format_list": {},
    "repeat:repeat_change": {"prompt_to_repeat": text},
    "repeat:repeat_simple": {},
    "repeat:repeat_span": {"prompt_to_repeat": text, "n_start": natural, "n_end": positive},
}

# Those of Nemotron's blend that IFEval and IFBench lack: checkers.ifevalg.
IFEVALG = {
    "copy:repeat_phrase": {"phrase": text, "small_n": positive},
    "copy:copy": {"prompt_to_repeat": text},
    "copy:copying_simple": {"prompt_to_repeat": text},
    "copy:copying_multiple": {"prompt_to_repeat": text, "N": positive},
    "new:copy_span_idx": {"prompt_to_repeat": text, "n_start": natural, "n_end": natural},
    "detectable_format:sentence_hyphens": {},
    "detectable_format:square_brackets": {},
    "detectable_format:bigram_wrapping": {},
    "keywords:no_adjacent_consecutive": {},
    "keywords:word_once": {"keyword": pattern},
    "keywords:word_count_different_numbers": {
        "keyword": pattern,
        "frequency": natural,
        "relation": relation,
    },
    "keywords:exclude_word_harder": {"keyword": text},
    "keywords:palindrome": {},
    "keywords:keyword_specific_position": {"keyword": word, "n": positive, "m": positive},
    "keywords:start_end": {},
    "count:lowercase_counting": {"N": natural},
    "count:count_unique": {},
    "count:count_increment_word": {"keyword1": pattern, "keyword2": pattern},
    "count:counting_composition": {"n_sent": positive, "n_words": positive},
    "letters:letter_counting": {"N": natural, "relation": relation},
    "letters:letter_counting2": {
        "letter": letter,
        "let_frequency": natural,
        "let_relation": relation,
    },
    "paragraphs:paragraphs": {},
    "paragraphs:paragraphs2": {},
    "first_word:first_word_sent": {"first_word": word},
    "first_word:first_word_answer": {"first_word": word},
    "last_word:last_word_sent": {"last_word": word},
    "last_word:last_word_answer": {"last_word": word},
    "punctuation:punctuation_dot": {},
    "punctuation:punctuation_exclamation": {},
}

TOY = {"toy:say": {"word": text, "count": natural, "mark": mark}}

TYPES_OF = IFEVAL | IFBENCH | IFEVALG | TOY
# Arguments that a row may have although they change no verdict.
UNUSED = {"keywords:exclude_word_harder": ("instruction",)}


# ---------------- the arguments of a constraint ----------------


def arguments_of(constraint: dict) -> dict:
    """The arguments of a {"id", "kwargs"} with an id of TYPES_OF, as its checker takes them.

    Those that are null are padding, and left out. Raises UserError that names the argument.
    """
    written = constraint.get("kwargs") or {}
    if not isinstance(written, dict):
        raise UserError(f"kwargs is {written!r}; it must be an object")
    types = TYPES_OF[constraint["id"]]
    if not types and not written:
        return {}
    given = {name: value for name, value in written.items() if value is not None}
    for name in given.keys() - types.keys():
        if name not in UNUSED.get(constraint["id"], ()):
            known = ", ".join(types) or "none"
            raise UserError(f"it has no argument {name!r} (its arguments: {known})")
    arguments = {}
    for name, to_type in types.items():
        try:
            arguments[name] = to_type(given.get(name))
        except ValueError as error:
            place = f"{name} is {given[name]!r}" if name in given else f"{name} is missing"
            raise UserError(f"{place}; it must be {error}") from None
    return arguments
