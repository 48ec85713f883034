"""Rows of event batches for stages that look at each event: cheaper than `KvEvent`, for tokens stay bytes.

A stage takes a batch apart with `rows_of`, decides row by row, and hands what it has to say to a `RowPublisher`, which
puts it together as batches under ids of its own.
"""

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from kvbm_jax.events.columns import hash_keys, hash_rows, offsets_of
from kvbm_jax.events.schema import EventType, KvEventBatch
from kvbm_jax.events.snapshot import WorkerSnapshot
from kvbm_jax.protocols import BlockKey, EventSink

__all__ = ["NO_PARENT", "BlockContent", "EventRow", "RowPublisher", "rows_of"]

NO_PARENT = bytes(16)

_TYPES = tuple(EventType)
_NO_METADATA: Mapping[str, str] = {}


class BlockContent(NamedTuple):
    """What a block is, wherever it lies."""

    parent_hash: bytes  # 16 bytes, NO_PARENT for a sequence's first block
    tokens: bytes  # uint32, little-endian
    lora_name: str | None = None
    metadata: Mapping[str, str] = _NO_METADATA


class EventRow(NamedTuple):
    """One event, less who says it."""

    event_type: EventType
    timestamp: int
    block_size: int
    tier: int  # 0: all, only if cleared
    block_id: int = 0
    key: BlockKey = BlockKey(NO_PARENT)
    content: BlockContent | None = None  # where created or migrated
    from_tier: int = 0  # migrated: where the block was
    from_block_id: int = 0

    @property
    def parent(self) -> BlockKey | None:
        """The block before this one; None for a sequence's first, and where the event does not say."""
        if self.content is None or self.content.parent_hash == NO_PARENT:
            return None
        return BlockKey(self.content.parent_hash, self.key.group_idx)


def rows_of(batch: KvEventBatch) -> list[EventRow]:
    """Takes a batch apart.

    A `migrated` with `to_worker` comes as the deletion that it is, one from nowhere as a creation. Rows that name no
    block or no tier are left out.
    """
    hashes = hash_keys(batch.sequence_hashes)
    parents = hash_keys(batch.parent_hashes)
    tokens = batch.token_ids.astype("<u4", copy=False).tobytes()
    ends = (batch.token_offsets * 4).tolist()
    size = batch.block_size
    rows = []
    for i, (code, timestamp, tier, block_id, group, origin, origin_id) in enumerate(
        zip(
            batch.event_types.tolist(),
            batch.timestamps.tolist(),
            batch.tiers.tolist(),
            batch.block_ids.tolist(),
            batch.group_idx.tolist(),
            batch.from_tiers.tolist(),
            batch.from_block_ids.tolist(),
            strict=True,
        )
    ):
        kind = _TYPES[code]
        if kind is EventType.CLEARED:
            rows.append(EventRow(kind, timestamp, size, tier))
            continue
        if not tier or hashes[i] == NO_PARENT:
            continue
        key = BlockKey(hashes[i], group)
        if kind is EventType.MIGRATED and batch.to_workers and batch.to_workers[i] is not None:
            where = (origin, origin_id) if origin else (tier, block_id)
            rows.append(EventRow(EventType.DELETED, timestamp, size, *where, key))
            continue
        if kind is EventType.DELETED:
            rows.append(EventRow(kind, timestamp, size, tier, block_id, key))
            continue
        content = BlockContent(
            parents[i],
            tokens[ends[i] : ends[i + 1]],
            batch.lora_names[i] if batch.lora_names else None,
            batch.metadata[i] if batch.metadata else _NO_METADATA,
        )
        if kind is EventType.MIGRATED and origin not in {0, tier}:
            rows.append(EventRow(kind, timestamp, size, tier, block_id, key, content, origin, origin_id))
        else:
            rows.append(EventRow(EventType.CREATED, timestamp, size, tier, block_id, key, content))
    return rows


class RowPublisher:
    """Tells rows to a sink, under ids that count up from 0. Not safe for several threads at once."""

    def __init__(self, sink: EventSink[KvEventBatch]) -> None:
        self._sink = sink
        self._next_event_id = 0

    def publish(self, rows: Iterable[EventRow], *, worker_id: str, dp_rank: int) -> None:
        """Publishes rows of one worker and rank, in order."""
        for batch in _batches(rows, worker_id, dp_rank, self._next_event_id):
            self._next_event_id += len(batch)
            self._sink.publish(batch)

    def snapshot(self, ranks: Mapping[int, Iterable[EventRow]], *, worker_id: str, timestamp: int) -> WorkerSnapshot:
        """Returns the creations that stand after what was published, by rank."""
        batches = [
            batch for dp_rank, rows in ranks.items() for batch in _batches(rows, worker_id, dp_rank, first_event_id=0)
        ]
        return WorkerSnapshot(worker_id, self._next_event_id, timestamp, tuple(batches))

    def close(self) -> None:
        """Closes the sink."""
        self._sink.close()


def _batches(rows: Iterable[EventRow], worker_id: str, dp_rank: int, first_event_id: int) -> Iterator[KvEventBatch]:
    """Puts rows together, in order; one batch for each run of equal block sizes."""
    for block_size, run in itertools.groupby(rows, key=operator.attrgetter("block_size")):
        batch = _batch(list(run), worker_id, block_size, dp_rank, first_event_id)
        first_event_id += len(batch)
        yield batch


def _batch(
    rows: Sequence[EventRow], worker_id: str, block_size: int, dp_rank: int, first_event_id: int
) -> KvEventBatch:
    contents = [row.content or _NOTHING for row in rows]
    loras = tuple(content.lora_name for content in contents)
    metadata = tuple(content.metadata for content in contents)
    return KvEventBatch(
        worker_id=worker_id,
        block_size=block_size,
        dp_rank=dp_rank,
        event_types=np.array([row.event_type.code for row in rows], np.uint8),
        event_ids=np.arange(first_event_id, first_event_id + len(rows), dtype=np.uint64),
        timestamps=np.array([row.timestamp for row in rows], np.uint64),
        block_ids=np.array([row.block_id for row in rows], np.uint64),
        tiers=np.array([row.tier for row in rows], np.uint8),
        group_idx=np.array([row.key.group_idx for row in rows], np.uint32),
        sequence_hashes=hash_rows(b"".join([row.key.sequence_hash for row in rows])),
        parent_hashes=hash_rows(b"".join([content.parent_hash for content in contents])),
        token_offsets=offsets_of([len(content.tokens) // 4 for content in contents]),
        token_ids=np.frombuffer(b"".join([content.tokens for content in contents]), "<u4").astype(np.uint32),
        from_tiers=np.array([row.from_tier for row in rows], np.uint8),
        from_block_ids=np.array([row.from_block_id for row in rows], np.uint64),
        lora_names=loras if any(loras) else (),
        metadata=metadata if any(metadata) else (),
    )


_NOTHING = BlockContent(NO_PARENT, b"")
