"""Short answers of the science domain: numbers with units, and texts."""

import random
import time

import pytest

from checkers.short_answers import read_quantity, short_answer_equal
from checkers.unit_symbols import unit_factors

# (reference, answers that are right)
RIGHT = [
    ("5", ["5", "5.0", "+5", "5.", "$5$", "\\(5\\)", "\\text{5}", "(5)", "**5**", "~5", "\\,5"]),
    ("5", ["5 dollars", "5 m", "5 m/s", "\\$5", "≈ 5", "about 5", "approximately 5", "5 apples"]),
    ("5", ["The answer is 5.", "x = 5", "It is 5 m.", "Answer: 5", "The final answer is $5$."]),
    ("-5", ["−5", "–5", "—5", "-5", "- 5", "(-5)", "$-5$", "-5.0", "－5"]),
    ("0", ["0", "0.0", "-0", "0 m"]),
    ("0.5", [".5", "0.5", "1/2", "\\frac{1}{2}", "½", "50%", "50\\%", "0.500", "0.502", "5e-1"]),
    (".5", ["0.5", ".5", "1/2"]),
    ("-0.5", ["-.5", "-1/2", "\\frac{-1}{2}", "-\\frac12", "1/-2"]),
    ("$.50", ["0.5", ".50", "\\$0.50", "50 %"]),
    ("1/2", ["\\frac{1}{2}", "\\dfrac12", "0.5", ".5", "1/2", "2/4"]),
    ("2/3", ["0.667", "0.6667", "\\frac{2}{3}"]),
    ("50%", ["50%", "50\\%", "50 %", "50 percent", "$50\\%$", "0.5", "\\frac{1}{2}"]),
    ("1000", ["1,000", "1000", "1{,}000", "10^3", "1\\times 10^3", "1 000", "1\\,000", "1e3"]),
    ("1,000,000", ["10^6", "1000000", "1 000 000"]),
    (
        "2.2e-10",
        [
            "2.2 \\times 10^{-10}",
            "2.2×10^{-10}",
            "2.2 x 10^-10",
            "2.2x10^{-10}",
            "2.2 X 10^{-10}",
            "2.2*10^-10",
            "2.2 * 10**-10",
            "2.2\\cdot10^{-10}",
            "2.2 · 10⁻¹⁰",
            "2.2×10⁻¹⁰",
            "2.2E-10",
            "2.2e−10",
            "$2.2 \\times 10^{-10}$",
            "2.2 \\times 10^{-10} m",
            "0.00000000022",
            "22e-11",
        ],
    ),
    ("2.2 \\times 10^{-10}", ["2.2e-10", "2.21 \\times 10^{-10}", "2.2×10⁻¹⁰"]),
    ("1.5 x 10^-3", ["1.5e-3", "0.0015"]),
    ("1.5e-3 mol", ["1.5 \\times 10^{-3} \\text{ mol}", "1.5×10⁻³ mol", "0.0015"]),
    ("3.20", ["3.21", "3.2"]),
    ("3\\pi", ["9.42", "3π"]),
    ("1e400", ["1e400", "10^{400}", "10e399"]),
    # units
    ("5 m/s", ["5", "5 m/s", "5 \\text{ m/s}", "5\\,\\mathrm{m/s}", "5 \\frac{m}{s}", "5~m/s"]),
    (
        "5 m/s",
        ["5 m s^{-1}", "5 m·s⁻¹", "5 m s^-1", "5 meters per second", "5\\text{ m}/\\text{s}"],
    ),
    ("9.8 m/s^2", ["9.8 m s^{-2}", "9.8 m/s²", "9.8 \\frac{\\text{m}}{\\text{s}^2}", "9.8"]),
    ("9.8 m/s^2", ["9.8 \\ \\mathrm{m/s^{2}}", "9.8 meters per second squared", "9.8 m/(s^2)"]),
    ("5 km", ["5 km", "5 kilometers", "5 kilometre", "5km"]),
    ("1.5 kJ", ["1.50 kJ", "1.5", "1.5 kilojoules", "1.5\\text{ kJ}", "1.5kJ", "1.51 kJ"]),
    ("8.314 J/(mol K)", ["8.314 J mol^{-1} K^{-1}", "8.31 J/mol/K", "8.314 J/(mol·K)"]),
    ("25 °C", ["25°C", "25^\\circ C", "25^{\\circ}\\text{C}", "25", "25 degrees Celsius", "25 ℃"]),
    ("30 degrees", ["30°", "30^\\circ", "30", "30 deg"]),
    ("3 µm", ["3 μm", "3 \\mu m", "3 \\mu\\text{m}", "3 um", "3 micrometers"]),
    ("4.7 kΩ", ["4.7 kΩ", "4.7 k\\Omega", "4.7 kilohm", "4.7 kilohms"]),
    ("500 nm", ["500 nm", "500 nanometers", "500", "5.0 \\times 10^2 nm"]),
    ("300 K", ["300 K", "300 kelvin", "300"]),
    ("5 cm^2", ["5 cm²", "5 \\text{cm}^2", "5 square centimeters", "5 cm2"]),
    ("3 apples", ["3 apples", "3", "3 apple", "3 Apples"]),
    ("5 mL", ["5 ml", "5 milliliters"]),
    ("€5", ["5 €", "5 euros", "€5.00", "5"]),
    ("5 m", ["5 m (approximately)", "5 m in total"]),
    ("NaCl", ["\\ce{NaCl}"]),
    ("2 hours", ["2 h", "2 hr", "2 hours"]),
    # texts
    (
        "Paris",
        ["paris", "the paris.", "'Paris'", "“Paris”", "**Paris**", "\\text{Paris}", " Paris "],
    ),
    ("Paris", ["The answer is Paris.", "It is Paris.", "Answer: Paris", "$\\text{Paris}$"]),
    ("mitochondria", ["The mitochondria", "Mitochondria!", "mitochondria,"]),
    ("H_2O", ["$H_2O$", "H₂O", "\\mathrm{H_2O}", "H2O", "H_{2}O", "\\text{H}_2\\text{O}"]),
    ("true", ["True", "TRUE."]),
    ("3:1", ["3:1", "3 : 1"]),
    ("10-20", ["10-20", "10–20", "10 - 20"]),
    ("12 March 1905", ["12 march 1905"]),
    ("an apple", ["apple", "the apple"]),
]

