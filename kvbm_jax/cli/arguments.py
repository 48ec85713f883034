"""Parsers of arguments that several commands take; what they refuse is wrong usage."""

import argparse
import math
from collections.abc import Callable
from pathlib import Path

__all__ = ["at_least", "folder", "listed", "seconds"]

_DAY = 86_400.0


def at_least(low: int) -> Callable[[str], int]:
    """Returns a parser of integers from `low`."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} is no integer >= {low}")
        return int(text)

    return parse


def seconds(text: str) -> float:
    """Parses a number of seconds, a day at most."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 <= found <= _DAY:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0 to {_DAY:,.0f}")
    return found


def listed[T](item: Callable[[str], T]) -> Callable[[str], list[T]]:
    """Returns a parser of items between commas; one that is named twice counts once."""

    def parse(text: str) -> list[T]:
        return list(dict.fromkeys(item(part) for part in text.split(",")))

    return parse


def folder(text: str) -> Path:
    """Parses the path of a folder that is there."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is no folder")
    return path
