"""What a command hands back to be printed."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

__all__ = ["Report", "progress", "table"]


@dataclasses.dataclass(frozen=True)
class Report:
    """A command's result: the object for `--json`, the text for people, and the exit status."""

    data: dict[str, Any]
    text: str
    status: int = 0

    def json(self) -> str:
        """The object on one line."""
        return json.dumps(self.data)


def table(rows: Iterable[tuple[str, object]]) -> str:
    """Lays out pairs as two columns."""
    pairs = [(name, str(value)) for name, value in rows]
    width = max((len(name) for name, _ in pairs), default=0)
    return "\n".join(f"{name:<{width}}  {value}".rstrip() for name, value in pairs)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yields what shows what is under way, in place of what was shown before, to a person only; wipes it at the end."""

    def show(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)

    try:
        yield show
    finally:
        show("")
