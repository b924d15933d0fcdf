"""Are two short answers equal? Rules for numbers, units, option letters and plain texts."""

import re
from fractions import Fraction

# ---------------- math ----------------

# "m + n =", the left side of "m + n = 113". In "4 + 4 = 8" the left side is a computation instead.
LEFT_SIDE = re.compile(r"^[A-Za-z\s+*/^(){}\\_-]*=(?=[^=]*$)")


def without_variable(answer: str, reference: str) -> str:
    """The answer without bold marks and, if the reference is no equation, without its left side."""
    answer = answer.strip("* ")
    if "=" in reference:
        return answer
    return LEFT_SIDE.sub("", answer)


def equal_at_sight(answer: str, reference: str) -> bool | None:
    """Are the answer and the reference equal? None if that takes a symbolic comparison."""
    if answer == reference.strip():
        return True
    number = plain_number(answer.strip("$. "))
    reference_number = plain_number(reference)
    if reference_number is None:
        return None
    if number is not None:
        return number == reference_number
    if unevaluated(answer):
        return False  # a sum that gives the number, such as the question's own, is no answer
    return None


def plain_number(text: str) -> Fraction | None:
    """The value of an integer or a decimal number; commas may divide the thousands.

    At most 40 digits, because int() refuses texts of thousands of them.
    """
    if re.fullmatch(r"\$?-?\d{1,3}(,\d{3})+\$?", text.strip()):
        text = text.strip().strip("$").replace(",", "")
    if re.fullmatch(r"[-+]?\d{1,40}(\.\d{1,40})?", text.strip()):
        return Fraction(text)
    return None


def unevaluated(answer: str) -> bool:
    """Is there something left to compute, as in 4+4-2, 17*23, 5!, an integral, or 1=3?

    a·10^n, roots and fractions are values. So is what follows a variable, as in x = 3.
    """
    text = re.sub(r"(\\times|\\cdot|[*×·])\s*10\s*\^", "e", answer)
    if re.search(r"[\w)}\]]\s*([-+*×·!]|\\times|\\cdot)|\\(int|sum|prod|binom|lim)", text):
        return True
    return "=" in text and not re.match(r"\s*[A-Za-z]\w?\s*=[^=]*$", text)


# ---------------- science ----------------


def short_answer_equal(answer: str, reference: str, match: str | None = None) -> bool:
    """Is a short answer the reference? That depends on the reference's kind:

    an option's letter   the answer names this option alone; its text may follow
    a number             integers must be equal, others within 1 %; units must not differ
    another text         the texts are equal up to case, articles, quotation marks, white space

    match="last-word" (a row's "match"): only the last word counts.
    """
    if match == "last-word":
        return normalise(answer).split()[-1:] == normalise(reference).split()[-1:]
    if re.fullmatch(r"\(?[A-Z]\)?\.?", reference.strip()):
        return option_letter(answer) == reference.strip(" ().")
    number = NUMBER.fullmatch(normalise(answer))
    reference_number = NUMBER.fullmatch(normalise(reference))
    if number and reference_number:
        return quantities_equal(number, reference_number)
    return normalise(answer) == normalise(reference)


def normalise(text: str) -> str:
    r"""Lower case, without \text{}, quotation marks, a leading article, and surplus white space."""
    text = re.sub(r"\\(text|mathrm)\{(.*?)\}", r"\2", text.lower())
    text = text.strip(" .$\n\t*")
    text = re.sub(r"[\"'“”‘’]", " ", text)
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r"^(a|an|the) ", "", text)


UNIT = r"[a-zµ°%Ω][a-zµ°Ω/·*²³]{0,11}(?:\^-?\d)?"
# Groups: the number (a decimal, or a fraction; with commas and an exponent), and its unit.
NUMBER = re.compile(
    r"\$?\s*([-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?(?:/[1-9]\d*)?)\$?\s*"
    rf"({UNIT}(?: {UNIT})?)?"
)


def quantities_equal(quantity: re.Match, reference: re.Match) -> bool:
    """Are two matches of NUMBER equal, or within 1 % if the reference is no integer?"""
    x, y = number_value(quantity[1]), number_value(reference[1])
    is_integer = re.fullmatch(r"[-+]?[\d,]+", reference[1])
    tolerance = 1e-9 if is_integer else 0.01
    return abs(x - y) <= tolerance * abs(y) and units_agree(quantity[2], reference[2])


def number_value(number: str) -> float:
    """The value of NUMBER's first group."""
    numerator, _, denominator = number.replace(",", "").partition("/")
    return float(numerator) / float(denominator or 1)


def units_agree(unit: str | None, reference_unit: str | None) -> bool:
    """Do the units not differ?

    An answer may leave the unit out. If the reference has none, an answer may have a unit of one
    word other than %; two words may be "or four".
    """
    if not unit or unit == reference_unit:
        return True
    if reference_unit:
        return False
    return "%" not in unit and " " not in unit


def option_letter(answer: str) -> str | None:
    """The one option that an answer names: alone, before its text, or in a last "the answer is C".

    None if it names none, or hedges ("B or C", "A. B. C.").
    """
    text = re.sub(r"\\(?:text|math)(?:rm|bf|sf|tt|it)?\{(.*?)\}", r"\1", answer)
    text = text.replace("*", "").replace("$", "").strip()
    alone = re.fullmatch(r"[\s(]*([A-Za-z])[\s).:]*", text)
    if alone:
        return alone[1].upper()

    # (letter, what follows it)
    stated = re.findall(
        r"\b(?i:answer|option|choice)\b(?: is)?\s*:?\s*\(?([A-Z])\b\)?(?=(.*))", text
    )
    first = re.match(r"\s*\(?([A-Z])[).:]\s*(.*)", text, re.DOTALL)
    if stated:
        letter, rest = stated[-1]
    elif first:
        letter, rest = first.groups()
    else:
        return None
    return None if hedges(rest) else letter


def hedges(rest: str) -> bool:
    """Does what follows an option's letter name another option?"""
    names_another = re.search(
        r"\b(?:or|and)\s+\(?[A-J]\b|(?<![\w'])[B-J][).:](?:\s|$)|/\s*[A-J]\b", rest
    )
    only_letters = re.fullmatch(r"[\sA-J,;/&.()]*[A-J][\sA-J,;/&.()]*", rest)
    return bool(names_another or only_letters)
