"""Who has which blocks: discovery says who is there, events say what each holds, and no question leaves the process."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.events import PrefixIndex
from kvbm_jax.protocols import BlockKey, Discovery, Tier, WorkerRecord

__all__ = ["Offer", "PeerDirectory"]


class Offer(NamedTuple):
    """What one peer has of a prefix."""

    record: WorkerRecord
    blocks: int  # leading ones, unbroken, that it can serve


class PeerDirectory:
    """The peers of one worker.

    The index is fed by whoever subscribes to events (`PrefixIndex.apply`); this asks it, and takes out what has turned
    out to be wrong.

    Args:
      worker_id: this worker, which is no peer of its own.
      fingerprint: of its cache's identity: others' blocks are not asked for.
      discovery: who is there.
      index: what each holds.
      shut_out: says of a worker whether it is not to be asked, as `Quarantine.holds` does.
    """

    def __init__(
        self,
        worker_id: str,
        fingerprint: bytes,
        discovery: Discovery,
        index: PrefixIndex,
        *,
        shut_out: Callable[[str], bool] = lambda worker_id: False,
    ) -> None:
        self._worker_id = worker_id
        self._fingerprint = fingerprint
        self._discovery = discovery
        self._index = index
        self._shut_out = shut_out

    def offers(self, hashes: NDArray[np.uint32] | Sequence[bytes], *, group_idx: int = 0) -> list[Offer]:
        """Returns who can serve how much of a prompt from host memory, the most first.

        Args:
          hashes: of the prompt's blocks in order, `uint32[n, 4]`, or n times 16 bytes.
          group_idx: which group of a hybrid model.
        """
        workers = self._discovery.workers()
        offers: dict[str, Offer] = {}
        for holder, overlap in self._index.find_matches(hashes, group_idx=group_idx, tier=Tier.G2).items():
            record = workers.get(holder.worker_id)
            if (
                record is None
                or record.worker_id == self._worker_id
                or record.fingerprint != self._fingerprint
                or self._shut_out(record.worker_id)
            ):
                continue
            before = offers.get(record.worker_id)
            if before is None or overlap.blocks > before.blocks:
                offers[record.worker_id] = Offer(record, overlap.blocks)
        return sorted(offers.values(), key=lambda offer: (-offer.blocks, offer.record.worker_id))

    def lost(self, worker_id: str) -> None:
        """Forgets all that a worker is said to hold: it is gone. What it tells later counts again."""
        self._index.remove_worker(worker_id)

    def missed(self, worker_id: str, keys: Sequence[BlockKey]) -> None:
        """Forgets blocks that a worker turned out not to have in host memory."""
        self._index.forget(worker_id, Tier.G2, keys)
