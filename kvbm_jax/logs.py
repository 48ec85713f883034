"""Structured logs: what the library says through the standard `logging`, with fields, as JSON or for a terminal.

The library logs under `kvbm_jax` and installs nothing by itself. `configure` gives that logger a handler of its own:

    logs.configure("json", level="debug")
    with logs.context(request_id="r-17"):
        seq = manager.start(prompt)

    {"time": "2026-11-24T18:00:00.123Z", "level": "debug", "logger": "kvbm_jax.request_log", "message": "a
     sequence begins", "request_id": "r-17", "row": 0, "tokens": 40, "found": {"g1": 32}}

Allocations, evictions, offloads and loads are told at level debug, what goes wrong at warning and error; each with the
blocks concerned. What repeats is told a few times a second, and then how often it was not. A context is that of the
caller's thread or task: what the offload worker does carries blocks, and no request.
"""

import contextlib
import contextvars
import enum
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TextIO

from kvbm_jax.errors import ConfigError
from kvbm_jax.protocols import BlockKey

__all__ = [
    "LEVELS",
    "ConsoleFormatter",
    "JsonFormatter",
    "LogFormat",
    "RateLimit",
    "check_level",
    "configure",
    "context",
    "fields",
    "named",
]

LEVELS: Final = ("debug", "info", "warning", "error", "critical")

_ATTRIBUTE: Final = "kvbm_fields"
_MOST_NAMED = 8  # blocks that a message names
_MOST_MESSAGES = 1024  # different ones that a limit keeps apart
_CONTEXT: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("kvbm_jax_logs")


def check_level(level: str) -> str:
    """Returns the name of a level as it is.

    Raises:
      ConfigError: if there is no such level.
    """
    if level not in LEVELS:
        raise ConfigError(f"level = {level!r}: allowed is one of {', '.join(LEVELS)}")
    return level


class LogFormat(enum.StrEnum):
    """How lines look."""

    JSON = "json"
    CONSOLE = "console"


def fields(**values: Any) -> dict[str, Any]:
    """Returns what `logging` takes as `extra`, for a record with these fields."""
    return {_ATTRIBUTE: values}


def named(keys: Sequence[BlockKey]) -> list[str]:
    """Returns the hashes of blocks as a message names them: the first few."""
    return [key.sequence_hash.hex() for key in keys[:_MOST_NAMED]]


@contextlib.contextmanager
def context(**values: Any) -> Iterator[None]:
    """Has what this thread or task logs within carry fields; within another context, those too."""
    token = _CONTEXT.set({**_CONTEXT.get({}), **values})
    try:
        yield
    finally:
        _CONTEXT.reset(token)


class JsonFormatter(logging.Formatter):
    """One JSON object a line. What is no JSON is told as text."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record."""
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        told: dict[str, Any] = {
            "time": when.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        told |= {name: value for name, value in _fields_of(record).items() if name not in told}
        if record.exc_info and record.exc_info[0] is not None:
            kind, error, _ = record.exc_info
            trace = self.formatException(record.exc_info)
            told["error"] = {"type": kind.__name__, "message": str(error), "trace": trace}
        return json.dumps(told, default=str)


class ConsoleFormatter(logging.Formatter):
    """A line for a person: time, level, logger, message, fields; a trace below."""

    def format(self, record: logging.LogRecord) -> str:
        """Formats a record."""
        when = datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S.%f")[:-3]
        shown = " ".join(f"{name}={json.dumps(value, default=str)}" for name, value in _fields_of(record).items())
        line = f"{when} {record.levelname.lower():<7} {record.name}: {record.getMessage()} {shown}".rstrip()
        if record.exc_info and record.exc_info[0] is not None:
            line += "\n" + self.formatException(record.exc_info)
        return line


class RateLimit(logging.Filter):
    """Lets each message pass a number of times in a period; the next that passes says how many did not.

    Messages are the same if logger, level and text before formatting are.

    Args:
      count: how many times.
      seconds: the period, from the first of them on.
      clock: for the period, in seconds.
    """

    def __init__(self, count: int = 5, seconds: float = 1.0, *, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        if count < 1 or seconds <= 0:
            raise ConfigError(f"a limit of {count} messages in {seconds} seconds; name at least 1, and more than 0")
        self._count = count
        self._seconds = seconds
        self._clock = clock
        self._seen: OrderedDict[tuple[str, int, str], list[float]] = OrderedDict()  # begin, told, not told

    def filter(self, record: logging.LogRecord) -> bool:
        """Tells whether a record passes; runs under the lock of its handler."""
        key, now = (record.name, record.levelno, str(record.msg)), self._clock()
        state = self._seen.setdefault(key, [now, 0, 0])
        self._seen.move_to_end(key)
        if len(self._seen) > _MOST_MESSAGES:
            self._seen.popitem(last=False)
        if now - state[0] >= self._seconds:
            state[0], state[1] = now, 0
        if state[1] >= self._count:
            state[2] += 1
            return False
        state[1] += 1
        if state[2]:
            setattr(record, _ATTRIBUTE, {**getattr(record, _ATTRIBUTE, {}), "not_told": int(state[2])})
            state[2] = 0
        return True


class _Handler(logging.StreamHandler[TextIO]):
    """The one that `configure` installs; filters under its lock."""

    def handle(self, record: logging.LogRecord) -> bool:
        with self.lock or contextlib.nullcontext():
            return bool(super().handle(record))


def configure(
    format: LogFormat | str = LogFormat.CONSOLE,  # noqa: A002 (what it is)
    *,
    level: str = "info",
    stream: TextIO | None = None,
    limit: RateLimit | None = None,
) -> None:
    """Has the library's logs written, in place of what was configured before, and no longer passed to the root logger.

    Args:
      format: `json` or `console`.
      level: the least that is written, one of `LEVELS`.
      stream: where; None for standard error.
      limit: of what repeats; None for 5 a second.

    Raises:
      ConfigError: if there is no such format or level.
    """
    if format not in list(LogFormat):
        raise ConfigError(f"format = {format!r}: allowed is one of {', '.join(LogFormat)}")
    check_level(level)
    handler = _Handler(stream)
    handler.setFormatter(JsonFormatter() if format == LogFormat.JSON else ConsoleFormatter())
    handler.addFilter(RateLimit() if limit is None else limit)
    logger = logging.getLogger("kvbm_jax")
    for former in [former for former in logger.handlers if isinstance(former, _Handler)]:
        logger.removeHandler(former)
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def _fields_of(record: logging.LogRecord) -> dict[str, Any]:
    return {**_CONTEXT.get({}), **getattr(record, _ATTRIBUTE, {})}