# (reference, answers that are wrong)
WRONG = [
    (
        "5",
        ["-5", "50", ".5", "0.5", "5%", "6", "5.01", "5.04", "4.999", "five apples", "nan", "inf"],
    ),
    ("5", ["5 six", "5 or 6", "5-6", "5 to 6", "between 5 and 6", "5, 6", "5 and 6", "5 or four"]),
    ("5", ["5!", "5/7", "2+3", "10/2+0", "5 = 6", "not 5", "maybe 5", "5?", "15", "5 6", "5/0"]),
    (
        "5",
        ["5e1", "5 \\times 10^1", "5x10^2", "\\sqrt{5}", "5^2", "1" * 309, "9" * 400, "1" * 3000],
    ),
    ("5", ["5 ± 1", "5 \\pm 1", "<5", ">5", "\\ge 5", "5+", "5i", "5x", "x+5", "", " ", "."]),
    ("50", [".50", "$.50", "\\$.50", "-.50", "0.50"]),
    (".5", ["5", "50", "-.5", "5%"]),
    ("0", ["0.001", "1", "zero point one", "0.0001"]),
    ("0.5", ["5", "5%", "50", "0.51", "-0.5", "1/3"]),
    ("1/2", ["1", "2", "12", "1/3", "1/20"]),
    ("50%", ["5%", "500", "0.05", "0.6", "60%"]),
    ("1000", ["1", "1,001", "1,0", "100", "1,000,000"]),
    ("2.2e-11", ["2.2e-10", "2.2", "2.2 \\times 10^{-10}", "2.2 \\times 10^{11}", "2.2e11"]),
    ("1.5 x 10^-3", ["1.5", "1.5e3"]),
    ("2/3", ["0.6", "0.65", "2", "3/2"]),
    ("3.20", ["3.9", "3.3"]),
    ("1" * 309, ["5", "1" * 308, "1" * 310, "2" * 309]),
    ("1e400", ["1e401", "5", "1e399", "inf"]),
    ("1e999999999", ["5", "1e999999998"]),
    # units
    ("9.8 mJ", ["9.8 MJ", "9.8 kJ", "9.8 J", "9.8 mj"]),
    ("5 Ms", ["5 ms", "5 s", "5 MS"]),
    ("5 MeV", ["5 meV", "5 eV", "5 keV"]),
    ("5 m/s", ["5 km/h", "5 m", "5 s/m", "5 m s", "5 m/s^2", "5 kg", "5 mi/s", "5 km/s"]),
    ("9.8 m/s^2", ["9.8 km/s^2", "9.8 m/s", "9.8 m^2/s", "9.8 m s^2"]),
    ("3 oranges", ["3 apples", "4 oranges", "oranges"]),
    ("25 °C", ["25 °F", "25 K", "26 °C", "25 degrees"]),
    ("5 cm^2", ["5 cm", "5 cm^3", "5 m^2"]),
    ("5 USD", ["€5"]),
    ("12", ["1 2"]),
    ("5 Pa", ["5 pA"]),
    ("300 K", ["300 k", "300 °C", "300 kK"]),
    ("3 sqrt(2)", ["3", "2"]),
    # texts
    ("Paris", ["not Paris", "Rome, Paris, London", "Rome", "Paris or Rome", "maybe Paris", ""]),
    ("Paris", ["The answer is not Paris.", "The answer is Paris or Rome.", "Is it Paris?"]),
    ("red", ["red blue green", "reddish", "re d", "infrared"]),
    ("vitamin A", ["vitamin", "A", "vitamin B"]),
    ("a", ["the", "an"]),
    ("12 March 1905", ["12", "12 March 1906"]),
    ("3:1", ["3", "1:3", "31"]),
    ("10-20", ["10", "-10", "20", "15"]),
    ("2 and 5", ["2", "5", "7"]),
    ("true", ["false", "not true"]),
    ("H_2O", ["H_2O_2", "HO", "H^2O", "2HO"]),
]
PAIRS_RIGHT = [(reference, answer) for reference, answers in RIGHT for answer in answers]
PAIRS_WRONG = [(reference, answer) for reference, answers in WRONG for answer in answers]


