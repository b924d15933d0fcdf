"""Prompts for a real language model of 135 M parameters: four domains, offline, graded.

    python cgpo.py --model smollm2    # has --data real by default

    math     one sum or product, plain, in words or as a story; the answer is a whole number
    code     "Write a Python function …", of a line or two; tests call the function
    science  two or three options: what a word is, capitals, opposites, which one is larger
    if       an everyday request with two of IFEval's constraints, which no single word meets

A row's "level" says how hard it is meant to be, from 1. All is a pure function of this file: the
texts are our own, and there is no seed.
"""

import functools
import itertools

from common.keys import rng

ROWS_PER_DOMAIN = 480


@functools.cache
def real_rows() -> list[dict]:
    """Every row, domain by domain."""
    rows = []
    for domain, make in (
        ("math", math_rows),
        ("code", code_rows),
        ("science", science_rows),
        ("if", if_rows),
    ):
        rows += some_of(domain, make())
    return rows


def some_of(domain: str, rows: list[dict]) -> list[dict]:
    """ROWS_PER_DOMAIN of the rows, without repeated prompts, with ids and the domain."""
    rows = list({row["prompt"]: row for row in rows}.values())
    order = rng("real", domain).permutation(len(rows))[:ROWS_PER_DOMAIN]
    kept = []
    for i in sorted(order):
        kept.append({"id": f"real/{domain}/{i}", "domain": domain, **rows[i]})
    return kept


# ---------------- math ----------------

PEOPLE = ("Ann", "Ben", "Carla", "Dan", "Eva", "Finn", "Gita", "Hugo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps")
NUMBER_WORDS = "zero one two three four five six seven eight nine ten".split()


def math_row(prompt: str, thought: str, answer: int, level: int) -> dict:
    """A row; "thought" is how the answer is found, for sft.py --format-warmup."""
    return {"prompt": prompt, "thought": thought, "answer": str(answer), "level": level}


def sum_rows() -> list[dict]:
    """Plain arithmetic: numbers up to 9 (level 1), in words and products (2), up to 20 (3)."""
    rows = []
    for a, b in itertools.product(range(1, 21), repeat=2):
        is_small = max(a, b) <= 9
        level = 1 if is_small else 3
        if min(a, b) <= 9:
            rows.append(math_row(f"What is {a} + {b}?", f"{a} + {b} = {a + b}", a + b, level))
        if b < a and b <= 9:
            rows.append(math_row(f"What is {a} - {b}?", f"{a} - {b} = {a - b}", a - b, level))
        if is_small:
            words = f"{NUMBER_WORDS[a]} plus {NUMBER_WORDS[b]}"
            prompt = f"What is {words}? Answer with a number."
            rows.append(math_row(prompt, f"{a} + {b} = {a + b}", a + b, 2))
        if is_small and min(a, b) > 1:
            rows.append(math_row(f"What is {a} times {b}?", f"{a} * {b} = {a * b}", a * b, 2))
    return rows


def story_rows() -> list[dict]:
    """Stories of one step, with numbers up to 9: a sum and a product (level 2)."""
    rows = []
    for number, (person, thing) in enumerate(itertools.product(PEOPLE, THINGS)):
        draw = rng("real story", number)
        a, b = (int(value) for value in draw.integers(2, 10, 2))
        now = f"How many {thing} does {person} have now?"
        prompt = f"{person} has {a} {thing}. A friend gives {person} {b} more. {now}"
        rows.append(math_row(prompt, f"{a} + {b} = {a + b}", a + b, 2))
        boxes = f"{person} has {a} boxes with {b} {thing} in each."
        prompt = f"{boxes} How many {thing} is that in all?"
        rows.append(math_row(prompt, f"{a} * {b} = {a * b}", a * b, 2))
    return rows


def math_rows() -> list[dict]:
    """Plain arithmetic and stories."""
    return sum_rows() + story_rows()


# ---------------- code ----------------

