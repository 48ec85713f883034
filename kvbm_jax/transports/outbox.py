"""What stands between a step and the network: a bounded queue of batches that never makes the step wait.

    publish -> put ─ deque ─ take -> encode, send
                 │            │
                 └ too full: ─┴─> LiveBlocks: what the worker holds after the last batch taken or dropped

Batches are numbered as they leave the queue, sent or dropped, so a dropped one is a gap in the numbers that reach the
wire, and readers notice. Either way the batch is part of the worker's history, and of the snapshots that heal the gap.
"""

import enum
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.events import KvEventBatch, LiveBlocks, WorkerSnapshot
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.protocols import MetricsSink

__all__ = ["Outbox", "OutboxStats", "Overflow"]

_UNFOLDED = 512  # batches that may wait to be part of the snapshot


class Overflow(enum.StrEnum):
    """What happens to a batch that finds the queue full."""

    DROP_OLDEST = "drop_oldest"  # the oldest makes room; readers see the gap and recover
    BLOCK = "block"  # the publisher waits for room


class OutboxStats(NamedTuple):
    """What a publisher has done so far; taken, dropped and waiting are together what was published."""

    taken: int  # batches sent, or about to be
    dropped: int  # batches that made room
    waiting: int  # batches
    unsent: int = 0  # batches of those taken that could not be put into a message; readers see a gap


class Outbox:
    """The queue of one worker; `put` may be called from any thread, `take` from one.

    Args:
      worker_id: whose batches these are.
      capacity: batches that may wait.
      overflow: what happens to more.
      wake: is called when there is something to take after `take` returned nothing; must return at once.
      metrics: counts what is dropped.
    """

    def __init__(
        self,
        worker_id: str,
        *,
        capacity: int,
        overflow: Overflow,
        wake: Callable[[], object],
        metrics: MetricsSink | None = None,
    ) -> None:
        if capacity < 1:
            raise ConfigError(f"max_queue_size = {capacity}: allowed is an integer >= 1")
        self._capacity = capacity
        self._overflow = overflow
        self._wake = wake
        self._metrics = NullMetrics() if metrics is None else metrics
        self._waiting: deque[KvEventBatch] = deque()
        self._idle = True
        self._closed = False
        self._live = LiveBlocks(worker_id)
        self._unfolded: list[KvEventBatch] = []
        self._next_sequence = 0
        self._dropped = 0
        self._order = threading.Lock()  # held where batches leave the queue, and while a snapshot is made
        self._room = threading.Condition()

    def put(self, batch: KvEventBatch) -> None:
        """Appends a batch.

        Raises:
          BlockStateError: After `close`.
        """
        if len(self._waiting) >= self._capacity and not self._closed:
            self._make_room()
        if self._closed:
            raise BlockStateError("the publisher of events is closed; publish before close()")
        self._waiting.append(batch)
        if self._idle:
            self._idle = False
            self._wake()

    def take(self, limit: int) -> tuple[int, list[KvEventBatch]]:
        """Removes and returns the oldest batches, `limit` at most, and the number of the first; none if none waits."""
        waiting = self._waiting
        with self._order:
            if not waiting:
                self._idle = True
                if not waiting:  # what came before is seen here, what comes after wakes
                    return self._next_sequence, []
                self._idle = False
            first = self._next_sequence
            taken = [waiting.popleft() for _ in range(min(limit, len(waiting)))]
            self._next_sequence += len(taken)
            self._unfolded += taken
            if len(self._unfolded) >= _UNFOLDED:
                self._fold()
        if self._overflow is Overflow.BLOCK and len(waiting) <= self._capacity // 2:
            with self._room:
                self._room.notify_all()
        self._metrics.gauge("kvbm_events_queue_depth", len(waiting))
        return first, taken

    def snapshot(self) -> tuple[int, WorkerSnapshot]:
        """Returns the number of the next batch to be taken, and what the worker holds before it."""
        with self._order:
            self._fold()
            return self._next_sequence, self._live.snapshot(time.time_ns())

    def close(self) -> None:
        """Refuses further batches; what is waiting can still be taken."""
        self._closed = True
        with self._room:
            self._room.notify_all()

    @property
    def empty(self) -> bool:
        """Whether nothing is waiting."""
        return not self._waiting

    @property
    def next_sequence(self) -> int:
        """The number that the next batch will have."""
        return self._next_sequence

    def stats(self) -> OutboxStats:
        """Returns the counters."""
        return OutboxStats(self._next_sequence - self._dropped, self._dropped, len(self._waiting))

    def _make_room(self) -> None:
        if self._overflow is Overflow.BLOCK:
            with self._room:
                self._room.wait_for(lambda: self._closed or len(self._waiting) < self._capacity)
        elif self._order.acquire(blocking=False):  # else a snapshot is being made: the queue may grow meanwhile
            try:
                dropped = 0
                while len(self._waiting) >= self._capacity:
                    batch = self._waiting.popleft()
                    self._next_sequence += 1
                    self._dropped += 1
                    self._unfolded.append(batch)
                    dropped += len(batch)
            finally:
                self._order.release()
            self._metrics.count("kvbm_events_dropped_total", dropped)

    def _fold(self) -> None:
        self._live.apply_all(self._unfolded)
        self._unfolded.clear()
