"""Parsers of numbers on the command lines of the examples; what they refuse is wrong usage."""

import argparse
from collections.abc import Callable

__all__ = ["at_least", "seed"]


def at_least(low: int) -> Callable[[str], int]:
    """Returns a parser of whole numbers from `low`."""

    def parse(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {low}")
        return int(text)

    return parse


def seed(text: str) -> int:
    """Parses a seed as JAX's keys take it."""
    number = at_least(0)(text)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is out of range; allowed are whole numbers below 2**32")
    return number
