r"""Which option of a multiple-choice question does a response name? "(C) 5 J" → C.

    stated    "Answer: C", \boxed{C}, "C is correct", "so C", the letter alone or before its text
    denied    "not C", "C is wrong", "rules out C"
    doubted   "maybe C", "or C", "C?", "C could be right"
    neither   all other letters: "vitamin C", "5 C", "A car", "I think", "because C is larger"

The last line that says what the answer is counts. It must state one option, and neither this line
nor a later one may put forward another. "No", "wait" and the like take back what came before them.
Verdicts ("C is correct") and labels ("C. 5 J") count where no line says what the answer is; then
all must agree. The text of an option may name others: "D) A and B only", "C. I and III".

All takes time in proportion to the text, because a model wrote it.
"""

import re
from typing import NamedTuple

from checkers.latex import bare

LONGEST_SENTENCE = 2000  # characters; a longer one says nothing that is read here
WINDOW = 160  # characters before and after a letter that decide what is said of it

# How firmly a letter is stated.
LABEL, VERDICT, ANSWER, ALONE = 1, 2, 3, 4


class Remark(NamedTuple):
    """What a sentence says of one or more options."""

    kind: str  # "stated", "denied", "doubted" or "taken back"
    letters: frozenset[str] = frozenset()
    strength: int = 0  # of a statement
    line: int = 0


def words(text: str) -> str:
    """A pattern for one of these words; _ stands for white space."""
    return r"\b(?:" + "|".join(text.split()).replace("_", r"\s+") + r")\b"


# ---------------- words before a letter ----------------

# Words that may stand between "the answer" and the letter.
FILLERS = (
    "is are was be being been to seems seem appears must should would will has have the a an it "
    "that this these here therefore thus clearly indeed simply definitely certainly obviously "
    "hence so now then finally consequently accordingly overall ultimately but ie option options "
    "choice choices letter answer answers statement one correct right best final only just even "
    "my our your I I'm I'd I'll we think believe feel say guess suppose conclude choose chose pick "
    "select most likely probably in fact question problem for yes given by above well of_course "
    r"\d{1,3}"
)
FILLED = rf"[\s,:=()-]{{0,6}}(?:{words(FILLERS)}[\s,:=()-]{{0,6}}){{0,14}}$"
LINK = re.compile(
    r"[:=-]|" + words("is are was be seems appears will I we choose chose pick select")
)
# "The answer is"; what stands between the noun and the letter must have a LINK.
NOUN = re.compile(
    words(
        "answers? ans solution response conclusion options? choices? letter selection result "
        r"(?:right|correct|best|proper|true|final|appropriate|accurate)_\w{2,12} "
        "(?:statement|one)_(?:that|which)_is_(?:true|correct|right)"
    )
    + f"(?={FILLED})",
    re.IGNORECASE,
)
DIRECT = re.compile(r"\bans(?:wer)?[\s(]{0,4}$", re.IGNORECASE)  # "Answer B"
CHOICE = re.compile(
    words(
        "choose chose choosing picks? picked select selects selected go_with going_with went_with "
        "go_for going_for went_for opt_for opting_for vote_for vote settle_on bet_on stick_with "
        "(?:corresponds?_to|match(?:es|ing)?|which_is|this_is|that_is)_(?:the_)?(?:option|choice)"
    )
    + FILLED,
    re.IGNORECASE,
)
CONCLUSION = re.compile(
    words(
        "so thus hence therefore then consequently accordingly finally conclude leaving leaves "
        "leave left_with must_be has_to_be would_be should_be I'm_sure am_sure sure_that confident"
    )
    + FILLED,
    re.IGNORECASE,
)
# "We get C." says what the answer is only if the sentence ends there.
OBTAINED = re.compile(
    words("(?:we|I|you)_(?:get|got|obtain|obtained) which_is") + FILLED,
    re.IGNORECASE,
)
SENTENCE_OVER = re.compile(r"[\s:.!)]{0,6}$")
DENIED_BEFORE = re.compile(
    "(?:"
    + words(
        "not never neither nor except excluding excludes? excluded unlike cannot rather_than "
        r"instead_of other_than ruling_out ruled_out rules?_out eliminat\w+ discard\w* reject\w* "
        r"dismiss\w* doubt against (?:anything|everything|all|any)_but "
        "not_the_case_that not_true_that false_that untrue_that"
    )
    + r"|n't\s{1,3}(?:the\s{1,3}case|true)\s{1,3}that\b|n't\b)"
    + FILLED,
    re.IGNORECASE,
)
DOUBTED_BEFORE = re.compile(
    words(
        "or maybe perhaps possibly might could may either alternatively unless also both whether "
        "otherwise else if_not as_well_as along_with together_with plus in_addition_to as_is so_is "
        "as_does so_does same_for likewise equivalently equally second_(?:guess|choice|pick|best)"
    )
    + FILLED,
    re.IGNORECASE,
)
# Where a clause begins that says no more than the letter.
BARE_BEFORE = re.compile(rf"(?:^|[,;:(/]|\s-\s|\bbut\b){FILLED}", re.IGNORECASE)
# "One might think B", "B might seem right" of an option that is then denied
CONCEDED_BEFORE = re.compile(
    words("one some many people students you")
    + r"\s{1,3}"
    + words("might may could")
    + r"[^,;]{0,40}$",
    re.IGNORECASE,
)
QUESTION = re.compile(r"why\b", re.IGNORECASE)
NAME = re.compile(r"\b[A-HJ-Z]\b")
# Between two letters that are not told apart: A then B, A -> B
JOINED = re.compile(r"\s{0,3}(?:[=-]{0,2}>|then|to|through|vs|with)?\s{0,3}", re.IGNORECASE)
# After two letters: A if x > 0 and B if x < 0
CONDITION = re.compile(r":?\s{1,3}(?:if|when|for(?!\s{1,3}sure))\b", re.IGNORECASE)
# From here to the next conclusion, a sentence gives reasons.
REASON = re.compile(
    words("because since as due_to given_that while whereas although though"), re.IGNORECASE
)
TAKEN_BACK = re.compile(
    r"(?:^|[\s,;.!?-])(?:no|nope|wait|hmm|sorry|correction|scratch that|let me correct|"
    r"on second thought)\s{0,3}(?:[,.:;!-]|$)",
    re.IGNORECASE,
)
CORRECTED = re.compile(words("actually rather I_mean correction instead no wait"), re.IGNORECASE)

