"""A router's view: which worker holds how much of a prefix, and in which tier.

`PrefixIndex` believes what events say. Feed it the streams of any number of workers, and ask it with a prompt's hashes:

    for item in subscription:            batches, gaps, snapshots
        index.apply(item)
    index.find_matches(hashes)           {(worker, rank): how many leading blocks, and in which tiers}

A *holder* is one data-parallel rank of one worker. Only unbroken chains count: who holds blocks 0, 1 and 3 of a prompt
can serve two. A hash names a block together with all before it and with its LoRA, so neither parents nor LoRA names are
kept. The groups of a hybrid model are apart from each other: a query asks about one.

How it is laid out: for each group a dict from hash to *owners*, an integer with a byte for each holder whose bits are
tiers; and for each holder the set of its hashes, so that forgetting a holder costs what it holds and no more. Blocks
that one holder has alone take about 150 bytes each.

Axis legend: `n` blocks asked for, `W` places of holders, `c` holders of the first block.
"""

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import ConfigError, EventDecodeError, HashingError
from kvbm_jax.events.columns import hash_keys
from kvbm_jax.events.schema import EventType, KvEventBatch
from kvbm_jax.events.snapshot import WorkerSnapshot
from kvbm_jax.events.subscription import EventGap
from kvbm_jax.protocols import BlockKey, Tier

__all__ = ["DUMP_VERSION", "Holder", "IndexStats", "Overlap", "PrefixIndex"]

DUMP_VERSION = 1

_TIER_BITS = np.array([1 << (tier - 1) for tier in Tier], np.uint8)
_ALL_TIERS = int(_TIER_BITS.sum())
_PLAIN = frozenset({EventType.CREATED.code, EventType.DELETED.code})
_TIERS = frozenset(map(int, Tier))
_NO_CHANGE = 255  # in a column of event types: a row that names no block or no tier


class Holder(NamedTuple):
    """One data-parallel rank of one worker: what a request can be sent to."""

    worker_id: str
    dp_rank: int = 0


class Overlap(NamedTuple):
    """How much of a prefix one holder has."""

    blocks: int  # leading blocks, unbroken, each in whatever tier
    tiers: dict[Tier, int]  # how many of them each tier has as the fastest; tiers without any are left out


class IndexStats(NamedTuple):
    """Size of an index, and what it has met."""

    blocks: int  # distinct blocks of all groups
    claims: int  # blocks of each holder, summed
    holders: int
    events: int  # applied
    unknown_deletes: int  # of blocks that the holder was not known to have in that tier
    passed_over: int  # applied already, or without block or tier
    missed: int  # never seen, by the jumps of ids


class _Shelf:
    """What the index knows of one holder."""

    __slots__ = ("keys", "shift")

    def __init__(self, place: int) -> None:
        self.shift = 8 * place  # of this holder's byte within owners
        self.keys: dict[int, set[bytes]] = {}  # by group

    def bit(self, tier: int) -> int:
        return 1 << (self.shift + tier - 1)


class _Stream(msgspec.Struct, array_like=True):
    """How far the stream of one worker has been read."""

    next_event_id: int
    timestamp: int  # of the last event read
    complete: bool  # whether nothing has been missed


class _HolderDump(msgspec.Struct, array_like=True):
    worker_id: str
    dp_rank: int
    groups: dict[int, tuple[bytes, bytes]]  # by group: hashes, joined; tiers, a byte each


class _Version(msgspec.Struct):
    version: int


class _Dump(msgspec.Struct):
    version: int
    hash_bytes: Literal[8, 16]
    streams: dict[str, _Stream]
    holders: list[_HolderDump]


