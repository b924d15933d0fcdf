"""Instruction constraints that need no package: IFEval's (arXiv 2311.07911), and the toy's own.

CONSTRAINTS: id → function(text, kwargs) → is the constraint met? The names in kwargs are IFEval's.
The verdicts are those of IFEval's checkers, quirks included, so that a row means the same here.
What only the package if-verifiable knows is judged by it, in a worker process (checkers.workers).
"""

import functools
import importlib.util
import json
import re

from checkers.third_party import if_registry
from checkers.workers import ask_workers
from common.errors import UserError
from common.rows import words_of


def compare(count: int, relation: str | None, limit: int) -> bool:
    """Does the count stand in one of IFEval's two relations to the limit?

    Raises UserError for another relation.
    """
    if relation == "at least":
        return count >= limit
    if relation == "less than":
        return count < limit
    raise UserError(f'constraint relation {relation!r}: not "at least" or "less than"')


# ---------------- keywords ----------------


def keywords_exist(text: str, kwargs: dict) -> bool:
    """Each of `keywords` (regular expressions, as in IFEval) occurs, in any case."""
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in kwargs["keywords"])


def keyword_frequency(text: str, kwargs: dict) -> bool:
    """`keyword` occurs "at least" or "less than" `frequency` times, in any case."""
    count = len(re.findall(kwargs["keyword"], text, re.IGNORECASE))
    return compare(count, kwargs["relation"], kwargs["frequency"])


def forbidden_words(text: str, kwargs: dict) -> bool:
    """None of `forbidden_words` occurs as a word, in any case."""
    for word in kwargs["forbidden_words"]:
        if re.search(rf"\b{word}\b", text, re.IGNORECASE):
            return False
    return True


def letter_frequency(text: str, kwargs: dict) -> bool:
    """`letter` occurs "at least" or "less than" `let_frequency` times, in any case."""
    count = text.lower().count(kwargs["letter"].lower())
    return compare(count, kwargs["let_relation"], kwargs["let_frequency"])


# ---------------- length ----------------


def number_paragraphs(text: str, kwargs: dict) -> bool:
    """It has `num_paragraphs` paragraphs, divided by ***. Only the first or last may be empty."""
    paragraphs = [paragraph.strip() for paragraph in re.split(r"\s?\*\*\*\s?", text)]
    count = len([paragraph for paragraph in paragraphs if paragraph])
    if not all(paragraphs[1:-1]):  # with an empty one between others, none counts
        count = 0
    return count == kwargs["num_paragraphs"]


def number_words(text: str, kwargs: dict) -> bool:
    """The number of words is "at least" or "less than" `num_words`."""
    return compare(len(words_of(text)), kwargs["relation"], kwargs["num_words"])


def nth_paragraph_first_word(text: str, kwargs: dict) -> bool:
    """It has `num_paragraphs` paragraphs, divided by empty lines.

    Paragraph number `nth_paragraph`, from 1, begins with `first_word`, in any case.
    """
    paragraphs = text.split("\n\n")
    not_empty = [paragraph for paragraph in paragraphs if paragraph.strip()]
    nth = kwargs["nth_paragraph"]  # counts the empty ones too
    if len(not_empty) != kwargs["num_paragraphs"] or nth > len(paragraphs):
        return False
    paragraph = paragraphs[nth - 1]
    if not paragraph.strip():
        return False
    word = paragraph.split()[0].lstrip("'\"")
    word_without_punctuation = re.split(r"[.,?!'\"]", word)[0]
    return word_without_punctuation.lower() == kwargs["first_word"].lower()


# ---------------- content and format ----------------


def number_placeholders(text: str, kwargs: dict) -> bool:
    """At least `num_placeholders` pieces stand in [brackets]."""
    return len(re.findall(r"\[.*?\]", text)) >= kwargs["num_placeholders"]


def postscript(text: str, kwargs: dict) -> bool:
    """A line has `postscript_marker`, in any case; P.S. and P.P.S may have spaces."""
    marker = kwargs["postscript_marker"]
    spaced = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    pattern = spaced.get(marker, re.escape(marker.lower()))
    return bool(re.search(rf"{pattern}.*$", text.lower(), re.MULTILINE))


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
    sections = re.split(rf"\s?{kwargs['section_spliter']}\s?\d+\s?", text)
    return len(sections) - 1 >= kwargs["num_sections"]


def json_format(text: str, kwargs: dict) -> bool:
    """It is JSON and nothing else, in a ```json fence or without."""
    text = re.sub(r"^```(json)?|```$", "", text.strip(), flags=re.IGNORECASE).strip()
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def title(text: str, kwargs: dict) -> bool:
    """A title, not empty, stands in <<double angle brackets>>."""
    return any(match.strip("<>").strip() for match in re.findall(r"<<[^\n]+>>", text))


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
    "keywords:letter_frequency": letter_frequency,
    "length_constraints:number_paragraphs": number_paragraphs,
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
    "punctuation:no_comma": no_comma,
    "toy:say": toy_say,
}


def holds(constraint: dict, text: str) -> bool:
    """Does the text meet this {"id", "kwargs"}, an id of CONSTRAINTS?

    Arguments that are null are IFEval's padding: they are left out.
    """
    padded = constraint.get("kwargs") or {}
    kwargs = {name: value for name, value in padded.items() if value is not None}
    return CONSTRAINTS[constraint["id"]](text, kwargs)


# ---------------- before a run: can these constraints be checked at all? ----------------


def check_constraint(constraint: dict, row_id: str, by_package: bool) -> bool:
    """Raise UserError for a constraint that no checker knows, or that CONSTRAINTS cannot check.

    by_package: the row asks for if-verifiable's checkers, also for ids that CONSTRAINTS has.
    Returns whether the constraint is the package's to judge: see try_packaged.
    """
    name = constraint.get("id") if isinstance(constraint, dict) else None
    if by_package or name not in CONSTRAINTS:
        if name not in packaged_ids():
            raise UserError(unknown_constraint_message(name, row_id))
        return True
    try:
        holds(constraint, "")
    except Exception as error:  # whatever its arguments do to the checker
        raise UserError(
            f"row {row_id}: constraint {name} cannot be checked with these arguments: "
            f"{type(error).__name__} {error}"
        ) from error
    return False


def unknown_constraint_message(name: str | None, row_id: str) -> str:
    """The error's text. It names the package if that is not installed."""
    known = ", ".join(CONSTRAINTS)
    message = f"row {row_id}: unknown constraint {name}; known without a package: {known}"
    if not packaged_ids():
        message += "; pip install if-verifiable brings the rest of IFEval and IFBench"
    return message


@functools.cache
def packaged_ids() -> set[str]:
    """The constraint ids that if-verifiable knows; none if it is not installed."""
    if importlib.util.find_spec("if_verifiable") is None:
        return set()
    return set(if_registry())


tried_constraints: set[str] = set()  # those that try_packaged has run, as JSON


def try_packaged(constraints: list[tuple[str, dict]]) -> None:
    """Run if-verifiable's checker of each (row id, constraint) once, on a plain text.

    Otherwise a constraint that cannot be checked would count as one that is not met. Raises
    UserError for arguments that the checker does not take, and for missing NLTK data.
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
                "answer": "One plain answer.",
                "prompt": "Say one.",
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
        if verdict in ("error: TypeError", "error: KeyError"):
            raise UserError(
                f"row {row_id}: constraint {constraint['id']} cannot be checked with these "
                f"arguments: {constraint.get('kwargs')}"
            )
    tried_constraints.update(untried)
