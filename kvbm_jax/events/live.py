"""What one worker holds according to its own events, kept where they are published so that a snapshot can be served.

`LiveBlocks` is to a publisher what `PrefixIndex` is to a router: it goes through the worker's events and keeps those
`created` ones that still stand. Keeping means a dict entry a block; columns stay in the batches that they came in,
which are packed anew when most of what they hold is gone.

Axis legend: `E` events of a batch.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.events.columns import hash_keys, offsets_of
from kvbm_jax.events.schema import EventType, KvEventBatch
from kvbm_jax.events.snapshot import WorkerSnapshot

__all__ = ["LiveBlocks"]

_CREATED, _DELETED, _MIGRATED, _CLEARED = (kind.code for kind in EventType)
_KEY = np.dtype([("hash", "V16"), ("dp_rank", "<u4"), ("group_idx", "<u4"), ("tier", "u1")])
_RANK = slice(16, 20)  # of a key
_NO_HASH = bytes(16)
_SLACK = 65_536  # rows that need not be packed, whatever becomes of them
_LONGEST = 1024  # rows of a snapshot's batch
_MOST_TOKENS = 65_536  # of a snapshot's batch: messages of half a megabyte are taken everywhere


class LiveBlocks:
    """The blocks of one worker, by what its batches say in order. Not safe for several threads at once."""

    def __init__(self, worker_id: str) -> None:
        self._worker_id = worker_id
        self._next_event_id = 0
        self._positions: dict[bytes, int] = {}  # of each block's row, counted through all batches kept
        self._starts: list[int] = []  # position of each batch's first row
        self._batches: list[KvEventBatch] = []
        self._rows = 0  # of all batches kept

    def __len__(self) -> int:
        return len(self._positions)

    def apply(self, batch: KvEventBatch) -> None:
        """Takes the worker's next batch."""
        count = len(batch)
        if not count:
            return
        self._next_event_id = int(batch.event_ids[-1]) + 1
        kinds = batch.event_types.tobytes()
        if kinds.count(kinds[0]) == count:
            bounds = [0, count]
        else:
            bounds = [0, *(np.flatnonzero(np.diff(batch.event_types)) + 1).tolist(), count]
        keeps = False
        for start, stop in itertools.pairwise(bounds):
            keeps |= self._apply_run(batch, kinds[start], start, stop)
        if keeps:
            self._starts.append(self._rows)
            self._batches.append(batch)
            self._rows += count
            if self._rows > _SLACK + 2 * len(self._positions):
                self._pack()

    def apply_all(self, batches: Sequence[KvEventBatch]) -> None:
        """Takes the worker's next batches; those that only create are taken together."""
        for plain, run in itertools.groupby(batches, key=_plain):
            together = list(run)
            if plain is None or len(together) == 1:
                for batch in together:
                    self.apply(batch)
                continue
            lengths = [len(batch) for batch in together]
            count = sum(lengths)
            hashes = np.concatenate([batch.sequence_hashes for batch in together])
            keys = _names(hashes, *plain)
            self._positions.update(zip(keys, range(self._rows, self._rows + count), strict=True))
            self._starts += itertools.accumulate(lengths[:-1], initial=self._rows)
            self._batches += together
            self._rows += count
            self._next_event_id = int(together[-1].event_ids[-1]) + 1
            if self._rows > _SLACK + 2 * len(self._positions):
                self._pack()

    def snapshot(self, timestamp: int) -> WorkerSnapshot:
        """Returns what the worker holds after the last batch applied; `timestamp` is now, ns since the Unix epoch."""
        self._pack()
        batches = [piece for batch in self._batches for piece in _in_order(batch)]
        return WorkerSnapshot(self._worker_id, self._next_event_id, timestamp, tuple(batches))

    def _apply_run(self, batch: KvEventBatch, kind: int, start: int, stop: int) -> bool:
        """Applies rows of one type; returns whether any of them has to be kept."""
        if kind == _CLEARED:
            for tier in set(batch.tiers[start:stop].tolist()):
                self._clear(batch.dp_rank, tier)
            return False
        positions = range(self._rows + start, self._rows + stop)
        keys = _keys(batch, batch.tiers, start, stop)
        if kind == _CREATED:
            self._positions.update(zip(keys, positions, strict=True))
            return True
        origins = _keys(batch, batch.from_tiers, start, stop)
        keeps = False
        for i, (key, origin) in enumerate(zip(keys, origins, strict=True)):
            away = kind == _DELETED or bool(batch.to_workers and batch.to_workers[start + i] is not None)
            from_tier = batch.from_tiers[start + i] if kind == _MIGRATED else 0
            self._positions.pop(origin if from_tier else key, None)
            if not away:
                self._positions[key] = positions[i]
                keeps = True
        return keeps

    def _clear(self, dp_rank: int, tier: int) -> None:
        rank = dp_rank.to_bytes(4, "little")
        for key in [key for key in self._positions if key[_RANK] == rank and tier in {0, key[-1]}]:
            del self._positions[key]

    def _pack(self) -> None:
        """Keeps the rows of live blocks alone, one batch for what batches have in common."""
        for key in [key for key in self._positions if key.startswith(_NO_HASH)]:  # blocks without a name
            del self._positions[key]
        kept: dict[tuple[int, int], list[KvEventBatch]] = {}
        positions = np.sort(np.fromiter(self._positions.values(), np.int64, len(self._positions)))
        cuts = np.searchsorted(positions, [*self._starts, self._rows]).tolist()
        for batch, base, first, last in zip(self._batches, self._starts, cuts, cuts[1:], strict=False):
            if first < last:
                rows = positions[first:last] - base
                kept.setdefault((batch.block_size, batch.dp_rank), []).append(_take(batch, rows))
        self._starts, self._batches, self._rows = [], [], 0
        self._positions = {}
        for batches in kept.values():
            batch = _join(batches)
            self._positions.update(
                zip(_keys(batch, batch.tiers, 0, len(batch)), range(self._rows, self._rows + len(batch)), strict=True)
            )
            self._starts.append(self._rows)
            self._batches.append(batch)
            self._rows += len(batch)


