"""Mathematics as models write it, in LaTeX or in plain text, brought to one spelling.

All functions are linear in the length of the text, because the text is a model's.
"""

import re
import unicodedata

LONGEST = 4000  # characters; a longer text is no short answer

# Characters → how LaTeX writes them.
SIGNS = str.maketrans(
    {
        # minus signs and dashes
        "−": "-",
        "–": "-",
        "—": "-",
        "‐": "-",
        "‑": "-",
        "‒": "-",
        "―": "-",
        # times, divided by
        "×": r"\times ",
        "✕": r"\times ",
        "·": r"\cdot ",
        "⋅": r"\cdot ",
        "•": r"\cdot ",
        "∙": r"\cdot ",
        "∗": "*",
        "÷": r"\div ",
        "∕": "/",
        "⁄": "/",
        # constants and functions
        "π": r"\pi ",
        "∞": r"\infty ",
        "√": r"\sqrt ",
        "∅": r"\emptyset ",
        "°": r"^\circ ",
        "º": r"^\circ ",
        "℃": r"^\circ C",
        "…": r"\ldots ",
        # relations and sets
        "≤": r"\le ",
        "≥": r"\ge ",
        "≠": r"\ne ",
        "≈": r"\approx ",
        "±": r"\pm ",
        "∪": r"\cup ",
        "∩": r"\cap ",
        "∈": r"\in ",
        # quotation marks of code
        "`": "",
        # spaces: thin ones may divide a number's thousands
        "\u2009": r"\,",
        "\u202f": r"\,",
        "\u00a0": "~",
        # signs of no width
        "\u200b": "",
        "\u200c": "",
        "\u200d": "",
        "\u2060": "",
        "\ufeff": "",
    }
)
SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n"))
SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789"))
FRACTION = re.compile("[¼½¾⅐-⅞]")

# Commands that other ones stand for.
SYNONYMS = {
    "dfrac": "frac",
    "tfrac": "frac",
    "cfrac": "frac",
    "dbinom": "binom",
    "tbinom": "binom",
    "varnothing": "emptyset",
    "leq": "le",
    "leqslant": "le",
    "geq": "ge",
    "geqslant": "ge",
    "neq": "ne",
    "dots": "ldots",
    "cdots": "ldots",
    "dotsc": "ldots",
    "ast": "times",
    "leqq": "le",
    "geqq": "ge",
    "lbrace": "{",
    "rbrace": "}",
    "lvert": "vert",
    "rvert": "vert",
}
# Commands that only change how things look.
LOOKS = frozenset(
    "left right big Big bigg Bigg bigl bigr Bigl Bigr displaystyle textstyle limits rm bf it sf tt "
    "bfseries itshape tiny small normalsize large Large LARGE huge Huge checkmark blacksquare "
    "square mathdollar cent pounds euro".split()
)
# Commands that a sign stands for.
PLAIN = {"colon": ":", "lt": "<", "gt": ">", "degree": r"^\circ "}
SPACES = frozenset(("quad", "qquad", "thinspace", "enspace"))
# Commands whose argument is set in another font. The argument counts, the font does not.
FONTS = frozenset(
    "text textbf textit textrm textsf texttt textnormal mbox mathrm mathbf mathit mathsf mathtt "
    "mathnormal boldsymbol bm operatorname emph underline".split()
)
WORDS = frozenset("text textbf textit textrm textsf texttt textnormal mbox emph".split())

