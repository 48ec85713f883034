"""Snapshots as messages: a `cleared` of the whole worker, then what it holds. Who applies them blindly is right too."""

from collections.abc import Sequence

from kvbm_jax.errors import EventDecodeError
from kvbm_jax.events import EventType, KvEvent, KvEventBatch, WorkerSnapshot

__all__ = ["from_batches", "to_batches"]


def to_batches(snapshot: WorkerSnapshot) -> list[KvEventBatch]:
    """Returns the batches to send; the first one's event has the id before the snapshot's next."""
    sizes = {batch.block_size for batch in snapshot.batches}
    cleared = KvEvent(
        EventType.CLEARED,
        0,
        snapshot.worker_id,
        snapshot.timestamp,
        event_id=(snapshot.next_event_id - 1) % 2**64,
        block_size=max(sizes, default=0),
    )
    return [KvEventBatch.from_events([cleared]), *snapshot.batches]


def from_batches(batches: Sequence[KvEventBatch]) -> WorkerSnapshot:
    """Returns the snapshot that batches tell of.

    Raises:
      EventDecodeError: They do not begin with the clearing of a worker, or tell of several.
    """
    cleared = batches[0][0] if batches and len(batches[0]) == 1 else None
    if cleared is None or cleared.event_type is not EventType.CLEARED or cleared.tier is not None:
        raise EventDecodeError("a snapshot begins with one event that says that the worker is empty")
    rest = batches[1:]
    if any(batch.worker_id != cleared.worker_id for batch in rest):
        raise EventDecodeError(f"the snapshot of worker {cleared.worker_id!r:.100} has blocks of another")
    created = tuple(batch for batch in rest if len(batch))
    return WorkerSnapshot(cleared.worker_id, (cleared.event_id + 1) % 2**64, cleared.timestamp, created)
