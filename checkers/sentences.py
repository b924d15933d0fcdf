r"""Sentences and tokens of a text, by rules that need no data.

    split_sentences   the sentences of IFEval's own rules
    punkt_sentences   the sentences of NLTK's Punkt model for English
    tokenize          the tokens of NLTK's word_tokenize: words and punctuation marks

Verdicts of constraints depend on them, so they follow the originals, quirks included. Punkt knows
20,000 words; the few here give its verdict where it does not turn on a rare word behind an
abbreviation. All take time in proportion to the text.
"""

import re

# ---------------- IFEval's sentences ----------------
# A sentence ends after each . ? and !, but for some periods. While the rules are applied, KEPT
# stands for a period that ends nothing, and END for the end of a sentence.

KEPT, END = "\ue000", "\ue001"


def keep(match: re.Match) -> str:
    """The match, with its periods kept."""
    return match[0].replace(".", KEPT)


def keep_and_end(match: re.Match) -> str:
    """The match with its periods kept, and the end of a sentence behind it."""
    return keep(match) + END


def end(match: re.Match) -> str:
    """The match, and the end of a sentence behind it."""
    return match[0] + END


def end_without_period(match: re.Match) -> str:
    """The match without its last character, which is a period, and the end of a sentence."""
    return match[0][:-1] + END


STARTER = (
    "(?:Mr|Mrs|Ms|Dr|Prof|Capt|Cpt|Lt|Wherever"
    r"|(?:He|She|It|They|Their|Our|We|But|However|That|This)\s)"
)
PERIOD_RULES = [  # in this order: (what is matched, what becomes of it)
    (re.compile(r"(?:Mr|Mrs|Ms|Dr|St)\."), keep),
    (re.compile(r"\.(?:com|net|org|io|gov|edu|me)"), keep),
    (re.compile(r"[0-9]\.[0-9]"), keep),
    (re.compile(r"\.{2,}"), keep_and_end),
    (re.compile(r"Ph\.D\."), keep),
    (re.compile(r"\s[A-Za-z]\. "), keep),
    (re.compile(rf"(?:[A-Z]\.){{2,3}}(?= {STARTER})"), end),
    (re.compile(r"(?:[A-Za-z]\.){3}"), keep),
    (re.compile(r"(?:[A-Za-z]\.){2}"), keep),
    (re.compile(rf" (?:Inc|Ltd|Jr|Sr|Co)\.(?= {STARTER})"), end_without_period),
    (re.compile(r" (?:Inc|Ltd|Jr|Sr|Co)\."), keep),
    (re.compile(r" [A-Za-z]\."), keep),
]


def split_sentences(text: str) -> list[str]:
    """IFEval's sentences, without the space around them. A quote that ends one stands before . ? !.

    An empty string stands for a sentence of space alone, but not at the end.
    """
    text = f" {text}  ".replace("\n", " ")
    for pattern, replacement in PERIOD_RULES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\.”", "”.", text)
    text = re.sub(r'([.!?])"', r'"\1', text)
    text = re.sub(r"[.?!]", end, text)
    sentences = [sentence.replace(KEPT, ".").strip() for sentence in text.split(END)]
    if not sentences[-1]:
        sentences.pop()
    return sentences


# ---------------- Punkt's sentences ----------------

ABBREVIATIONS = frozenset(
    "a.m adm ala ariz aug ave bros calif co col colo conn corp cos ct d.c dec dr feb fla fri ft ga "
    "gen ill inc j.b j.c j.j j.k j.p j.r jan jr kan ky l.a lt ltd m.b.a maj messrs mg mich minn mr "
    "mrs ms n.c n.h n.j n.m n.y nev nov oct ok okla ore p.m pa ph.d prof r.i rep reps s.a s.c sen "
    "sep sept sr st sw tenn tues u.k u.n u.s u.s.a u.s.s.r va vs vt w.va wash wed wis yr "
    "c d e f g h k l m n p r s t v w".split()
)
# After an abbreviation or an ellipsis, one of these begins a sentence if its first letter is large.
SENTENCE_STARTERS = frozenset(
    "according although among both but despite even he however i if in indeed instead it many "
    "meanwhile moreover most nevertheless nonetheless nor sales separately similarly since so some "
    "the there these they this though thus under when while yet".split()
)
# After a single letter, these are no name.
NO_NAMES = SENTENCE_STARTERS | frozenset(
    "a after all an and are as at before by can did do for from her here his how is let my no not "
    "now of on one or our she that their then to today tomorrow was we what where who why will "
    "with without you your".split()
)
# In a set of characters: what may follow a mark without a space, but for the apostrophe.
NO_WORD = ')";}*:@({!?‘’“”«»\\[\\]'
MARK_INSIDE = re.compile(f"[.?!](?=['{NO_WORD}])")
WORD_BREAK = re.compile(f"-{{2,}}|(?=')|[{NO_WORD}]")
FIRST_WORD = re.compile(f"[^,'{NO_WORD}]*")
NUMBER = re.compile(r"-?[.,]?\d[\d,.-]*")
CLOSERS = re.compile(r"[\"')\]}‘’“”«»]*")