@pytest.mark.parametrize(
    "reference, answer",
    [
        ("7.4", "pH = 7.4"),
        ("7.4", "pH 7.4"),
        ("-285.8 kJ/mol", "ΔH = −285.8 kJ/mol"),
        ("-285.8 kJ/mol", "$\\Delta H = -285.8$ kJ/mol"),
        ("0.82 V", "E^{\\circ}_{cell} = +0.82 V"),
        ("Fe^{3+}", "Fe3+"),
        ("sp^3", "sp³"),
        ("C6H12O6", "\\text{C}_6\\text{H}_{12}\\text{O}_6"),
        ("1s^2 2s^2", "1s^{2}2s^{2}"),
        ("Na+", "$\\text{Na}^+$"),
        ("α-helix", "\\alpha-helix"),
        ("760 mmHg", "760 mm Hg"),
        ("42", '"42"'),
    ],
)
def test_names_formulas_and_quotation_marks(reference, answer):
    assert short_answer_equal(answer, reference)


def test_formulas_that_differ():
    for reference, answer in (("Fe^{3+}", "Fe2+"), ("Na+", "Na-"), ("sp3", "sp2"), ("7.4", "pH 8")):
        assert not short_answer_equal(answer, reference)


@pytest.mark.parametrize("reference, answer", PAIRS_RIGHT)
def test_an_answer_that_is_the_reference(reference, answer):
    assert short_answer_equal(answer, reference) is True


@pytest.mark.parametrize("reference, answer", PAIRS_WRONG)
def test_an_answer_that_is_not_the_reference(reference, answer):
    assert short_answer_equal(answer, reference) is False


REFERENCES = ["5", "0.5", "2.2e-10", "5 m/s", "Paris", "50%", "3\\sqrt{2}", "e^{-2}", "1" * 309]
LONG = [
    "(A" * 50000,
    "A or " * 20000,
    "\\text{" * 16000,
    " " * 100000,
    "1" * 100000,
    "1," * 50000,
    "answer is " * 10000,
    "1e999999999",
    "10^{10^{10}}",
    "9e99999",
    "\\frac{1" * 40,
    "5 " + "/" * 390,
    "9^9^9",
    "99999999!",
    "1.5e" + "9" * 300,
]


@pytest.mark.parametrize("answer", LONG, ids=range(len(LONG)))
def test_a_long_answer_or_a_large_number_costs_little(answer):
    start = time.process_time()
    for reference in REFERENCES:
        assert not short_answer_equal(answer, reference)
        short_answer_equal(answer, reference, "last-word")
    assert time.process_time() - start < 20


def test_random_texts_raise_nothing():
    generator = random.Random(0)
    pieces = [
        *"()[]{}.,;:!?'\"*_$\\/=<>-+&\n~^%15msx½°µΩ²⁻",
        ".5",
        "e-9",
        "kg",
        "\\frac",
        "\\text{",
    ]
    pieces += [
        "\\times 10^",
        "10^",
        "or ",
        "is ",
        "answer",
        "\ud83d",
        "\x00",
        "per ",
        "\\circ",
        "six",
    ]
    for i in range(20_000):
        text = "".join(generator.choices(pieces, k=generator.randint(1, 12)))
        assert short_answer_equal(text, generator.choice(REFERENCES)) in (True, False)
        if i % 4 == 0:
            assert short_answer_equal("5", text) in (True, False)


def test_only_the_last_word_counts_where_a_row_says_so():
    assert short_answer_equal("I think it is Red.", "red", "last-word")
    assert not short_answer_equal("red blue", "red", "last-word")
    assert not short_answer_equal("", "red", "last-word")


@pytest.mark.parametrize(
    "text, factors",
    [
        ("", {}),
        ("m/s^2", {"m": 1, "s": -2}),
        ("m s^{-2}", {"m": 1, "s": -2}),
        ("meters per second squared", {"m": 1, "s": -2}),
        ("kilojoules", {"kJ": 1}),
        ("square centimeters", {"cm": 2}),
        ("J/(mol K)", {"J": 1, "mol": -1, "K": -1}),
        ("mJ", {"mJ": 1}),
        ("MJ", {"MJ": 1}),
        ("or 6", None),
        ("x", None),
        ("six", None),
    ],
)
def test_a_unit_has_one_spelling(text, factors):
    assert unit_factors(text) == factors


def test_a_number_is_read_with_its_unit():
    quantity = read_quantity("2.2×10⁻¹⁰ m")
    assert quantity.number.value * 10**11 == 22
    assert quantity.unit == {"m": 1}
    assert read_quantity("5 or 6") is None