# ---------------- words after a letter ----------------

# "is not", "would violate", "is a common distractor"
VERBS = words(
    "is are was were be been being can could would will should must may might has have does do "
    "looks? seems? appears? sounds? turns_out to"
)
ADVERBS = words(
    "a an the also all both clearly obviously definitely certainly simply therefore thus just "
    "common only actually then indeed too most very completely now still probably likely my our "
    "final to_be"
)
STEPS = rf"(?:\s{{1,3}}(?:{VERBS}|{ADVERBS})){{0,6}}"
WRONG = words(
    "not never no wrong incorrect false invalid impossible excluded eliminated ruled_out out "
    "violates? fails? contradicts? distractors? implausible unlikely untrue inconsistent "
    "discarded rejected cannot unsuitable inappropriate inaccurate"
)
RIGHT = words(
    "right correct true best answer valid appropriate accurate fits works holds matches remains "
    "satisfies it option choice one pick likely supported closest nearest better(?!_than)"
)
DENIED_AFTER = re.compile(rf":?{STEPS}(?:\s{{1,3}}{WRONG}|n't\b)", re.IGNORECASE)
# "B) Not enough information", "C: No change": the option's own text
TEXT_AFTER = re.compile(
    rf":\s{{1,3}}(?:Not|No|Never)\s{{1,3}}(?!{RIGHT}|{WRONG}|{ADVERBS}|{VERBS})[a-z]"
)
FALSE_AFTER = re.compile(r":\s{1,3}(?:False|No|Never|Impossible|Invalid|Inconsistent)\b")
VERDICT_AFTER = re.compile(
    rf":?{STEPS}\s{{1,3}}{RIGHT}|:?\s{{1,3}}is[.!\s]{{0,3}}$|\s{{1,3}}as\s{{1,3}}the\s{{1,3}}"
    r"(?:(?:correct|right|best|final)\s{1,3})?(?:answer|option|choice)\b",
    re.IGNORECASE,
)
DOUBTED_AFTER = re.compile(
    r":?\s{0,3}\?|:?(?:\s{1,3}(?:is|are|also|seems|looks|sounds)){0,4}\s{1,3}"
    + words("could may might possibly maybe perhaps also possible plausible")
    + r"|(?:\s{1,3}is)?\s{1,3}(?:too|as well)\s{0,3}(?:[.,;!)]|$)",
    re.IGNORECASE,
)
CONCEDED_AFTER = re.compile(
    rf":?\s{{1,3}}{words('might may could')}\s{{1,3}}{words('seem look appear sound be_tempting')}",
    re.IGNORECASE,
)
BARE_AFTER = re.compile(
    r"\s{0,3}(?:$|[:,;.!()/]|-\s|"
    + words(
        "because since as due for given and but so not rather instead which while whereas "
        "of_course obviously definitely for_sure I_think I_guess I_believe it_is"
    )
    + ")",
    re.IGNORECASE,
)

