"""Leases: blocks that a peer may read for a while, and that nobody writes meanwhile.

A lease ends when its peer gives it back, when its peer's connection ends, or when its time is over, whichever comes
first. A peer that reads on after that finds other bytes, which their checksums tell.
"""

import itertools
import threading
from collections.abc import Iterable
from typing import NamedTuple

from kvbm_jax.closing import Closing
from kvbm_jax.errors import BlockStateError
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.offload.host import HostBlockStore, Pins
from kvbm_jax.protocols import Clock, MetricsSink

__all__ = ["Leases"]


class _Lease(NamedTuple):
    slots: list[int]
    deadline: int  # monotonic ns


class Leases(Closing):
    """The leases on one store's blocks.

    Args:
      store: holds the blocks.
      clock: for deadlines.
      metrics: takes measurements.
    """

    def __init__(self, store: HostBlockStore, *, clock: Clock, metrics: MetricsSink | None = None) -> None:
        self._store = store
        self._num_slots = len(store.slots)
        self._clock = clock
        self._metrics = metrics or NullMetrics()
        self._leases: dict[int, _Lease] = {}
        self._ids = itertools.count(1)
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._expire, name="kvbm-leases", daemon=True)
        self._thread.start()

    def grant(self, keys: Iterable[tuple[bytes, int]], seconds: float) -> tuple[int, Pins]:
        """Leases blocks for so long; returns the lease's number, and where they lie.

        Raises:
          BlockStateError: All is closed.
        """
        with self._changed:
            if self._closed:
                raise BlockStateError("the leases are closed")
            pins = self._store.pin(keys)
            slots = [slot for slot in pins.block_ids if slot < self._num_slots]
            number = next(self._ids)
            self._leases[number] = _Lease(slots, self._clock.monotonic_ns() + round(seconds * 1e9))
            self._tell()
            self._changed.notify()
        return number, pins

    def release(self, number: int) -> None:
        """Ends a lease. Not an error if it has ended."""
        with self._changed:
            self._end(number)

    def close(self) -> None:
        """Ends all leases."""
        with self._changed:
            self._closed = True
            for number in list(self._leases):
                self._end(number)
            self._changed.notify()
        self._thread.join()

    def _end(self, number: int) -> bool:
        lease = self._leases.pop(number, None)
        if lease is not None:
            self._store.unpin(lease.slots)
            self._tell()
        return lease is not None

    def _tell(self) -> None:
        self._metrics.gauge("kvbm_leased_blocks", sum(len(lease.slots) for lease in self._leases.values()))

    def _expire(self) -> None:
        with self._changed:
            while not self._closed:
                now = self._clock.monotonic_ns()
                over = [number for number, lease in self._leases.items() if lease.deadline <= now]
                for number in over:
                    self._end(number)
                if over:
                    self._metrics.count("kvbm_leases_expired_total", len(over))
                deadlines = [lease.deadline for lease in self._leases.values()]
                self._changed.wait((min(deadlines) - now) / 1e9 if deadlines else None)