# (what a function of a number does, with the constant k; its expression; constants; level)
OF_A_NUMBER = [
    ("returns {n} plus {k}", "{n} + {k}", range(2, 7), 1),
    ("returns {n} minus {k}", "{n} - {k}", range(2, 7), 1),
    ("returns twice {n} plus {k}", "2 * {n} + {k}", range(1, 7), 1),
    (
        "returns {k} if {n} is negative, and {n} itself otherwise",
        "{k} if {n} < 0 else {n}",
        range(0, 6),
        2,
    ),
    ("returns True if {n} is larger than {k}, and False otherwise", "{n} > {k}", range(0, 6), 2),
    (
        "returns True if {n} is divisible by {k}, and False otherwise",
        "{n} % {k} == 0",
        range(2, 7),
        2,
    ),
    ("returns the larger one of {n} and {k}", "max({n}, {k})", range(0, 6), 2),
    ("returns the square of {n} minus {k}", "{n} ** 2 - {k}", range(1, 7), 2),
    ("returns the distance between {n} and {k}", "abs({n} - {k})", range(1, 7), 3),
    (
        "returns half of {n} if {n} is even, and {n} plus {k} otherwise",
        "{n} // 2 if {n} % 2 == 0 else {n} + {k}",
        range(1, 7),
        3,
    ),
    (
        "returns {n} if it lies between 0 and {k}, and 0 otherwise",
        "{n} if 0 <= {n} <= {k} else 0",
        range(4, 8),
        3,
    ),
    (
        "returns the list of the first {k} multiples of {n}, {n} itself included",
        "[{n} * i for i in range(1, {k} + 1)]",
        range(2, 6),
        3,
    ),
]
# The same for a list of numbers …
OF_A_LIST = [
    ("returns the last item of {n}", "{n}[-1]", 1),
    ("returns the sum of {n}", "sum({n})", 1),
    ("returns the smallest item of {n}", "min({n})", 1),
    ("returns {n} in reverse order, as a list", "{n}[::-1]", 2),
    ("returns the items of {n} in falling order", "sorted({n}, reverse=True)", 2),
    ("returns {n} with each item doubled, as a list", "[2 * x for x in {n}]", 2),
    ("returns the even items of {n}, as a list", "[x for x in {n} if x % 2 == 0]", 2),
    ("returns the sum of the first and the last item of {n}", "{n}[0] + {n}[-1]", 2),
    (
        "returns the difference between the largest and the smallest item of {n}",
        "max({n}) - min({n})",
        2,
    ),
    ("returns the sum of the squares of {n}", "sum(x ** 2 for x in {n})", 3),
]
# … and for a text
OF_A_TEXT = [
    ("returns {n} in capital letters", "{n}.upper()", 1),
    ("returns the last letter of {n}", "{n}[-1]", 1),
    ("returns {n} spelled backwards", "{n}[::-1]", 2),
    ("returns {n} written twice, without a space", "{n} * 2", 2),
    ("returns True if {n} begins with the letter b, and False otherwise", "{n}.startswith('b')", 2),
    ("returns the number of words in {n}", "len({n}.split())", 2),
    ("returns {n} without its spaces", "{n}.replace(' ', '')", 2),
    ("returns True if {n} reads the same backwards, and False otherwise", "{n} == {n}[::-1]", 3),
    ("returns the length of the longest word in {n}", "max(len(w) for w in {n}.split())", 3),
    ("returns the letters of {n} in the order of the alphabet", "''.join(sorted({n}))", 3),
]
NUMBERS = (0, 1, 4, 7, -3, 12)
LISTS = ([3, 1, 2], [5], [4, 8, 6, 7], [-2, 9, 0, 10])
TEXTS = ("banana", "Anna", "level", "a big Bear")
NUMBER_NAMES = (("f", "x"), ("g", "a"), ("compute", "n"), ("change", "number"), ("work", "value"))
LIST_NAMES = (
    ("f", "items"),
    ("g", "xs"),
    ("solve", "numbers"),
    ("pick", "values"),
    ("work", "data"),
    ("check", "a"),
)
TEXT_NAMES = (
    ("f", "text"),
    ("g", "t"),
    ("solve", "word"),
    ("change", "s"),
    ("work", "line"),
    ("look", "name"),
)


def function_row(name: str, argument: str, task: str, expression: str, values, level: int) -> dict:
    """A row that asks for a function of one argument; `values` are those that it is tested with."""
    solution = f"def {name}({argument}):\n    return {expression.format(n=argument)}\n"
    namespace = {}
    exec(solution, namespace)
    asserts = [f"assert {name}({value!r}) == {namespace[name](value)!r}" for value in values]
    prompt = f"Write a Python function {name}({argument}) that {task.format(n=argument)}."
    tests = {"asserts": "\n".join(asserts)}
    return {"prompt": prompt, "tests": tests, "solution": solution, "level": level}