# ---------------- finding the letters ----------------

# A letter that may stand for an option. One that touches a sign is none: A_1, A's, A-level.
MENTION = re.compile(
    r"(?<![\w'^_\\.<>])(?:\(\s?(?P<enclosed>[A-Z])\s?\)"
    r"|(?P<letter>[A-Z])(?:(?P<closed>\.?\s?\))|(?![\w'^_<>\\(]|-\w|\.[A-Z]\b|\s?[=<>^])))"
)
# Before a single letter, a word other than these makes it a name: vitamin C, point A.
NEAR = frozenset(FILLERS.lower().split()) | frozenset(
    "and or not nor neither either both all maybe perhaps possibly might could may cannot isn't "
    "wasn't can't excluding exclude excludes excluded unlike than out eliminate eliminates "
    "eliminated eliminating discard reject rejected dismiss with for of between because since as "
    "while whereas although though if when picks picked selects selected choosing vote bet on "
    "leaving leaves leave remains no wait actually rather ans solution response conclusion "
    "selection result whether unless alternatively except solutions letters note true proper "
    "confident sure meaning namely also through vs course otherwise else plus equivalently equally "
    "get gets got obtain obtained obtains give gives giving yield yields make makes making".split()
)
# Where I is a Roman numeral: "I and III", "I only", "Only I", "statement I"
ROMAN_AFTER = re.compile(
    r"(?:\s?[,;/&:-])?\s{0,3}(?:(?:and|or|nor)\s{1,3})?\(?(?:I{2,3}|I?V)\b|\s{1,3}only\b",
    re.IGNORECASE,
)
ROMAN_BEFORE = re.compile(
    r"\b(?:Only|[Ss]tatements?|(?:I{2,3}|I?V)\)?(?:,|,?\s{1,3}(?:and|or|nor)|\s?&))\s{0,3}$"
)
LETTERS = "ABCDEFGHIJ"  # of most options; others need a label's shape or a word before them
OPTION_BEFORE = re.compile(words("options? choices? answers? letter"), re.IGNORECASE)
LABEL_AFTER = re.compile(r"\s{0,3}(?:[.:]|$)")
LAST_WORD = re.compile(r"([A-Za-z']+)\s*$")
ARGUMENT = re.compile(r"\w\((?:[A-Z]\s?[|,]\s?)?$")
NUMBER_BEFORE = re.compile(r"\d\s*$")
# After the article A and the pronoun I stand other words than after the options of that name.
NEXT_WORD = re.compile(r"\s{1,3}([a-z][a-z']*)")
AFTER_A = frozenset(
    "is isn't was wasn't and or nor but because since as not only would could might may can can't "
    "cannot must should seems looks fits works has does doesn't violates with by for here which "
    "that instead rather too also remains alone if unless while whereas then so due given in on "
    "to contradicts fails matches holds satisfies depends are were coincide differ the".split()
)
AFTER_I = frozenset("is isn't and or nor because since not only".split())
AFTER = {"A": AFTER_A, "I": AFTER_I}

# One letter, or several in a row: [A], [B] or [C]. In "[A], [B] is wrong" only B is wrong.
SEPARATOR = (
    r"[\s,;/&+:-]{0,6}(?:\b(?:and/or|and|or)\b\s{0,3})?"
    r"(?:\b(?:option|choice|answer|letter)s?\b:?\s{0,3})?"
)
GROUP = re.compile(
    rf"\[[A-Z]\]:?(?:{SEPARATOR}\[[A-Z]\]:?(?!\s{{1,3}}(?:is|was|isn't|wasn't|has|does)\b))*"
)
LETTER = re.compile(r"\[([A-Z])\]")


def marked(sentence: str) -> str:
    """The sentence with brackets around each letter that may name an option: Answer: [C]: 5 J.

    A colon stands behind one with a closing parenthesis.
    """
    return MENTION.sub(mark, sentence)


