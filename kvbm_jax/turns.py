"""Who may use a manager now: one thread at a time, and an operator's command next in line.

Calls of a serving thread take the turn for as long as they last. In a tight loop of such calls the lock is taken again
before a waiting thread wakes up, so there is a door before the seat: everybody goes through it, and a command stands in
it while it waits. At most the call under way, and one that is past the door already, go before a command.

    take      door: pass -> seat: act
    command   door: stand in it -> seat: act -> leave both

Whoever has the turn may take it again, without waiting.
"""

import threading
import time
from collections.abc import Callable

from kvbm_jax.errors import BusyError

__all__ = ["Turns"]


class Turns:
    """Has threads act one after the other."""

    def __init__(self) -> None:
        self._door = threading.Lock()
        self._seat = threading.Lock()
        self._holder: int | None = None  # the thread that has the turn; written by that thread alone

    def take[R](self, act: Callable[[], R]) -> R:
        """Waits for the turn, acts, and returns what came of it."""
        if self._holder == threading.get_ident():
            return act()
        with self._door:
            pass
        with self._seat:
            return self._act(act)

    def command[R](self, act: Callable[[], R], seconds: float | None = None) -> R:
        """Takes the turn before calls that have not begun.

        Args:
          act: what is to be done.
          seconds: how long to wait for the turn; None for as long as it takes.

        Raises:
          BusyError: if it did not come; nothing has been done then.
        """
        if self._holder == threading.get_ident():
            return act()
        end = None if seconds is None else time.monotonic() + seconds
        _acquire(self._door, end, seconds)
        try:
            _acquire(self._seat, end, seconds)
            try:
                return self._act(act)
            finally:
                self._seat.release()
        finally:
            self._door.release()

    def _act[R](self, act: Callable[[], R]) -> R:
        self._holder = threading.get_ident()
        try:
            return act()
        finally:
            self._holder = None


def _acquire(lock: threading.Lock, end: float | None, seconds: float | None) -> None:
    left = -1.0 if end is None else max(end - time.monotonic(), 0.0)
    if not lock.acquire(timeout=left):
        raise BusyError(
            f"the manager has been in one call for {seconds:g} seconds; nothing was done: ask again, or wait longer"
        )
