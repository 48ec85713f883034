"""A reader's end of a stream of events, the same whatever carries it.

A `Subscription` is a bounded queue between whoever brings items, the in-process bus or the thread of a transport, and
whoever iterates it, in any thread or asynchronously.

    offer(batch)   for who must not wait: a full queue drops its oldest batch and marks the gap where it was
    push(item)     for who can wait until there is room

What is read are batches; gaps, where events are lost for good; and snapshots of a worker, which take the place of all
that was told of it before.
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

from kvbm_jax.closing import Closing
from kvbm_jax.errors import ConfigError
from kvbm_jax.events.schema import KvEventBatch
from kvbm_jax.events.snapshot import WorkerSnapshot

__all__ = ["DEFAULT_CAPACITY", "EventGap", "StreamItem", "Subscription"]

DEFAULT_CAPACITY = 4096


@dataclass(frozen=True, slots=True)
class EventGap:
    """Stands in a subscription where batches were lost: dropped by a full queue, or missed and not to be had again."""

    batches: int
    events: int  # 0 if not known


type StreamItem = KvEventBatch | EventGap | WorkerSnapshot


class Subscription(Closing):
    """One reader's queue; made by `EventBus.subscribe` and by the transports.

    Iterate it, synchronously or asynchronously, or ask it with `poll` and `drain`. Iteration ends once the
    stream has ended and everything brought before has been read, or at once when the subscription itself is
    closed. All methods may be called from any thread; each item goes to one of the callers.

    Args:
      leave: is told when the reader closes.
      capacity: items that may wait to be read.
    """

    def __init__(self, leave: Callable[["Subscription"], object], capacity: int = DEFAULT_CAPACITY) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity = {capacity}: allowed is an integer >= 1")
        self._leave = leave
        self._capacity = capacity
        self._items: deque[StreamItem] = deque()
        self._lost_batches = 0
        self._lost_events = 0
        self._taken = 0
        self._ended = False
        self._condition = threading.Condition()
        self._waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    def poll(self, timeout: float | None = 0.0) -> StreamItem | None:
        """Returns the next item.

        Args:
          timeout: Seconds to wait for one; 0 for not at all, None for as long as it takes.

        Returns:
          A batch, a gap or a snapshot; None if none came in time, or the stream has ended (`ended` tells).
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        with self._condition:
            while True:
                if (item := self._take()) is not None or self._ended:
                    return item
                rest = None if deadline is None else deadline - time.monotonic()
                if rest is not None and rest <= 0:
                    return None
                self._condition.wait(rest)

    def drain(self) -> list[StreamItem]:
        """Returns all that is waiting, without waiting for more."""
        with self._condition:
            items = []
            while (item := self._take()) is not None:
                items.append(item)
            return items

    @property
    def ended(self) -> bool:
        """Whether no further item will ever come: all has been read, and the stream or this reader is closed."""
        with self._condition:
            return self._ended and not self._items and not self._lost_batches

    def close(self) -> None:
        """Leaves the stream and forgets what has not been read. Idempotent."""
        with self._condition:
            self._items.clear()
            self._lost_batches = self._lost_events = 0
            self.end()
        self._leave(self)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> StreamItem:
        item = self.poll(timeout=None)
        if item is None:
            raise StopIteration
        return item

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> StreamItem:
        loop = asyncio.get_running_loop()
        while True:
            with self._condition:
                if (item := self._take()) is not None:
                    return item
                if self._ended:
                    raise StopAsyncIteration
                waiter = loop.create_future()
                self._waiters.append((loop, waiter))
            try:
                await waiter
            finally:
                self._forget(loop, waiter)

    def offer(self, batch: KvEventBatch) -> int:
        """Appends a batch at once, and returns how many events it pushed out."""
        dropped = 0
        with self._condition:
            if self._ended:
                return 0
            if len(self._items) >= self._capacity:
                oldest = self._items.popleft()
                dropped = len(oldest) if isinstance(oldest, KvEventBatch) else 0
                self._lost_batches += 1
                self._lost_events += dropped
            self._items.append(batch)
            self._wake()
        return dropped

    def begin_with(self, item: StreamItem) -> None:
        """Puts an item before all others, and beyond the bound; for who makes a subscription."""
        with self._condition:
            if self._lost_batches:  # of what came after the item
                self._items.appendleft(EventGap(self._lost_batches, self._lost_events))
                self._lost_batches = self._lost_events = 0
            self._items.appendleft(item)
            self._wake()

    def push(self, item: StreamItem, timeout: float | None = None) -> bool:
        """Appends an item once there is room; returns whether that was in time, and the reader still there."""
        with self._condition:
            fits = self._condition.wait_for(lambda: self._ended or len(self._items) < self._capacity, timeout)
            if self._ended or not fits:
                return False
            self._items.append(item)
            self._wake()
        return True

    def push_all(self, items: Sequence[StreamItem]) -> bool:
        """Appends items, once there is room for some, and returns True; False if the reader has closed."""
        with self._condition:
            self._condition.wait_for(lambda: self._ended or len(self._items) < self._capacity)
            if self._ended:
                return False
            self._items.extend(items)
            self._wake()
        return True

    @property
    def taken(self) -> int:
        """How many of the items brought here have been read."""
        with self._condition:
            return self._taken

    def end(self) -> None:
        """Says that nothing more will come. Idempotent."""
        with self._condition:
            self._ended = True
            self._wake()

    def _take(self) -> StreamItem | None:
        """Pops the next item; a gap comes first, for it is always the oldest that was dropped."""
        if self._lost_batches:
            gap = EventGap(self._lost_batches, self._lost_events)
            self._lost_batches = self._lost_events = 0
            return gap
        if not self._items:
            return None
        if len(self._items) >= self._capacity:
            self._condition.notify_all()  # there will be room again
        self._taken += 1
        return self._items.popleft()

    def _wake(self) -> None:
        """Wakes every waiter: each looks for itself, so none is left behind when one gives up meanwhile."""
        self._condition.notify_all()
        while self._waiters:
            loop, waiter = self._waiters.popleft()
            with contextlib.suppress(RuntimeError):  # the reader's loop has been closed
                loop.call_soon_threadsafe(_resolve, waiter)

    def _forget(self, loop: asyncio.AbstractEventLoop, waiter: asyncio.Future[None]) -> None:
        with self._condition:
            if (loop, waiter) in self._waiters:
                self._waiters.remove((loop, waiter))


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
