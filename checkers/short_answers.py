r"""Is a short answer the reference? Numbers with units, short texts and, by options, letters.

    an option's letter   the answer names this option alone; its text may follow
    a number             integers must be equal, others within 1 %; units must not differ
    another text         the texts are equal up to case, articles, quotation marks, white space

An integer is written without a point or a power of ten. An answer may leave the unit out. If the
reference has none, the answer may have one, but not % (50 % is 0.5). "5 or 6", "5-6" and "2+3" are
no numbers. "About" and the usual words may stand around an answer: "The answer is 5 m."
"""

import functools
import re
import unicodedata
from fractions import Fraction
from typing import NamedTuple

from checkers.closed_numbers import Number, both, is_rational, read_number
from checkers.latex import LONGEST, bare, without_stop
from checkers.option_letters import option_of_response
from checkers.statements import statements_of
from checkers.unit_symbols import is_symbol, plain_signs, unit_factors

TOLERANCE = Fraction(1, 100)  # relative, for numbers that are no integers
LONGEST_QUANTITY = 400  # characters
LETTER = re.compile(r"\(?([A-Z])\)?\.?")


class Quantity(NamedTuple):
    """A number with its unit."""

    number: Number
    unit: dict[str, int]  # {symbol: power}
    is_integer: bool


def short_answer_equal(answer: str, reference: str, match: str | None = None) -> bool:
    """Is a short answer the reference? The head of the file has the rules.

    match="last-word" (a row's "match"): only the last word counts.
    """
    if len(answer) + len(reference) > LONGEST_KEPT:
        return compare(answer, reference, match)
    return compare_once(answer, reference, match)


def compare(answer: str, reference: str, match: str | None) -> bool:
    """short_answer_equal, without a memory."""
    if match == "last-word":
        return last_word(answer) == last_word(reference)
    letter = LETTER.fullmatch(reference.strip())
    if letter:
        alone = LETTER.fullmatch(answer.strip())
        chosen = alone[1] if alone else option_of_response(answer)
        return chosen == letter[1]
    expected = read_quantity(reference)
    if expected is None:
        return texts_equal(answer, reference)
    given = first_quantity(answer)
    return given is not None and quantities_equal(given, expected)


LONGEST_KEPT = 400  # characters of an answer and its reference whose verdict is kept
# Responses of a group often give the same answer.
compare_once = functools.lru_cache(maxsize=4096)(compare)


# ---------------- numbers ----------------

# What may stand before a number: "approximately", "x =", "\\Delta H =", "E deg_{cell} =", "pH".
LEAD = re.compile(
    r"(?:(?:approximately|approx\.?|about|around|roughly|circa|nearly)\b|~|\\approx\b|\\sim\b|="
    r"|(?:a\s)?pH(?:\sof)?\s(?=\s{0,3}[-+\d.])"
    r"|(?:(?:\\Delta|Δ)\s{0,3})?[A-Za-z]{1,3}(?:\s?deg\s{0,3})?(?:_\{?\w{1,9}\}?)?"
    r"\s{0,3}(?:=|\\approx\b))\s{0,3}",
    re.IGNORECASE,
)
# The number's part of a quantity; the unit begins at the first other letter.
NUMBER_PART = re.compile(
    r"(?:\\(?:frac|sqrt|pi|times|cdot|div|overline|ldots)(?![A-Za-z])|(?<=\d)[eE](?=[-+]?\d)|"
    r"[-\d.,\s+*/^(){}\\$€£¥])*"
)
# What may stand behind one: "5 m (approximately)", "5 in total".
TAIL = re.compile(
    r"\s\(?(?:approximately|approx|roughly|or so|in total|in all|altogether|total)\)?$",
    re.IGNORECASE,
)
TIMES = re.compile(r"(?<=\d)\s{0,3}[xX]\s{0,3}(?=10\s{0,3}\^)")
INTEGER = re.compile(r"[-+$€£¥(]{0,3}\s{0,3}\d[\d,]*\)?\s{0,3}")


def first_quantity(answer: str) -> Quantity | None:
    """The quantity that the answer is or, in a sentence, the one that it states."""
    quantity = read_quantity(answer)
    if quantity is not None or len(answer) <= 1:
        return quantity
    lines = "\n".join(bare(line) for line in answer[-LONGEST:].splitlines())
    for statement in statements_of(lines):
        quantity = read_quantity(statement)
        if quantity is not None:
            return quantity
    return None


