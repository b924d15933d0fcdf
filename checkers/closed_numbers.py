r"""Numbers written without variables, such as 12{,}345, 2\frac{1}{3}, 0.1\overline{6} or 3\pi + 1.

read_number() parses the whole text or fails: what a text merely contains is not its value. Values
are exact where they are rational. The others have DIGITS digits.
"""

import math
import re
from fractions import Fraction
from typing import NamedTuple

import mpmath

from checkers.latex import bare

DIGITS = 60  # of the precision in which irrational numbers are computed
SAME = mpmath.mpf(10) ** -30  # relative difference below which two irrational numbers are equal
LONGEST = 400  # characters
MOST_DIGITS = 5000  # of an integer that is computed exactly
DEEPEST = 40  # nested brackets

context = mpmath.mp.clone()
context.dps = DIGITS


class NotClosed(ValueError):
    """The text is not a number without variables, or one too large to compute."""


class Number(NamedTuple):
    """A number that a text stands for."""

    value: Fraction | mpmath.mpf
    final: bool = True  # is nothing left to compute? Fractions, roots and powers are final
    percent: bool = False
    unit: str = ""
    digits: int = 0  # significant digits, if it is written as a decimal
    atom: bool = False  # is it one piece: a number, or something in brackets?


# ---------------- tokens ----------------

TOKEN = re.compile(
    r"\s*(?:(?P<number>\d{1,3}(?:,\d{3})+(?![\d])(?:\.\d+)?|\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|\.\d+)"
    r"|(?P<name>\\?[A-Za-z]+)|(?P<sign>\\[{}|]|\S))"
)


class Token(NamedTuple):
    """A piece of the text."""

    kind: str  # "number", "name", "sign" or "end"
    text: str
    end: int  # where the text goes on behind it


def tokens_of(text: str) -> list[Token]:
    """The tokens of a text; the last one is of kind "end"."""
    tokens = []
    position = 0
    while match := TOKEN.match(text, position):
        kind = match.lastgroup
        tokens.append(Token(kind, match[kind], match.end(kind)))
        position = match.end()
    tokens.append(Token("end", "", len(text)))
    return tokens


# ---------------- values ----------------


def is_rational(value) -> bool:
    """Is the value exact?"""
    return isinstance(value, Fraction)


def to_mpf(value):
    """The value with DIGITS digits."""
    if is_rational(value):
        return context.mpf(value.numerator) / value.denominator
    return value


def both(x, y) -> tuple:
    """The two values, as exact ones if both are."""
    if is_rational(x) and is_rational(y):
        return x, y
    return to_mpf(x), to_mpf(y)


def power(base, exponent):
    """base ** exponent. Raises NotClosed if it is not real or too large."""
    if is_rational(base) and is_rational(exponent) and exponent.denominator == 1:
        size = max(abs(base.numerator), base.denominator).bit_length() * abs(exponent.numerator)
        if base == 0 and exponent < 0:
            raise NotClosed("a division by zero")
        if size <= 4 * MOST_DIGITS:
            return base**exponent.numerator
    if abs(to_mpf(exponent)) > 10**9:
        raise NotClosed("too large")
    if base < 0 and not (is_rational(exponent) and exponent.denominator == 1):
        raise NotClosed("not real")
    return context.power(to_mpf(base), to_mpf(exponent))


def root(value, degree):
    """The real root. Exact roots of rational numbers stay rational."""
    if not is_rational(degree) or degree.denominator != 1 or degree < 1 or degree > 100:
        raise NotClosed("no such root")
    if value < 0:
        if degree.numerator % 2 == 0:
            raise NotClosed("not real")
        return -root(-value, degree)
    if is_rational(value):
        top = exact_root(value.numerator, degree.numerator)
        bottom = exact_root(value.denominator, degree.numerator)
        if top is not None and bottom is not None:
            return Fraction(top, bottom)
    return context.root(to_mpf(value), degree.numerator)


def exact_root(value: int, degree: int) -> int | None:
    """The integer whose power is `value`; None if there is none."""
    if degree == 2:
        guess = math.isqrt(value)
    elif value.bit_length() > 200:
        return None
    else:
        guess = int(context.nint(context.root(value, degree)))
    return guess if guess**degree == value else None


def factorial(value):
    """n! for a natural number n."""
    if not is_rational(value) or value.denominator != 1 or not 0 <= value <= 10**9:
        raise NotClosed("no such factorial")
    if value <= 1500:
        return Fraction(math.factorial(value.numerator))
    return context.factorial(value.numerator)


