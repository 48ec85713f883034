"""What the world is told of moves between tiers, in an order that a consumer can apply blindly.

A block that moves down leaves its tier at once, and is announced only when the lower copy can be read. In between it
may have come back: computed anew, or brought up again. Its old tier's claim is then a new one, which the late
announcement must not take away. So departures are noted here, and a departure that was overtaken is told as a copy.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from kvbm_jax.events import EventPublisher
from kvbm_jax.protocols import BlockKey, BlockRecord, Tier

__all__ = ["Arrival", "TierAnnouncer"]


class Arrival(NamedTuple):
    """A block that a tier can be read from now."""

    record: BlockRecord
    block_id: int


class _Departure:
    """A claim on its way down; compared by identity, for a block may leave a tier twice."""

    __slots__ = ("block_id",)

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id


type Departures = dict[BlockKey, _Departure]


class TierAnnouncer:
    """Tells the moves of one worker; its methods may be called from any thread.

    Args:
      publisher: numbers and carries the events.
    """

    def __init__(self, publisher: EventPublisher) -> None:
        self._publisher = publisher
        self._leaving: dict[tuple[BlockKey, Tier], _Departure] = {}
        self._lock = threading.RLock()

    def created(self, tier: Tier, arrivals: Sequence[Arrival]) -> None:
        """Says that a tier holds blocks; their departures from it, if any, are overtaken."""
        with self._lock:
            for arrival in arrivals:
                self._leaving.pop((arrival.record.key, tier), None)
            self._publisher.created(tier, [a.block_id for a in arrivals], [a.record for a in arrivals])

    def deleted(self, tier: Tier, blocks: Mapping[BlockKey, int]) -> None:
        """Says that a tier holds blocks, by key with their ids, no more."""
        with self._lock:
            self._publisher.deleted(tier, list(blocks.values()), list(blocks))

    def leave(self, tier: Tier, blocks: Mapping[BlockKey, int]) -> Departures:
        """Notes that blocks have left a tier; `arrive` or `fail` follows."""
        with self._lock:
            departures = {key: _Departure(block_id) for key, block_id in blocks.items()}
            self._leaving |= {(key, tier): departure for key, departure in departures.items()}
            return departures

    def arrive(self, origin: Tier, target: Tier, arrivals: Sequence[Arrival], departures: Departures) -> None:
        """Says that blocks are in `target` now: moved where they still are leaving `origin`, copied otherwise."""
        with self._lock:
            left = self._end(origin, [arrival.record.key for arrival in arrivals], departures)
            moved = [arrival for arrival in arrivals if arrival.record.key in left]
            for arrival in moved:
                self._leaving.pop((arrival.record.key, target), None)
            self._publisher.migrated(
                target,
                [arrival.block_id for arrival in moved],
                [arrival.record for arrival in moved],
                from_tier=origin,
                from_block_ids=[left[arrival.record.key] for arrival in moved],
            )
            self.created(target, [arrival for arrival in arrivals if arrival.record.key not in left])

    def fail(self, origin: Tier, keys: Sequence[BlockKey], departures: Departures) -> None:
        """Says that blocks which were leaving `origin` have arrived nowhere."""
        with self._lock:
            self.deleted(origin, self._end(origin, keys, departures))

    def _end(self, origin: Tier, keys: Sequence[BlockKey], departures: Departures) -> dict[BlockKey, int]:
        """Ends departures; returns those that nothing has overtaken, with their block ids."""
        left = {}
        for key in keys:
            departure = departures.get(key)
            if departure is not None and self._leaving.get((key, origin)) is departure:
                del self._leaving[key, origin]
                left[key] = departure.block_id
        return left