def mark(match: re.Match) -> str:
    """What marked() makes of one letter."""
    if match["enclosed"]:
        if match["enclosed"] == "I" and is_roman(match):
            return match[0]
        return f"[{match['enclosed']}]:"
    if not is_option(match):
        return match[0]
    return f"[{match['letter']}]" + (":" if match["closed"] else "")


def is_roman(match: re.Match) -> bool:
    """Is this I a Roman numeral, by what stands beside it?"""
    text = match.string
    before = text[max(0, match.start() - 30) : match.start()]
    return bool(ROMAN_AFTER.match(text, match.end()) or ROMAN_BEFORE.search(before))


def is_option(match: re.Match) -> bool:
    """May a letter without parentheses name an option, by the words next to it?"""
    text, letter = match.string, match["letter"]
    before = text[max(0, match.start() - 30) : match.start()]
    if NUMBER_BEFORE.search(before) or before.rstrip().endswith(("=", "^", "\\")):
        return False  # a unit, or a variable
    if ARGUMENT.search(before):
        return False  # P(A)
    if letter == "I" and is_roman(match):
        return False
    if letter not in LETTERS and not (
        match["closed"]
        or OPTION_BEFORE.search(before)
        or (not before.strip(" (") and LABEL_AFTER.match(text, match.end()))
    ):
        return False
    last_word = LAST_WORD.search(before)
    if last_word and last_word[1].lower() not in NEAR:
        return False
    next_word = NEXT_WORD.match(text, match.end())
    if match["closed"] or not next_word or letter not in AFTER:
        return True
    return next_word[1] in AFTER[letter]


# ---------------- what a sentence says ----------------


def remarks_of(sentence: str, line: int) -> list[Remark]:
    """What a marked sentence says of the options that it names."""
    if len(sentence) > LONGEST_SENTENCE or QUESTION.match(sentence):
        return []
    groups = list(GROUP.finditer(sentence))
    start = groups[0].start() if groups else len(sentence)
    remarks = []
    if TAKEN_BACK.search(sentence[: min(start, WINDOW)]):
        remarks.append(Remark("taken back", line=line))
    conditions = sum(1 for group in groups if CONDITION.match(sentence, group.end()))
    in_reason = False
    starts_with_reason = REASON.match(sentence) is not None
    previous_end = 0
    for group, following in zip(groups, [*groups[1:], None]):
        before = sentence[previous_end : group.start()]
        after = sentence[group.end() : following.start() if following else None][:WINDOW]
        in_reason = gives_reason(before, in_reason, starts_with_reason)
        kind, strength = judged(before[-WINDOW:], group[0], after, in_reason)
        if previous_end and JOINED.fullmatch(before):
            kind = "doubted"
        if conditions > 1 and kind == "stated" and not in_reason and CONDITION.match(after):
            kind = "doubted"
        if kind != "stated" or strength:
            letters = frozenset(LETTER.findall(group[0]))
            remarks.append(Remark(kind, letters, strength, line))
        previous_end = group.end()
    if CORRECTED.match(sentence) and any(remark.kind == "stated" for remark in remarks):
        return [Remark("taken back"), *remarks]
    return remarks


def gives_reason(before: str, in_reason: bool, starts_with_reason: bool) -> bool:
    """Does the sentence give reasons where this text ends? in_reason: did it where it begins?"""
    end = before[-WINDOW:]
    if CONCLUSION.search(end) or NOUN.search(end):
        return False
    if in_reason and starts_with_reason and re.search(r",\s{0,3}$", end):
        return False  # Since A is wrong, B
    return in_reason or REASON.search(before) is not None


def judged(before: str, group: str, after: str, in_reason: bool) -> tuple[str, int]:
    """(kind, strength) of what is said of a group of letters; ("stated", 0) if nothing is."""
    if group.endswith(":"):
        after = ":" + after
    own_text = TEXT_AFTER.match(after) or (FALSE_AFTER.match(after) and states_answer(before))
    if DENIED_AFTER.match(after) and not own_text:
        return "denied", 0
    if is_doubted(before, after):
        return "doubted", 0
    if DENIED_BEFORE.search(before):
        return "denied", 0
    return "stated", 0 if in_reason else stated_strength(before, group, after)


def stated_strength(before: str, group: str, after: str) -> int:
    """How firmly the text around a group of letters states them; 0 if it does not."""
    if states_answer(before):
        return ANSWER
    if VERDICT_AFTER.match(after):
        return VERDICT
    if not BARE_AFTER.match(after):
        return 0
    if CONCLUSION.search(before):
        return ANSWER
    if OBTAINED.search(before) and SENTENCE_OVER.match(after):
        return VERDICT
    bare_before = BARE_BEFORE.search(before)
    if bare_before and not NAME.search(bare_before[0]):
        return LABEL if after.strip(" :.!)") or before.strip(" (") else ALONE
    return LABEL if group.endswith(":") and not after.strip(" :.!") else 0  # 5 J (B)


