"""What a short prose text states: "So, the total is 30." → "30".

It is used where an answer stands in a sentence. All patterns are linear in the text's length.
"""

import re

LONGEST_LINE = 600  # characters; a statement is shorter
MOST_CANDIDATES = 12

# A sentence with one of these does not commit itself.
HEDGES = re.compile(
    r"\b(?:maybe|perhaps|possibly|probably|guess|unsure|uncertain|not|cannot|could|might|either|"
    r"neither|wrong|incorrect|unclear|unknown|unlikely|false|whether|suppose|mistake|ruled? out|"
    r"no one|nobody)\b|n't\b|\?|^if\b|\blet the answer\b",
    re.IGNORECASE,
)
# "The final answer is: 30", "Answer - 30", "**Answer:** 30"
ANSWER = re.compile(r"\banswers?\b", re.IGNORECASE)
AFTER_ANSWER = re.compile(
    r"[\s:=*-]*(?:(?:is|are|was|equals|be|comes to|of)\b[\s:=*]{0,9}){0,3}", re.IGNORECASE
)
STATED = re.compile(r"\banswers?\s{0,3}(?::|=|is\b)", re.IGNORECASE)
BEGINS = re.compile(r"(?:the\s)?(?:final\s|correct\s)?answers?\b", re.IGNORECASE)
# Words before what a sentence states.
LEAD = re.compile(
    r"(?<![A-Za-z])(?:is|are|was|were|be|it's|equals?|equal to|get|gets|gives?|given by|obtain|"
    r"have|has|had|find|found|yields?|makes?|costs?|takes?|needs?|leaves?|sold|spends?|spent|runs?|"
    r"simplifies to|reduces to|total of|probability of|average of|totals?|conclude|so|thus|hence|"
    r"then|therefore|finally)(?![A-Za-z])[\s,:]*|:\s+|→|\\(?:right|Right)arrow|\\to\b",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
REMARK_WORDS = 12
# What follows a statement: a reason, or words in parentheses
BEHIND = re.compile(r",?\s(?:since|because|as)\s[^=]{0,200}$|\s\([A-Za-z -]{1,60}\)\.?$")
BARE_NUMBER = re.compile(r"[-\d.,\s]+")


def is_hedged(text: str) -> bool:
    """Does the text not commit itself to what it says?"""
    return HEDGES.search(text) is not None


def statements_of(text: str) -> list[str]:
    """What the text's last line may state, the likeliest first; none if it is hedged.

    A line that states two different answers states none.
    """
    lines = lines_of(text)
    if not lines or len(answers_of(lines)) > 1:
        return []
    line = lines[-1]
    if line.startswith("####"):  # how the solutions of GSM8K end
        return [line.strip("# ")]
    sentences = [sentence.strip() for sentence in SENTENCE_END.split(line)]
    while len(sentences) > 1 and is_remark(sentences[-1]):
        sentences.pop()
    if is_hedged(sentences[-1]):
        return []
    answers = [after_answer(sentence) for sentence in sentences if ANSWER.search(sentence)]
    if len(set(answers)) > 1 or len(STATED.findall(sentences[-1])) > 1:
        return []
    if answers and ANSWER.search(sentences[-1]):
        return [answers[0], *after_leads(answers[0])]
    statements = after_leads(sentences[-1])
    if len(text.strip().splitlines()) > 1 and not any(
        BARE_NUMBER.fullmatch(other) for other in lines[:-1]
    ):
        statements.append(trimmed(line))  # a line of its own
    return statements


def answers_of(lines: list[str]) -> set[str]:
    """What the lines that begin with "the answer is" or #### say that the answer is."""
    answers = set()
    for line in lines:
        if line.startswith("####"):
            answers.add(line.strip("# "))
        elif BEGINS.match(line) and after_answer(line):
            answers.add(after_answer(line))
    return answers


def lines_of(text: str) -> list[str]:
    """The text's last lines up to the last one that says something. "I hope so." says nothing."""
    lines = [line.strip(" \t>*") for line in text[-2 * LONGEST_LINE :].splitlines()]
    lines = [line[-LONGEST_LINE:] for line in lines if line]
    while len(lines) > 1 and is_remark(lines[-1]):
        lines.pop()
    return lines


def is_remark(sentence: str) -> bool:
    """Is this a closing remark, such as "I hope it is correct."?"""
    if re.search(r"[\d\\=$]", sentence) or ANSWER.search(sentence) or is_hedged(sentence):
        return False
    return 2 <= len(sentence.split()) <= REMARK_WORDS and sentence.endswith((".", "!"))


def after_answer(sentence: str) -> str:
    """What follows "the answer is" in a sentence."""
    last = None
    for match in ANSWER.finditer(sentence):
        last = match
    rest = sentence[last.end() :]
    return trimmed(rest[AFTER_ANSWER.match(rest).end() :])


def after_leads(sentence: str) -> list[str]:
    """What follows each of the last words such as "is" in a sentence; the shortest text first."""
    ends = [match.end() for match in LEAD.finditer(sentence)]
    return [trimmed(sentence[end:]) for end in reversed(ends[-MOST_CANDIDATES:])]


def trimmed(text: str) -> str:
    """The text without the punctuation around it."""
    text = BEHIND.sub("", text.strip(" \t\n*,:;"))
    return text.strip(" \t\n*,:;").removesuffix(".").strip(" *")