class PrefixIndex:
    """Knows which holder has which blocks; its methods may be called from any thread.

    Ids tell what a stream has missed. After a gap the index goes on, and `incomplete` names the worker until a snapshot
    or a restart of it: blocks may be believed that are gone, which costs a request its hit and nothing else. Events
    that come again are passed over. A worker whose ids begin anew at a later time was restarted, and what was known of
    it is forgotten.

    A worker id stands for one stream, with one count of ids for all its ranks. Ranks that publish apart from each
    other, as engines' do, each at a port of its own, need worker ids of their own, or a `Consolidator` before the
    index.

    Args:
      hash_bytes: How much of each hash is looked at: 16, all of it; or 8, which is what the engines' and Dynamo's
        languages carry. Streams in those languages need 8, and so do streams of both kinds together.

    Raises:
      ConfigError: It is another number.
    """

    def __init__(self, *, hash_bytes: Literal[8, 16] = 16) -> None:
        if hash_bytes not in {8, 16}:
            raise ConfigError(f"hash_bytes = {hash_bytes}: allowed are 8 and 16")
        self._hash_bytes = hash_bytes
        self._owners: dict[int, dict[bytes, int]] = {}  # by group
        self._shelves: dict[Holder, _Shelf] = {}
        self._places: list[Holder | None] = []
        self._streams: dict[str, _Stream] = {}
        self._events = self._unknown_deletes = self._passed_over = self._missed = 0
        self._lock = threading.Lock()

    def find_matches(
        self, hashes: NDArray[np.uint32] | Sequence[bytes], *, group_idx: int = 0, tier: Tier | None = None
    ) -> dict[Holder, Overlap]:
        """Finds who has how many leading blocks of a prompt.

        Args:
          hashes: Of the prompt's blocks in order, `uint32[n, 4]` as `hash_sequence` gives them, or `n` times 16 bytes.
          group_idx: Which group of a hybrid model; 0 in a plain one.
          tier: Counts blocks in this tier alone; None for all tiers.

        Returns:
          An overlap for each holder of the first block, in no promised order.

        Raises:
          HashingError: The hashes are neither.
        """
        keys = _keys(hashes, self._hash_bytes)
        with self._lock:
            owners = self._owners.get(group_idx, {})
            found = list(itertools.takewhile(bool, map(owners.get, keys)))
            if not found:
                return {}
            # Mostly the same hold all of them: one row stands for all then.
            times = len(found) if found.count(found[0]) == len(found) else 1
            width = len(self._places)
            rows = b"".join([mask.to_bytes(width, "little") for mask in found[::times]])  # type: ignore[union-attr]
            table = np.frombuffer(rows, np.uint8).reshape(-1, width)  # [n, W]
            if tier is not None:
                table = table & _TIER_BITS[tier - 1]
            columns = np.flatnonzero(table[0])
            held = table[:, columns]  # [n, c]
            unbroken = np.logical_and.accumulate(held != 0, axis=0)
            fastest = (held & -held) * unbroken  # the lowest bit of each
            counts = times * (fastest[:, :, None] == _TIER_BITS).sum(axis=0)  # [c, 4]
            return {
                holder: Overlap(sum(row), {tier: count for tier, count in zip(Tier, row, strict=True) if count})
                for place, row in zip(columns.tolist(), counts.tolist(), strict=True)
                if (holder := self._places[place]) is not None
            }

    def apply(self, item: KvEventBatch | EventGap | WorkerSnapshot) -> None:
        """Takes the next item of a subscription.

        A batch is applied row by row. A gap makes every worker incomplete, for it does not say whose events it
        swallowed. A snapshot takes the place of all that is known of its worker, unless later events have been applied
        already: ask for another then, as `incomplete` still says.
        """
        with self._lock:
            match item:
                case KvEventBatch():
                    self._apply_batch(item)
                case EventGap():
                    for stream in self._streams.values():
                        stream.complete = False
                case WorkerSnapshot():
                    self._apply_snapshot(item)

    def remove_worker(self, worker_id: str, dp_rank: int | None = None) -> int:
        """Forgets a worker, or one rank of it, and returns how many blocks it held; 0 if it is not known."""
        with self._lock:
            if dp_rank is None:
                self._streams.pop(worker_id, None)
            return self._forget(worker_id, dp_rank)

    def forget(self, worker_id: str, tier: Tier, keys: Iterable[BlockKey]) -> int:
        """Takes back claims that turned out wrong, as if they had not been told; returns how many there were.

        Args:
          worker_id: Who was said to hold the blocks.
          tier: Where.
          keys: Of the blocks.
        """
        by_group: dict[int, list[bytes]] = {}
        for key in keys:
            by_group.setdefault(key.group_idx, []).append(key.sequence_hash[: self._hash_bytes])
        taken = 0
        with self._lock:
            for holder, shelf in self._shelves.items():
                if holder.worker_id == worker_id:
                    for group_idx, hashes in by_group.items():
                        taken += len(hashes) - self._take(shelf, group_idx, hashes, shelf.bit(tier))
        return taken

    def incomplete(self) -> tuple[str, ...]:
        """Returns the workers of whom events were missed: a snapshot of each would set it right."""
        with self._lock:
            return tuple(worker for worker, stream in self._streams.items() if not stream.complete)

    def next_event_ids(self) -> dict[str, int]:
        """Returns the id from which each worker's stream goes on, for a replay."""
        with self._lock:
            return {worker: stream.next_event_id for worker, stream in self._streams.items()}

    def stats(self) -> IndexStats:
        """Returns sizes and counters."""
        with self._lock:
            return IndexStats(
                blocks=sum(map(len, self._owners.values())),
                claims=sum(len(keys) for shelf in self._shelves.values() for keys in shelf.keys.values()),
                holders=len(self._shelves),
                events=self._events,
                unknown_deletes=self._unknown_deletes,
                passed_over=self._passed_over,
                missed=self._missed,
            )

    def dump(self) -> bytes:
        """Returns all that is known as one message, a byte and a hash a claim, for `load`."""
        with self._lock:
            holders = []
            for holder, shelf in self._shelves.items():
                groups = {}
                for group_idx, keys in shelf.keys.items():
                    owners, shift = self._owners[group_idx], shelf.shift
                    tiers = bytes([owners[key] >> shift & _ALL_TIERS for key in keys])
                    groups[group_idx] = (b"".join(keys), tiers)
                holders.append(_HolderDump(holder.worker_id, holder.dp_rank, groups))
            return msgspec.msgpack.encode(_Dump(DUMP_VERSION, self._hash_bytes, self._streams, holders))

    @classmethod
    def load(cls, data: bytes) -> "PrefixIndex":
        """Makes an index from what `dump` returned; its streams go on where they were.

        Raises:
          EventDecodeError: The bytes are no dump, or of a later version.
        """
        try:
            version = msgspec.msgpack.decode(data, type=_Version).version
            if version != DUMP_VERSION:
                raise EventDecodeError(f"the dump has version {version}; this library reads {DUMP_VERSION}")
            dump = msgspec.msgpack.decode(data, type=_Dump)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise EventDecodeError(f"these {len(data)} bytes are no dump of an index: {error!s:.300}") from error
        index = cls(hash_bytes=dump.hash_bytes)
        index._streams = dump.streams
        for holder in dump.holders:
            for group_idx, (joined, tiers) in holder.groups.items():
                index._load(Holder(holder.worker_id, holder.dp_rank), group_idx, joined, tiers)
        return index

    def _load(self, holder: Holder, group_idx: int, joined: bytes, tiers: bytes) -> None:
        if len(joined) != self._hash_bytes * len(tiers) or not set(tiers) <= set(range(1, _ALL_TIERS + 1)):
            raise EventDecodeError(
                f"the dump of {holder} has {len(joined)} bytes of hashes for {len(tiers)} blocks, or a tier unknown"
            )
        shelf = self._shelf(holder)
        columns, keys = np.frombuffer(tiers, np.uint8), np.frombuffer(joined, f"V{self._hash_bytes}")
        for bits in np.unique(columns).tolist():
            self._add(shelf, group_idx, keys[columns == bits].tolist(), bits << shelf.shift)

    def _apply_batch(self, batch: KvEventBatch) -> None:
        if not len(batch):
            return
        first, last, since = int(batch.event_ids[0]), int(batch.event_ids[-1]), int(batch.timestamps[0])
        stream = self._streams.get(batch.worker_id)
        if stream is not None and first < stream.next_event_id and since > stream.timestamp:
            self._forget(batch.worker_id)
            stream = None
        if stream is None:
            stream = self._streams[batch.worker_id] = _Stream(0, since, complete=True)
        if first > stream.next_event_id:
            self._missed += first - stream.next_event_id
            stream.complete = False
        known = 0
        if first < stream.next_event_id:
            known = int(np.searchsorted(batch.event_ids, stream.next_event_id))
        self._passed_over += known
        if known < len(batch):
            stream.next_event_id, stream.timestamp = last + 1, int(batch.timestamps[-1])
            self._apply_rows(batch, known)

    def _apply_snapshot(self, snapshot: WorkerSnapshot) -> None:
        stream = self._streams.get(snapshot.worker_id)
        if stream is not None:
            if snapshot.next_event_id < stream.next_event_id and snapshot.timestamp <= stream.timestamp:
                return
            self._forget(snapshot.worker_id)
        for batch in snapshot.batches:
            self._apply_rows(batch, 0)
        self._streams[snapshot.worker_id] = _Stream(snapshot.next_event_id, snapshot.timestamp, complete=True)

    def _apply_rows(self, batch: KvEventBatch, first: int) -> None:
        """Applies the rows of a batch from `first` on, run by run of those that do the same."""
        shelf = self._shelf(Holder(batch.worker_id, batch.dp_rank))
        self._events += len(batch) - first
        for run in _runs(batch, first, self._hash_bytes):
            match run.event_type:
                case EventType.CREATED.code:
                    self._add(shelf, run.group_idx, run.keys, shelf.bit(run.tier))
                case EventType.DELETED.code:
                    self._unknown_deletes += self._take(shelf, run.group_idx, run.keys, shelf.bit(run.tier))
                case EventType.MIGRATED.code:
                    # To the lower tier first: a holder that has a block all along stays in its owners.
                    self._add(shelf, run.group_idx, run.keys, shelf.bit(run.tier))
                    self._unknown_deletes += self._take(shelf, run.group_idx, run.keys, shelf.bit(run.from_tier))
                case EventType.CLEARED.code:
                    self._clear(shelf, run.tier)
                case _:
                    self._passed_over += len(run.keys)
                    self._events -= len(run.keys)

    def _shelf(self, holder: Holder) -> _Shelf:
        shelf = self._shelves.get(holder)
        if shelf is None:
            if None not in self._places:
                self._places.append(None)
            place = self._places.index(None)
            self._places[place] = holder
            shelf = self._shelves[holder] = _Shelf(place)
        return shelf

    def _add(self, shelf: _Shelf, group_idx: int, keys: Sequence[bytes], mask: int) -> None:
        """Adds a mask to the owners of blocks; those that nobody had share one integer, and cost no loop."""
        owners = self._owners.setdefault(group_idx, {})
        added = dict.fromkeys(keys, mask)
        shelf.keys.setdefault(group_idx, set()).update(added)
        for key in added.keys() & owners.keys():
            owners[key] |= added.pop(key)
        owners.update(added)

    def _take(self, shelf: _Shelf, group_idx: int, keys: Iterable[bytes], mask: int) -> int:
        """Takes a mask from the owners of blocks; returns how many had nothing of it."""
        owners, held = self._owners.get(group_idx, {}), shelf.keys.get(group_idx, set())
        whole, unknown = _ALL_TIERS << shelf.shift, 0
        for key in keys:
            before = owners.get(key, 0)
            if not before & mask:
                unknown += 1
                continue
            after = before & ~mask
            if not after & whole:
                held.remove(key)
            if after:
                owners[key] = after
            else:
                del owners[key]
        return unknown

    def _clear(self, shelf: _Shelf, tier: int) -> None:
        """Takes a tier, or with 0 all, from a holder."""
        mask = shelf.bit(tier) if tier else _ALL_TIERS << shelf.shift
        for group_idx, keys in shelf.keys.items():
            self._take(shelf, group_idx, list(keys), mask)

    def _forget(self, worker_id: str, dp_rank: int | None = None) -> int:
        """Takes the holders of a worker, or one of them, out; returns how many blocks they had."""
        count = 0
        for holder in [h for h in self._shelves if h.worker_id == worker_id and dp_rank in {None, h.dp_rank}]:
            shelf = self._shelves.pop(holder)
            count += sum(map(len, shelf.keys.values()))
            self._clear(shelf, 0)
            self._places[shelf.shift // 8] = None
        return count


class _Run(NamedTuple):
    """Rows of a batch that follow each other and do the same."""

    event_type: int
    tier: int
    from_tier: int
    group_idx: int
    keys: list[bytes]


def _runs(batch: KvEventBatch, first: int, hash_bytes: int) -> Iterator[_Run]:
    """Cuts a batch, from row `first` on, into runs whose every event changes something."""
    keys = hash_keys(batch.sequence_hashes[first:], hash_bytes)
    types, tiers, origins = batch.event_types[first:], batch.tiers[first:], batch.from_tiers[first:]
    group_idx = batch.group_idx[first:]
    one = int(types[0]), int(tiers[0]), int(origins[0]), int(group_idx[0])
    if one[0] in _PLAIN and one[1] in _TIERS and bytes(hash_bytes) not in keys and _same(types, tiers, group_idx):
        yield _Run(*one, keys)  # what most batches are
        return
    moved = types == EventType.MIGRATED.code
    if moved.any():
        if batch.to_workers:
            away = moved & [name is not None for name in batch.to_workers[first:]]
            types = np.where(away, np.uint8(EventType.DELETED.code), types)
            tiers = np.where(away & (origins > 0), origins, tiers)
        stays = (types == EventType.MIGRATED.code) & ((origins == 0) | (origins == tiers))
        types = np.where(stays, np.uint8(EventType.CREATED.code), types)
    named = batch.sequence_hashes[first:, : hash_bytes // 4].any(axis=1) & (tiers > 0)
    sound = (tiers <= max(Tier)) & (origins <= max(Tier)) & (named | (types == EventType.CLEARED.code))
    kinds = np.stack([np.where(sound, types, np.uint8(_NO_CHANGE)), tiers, origins, group_idx])
    starts = [0, *(np.flatnonzero((kinds[:, 1:] != kinds[:, :-1]).any(axis=0)) + 1).tolist()]
    for (event_type, tier, origin, group_idx), start, stop in zip(
        kinds[:, starts].T.tolist(), starts, [*starts[1:], len(keys)], strict=True
    ):
        yield _Run(event_type, tier, origin, group_idx, keys[start:stop])


def _same(*columns: NDArray[np.unsignedinteger]) -> bool:
    """Whether each column has one value in all rows."""
    return all(column.tobytes() == column[:1].tobytes() * len(column) for column in columns)


def _keys(hashes: NDArray[np.uint32] | Sequence[bytes], hash_bytes: int) -> Sequence[bytes]:
    """Hashes as bytes, the first so many of each."""
    if isinstance(hashes, np.ndarray):
        if hashes.dtype != np.uint32 or hashes.ndim != 2 or hashes.shape[1] != 4:
            raise HashingError(f"hashes must be uint32[n, 4]; these are {hashes.dtype}{list(hashes.shape)}")
        return hash_keys(hashes, hash_bytes)
    if not all(isinstance(key, bytes) and len(key) == 16 for key in hashes):
        raise HashingError("hashes must be uint32[n, 4], or 16 bytes each")
    return [key[:hash_bytes] for key in hashes]
