"""A worker's blocks at one moment, for consumers that joined late or missed events."""

from typing import NamedTuple

from kvbm_jax.events.schema import KvEventBatch

__all__ = ["WorkerSnapshot"]


class WorkerSnapshot(NamedTuple):
    """What one worker holds after some event of its stream; takes the place of everything told before that.

    To join without a hole: subscribe first, ask for a snapshot then, and apply the stream after it. The stream's events
    that the snapshot includes have ids below `next_event_id`, and are passed over by who knows that.
    """

    worker_id: str
    next_event_id: int  # of the first event that is not in it
    timestamp: int  # ns since the Unix epoch: when it was taken
    batches: tuple[KvEventBatch, ...]  # `created` alone, parents before children; their ids mean nothing
