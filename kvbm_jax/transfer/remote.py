"""One peer as a worker that pulls sees it: a connection, what was said about it, leases."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from kvbm_jax.closing import Closing
from kvbm_jax.errors import ConfigError, IdentityMismatchError, TransferError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.protocols import Slots, TransferEngine, WorkerRecord
from kvbm_jax.transfer.access import SocketConfig
from kvbm_jax.transfer.dialogue import (
    About,
    Describe,
    Found,
    Leased,
    Lookup,
    Release,
    about_decoder,
    leased_decoder,
)
from kvbm_jax.transfer.listener import connect
from kvbm_jax.transfer.placement import Placement

__all__ = ["Lease", "RemoteWorker"]

_LEAST_PATIENCE = 0.001  # seconds


class Lease(NamedTuple):
    """Blocks of a peer that may be read for a while."""

    number: int
    found: Found


class RemoteWorker(Closing):
    """A connection with a worker that serves blocks of the same identity.

    Args:
      record: how it is found.
      identity: what the blocks of this worker mean.
      engine: reads the peer's memory; of the same kind as the peer's.
      config: what is shown and asked of the peer.
      name: what this worker is called there.
      seconds: what connecting may take at most, if that is less than `config` allows.

    Raises:
      PeerLostError: Nobody answers.
      IdentityMismatchError: Its blocks are of another model or layout.
      TransferError: It refuses, is another than the record says, or its engine is of another kind.
    """

    def __init__(
        self,
        record: WorkerRecord,
        identity: CacheIdentity,
        engine: TransferEngine,
        config: SocketConfig,
        name: str,
        seconds: float,
    ) -> None:
        self.record = record
        self.closed = False
        self._patience = config.patience
        self._lock = threading.Lock()
        hurried = replace(config, patience=min(config.patience, max(seconds, _LEAST_PATIENCE)))
        self._frames = connect(record.address, hurried, name)
        try:
            about: About = self._frames.ask(Describe(), about_decoder)
            self._check(about, identity, engine)
            self.placement = Placement(about.num_heads, about.first_head, about.kind)
            self.slots: Slots = about.slots
            self.engine_name = engine.connect(about.description)
        except BaseException:
            self._frames.stream.cut()
            raise

    def lease(self, keys: Sequence[tuple[bytes, int]], seconds: float, patience: float) -> Lease:
        """Leases those of the blocks that the peer holds, for so many seconds.

        Waits for the answer as long as the configuration says, and no longer than `patience` seconds.

        Raises:
          PeerLostError: The peer is gone.
          TransferError: It refuses, or says what makes no sense.
        """
        hashes = b"".join([sequence_hash for sequence_hash, _ in keys])
        groups = np.array([group_idx for _, group_idx in keys], "<u4").tobytes()
        with self._lock:
            self._frames.stream.patience(min(patience, self._patience))
            answer: Leased = self._frames.ask(Lookup(hashes, groups, seconds), leased_decoder)
        return Lease(answer.lease, Found.read(answer, len(keys), self.slots.count))

    def release(self, leases: Sequence[int]) -> None:
        """Gives leases back.

        Raises:
          PeerLostError: The peer is gone, and the leases with it.
        """
        with self._lock:
            self._frames.send(Release(list(leases)))

    def close(self) -> None:
        """Ends the connection, and with it every lease."""
        self.closed = True
        self._frames.stream.cut()

    def _check(self, about: About, identity: CacheIdentity, engine: TransferEngine) -> None:
        record = self.record
        if about.worker_id != record.worker_id:
            raise TransferError(f"at {record.address} serves {about.worker_id!r}, not {record.worker_id!r}")
        try:
            theirs = CacheIdentity.from_json(about.identity)
        except ConfigError as error:
            raise TransferError(f"{record.worker_id!r}: {error}") from error
        if theirs.fingerprint != identity.fingerprint:
            raise IdentityMismatchError(
                f"blocks of {record.worker_id!r} have the fingerprint {theirs.fingerprint.hex()}, this worker's "
                f"{identity.fingerprint.hex()}: {theirs.difference(identity)}"
            )
        if about.engine != engine.name:
            raise TransferError(
                f"{record.worker_id!r} moves blocks over {about.engine}, this worker over {engine.name}: both need one"
            )
