"""Carries out what the offload engine has decided: bytes from tier to tier, in the background.

Jobs run on one worker thread in the order they were submitted, and stores keep the order of their calls, so a tier
sees puts, gets and deletes as they were decided. The worker waits for memory (staging arrays, the host store), never
for a disk: a put to disk ends by itself, and until then its bytes are served from here.

    read what moves down  ->  delete what leaves  ->  put  ->  events and counters  ->  memory given back

Axes: n blocks of a call, P bytes of a block.
"""

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
from kvbm_jax.offload.leases import BufferPool
from kvbm_jax.offload.staging import StagingRing, rows_of
from kvbm_jax.offload.victims import Transfer
from kvbm_jax.protocols import (
    BlockKey,
    BlockRecord,
    BlockStore,
    Clock,
    MetricsSink,
    Outcome,
    StoreFuture,
    StoreRow,
    Tier,
)

__all__ = ["Job", "JobResult", "Mover", "Staged"]

_LOG = logging.getLogger(__name__)
_STORED = (Outcome.OK, Outcome.PRESENT)

type Rows = tuple[StoreRow, ...]


class Staged(NamedTuple):
    """A staging array and the blocks in its first rows."""

    array: jax.Array
    records: Sequence[BlockRecord]


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
    num_bytes: int = 0  # memory it holds until it is done
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
        self.open = 1  # puts under way, and one for the job itself
        self.result = JobResult()


