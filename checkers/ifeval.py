"""Instruction constraints that need no package: IFEval's (arXiv 2311.07911), and the toy's own.

CONSTRAINTS: id → function(text, kwargs) → is the constraint met? It includes checkers.ifevalg's.
The names in kwargs are IFEval's, and the verdicts those of IFEval's checkers, quirks included, so
that a row means the same here. All take time in proportion to the text. What only the package
if-verifiable knows is judged by it, in a worker process (checkers.workers).
"""

import importlib.util
import json
import re

from checkers import ifevalg
from checkers.constraint_arguments import IFBENCH, IFEVAL, arguments_of
from checkers.ifevalg import compare
from checkers.patterns import Indigestible, Undecided, count_matches
from checkers.sentences import punkt_sentences, tokenize
from checkers.workers import ask_workers
from common.errors import UserError
from common.rows import words_of

# ---------------- keywords ----------------


def keywords_exist(text: str, kwargs: dict) -> bool:
    """Each of `keywords` (regular expressions, as in IFEval) occurs, in any case."""
    return all(count_matches(keyword, text) > 0 for keyword in kwargs["keywords"])


def keyword_frequency(text: str, kwargs: dict) -> bool:
    """`keyword` occurs "at least" or "less than" `frequency` times, in any case."""
    count = count_matches(kwargs["keyword"].strip(), text)
    return compare(count, kwargs["relation"], kwargs["frequency"])


def forbidden_words(text: str, kwargs: dict) -> bool:
    """None of `forbidden_words` occurs as a word, in any case."""
    for word in kwargs["forbidden_words"]:
        if count_matches(word, text, before=r"\b", after=r"\b") > 0:
            return False
    return True


# ---------------- length ----------------


def number_paragraphs(text: str, kwargs: dict) -> bool:
    """It has `num_paragraphs` paragraphs, divided by ***. Only the first or last may be empty."""
    is_full = [bool(paragraph.strip()) for paragraph in re.split(r"\s?\*\*\*\s?", text)]
    return all(is_full[1:-1]) and sum(is_full) == kwargs["num_paragraphs"]


def number_sentences(text: str, kwargs: dict) -> bool:
    """The number of sentences is "at least" or "less than" `num_sentences`."""
    return compare(len(punkt_sentences(text)), kwargs["relation"], kwargs["num_sentences"])


def number_words(text: str, kwargs: dict) -> bool:
    """The number of words is "at least" or "less than" `num_words`."""
    return compare(len(words_of(text)), kwargs["relation"], kwargs["num_words"])


def nth_paragraph_first_word(text: str, kwargs: dict) -> bool:
    """It has `num_paragraphs` paragraphs, divided by empty lines.

    Paragraph number `nth_paragraph`, from 1, begins with `first_word`, in any case.
    """
    paragraphs = text.split("\n\n")
    count = len([paragraph for paragraph in paragraphs if paragraph.strip()])
    nth = kwargs["nth_paragraph"]  # counts the empty ones too
    if count != kwargs["num_paragraphs"] or nth > count:
        return False
    paragraph = paragraphs[nth - 1]
    if not paragraph.strip():
        return False
    word = paragraph.split()[0].lstrip("'").lstrip('"')
    word_without_punctuation = re.split(r"[.,?!'\"]", word)[0]
    return word_without_punctuation.lower() == kwargs["first_word"].lower()


# ---------------- content and format ----------------


def number_placeholders(text: str, kwargs: dict) -> bool:
    """At least `num_placeholders` pieces of a line stand in [brackets]."""
    *pieces, _ = text.split("]")  # what stands before each closing bracket
    count = sum("[" in piece.rpartition("\n")[2] for piece in pieces)
    return count >= kwargs["num_placeholders"]


