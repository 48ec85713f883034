"""G3: blocks in content-addressed segments, each a committed Orbax checkpoint.

Puts and deletes run on one writer thread in the order of the calls. The writer takes all puts that wait and commits
them as one segment, then resolves their futures. Reads run on a second thread, so that they do not wait behind a
write; only a read of a block that a call before it still has to put or delete waits for that call. So results depend
on the order of calls, never on timing. Every read is verified against the block's checksum in the reader's buffer; a
block that cannot be read (FAILED), or is not what was written (CORRUPT), is dropped: the caller computes it again and
may put it again.

    put, delete --> queue --> writer: group -> segment -> fsync -> index -> futures
                                                            |
    get ------------------------------------------------> reader: TensorStore -> out -> checksum -> future

**Budget.** What lies in the folder stays within `capacity_bytes`, but for the segment that a compaction is writing. A
deleted block's bytes stay until its segment goes: at once when nothing in it is alive, else when room is needed, by
rewriting the sparsest segments. One eighth of the budget is kept for such dead bytes.

**Restart.** The index is rebuilt from the records of the committed segments. A delete is not written down, so a block
deleted shortly before a restart may be back after it; keys name contents, so its bytes are right.

Axes: n blocks of a call, P bytes of a block.
"""

import collections
import errno
import logging
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.offload.checks import check_out, check_rows
from kvbm_jax.offload.segments import folder as files
from kvbm_jax.offload.segments.index import Entry, Segment, SegmentIndex
from kvbm_jax.offload.segments.record import SegmentRecord, StoredBlock, encode
from kvbm_jax.protocols import BlockKey, BlockRecord, Clock, Outcome, StoreRow, StoreStats, Tier

__all__ = ["SegmentBlockStore"]

type Rows = tuple[StoreRow, ...]

_LOG = logging.getLogger(__name__)
_SLACK = 8  # one part in so many of the budget is left to dead bytes
_TOKEN_BYTES = 5  # of a token in a record, at most


@dataclass(eq=False)
class _Call:
    """A put, delete or get under way."""

    keys: tuple[BlockKey, ...]
    future: Future[Rows] = field(default_factory=Future)
    records: tuple[BlockRecord, ...] = ()  # put
    buffer: NDArray[np.uint8] | None = None  # [n, P]; put reads it, get writes it; None: delete
    is_put: bool = False


class _New(NamedTuple):
    """A block about to be written."""

    record: BlockRecord
    block_id: int
    row: NDArray[np.uint8]


class _Read(NamedTuple):
    """A get's block: where it lies, held there by a pin."""

    position: int
    entry: Entry
    segment: Segment
    row: int


