"""The instruction constraints of Nemotron's blend that IFEval and IFBench lack (IFEvalG's).

CONSTRAINTS: id → function(text, kwargs) → is the constraint met? The verdicts are those of the
checkers that the data was made with, quirks included: some accept more than their wording asks. The
text is not blank. Words are divided by space; tokens are also punctuation marks.
"""

import re

from checkers.patterns import count_matches
from checkers.sentences import split_sentences, tokenize


def compare(count: int, relation: str, limit: int) -> bool:
    """Does the count stand in one of IFEval's relations, at least or less than, to the limit?"""
    return count >= limit if relation == "at least" else count < limit


def same(text: str, other: str) -> bool:
    """Are these the same text in any case, but for the space around them?"""
    return text.strip().lower() == other.strip().lower()


# ---------------- copies ----------------


def stretches(line: str, first: str, last: str) -> list[str]:
    """The shortest pieces of a line from the word `first` to the word `last`, left to right."""
    found, start = [], line.find(f"{first} ")
    while start >= 0:
        stop = line.find(f" {last}", start + len(first) + 1)
        if stop < 0:
            break
        stop += len(last) + 1
        found.append(line[start:stop])
        start = line.find(f"{first} ", stop)
    return found


def repeat_phrase(text: str, kwargs: dict) -> bool:
    """`phrase` stands there `small_n` times, with at most one other word each time.

    The last time, exactly one word is another.
    """
    words = kwargs["phrase"].split()
    found = []
    for line in text.split("\n"):
        found += stretches(line, words[0], words[-1])
    if len(found) != kwargs["small_n"]:
        return False
    differences = 0
    for stretch in found:
        copied = stretch.split()
        differences = sum(ours != theirs for ours, theirs in zip(words, copied))
        if len(copied) != len(words) or differences > 1:
            return False
    return differences == 1


def copy(text: str, kwargs: dict) -> bool:
    """It is `prompt_to_repeat` and nothing else."""
    return same(text, kwargs["prompt_to_repeat"])


def copying_multiple(text: str, kwargs: dict) -> bool:
    """It is `prompt_to_repeat`, `N` times, divided by ******."""
    copies = text.split("******")
    return len(copies) == kwargs["N"] and all(
        same(part, kwargs["prompt_to_repeat"]) for part in copies
    )


def copy_span_idx(text: str, kwargs: dict) -> bool:
    """It is the characters `n_start` up to, not including, `n_end` of `prompt_to_repeat`."""
    return same(text, kwargs["prompt_to_repeat"][kwargs["n_start"] : kwargs["n_end"]])


# ---------------- format ----------------


def sentence_hyphens(text: str, kwargs: dict) -> bool:
    """Hyphens join the sentences, without space, and stand nowhere else.

    Parts behind the last sentence, as of a hyphen at the end, are free.
    """
    sentences = split_sentences(text.replace("-", " "))
    return all(part == sentence for part, sentence in zip(text.split("-"), sentences))


def square_brackets(text: str, kwargs: dict) -> bool:
    """Every word stands in [square] [brackets]."""
    return all(word.startswith("[") and word.endswith("]") for word in text.split())


def bigram_wrapping(text: str, kwargs: dict) -> bool:
    """Every two words stand <<in double>> <<angle brackets>>. A last odd word is free."""
    words = text.split()
    pairs = zip(words[::2], words[1::2])
    return all(first.startswith("<<") and second.endswith(">>") for first, second in pairs)


def paragraphs(text: str, kwargs: dict) -> bool:
    """It has two paragraphs, divided by ***."""
    return are_two(re.split(r"\s?\*\*\*\s?", text))


def paragraphs2(text: str, kwargs: dict) -> bool:
    """It has two paragraphs, divided by one blank line."""
    return are_two(text.split("\n\n"))


def are_two(parts: list[str]) -> bool:
    """Are two of these not blank? Only the first and the last may be blank."""
    is_full = [bool(part.strip()) for part in parts]
    return all(is_full[1:-1]) and sum(is_full) == 2


def no_dot(text: str, kwargs: dict) -> bool:
    """It has no period."""
    return "." not in text


def no_exclamation(text: str, kwargs: dict) -> bool:
    """It has no exclamation mark."""
    return "!" not in text


# ---------------- keywords ----------------


def no_adjacent_consecutive(text: str, kwargs: dict) -> bool:
    """No word begins with the next letter after the one that the word before it begins with."""
    initials = [word[0].lower() for word in text.split()]
    for first, second in zip(initials, initials[1:]):
        if len(first) != 1 or len(second) != 1 or ord(second) - ord(first) == 1:
            return False
    return True


def word_once(text: str, kwargs: dict) -> bool:
    """`keyword` occurs once, in any case, also inside words."""
    return count_matches(kwargs["keyword"].strip(), text) == 1


def word_count(text: str, kwargs: dict) -> bool:
    """`keyword` occurs "at least" or "less than" `frequency` times, as above."""
    count = count_matches(kwargs["keyword"].strip(), text)
    return compare(count, kwargs["relation"], kwargs["frequency"])


def count_increment_word(text: str, kwargs: dict) -> bool:
    """`keyword1` occurs once and `keyword2` twice, as above."""
    if count_matches(kwargs["keyword1"].strip(), text) != 1:
        return False
    return count_matches(kwargs["keyword2"].strip(), text) == 2


