"""How the calls of a manager are carried out: one at a time, none after its end, and with nothing left half done.

    take       waits for the turn (`kvbm_jax.turns`) and acts, also after the end
    whole      the same, but refused after the end; after an interrupt within, things are repaired
    command    as `whole`, and next in line
    in_parts   gives the turn back between parts, while there is something to wait for
    end        the last

An act is a function without arguments; what it returns and raises is the caller's.
"""

import functools
from collections.abc import Callable, Generator

from kvbm_jax.errors import BlockStateError
from kvbm_jax.interrupts import on_interrupt
from kvbm_jax.turns import Turns

__all__ = ["Calls"]


class Calls:
    """Carries out calls that may come from any thread.

    Where an argument is called `repair`, it is called when an interrupt (Ctrl-C, say) has broken into the act.
    """

    def __init__(self) -> None:
        self._turns = Turns()
        self.ended = False

    def take[R](self, act: Callable[[], R]) -> R:
        """Acts when no other thread does."""
        return self._turns.take(act)

    def whole[R](self, act: Callable[[], R], repair: Callable[[], object]) -> R:
        """Acts in turn, unless the end has come.

        Raises:
          BlockStateError: if it has.
        """
        return self._turns.take(lambda: self._carry_out(act, repair))

    def command[R](self, act: Callable[[], R], repair: Callable[[], object], seconds: float | None) -> R:
        """Acts before calls that have not begun; see `Turns.command`.

        Raises:
          BusyError: if the turn did not come in so many seconds; nothing has been done then.
          BlockStateError: if the end has come.
        """
        return self._turns.command(lambda: self._carry_out(act, repair), seconds)

    def in_parts[A, R](self, parts: Generator[Callable[[], A], A | None, R]) -> R:
        """Acts part by part; other threads have their turn while what a part has yielded is called for its answer.

        Raises:
          BlockStateError: if the end comes before the last part.
        """
        answer: A | None = None
        while True:
            try:
                wait = self._turns.take(functools.partial(self._go_on, parts, answer))
            except StopIteration as end:
                result: R = end.value
                return result
            answer = wait()

    def end(self, act: Callable[[], object]) -> None:
        """Acts in turn, once, after which nothing whole is done any more."""
        self._turns.take(lambda: self._end(act))

    def require_open(self) -> None:
        """Raises `BlockStateError` if the end has come."""
        if self.ended:
            raise BlockStateError("the manager is closed")

    def _carry_out[R](self, act: Callable[[], R], repair: Callable[[], object]) -> R:
        self.require_open()
        with on_interrupt(repair):
            return act()

    def _go_on[A, R](self, parts: Generator[Callable[[], A], A | None, R], answer: A | None) -> Callable[[], A]:
        self.require_open()
        return parts.send(answer)

    def _end(self, act: Callable[[], object]) -> None:
        if not self.ended:
            self.ended = True
            act()
