"""Answers in mathematics: spellings that are right, and what must not be paid."""

import random

import pytest

import rewards
from checkers.closed_numbers import read_bare_number
from checkers.statements import statements_of

# (reference, an answer that is right)
RIGHT = [
    ("30", "30^{\\circ}"),
    ("30", "30 degrees"),
    ("30^\\circ", "30°"),
    ("45^\\circ", "45 degrees"),
    ("42", "\\text{42 apples}"),
    ("42", "42\\text{ apples}"),
    ("42", "\\textbf{42}"),
    ("42", "**42 apples**"),
    ("\\frac{7}{3}", "2 \\frac{1}{3}"),
    ("\\frac{7}{3}", "2⅓"),
    ("2\\frac13", "7/3"),
    ("0.1\\overline{6}", "1/6"),
    ("\\frac{2}{3}", "0.666..."),
    ("\\frac{2}{3}", "0.\\bar{6}"),
    ("\\frac{2}{3}", "0.\\overline{66}"),
    ("(-\\infty,3)", "x<3"),
    ("(-\\infty,3]", "x \\leq 3"),
    ("(-\\infty,3]", "x≤3"),
    ("x\\ge 2", "[2,\\infty)"),
    ("[0,1)", "0\\le x<1"),
    ("(2,5)", "5>x>2"),
    ("(2,5)", "x\\in(2,5)"),
    ("x<3", "x<3"),
    ("x<3", "3>x"),
    ("\\varnothing", "\\emptyset"),
    ("\\emptyset", "∅"),
    ("-2", "—2"),
    ("-2", "－2"),
    ("-\\frac12", "−1/2"),
    ("5", "5 cm²"),
    ("5", "5\\text{ cm}^2"),
    ("5\\text{ cm}^2", "5"),
    ("12345", "12\\,345"),
    ("12345", "12 345"),
    ("1-\\frac1e", "1-\\frac{1}{\\mathrm{e}}"),
    ("e", "\\mathrm{e}"),
    ("5", "\\text{(B) } 5"),
    ("\\text{(B)}", "\\text{(B) } 5"),
    ("B", "\\textbf{(B)}\\ 5"),
    ("5", "`5`"),
    ("30", "25 + 5 = 30"),
    ("30", "25 + 5 equals 30"),
    ("30", "The answer is: 30"),
    ("30", "Answer: 30"),
    ("30", "The answer is $30$."),
    ("30", "So the answer is 30."),
    ("30", "Final answer: 30"),
    ("30", "The final answer is 30 apples."),
    ("30", "It is 30."),
    ("30", "The sum of 25 and 5 is 30."),
    ("30", "30 = 30"),
    ("30", "5*6=30"),
    ("30", "x = 30"),
    ("30", "The total is 30 dollars"),
    ("30", "$30"),
    ("30", "= 30"),
    ("30", "\\boxed{30}"),
    ("30", "Answer = 30"),
    ("30", "**Answer: 30**"),
    ("30", "answer 30"),
    ("30", "There are 30 apples."),
    ("30", "30."),
    ("30", "**30**"),
    ("10^{-20}", "1\\times 10^{-20}"),
    ("1.5\\times10^{-9}", "1.5e-9"),
    ("\\frac{1}{10^{12}}", "10^{-12}"),
    ("1010_{2}", "1010_2"),
    ("A3_{16}", "A3_{16}"),
    ("26_8", "26_{8}"),
    ("\\pi", "3.141593"),
    ("2\\pi", "2π"),
    ("2\\pi", "2*pi"),
    ("\\frac{\\sqrt{3}}{2}", "sqrt(3)/2"),
    ("3\\sqrt{2}", "3√2"),
    ("\\sqrt{13}", "√13"),
    ("\\sqrt{13}", "\\sqrt{13} \\approx 3.606"),
    ("3.606", "\\sqrt{13} \\approx 3.606"),
    ("\\frac{25}{3}", "25/3 ≈ 8.33"),
    ("1,2,3", "1, 2, and 3"),
    ("1,2,3", "3,2,1"),
    ("1,2", "1 and 2"),
    ("(1,2)", "(1, 2)"),
    ("(\\frac12, 3)", "(0.5, 3)"),
    ("\\{1,2\\}", "1, 2"),
    ("x=1,x=-2", "1,-2"),
    ("\\pm 3", "3, -3"),
    ("\\pm 3", "\\pm3"),
    ("1\\pm\\sqrt2", "1+\\sqrt{2}, 1-\\sqrt{2}"),
    ("1\\pm\\sqrt2", "1 ± √2"),
    ("x^2+2x+1", "(x+1)^2"),
    ("x^2+2x+1", "The answer is (x+1)^2."),
    ("2x+3", "y=2x+3"),
    ("2x+3", "f(x) = 2x+3"),
    ("Friday", "It is Friday."),
    ("Friday", "The answer is Friday"),
    ("Yes", "Yes."),
    ("2:3", "2 : 3"),
    ("\\text{even}", "\\textit{even}"),
    ("undefined", "Undefined"),
    ("\\$18.90", "18.90 dollars"),
    ("18", "\\$18"),
    ("18", "18 USD"),
    ("50\\%", "\\frac12"),
    ("1,000,000", "10^6"),
    ("3", "3.0"),
    ("3", "3.00"),
    ("3", "03"),
    ("0", "-0"),
    ("0", "0.0"),
    ("-5", "(-5)"),
    ("5", "+5"),
    ("\\frac{1}{2}", "\\frac{2}{4}"),
    ("\\frac{1}{2}", "1/2"),
    ("0.5", "\\frac12"),
    ("\\frac{-1}{2}", "-0.5"),
    ("1.25", "\\frac54"),
    ("1.25", "1\\frac14"),
    ("1.25", "5/4"),
    ("1.25", "1 1/4"),
    ("i", "i"),
    ("2+3i", "3i+2"),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\begin{bmatrix}1\\\\2\\end{bmatrix}"),
    ("100!", "100!"),
    ("2^{100}", "1267650600228229401496703205376"),
    ("\\frac{n(n+1)}{2}", "n(n+1)/2"),
    ("x=5", "5"),
    ("x=5", "x = 5"),
    ("k=\\frac{1}{2}", "0.5"),
    ("25", "\\dfrac{100}{4}"),
    ("10", "\\$10.00"),
    ("12", "12\\text{ ways}"),
    ("12", "12 ways to do it"),
    ("5", "5\\cdot 10^0"),
]