def postscript(text: str, kwargs: dict) -> bool:
    """It has `postscript_marker`, in any case; P.S. and P.P.S may have spaces."""
    marker = kwargs["postscript_marker"].strip()
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    if marker in spaced:
        return bool(re.search(spaced[marker], text.lower()))
    return count_matches(marker.lower(), text.lower(), flags=re.MULTILINE) > 0


def number_bullet_lists(text: str, kwargs: dict) -> bool:
    """Exactly `num_bullets` lines begin with * (one star only) or -."""
    stars = re.findall(r"^[^\S\n]*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^[^\S\n]*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == kwargs["num_bullets"]


def constrained_response(text: str, kwargs: dict) -> bool:
    """It says "My answer is yes." (or no, or maybe)."""
    return any(f"My answer is {option}." in text for option in ("yes", "no", "maybe"))


def number_highlighted_sections(text: str, kwargs: dict) -> bool:
    """At least `num_highlights` pieces, not empty, stand in *one star* or **two stars**."""
    count = 0
    for section in re.findall(r"\*[^\n*]*\*", text):
        if section.strip("*").strip():
            count += 1
    for section in re.findall(r"\*\*[^\n*]*\*\*", text):
        if section.removeprefix("**").removesuffix("**").strip():
            count += 1
    return count >= kwargs["num_highlights"]


def multiple_sections(text: str, kwargs: dict) -> bool:
    """At least `num_sections` sections begin with `section_spliter` and a number."""
    splitter = kwargs["section_spliter"].strip()
    count = count_matches(splitter, text, before=r"\s?", after=r"\s?\d+\s?", flags=0)
    return count >= kwargs["num_sections"]


def json_format(text: str, kwargs: dict) -> bool:
    """It is JSON and nothing else, in a ```json fence or without."""
    text = text.strip()
    for fence in ("```json", "```Json", "```JSON", "```"):
        text = text.removeprefix(fence)
    try:
        json.loads(text.removesuffix("```").strip())
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str, kwargs: dict) -> bool:
    """A title, not empty, stands in <<double angle brackets>>, on one line."""
    for line in text.split("\n"):
        start, stop = line.find("<<"), line.rfind(">>")
        if 0 <= start < stop - 2:  # at least one character stands between
            if line[start : stop + 2].lstrip("<").rstrip(">").strip():
                return True
    return False


def capital_word_frequency(text: str, kwargs: dict) -> bool:
    """The number of words in capital letters is "at least" or "less than" `capital_frequency`."""
    count = len([token for token in tokenize(text) if token.isupper()])
    return compare(count, kwargs["capital_relation"], kwargs["capital_frequency"])


# ---------------- combinations, start and end, punctuation ----------------


def two_responses(text: str, kwargs: dict) -> bool:
    """It has two different responses, divided by ******.

    Empty ones do not count, and may stand only at the two ends.
    """
    responses = [response.strip() for response in text.split("******")]
    not_empty = [response for response in responses if response]
    if len(not_empty) != 2 or not_empty[0] == not_empty[1]:
        return False
    return all(responses[1:-1])


def repeat_prompt(text: str, kwargs: dict) -> bool:
    """It begins with `prompt_to_repeat`, in any case."""
    return text.strip().lower().startswith(kwargs["prompt_to_repeat"].strip().lower())


def end_checker(text: str, kwargs: dict) -> bool:
    """It ends with `end_phrase`, in any case; quotation marks around the text do not count."""
    return text.strip().strip('"').lower().endswith(kwargs["end_phrase"].strip().lower())


def quotation(text: str, kwargs: dict) -> bool:
    """All of it stands in double quotation marks."""
    text = text.strip()
    return len(text) > 1 and text[0] == '"' and text[-1] == '"'


def no_comma(text: str, kwargs: dict) -> bool:
    """It has no comma."""
    return "," not in text


def toy_say(text: str, kwargs: dict) -> bool:
    """It is `word`, `count` times, with `mark` between, and nothing else: tip-tip-tip."""
    return text == kwargs["mark"].join([kwargs["word"]] * kwargs["count"])


