"""Is what a program printed what a test expects? Two ways to compare, both line by line.

"numbers"        as the makers of training data compare (Guru, NeMo Gym): decimals within 1e-6
"livecodebench"  as LiveCodeBench's grader compares: equal texts, or exactly equal decimals

This file imports the standard library only, because the sandbox's worker reads it.
"""

import math
import re
from decimal import Decimal, InvalidOperation

DECIMAL = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?", re.ASCII)
TOLERANCE = 1e-6
SMALLEST = 1e-3  # an expected value below this in size has no absolute tolerance, but 0 has


def same_output(printed: str, expected: str, compare: str = "numbers") -> bool:
    """Is the printed text the expected one? White space around the text and the lines is free."""
    lines, expected_lines = stripped_lines(printed), stripped_lines(expected)
    if len(lines) != len(expected_lines):
        return False
    same_line = SAME_LINE[compare]
    for line, expected_line in zip(lines, expected_lines):
        if line != expected_line and not same_line(line, expected_line):
            return False
    return True


def stripped_lines(text: str) -> list[str]:
    """The lines of a text, all without white space around them."""
    return [line.strip() for line in text.strip().split("\n")]


def same_numbers(line: str, expected: str) -> bool:
    """Are the lines equal token by token, decimals within TOLERANCE?"""
    tokens, expected_tokens = line.split(), expected.split()
    if len(tokens) != len(expected_tokens):
        return False
    for token, expected_token in zip(tokens, expected_tokens):
        if token != expected_token and not close(token, expected_token):
            return False
    return True


def close(token: str, expected: str) -> bool:
    """Are two tokens numbers, at least one of them with a point or an exponent, and close?

    The difference is at most 1e-6 of the expected value or, if that is 0 or at least 1e-3 in size,
    at most 1e-6. Integers, nan and inf must be equal as texts.
    """
    if not DECIMAL.fullmatch(token) or not DECIMAL.fullmatch(expected):
        return False
    if not any(mark in token + expected for mark in ".eE"):
        return False
    value, expected_value = float(token), float(expected)
    if math.isinf(value) or math.isinf(expected_value):
        return False
    allowed = TOLERANCE * abs(expected_value)
    if expected_value == 0 or abs(expected_value) >= SMALLEST:
        allowed = max(allowed, TOLERANCE)
    return abs(value - expected_value) <= allowed


def same_decimals(line: str, expected: str) -> bool:
    """Are all tokens of both lines decimals, and pairwise equal? 0.50 is 0.5, exactly."""
    try:
        values = [Decimal(token) for token in line.split()]
        return values == [Decimal(token) for token in expected.split()]
    except InvalidOperation:
        return False


SAME_LINE = {"numbers": same_numbers, "livecodebench": same_decimals}
