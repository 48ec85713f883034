"""The event stream inside one process: a publisher on one side, any number of subscribers on the other.

`EventBus` is the sink a manager publishes to. Each `Subscription` has a queue of its own, bounded, so that a
slow reader costs memory for `capacity` batches and never makes the publisher wait. A full queue drops its
oldest batch, and the reader gets an `EventGap` with the number of events lost where they would have stood. A
subscriber sees what is published after it subscribed, and before that, if it asks, a snapshot of what stands then;
there is no history here, and no thread: batches wait in their queues until read.

    publish → bus ─┬→ queue → for batch in subscription
                   ├→ queue → async for batch in subscription
                   ├→ queue → subscription.poll(), .drain()
                   └→ LiveBlocks → snapshots for who joins late
"""

import contextlib
import threading
import time

from kvbm_jax.errors import BlockStateError
from kvbm_jax.events.live import LiveBlocks
from kvbm_jax.events.schema import KvEventBatch
from kvbm_jax.events.subscription import DEFAULT_CAPACITY, Subscription
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.protocols import MetricsSink

__all__ = ["EventBus"]

_UNFOLDED = 1024  # events that may wait to be part of the next snapshot


class EventBus:
    """An event sink that fans out to the subscribers of this process, every one in the same order.

    Args:
      worker_id: Whose events these are, for snapshots.
      metrics: Where counters go.
    """

    def __init__(self, worker_id: str = "", *, metrics: MetricsSink | None = None) -> None:
        self._metrics = NullMetrics() if metrics is None else metrics
        self._subscriptions: tuple[Subscription, ...] = ()
        self._closed = False
        self._lock = threading.Lock()
        self._live = LiveBlocks(worker_id)
        self._unfolded: list[KvEventBatch] = []
        self._num_unfolded = 0  # events
        self._folding = threading.Lock()  # taken before the other; publishers do not wait for it

    def subscribe(self, *, capacity: int = DEFAULT_CAPACITY, snapshot: bool = False) -> Subscription:
        """Returns a new subscription to what is published from now on.

        Args:
          capacity: Batches that may wait to be read before the oldest is dropped.
          snapshot: Whether it begins with what stands now; what is published meanwhile follows, without a hole.
        """
        subscription = Subscription(self._leave, capacity)
        with self._folding if snapshot else contextlib.nullcontext():
            with self._lock:
                self._check_open()
                self._subscriptions += (subscription,)
                before = self._take_unfolded() if snapshot else []
            if snapshot:
                self._live.apply_all(before)
                subscription.begin_with(self._live.snapshot(time.time_ns()))
        return subscription

    def publish(self, batch: KvEventBatch, /) -> None:
        """Hands a batch to every subscriber and returns without waiting for any."""
        with self._lock:
            self._check_open()
            dropped = sum(subscription.offer(batch) for subscription in self._subscriptions)
            self._unfolded.append(batch)
            self._num_unfolded += len(batch)
        self._metrics.count("kvbm_events_published_total", len(batch))
        if dropped:
            self._metrics.count("kvbm_events_dropped_total", dropped)
        if self._num_unfolded >= _UNFOLDED and self._folding.acquire(blocking=False):  # else a snapshot is being made
            try:
                with self._lock:
                    batches = self._take_unfolded()
                self._live.apply_all(batches)
            finally:
                self._folding.release()

    def close(self) -> None:
        """Ends the stream: subscribers read what is left, then their iterations end. Idempotent."""
        with self._lock:
            self._closed = True
            subscriptions, self._subscriptions = self._subscriptions, ()
        for subscription in subscriptions:
            subscription.end()

    def _take_unfolded(self) -> list[KvEventBatch]:
        """Returns what `LiveBlocks` has not seen; called under both locks."""
        batches, self._unfolded, self._num_unfolded = self._unfolded, [], 0
        return batches

    def _leave(self, subscription: Subscription) -> None:
        with self._lock:
            self._subscriptions = tuple(s for s in self._subscriptions if s is not subscription)

    def _check_open(self) -> None:
        if self._closed:
            raise BlockStateError("the event bus is closed; publish and subscribe before close()")
