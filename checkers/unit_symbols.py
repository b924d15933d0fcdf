r"""Units of measurement in one spelling: m/s^2, m s^{-2} and meters per second^2 are the same.

Symbols keep their case, because mJ is not MJ. Other words are units too: 3 apples.
"""

import re

from checkers.closed_numbers import NO_UNITS

MOST_FACTORS = 6

PREFIXES = {
    "femto": "f",
    "pico": "p",
    "nano": "n",
    "micro": "u",
    "milli": "m",
    "centi": "c",
    "deci": "d",
    "kilo": "k",
    "mega": "M",
    "giga": "G",
    "tera": "T",
}
# Units that take prefixes, and others.
BASES = frozenset(
    "m g s L A K J N W V C F H T Pa Hz mol eV cal ohm S Wb Bq Gy Sv M bar lm lx pc B b Wh "
    "rad".split()
)
OTHERS = frozenset(
    "t min h d yr deg degC degF atm mmHg Torr psi lb oz ft in yd mi mph rpm ppm ppb bpm dB u Da AU "
    "ly cd sr ha kn G e".split()
)
# Words → symbols. A plural is looked up without its s.
NAMES = {
    "meter": "m",
    "metre": "m",
    "gram": "g",
    "second": "s",
    "sec": "s",
    "liter": "L",
    "litre": "L",
    "ampere": "A",
    "amp": "A",
    "kelvin": "K",
    "joule": "J",
    "newton": "N",
    "watt": "W",
    "volt": "V",
    "coulomb": "C",
    "farad": "F",
    "henry": "H",
    "tesla": "T",
    "weber": "Wb",
    "pascal": "Pa",
    "hertz": "Hz",
    "mole": "mol",
    "ohm": "ohm",
    "kilohm": "kohm",
    "megohm": "Mohm",
    "celsius": "degC",
    "fahrenheit": "degF",
    "molar": "M",
    "electronvolt": "eV",
    "calorie": "cal",
    "radian": "rad",
    "parsec": "pc",
    "minute": "min",
    "hour": "h",
    "hr": "h",
    "day": "d",
    "year": "yr",
    "degree": "deg",
    "atmosphere": "atm",
    "dollar": "dollar",
    "usd": "dollar",
    "cc": "cm3",
}
CURRENCIES = {"€": "euro", "£": "pound", "¥": "yen", "₹": "rupee"}
# The power that a word gives to the factor before or after it.
POWERS = {"squared": 2, "cubed": 3}
POWERS_BEFORE = {"square": 2, "sq": 2, "cubic": 3}

TOKEN = re.compile(
    r"\s*(?:(?P<word>[A-Za-z]+)(?:\^?\{?(?P<power>-?\d{1,2})\}?)?"
    r"|(?P<over>/)|(?P<sign>\\cdot|\\times|[*().,{}-]))"
)


def unit_factors(text: str) -> dict[str, int] | None:
    r"""{symbol: power} of a unit, {} if the text is empty; None if the text is no unit.

    text: as plain_signs gives it. All that stands behind a slash is in the denominator.
    """
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"\1/\2", text).strip().rstrip(".")
    text = re.sub(r"\bdeg(?:rees?)?\s{0,3}(?:[Cc]elsius|C)\b", "degC", text)
    text = re.sub(r"\bdeg(?:rees?)?\s{0,3}(?:[Ff]ahrenheit|F)\b", "degF", text)
    text = re.sub(r"\bmm\s{0,3}Hg\b", "mmHg", text)
    factors: dict[str, int] = {}
    sign, before, last = 1, 1, ""
    position = 0
    while position < len(text):
        match = TOKEN.match(text, position)
        if match is None:
            return None
        position = match.end()
        word = match["word"]
        if match["over"] or word == "per":
            sign = -1
        elif word in POWERS and last:
            factors[last] *= POWERS[word]
        elif word in POWERS_BEFORE:
            before = POWERS_BEFORE[word]
        elif word:
            last = symbol_of(word)
            if not last or len(factors) == MOST_FACTORS:
                return None
            factors[last] = factors.get(last, 0) + sign * before * int(match["power"] or 1)
            before = 1
    return factors


def symbol_of(word: str) -> str:
    """The one spelling of a unit's symbol or word; "" if it can be no unit."""
    if re.fullmatch("[munkcd]?l", word):
        return word[:-1] + "L"
    if is_symbol(word):
        return word
    lower = word.lower()
    if lower in NO_UNITS and lower != "second":
        return ""
    singular = lower[:-1] if len(lower) > 3 and lower[-1] == "s" and lower[-2] != "s" else lower
    for name in (lower, singular):
        if name in NAMES:
            return NAMES[name]
    for prefix, letter in PREFIXES.items():
        if singular.startswith(prefix) and singular.removeprefix(prefix) in NAMES:
            return letter + NAMES[singular.removeprefix(prefix)]
    is_word = len(word) > 2 and re.search("[aeiouy]", lower)
    return singular if is_word else ""


def is_symbol(word: str) -> bool:
    """Is this the symbol of a unit, with or without a prefix?"""
    if word in BASES or word in OTHERS:
        return True
    return word[:1] in PREFIXES.values() and word[1:] in BASES


def plain_signs(text: str) -> str:
    r"""The bare text with names for signs: ° as deg, \mu as u, \Omega as ohm, \AA as angstrom."""
    for sign, name in CURRENCIES.items():
        text = re.sub(rf"^([-+]?)\s?{sign}\s?(?=[\d.])(.*)", rf"\1\2 {name}", text)
        text = text.replace(sign, name)
    text = re.sub(r"\^\s?\\circ\b|\^\{\s?\\circ\s?\}|\\circ\b|°", " deg ", text)
    text = re.sub(r"(?:\\mu\b|[µμ])\s?(?=[A-Za-z])", "u", text)
    text = re.sub(r"\\Omega\b|[ΩΩ]", "ohm", text)
    return re.sub(r"\\AA\b|\\r\{A\}|[ÅÅ]", " angstrom", text)
