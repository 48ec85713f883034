"""What an operator does to a running manager: pin, unpin, evict, reset; sequences that run never notice.

    evict    cached blocks leave the device, and are offered to the tiers below
    reset    cached blocks are forgotten, on the device, in a tier, or everywhere
    pin      cached blocks are held on the device until they are unpinned: no eviction and no reset takes them

Blocks that a sequence holds are left where they are by all of these. A pin is of a block's content, not of its number:
it outlives a `resize`, and ends when the device loses its cache.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvbm_jax.device_tier import DeviceTier
from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.protocols import BlockKey, BlockRecord, Tier

__all__ = ["PinReport", "Upkeep"]


class PinReport(NamedTuple):
    """What became of blocks that were to be pinned."""

    pinned: int  # the device keeps them now, those that were pinned before included
    absent: tuple[BlockKey, ...]  # the device does not hold these


class Upkeep:
    """Commands on a device and the tiers below it; see `BlockManager.command`, which gives them their turn.

    Args:
      device: what they act on.
    """

    def __init__(self, device: DeviceTier) -> None:
        self._device = device
        self._pool = device.pool
        self._pinned: dict[BlockKey, None] = {}

    @property
    def pinned(self) -> list[BlockKey]:
        """The pinned blocks, in the order in which they were pinned."""
        if self._pool is not self._device.pool:  # the cache was lost, and all holders with it
            self._pool, self._pinned = self._device.pool, {}
        return list(self._pinned)

    def require_none(self) -> None:
        """Raises `BlockStateError` if any block is pinned."""
        if count := len(self.pinned):
            raise BlockStateError(f"{count} blocks are pinned; unpin them first")

    def pin(self, keys: Sequence[BlockKey]) -> PinReport:
        """Has the device keep cached blocks until they are unpinned."""
        known = set(self.pinned)
        wanted = list(dict.fromkeys(keys))
        here = {key for key in wanted if self._device.residency.block_id(key) is not None}
        new = [key for key in wanted if key in here and key not in known]
        self._device.hold(new)
        self._pinned.update(dict.fromkeys(new))
        return PinReport(len(here), tuple(key for key in wanted if key not in here))

    def unpin(self, keys: Sequence[BlockKey] | None = None) -> int:
        """Lets go of pinned blocks, all with None; returns how many of these were pinned."""
        known = self.pinned
        leaving = known if keys is None else [key for key in dict.fromkeys(keys) if key in self._pinned]
        self._device.let_go(leaving)
        for key in leaving:
            del self._pinned[key]
        return len(leaving)

    def evict(self, blocks: Sequence[BlockKey] | int) -> int:
        """Has the device give up cached blocks that nobody holds, which are offered to the tiers below.

        Args:
          blocks: these, or the first so many in the order of eviction.

        Returns:
          How many there were.

        Raises:
          ConfigError: if the number is negative.
        """
        if isinstance(blocks, int) and blocks < 0:
            raise ConfigError(f"{blocks} blocks cannot be evicted; name 0 or more")
        return self._device.evict(blocks)

    def reset(self, what: Tier | Sequence[BlockKey] | None = None) -> dict[Tier, int]:
        """Has tiers forget blocks that nobody holds.

        Args:
          what: a tier, all of it; blocks, wherever they are; None for everything everywhere.

        Returns:
          How many blocks each tier had that lost any.

        Raises:
          ConfigError: if there is no such tier here.
        """
        residency = self._device.residency
        below = residency.counts()
        if isinstance(what, Tier):
            if what is not Tier.G1 and what not in below:
                here = ", ".join(tier.label for tier in (Tier.G1, *below))
                raise ConfigError(f"there is no tier {what.label} here; there are {here}")
            if what is Tier.G1:
                return _some({Tier.G1: self._device.forget(None)})
            residency.clear_tiers([what])
            return _some({what: below[what]})
        if what is None:
            return _some({Tier.G1: self._device.clear()} | below)
        keys = list(dict.fromkeys(what))
        lost = {tier: sum(tier in residency.tiers_below(key) for key in keys) for tier in below}
        lost[Tier.G1] = self._device.forget(keys)
        residency.discard(keys)
        return _some(lost)

    def records(self) -> Mapping[Tier, Sequence[tuple[int, BlockRecord]]]:
        """Returns what each tier holds, with its block ids."""
        return self._device.residency.records()


def _some(counts: Mapping[Tier, int]) -> dict[Tier, int]:
    return {tier: count for tier, count in sorted(counts.items()) if count}