def is_doubted(before: str, after: str) -> bool:
    """Is the option one of several that are possible?

    Not in "vitamin B or [C]", where "or" joins two names.
    """
    if re.search(r"(?<![\w\]])[A-Z]\s{1,3}(?:or|and)\s{1,3}$", before):
        return False
    if CONCEDED_BEFORE.search(before) or CONCEDED_AFTER.match(after):
        return False
    return bool(DOUBTED_BEFORE.search(before) or DOUBTED_AFTER.match(after))


def states_answer(before: str) -> bool:
    """Does the text before a letter say that this is the answer?"""
    if DIRECT.search(before) or CHOICE.search(before):
        return True
    return any(LINK.search(before, match.end()) for match in NOUN.finditer(before))


# ---------------- what the whole text says ----------------

# Spellings that are brought to one: (what is matched, what becomes of it). A box is an answer;
# boxes side by side are one.
SPELLINGS = [
    # Behind a label, what is between quotation marks is the option's own text.
    (re.compile(r"(?<=\b[A-Z][.):])\s{0,3}[\"“][^\"“”\n]{4,200}[\"”]"), " its own text"),
    (re.compile(r"∴|\\therefore\b"), " therefore "),
    (re.compile(r"\b(answer|option|choice)\s{0,3}(?:[=-]{1,2}>|→|⇒)", re.IGNORECASE), r"\1: "),
    (re.compile(r"^[ \t$]{0,9}(?:=>|→|⇒|\\Rightarrow\b)", re.MULTILINE), "so "),
    (re.compile(r"<([A-Z])>(?=[ \t.]{0,9}$)", re.MULTILINE), r"(\1)"),  # not HTML: <B>bold</B>
    (re.compile(r"(?<![\w(])([A-Z])\s?\|\s?(?=[A-Z]\b)"), r"\1/"),
    (re.compile(r"\}[\s,;$]{0,20}\\(?:boxed|fbox)\b\s{0,3}"), ", answer: "),
    (re.compile(r"\\(?:boxed|fbox)\b\s{0,3}|\banswer\s?=", re.IGNORECASE), " answer: "),
    (re.compile(r"\s?[—–―]\s?|\s--\s"), " - "),
    (re.compile(r"\.{2,}|…"), ". "),
    (re.compile(r"\be\.g\.|\bi\.e\.", re.IGNORECASE), " ie "),
    (re.compile(r"\b(vs|cf|ans|approx|eq|fig|no)\.(?= )", re.IGNORECASE), r"\1"),
    (re.compile(r"\b(answer|choice|option|it|that|what)['’]s\b", re.IGNORECASE), r"\1 is"),
    (re.compile(r"(?<!\w)['_]{1,2}([A-Za-z])['_]{1,2}(?!\w)"), r"\1"),
    (re.compile(r"[\"“”*✓✔✅☑]"), ""),
    (re.compile(r"[‘’]"), "'"),
    # "The answer is:" goes on in the next line.
    (re.compile(r"(\b(?:answer|option|choice)\b[^\n.]{0,40}(?::|\bis))[ \t$]{0,9}\n\s*"), r"\1 "),
    (re.compile(r"(?<=[A-Z])[ \t]+\d[.)][ \t]+(?=\(?[A-Z]\b)"), ", "),  # 1. A 2. B
]
BRACKETS = str.maketrans({"{": " ", "}": " ", "[": "(", "]": ")"})
LINE_START = re.compile(r"^[\s>#*•-]+")
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
# A label at the start of a line, also after "The answer is"
LEADING_LABEL = re.compile(
    r"(?:[\w' ]{0,40}\b(?:answer|option|choice)\b(?:\s{1,2}(?:is|option|choice)\b|[\s:-]){0,6})?"
    r"\(?\s?(?P<label>[A-Za-z])\s?(?:\)[.:]?|[.:])\s{1,3}",
    re.IGNORECASE,
)
# An option's own text that names others, or denies
OWN_TEXT = re.compile(
    r"(?:(?i:both|neither|all of the above)|Either)\b[^.!?;]{0,200}"
    r"|\(?[A-Z]\)?(?:,\s{1,3}\(?[A-Z]\)?){0,6},?\s{1,3}and\s{1,3}\(?[A-Z]\)?"
    r"(?:\s{1,3}only)?(?=[\s.)]{0,5}$)"
    r"|No,(?=\s{1,3}(?!(?:I|it|that|this|sorry|wait|actually|let|the answer)\b)[^A-Z]{1,400}$)"
)
HEDGE = re.compile(words("might may could perhaps maybe possibly also too"), re.IGNORECASE)
SMALL = re.compile(r"(?<![\w'^_\\.<>=-])[a-j](?![\w'^_<>\\(=-])")