def exclude_word_harder(text: str, kwargs: dict) -> bool:
    """`keyword` does not occur, in this case, with a space on both sides."""
    return f" {kwargs['keyword'].strip()} " not in text


def palindrome(text: str, kwargs: dict) -> bool:
    """Some word reads the same backwards. A word of one letter does."""
    return any(word == word[::-1] for word in text.split())


def keyword_specific_position(text: str, kwargs: dict) -> bool:
    """Token number `m` of sentence number `n` is `keyword`, in this case."""
    sentences = split_sentences(text)
    if len(sentences) < kwargs["n"]:
        return False
    tokens = tokenize(sentences[kwargs["n"] - 1])
    return len(tokens) >= kwargs["m"] and tokens[kwargs["m"] - 1] == kwargs["keyword"]


def start_end(text: str, kwargs: dict) -> bool:
    """The first and the last of its tokens, at least two, are the same, in any case."""
    tokens = tokenize(text)
    return len(tokens) > 1 and tokens[0].lower() == tokens[-1].lower()


# ---------------- counts ----------------


def lowercase_counting(text: str, kwargs: dict) -> bool:
    """At most `N` words consist of the letters a to z alone."""
    return len(re.findall(r"\b[a-z]+\b", text)) <= kwargs["N"]


def letter_counting(text: str, kwargs: dict) -> bool:
    """The number of letters, a to z and A to Z, is "at least" or "less than" `N`."""
    return compare(len(re.findall("[a-zA-Z]", text)), kwargs["relation"], kwargs["N"])


def letter_frequency(text: str, kwargs: dict) -> bool:
    """`letter` occurs "at least" or "less than" `let_frequency` times, in any case."""
    count = text.lower().count(kwargs["letter"].lower())
    return compare(count, kwargs["let_relation"], kwargs["let_frequency"])


def count_unique(text: str, kwargs: dict) -> bool:
    """No token occurs twice."""
    tokens = tokenize(text)
    return len(tokens) == len(set(tokens))


def counting_composition(text: str, kwargs: dict) -> bool:
    """It has three paragraphs, divided by ***, of `n_sent` sentences of `n_words` tokens each."""
    parts = re.split(r"\s?\*\*\*\s?", text)
    if len(parts) != 3:
        return False
    for part in parts:
        sentences = split_sentences(part)
        if len(sentences) != kwargs["n_sent"]:
            return False
        if any(len(tokenize(sentence)) != kwargs["n_words"] for sentence in sentences):
            return False
    return True


# ---------------- first and last words ----------------


def without_punctuation(word: str) -> str:
    """The word's letters, digits and underscores."""
    return re.sub(r"[^\w\s]", "", word)


def first_word_sentence(text: str, kwargs: dict) -> bool:
    """Every sentence begins with the word `first_word`."""
    for sentence in split_sentences(text):
        if not sentence or not same(sentence.split()[0], kwargs["first_word"]):
            return False
    return True


def first_word_answer(text: str, kwargs: dict) -> bool:
    """The text begins with the word `first_word`."""
    return same(text.split()[0], kwargs["first_word"])


def last_word_sentence(text: str, kwargs: dict) -> bool:
    """Every sentence ends with the word `last_word`."""
    for sentence in split_sentences(text):
        if not sentence:
            return False
        if not same(without_punctuation(sentence.split()[-1]), kwargs["last_word"]):
            return False
    return True


def last_word_answer(text: str, kwargs: dict) -> bool:
    """The text ends with the word `last_word`."""
    return same(without_punctuation(text.split()[-1]), kwargs["last_word"])


CONSTRAINTS = {
    "copy:repeat_phrase": repeat_phrase,
    "copy:copy": copy,
    "copy:copying_simple": copy,
    "copy:copying_multiple": copying_multiple,
    "new:copy_span_idx": copy_span_idx,
    "detectable_format:sentence_hyphens": sentence_hyphens,
    "detectable_format:square_brackets": square_brackets,
    "detectable_format:bigram_wrapping": bigram_wrapping,
    "keywords:no_adjacent_consecutive": no_adjacent_consecutive,
    "keywords:word_once": word_once,
    "keywords:word_count_different_numbers": word_count,
    "keywords:exclude_word_harder": exclude_word_harder,
    "keywords:palindrome": palindrome,
    "keywords:keyword_specific_position": keyword_specific_position,
    "keywords:start_end": start_end,
    "count:lowercase_counting": lowercase_counting,
    "count:count_unique": count_unique,
    "count:count_increment_word": count_increment_word,
    "count:counting_composition": counting_composition,
    "letters:letter_counting": letter_counting,
    "letters:letter_counting2": letter_frequency,
    "paragraphs:paragraphs": paragraphs,
    "paragraphs:paragraphs2": paragraphs2,
    "first_word:first_word_sent": first_word_sentence,
    "first_word:first_word_answer": first_word_answer,
    "last_word:last_word_sent": last_word_sentence,
    "last_word:last_word_answer": last_word_answer,
    "punctuation:punctuation_dot": no_dot,
    "punctuation:punctuation_exclamation": no_exclamation,
}
