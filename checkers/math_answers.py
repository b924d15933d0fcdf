r"""Is an answer of the math domain the reference? All that needs no symbolic algebra.

The reference's kind decides what an answer must be:

    a number in a final form  5, 0.42, \frac{7}{3}, 10^6, 42\%: that number, in a final form too
    another closed number     3\sqrt{13}, 100!, e^{-20}: a number of the same value
    a number of another base  4210_5: the same digits; the base may be left out
    a ratio or a time         2:3, 6:30: the same numbers
    words                     Friday, (B): the same words, in any case
    a list of numbers         1, 2 or (3, \pi): the same numbers, in any order if no order is meant
    all else                  what symbolic algebra finds equal (checkers.third_party)

A final form is a number, a fraction, a mixed number, a root, a power, a·10^n or a percentage; a
unit may follow. An answer that still holds an operation, as 17·23, 5! or \gcd(12, 18), is the
question again where the reference is a number: it is wrong. (Here the rule departs from C.3, which
says "symbolic equivalence".) A closed equation, as 25 + 5 = 30, counts by its last side.

The whole answer must be the reference, not its tail. Around it may stand the usual words: "The
answer is 30." An answer that does not commit itself ("maybe 30") is wrong.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

from checkers.closed_numbers import Number, equal, is_rational, read_number
from checkers.latex import LONGEST, bare, squeezed, without_stop
from checkers.statements import is_hedged, statements_of

PLAIN = re.compile(r"[-+]?\d{1,40}(?:\.\d{1,40})?")


def equal_at_sight(answer: str, reference: str) -> bool | None:
    """Are the answer and the reference equal? None if that takes symbolic algebra."""
    answer, reference = answer.strip(), reference.strip()
    if answer == reference:
        return True
    if PLAIN.fullmatch(answer) and PLAIN.fullmatch(reference):
        return equal(read_number(answer), read_number(reference))
    if max(len(answer), len(reference)) <= LONGEST and squeezed(answer) == squeezed(reference):
        return True
    plain_reference = without_stop(bare(reference))
    for compare in COMPARISONS:
        verdict = compare(answer, plain_reference)
        if verdict is not None:
            return verdict
    return None if to_symbolic(answer, reference) else False


def readings(answer: str) -> list[str]:
    """The bare texts that may be what an answer says: all of it, then what it states."""
    whole = bare(answer) if len(answer) <= LONGEST else ""
    return [whole, *(bare(text) for text in statements_of(bare_lines(answer)))]


def bare_lines(text: str) -> str:
    """The end of a text, bare, with its lines kept apart."""
    return "\n".join(bare(line) for line in text[-LONGEST:].splitlines())


# ---------------- numbers ----------------

# "(B) 5": an option's letter before its text
OPTION = re.compile(r"^\(?([A-J])[).:]\s*(?=\S)")
EQUALS = re.compile(r"=|\bequals\b")
ABOUT = re.compile(r"\\approx|\\simeq")


def compare_numbers(answer: str, reference: str) -> bool | None:
    """If the reference is a closed number: is the answer the same?"""
    expected = read_number(reference)
    if expected is None:
        return None
    is_final = expected.final and is_rational(expected.value)
    for reading in readings(answer):
        numbers = numbers_of(reading)
        if numbers:
            return any(same_number(number, expected, is_final) for number in numbers)
    if is_final:
        return False
    return None


def same_number(number: Number, expected: Number, is_final: bool) -> bool:
    """Is it the expected number? is_final: it must be written in a final form."""
    if is_final and not number.final:
        return False
    return units_agree(number.unit, expected.unit) and equal(number, expected)


def units_agree(unit: str, expected: str) -> bool:
    """Could the units be the same? Only two different abbreviations are surely not."""
    short, expected_short = unit.strip(), expected.strip()
    if not re.fullmatch(r"[A-Za-z]{1,3}", short) or not re.fullmatch(r"[A-Za-z]{1,3}", expected):
        return True
    return short == expected_short


def numbers_of(text: str) -> list[Number]:
    """The number that a text is, or the two of a ≈ b; none if it is anything else.

    An equation is its last side, if the others can be read: see last_side.
    """
    text = OPTION.sub("", without_stop(text).strip("\"'"))
    first, *sides = ABOUT.split(text)
    if first.strip():
        sides.insert(0, first)  # ≈ 5 has nothing before it
    if not 1 <= len(sides) <= 2:
        return []
    numbers = []
    for side in sides:
        number = last_side(side)
        if number is None or is_hedged(number.unit):
            return []
        numbers.append(number)
    if len(numbers) == 2 and abs(numbers[0].value - numbers[1].value) * 50 > abs(numbers[0].value):
        return []
    return numbers


def last_side(text: str) -> Number | None:
    """The number on the last side of an equation, or of a text without "=".

    Only the first side may hold variables, as in x = 25 + 5 = 30. 1 = 3 says nothing.
    """
    *sides, last = EQUALS.split(text)
    number = read_number(last)
    if number is None:
        return None
    for i, side in enumerate(sides):
        other = read_number(side)
        if other is None:
            if i > 0 or not names_number(side):
                return None
        elif other.final and not equal(other, number):
            return None
    return number


RELATION_SIGNS = re.compile(r"[<>]|\\(?:le|ge|ne|in)(?![A-Za-z])")
# What has a name: x, x_1, f(3), |S|, P(A)
NAMED = re.compile(
    r"\\?[A-Za-z]+(?:_(?:\{[^{}]{1,20}\}|\w))?'{0,2}(?:\([^()]{0,40}\))?|\|[^|]{1,20}\|"
)


def names_number(side: str) -> bool:
    """Can the left side of an equation be the name of its right side?

    m + n can. 2x cannot: 2x = 7 is an equation to be solved.
    """
    if is_hedged(side) or len(side) > 100 or RELATION_SIGNS.search(side):
        return False
    if "," in re.sub(r"\([^()]{0,60}\)", "", side):
        return False
    if NAMED.fullmatch("".join(side.split())):
        return True
    letters = set(re.findall("[A-Za-z]", re.sub(r"\\[A-Za-z]+", " ", side)))
    return len(letters) != 1 or re.search(r"[-+*/^!\d]|\\(?:sqrt|frac)", side) is None


# ---------------- other bases, ratios ----------------

BASED = re.compile(
    r"\(?(-?[\dA-Fa-f]+)\)?(?:_\{?\(?(\d+|[a-z]+)\)?\}?|base-?(\d+|[a-z]+))", re.IGNORECASE
)
BASE_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen"
).split()


def based(text: str) -> tuple[str, str] | None:
    """(digits, base) of a numeral such as 1011_2, (1011)_{two} or 1011 base 2; else None."""
    match = BASED.fullmatch("".join(text.split()))
    if match is None:
        return None
    base = (match[2] or match[3]).lower()
    if base in BASE_WORDS:
        base = str(BASE_WORDS.index(base))
    return (match[1].upper(), base) if base.isdigit() else None


def compare_based(answer: str, reference: str) -> bool | None:
    """If the reference is a numeral with a base: has the answer its digits, and no other base?"""
    expected = based(reference)
    if expected is None:
        return None
    for reading in readings(answer):
        *_, text = EQUALS.split(without_stop(reading))
        numeral = based(text)
        if numeral:
            return numeral == expected
        if "".join(text.split()).upper() == expected[0]:
            return True
    return False


RATIO = re.compile(r"\d{1,9}(?:\.\d{1,9})?(?::\d{1,9}(?:\.\d{1,9})?){1,5}")


def compare_ratios(answer: str, reference: str) -> bool | None:
    """If the reference is a ratio or a time, such as 2:3 or 6:30: is the answer the same?"""
    if not RATIO.fullmatch(reference):
        return None
    for reading in readings(answer):
        ratio = RATIO.fullmatch(without_stop("".join(reading.split())))
        if ratio:
            return ratio[0] == reference
    return False


# ---------------- words ----------------

WORDS = re.compile(r"\(?[A-Za-z][A-Za-z' ,.-]*\)?")


# Signs that words stand for.
SYMBOL_WORDS = {
    "\\infty": "infinity",
    "-\\infty": "negative infinity",
    "\\emptyset": "empty set",
    "\\mathbb{R}": "all real numbers",
}


def compare_words(answer: str, reference: str) -> bool | None:
    """If the reference is an option's letter or words: does the answer say them, in any case?"""
    if squeezed(reference) in SYMBOL_WORDS:
        expected = plain_words(SYMBOL_WORDS[squeezed(reference)])
        return True if any(plain_words(text) == expected for text in readings(answer)) else None
    if re.fullmatch(r"\(?[A-J]\)?", reference):
        letter = reference.strip("()")
        return any(option_of(reading) == letter for reading in readings(answer))
    if not WORDS.fullmatch(reference) or not re.search("[A-Za-z]{2}", reference):
        return None
    expected = plain_words(reference)
    return any(plain_words(reading) == expected for reading in readings(answer))


