"""Event sinks that go nowhere: one forgets, one remembers. For managers without events, and for tests."""

from kvbm_jax.events.schema import KvEvent, KvEventBatch

__all__ = ["NullEventSink", "RecordingEventSink"]


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
