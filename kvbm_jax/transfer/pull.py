"""Pulling blocks out of peers' host memory.

    lease ──> read, a window at a time ──> verify what has landed ──> give the lease back

Whatever goes wrong is an outcome of the block, as in a store: not held MISS, no room REFUSED, other bytes than the
peer's checksum says CORRUPT, and FAILED if the peer died or dawdled, or the pull was called off. Only blocks of another
identity raise. A peer that is gone is told to `lost`; one that is wrong too often is shut out for a while
(`quarantine`).

Axes: n blocks of a pull, P bytes of a block.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.closing import Closing
from kvbm_jax.errors import BlockStateError, LayoutError, PeerLostError, TransferError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.offload.edges import EdgeMetrics
from kvbm_jax.protocols import (
    BlockKey,
    Clock,
    MetricsSink,
    Outcome,
    StoreRow,
    Tier,
    TransferEngine,
    WorkerRecord,
)
from kvbm_jax.transfer.access import SocketConfig
from kvbm_jax.transfer.landing import Landing
from kvbm_jax.transfer.placement import Placement, convert
from kvbm_jax.transfer.quarantine import Quarantine
from kvbm_jax.transfer.reading import Reading
from kvbm_jax.transfer.remote import RemoteWorker

__all__ = ["Pulled", "Puller"]

_LOG = logging.getLogger(__name__)
_WINDOW_BYTES = 8 << 20
_LEASE_MARGIN = 2.0  # seconds that a lease outlives the time of its pull


class Pulled(Closing):
    """What a pull has brought; its memory is lent until `close`.

    Attributes:
      rows: What became of each block asked for, in order.
    """

    def __init__(
        self,
        rows: tuple[StoreRow, ...],
        blocks: Callable[[], Iterable[tuple[int, NDArray[np.uint8]]]],
        end: Callable[[], None],
    ) -> None:
        self.rows = rows
        self._blocks = blocks
        self._end = end
        self._closed = False

    def blocks(self) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """Yields (place among those asked for, bytes u8[P]) of every block that is there; views, not to be written.

        Raises:
          BlockStateError: It is closed.
        """
        if self._closed:
            raise BlockStateError("what was pulled has been given back")
        yield from self._blocks()

    def close(self) -> None:
        """Gives the memory back."""
        if not self._closed:
            self._closed = True
            self._end()


class Puller(Closing):
    """Pulls blocks of one identity, from any number of peers.

    The engine is the caller's, and closed after this.

    Args:
      worker_id: what this worker is called by peers.
      identity: what its blocks mean.
      engine: reads from peers.
      landing_blocks: blocks that may be pulled and not given back at a time.
      placement: how blocks are wanted; None for whole blocks, `fully_contiguous`.
      config: what is shown and asked of peers.
      timeout: seconds that a pull may take.
      window_bytes: about how much one transfer reads.
      lost: is called with the id of a worker that is gone.
      quarantine: decides which peers are shut out; None for the rule above.
      metrics: takes measurements.
      clock: for durations.

    Raises:
      ConfigError: A size is not positive, or the memory cannot be had.
    """

    def __init__(
        self,
        worker_id: str,
        identity: CacheIdentity,
        engine: TransferEngine,
        landing_blocks: int,
        *,
        placement: Placement | None = None,
        config: SocketConfig | None = None,
        timeout: float = 10.0,
        window_bytes: int = _WINDOW_BYTES,
        lost: Callable[[str], None] = lambda worker_id: None,
        quarantine: Quarantine | None = None,
        metrics: MetricsSink | None = None,
        clock: Clock = time,
    ) -> None:
        self._worker_id = worker_id
        self._identity = identity
        self._engine = engine
        self._placement = placement or Placement.whole(identity)
        self._block_bytes = self._placement.block_bytes(identity)
        self._landing_blocks = landing_blocks
        self._landings: dict[int, Landing] = {}  # by bytes of a block: peers of other sizes have other blocks
        self._config = config or SocketConfig()
        self._timeout = timeout
        self._window_bytes = window_bytes
        self._lost = lost
        metrics = metrics or NullMetrics()
        self._quarantine = quarantine or Quarantine(metrics=metrics, clock=clock)
        self._edge = EdgeMetrics(metrics, clock, self._block_bytes)
        self._clock = clock
        self._remotes: dict[str, RemoteWorker] = {}
        self._closed = False
        self._lock = threading.Lock()
        self._landing(self._block_bytes)

    @property
    def quarantine(self) -> Quarantine:
        """Which peers are shut out."""
        return self._quarantine

    def free_slots(self, block_bytes: int | None = None) -> int:
        """Returns how many blocks could land now."""
        return self._landing(block_bytes or self._block_bytes).free

    def pull(
        self,
        record: WorkerRecord,
        keys: Sequence[BlockKey],
        *,
        timeout: float | None = None,
        cancelled: threading.Event | None = None,
    ) -> Pulled:
        """Reads blocks of a peer.

        Args:
          record: The peer, as `Discovery` has it.
          keys: The blocks, n of them.
          timeout: Seconds that it may take; None for what the puller was given.
          cancelled: Once it is set, no further window is read.

        Raises:
          IdentityMismatchError: The peer's blocks are of another model or layout.
          LayoutError: The peer does not have all heads that are wanted.
          BlockStateError: The puller is closed.
        """
        self._check_open()
        if not keys:
            return _none(0, Outcome.OK, "")
        if self._quarantine.holds(record.worker_id):
            return _none(len(keys), Outcome.REFUSED, f"{record.worker_id} is in quarantine")
        begun = self._edge.begin()
        pulled = self._pull(record, keys, self._timeout if timeout is None else timeout, cancelled or threading.Event())
        failures = [
            (key, row.outcome.value)
            for key, row in zip(keys, pulled.rows, strict=True)
            if row.outcome is not Outcome.OK
        ]
        self._edge.transferred(Tier.G4, Tier.G2, len(keys) - len(failures), begun)
        self._edge.failed(Tier.G4, Tier.G2, failures)
        return pulled

    def close(self) -> None:
        """Ends all connections. What was pulled stays readable until it is given back."""
        with self._lock:
            self._closed = True
            remotes = list(self._remotes.values())
        for remote in remotes:
            self._drop(remote)

    def _pull(
        self, record: WorkerRecord, keys: Sequence[BlockKey], timeout: float, cancelled: threading.Event
    ) -> Pulled:
        deadline = self._clock.monotonic_ns() + round(timeout * 1e9)
        remote: RemoteWorker | None = None
        try:
            remote = self._remote(record, timeout)
            landing = self._landing(remote.slots.nbytes)
            reading = Reading(
                remote,
                keys,
                landing,
                seconds=timeout + _LEASE_MARGIN,
                deadline=deadline,
                clock=self._clock,
                cancelled=cancelled,
            )
            reading.run(self._engine, self._window_bytes)
        except PeerLostError as error:
            self._lose(record, remote, error)
            return _none(len(keys), Outcome.FAILED, str(error))
        except TransferError as error:
            self._fault(record, remote, str(error))
            return _none(len(keys), Outcome.FAILED, str(error))
        if reading.lost is not None:
            self._lose(record, remote, reading.lost)
        elif reading.fault:
            self._fault(record, remote, reading.fault)
        elif reading.landed:
            self._quarantine.clear(record.worker_id)
        return self._brought(reading, landing, remote.placement)

    def _brought(self, reading: Reading, landing: Landing, placement: Placement) -> Pulled:
        """Returns what has landed, in the placement that is wanted."""
        rows, landed = tuple(reading.rows), reading.landed
        if placement == self._placement or not landed:
            return Pulled(
                rows,
                lambda: ((place, landing.block(slot)) for place, slot in landed.items()),
                lambda: landing.give_back(landed.values()),
            )
        try:
            blocks = np.stack([landing.block(slot) for slot in landed.values()])
            converted = convert(blocks, self._identity, placement, self._placement)
        finally:
            landing.give_back(landed.values())
        return Pulled(rows, lambda: zip(landed, converted, strict=True), lambda: None)

    def _remote(self, record: WorkerRecord, seconds: float) -> RemoteWorker:
        """Returns the connection with a peer, one made within so many seconds if there is none or it began anew."""
        with self._lock:
            found = self._remotes.get(record.worker_id)
        if found is not None and found.record == record:
            return found
        if found is not None:
            self._drop(found)
        remote = RemoteWorker(record, self._identity, self._engine, self._config, self._worker_id, seconds)
        try:
            self._check_placement(remote)
        except LayoutError:
            remote.close()
            raise
        with self._lock:
            other = self._remotes.setdefault(record.worker_id, remote)
            closed = self._closed
        if other is not remote:  # another thread was faster
            remote.close()
        if closed:
            self._drop(other)
            self._check_open()
        return other

    def _check_placement(self, remote: RemoteWorker) -> None:
        theirs, worker_id = remote.placement, remote.record.worker_id
        if not theirs.covers(self._placement):
            raise LayoutError(f"{worker_id!r} has {theirs}; wanted are all heads of {self._placement}")
        if remote.slots.nbytes != theirs.block_bytes(self._identity):
            raise LayoutError(
                f"blocks of {worker_id!r} have {remote.slots.nbytes:,} bytes; {theirs} of this model makes "
                f"{theirs.block_bytes(self._identity):,}"
            )

    def _landing(self, block_bytes: int) -> Landing:
        with self._lock:
            found = self._landings.get(block_bytes)
            if found is None:
                found = self._landings[block_bytes] = Landing(self._engine, block_bytes, self._landing_blocks)
        return found

    def _lose(self, record: WorkerRecord, remote: RemoteWorker | None, error: PeerLostError) -> None:
        """Forgets a peer that is gone, unless it was this side that ended the connection."""
        if remote is not None and remote.closed:
            return
        _LOG.info("%s is lost: %s", record.worker_id, error)
        if remote is not None:
            self._drop(remote)
        self._lost(record.worker_id)

    def _fault(self, record: WorkerRecord, remote: RemoteWorker | None, reason: str) -> None:
        """Notes what a peer did wrong, and begins anew with it: its connections may be in the middle of anything."""
        if remote is not None:
            self._drop(remote)
        self._quarantine.strike(record.worker_id, reason)

    def _drop(self, remote: RemoteWorker) -> None:
        with self._lock:
            if self._remotes.get(remote.record.worker_id) is remote:
                del self._remotes[remote.record.worker_id]
        remote.close()
        self._engine.forget(remote.engine_name)

    def _check_open(self) -> None:
        if self._closed:
            raise BlockStateError("the puller is closed")


def _none(count: int, outcome: Outcome, reason: str) -> Pulled:
    return Pulled((StoreRow(outcome, reason=reason),) * count, lambda: (), lambda: None)
