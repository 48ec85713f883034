"""How sequences begin: their prefix is found on the device and in the tiers below, and the rest gets blocks.

In two halves. `prepare` looks for the prefix and reads what the tiers hold, which may take long and changes nothing on
the device; `admit` gives the sequence its blocks and brings into them what was read.
"""

import collections
import logging
from typing import NamedTuple

from kvbm_jax.agreement import Agreement
from kvbm_jax.device_tier import DeviceTier
from kvbm_jax.errors import BlockStateError, CacheLostError, SequenceTooLongError
from kvbm_jax.handles import Sequence
from kvbm_jax.offload.engine import Loaded
from kvbm_jax.progress import Progress
from kvbm_jax.protocols import Tier
from kvbm_jax.roster import Roster

__all__ = ["Admission", "Prepared"]

_LOG = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A sequence that can begin."""

    seq: Sequence
    row: int
    reusable: int  # blocks of its prompt that may be found
    loaded: Loaded | None  # what the tiers below hold of them, after what the device does


class Admission:
    """Begins sequences.

    Args:
      device: gives them blocks.
      roster: gives them rows.
      progress: registers what was brought up.
      agreement: decides how much of what was brought up is used.
    """

    def __init__(self, device: DeviceTier, roster: Roster, progress: Progress, agreement: Agreement) -> None:
        self._device = device
        self._roster = roster
        self._progress = progress
        self._agreement = agreement

    def prepare(self, seq: Sequence) -> Prepared:
        """Finds a row for a sequence, and what is cached of its prompt below the device. See `BlockManager.resume`."""
        count, size = len(seq.tokens), self._device.layout.block_size
        if not seq.released:
            raise BlockStateError(f"the sequence of row {seq.row} is running; release it before it is begun again")
        most = self._device.max_sequence_tokens
        if not 1 <= count <= most:
            raise SequenceTooLongError(
                f"a prompt of {count} tokens; between 1 and {most} fit a sequence ({self._device.pool.max_blocks} "
                f"blocks of {size}): shorten it, or raise num_blocks or max_sequence_tokens"
            )
        row, hashes = self._roster.free_row(), seq.hash_blocks(count // size)
        reusable = (count - 1) // size if seq.reuse else 0
        resident = self._device.pool.match(hashes[:reusable]) if reusable else 0
        loaded = None
        if resident < reusable and self._device.residency.has_tiers:
            # Read before blocks are allocated: what that evicts may push the hits out of the tier they are in.
            self._device.pool.require_room(-(-count // size) - resident, seq.tenant)
            loaded = self._device.residency.load(hashes[resident:reusable])
        return Prepared(seq, row, reusable, loaded)

    def admit(self, prepared: Prepared) -> None:
        """Gives a sequence its row and its blocks, and brings loaded ones into them."""
        seq = prepared.seq
        self._roster.enter(seq, prepared.row)
        try:
            seq.num_cached = self._device.start(seq.row, seq.hashes, prepared.reusable, len(seq.tokens), seq.tenant)
        except Exception:  # out of blocks, or what an event sink raises: the row is free again
            self._roster.leave(seq)
            raise
        seq.num_registered = seq.num_cached // self._device.layout.block_size
        seq.hits = {Tier.G1: seq.num_cached}
        if seq.num_registered < prepared.reusable and self._device.residency.has_tiers:
            self._onboard(seq, prepared.loaded)

    def _onboard(self, seq: Sequence, loaded: Loaded | None) -> None:
        """Brings loaded blocks into a sequence that has just started, after what it found on the device."""
        brought = () if loaded is None else self._bring_up(seq, loaded)
        used, size = self._agreement(brought), self._device.layout.block_size
        if used:
            seq.num_cached += used * size
            self._progress.register(seq, seq.num_cached)
            counts = collections.Counter(brought[:used])
            seq.hits = {**seq.hits, **{tier: blocks * size for tier, blocks in sorted(counts.items())}}

    def _bring_up(self, seq: Sequence, loaded: Loaded) -> tuple[Tier, ...]:
        """Writes loaded blocks to the device; returns where those were found that lie there now."""
        try:
            self._device.onboard(seq.row, seq.num_registered, len(loaded.tiers), loaded.rows)
        except CacheLostError:
            raise
        except Exception:  # noqa: BLE001 (no memory on the device, say: the blocks are computed instead)
            _LOG.exception("%d blocks could not be brought up", len(loaded.tiers))
            return ()
        return loaded.tiers
