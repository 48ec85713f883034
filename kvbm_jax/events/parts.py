"""Long batches cut into shorter ones, for wires that bound a message."""

import dataclasses
from collections.abc import Iterator

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.events.schema import KvEventBatch, Shared

__all__ = ["parts"]

_BY_EVENT = (
    *("event_types", "event_ids", "timestamps", "block_ids", "tiers", "group_idx", "sequence_hashes", "parent_hashes"),
    *("from_tiers", "from_block_ids", "lora_names", "to_workers", "metadata"),
)


def parts(batch: KvEventBatch, *, most_events: int, most_tokens: int) -> Iterator[KvEventBatch]:
    """Yields a batch whole, or as batches of so many events and tokens at most; an event is in one of them.

    Args:
      batch: Any.
      most_events: At least 1.
      most_tokens: Of a part of more than one event.
    """
    count, shared = len(batch), batch.shared
    if count <= most_events and len(batch.token_ids if shared is None else shared.token_ids) <= most_tokens:
        yield batch
        return
    start = 0
    while start < count:
        if shared is not None:
            stop = start + max(1, min(most_events, most_tokens // max(shared.tokens_each, 1)))
            yield KvEventBatch.of_shared(_part_of_shared(shared, start, min(stop, count)))
        else:
            ends = batch.token_offsets
            fits = int(np.searchsorted(ends, ends[start] + most_tokens, "right")) - 1
            stop = min(max(fits, start + 1), start + most_events, count)
            yield _part(batch, start, stop)
        start = stop


def _part_of_shared(shared: Shared, start: int, stop: int) -> Shared:
    def part(hashes: NDArray[np.uint32] | bytes | None) -> NDArray[np.uint32] | bytes | None:
        if isinstance(hashes, bytes):
            return hashes[16 * start : 16 * stop]
        return None if hashes is None else hashes[start:stop]

    each = shared.tokens_each
    return msgspec.structs.replace(
        shared,
        first_event_id=shared.first_event_id + start,
        block_ids=None if shared.block_ids is None else shared.block_ids[start:stop],
        sequence_hashes=part(shared.sequence_hashes),
        parent_hashes=part(shared.parent_hashes),
        token_ids=shared.token_ids[each * start : each * stop],
        num_events=stop - start,
    )


def _part(batch: KvEventBatch, start: int, stop: int) -> KvEventBatch:
    first, last = batch.token_offsets[start], batch.token_offsets[stop]
    return dataclasses.replace(
        batch,
        token_offsets=batch.token_offsets[start : stop + 1] - first,
        token_ids=batch.token_ids[first:last],
        **{name: getattr(batch, name)[start:stop] for name in _BY_EVENT},
    )