def binomial(n, k):
    """n over k, for natural numbers up to 10,000."""
    for value in (n, k):
        if not is_rational(value) or value.denominator != 1 or not 0 <= value <= 10**4:
            raise NotClosed("no such binomial coefficient")
    return Fraction(math.comb(n.numerator, k.numerator))


def logarithm(value):
    """The natural logarithm."""
    if value <= 0:
        raise NotClosed("not real")
    return context.log(to_mpf(value))


def cosine(value):
    """cos, of radians."""
    return context.cos(to_mpf(value))


def sine(value):
    """sin, of radians."""
    return context.sin(to_mpf(value))


def tangent(value):
    """tan, of radians."""
    return context.tan(to_mpf(value))


def exponential(value):
    """e to the power of a value."""
    if abs(to_mpf(value)) > 10**9:
        raise NotClosed("too large")
    return context.exp(to_mpf(value))


FUNCTIONS = {
    "ln": logarithm,
    "sin": sine,
    "cos": cosine,
    "tan": tangent,
    "exp": exponential,
}


# ---------------- decimals ----------------


def decimal(text: str) -> Number:
    """A number token as a Number."""
    text = text.replace(",", "")
    mantissa, _, exponent = text.lower().partition("e")
    if len(mantissa) > LONGEST or len(exponent) > 6:
        raise NotClosed("too long")
    value = Fraction(mantissa)
    if exponent:
        value *= power(Fraction(10), Fraction(int(exponent)))
    digits = len(mantissa.replace(".", "").lstrip("0")) if "." in mantissa else 0
    return Number(value, digits=digits, atom=True)


def repeating(start: str, period: str) -> Fraction:
    """The value of a decimal whose digits after `start` are `period` again and again."""
    whole, _, places = start.partition(".")
    shift = 10 ** len(places)
    nines = 10 ** len(period) - 1
    return Fraction(int(whole + places), shift) + Fraction(int(period), nines * shift)


