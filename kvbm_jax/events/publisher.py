"""The manager's and the tiers' voice: numbers events, stamps them, and hands them to a sink.

One publisher serves one worker. Its methods may be called from any thread; numbering and publishing happen under one
lock, so that consumers see ids in order.
"""

import threading
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from kvbm_jax.events.columns import hash_rows
from kvbm_jax.events.schema import EventType, KvEvent, KvEventBatch
from kvbm_jax.protocols import BlockKey, BlockRecord, Clock, EventSink, Tier

__all__ = ["EventPublisher"]

_NO_HASH = bytes(16)


class EventPublisher:
    """Publishes what happens to the blocks of one worker.

    Args:
      sink: where batches go.
      worker_id: who says so.
      block_size: tokens of a block; may be set anew.
      clock: for timestamps.
    """

    def __init__(self, sink: EventSink[KvEventBatch], *, worker_id: str, block_size: int, clock: Clock) -> None:
        self._sink = sink
        self._worker_id = worker_id
        self.block_size = block_size
        self._clock = clock
        self._next_id = 0
        self._lock = threading.Lock()

    def created(self, tier: Tier, block_ids: ArrayLike, records: Sequence[BlockRecord]) -> None:
        """Says that a tier holds blocks which can be read now."""
        if records:
            self._publish(EventType.CREATED, block_ids, tier, [r.key for r in records], records)

    def deleted(self, tier: Tier, block_ids: ArrayLike, keys: Sequence[BlockKey]) -> None:
        """Says that a tier holds blocks no more."""
        if keys:
            self._publish(EventType.DELETED, block_ids, tier, keys)

    def migrated(
        self,
        tier: Tier,
        block_ids: ArrayLike,
        records: Sequence[BlockRecord],
        *,
        from_tier: Tier,
        from_block_ids: ArrayLike,
    ) -> None:
        """Says that blocks left a tier for a lower one, where they can be read now."""
        if records:
            keys = [r.key for r in records]
            self._publish(EventType.MIGRATED, block_ids, tier, keys, records, from_tier, from_block_ids)

    def handed_over(self, tier: Tier, block_ids: ArrayLike, keys: Sequence[BlockKey], to_worker: str) -> None:
        """Says that a tier holds blocks no more, for another worker has them."""
        if keys:
            self._publish(EventType.MIGRATED, block_ids, tier, keys, to_worker=to_worker)

    def cleared(self, tier: Tier | None) -> None:
        """Says that a tier, or with None every tier, is empty."""
        self._publish(EventType.CLEARED, np.zeros((1,), np.uint64), tier, [BlockKey(_NO_HASH)])

    def publish(self, event: KvEvent) -> None:
        """Publishes an event made elsewhere, under this worker's next id."""
        batch = KvEventBatch.from_events([event])
        with self._lock:
            batch.event_ids[:] = self._number(1)
            self._sink.publish(batch)

    def _publish(
        self,
        event_type: EventType,
        block_ids: ArrayLike,
        tier: Tier | None,
        keys: Sequence[BlockKey],
        records: Sequence[BlockRecord] = (),
        from_tier: Tier | None = None,
        from_block_ids: ArrayLike = 0,
        to_worker: str | None = None,
    ) -> None:
        loras = [record.lora_name for record in records]
        with self._lock:
            self._sink.publish(
                KvEventBatch.make(
                    event_type,
                    np.asarray(block_ids, np.uint64),
                    worker_id=self._worker_id,
                    block_size=self.block_size,
                    first_event_id=self._number(len(keys)),
                    timestamp=self._clock.time_ns(),
                    tier=tier,
                    sequence_hashes=hash_rows(b"".join([key.sequence_hash for key in keys])),
                    parent_hashes=hash_rows(b"".join([record.parent_hash or _NO_HASH for record in records]))
                    if records
                    else None,
                    token_ids=[record.token_ids for record in records] if records else None,
                    group_idx=[key.group_idx for key in keys],
                    from_tier=from_tier,
                    from_block_ids=from_block_ids,
                    lora_names=loras if any(name is not None for name in loras) else (),
                    to_workers=() if to_worker is None else (to_worker,) * len(keys),
                )
            )

    def _number(self, count: int) -> int:
        first = self._next_id
        self._next_id += count
        return first