def read_quantity(text: str) -> Quantity | None:
    """The number and unit that the whole text is; None if it is anything else."""
    if len(text) > LONGEST_QUANTITY:
        return None
    text = plain_signs(without_stop(bare(text)).strip("\"'“”"))
    for _ in range(2):  # "x = about 5"
        text = text[lead.end() :] if (lead := LEAD.match(text)) else text
    text = TIMES.sub(r"\\times ", TAIL.sub("", text))
    part, rest = divided(text)
    number = read_number(part)
    if number is None or not (number.final or not is_rational(number.value)):
        return None
    percent = re.match(r"\s{0,3}(?:%|percent\b|per cent\b)", rest)
    if percent:
        number, rest = number._replace(percent=True), rest[percent.end() :]
    unit = unit_factors(rest)
    if unit is None or number.unit:
        return None
    return Quantity(number, unit, INTEGER.fullmatch(part) is not None)


def divided(text: str) -> tuple[str, str]:
    """(number, unit) as texts. An operator at the number's end belongs to the unit."""
    end = NUMBER_PART.match(text).end()
    part = text[:end]
    trimmed = re.sub(r"(?:\\cdot|\\times|\\frac\{|[\s*/(\\{]){1,9}$", "", part)
    if trimmed.endswith("^"):
        return "", text
    return trimmed, text[len(trimmed) :]


def quantities_equal(given: Quantity, expected: Quantity) -> bool:
    """Are the units the same, and the numbers equal (within 1 % if the reference is no integer)?"""
    if not units_agree(given.unit, expected.unit):
        return False
    number, reference = given.number, expected.number
    if number.percent and not reference.percent:
        return close(number.value / 100, reference.value, expected.is_integer)
    if reference.percent and not number.percent:
        hundredth = reference.value / 100
        return close(number.value, hundredth, False) or close(
            number.value, reference.value, expected.is_integer
        )
    return close(number.value, reference.value, expected.is_integer)


def close(value, reference, is_integer: bool) -> bool:
    """Is the value the reference, or within TOLERANCE of it if that is no integer?"""
    if is_integer:
        return value == reference
    x, y = both(value, reference)
    return bool(abs(x - y) * TOLERANCE.denominator <= abs(y))


def units_agree(unit: dict[str, int], reference: dict[str, int]) -> bool:
    """Do the units not differ? If the reference has none: one word, or symbols."""
    if not unit or unit == reference:
        return True
    return not reference and (len(unit) == 1 or all(is_symbol(symbol) for symbol in unit))


# ---------------- texts ----------------

QUOTES = str.maketrans("", "", "\"'“”‘’«»{}_")
CHEMISTRY = re.compile(r"\\ce\b")
GREEK = re.compile(r"\\(alpha|beta|gamma|delta|epsilon|kappa|lambda|mu|sigma|omega)(?![A-Za-z])")
SAYS = re.compile(r"\banswer\b|^(?:it|this|that) is\b", re.IGNORECASE)


def texts_equal(answer: str, reference: str) -> bool:
    """Is the answer, or what it says the answer is, the same text?"""
    if len(answer) > LONGEST or len(reference) > LONGEST:
        return answer.strip() == reference.strip()
    expected = normalised(reference)
    if normalised(answer) == expected:
        return True
    if re.search(r"\d|[-+]$", bare(reference)) and formula(answer) == formula(reference):
        return True
    statements = statements_of(answer) if SAYS.search(answer) else []
    return normalised(statements[0]) == expected if statements else False


# In Fe^{3+}, sp^3 and 1s^2 2s^2, but not in H^2O
RAISED = re.compile(r"\^(?=\d{0,2}[-+]?(?:\s|$|[,.)]|\d[spdf]))")


def formula(text: str) -> str:
    """A chemical formula, a configuration or a ratio without marks: Fe^{3+} and Fe³⁺ as Fe3+.

    Case counts: CO is not Co.
    """
    text = CHEMISTRY.sub("", bare(text)).translate(str.maketrans("", "", "_{}"))
    return "".join(RAISED.sub("", without_stop(text)).split())


def normalised(text: str) -> str:
    """The text in small letters, without quotation marks, a leading article and surplus space."""
    text = GREEK.sub(greek_letter, CHEMISTRY.sub("", text))
    text = " ".join(bare(text).translate(QUOTES).lower().split()).strip(" .,;:!*")
    return re.sub(r"^(?:a|an|the) (?=\S)", "", text)


def greek_letter(match: re.Match) -> str:
    """The letter of a LaTeX command such as \\alpha."""
    return unicodedata.lookup(f"GREEK SMALL LETTER {match[1].replace('lambda', 'lamda').upper()}")


def last_word(text: str) -> list[str]:
    """The last word of a text, as a list of one; an empty list if there is none."""
    text = re.sub(r"\\(?:text|mathrm)\{([^{}]*)\}", r"\1", text.lower())
    return re.sub("[\"'“”‘’]", " ", text.strip(" .$\n\t*")).split()[-1:]