CONSTRAINTS = {
    "keywords:existence": keywords_exist,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": ifevalg.letter_frequency,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "punctuation:no_comma": no_comma,
    "toy:say": toy_say,
} | ifevalg.CONSTRAINTS


def holds(constraint: dict, text: str) -> bool | None:
    """Does the text meet this {"id", "kwargs"}, an id of CONSTRAINTS? A blank text meets none.

    None: nobody knows, because the machine failed.
    """
    if not text.strip():
        return False
    try:
        return CONSTRAINTS[constraint["id"]](text, arguments_of(constraint))
    except Indigestible:
        return False
    except Undecided:
        return None


# ---------------- before a run: can these constraints be checked at all? ----------------


def check_constraint(constraint: dict, row_id: str, by_package: bool) -> bool:
    """Raise UserError for a constraint that no checker knows, or with arguments that none takes.

    by_package: the row asks for if-verifiable's checkers, also for ids that CONSTRAINTS has.
    Returns whether the constraint is the package's to judge: see try_packaged.
    """
    name = constraint.get("id") if isinstance(constraint, dict) else None
    is_ours = isinstance(name, str) and name in CONSTRAINTS and not by_package
    if not is_ours and name not in packaged_ids():
        raise UserError(unknown_constraint_message(name, row_id))
    try:
        arguments_of(constraint)
    except UserError as error:
        raise UserError(
            f"row {row_id}: constraint {name} cannot be checked with these arguments: {error}"
        ) from None
    return not is_ours


def unknown_constraint_message(name, row_id: str) -> str:
    """The error's text: the ids that are like this one, and the package if it is not installed."""
    known = sorted({*CONSTRAINTS, *packaged_ids()})
    family = str(name).partition(":")[0]
    alike = [other for other in known if other.startswith(f"{family}:")]
    if alike:
        message = f"row {row_id}: unknown constraint {name}; known are {', '.join(alike)}"
    else:
        families = sorted({other.partition(":")[0] for other in known})
        message = f"row {row_id}: unknown constraint {name}; ids begin with {', '.join(families)}"
    if not packaged_ids():
        message += "; pip install if-verifiable brings the rest of IFEval and IFBench"
    return message


def packaged_ids() -> list[str]:
    """The constraint ids that if-verifiable knows; none if it is not installed."""
    if importlib.util.find_spec("if_verifiable") is None:
        return []
    return [*IFEVAL, *IFBENCH]


tried_constraints: set[str] = set()  # those that try_packaged has run, as JSON


def try_packaged(constraints: list[tuple[str, dict]]) -> None:
    """Run if-verifiable's checker of each (row id, constraint) once, on a plain text.

    Otherwise a constraint that cannot be checked would count as one that is not met. The text has
    as many sentences as the constraint looks at ("n"). Raises UserError for missing NLTK data, and
    for arguments that the checker does not take after all.
    """
    untried = {}
    for row_id, constraint in constraints:
        key = json.dumps(constraint, sort_keys=True)
        if key not in tried_constraints:
            untried[key] = (row_id, constraint)

    jobs = []
    for _, constraint in untried.values():
        jobs.append(
            {
                "check": "if",
                "answer": "One plain answer. " * arguments_of(constraint).get("n", 1),
                "constraints": [constraint],
                "mode": "strict",
            }
        )
    for (row_id, constraint), verdict in zip(untried.values(), ask_workers(jobs)):
        if verdict == "error: LookupError":
            raise UserError(
                f"row {row_id}: {constraint['id']} needs NLTK's data: python -m nltk.downloader "
                "punkt punkt_tab stopwords averaged_perceptron_tagger_eng"
            )
        if verdict in ("error: TypeError", "error: KeyError", "error: ValueError"):
            raise UserError(
                f"row {row_id}: constraint {constraint['id']} cannot be checked with these "
                f"arguments: {constraint.get('kwargs')}"
            )
    tried_constraints.update(untried)
