"""Carries out what the offload engine has decided: bytes from tier to tier, in the background.

Jobs run on one worker thread in the order they were submitted, and stores keep the order of their calls, so a tier
sees puts, gets and deletes as they were decided. The worker waits for staging arrays and for the host store; a put to
a slower store ends by itself, and until then its bytes are served from here.

Whatever fails, deletes are carried out, so that stores hold what the policy thinks they hold.

    read what moves down  ->  delete what leaves  ->  put  ->  events and counters  ->  memory given back

Axes: n blocks of a call, P bytes of a block.
"""

import contextlib
import functools
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.offload.announcer import Arrival, Departures, TierAnnouncer
from kvbm_jax.offload.buffer_pool import BufferPool
from kvbm_jax.offload.calls import Rows, attempt, rows_of
from kvbm_jax.offload.edges import EdgeMetrics
from kvbm_jax.offload.staging import StagingRing, rows_of_array
from kvbm_jax.offload.victims import Transfer
from kvbm_jax.protocols import (
    BlockKey,
    BlockRecord,
    BlockStore,
    MetricsSink,
    Outcome,
    StoreFuture,
    Tier,
)

__all__ = ["Job", "JobResult", "Lost", "Mover", "Staged"]

_LOG = logging.getLogger(__name__)
_STORED = (Outcome.OK, Outcome.PRESENT)


class Staged(NamedTuple):
    """A staging array and the blocks in its first rows."""

    array: jax.Array
    records: Sequence[BlockRecord]


class Lost(NamedTuple):
    """A block that a tier was thought to hold, and does not."""

    key: BlockKey
    tier: Tier
    block_id: int | None  # where subscribers believe it to be; None if they were never told
    refused: bool = False  # the store had no room


class JobResult(NamedTuple):
    """What a job came to, in blocks."""

    written: int = 0
    failed: int = 0


@dataclass
class Job:
    """A batch of decided moves. A block has one transfer for each tier it starts from."""

    transfers: Sequence[Transfer[BlockKey]] = ()
    removed: Sequence[tuple[BlockKey, Tier]] = ()
    staged: Sequence[Staged] = ()  # the blocks that come from the device
    departures: Departures = field(default_factory=dict)  # of these, where they leave the device
    is_copy: bool = False  # blocks stay where they come from
    staged_bytes: int = 0  # memory of its staging arrays
    fetched_bytes: int = 0  # memory of what it reads from stores
    done: Future[JobResult] = field(default_factory=Future)


class _Piece(NamedTuple):
    """Blocks whose bytes lie together, rows u8[n, P]."""

    origin: Tier
    records: Sequence[BlockRecord]
    rows: NDArray[np.uint8]


class _Put(NamedTuple):
    """A put under way."""

    origin: Tier
    target: Tier
    records: Sequence[BlockRecord]
    begun: int  # ns


