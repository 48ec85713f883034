"""The trivial event sinks: one forgets and one remembers, for managers without events and for tests; one is several."""

import contextlib
from collections.abc import Sequence

from kvbm_jax.events.schema import KvEvent, KvEventBatch
from kvbm_jax.protocols import EventSink

__all__ = ["FanOutSink", "NullEventSink", "RecordingEventSink"]


class NullEventSink:
    """Forgets every batch."""

    def publish(self, batch: KvEventBatch, /) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


class RecordingEventSink:
    """Keeps every batch, in order, in `batches`."""

    def __init__(self) -> None:
        self.batches: list[KvEventBatch] = []
        self.closed = False

    @property
    def events(self) -> list[KvEvent]:
        """All events so far, row by row."""
        return [event for batch in self.batches for event in batch]

    def publish(self, batch: KvEventBatch, /) -> None:
        """Appends the batch."""
        self.batches.append(batch)

    def close(self) -> None:
        """Notes that the stream has ended."""
        self.closed = True


class FanOutSink:
    """Hands every batch to several sinks, in their order."""

    def __init__(self, sinks: Sequence[EventSink[KvEventBatch]]) -> None:
        self._sinks = tuple(sinks)

    def publish(self, batch: KvEventBatch, /) -> None:
        """Passes the batch on."""
        for sink in self._sinks:
            sink.publish(batch)

    def close(self) -> None:
        """Closes every sink, whatever one of them raises."""
        with contextlib.ExitStack() as stack:
            for sink in reversed(self._sinks):
                stack.callback(sink.close)