def period_of(places: str) -> tuple[str, str] | None:
    """(digits before, period) of the decimals that ... goes on; None if nothing in them repeats.

    "333" → ("", "3"), "1666" → ("1", "6"), "142857142857" → ("", "142857")
    """
    for length in range(1, len(places) // 2 + 1):
        period = places[-length:]
        times = 3 if length == 1 else 2
        if places.endswith(period * times):
            before = places
            while before.endswith(period):
                before = before[:-length]
            return before, period
    return None


# ---------------- the parser ----------------

OPENING = {"(": ")", "{": "}", "[": "]"}
TIMES = ("*", "\\times", "\\cdot")
CURRENCIES = "€£¥₹"


class Parser:
    """A recursive-descent parser. Each method parses from the current token on."""

    def __init__(self, text: str):
        self.tokens = tokens_of(text)
        self.position = 0
        self.depth = 0

    # -- tokens

    def peek(self, ahead: int = 0) -> Token:
        """The current token, or one after it."""
        return self.tokens[min(self.position + ahead, len(self.tokens) - 1)]

    def take(self) -> Token:
        """The current token, which is then behind us."""
        token = self.peek()
        self.position += 1
        return token

    def at(self, *texts: str) -> bool:
        """Is the current token one of these?"""
        return self.peek().text in texts

    def expect(self, text: str) -> None:
        """Take this token. Raises NotClosed if another one stands there."""
        if self.take().text != text:
            raise NotClosed(f"no {text}")

    # -- sums and products

    def expression(self) -> Number:
        """term {(+ | −) term}"""
        self.depth += 1
        if self.depth > DEEPEST:
            raise NotClosed("too deep")
        total = self.signed_term()
        while self.at("+", "-"):
            is_plus = self.take().text == "+"
            x, y = both(total.value, self.term().value)
            total = Number(x + y if is_plus else x - y, final=False)
        self.depth -= 1
        return total

    def signed_term(self) -> Number:
        """A term with at most one sign."""
        if not self.at("+", "-"):
            return self.term()
        is_minus = self.take().text == "-"
        term = self.term()
        return term._replace(value=-term.value if is_minus else term.value, atom=False)

    def term(self) -> Number:
        """factor {(× | · | ÷ | / | nothing) factor}"""
        product = self.factor()
        while True:
            if self.at(*TIMES):
                self.take()
                product = self.multiplied(product)
            elif self.at("/", "\\div"):
                product = self.divided(product, self.take().text)
            elif self.begins_factor():
                start = self.position
                try:
                    is_mixed = self.begins_mixed(product)
                    product = self.mixed(product) if is_mixed else self.joined(product)
                except NotClosed:  # what follows is no factor, but perhaps a unit: 5 (apples)
                    self.position = start
                    return product
            else:
                return product

    def joined(self, left: Number) -> Number:
        """left × factor, without a sign between them. 2√3 and 3π are final, 17(23) is not."""
        if self.peek().kind == "number":
            raise NotClosed("two numbers side by side")
        right = self.factor()
        x, y = both(left.value, right.value)
        return Number(x * y, left.final and right.final and not is_rational(right.value))

    def multiplied(self, left: Number) -> Number:
        """left × factor. a × 10^n is final, other products are not."""
        is_ten = self.at("10") and self.peek(1).text == "^"
        right = self.factor()
        x, y = both(left.value, right.value)
        return Number(x * y, is_ten and left.atom and left.final, digits=left.digits)

    def divided(self, left: Number, sign: str) -> Number:
        """left / factor. The slash makes a fraction, which is final; ÷ does not."""
        right = self.signed_factor()
        x, y = both(left.value, right.value)
        if y == 0:
            raise NotClosed("a division by zero")
        return Number(x / y, sign == "/" and left.final and right.final)

    def begins_mixed(self, left: Number) -> bool:
        """Does a fraction below 1 follow an integer, as in 2\\frac{1}{3} and 2 1/3?"""
        if not left.atom or left.digits or not is_rational(left.value):
            return False
        if left.value.denominator != 1 or self.tokens[self.position - 1].kind != "number":
            return False
        if self.at("\\frac") or (self.at("{") and self.peek(1).text == "\\frac"):
            return True
        following = [self.peek(i) for i in range(3)]
        return following[0].kind == following[2].kind == "number" and following[1].text == "/"

    def mixed(self, whole: Number) -> Number:
        """The value of 2\\frac{1}{3} or 2 1/3. With a fraction above 1, it is a product."""
        part = self.factor()
        if self.at("/"):
            part = self.divided(part, self.take().text)
        if is_rational(part.value) and 0 < part.value < 1 and part.final:
            return Number(whole.value + part.value)
        x, y = both(whole.value, part.value)
        return Number(x * y, False)

    def begins_factor(self) -> bool:
        """Can the current token begin a factor that multiplies what stands before it?"""
        token = self.peek()
        if token.kind == "number":
            return self.peek(1).text == "/"  # 2 1/3
        if token.text in ("\\sqrt", "\\frac", "\\pi", "pi", "\\binom", "(", "{", "e"):
            return True
        return token.text.lstrip("\\") in FUNCTIONS

    # -- powers, factorials

    def signed_factor(self) -> Number:
        """A factor, with or without a sign: 2/-3."""
        if self.at("-"):
            self.take()
            factor = self.factor()
            return factor._replace(value=-factor.value)
        return self.factor()

    def factor(self) -> Number:
        """atom {^ exponent | !}"""
        number = self.atom()
        while True:
            if self.at("^"):
                if self.peek(1).text == "\\circ" or self.peek(2).text == "\\circ":
                    return number  # degrees: a unit
                self.take()
                exponent = self.exponent()
                value = power(number.value, exponent.value)
                number = Number(value, number.final and exponent.final, atom=True)
            elif self.at("!"):
                self.take()
                number = Number(factorial(number.value), final=False)
            else:
                return number

    def exponent(self) -> Number:
        """What stands after ^."""
        return self.signed_factor() if self.at("-") else self.atom()

    # -- atoms

    def atom(self) -> Number:
        """A number, a constant, a command with its arguments, or something in brackets."""
        token = self.take()
        if token.kind == "number":
            return self.number(token)
        if token.text == "." and self.at("\\overline", "\\dot", "\\bar"):
            return self.number(token._replace(text="0."))
        if token.text in OPENING:
            inside = self.expression()
            self.expect(OPENING[token.text])
            return inside._replace(atom=True)
        name = token.text.lstrip("\\")
        if token.kind == "name" and name in COMMANDS:
            return COMMANDS[name](self)
        if token.kind == "name" and name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
        raise NotClosed(f"{token.text} is no number")

    def number(self, token: Token) -> Number:
        """A decimal, or one that goes on: 0.\\overline{3}, 0.1\\dot{6}, 0.333…"""
        next_text = self.peek().text
        text = token.text
        if next_text == "." and self.peek(1).text in ("\\overline", "\\dot", "\\bar"):
            self.take()
            text += "."
            next_text = self.peek().text
        if "." in text and next_text in ("\\overline", "\\dot", "\\bar"):
            self.take()
            period = self.argument_digits()
            while self.at("\\dot"):
                self.take()
                period += self.argument_digits()
            return Number(repeating(text if text[0] != "." else "0" + text, period), atom=True)
        if "." in text and (next_text == "\\ldots" or self.at_three_dots()):
            self.position += 1 if next_text == "\\ldots" else 3
            whole, _, places = text.partition(".")
            parts = period_of(places)
            if parts is None:
                raise NotClosed("nobody knows how the digits go on")
            before, period = parts
            return Number(repeating(f"{whole or 0}.{before}", period), atom=True)
        return decimal(text)

    def at_three_dots(self) -> bool:
        """Are the next three tokens full stops?"""
        return all(self.peek(i).text == "." for i in range(3))

    def argument_digits(self) -> str:
        """The digits in a command's argument."""
        in_braces = self.at("{")
        if in_braces:
            self.take()
        token = self.take()
        if not token.text.isdigit():
            raise NotClosed("no digits")
        if in_braces:
            self.expect("}")
        return token.text

    def argument(self) -> Number:
        """A command's argument: in braces or parentheses, or one digit (\\frac12), or a number."""
        token = self.peek()
        if token.kind == "number" and len(token.text) > 1 and token.text.isdigit():
            self.tokens[self.position] = token._replace(text=token.text[1:])
            return decimal(token.text[0])
        return self.atom()

    def function(self, function) -> Number:
        """The value of a function such as ln. It is not final."""
        argument = self.factor()
        return Number(function(argument.value), final=False)


# -- commands


def fraction(parser: Parser) -> Number:
    r"""\frac{a}{b}, \frac12"""
    top = parser.argument()
    bottom = parser.argument()
    x, y = both(top.value, bottom.value)
    if y == 0:
        raise NotClosed("a division by zero")
    return Number(x / y, top.final and bottom.final, atom=True)


def square_root(parser: Parser) -> Number:
    r"""\sqrt{a}, \sqrt[n]{a}, \sqrt2"""
    degree = Fraction(2)
    if parser.at("["):
        parser.take()
        degree = parser.expression().value
        parser.expect("]")
    inside = parser.atom()
    return Number(root(inside.value, degree), inside.final, atom=True)


def binomial_coefficient(parser: Parser) -> Number:
    r"""\binom{n}{k}"""
    n = parser.argument()
    k = parser.argument()
    return Number(binomial(n.value, k.value), final=False, atom=True)


def pi(parser: Parser) -> Number:
    """π"""
    return Number(+context.pi, atom=True)


def euler(parser: Parser) -> Number:
    """e"""
    return Number(+context.e, atom=True)


COMMANDS = {
    "frac": fraction,
    "sqrt": square_root,
    "binom": binomial_coefficient,
    "pi": pi,
    "e": euler,
}


# ---------------- units ----------------

# Abbreviations of units. Longer words count as units too: 12 apples.
UNITS = frozenset(
    "mm cm dm m km in ft yd mi mg g kg t oz lb lbs ml mL cl l L s ms h hr hrs min sec d yr yrs "
    "Hz kHz MHz GHz N kN J kJ MJ W kW MW V mV kV A mA K C F Pa kPa MPa atm bar mol cal kcal eV deg "
    "rad mph kph rpm USD EUR GBP pts sq cu Ω ohm ohms of to on at by it do".split()
)
# Words after a number that say that it is not the answer, or that another number follows.
NO_UNITS = frozenset(
    "or and not nor but if then than plus minus times divided over mod modulo squared cubed "
    "factorial choose is are was were isn aren wrong incorrect false maybe perhaps possibly "
    "probably guess unsure either neither both other others could might may no yes so "
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety "
    "hundred thousand million billion trillion half third quarter dozen halves thirds quarters "
    "fourths fifths sixths sevenths eighths ninths tenths hundredths thousandths least most nope "
    "answer the unknown unlikely".split()
)
UNIT = re.compile(
    r"[€£¥¢₹元]|[A-Za-zΩ]+(?:\^(?:\{-?\d\}|-?\d))?|[\s/*().-]|\\cdot|\^\{?\\circ\}?|\^\{\d\}"
)
MOST_UNIT_WORDS = 6
PERCENT = re.compile(r"\s*(?:%|percent\b)")


def unit_of(text: str) -> str | None:
    """The unit that the text after a number is; None if it is something else."""
    text = re.sub(r"\\frac\{([^{}\\]*)\}\{([^{}\\]*)\}", r" \1/\2", text)  # \frac{m}{s}
    if ".." in text:
        return None  # nobody knows how it goes on
    is_apart = not text[:1].isalpha()
    position = 0
    pieces = []
    words = 0
    while position < len(text):
        match = UNIT.match(text, position)
        if match is None:
            return None
        piece = match[0]
        word = re.match(r"[A-Za-zΩ]*", piece)[0]
        if word:
            words += 1
            if words > MOST_UNIT_WORDS or not is_unit_word(word, is_apart):
                return None
        pieces.append(piece)
        position = match.end()
    return "".join(pieces).strip(" .")


def is_unit_word(word: str, is_apart: bool) -> bool:
    """Can the word be a part of a unit? is_apart: the unit does not touch the number.

    5m and 2xy are products of variables, 5 m is a length.
    """
    if word.lower() in NO_UNITS:
        return False
    if word in UNITS:
        return is_apart or len(word) > 1
    return len(word) > 2 and bool(re.search("[aeiouAEIOU]", word))


# ---------------- the whole text ----------------


# How words and letters write a number: (what is matched, what becomes of it)
WORDS_AND_SIGNS = [
    (re.compile(r"^(?:USD|EUR|GBP|INR|RMB|CNY|Rs\.?)\s+(?=[-+\d])"), ""),
    (re.compile(r"^(?:negative|minus)\s+(?=\d)"), "-"),
    (re.compile(r"^(-?\d{1,9}) and (?=\d{1,9}/\d)"), r"\1 "),  # 1 and 1/2
    (re.compile(r"(?<=\d)\s?[xX]\s?(?=10\s?\^)"), r"\\times "),  # 3.2 x 10^5
]
MULTIPLES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
MULTIPLE = re.compile(r"\s{0,3}(hundred|thousand|million|billion|trillion)\b")


def read_number(text: str) -> Number | None:
    """The number that the text is, unit included; None if the text is anything else.

    text: as latex.bare() gives it.
    """
    text = text.strip().lstrip(CURRENCIES).strip()
    if not text or len(text) > LONGEST:
        return None
    for pattern, replacement in WORDS_AND_SIGNS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"^(-?\d{1,3})((?: \d{3})+)(?= |$)", join_groups, text)
    parser = Parser(text)
    try:
        number = parser.expression()
    except (NotClosed, OverflowError, ZeroDivisionError, RecursionError):
        return None
    rest = text[parser.tokens[parser.position - 1].end :]
    multiple = MULTIPLE.match(rest)
    if multiple and parser.tokens[parser.position - 1].kind == "number":  # 2.5 million
        number = number._replace(value=number.value * 10 ** MULTIPLES[multiple[1]])
        rest = rest[multiple.end() :]
    percent = PERCENT.match(rest)
    if percent:
        number = number._replace(percent=True)
        rest = rest[percent.end() :]
    unit = unit_of(rest)
    if unit is None:
        return None
    return number._replace(unit=unit)