class SegmentBlockStore:
    """Blocks on a disk.

    Args:
      path: Folder of the segments, made if it is not there; one store at a time.
      block_bytes: Bytes of one block, `P`.
      identity: What the blocks' bytes mean; segments of another identity are left alone.
      capacity_bytes: What may lie in the folder.
      capacity_blocks: Blocks it may hold, if fewer than fit.
      clock: Tells when segments were made.
      max_segment_blocks: Blocks of one segment at most.

    Raises:
      ConfigError: A size is out of range, or the folder cannot be used or is in use.
      MissingDependencyError: Orbax is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        block_bytes: int,
        *,
        identity: CacheIdentity,
        capacity_bytes: int,
        clock: Clock,
        capacity_blocks: int | None = None,
        max_segment_blocks: int = 256,
    ) -> None:
        for name, value in (("block_bytes", block_bytes), ("max_segment_blocks", max_segment_blocks)):
            if value < 1:
                raise ConfigError(f"{name} = {value}: allowed is an integer >= 1")
        if capacity_blocks is not None and capacity_blocks < 0:
            raise ConfigError(f"capacity_blocks = {capacity_blocks}: allowed is an integer >= 0, or None")
        self._block_bytes = block_bytes
        self._identity = identity
        self._capacity_bytes = capacity_bytes
        self._clock = clock
        self._max_segment_blocks = max_segment_blocks
        self._index = SegmentIndex()
        self._counts = collections.Counter[str]()
        self._lock = threading.Lock()
        self._unpinned = threading.Condition(self._lock)
        self._queue: collections.deque[_Call] = collections.deque()
        self._unwritten = collections.Counter[BlockKey]()  # keys of the puts and deletes that the writer has not done
        self._calls: collections.deque[Future[Rows]] = collections.deque()  # not done when last looked at
        self._writer: ThreadPoolExecutor | None = None
        self._reader: ThreadPoolExecutor | None = None
        self._closed = False
        self._next_sequence = self._next_block_id = 0
        self._discarding = 0  # segments that are being deleted
        self._aside: list[tuple[Path, int]] = []
        smallest = self._fitting(capacity_bytes)
        if smallest < 1:
            needed = (files.estimate_bytes(1, block_bytes, self._record_bytes()) * _SLACK) // (_SLACK - 1) + 1
            raise ConfigError(
                f"capacity_bytes = {capacity_bytes:,} cannot hold one block of {block_bytes:,} bytes; "
                f"it takes {needed:,} at least"
            )
        self._folder = files.SegmentFolder(Path(path).absolute())
        try:
            self._other_bytes = self._load()
        except BaseException:
            self._folder.unlock()
            raise
        fitting = self._fitting(capacity_bytes - self._other_bytes)
        self._capacity = fitting if capacity_blocks is None else min(fitting, capacity_blocks)
        if capacity_blocks is not None and smallest < capacity_blocks:
            self._folder.unlock()
            raise ConfigError(
                f"capacity_blocks = {capacity_blocks} but capacity_bytes = {capacity_bytes:,} has room for {smallest}"
            )

    @property
    def tier(self) -> Tier:
        """G3."""
        return Tier.G3

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, `P`."""
        return self._block_bytes

    @property
    def identity(self) -> CacheIdentity:
        """What the blocks' bytes mean."""
        return self._identity

    def put(self, records: Sequence[BlockRecord], blocks: NDArray[np.uint8]) -> Future[Rows]:
        """Writes blocks u8[n, P]; the future resolves when they would survive a power cut."""
        self._refuse_closed()
        check_rows(blocks, len(records), self._block_bytes)
        kept = tuple(records)
        return self._enqueue(_Call(tuple(record.key for record in kept), records=kept, buffer=blocks, is_put=True))

    def get(self, keys: Sequence[BlockKey], out: NDArray[np.uint8]) -> Future[Rows]:
        """Reads blocks into `out`, u8[n, P], and verifies them there."""
        self._refuse_closed()
        check_out(out, len(keys), self._block_bytes)
        call = _Call(tuple(keys), buffer=out)
        with self._lock:
            self._check_open()
            if not any(self._unwritten[key] for key in call.keys):
                self._track(call)
                self._start_read(call)
                return call.future
        return self._enqueue(call)

    def delete(self, keys: Sequence[BlockKey]) -> Future[Rows]:
        """Takes blocks out; a segment with nothing else alive goes from the disk before the future resolves."""
        return self._enqueue(_Call(tuple(keys)))

    def contains(self, keys: Sequence[BlockKey]) -> tuple[bool, ...]:
        """Returns which blocks are committed."""
        with self._lock:
            self._check_open()
            return tuple(self._index.get(key) is not None for key in keys)

    def records(self) -> Iterator[tuple[int, BlockRecord]]:
        """Yields (block_id, record) of every block held when called, the oldest put first, also after a restart."""
        with self._lock:
            self._check_open()
            return iter([(entry.block.block_id, entry.block.record) for entry in self._index.oldest_first()])

    def stats(self) -> StoreStats:
        """Returns its size and counters."""
        names = ("puts", "refused", "hits", "misses", "corrupt", "failed", "deletes", "foreign", "unreadable")
        with self._lock:
            pending = sum(not call.done() for call in self._calls)
            counts = {name: self._counts[name] for name in names}
            return StoreStats(len(self._index), self._capacity, pending, **counts)

    def physical_bytes(self) -> int:
        """Returns what lies in the folder, in bytes on the disk."""
        with self._lock:
            return self._physical()

    def close(self) -> None:
        """Finishes what has begun, cancels what has not, and lets go of the folder."""
        with self._lock:
            self._closed = True
            calls = list(self._calls)
        for future in calls:
            future.cancel()
        if self._writer is not None:
            self._writer.shutdown(wait=True)
        if self._reader is not None:  # asked for last: the writer hands reads on
            self._reader.shutdown(wait=True)
        self._folder.unlock()

    # Calls, on any thread.

    def _enqueue(self, call: _Call) -> Future[Rows]:
        with self._lock:
            self._check_open()
            self._track(call)
            if self._writer is None:
                self._writer = ThreadPoolExecutor(1, thread_name_prefix="kvbm-segment-writer")
            self._queue.append(call)
            if call.is_put or call.buffer is None:
                self._unwritten.update(call.keys)
            self._writer.submit(self._work)
        return call.future

    def _track(self, call: _Call) -> None:
        while self._calls and self._calls[0].done():
            self._calls.popleft()
        self._calls.append(call.future)

    def _start_read(self, call: _Call) -> None:
        """Looks a get's blocks up, pins them, and hands it to the reader; under the lock."""
        reads = []
        for position, key in enumerate(call.keys):
            entry = self._index.get(key)
            if entry is not None:
                entry.segment.pins += 1
                reads.append(_Read(position, entry, entry.segment, entry.row))
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1, thread_name_prefix="kvbm-segment-reader")
        self._reader.submit(self._read, call, reads)

    def _refuse_closed(self) -> None:
        with self._lock:
            self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise BlockStateError("the store is closed")

    # Reads, on the reader.

    def _read(self, call: _Call, reads: list[_Read]) -> None:
        if not call.future.set_running_or_notify_cancel():
            self._unpin(reads)
            return
        assert call.buffer is not None  # noqa: S101 (a get has one)
        out = call.buffer
        rows = [StoreRow(Outcome.MISS)] * len(call.keys)
        try:
            reasons = files.read_rows([files.Wanted(read.segment.path, read.row, out[read.position]) for read in reads])
        except Exception as error:  # noqa: BLE001 (TensorStore has no error class of its own, and memory may be short)
            reasons = [" ".join(f"{type(error).__name__}: {error}".split())[:400]] * len(reads)
        for read, reason in zip(reads, reasons, strict=True):
            rows[read.position] = self._verified(read.entry, reason, out[read.position])
        with self._lock:
            self._counts["misses"] += len(call.keys) - len(reads)
            for read in reads:
                row = rows[read.position]
                if row.outcome is Outcome.OK:
                    self._counts["hits"] += 1
                else:
                    self._drop(read, row.outcome)
        self._unpin(reads)
        call.future.set_result(tuple(rows))

    @staticmethod
    def _verified(entry: Entry, reason: str, row: NDArray[np.uint8]) -> StoreRow:
        block = entry.block
        if reason:
            return StoreRow(Outcome.FAILED, block.block_id, reason=reason)
        found = xxhash.xxh3_64_intdigest(np.ascontiguousarray(row))
        if found != block.checksum:
            reason = f"checksum {found:016x}, stored with {block.checksum:016x}"
            return StoreRow(Outcome.CORRUPT, block.block_id, reason=reason)
        return StoreRow(Outcome.OK, block.block_id, block.record)

    def _drop(self, read: _Read, outcome: Outcome) -> None:
        """Forgets a block that was read and is not what it should be; under the lock."""
        self._counts[outcome.value] += 1
        read.segment.is_damaged |= outcome is Outcome.FAILED
        if self._index.get(read.entry.block.key) is read.entry:
            self._index.remove(read.entry.block.key)

    def _unpin(self, reads: Iterable[_Read]) -> None:
        with self._lock:
            for read in reads:
                read.segment.pins -= 1
        self._collect()

    # Writes, on the writer.

    def _work(self) -> None:
        """Takes the calls that wait, up to a full segment, and carries them out."""
        with self._lock:
            calls = self._take()
        results: list[tuple[_Call, list[StoreRow]]] = []
        news: dict[BlockKey, _New] = {}
        with self._lock:
            for call in calls:
                if call.is_put:
                    results.append((call, [self._decide(call, i, news) for i in range(len(call.keys))]))
                elif call.buffer is None:
                    results.append((call, [self._delete(key) for key in call.keys]))
                else:
                    self._start_read(call)
        self._collect()
        blocks = list(news.values())
        failures: dict[BlockKey, StoreRow] = {}
        for first in range(0, len(blocks), self._max_segment_blocks):
            part = blocks[first : first + self._max_segment_blocks]
            failure = self._commit(part)
            if failure is not None:
                failures |= {new.record.key: failure for new in part}
        with self._lock:
            for call, rows in results:
                if call.is_put:
                    rows[:] = [failures.get(key, row) for key, row in zip(call.keys, rows, strict=True)]
                    self._counts["puts"] += sum(row.outcome is Outcome.OK for row in rows)
                    self._counts["refused"] += sum(row.outcome is Outcome.REFUSED for row in rows)
                    self._counts["failed"] += sum(row.outcome is Outcome.FAILED for row in rows)
                self._written(call)
        for call, rows in results:
            call.future.set_result(tuple(rows))

    def _take(self) -> list[_Call]:
        """Takes calls off the queue as long as they may be carried out before the puts among them are committed."""
        taken: list[_Call] = []
        putting: set[BlockKey] = set()
        while self._queue:
            call = self._queue[0]
            if call.is_put:
                if putting and len(putting) + len(call.keys) > self._max_segment_blocks:
                    break
            elif not putting.isdisjoint(call.keys):
                break
            self._queue.popleft()
            is_get = not call.is_put and call.buffer is not None
            if not is_get and not call.future.set_running_or_notify_cancel():
                self._written(call)
                continue
            if call.is_put:
                putting.update(call.keys)
            taken.append(call)
        return taken

    def _written(self, call: _Call) -> None:
        self._unwritten.subtract(call.keys)
        for key in call.keys:
            if not self._unwritten[key]:
                del self._unwritten[key]

    def _decide(self, call: _Call, i: int, news: dict[BlockKey, _New]) -> StoreRow:
        """Returns what a block of a put comes to if its segment can be written; notes it if it must be."""
        key = call.keys[i]
        entry = self._index.get(key)
        if entry is not None:
            return StoreRow(Outcome.PRESENT, entry.block.block_id)
        if key in news:
            return StoreRow(Outcome.PRESENT, news[key].block_id)
        held = len(self._index) + len(news)
        if held >= self._capacity:
            return StoreRow(Outcome.REFUSED, reason=f"full: {held} blocks held, room for {self._capacity}")
        assert call.buffer is not None  # noqa: S101 (a put has one)
        news[key] = _New(call.records[i], self._next_block_id, call.buffer[i])
        self._next_block_id += 1
        return StoreRow(Outcome.OK, news[key].block_id)

    def _delete(self, key: BlockKey) -> StoreRow:
        entry = self._index.remove(key)
        if entry is None:
            return StoreRow(Outcome.MISS)
        self._counts["deletes"] += 1
        return StoreRow(Outcome.OK, entry.block.block_id)

    def _commit(self, news: Sequence[_New]) -> StoreRow | None:
        """Writes one segment; returns what its blocks come to if that cannot be done."""
        try:
            rows = [np.ascontiguousarray(new.row) for new in news]
            blocks = [
                StoredBlock.of(new.record, block_id=new.block_id, checksum=xxhash.xxh3_64_intdigest(row))
                for new, row in zip(news, rows, strict=True)
            ]
            record = self._record(blocks)
            need = files.estimate_bytes(len(blocks), self._block_bytes, len(encode(record)))
            while not self._has_room(need):
                if not self._compact():
                    taken = f"{self.physical_bytes():,} of {self._capacity_bytes:,} are taken"
                    return StoreRow(Outcome.REFUSED, reason=f"{need:,} bytes do not fit: {taken}")
            # Numbered last: a compaction on the way has written a segment of its own.
            self._add(self._record(blocks), rows, dict(enumerate(blocks)))
        except Exception as error:  # noqa: BLE001
            # Orbax and TensorStore have no error class of their own; whatever it was, the blocks were not written.
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:400]
            _LOG.warning("writing %d blocks to %s failed: %s", len(news), self._folder.root, reason)
            return StoreRow(Outcome.REFUSED if _is_full(error) else Outcome.FAILED, reason=reason)
        return None

    def _record(self, blocks: Sequence[StoredBlock]) -> SegmentRecord:
        return SegmentRecord(
            sequence=self._next_sequence,
            created_ns=self._clock.time_ns(),
            identity=self._identity.canonical_json(),
            block_bytes=self._block_bytes,
            blocks=tuple(blocks),
        )

    def _add(self, record: SegmentRecord, rows: Sequence[NDArray[np.uint8]], live: dict[int, StoredBlock]) -> None:
        self._next_sequence += 1
        path, physical = self._folder.write(record, rows)
        with self._lock:
            self._index.add(Segment(path, record.sequence, physical), live.items())

    def _has_room(self, need: int) -> bool:
        """Returns whether so many bytes fit, once segments that only wait for readers and those set aside are gone."""
        with self._unpinned:
            while self._physical() + need > self._capacity_bytes:
                if self._discarding or self._index.waits_for_readers():
                    self._unpinned.wait()
                elif self._aside:
                    path, physical = self._aside.pop(0)
                    self._folder.discard(path)
                    self._other_bytes -= physical
                else:
                    return False
            return True

    def _compact(self) -> bool:
        """Rewrites the sparsest segments as one; returns whether that has freed anything."""
        with self._lock:
            chosen: list[Segment] = []
            live = 0
            for segment in self._index.sparsest_first():
                if chosen and live + segment.live > self._max_segment_blocks:
                    break
                chosen.append(segment)
                live += segment.live
            entries = list(self._index.entries_of(chosen))
            record = self._record([entry.block for entry in entries])
            after = files.estimate_bytes(live, self._block_bytes, len(encode(record)))
            before = sum(segment.physical for segment in chosen)
            if after >= before:
                return False
            reads = [_Read(i, entry, entry.segment, entry.row) for i, entry in enumerate(entries)]
            for read in reads:
                read.segment.pins += 1
        try:
            self._rewrite(reads)
        finally:
            self._unpin(reads)
        return True

    def _rewrite(self, reads: Sequence[_Read]) -> None:
        rows = np.empty((len(reads), self._block_bytes), np.uint8)
        reasons = files.read_rows([files.Wanted(read.segment.path, read.row, rows[read.position]) for read in reads])
        good = []
        for read, reason in zip(reads, reasons, strict=True):
            row = self._verified(read.entry, reason, rows[read.position])
            if row.outcome is Outcome.OK:
                good.append(read)
                continue
            with self._lock:
                self._drop(read, row.outcome)
        if not good:
            return
        record = self._record([read.entry.block for read in good])
        self._next_sequence += 1
        path, physical = self._folder.write(record, [rows[read.position] for read in good])
        with self._lock:
            still = [
                (row, read.entry.block)
                for row, read in enumerate(good)
                if self._index.get(read.entry.block.key) is read.entry
            ]
            self._index.add(Segment(path, record.sequence, physical), still)

    def _collect(self) -> None:
        """Deletes the segments that nobody needs any more."""
        with self._lock:
            garbage = self._index.garbage()
            self._other_bytes += sum(segment.physical for segment in garbage)
            self._discarding += len(garbage)
        for segment in garbage:
            if segment.is_damaged:  # perhaps for the moment only: kept until its room is needed, tried again on opening
                aside = self._folder.set_aside(segment.path)
                with self._lock:
                    self._aside.append((aside, segment.physical))
                continue
            try:
                self._folder.discard(segment.path)
            except OSError as error:
                _LOG.warning("deleting %s failed, its blocks are back after a restart: %s", segment.path, error)
                continue
            with self._lock:
                self._other_bytes -= segment.physical
        with self._unpinned:
            self._discarding -= len(garbage)
            self._unpinned.notify_all()

    def _physical(self) -> int:
        return self._other_bytes + self._index.physical

    # Opening.

    def _load(self) -> int:
        """Rebuilds the index; returns what else lies in the folder, in bytes."""
        foreign: dict[CacheIdentity, list[str]] = {}
        mine: list[Path] = []
        for found in files.scan(self._folder.root):
            self._next_sequence = max(self._next_sequence, found.sequence + 1)
            if found.record is None:
                path = self._folder.set_aside(found.path)
                self._aside.append((path, found.physical))
                self._counts["unreadable"] += 1
                _LOG.warning("segment %s cannot be read and is set aside: %s", path, found.reason)
                continue
            identity = found.record.cache_identity()
            if identity != self._identity or found.record.block_bytes != self._block_bytes:
                foreign.setdefault(identity, []).append(found.path.name)
                self._counts["foreign"] += 1
                continue
            path = self._folder.take_back(found.path)
            mine.append(path)
            self._index.add(Segment(path, found.sequence, found.physical), enumerate(found.record.blocks))
            for block in found.record.blocks:
                self._next_block_id = max(self._next_block_id, block.block_id + 1)
        for identity, names in foreign.items():
            _LOG.warning(
                "%s: %s left alone, of another cache: fingerprint %s, ours is %s; %s",
                self._folder.root,
                ", ".join(names),
                identity.fingerprint.hex(),
                self._identity.fingerprint.hex(),
                self._identity.difference(identity) or "blocks of another size",
            )
        self._collect_superseded()
        return self._folder.other_bytes(mine)

    def _collect_superseded(self) -> None:
        """Deletes segments whose blocks have all been rewritten: a crash came between the new one and their end."""
        self._other_bytes = 0
        self._collect()

    def _record_bytes(self) -> int:
        return 128 + _TOKEN_BYTES * self._identity.block_size

    def _fitting(self, available: int) -> int:
        """Returns how many blocks fit into so many bytes, in full segments, with room left for dead ones."""
        usable = available - available // _SLACK
        one = files.estimate_bytes(1, self._block_bytes, self._record_bytes())
        block = one - files.estimate_bytes(0, self._block_bytes, 0)
        full = block * (self._max_segment_blocks - 1) + one
        segments, rest = divmod(max(usable, 0), full)
        return segments * self._max_segment_blocks + (max(rest - (one - block), 0) // block)


def _is_full(error: Exception) -> bool:
    """Whether a write failed for want of room; TensorStore says so in words only."""
    number = getattr(error, "errno", None)
    return number in {errno.ENOSPC, errno.EDQUOT} or os.strerror(errno.ENOSPC) in str(error)