def _plain(batch: KvEventBatch) -> tuple[int, int, int] | None:
    """Rank, group and tier of a batch whose events all create blocks in one tier and group, and say that they do."""
    shared = batch.shared
    if shared is None or shared.event_type is not EventType.CREATED or not len(batch):
        return None
    return shared.dp_rank, shared.group_idx, shared.tier


def _keys(batch: KvEventBatch, tiers: NDArray[np.uint8], start: int, stop: int) -> list[bytes]:
    return _names(batch.sequence_hashes[start:stop], batch.dp_rank, batch.group_idx[start:stop], tiers[start:stop])


def _names(
    hashes: NDArray[np.uint32], dp_rank: int, group_idx: NDArray[np.uint32] | int, tiers: NDArray[np.uint8] | int
) -> list[bytes]:
    """What names the claims of rows: hash, rank, group and tier."""
    keys = np.empty(len(hashes), _KEY)
    keys["hash"] = np.ascontiguousarray(hashes, "<u4").view("V16")[:, 0]
    keys["dp_rank"] = dp_rank
    keys["group_idx"] = group_idx
    keys["tier"] = tiers
    names: list[bytes] = keys.view(f"V{_KEY.itemsize}").tolist()
    return names


def _take(batch: KvEventBatch, rows: NDArray[np.int64]) -> KvEventBatch:
    """Rows of a batch, in the order given, as `created` events."""
    counts = np.diff(batch.token_offsets)[rows]
    offsets = offsets_of(counts)
    tokens = np.arange(offsets[-1]) + np.repeat(batch.token_offsets[:-1][rows] - offsets[:-1], counts)

    def chosen[T](values: tuple[T, ...]) -> tuple[T, ...]:
        return tuple(values[row] for row in rows.tolist()) if values else ()

    return KvEventBatch(
        worker_id=batch.worker_id,
        block_size=batch.block_size,
        dp_rank=batch.dp_rank,
        event_types=np.full(len(rows), _CREATED, np.uint8),
        event_ids=batch.event_ids[rows],
        timestamps=batch.timestamps[rows],
        block_ids=batch.block_ids[rows],
        tiers=batch.tiers[rows],
        group_idx=batch.group_idx[rows],
        sequence_hashes=batch.sequence_hashes[rows],
        parent_hashes=batch.parent_hashes[rows],
        token_offsets=offsets,
        token_ids=batch.token_ids[tokens],
        from_tiers=np.zeros(len(rows), np.uint8),
        from_block_ids=np.zeros(len(rows), np.uint64),
        lora_names=chosen(batch.lora_names),
        metadata=chosen(batch.metadata),
        schema_version=batch.schema_version,
    )


def _join(batches: list[KvEventBatch]) -> KvEventBatch:
    """Batches of one block size and rank as one."""
    if len(batches) == 1:
        return batches[0]

    def joined(name: str) -> NDArray[np.generic]:
        return np.concatenate([getattr(batch, name) for batch in batches])

    def listed[T](name: str, nothing: T) -> tuple[T, ...]:
        if not any(getattr(batch, name) for batch in batches):
            return ()
        return tuple(value for batch in batches for value in getattr(batch, name) or [nothing] * len(batch))

    ends = itertools.accumulate((len(batch.token_ids) for batch in batches), initial=0)
    offsets = [batch.token_offsets[:-1] + end for batch, end in zip(batches, ends, strict=False)]
    tokens = joined("token_ids")
    columns = ["event_types", "event_ids", "timestamps", "block_ids", "tiers", "group_idx", "sequence_hashes"]
    columns += ["parent_hashes", "from_tiers", "from_block_ids"]
    first = batches[0]
    return KvEventBatch(
        worker_id=first.worker_id,
        block_size=first.block_size,
        dp_rank=first.dp_rank,
        token_offsets=np.concatenate([*offsets, [len(tokens)]]),
        token_ids=tokens,  # type: ignore[arg-type]
        lora_names=listed("lora_names", None),
        metadata=listed("metadata", {}),
        schema_version=first.schema_version,
        **{name: joined(name) for name in columns},  # type: ignore[arg-type]
    )


def _in_order(batch: KvEventBatch) -> list[KvEventBatch]:
    """A batch of blocks that are all there at once as batches of bounded length, parents before children."""
    hashes, parents = hash_keys(batch.sequence_hashes), hash_keys(batch.parent_hashes)
    waiting: dict[bytes, list[int]] = {}
    there = set(hashes)
    roots = []
    for row, parent in enumerate(parents):
        if parent in there:
            waiting.setdefault(parent, []).append(row)
        else:
            roots.append(row)
    order: list[int] = []
    while roots:  # depth first, so that chains stay together
        row = roots.pop()
        order.append(row)
        roots += waiting.pop(hashes[row], [])
    order += sorted(row for rows in waiting.values() for row in rows)  # each the parent of the other: no real chain
    rows = np.array(order, np.int64)
    length = max(1, min(_LONGEST, _MOST_TOKENS // max(batch.block_size, 1)))
    return [_take(batch, rows[i : i + length]) for i in range(0, len(rows), length)]