def join_groups(match: re.Match) -> str:
    """12 345 as 12345."""
    return match[1] + match[2].replace(" ", "")


def read_bare_number(text: str) -> Number | None:
    """read_number of a text in any spelling."""
    return read_number(bare(text))


def equal(x: Number, y: Number) -> bool:
    """Are the two numbers equal, exactly or (if irrational) in the first 30 digits?

    50% is 0.5 as well as 50. A decimal of six digits and more is equal to a number without such a
    form, as 1.41421 to √2, if it is that number rounded.
    """
    if x.percent != y.percent:
        percent, other = (x, y) if x.percent else (y, x)
        hundredth = percent._replace(value=percent.value / 100)
        return values_equal(percent, other) or values_equal(hundredth, other)
    return values_equal(x, y)


def values_equal(x: Number, y: Number) -> bool:
    """equal(), without a thought of percent."""
    a, b = both(x.value, y.value)
    if is_rational(a):
        if a == b:
            return True
    elif abs(a - b) <= SAME * max(abs(a), abs(b)):
        return True
    elif not (x.final and y.final) and max(abs(a), abs(b)) < SAME**2 and a * b == 0:
        return True  # a sum such as sin π that is 0 but for rounding
    return rounds_to(x, y) or rounds_to(y, x)


def rounds_to(number: Number, rounded: Number) -> bool:
    """Is `rounded`, a decimal of at least six digits, the number rounded to as many digits?"""
    if rounded.digits < 6 or number.digits or not rounded.value:
        return False
    if is_rational(number.value) and number.value.denominator == 1:
        return False
    size = context.floor(context.log10(abs(to_mpf(rounded.value)))) + 1
    last_digit = context.mpf(10) ** (size - rounded.digits)
    return abs(to_mpf(number.value) - to_mpf(rounded.value)) <= last_digit * context.mpf("0.500001")