def code_rows() -> list[dict]:
    """Functions of a number, of a list and of a text."""
    rows = []
    for task, expression, constants, level in OF_A_NUMBER:
        for k, (name, argument) in itertools.product(constants, NUMBER_NAMES):
            with_k = [part.replace("{k}", str(k)) for part in (task, expression)]
            rows.append(function_row(name, argument, *with_k, NUMBERS, level))
    for tasks, names, values in (
        (OF_A_LIST, LIST_NAMES, LISTS),
        (OF_A_TEXT, TEXT_NAMES, TEXTS),
    ):
        for (task, expression, level), (name, argument) in itertools.product(tasks, names):
            rows.append(function_row(name, argument, task, expression, values, level))
    return rows


# ---------------- science ----------------

KINDS = {  # what something is: words that are
    "an animal": "cat horse eagle frog whale snake sheep bee".split(),
    "a fruit": "apple pear plum cherry banana mango peach grape".split(),
    "a vegetable": "carrot onion cabbage spinach leek turnip celery beet".split(),
    "a tool": "hammer saw drill wrench pliers chisel shovel rake".split(),
    "a colour": "red blue green yellow purple brown grey pink".split(),
    "a country": "France Japan Brazil Kenya Norway Egypt Canada Peru".split(),
    "a piece of clothing": "shirt coat sock hat scarf glove skirt belt".split(),
    "a musical instrument": "piano violin flute drum guitar harp trumpet cello".split(),
    "a part of the body": "arm knee ear nose hand foot elbow neck".split(),
    "a vehicle": "car bus train truck ship tram bicycle tractor".split(),
    "a piece of furniture": "table chair bed sofa desk shelf bench stool".split(),
    "a metal": "iron gold silver copper tin lead zinc nickel".split(),
}
# Some words of one kind are of the other kind, too: a peach, copper
CONFUSED = ({"a colour", "a fruit"}, {"a colour", "a metal"}, {"a colour", "a vegetable"})
OPPOSITES = (
    "hot cold, big small, fast slow, early late, light dark, full empty, hard soft, high low, "
    "old young, rich poor, strong weak, wet dry, open closed, happy sad, near far, thick thin"
)
MEASURES = {  # larger than the ones before it
    "is longer": ("a second", "a minute", "an hour", "a day", "a week", "a month", "a year"),
    "is heavier": ("a feather", "an egg", "a cat", "a bicycle", "a horse", "a car", "a whale"),
    "is larger": ("an ant", "a mouse", "a dog", "a cow", "an elephant", "a house", "the moon"),
    "has more legs": ("a snake", "a bird", "a dog", "an ant", "a spider"),
}
CAPITALS = (
    "France Paris, Italy Rome, Japan Tokyo, Spain Madrid, Germany Berlin, Egypt Cairo, "
    "Russia Moscow, China Beijing, Greece Athens, Norway Oslo, Poland Warsaw, Cuba Havana, "
    "Peru Lima, Kenya Nairobi, Austria Vienna, Portugal Lisbon"
)


def choice_row(question: str, right: str, wrong: list[str], level: int) -> dict:
    """A row with its options in an order that depends on them."""
    options = [right, *wrong]
    order = rng("real options", question, *options).permutation(len(options))
    *first, last = [options[i] for i in order]
    return {"prompt": f"{question}: {', '.join(first)} or {last}?", "answer": right, "level": level}


def science_rows() -> list[dict]:
    """What a word is, capitals, numbers (level 1); opposites (2); all with three options (3)."""
    rows = []
    for kind, words in KINDS.items():
        others = []
        for other, names in KINDS.items():
            if other != kind and {kind, other} not in CONFUSED:
                others += names
        for i, word in enumerate(words * 2):
            wrong = [str(name) for name in rng("real kind", kind, i).choice(others, 2, False)]
            question = f"Which one is {kind}"
            if i < len(words):
                rows.append(choice_row(question, word, wrong[:1], 1))
            else:
                rows.append(choice_row(question, word, wrong, 3))
    pairs = [pair.split() for pair in CAPITALS.split(", ")]
    for i, (country, capital) in enumerate(pairs * 4):
        others = [other for _, other in pairs if other != capital]
        wrong = [str(other) for other in rng("real capital", i).choice(others, 2, False)]
        question = f"What is the capital of {country}"
        rows.append(choice_row(question, capital, wrong[:1], 1))
    for i in range(120):
        draw = rng("real numbers", i)
        small, large = sorted(str(10 + number) for number in draw.permutation(89)[:2])
        if i % 2:
            rows.append(choice_row("Which number is larger", large, [small], 1))
        else:
            rows.append(choice_row("Which number is smaller", small, [large], 1))
    pairs = [pair.split() for pair in OPPOSITES.split(", ")]
    words = [word for pair in pairs for word in pair]
    for i, (first, second) in enumerate(pairs * 2 + [pair[::-1] for pair in pairs * 2]):
        others = [word for word in words if word not in (first, second)]
        wrong = [str(word) for word in rng("real opposite", first, i).choice(others, 2, False)]
        rows.append(choice_row(f"Which word is the opposite of {first}", second, wrong[:1], 2))
    for comparison, things in MEASURES.items():
        for triple in itertools.combinations(things, 3):
            *smaller, largest = triple
            question = f"Which one {comparison} than the others"
            rows.append(choice_row(question, largest, list(smaller), 3))
    return rows


