"""Dynamo's language: the JSON of its KV router, one event a line.

    {"event_id": 7, "data": {"stored": {"parent_hash": null, "blocks": [{"block_hash": 1, "tokens_hash": 2}, ...]}},
     "dp_rank": 0}
    {"event_id": 9, "data": {"removed": {"block_hashes": [1, 3]}}, "dp_rank": 0}
    {"event_id": 11, "data": "cleared", "dp_rank": 0}

`event_id` is that of the first block; `block_hash` is the first 8 bytes of the sequence hash, little-endian, and
`tokens_hash` Dynamo's hash of the block's tokens alone (`kvbm_jax.hashing.block_hash`). The language knows one tier and
no block ids: a move down within a worker says nothing, and clearing one tier cannot be said. Dynamo's tree takes one
line at a time, and a block only if it knows the parent. A decoded block has its `tokens_hash` in its metadata.
"""

from typing import Annotated, Any, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import LayoutError
from kvbm_jax.events.codec import check_count, total
from kvbm_jax.events.runs import Run, runs
from kvbm_jax.events.schema import EventType, KvEvent, KvEventBatch
from kvbm_jax.hashing import block_hashes, to_wire
from kvbm_jax.protocols import Tier

__all__ = ["DynamoCodec"]

_TOKENS_HASH = "tokens_hash"

type _U64 = Annotated[int, msgspec.Meta(ge=0)]


class _Block(msgspec.Struct, frozen=True):
    block_hash: _U64
    tokens_hash: _U64


class _Stored(msgspec.Struct, frozen=True):
    parent_hash: _U64 | None
    blocks: list[_Block]


class _Removed(msgspec.Struct, frozen=True):
    block_hashes: list[_U64]


class _Data(msgspec.Struct, frozen=True, omit_defaults=True):
    stored: _Stored | None = None
    removed: _Removed | None = None


class _Event(msgspec.Struct, frozen=True):
    event_id: _U64
    data: _Data | Literal["cleared"]
    dp_rank: Annotated[int, msgspec.Meta(ge=0, lt=2**32)] = 0


_ENCODER = msgspec.json.Encoder()
_DECODER = msgspec.json.Decoder(_Event)


class DynamoCodec:
    """Batches as lines of Dynamo's JSON.

    Args:
      worker_id: Who the blocks of decoded lines belong to, which the lines do not say.
    """

    name = "dynamo"
    native = False

    def __init__(self, worker_id: str = "") -> None:
        self._worker_id = worker_id

    def encode(self, batch: KvEventBatch, /) -> bytes:
        """Returns the lines of a batch, none if nothing of it can be seen from outside the worker.

        Raises:
          LayoutError: A block has no hash, or neither tokens nor their hash; or one tier is cleared.
        """
        hashes = to_wire(batch.sequence_hashes)
        events = []
        for run in runs(batch):
            data = _say(batch, run, hashes[run.start : run.stop])
            if data is not None:
                events.append(_Event(int(batch.event_ids[run.start]), data, batch.dp_rank))
        return _ENCODER.encode_lines(events)

    @total
    def decode(self, data: bytes, /, first_event_id: int = 0) -> tuple[KvEventBatch, ...]:
        """Returns the batches of all lines, one of each line that is not empty."""
        count, batches = 0, []
        for line in data.split(b"\n"):
            if not line.strip():
                continue
            event = _DECODER.decode(line)
            check_count(count := count + _num_events(event))
            if rows := self._rows(event):
                batches.append(KvEventBatch.from_events(rows))
        return tuple(batches)

    def _rows(self, event: _Event) -> list[KvEvent]:
        def row(kind: EventType, index: int = 0, **fields: Any) -> KvEvent:
            return KvEvent(
                kind, 0, self._worker_id, 0, dp_rank=event.dp_rank, event_id=event.event_id + index, **fields
            )

        if not isinstance(event.data, _Data):
            return [row(EventType.CLEARED)]
        found = []
        if event.data.stored is not None:
            parent = event.data.stored.parent_hash
            for i, block in enumerate(event.data.stored.blocks):
                found.append(
                    row(
                        EventType.CREATED,
                        i,
                        tier=Tier.G1,
                        sequence_hash=_from_wire(block.block_hash),
                        parent_hash=None if parent is None else _from_wire(parent),
                        metadata={_TOKENS_HASH: str(block.tokens_hash)},
                    )
                )
                parent = block.block_hash
        if event.data.removed is not None:
            found += [
                row(EventType.DELETED, i, tier=Tier.G1, sequence_hash=_from_wire(block_hash))
                for i, block_hash in enumerate(event.data.removed.block_hashes)
            ]
        return found


def _num_events(event: _Event) -> int:
    """How many blocks a line tells of."""
    if not isinstance(event.data, _Data):
        return 1
    stored, removed = event.data.stored, event.data.removed
    return (len(stored.blocks) if stored else 0) + (len(removed.block_hashes) if removed else 0)


def _say(batch: KvEventBatch, run: Run, hashes: NDArray[np.uint64]) -> _Data | Literal["cleared"] | None:
    """What Dynamo is told of a run whose blocks have hashes u64[n]; None for nothing."""
    if run.event_type is EventType.CLEARED:
        if run.tier is not None:
            raise LayoutError(
                f"Dynamo cannot be told that {run.tier.label} alone is empty; delete its blocks one by one"
            )
        return "cleared"
    if run.event_type is EventType.MIGRATED and run.to_worker is None:
        return None
    if not hashes.all():
        raise LayoutError(f"event {run.start + int(hashes.argmin())} has no hash, by which Dynamo names blocks")
    if not run.stores:
        return _Data(removed=_Removed(hashes.tolist()))
    parent = int(to_wire(batch.parent_hashes[run.start]))
    blocks = [_Block(*pair) for pair in zip(hashes.tolist(), _tokens_hashes(batch, run), strict=True)]
    return _Data(stored=_Stored(parent or None, blocks))


def _tokens_hashes(batch: KvEventBatch, run: Run) -> list[int]:
    """Dynamo's hash of each block's tokens."""
    begin, end = batch.token_offsets[run.start], batch.token_offsets[run.stop]
    if begin < end:
        size = int(end - begin) // (run.stop - run.start)  # the same for all blocks of a run
        found: list[int] = block_hashes(batch.token_ids[begin:end], size, lora_name=run.lora_name).tolist()
        return found
    told = [row.get(_TOKENS_HASH, "") for row in batch.metadata[run.start : run.stop]]
    if not told or not all(text.isdecimal() for text in told):
        raise LayoutError(
            f"events {run.start} to {run.stop - 1} have no token_ids, whose hash Dynamo asks for; give them"
        )
    return [int(text) for text in told]


def _from_wire(value: int) -> bytes:
    return value.to_bytes(16, "little")