# (reference, an answer that is wrong): questions again, noise, hedges, other numbers
WRONG = [
    ("\\frac{7}{3}", "2 2/3"),
    ("\\frac{2}{3}", "0.667"),
    ("\\frac{2}{3}", "0.\\overline{67}"),
    ("(-\\infty,3]", "x<3"),
    ("x>2", "[2,\\infty)"),
    ("(0,1)", "0<x≤1"),
    ("x<3", "x>3"),
    ("345", "12 345"),
    ("\\text{(B)}", "(C) 5"),
    ("30", "25+5=31"),
    ("31", "25+5=30"),
    ("30", "30=25+5"),
    ("30", "30!"),
    ("10^{-20}", "10^{-30}"),
    ("1.5\\times10^{-9}", "1.6e-9"),
    ("1e-9", "0"),
    ("\\frac{1}{10^{12}}", "0"),
    ("1010_2", "1010_3"),
    ("A3_{16}", "163"),
    ("10", "1010_2"),
    ("26_8", "26_{10}"),
    ("26_8", "22"),
    ("6", "\\gcd(12,18)"),
    ("3", "\\max(1,3)"),
    ("5", "10 \\div 2"),
    ("5", "10÷2"),
    ("120", "\\Gamma(6)"),
    ("391", "17·23"),
    ("391", "17 × 23"),
    ("391", "17 x 23"),
    ("391", "17\\cdot23"),
    ("391", "(17)(23)"),
    ("2", "17 \\bmod 5"),
    ("2", "17 mod 5"),
    ("36", "\\operatorname{lcm}(12,18)"),
    ("36", "\\text{lcm}(12,18)"),
    ("1", "\\min\\{1,3\\}"),
    ("10", "\\binom{5}{2}"),
    ("10", "{5 \\choose 2}"),
    ("10", "\\dbinom52"),
    ("3", "\\lceil 2.5 \\rceil"),
    ("6", "\\sum_{i=1}^3 i"),
    ("6", "3!"),
    ("40", "17 - (-23)"),
    ("40", "17--23"),
    ("40", "17+23"),
    ("4", "2+2"),
    ("5", "\\sqrt{9+16}"),
    ("25", "3^2+4^2"),
    ("120", "P(5)"),
    ("10", "\\frac{5!}{3!2!}"),
    ("10", "_5C_2"),
    ("10", "5C2"),
    ("6", "\\det\\begin{pmatrix}2&0\\\\0&3\\end{pmatrix}"),
    ("6", "\\int_0^6 dx"),
    ("4", "\\varphi(5)"),
    ("4", "\\phi(5)"),
    ("12", "\\prod_{k=3}^{4}k"),
    ("3", "not sure: 1? 2? 3?"),
    ("3", "1, 2, 3"),
    ("3", "1 2 3"),
    ("3", "maybe 3"),
    ("3", "3?"),
    ("3", "3 or 4"),
    ("3", "3 / 4"),
    ("3", "either 3 or 4"),
    ("3", "I think it might be 3"),
    ("3", "blah blah 3"),
    ("3", "xyz 3"),
    ("3", "a=1,b=2,c=3"),
    ("3", "asdf 3 jkl"),
    ("3", "(1)(2)(3)"),
    ("3", "3; 4"),
    ("3", "3 and 4"),
    ("7", "the numbers 5, 6 and 7"),
    ("7", "5. 6. 7"),
    ("7", "5\n6\n7"),
    ("7", "The answer is 6. The answer is 7."),
    ("\\sqrt{2}", "1.41"),
    ("\\pi", "3.14"),
    ("1,2,3", "1,2"),
    ("(1,2)", "(2,1)"),
    ("\\pm 3", "3"),
    ("(10^{-20},1)", "(10^{-30},1)"),
    ("2x+3", "2x+4"),
    ("x+1", "maybe x+1"),
    ("2x", "? 2x ?"),
    ("Friday", "Saturday"),
    ("Yes", "No"),
    ("2:3", "4:6"),
    ("5", "x\\ne 5"),
    ("5", "x>5"),
    ("5", "\\neg 5"),
    ("2+3i", "2-3i"),
    ("\\frac{1}{1000!}", "0"),
    ("2^{100}", "2^{100}+1"),
    ("2^{100}", "1267650600228229401496703205377"),
    ("123456789.1", "123456789.2"),
    ("0.1", "0.10000001"),
    ("1000000.1", "1000000.2"),
    ("9", "9\\pi"),
    ("9", "9x"),
    ("9", "9i"),
    ("9", "9e"),
    ("9", "9\\sqrt{2}"),
    ("2", "2:3"),
    ("2", "2_3"),
    ("5", "5\\times 1"),
]