def option_of(text: str) -> str | None:
    """The letter in "B", "(B)" or "(B) 5"."""
    match = re.match(r"(?:[Oo]ption\s)?\(?([A-J])(?:[).:](?=\s|$)|$)", text.strip())
    return match[1] if match else None


def plain_words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation, articles and the s of a plural."""
    text = re.sub(r"\b([ap])\.\s?m\b\.?", r"\1m", text.lower())
    text = text.replace("does not exist", "dne")
    words = [word for word in re.findall(r"\w+", text) if word not in ("a", "an", "the")]
    return [word[:-1] if len(word) > 4 and word.endswith("s") else word for word in words]


# ---------------- lists ----------------

BRACKETS = {"(": ")", "[": "]"}


class Listed(NamedTuple):
    """A list of closed numbers."""

    brackets: str  # "()", "[]", "(]", "[)", "{}", or "" if there are none
    labels: list[str]  # what stands before each number, as x in x = 1; "" if nothing does
    numbers: list[Number]

    def by_label(self) -> dict[str, Number]:
        """{label: number}; {} if a label is missing or stands twice."""
        named = dict(zip(self.labels, self.numbers))
        return named if len(named) == len(self.numbers) and "" not in named else {}


def compare_lists(answer: str, reference: str) -> bool | None:
    """If the reference is a list of closed numbers, and the answer too: are they the same?

    Brackets ( ) and [ ] keep an order, so they must be the same. Without them, and in \\{ \\}, the
    order is free, but labels as in x = 1, y = 2 are not.
    """
    expected = list_of(reference)
    if expected is None:
        return None
    for reading in readings(answer):
        given = list_of(reading)
        if given is not None:
            return same_lists(given, expected)
    return None


def list_of(text: str) -> Listed | None:
    """The list of closed numbers that a text is. A ± stands for two numbers."""
    text = without_stop(text)
    brackets = ""
    if text[:1] in BRACKETS and text[-1:] in BRACKETS.values():
        brackets, text = text[0] + text[-1], text[1:-1]
    elif text.startswith("\\{") and text.endswith("\\}"):
        brackets, text = "{}", text[2:-2]
    labels, numbers = [], []
    for item in re.split(r"[,;]|\band\b|\bor\b", text):
        if not item.strip() and numbers:
            continue  # "1, 2, and 3"
        for version in {item.replace("\\pm", "+"), item.replace("\\pm", "-")}:
            number = last_side(version)
            if number is None:
                return None
            numbers.append(number)
            labels.append(squeezed(version.partition("=")[0]) if "=" in version else "")
    return Listed(brackets, labels, numbers) if len(numbers) > 1 else None


def same_lists(given: Listed, expected: Listed) -> bool | None:
    """Are two lists the same? None if one has brackets of an order, and the other none."""
    if len(given.numbers) != len(expected.numbers):
        return False
    is_final = all(number.final and is_rational(number.value) for number in expected.numbers)
    named, expected_named = given.by_label(), expected.by_label()
    if named and expected_named and named.keys() == expected_named.keys():
        pairs = [(named[label], expected_named[label]) for label in named]
        return all(same_number(x, y, is_final) for x, y in pairs)
    ordered = in_order(given), in_order(expected)
    if None not in ordered and given.brackets + expected.brackets:
        if given.brackets and expected.brackets and given.brackets != expected.brackets:
            return False
        return all(same_number(x, y, is_final) for x, y in zip(*ordered))
    if "(" in given.brackets + expected.brackets or "[" in given.brackets + expected.brackets:
        return False if given.brackets and expected.brackets else None
    return same_sets(given.numbers, expected.numbers, is_final)


def in_order(listed: Listed) -> list[Number] | None:
    """The numbers, if they have an order: that of brackets, or of labels such as x and y."""
    if listed.brackets[:1] in BRACKETS:
        return listed.numbers
    named = listed.by_label()
    if named and all(re.fullmatch("[A-Za-z]", label) for label in named):
        return [named[label] for label in sorted(named)]
    return None


def same_sets(numbers: list[Number], expected: list[Number], is_final: bool) -> bool:
    """Are the numbers the same, in any order?"""
    rest = list(expected)
    for number in numbers:
        match = next((other for other in rest if same_number(number, other, is_final)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


# A comparison returns None if the reference is of another kind.
COMPARISONS: tuple[Callable[[str, str], bool | None], ...] = (
    compare_numbers,
    compare_based,
    compare_ratios,
    compare_words,
    compare_lists,
)


# ---------------- what symbolic algebra gets ----------------

# Runs of letters that are mathematics, whatever the reference.
NAMES = frozenset(
    "or and if in for all where with integer integers any real numbers is sin cos tan cot sec csc "
    "sinh cosh tanh arcsin arccos arctan log ln lg exp max min gcd lcm mod det dim ker deg lim sup "
    "inf pi infty sqrt begin end matrix pmatrix bmatrix vmatrix cases array aligned".split()
)
SIGNS = re.compile(r"[\w\s\\+\-*/^=<>()\[\]{}|,.:;'&%!~]*", re.ASCII)


def to_symbolic(answer: str, reference: str) -> tuple[str, str] | None:
    """(answer, reference) for symbolic algebra; None if the answer holds no mathematics alone.

    An inequality becomes an interval if only one of the two is an interval.
    """
    plain_reference = bare(reference)
    letters = set(re.sub(r"\\[A-Za-z]+", " ", plain_reference))
    for reading in readings(answer):
        text = without_stop(reading)
        if text and is_mathematics(text, letters):
            return as_intervals(text, plain_reference)
    return None


def is_mathematics(text: str, letters: set[str]) -> bool:
    """Could the text be an expression, rather than prose or noise?

    letters: those that the reference has. Other letters may stand alone, as a variable does.
    """
    if not SIGNS.fullmatch(text) or len(text) > LONGEST:
        return False
    without_commands = re.sub(r"\\[A-Za-z]+", " ", text)
    for run in re.findall("[A-Za-z]+", without_commands):
        if len(run) > 1 and run not in NAMES and not set(run) <= letters:
            return False
    return True


RELATION = r"\s*(<|>|\\le\b|\\ge\b)\s*"
VARIABLE = r"(?:[A-Za-z](?:\([a-z]\))?|\\[a-z]+)(?:_\{?\w\}?)?"
ONE_BOUND = re.compile(rf"\s*({VARIABLE}){RELATION}([^<>=,]+?)\s*")
BOUND_FIRST = re.compile(rf"\s*([^<>=,A-Za-z]+?){RELATION}{VARIABLE}\s*")
TWO_BOUNDS = re.compile(rf"\s*([^<>=,]+?){RELATION}{VARIABLE}{RELATION}([^<>=,]+?)\s*")
BOTH = re.compile(r"\band\b|\\wedge\b|\\land\b")
SET_BUILDER = re.compile(
    rf"\\\{{\s*{VARIABLE}(?:\s*\\in\s*\\mathbb\s?\{{?R\}}?)?\s*(?:\\mid|\\vert|\||:)(.+)\\\}}"
)
UNEQUAL = re.compile(rf"\s*{VARIABLE}\s*\\ne\s*([^<>=,]+?)\s*")
MIRRORED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le"}
LONGEST_INEQUALITY = 200  # characters
IS_INTERVAL = re.compile(r"[(\[].*,.*[)\]]", re.DOTALL)


def as_intervals(answer: str, reference: str) -> tuple[str, str]:
    """The two texts; if one is an inequality and the other an interval, both as intervals."""
    if IS_INTERVAL.search(reference) and not IS_INTERVAL.search(answer):
        return interval_of(answer) or answer, reference
    if IS_INTERVAL.search(answer) and not IS_INTERVAL.search(reference):
        return answer, interval_of(reference) or reference
    return answer, reference


def interval_of(text: str) -> str | None:
    """x<-1 or x>=1 as (-\\infty,-1)\\cup[1,\\infty); None if it is no inequality."""
    if len(text) > LONGEST_INEQUALITY:
        return None
    builder = SET_BUILDER.fullmatch(text.strip())
    text = builder[1] if builder else text
    pieces = []
    for part in re.split(r"\bor\b|\\cup|\\lor|\\vee", text):
        interval = two_bounds(part) or joined_bounds(part) or one_bound(part) or all_but_one(part)
        if interval is None:
            return None
        pieces.append(interval)
    return r"\cup".join(pieces)


def joined_bounds(text: str) -> str | None:
    """x>-1 and x<=6 as (-1,6]"""
    bounds = [one_bound(part) for part in BOTH.split(text)]
    if len(bounds) != 2 or None in bounds:
        return None
    low = next((bound for bound in bounds if bound.endswith(r"\infty)")), None)
    high = next((bound for bound in bounds if bound.startswith(r"(-\infty")), None)
    if low is None or high is None:
        return None
    return low.removesuffix(r"\infty)") + high.removeprefix(r"(-\infty,")


def all_but_one(text: str) -> str | None:
    """x \\ne 1 as (-\\infty,1)\\cup(1,\\infty)"""
    match = UNEQUAL.fullmatch(text)
    return rf"(-\infty,{match[1]})\cup({match[1]},\infty)" if match else None


def two_bounds(text: str) -> str | None:
    """0<x<=1 as (0,1]"""
    match = TWO_BOUNDS.fullmatch(text)
    if match is None:
        return None
    low, first, second, high = match.groups()
    if first in (">", r"\ge") and second in (">", r"\ge"):
        low, first, second, high = high, second, first, low
    elif not (first in ("<", r"\le") and second in ("<", r"\le")):
        return None
    left = "(" if first in "<>" else "["
    right = ")" if second in "<>" else "]"
    return f"{left}{low},{high}{right}"


def one_bound(text: str) -> str | None:
    """x<3 as (-\\infty,3)"""
    match = ONE_BOUND.fullmatch(text)
    mirrored = BOUND_FIRST.fullmatch(text)
    if match:
        _, relation, bound = match.groups()
    elif mirrored:
        bound, relation = mirrored[1], MIRRORED[mirrored[2]]
    else:
        return None
    if relation == "<":
        return rf"(-\infty,{bound})"
    if relation == ">":
        return rf"({bound},\infty)"
    if relation == r"\le":
        return rf"(-\infty,{bound}]"
    return rf"[{bound},\infty)"