class Mover:
    """Moves the blocks of one worker between its device and its stores.

    Args:
      stores: from the fastest down; one in memory (G2) is waited for, others are not.
      block_bytes: of one block, P.
      ring: where staging arrays are given back.
      buffers: memory for what is read from a store.
      announcer: tells the world.
      metrics: counts what crosses each edge.
      clock: for durations.
    """

    def __init__(
        self,
        stores: Sequence[BlockStore],
        *,
        block_bytes: int,
        ring: StagingRing,
        buffers: BufferPool,
        announcer: TierAnnouncer,
        metrics: MetricsSink,
        clock: Clock,
    ) -> None:
        self._stores = {store.tier: store for store in stores}
        self._prompt = self._stores.keys() & {Tier.G2}
        self._block_bytes = block_bytes
        self._ring = ring
        self._buffers = buffers
        self._announcer = announcer
        self._metrics = metrics
        self._clock = clock
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvbm-offload")
        self._changed = threading.Condition()
        self._bytes = self._jobs = 0
        self._lost: list[tuple[BlockKey, Tier]] = []
        self._pending: dict[tuple[BlockKey, Tier], NDArray[np.uint8]] = {}

    @property
    def bytes_in_flight(self) -> int:
        """Memory that jobs hold."""
        return self._bytes

    def submit(self, job: Job) -> None:
        """Queues a job and returns at once."""
        self._count(job.num_bytes, 1)
        self._worker.submit(self._carry_out, job)

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

    def take_lost(self) -> list[tuple[BlockKey, Tier]]:
        """Returns blocks that could not be put, once each."""
        with self._changed:
            lost, self._lost = self._lost, []
        return lost

    def forget(self, tier: Tier, blocks: Mapping[BlockKey, int | None]) -> None:
        """Has a store drop blocks, and announces those that it had or that are given with their block id."""
        if blocks:
            self._count(0, 1)
            self._worker.submit(self._forget, tier, blocks)

    def close(self, seconds: float | None) -> None:
        """Waits for the jobs, `seconds` at most, closes the stores, which cancel what has not begun, and ends."""
        self.wait_idle(seconds)
        for store in self._stores.values():
            store.close()
        self._worker.shutdown(wait=True)

    # What follows runs on the worker.

    def _carry_out(self, job: Job) -> None:
        progress = _Progress(job)
        try:
            self._move(progress)
        except Exception:  # noqa: BLE001 (a device or a store may fail with anything: its blocks are lost, and told so)
            _LOG.exception("%d of %d blocks could not be moved", len(progress.left), len(job.transfers))
        try:
            for (origin, key), target in progress.left.items():
                self._announcer.fail(origin, [key], progress.departures.get(origin, {}))
                self._count_failures(origin, target, [(key, progress.reasons.get((origin, key), "error"))])
                progress.result = progress.result._replace(failed=progress.result.failed + 1)
        finally:
            self._end_one(progress)

    def _move(self, progress: _Progress) -> None:
        job, begun = progress.job, self._clock.monotonic_ns()
        pieces = self._read_staged(progress)
        pieces.extend(self._fetch(progress))
        moving = {(transfer.key, transfer.origin) for transfer in job.transfers}
        for tier, store in self._stores.items():
            keys = [key for key, where in job.removed if where is tier]
            gone = {key: None for key in keys if (key, tier) not in moving}
            if gone:
                self._drop(tier, gone)
            leaving = [key for key in keys if (key, tier) in moving]
            if leaving:
                store.delete(leaving)
        for piece in pieces:
            self._put(progress, piece, begun)

    def _read_staged(self, progress: _Progress) -> list[_Piece]:
        """Waits for the blocks that come from the device."""
        progress.reusable = False
        pieces = [_Piece(Tier.G1, staged.records, rows_of(staged.array)) for staged in progress.job.staged]
        progress.reusable = True
        return pieces

    def _fetch(self, progress: _Progress) -> list[_Piece]:
        """Reads the blocks that come from a store."""
        pieces = []
        for tier, store in self._stores.items():
            keys = [transfer.key for transfer in progress.job.transfers if transfer.origin is tier]
            if not keys:
                continue
            out = self._buffers.lend(len(keys), self._block_bytes)
            results = dict(zip(keys, store.get(keys, out).result(), strict=True))
            if not progress.job.is_copy:
                ids = {key: row.block_id for key, row in results.items() if row.block_id is not None}
                progress.departures[tier] = self._announcer.leave(tier, ids)
            good = [row.outcome is Outcome.OK for row in results.values()]
            records = [row.record for row in results.values() if row.outcome is Outcome.OK and row.record is not None]
            progress.reasons |= {
                (tier, key): row.outcome.value for key, row in results.items() if row.outcome is not Outcome.OK
            }
            pieces.append(_Piece(tier, records, out if all(good) else out[good]))
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
            future = self._stores[target].put(put.records, rows)
            progress.open += 1
            for record, row in zip(put.records, rows, strict=True):
                del progress.left[piece.origin, record.key]
                if target not in self._prompt:
                    self._pending[record.key, target] = row
            self._then(target, future, count, functools.partial(self._end_put, progress, put))

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
            edge = {"source": origin.label, "target": target.label}
            self._metrics.count("kvbm_transfer_blocks_total", written, **edge)
            self._metrics.count("kvbm_transfer_bytes_total", written * self._block_bytes, **edge)
            self._metrics.observe("kvbm_transfer_seconds", (self._clock.monotonic_ns() - put.begun) / 1e9, **edge)
            self._count_failures(origin, target, failures)
        finally:
            self._end_one(progress)

    def _end_one(self, progress: _Progress) -> None:
        """Ends a put, or the submission; after the last of them the job is done."""
        progress.open -= 1
        if progress.open:
            return
        if progress.reusable:
            self._ring.release([staged.array for staged in progress.job.staged])
        self._count(-progress.job.num_bytes, -1)
        progress.job.done.set_result(progress.result)

    def _forget(self, tier: Tier, blocks: Mapping[BlockKey, int | None]) -> None:
        try:
            self._drop(tier, blocks, lambda: self._count(0, -1))
        except Exception:  # noqa: BLE001 (a closed store, say)
            _LOG.exception("%d blocks could not be dropped", len(blocks))
            self._count(0, -1)

    def _drop(
        self, tier: Tier, blocks: Mapping[BlockKey, int | None], ended: Callable[[], None] = lambda: None
    ) -> None:
        def announce(rows: Rows) -> None:
            ids = [row.block_id if known is None else known for known, row in zip(blocks.values(), rows, strict=True)]
            gone = {key: block_id for key, block_id in zip(blocks, ids, strict=True) if block_id is not None}
            self._announcer.deleted(tier, gone)
            ended()

        self._then(tier, self._stores[tier].delete(list(blocks)), len(blocks), announce)

    def _then(self, tier: Tier, future: StoreFuture[Rows], count: int, act: Callable[[Rows], None]) -> None:
        """Acts on the result of a store's call, on this thread: at once, or when a slow store is done."""
        if tier in self._prompt:
            act(_rows_of(future, count))
        else:
            future.add_done_callback(
                lambda done: self._worker.submit(self._guarded, lambda: act(_rows_of(done, count)))
            )

    def _guarded(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception:  # noqa: BLE001 (an event sink may raise anything; the worker goes on)
            _LOG.exception("the end of a transfer could not be told")

    def _count_failures(self, origin: Tier, target: Tier, failures: Sequence[tuple[BlockKey, str]]) -> None:
        for _, reason in failures:
            self._metrics.count("kvbm_transfer_failures_total", source=origin.label, target=target.label, reason=reason)
        with self._changed:
            self._lost.extend((key, target) for key, _ in failures)

    def _count(self, num_bytes: int, jobs: int) -> None:
        with self._changed:
            self._bytes += num_bytes
            self._jobs += jobs
            self._metrics.gauge("kvbm_transfer_in_flight_bytes", self._bytes)
            self._metrics.gauge("kvbm_transfer_queue_depth", self._jobs)
            self._changed.notify_all()


def _rows_of(future: StoreFuture[Rows], count: int) -> Rows:
    """The result of a store's call; where it was cancelled or broke, every block has failed."""
    try:
        return future.result()
    except Exception as error:  # noqa: BLE001 (a store may fail with anything, and cancels on closing)
        return (StoreRow(Outcome.FAILED, reason=str(error)),) * count