def option_of_response(text: str) -> str | None:
    """The letter of the one option that a response names; None if it names none or several.

    text: all that follows </think>, or the content of <answer>. Small letters count only where no
    large one does.
    """
    for pattern, replacement in SPELLINGS:
        text = pattern.sub(replacement, text)
    for spelling in (text, SMALL.sub(large, text)):
        remarks = read_remarks(spelling)
        if remarks:
            return chosen(remarks)
    return None


def large(match: re.Match) -> str:
    """The match in capital letters."""
    return match[0].upper()


def read_remarks(text: str) -> list[Remark]:
    """What the text says of options, in its order."""
    remarks = []
    lines = [content for content in text.splitlines() if content.strip()]
    for line, content in enumerate(lines):
        found = []
        sentences = SENTENCE_END.split(without_own_text(LINE_START.sub("", content).strip()))
        for sentence in sentences:
            plain = bare(sentence).translate(BRACKETS).strip()
            found += remarks_of(marked(plain), line)
        remarks += found if len(sentences) == 1 else [not_alone(remark) for remark in found]
    return remarks


def without_own_text(line: str) -> str:
    """The line without the other letters in the text of its option: D) A and B only → D) its text.

    Not if the text names the label too, or doubts: "A. Either A or C", "A. Both may be".
    """
    plain = bare(line).translate(BRACKETS).replace("$", "").strip()
    label = LEADING_LABEL.match(plain)
    own_text = OWN_TEXT.match(plain, label.end()) if label else None
    if not own_text or HEDGE.search(own_text[0]):
        return line
    if re.search(rf"(?<![\w']){label['label']}(?![\w'])", own_text[0]):
        return line
    return f"{plain[: label.end()]}its text{plain[own_text.end() :]}"


def not_alone(remark: Remark) -> Remark:
    """The remark on a line that says more: its letter is a label, as in "B. Mitochondria"."""
    return remark._replace(strength=LABEL) if remark.strength == ALONE else remark


def chosen(remarks: list[Remark]) -> str | None:
    """The one option that remains; see the head of the file."""
    start = 1 + max((i for i, x in enumerate(remarks) if x.kind == "taken back"), default=-1)
    statements = [remark for remark in remarks[start:] if remark.kind == "stated"]
    if not statements:
        return None
    counted = firmest(statements)
    letters = union(counted)
    later = [remark for remark in remarks[start:] if remark.line >= counted[-1].line]
    denied = union([remark for remark in later if remark.kind == "denied"])
    doubted = union([remark for remark in later if remark.kind == "doubted"])
    if len(letters) != 1 or letters & denied or doubted - letters - denied:
        return None
    return min(letters)


def firmest(statements: list[Remark]) -> list[Remark]:
    """The statements that count: those on the last line that says what the answer is.

    Of these lines, what comes before the answer does not count ("B is true. So it is C."). Lines
    next to each other that say it must agree: a later answer replaces an earlier one only if
    something was said in between. Lines of nothing but a letter must agree. So must all verdicts
    or labels, if there is no line that says what the answer is.
    """
    firm = [remark for remark in statements if remark.strength >= ANSWER]
    if not firm:
        strength = max(remark.strength for remark in statements)
        lines = {remark.line for remark in statements if remark.strength == strength}
        return [remark for remark in statements if remark.line in lines]
    if firm[-1].strength == ALONE:
        return [remark for remark in firm if remark.strength == ALONE]
    lines = {firm[-1].line}
    for remark in reversed(firm):
        if remark.line + 1 in lines:
            lines.add(remark.line)
    counted = [remark for remark in statements if remark.line in lines]
    while counted[0].strength < ANSWER:
        del counted[0]
    return counted


def union(remarks: list[Remark]) -> frozenset[str]:
    """The letters of all remarks."""
    return frozenset().union(*(remark.letters for remark in remarks))