class _Progress:
    """What is left of a job; touched by the worker alone."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.left = {(transfer.origin, transfer.key): transfer.target for transfer in job.transfers}  # not yet put
        self.reasons: dict[tuple[Tier, BlockKey], str] = {}  # why some cannot be
        self.departures: dict[Tier, Departures] = {Tier.G1: job.departures}
        self.reusable = True  # the staging arrays
        # Puts under way, those from staging arrays for themselves; each with one for the job itself.
        self.open = self.open_from_staging = 1
        self.result = JobResult()


class Mover:
    """Moves the blocks of one worker between its device and its stores.

    Args:
      stores: from the fastest down; one in memory (G2) is waited for, others are not.
      block_bytes: of one block, P.
      ring: where staging arrays are given back.
      buffers: memory for what is read from a store.
      announcer: tells the world.
      edges: counts what crosses each edge.
      metrics: takes the gauges of the queue.
    """

    def __init__(
        self,
        stores: Sequence[BlockStore],
        *,
        block_bytes: int,
        ring: StagingRing,
        buffers: BufferPool,
        announcer: TierAnnouncer,
        edges: EdgeMetrics,
        metrics: MetricsSink,
    ) -> None:
        self._stores = {store.tier: store for store in stores}
        self._awaited = self._stores.keys() & {Tier.G2}
        self._block_bytes = block_bytes
        self._ring = ring
        self._buffers = buffers
        self._announcer = announcer
        self._edges = edges
        self._metrics = metrics
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvbm-offload")
        self._changed = threading.Condition()
        self._bytes = self._jobs = 0
        self._lost: list[Lost] = []
        self._undeleted: defaultdict[Tier, dict[BlockKey, None]] = defaultdict(dict)
        self._pending: dict[tuple[BlockKey, Tier], NDArray[np.uint8]] = {}

    @property
    def bytes_in_flight(self) -> int:
        """Memory that jobs hold."""
        return self._bytes

    def submit(self, job: Job) -> None:
        """Queues a job and returns at once."""
        self._queue(functools.partial(self._carry_out, job), job.staged_bytes + job.fetched_bytes)

    def settle(self) -> None:
        """Waits until all that was submitted has reached the stores: it can be read, or is lost."""
        self._worker.submit(lambda: None).result()

    def wait_below(self, num_bytes: int, seconds: float | None) -> bool:
        """Waits until jobs hold less memory than `num_bytes`; returns whether they do."""
        with self._changed:
            return self._changed.wait_for(lambda: self._bytes < num_bytes, seconds)

    def wait_idle(self, seconds: float | None) -> bool:
        """Waits until no job is left; returns whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: self._jobs == 0, seconds)

    def pending(self, key: BlockKey, tier: Tier) -> NDArray[np.uint8] | None:
        """Returns the bytes u8[P] of a block that is being put to a tier; for the thread that submits jobs."""
        return self._pending.get((key, tier))

    def pending_keys(self, tier: Tier) -> set[BlockKey]:
        """Returns the blocks that are being put to a slow tier."""
        return {key for key, where in list(self._pending) if where is tier}

    def take_lost(self) -> list[Lost]:
        """Returns blocks that turned out to be missing, once each."""
        with self._changed:
            lost, self._lost = self._lost, []
        return lost

    def forget(self, tier: Tier, blocks: Mapping[BlockKey, int | None]) -> None:
        """Has a store drop blocks, and announces those that it had or that are given with their block id."""
        if blocks:
            self._queue(functools.partial(self._forget, tier, blocks))

    def close(self, seconds: float | None) -> None:
        """Waits for the jobs, `seconds` at most, closes the stores, which cancel what has not begun, and ends.

        A store that is in the middle of a call is waited for.
        """
        with contextlib.ExitStack() as ending:
            ending.callback(self._worker.shutdown, wait=True)
            for store in self._stores.values():
                ending.callback(store.close)
            self.wait_idle(seconds)

    def _queue(self, work: Callable[[], None], num_bytes: int = 0) -> None:
        self._count(num_bytes, 1)
        try:
            self._worker.submit(work)
        except BaseException:
            self._count(-num_bytes, -1)
            raise

    # What follows runs on the worker.

    def _carry_out(self, job: Job) -> None:
        progress = _Progress(job)
        try:
            self._move(progress)
            for (origin, key), target in progress.left.items():
                self._announcer.fail(origin, [key], progress.departures.get(origin, {}))
                self._count_failures(origin, target, [(key, progress.reasons.get((origin, key), "error"))])
                progress.result = progress.result._replace(failed=progress.result.failed + 1)
        except Exception:  # noqa: BLE001 (an event sink may raise anything; what stores raise is values here)
            _LOG.exception("moving %d blocks failed", len(job.transfers))
        finally:
            # No view of a staging array is left in this frame: it can be donated again.
            self._end_one(progress, Tier.G1)

    def _move(self, progress: _Progress) -> None:
        job, begun = progress.job, self._edges.begin()
        pieces = self._read_staged(progress) + self._fetch(progress)
        moving = {(transfer.key, transfer.origin) for transfer in job.transfers}
        for tier in self._stores:
            keys = [key for key, where in job.removed if where is tier]
            gone = {key: None for key in keys if (key, tier) not in moving}
            self._delete(tier, gone, [key for key in keys if key not in gone])
        for piece in pieces:
            self._put(progress, piece, begun)

    def _read_staged(self, progress: _Progress) -> list[_Piece]:
        """Waits for the blocks that come from the device."""
        pieces = []
        for staged in progress.job.staged:
            try:
                pieces.append(_Piece(Tier.G1, staged.records, rows_of_array(staged.array)))
            except Exception:  # noqa: BLE001 (a device may fail with anything: these blocks are lost)
                _LOG.exception("%d blocks did not arrive from the device", len(staged.records))
                progress.reusable = False
        return pieces

    def _fetch(self, progress: _Progress) -> list[_Piece]:
        """Reads the blocks that come from a store."""
        pieces = []
        for tier, store in self._stores.items():
            keys = [transfer.key for transfer in progress.job.transfers if transfer.origin is tier]
            if not keys:
                continue
            out = self._buffers.lend(len(keys), self._block_bytes)
            rows = rows_of(attempt(functools.partial(store.get, keys, out)), len(keys))
            ids = {key: row.block_id or 0 for key, row in zip(keys, rows, strict=True)}
            if not progress.job.is_copy:
                progress.departures[tier] = self._announcer.leave(tier, ids)
            good, records = [], []
            for i, (key, row) in enumerate(zip(keys, rows, strict=True)):
                if row.outcome is Outcome.OK and row.record is not None and row.record.key == key:
                    good.append(i)
                    records.append(row.record)
                    continue
                progress.reasons[tier, key] = "failed" if row.outcome is Outcome.OK else row.outcome.value
                if progress.job.is_copy:
                    self._lose([Lost(key, tier, ids[key])])
            pieces.append(_Piece(tier, records, out if len(good) == len(keys) else out[good]))
        return pieces

    def _put(self, progress: _Progress, piece: _Piece, begun: int) -> None:
        """Begins to put blocks where they are to go."""
        picked: defaultdict[Tier, list[int]] = defaultdict(list)
        for i, record in enumerate(piece.records):
            target = progress.left.get((piece.origin, record.key))
            if target is not None:
                picked[target].append(i)
        for target, wanted in picked.items():
            count = len(wanted)
            rows = piece.rows[:count] if wanted == list(range(count)) else piece.rows[wanted]
            put = _Put(piece.origin, target, [piece.records[i] for i in wanted], begun)
            progress.open += 1
            progress.open_from_staging += piece.origin is Tier.G1
            for record, row in zip(put.records, rows, strict=True):
                del progress.left[piece.origin, record.key]
                if target not in self._awaited:
                    self._pending[record.key, target] = row
            future = attempt(functools.partial(self._stores[target].put, put.records, rows))
            self._when_done(target, future, count, functools.partial(self._end_put, progress, put))

    def _end_put(self, progress: _Progress, put: _Put, rows: Rows) -> None:
        origin, target = put.origin, put.target
        departures = progress.departures.get(origin, {})
        try:
            for record in put.records:
                self._pending.pop((record.key, target), None)
            found = list(zip(put.records, rows, strict=True))
            arrivals = [Arrival(record, row.block_id or 0) for record, row in found if row.outcome in _STORED]
            failures = [(record.key, row.outcome.value) for record, row in found if row.outcome not in _STORED]
            self._announcer.arrive(origin, target, arrivals, departures)
            self._announcer.fail(origin, [key for key, _ in failures], departures)
            written = sum(row.outcome is Outcome.OK for row in rows)
            done = progress.result
            progress.result = JobResult(done.written + written, done.failed + len(failures))
            self._edges.transferred(origin, target, written, put.begun)
            self._count_failures(origin, target, failures)
        finally:
            self._end_one(progress, origin)

    def _end_one(self, progress: _Progress, origin: Tier) -> None:
        """Ends a put, or the job's own part; gives memory back when the last that needs it has ended."""
        job = progress.job
        progress.open -= 1
        progress.open_from_staging -= origin is Tier.G1
        if origin is Tier.G1 and not progress.open_from_staging:
            if progress.reusable:
                self._ring.release([staged.array for staged in job.staged])
            job.staged = ()
            self._count(-job.staged_bytes, 0)
        if not progress.open:
            self._count(-job.fetched_bytes, -1)
            job.done.set_result(progress.result)

    def _forget(self, tier: Tier, blocks: Mapping[BlockKey, int | None]) -> None:
        self._delete(tier, blocks, (), lambda: self._count(0, -1))

    def _delete(
        self,
        tier: Tier,
        gone: Mapping[BlockKey, int | None],
        leaving: Sequence[BlockKey],
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        """Has a store drop blocks, and announces those that are gone; those leaving are told when they arrive."""
        keys = list(dict.fromkeys([*gone, *leaving, *self._undeleted.pop(tier, ())]))
        if not keys:
            return

        def tell(rows: Rows) -> None:
            try:
                found = dict(zip(keys, rows, strict=True))
                failed = [key for key, row in found.items() if row.outcome is Outcome.FAILED]
                self._undeleted[tier].update(dict.fromkeys(failed))
                ids = {key: found[key].block_id if known is None else known for key, known in gone.items()}
                self._announcer.deleted(tier, {key: number for key, number in ids.items() if number is not None})
            finally:
                ended()

        self._when_done(tier, attempt(functools.partial(self._stores[tier].delete, keys)), len(keys), tell)

    def _when_done(self, tier: Tier, future: StoreFuture[Rows], count: int, act: Callable[[Rows], None]) -> None:
        """Acts on the result of a store's call on this thread: at once, or when a slow store is done."""
        if tier in self._awaited:
            act(rows_of(future, count))
            return

        def later(done: StoreFuture[Rows]) -> None:
            # After the worker's end, as when the interpreter exits, nobody is left to be told.
            with contextlib.suppress(RuntimeError):
                self._worker.submit(self._guarded, lambda: act(rows_of(done, count)))

        future.add_done_callback(later)

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:  # noqa: BLE001 (an event sink may raise anything; the worker goes on)
            _LOG.exception("the end of a transfer could not be told")

    def _count_failures(self, origin: Tier, target: Tier, failures: Sequence[tuple[BlockKey, str]]) -> None:
        self._edges.failed(origin, target, failures)
        self._lose([Lost(key, target, None, reason == Outcome.REFUSED.value) for key, reason in failures])

    def _lose(self, lost: Sequence[Lost]) -> None:
        with self._changed:
            self._lost.extend(lost)

    def _count(self, num_bytes: int, jobs: int) -> None:
        with self._changed:
            self._bytes += num_bytes
            self._jobs += jobs
            self._metrics.gauge("kvbm_transfer_in_flight_bytes", self._bytes)
            self._metrics.gauge("kvbm_transfer_queue_depth", self._jobs)
            self._changed.notify_all()