def correct(reference: str, response: str, scheme: str = "cgpo") -> bool | None:
    """Is the response right for a row with this reference?"""
    row = {"id": "r", "domain": "math", "prompt": "?", "answer": reference}
    return rewards.score([response], [row], scheme)[0].correct


@pytest.mark.parametrize("reference, answer", RIGHT)
def test_right_answers_are_paid(reference, answer):
    assert correct(reference, f"<think>so</think><answer>{answer}</answer>") is True


@pytest.mark.parametrize("reference, answer", WRONG)
def test_wrong_answers_are_not_paid(reference, answer):
    assert correct(reference, f"<think>so</think><answer>{answer}</answer>") is False


@pytest.mark.parametrize(
    "response, reference",
    [
        ("25 + 5 = 30", "30"),
        ("25 + 5 equals 30", "30"),
        ("There are 25 apples and 5 pears.\nSo there are 30 fruits in total.", "30"),
        ("First, 25 + 5 = 30.\n\nThe answer is: 30", "30"),
        ("We add.\n\n**Answer:** 30 apples", "30"),
        ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "\\frac{1}{2}"),
        ("Hence\n\\[\nx = 7\n\\]", "7"),
        ("What is 2 + 3? The answer is 5.", "5"),
        ("#### 5", "5"),
        ("Let us see.\n\n#### 1,200", "1200"),
        ("So it happened on a Friday.\nThe answer is Friday.", "Friday"),
        ("Therefore, the solutions are $x = 1$ or $x = 2$.", "1,2"),
    ],
)
def test_what_a_text_states_is_read(response, reference):
    assert correct(reference, response, "lenient") is True


@pytest.mark.parametrize(
    "response",
    [
        "1 2 3 4 5",
        "1\n2\n3\n4\n5",
        "Is it 5?",
        "It might be 5.",
        "The answer is not 5.",
        "The answer is 4. The answer is 5.",
        "The answer is 4 or 5.",
        "I do not know. 5",
        "zq 5",
    ],
)
def test_noise_and_hedges_state_nothing(response):
    assert correct("5", response, "lenient") is False


def test_numbers_are_exact_where_they_are_rational():
    assert read_bare_number("0.1\\overline{6}").value * 6 == 1
    assert read_bare_number("2\\frac{1}{3} \\text{ cups}").value * 3 == 7
    assert read_bare_number("10^{-20}").value * 10**20 == 1
    assert read_bare_number("17\\cdot 23").final is False


def test_a_number_too_large_to_compute_costs_nothing():
    for text in ("10^{10^{10^{10}}}", "9^{9^{9^9}}", "999999999999!", "1" * 500, "1e999999999"):
        assert read_bare_number(text) is None


@pytest.mark.slow
def test_random_texts_do_not_break_the_comparison():
    generator = random.Random(0)
    pieces = ["\\frac", "\\sqrt", "{", "}", "(", ")", "[", "]", "^", "_", "1", "23", ".5", "0.3"]
    pieces += ["\\pm", "=", ",", " or ", "<", "\\le", "x", "e", "\\pi", "\\overline", "%", "!"]
    pieces += [
        "\\text{",
        "answer is ",
        "$",
        "...",
        "^\\circ",
        " cm",
        "\\binom",
        "/",
        "-",
        "\\boxed{",
    ]
    references = [
        "3",
        "\\frac{1}{2}",
        "x+1",
        "(1,2)",
        "1,2",
        "B",
        "2:3",
        "10_2",
        "\\sqrt{2}",
        "x<3",
    ]
    rows, responses = [], []
    for i in range(2000):
        answer = "".join(generator.choices(pieces, k=generator.randint(1, 12)))
        responses.append(f"<think>so</think><answer>{answer}</answer>")
        reference = generator.choice(references)
        rows.append({"id": str(i), "domain": "math", "prompt": "?", "answer": reference})
    for result in rewards.score(responses, rows):
        assert not result.why.startswith("unknown")


def test_statements_are_the_likeliest_first():
    assert statements_of("So, the total is 30.") == ["30", "is 30", "the total is 30"]
    assert statements_of("It may be that the answer is unclear?") == []