# Spellings that are brought to one: (what is matched, what becomes of it). All are bounded.
SPELLINGS = [
    (re.compile(r"(?<=[\w)])\*\*(?=[\d(-])"), "^"),  # Python's power; else ** marks bold text
    (re.compile(r"\*\*"), ""),
    (re.compile(r"!=|/=|=/="), r"\\ne "),
    (re.compile(r">\s?="), r"\\ge "),
    (re.compile(r"<\s?="), r"\\le "),
    (re.compile(r"=="), "="),
    (re.compile(r"\\(?:color|textcolor|colorbox)\s?\{[^{}]{0,30}\}"), ""),
    (re.compile(r"\{([-+])\}"), r"\1"),
    (re.compile(r"\{([^{}\\]{1,20})\\over\s?([^{}\\]{1,20})\}"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\\\\[[^\]]{0,9}\]"), r"\\\\"),  # \\[4pt]
    (re.compile(r"\\\\\s{0,5}(?=&?\s?=)"), " "),  # a line of an equation that goes on
    (re.compile(r"\\(?:begin|end)\{(?:aligned|align\*?|split|gathered|equation\*?)\}|&(?==)"), ""),
    (re.compile(r"\^\s{0,3}\{\s{0,3}\\circ\s{0,3}\}|\^o(?![A-Za-z])"), r"^\\circ "),
]
# Signs around an answer that mean nothing.
DECORATION = ' \t\n\r*_"“”‘’•#✓✔✅;,。、'

TOKEN = re.compile(r"\\[A-Za-z]+\*?|\\.|.", re.DOTALL)


def one_spelling(text: str) -> str:
    """The text with LaTeX's spelling of what Unicode has a character for."""
    if text.isascii():
        return text.replace("`", "")
    text = FRACTION.sub(spell_fraction, text)
    text = spell_raised(text, SUPERSCRIPTS, "^")
    text = spell_raised(text, SUBSCRIPTS, "_")
    return unicodedata.normalize("NFKC", text.translate(SIGNS))


def spell_fraction(match: re.Match) -> str:
    """½ as \\frac{1}{2}."""
    numerator, denominator = unicodedata.normalize("NFKC", match[0]).split("⁄")
    return rf"\frac{{{numerator}}}{{{denominator}}}"


def spell_raised(text: str, digits: dict[str, str], mark: str) -> str:
    """A run of superscripts (or subscripts) as ^{…} (or _{…})."""
    pieces = []
    inside = False
    for character in text:
        raised = character in digits
        if raised and not inside:
            pieces.append(mark + "{")
        elif inside and not raised:
            pieces.append("}")
        pieces.append(digits[character] if raised else character)
        inside = raised
    if inside:
        pieces.append("}")
    return "".join(pieces)


def bare(text: str) -> str:
    r"""The text without dollars, fonts and looks, each command in its first spelling.

    \textbf{(B)}\ 5  →  (B)  5        $\dfrac{1}{2}$.  →  \frac{1}{2}        12\,345  →  12345
    """
    text = one_spelling(text[: LONGEST + 1])
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    pieces = []
    open_braces = []  # for each open brace, whether it is kept
    font = ""  # the font command whose argument must come next
    for token in TOKEN.findall(text):
        if font and token.isspace():
            continue
        if token == "{":
            open_braces.append(not font)
            pieces.append(" " if font in WORDS else "" if font else "{")
        elif token == "}" and open_braces:
            pieces.append("}" if open_braces.pop() else "")
        else:
            pieces.append(bare_token(token))
        font = token[1:].rstrip("*") if token[1:].rstrip("*") in FONTS else ""
    return join_thousands("".join(pieces)).rstrip("\\ ").strip(DECORATION)


def bare_token(token: str) -> str:
    """What bare() makes of one token other than a brace."""
    if token == "$":
        return ""
    if not token.startswith("\\") or token == "\\":
        return token
    name = token[1:].rstrip("*")
    if name in PLAIN:
        return PLAIN[name]
    if name in FONTS or name in LOOKS or name in ("(", ")", "[", "]", "!", "$"):
        return ""
    if name in SPACES or name in (":", ";", " "):
        return " "
    if name == ",":
        return "~"  # join_thousands looks for it
    if name == "%":
        return "%"
    return "\\" + SYNONYMS.get(name, name)


def join_thousands(text: str) -> str:
    """The text without the signs that divide a number's thousands, and with plain spaces.

    Thin spaces and {,} always divide thousands; a comma or a plain space may stand between two
    numbers, so closed_numbers decides about those.
    """
    text = re.sub(r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ",", text)
    text = re.sub(r"(?<=\d)\{~\}(?=\d{3}(?!\d))", "", text)
    text = re.sub(r"(?<=\d)~(?=\d{3}(?!\d))", "", text)
    return text.replace("~", " ")


def without_stop(text: str) -> str:
    """The text without a final full stop. The three in 0.333... are another thing."""
    text = text.strip()
    if text.endswith(".") and not text.endswith(".."):
        return text[:-1].rstrip()
    return text


def squeezed(text: str) -> str:
    """The bare text without white space, outer braces and a final full stop."""
    text = re.sub(r"(?<=\d)\s+(?=\d)", "\0", bare(text))  # 1 2/5 is not 12/5
    text = without_stop("".join(text.split()))
    closing_of = paired_braces(text)
    start, stop = 0, len(text) - 1
    while stop > start and closing_of.get(start) == stop:
        start, stop = start + 1, stop - 1
    return text[start : stop + 1]


def paired_braces(text: str) -> dict[int, int]:
    r"""{index of an opening brace: index of the one that closes it}. \{ is no brace."""
    closing_of = {}
    opened = []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing_of[opened.pop()] = match.start()
    return closing_of