# ---------------- if ----------------

TOPICS = (
    "Describe a rainy day. | Describe your favourite meal. | Tell me about the sea. | "
    "Explain what a teacher does. | Describe a small garden. | Tell me about winter. | "
    "Explain why people sleep. | Describe a busy market. | Tell me about a train ride. | "
    "Explain what bees do. | Describe an old house. | Tell me about the moon. | "
    "Explain how to make tea. | Describe a good friend. | Tell me about a birthday party. | "
    "Explain why trees are useful. | Describe a quiet library. | Tell me about a long walk. | "
    "Explain what a doctor does. | Describe a summer evening. | Tell me about a lost key. | "
    "Explain how to stay healthy. | Describe a mountain. | Tell me about a kind neighbour. | "
    "Explain why books matter. | Describe a storm. | Tell me about a new school. | "
    "Explain what a farmer does. | Describe a big city. | Tell me about a funny dog. | "
    "Explain how to save water. | Describe a river. | Tell me about a surprise. | "
    "Explain why we wash our hands. | Describe a train station. | Tell me about music. | "
    "Explain what rain is. | Describe a picnic. | Tell me about a brave child. | "
    "Explain how to grow tomatoes."
).split(" | ")


def at_least(words: int) -> tuple:
    """(constraint, its text): a minimal number of words."""
    kwargs = {"relation": "at least", "num_words": words}
    constraint = {"id": "length_constraints:number_words", "kwargs": kwargs}
    return constraint, f"Use at least {words} words."


def fewer_than(words: int) -> tuple:
    """(constraint, its text): a maximal number of words."""
    kwargs = {"relation": "less than", "num_words": words}
    constraint = {"id": "length_constraints:number_words", "kwargs": kwargs}
    return constraint, f"Use fewer than {words} words."


def plain(constraint_id: str, text: str, **kwargs) -> tuple:
    """(constraint, its text) of any other kind."""
    return {"id": constraint_id, "kwargs": kwargs}, text


NO_COMMA = plain("punctuation:no_comma", "Do not use any commas.")
NO_THE = plain("keywords:forbidden_words", "Do not use the word the.", forbidden_words=["the"])
NO_A = plain("keywords:forbidden_words", "Do not use the word a.", forbidden_words=["a"])
ALWAYS = plain("keywords:existence", "Use the word always.", keywords=["always"])
# Two constraints that no single word meets, and the level
PAIRS = (
    (at_least(8), fewer_than(30), 1),
    (at_least(12), fewer_than(40), 1),
    (NO_COMMA, at_least(8), 1),
    (NO_COMMA, at_least(12), 2),
    (NO_THE, at_least(6), 2),
    (NO_THE, at_least(10), 2),
    (at_least(8), fewer_than(16), 2),
    (at_least(6), fewer_than(12), 2),
    (ALWAYS, at_least(6), 3),
    (NO_A, at_least(6), 3),
    (NO_A, at_least(10), 3),
    (ALWAYS, at_least(10), 3),
)


def if_rows() -> list[dict]:
    """Every topic with every pair of constraints."""
    rows = []
    for topic, (first, second, level) in itertools.product(TOPICS, PAIRS):
        (first_constraint, first_text), (second_constraint, second_text) = first, second
        rows.append(
            {
                "prompt": f"{topic} {first_text} {second_text}",
                "constraints": [first_constraint, second_constraint],
                "level": level,
            }
        )
    return rows
