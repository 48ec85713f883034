"""How `benchmarks.gpu` measures: rows, times, and the clock of a part.

A measurement is the median of several; each is the time of some calls in a row, waited for at the end, so that their
dispatch overlaps. Two calls before do not count. Inputs that are read are larger than the caches of a GPU, or change
from call to call.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["Clock", "Row", "copy_seconds", "format_row", "seconds_of", "tell", "told"]

_MARK = "=== "
_ENOUGH = 0.004  # seconds that calls in a row should take
_MOST_CALLS = 32


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement beside its baseline, or a check.

    Attributes:
      case: what was measured.
      bytes: read and written, each once; 0 if that says nothing.
      seconds: of a call.
      baseline: what it stands beside.
      baseline_seconds: of that.
      target: the ratio that is asked for; None if none is.
    """

    case: str
    bytes: int
    seconds: float
    baseline: str
    baseline_seconds: float
    target: float | None = None

    @property
    def ratio(self) -> float:
        """Baseline's time over the case's: 1 is as fast as the baseline."""
        return self.baseline_seconds / self.seconds

    @property
    def met(self) -> bool | None:
        """Whether it reaches its target; None if it has none."""
        return None if self.target is None else self.ratio >= self.target


class Clock:
    """The time that a part may take.

    Args:
      seconds: from now on.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.perf_counter() + seconds
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        """Seconds left, at least 1."""
        return max(self._end - time.perf_counter(), 1)

    def allows(self, what: str) -> bool:
        """Returns whether there is time left; notes what is left out if not."""
        if time.perf_counter() < self._end:
            return True
        self.left_out.append(what)
        return False


def tell(kind: str, **fields: Any) -> None:
    """Passes something on to the process that runs the parts, at once."""
    print(_MARK + json.dumps({"kind": kind, **fields}), flush=True)


def told(output: str) -> list[dict[str, Any]]:
    """Reads what a part told, in order; a line that was cut off is none."""
    found = []
    for line in output.splitlines():
        if line.startswith(_MARK):
            try:
                found.append(json.loads(line.removeprefix(_MARK)))
            except json.JSONDecodeError:
                continue
    return found


def seconds_of(call: Callable[[int], Any], repeats: int) -> float:
    """Returns the median seconds of `call(i)`, i counting up from 0."""
    jax.block_until_ready(call(0))
    begun = time.perf_counter()
    jax.block_until_ready(call(1))
    once = time.perf_counter() - begun
    calls = max(1, min(_MOST_CALLS, int(_ENOUGH / max(once, 1e-9))))
    times = []
    for repeat in range(repeats):
        begun = time.perf_counter()
        for i in range(calls):
            result = call(2 + repeat * calls + i)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - begun) / calls)
    return statistics.median(times)


@functools.cache
def copy_seconds(num_bytes: int, repeats: int) -> float:
    """Returns the seconds of a copy on the device of an array of so many bytes."""
    source = jax.jit(lambda: jax.lax.iota(jnp.uint32, max(num_bytes // 4, 1)) * jnp.uint32(2654435761))()
    copy = jax.jit(jnp.copy)
    return seconds_of(lambda i: copy(source), repeats)


def format_row(row: Row) -> str:
    """Returns a row as a line of the Markdown table."""
    speeds = [f"{row.bytes / s / 1e9:,.1f}" if row.bytes else "" for s in (row.seconds, row.baseline_seconds)]
    size = f"{row.bytes / 2**20:,.2f}" if row.bytes else ""
    target = "" if row.target is None else f"{row.target:g}, {'met' if row.met else 'MISSED'}"
    cells: Sequence[str] = (
        row.case,
        size,
        f"{row.seconds * 1e6:,.1f}",
        speeds[0],
        row.baseline,
        f"{row.baseline_seconds * 1e6:,.1f}",
        speeds[1],
        f"{row.ratio:.2f}",
        target,
    )
    return f"| {' | '.join(cells)} |"