def punkt_sentences(text: str) -> list[str]:
    """Punkt's sentences, without the space around them."""
    words = list(re.finditer(r"\S+", text))
    sentences, start = [], 0
    for i, word in enumerate(words):
        next_word = words[i + 1][0] if i + 1 < len(words) else ""
        stop = sentence_end(word[0], next_word)
        if stop is not None:
            sentences.append(text[start : word.start() + stop].strip())
            start = word.start() + stop
    sentences.append(text[start:].strip())
    return [sentence for sentence in sentences if sentence]


def sentence_end(word: str, next_word: str) -> int | None:
    """How many characters of a word, which holds no space, belong to the sentence that it ends.

    None if it ends no sentence. next_word: what follows behind a space; "" at the end of the text.
    """
    if next_word and word[-1] in ".?!":
        stop = len(word)
    else:
        stop = max((mark.end() for mark in MARK_INSIDE.finditer(word)), default=None)
    if stop is None:
        return None
    rest = word[stop:]
    if not ends_sentence(word[:stop], rest[:1] or next_word):
        return None
    closers = CLOSERS.match(rest)[0]
    if len(closers) == len(rest) or rest.startswith("--", len(closers)):
        stop += len(closers)
    return stop


def ends_sentence(text: str, following: str) -> bool:
    """Does the mark that a text ends with end a sentence? following: what comes next."""
    if "?" in text or "!" in text:
        return True
    word = WORD_BREAK.split(text)[-1].lstrip("`&#,-").lower()
    name = word[:-1]
    next_word = FIRST_WORD.match(following)[0].removesuffix(".")
    is_large = next_word[:1].isupper()
    is_initial = len(name) == 1 and name.isalpha()
    is_abbreviation = name in ABBREVIATIONS or name.rpartition("-")[2] in ABBREVIATIONS
    if is_initial or NUMBER.fullmatch(name):
        if is_abbreviation or next_word[:1].islower() or following[0] in ";:,.!?":
            return False
        return not (is_initial and is_large) or next_word.lower() in NO_NAMES
    if is_abbreviation or word.endswith(".."):
        return is_large and next_word.lower() in SENTENCE_STARTERS
    return True


# ---------------- tokens ----------------
# By the conventions of the Penn Treebank: a mark is a token of its own, and so are the parts of
# contractions (do n't, can not). Double quotes become `` and ''.

TOKEN_RULES = [  # in this order
    (re.compile(r"[«“‘„]|``|`"), r" \g<0> "),
    (re.compile(r"([ (\[{<])(?:\"|'')"), r"\1 `` "),
    (re.compile(r"(?<!\w)'(?!(?:re|ve|ll|m|t|s|d|n)\b)(?=\w)", re.IGNORECASE), "' "),
    (re.compile(r"([:,])(\D)"), r" \1 \2"),
    (re.compile(r"\.{2,}|--|[;@#$%&?!*\[\](){}<>»”’‒-―]"), r" \g<0> "),
    (re.compile(r"\"|''"), " '' "),
    (re.compile(r"\s"), " "),
    (re.compile(r"(?<=[^' ])('[sSmMdD]?|'ll|'LL|'re|'RE|'ve|'VE|n't|N'T)(?= )"), r" \1"),
    (re.compile(r"\b(can)(not)\b", re.IGNORECASE), r" \1 \2 "),
    (re.compile(r"\b(gim|lem)(me)\b", re.IGNORECASE), r" \1 \2 "),
    (re.compile(r"\b(gon)(na)\b", re.IGNORECASE), r" \1 \2 "),
    (re.compile(r"\b(got)(ta)\b", re.IGNORECASE), r" \1 \2 "),
    (re.compile(r"\b(wan)(na)(?=\s)", re.IGNORECASE), r" \1 \2 "),
    (re.compile(r"\b(d)('ye)\b", re.IGNORECASE), r" \1 \2 "),
    (re.compile(r"\b(more)('n)\b", re.IGNORECASE), r" \1 \2 "),
    (re.compile(r" ('t)(is|was)\b", re.IGNORECASE), r" \1 \2 "),
]


def tokenize(text: str) -> list[str]:
    """The tokens of the text, sentence by sentence."""
    tokens = []
    for sentence in punkt_sentences(text):
        tokens += tokens_of_sentence(sentence)
    return tokens


def tokens_of_sentence(sentence: str) -> list[str]:
    """The tokens of one sentence; the period that ends it is one of them."""
    body = sentence.rstrip("])}>\"'»”’ ")
    if len(body) > 1 and body.endswith(".") and not body.endswith(".."):
        sentence = f"{body[:-1]} .{sentence[len(body) :]}"
    sentence = f" {sentence} "
    for pattern, replacement in TOKEN_RULES:
        sentence = pattern.sub(replacement, sentence)
    return sentence.split()
