"""Which tier below the device holds what: non-exclusive least-recently-used victim tiers, bookkeeping only.

A block evicted above is offered below. A tier that holds it already makes it its most recent; otherwise it is inserted
as most recent, and where the tier was full its least recent is offered to the next tier in the same way. What the last
tier takes out is gone. A block brought back up stays where it was and becomes the most recent of its tier. A tier of
capacity 0 passes every offer on. The order of calls decides everything: no clocks, no threads, no bytes.

    G1 --evicted--> [ G2: most recent ... least recent ] --full--> [ G3: most recent ... least recent ] --full--> gone
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

from kvbm_jax.protocols import Tier

__all__ = ["Move", "Plan", "Transfer", "VictimTiers", "plan"]


class Move[K](NamedTuple):
    """What an offer does to one block."""

    key: K
    source: Tier  # the tier that gives it up
    target: Tier | None  # where it goes; None: nowhere, it is gone
    present: bool = False  # the target held it already


class VictimTiers[K: Hashable]:
    """Recency of the blocks in each tier below G1.

    Args:
      capacities: (tier, blocks) from the fastest down.
    """

    def __init__(self, capacities: Sequence[tuple[Tier, int]]) -> None:
        self._limits = dict(capacities)
        self._held: dict[Tier, OrderedDict[K, None]] = {tier: OrderedDict() for tier, _ in capacities}

    def locate(self, key: K) -> Tier | None:
        """Returns the fastest tier that holds a block."""
        return next((tier for tier, held in self._held.items() if key in held), None)

    def holds(self, key: K, tier: Tier) -> bool:
        """Returns whether one tier holds a block."""
        return key in self._held[tier]

    def touch(self, key: K, tier: Tier) -> None:
        """Makes a block that was hit the most recent of its tier."""
        self._held[tier].move_to_end(key)

    def offer(self, key: K, source: Tier = Tier.G1, *, down_to: Tier = Tier.G4) -> list[Move[K]]:
        """Offers a block that a tier gives up to the tiers below it.

        Args:
          key: the block.
          source: the tier that gives it up.
          down_to: the last tier that is asked; what that takes out is gone.

        Returns:
          What happens, first to this block, then to those that have to make way for it.
        """
        moves: list[Move[K]] = []
        for tier, capacity in self._limits.items():
            if not source < tier <= down_to or capacity == 0:
                continue
            held = self._held[tier]
            if key in held:
                held.move_to_end(key)
                moves.append(Move(key, source, tier, present=True))
                return moves
            moves.append(Move(key, source, tier))
            victim = held.popitem(last=False)[0] if len(held) >= capacity else None
            held[key] = None
            if victim is None:
                return moves
            key, source = victim, tier
        moves.append(Move(key, source, None))
        return moves

    def insert(self, key: K, tier: Tier) -> list[K]:
        """Makes a block the most recent of one tier, as a copy.

        Returns:
          The blocks that have to make way for it, and go nowhere.
        """
        held = self._held[tier]
        held[key] = None
        held.move_to_end(key)
        surplus = len(held) - self._limits[tier]
        return [held.popitem(last=False)[0] for _ in range(surplus)]

    def limit(self, tier: Tier, blocks: int) -> None:
        """Has a tier take no more than `blocks` from now on."""
        self._limits[tier] = min(blocks, self._limits[tier])

    def discard(self, key: K, tier: Tier) -> None:
        """Forgets a block that a tier turned out not to hold, or has lost."""
        self._held[tier].pop(key, None)

    def oldest_first(self, tier: Tier) -> Iterator[K]:
        """Yields the blocks of a tier, least recent first."""
        return iter(self._held[tier])

    def count(self, tier: Tier) -> int:
        """Returns how many blocks a tier holds."""
        return len(self._held[tier])


class Transfer[K](NamedTuple):
    """One block whose bytes must be written to a tier."""

    key: K
    origin: Tier  # where the bytes are
    target: Tier


class Plan[K](NamedTuple):
    """What a series of moves comes to, once blocks that only passed through a tier are left out."""

    transfers: list[Transfer[K]]  # to be read from their origins before anything is removed
    removed: list[tuple[K, Tier]]  # held below G1 before the moves, to be deleted there before anything is written
    dropped: list[K]  # blocks of the device that go nowhere: they are gone, or a lower tier has them already


def plan[K: Hashable](moves: Sequence[Move[K]]) -> Plan[K]:
    """Sums moves up, in their order."""
    arriving: dict[tuple[K, Tier], Tier] = {}  # (block, tier) -> where its bytes are
    removed: list[tuple[K, Tier]] = []
    dropped: list[K] = []
    for key, source, target, present in moves:
        origin = arriving.pop((key, source), source)
        if origin is source and source > Tier.G1:
            removed.append((key, source))
        if target is not None and not present:
            arriving[key, target] = origin
        elif origin is Tier.G1:
            dropped.append(key)
    return Plan([Transfer(key, origin, target) for (key, target), origin in arriving.items()], removed, dropped)
