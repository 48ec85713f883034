"""Which sequences run, and in which rows of the batch."""

from collections.abc import Callable, Iterator

from kvbm_jax.errors import BlockStateError
from kvbm_jax.handles import Sequence

__all__ = ["Roster"]


class Roster:
    """The running sequences of one manager.

    Args:
      max_sequences: rows of the batch.
      on_leave: is told of each that runs no more.
    """

    def __init__(self, max_sequences: int, on_leave: Callable[[Sequence], object]) -> None:
        self.max_sequences = max_sequences
        self._on_leave = on_leave
        self._running: dict[int, Sequence] = {}

    def __iter__(self) -> Iterator[Sequence]:
        """The running sequences, those that began first before others."""
        return iter(list(self._running.values()))

    def __len__(self) -> int:
        return len(self._running)

    def free_row(self) -> int:
        """Returns the first row that no sequence runs in.

        Raises:
          BlockStateError: if there is none.
        """
        free = set(range(self.max_sequences)) - self._running.keys()
        if not free:
            raise BlockStateError(
                f"{self.max_sequences} sequences are running, as many as max_sequences; release one first"
            )
        return min(free)

    def enter(self, seq: Sequence, row: int) -> None:
        """Has a sequence run in a row."""
        seq.row = row
        seq.released = False
        self._running[row] = seq

    def leave(self, seq: Sequence) -> None:
        """Has a sequence run no more."""
        del self._running[seq.row]
        seq.released = True
        self._on_leave(seq)

    def require(self, seq: Sequence) -> None:
        """Raises `BlockStateError` unless a sequence is running."""
        if self._running.get(seq.row) is not seq:
            raise BlockStateError(f"the sequence of row {seq.row} is not running; it was released or lost")
