"""The serving side: a worker's host blocks, for peers to read.

A `PeerServer` answers which of the blocks a peer asks for are held, leases them, and leaves the reading to the engine:
no byte of a block passes through it. Who asks has shown the token (`access`); whose blocks these are, and how they lie,
is told first (`dialogue`).
"""

import contextlib
import math
import time
from collections.abc import Iterable

from kvbm_jax.closing import Closing
from kvbm_jax.errors import ConfigError, FrameError
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.protocols import Clock, MetricsSink, TransferEngine, WorkerRecord
from kvbm_jax.transfer.access import SocketConfig
from kvbm_jax.transfer.dialogue import About, Describe, Leased, Lookup, Release, keys_of, request_decoder
from kvbm_jax.transfer.frames import Frames, Refused
from kvbm_jax.transfer.handover import Arrivals, Migrate
from kvbm_jax.transfer.leases import Leases
from kvbm_jax.transfer.listener import Listener
from kvbm_jax.transfer.placement import Placement

__all__ = ["PeerServer"]

_LONGEST_LEASE = 60.0


class PeerServer(Closing):
    """Serves one store's blocks.

    The store and the engine are the caller's: close the server first, then the engine, then the store.

    Args:
      worker_id: whose blocks these are.
      store: holds them; what it may pin bounds what peers read at a time.
      engine: that peers read through; the store's arena is registered with it.
      placement: how a block's bytes lie; None for whole blocks, `fully_contiguous`.
      config: where to listen, and who may come.
      longest_lease: seconds; who asks for more gets that.
      arrivals: where sequences wait that peers hand over; None for a worker that takes none.
      metrics: takes measurements.
      clock: for leases.

    Raises:
      ConfigError: Blocks of the store are not of the size that the placement makes them, or nothing may be pinned.
      TransferError: The address cannot be had.
    """

    def __init__(
        self,
        worker_id: str,
        store: HostBlockStore,
        engine: TransferEngine,
        *,
        placement: Placement | None = None,
        config: SocketConfig | None = None,
        longest_lease: float = _LONGEST_LEASE,
        arrivals: Arrivals | None = None,
        metrics: MetricsSink | None = None,
        clock: Clock = time,
    ) -> None:
        identity = store.identity
        placement = placement or Placement.whole(identity)
        if placement.block_bytes(identity) != store.block_bytes:
            raise ConfigError(
                f"blocks of the store have {store.block_bytes:,} bytes; {placement} of this model makes "
                f"{placement.block_bytes(identity):,}"
            )
        if not store.pinned_blocks:
            raise ConfigError("pinned_blocks = 0: the store lets no peer read; open it with room for pins")
        self._worker_id = worker_id
        self._identity = identity
        self._placement = placement
        self._engine = engine
        self._longest_lease = longest_lease
        self._arrivals = arrivals
        self._slots = engine.register(store.slots)
        self._started_ns = clock.time_ns()
        self._leases = Leases(store, clock=clock, metrics=metrics or NullMetrics())
        try:
            self._listener = Listener("kvbm-peers", config or SocketConfig(), self._serve)
        except BaseException:
            self._leases.close()
            raise

    @property
    def record(self) -> WorkerRecord:
        """How this worker is found, to be announced."""
        return WorkerRecord(self._worker_id, self._listener.address, self._identity.fingerprint, self._started_ns)

    def close(self) -> None:
        """Stops serving; every lease ends."""
        self._listener.close()
        self._leases.close()

    def _serve(self, frames: Frames, peer: str) -> None:
        """Serves one peer until it goes, and its leases with it."""
        leases: set[int] = set()
        with contextlib.ExitStack() as stack:
            stack.callback(self._end, leases)
            while True:
                match frames.receive(request_decoder):
                    case Describe():
                        frames.send(self._describe())
                    case Lookup() as lookup:
                        if not (math.isfinite(lookup.seconds) and lookup.seconds > 0):
                            raise FrameError(f"a lease of {lookup.seconds} seconds")
                        lease, pins = self._leases.grant(keys_of(lookup), min(lookup.seconds, self._longest_lease))
                        leases.add(lease)
                        frames.send(Leased.of(lease, pins))
                    case Migrate() as request:
                        if self._arrivals is None:
                            frames.send(Refused(f"{self._worker_id} takes no sequences over"))
                        else:
                            self._arrivals.serve(frames, request)
                    case Release(ended):
                        if not leases.issuperset(ended):
                            raise FrameError(f"not all of the leases {ended} are {peer}'s")
                        leases.difference_update(ended)
                        self._end(ended)

    def _end(self, leases: Iterable[int]) -> None:
        for lease in leases:
            self._leases.release(lease)

    def _describe(self) -> About:
        placement = self._placement
        return About(
            self._worker_id,
            self._identity.canonical_json(),
            placement.num_heads,
            placement.first_head,
            placement.kind,
            self._slots,
            self._engine.name,
            self._engine.description(),
        )
