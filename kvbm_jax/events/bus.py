"""The event stream inside one process: a publisher on one side, any number of subscribers on the other.

`EventBus` is the sink a manager publishes to. Each `Subscription` has a queue of its own, bounded, so that a
slow reader costs memory for `capacity` batches and never makes the publisher wait. A full queue drops its
oldest batch, and the reader gets an `EventGap` with the number of events lost where they would have stood. A
subscriber sees what is published after it subscribed; there is no history here, and no thread: batches wait
in their queues until read.

    publish → bus ─┬→ queue → for batch in subscription
                   ├→ queue → async for batch in subscription
                   └→ queue → subscription.poll(), .drain()
"""

import asyncio
import contextlib
import threading
import time
from collections import deque
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.events.schema import KvEventBatch
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.protocols import MetricsSink

__all__ = ["EventBus", "EventGap", "Subscription"]

DEFAULT_CAPACITY = 4096


@dataclass(frozen=True, slots=True)
class EventGap:
    """Stands in a subscription where a full queue dropped batches."""

    batches: int
    events: int


class Subscription:
    """One reader's queue; made by `EventBus.subscribe`.

    Iterate it, synchronously or asynchronously, or ask it with `poll` and `drain`. Iteration ends once the
    bus is closed and everything published before has been read, or at once when the subscription itself is
    closed. All methods may be called from any thread; each item goes to one of the callers.
    """

    def __init__(self, bus: "EventBus", capacity: int) -> None:
        self._bus = bus
        self._capacity = capacity
        self._items: deque[KvEventBatch] = deque()
        self._lost_batches = 0
        self._lost_events = 0
        self._ended = False
        self._condition = threading.Condition()
        self._waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    def poll(self, timeout: float | None = 0.0) -> KvEventBatch | EventGap | None:
        """Returns the next item.

        Args:
          timeout: Seconds to wait for one; 0 for not at all, None for as long as it takes.

        Returns:
          A batch or a gap; None if none came in time, or the stream has ended (`ended` tells).
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

    def drain(self) -> list[KvEventBatch | EventGap]:
        """Returns all that is waiting, without waiting for more."""
        with self._condition:
            items = []
            while (item := self._take()) is not None:
                items.append(item)
            return items

    @property
    def ended(self) -> bool:
        """Whether no further item will ever come: all has been read, and the bus or this reader is closed."""
        with self._condition:
            return self._ended and not self._items and not self._lost_batches

    def close(self) -> None:
        """Leaves the bus and forgets what has not been read. Idempotent."""
        self._bus._leave(self)  # noqa: SLF001 (the bus and its subscriptions are one mechanism)
        with self._condition:
            self._items.clear()
            self._lost_batches = self._lost_events = 0
        self._end()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> KvEventBatch | EventGap:
        item = self.poll(timeout=None)
        if item is None:
            raise StopIteration
        return item

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> KvEventBatch | EventGap:
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

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _put(self, batch: KvEventBatch) -> int:
        """Appends a batch and returns how many events it pushed out."""
        dropped = 0
        with self._condition:
            if self._ended:
                return 0
            if len(self._items) == self._capacity:
                dropped = len(self._items.popleft())
                self._lost_batches += 1
                self._lost_events += dropped
            self._items.append(batch)
            self._wake()
        return dropped

    def _take(self) -> KvEventBatch | EventGap | None:
        """Pops the next item; a gap comes first, for it is always the oldest that was dropped."""
        if self._lost_batches:
            gap = EventGap(self._lost_batches, self._lost_events)
            self._lost_batches = self._lost_events = 0
            return gap
        return self._items.popleft() if self._items else None

    def _end(self) -> None:
        with self._condition:
            self._ended = True
            self._wake()

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


class EventBus:
    """An event sink that fans out to the subscribers of this process, every one in the same order."""

    def __init__(self, *, metrics: MetricsSink | None = None) -> None:
        self._metrics = NullMetrics() if metrics is None else metrics
        self._subscriptions: tuple[Subscription, ...] = ()
        self._closed = False
        self._lock = threading.Lock()

    def subscribe(self, *, capacity: int = DEFAULT_CAPACITY) -> Subscription:
        """Returns a new subscription to what is published from now on.

        Args:
          capacity: Batches that may wait to be read before the oldest is dropped.
        """
        if capacity < 1:
            raise ConfigError(f"capacity = {capacity}: allowed is an integer >= 1")
        with self._lock:
            self._check_open()
            subscription = Subscription(self, capacity)
            self._subscriptions += (subscription,)
            return subscription

    def publish(self, batch: KvEventBatch, /) -> None:
        """Hands a batch to every subscriber and returns without waiting for any."""
        with self._lock:
            self._check_open()
            dropped = sum(subscription._put(batch) for subscription in self._subscriptions)  # noqa: SLF001
        self._metrics.count("kvbm_events_published_total", len(batch))
        if dropped:
            self._metrics.count("kvbm_events_dropped_total", dropped)

    def close(self) -> None:
        """Ends the stream: subscribers read what is left, then their iterations end. Idempotent."""
        with self._lock:
            self._closed = True
            subscriptions, self._subscriptions = self._subscriptions, ()
        for subscription in subscriptions:
            subscription._end()  # noqa: SLF001

    def _leave(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)

    def _check_open(self) -> None:
        if self._closed:
            raise BlockStateError("the event bus is closed; publish and subscribe before close()")
