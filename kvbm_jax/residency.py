"""What the device holds: told to the world, and handed to the tiers below when it goes.

The pool knows block ids and hashes, the manager knows tokens. Here both come together as one record for each
registered block, kept while the device holds it, so that an evicted block can be offered below, a flush knows what
there is, and blocks of another size can be made out of it.
"""

import functools
from collections import OrderedDict
from collections.abc import Callable, Collection, Generator, Sequence

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.cache import KVCache
from kvbm_jax.events import EventPublisher
from kvbm_jax.hashing import block_keys
from kvbm_jax.interrupts import on_interrupt
from kvbm_jax.layout import ElementFormat
from kvbm_jax.offload.engine import FlushReport, Loaded, OffloadEngine, Resident, Wait
from kvbm_jax.outcomes import EvictedBlocks
from kvbm_jax.protocols import BlockKey, BlockRecord, MetricsSink, StoreStats, Tier

__all__ = ["Residency"]


class Residency:
    """Keeps the registered blocks of the device in step with events and tiers.

    Args:
      publisher: tells events.
      metrics: counts evictions.
      engine: the tiers below; None for none.
    """

    def __init__(self, publisher: EventPublisher, metrics: MetricsSink, engine: OffloadEngine | None) -> None:
        self._publisher = publisher
        self._metrics = metrics
        self._engine = engine
        self._residents: OrderedDict[BlockKey, Resident] = OrderedDict()  # the least recently released first

    @property
    def has_tiers(self) -> bool:
        """Whether there is any tier below."""
        return self._engine is not None

    @property
    def element_format(self) -> ElementFormat | None:
        """What blocks are in the tiers below; None where there is none."""
        return None if self._engine is None else self._engine.element_format

    @property
    def residents(self) -> list[Resident]:
        """What the device holds; with tiers below, the least recently released first."""
        return list(self._residents.values())

    def registered(self, blocks: Sequence[Resident]) -> None:
        """Blocks have become findable on the device."""
        self._residents.update((block.record.key, block) for block in blocks)
        if self._engine is None:
            self._publisher.created(Tier.G1, [block.block_id for block in blocks], [block.record for block in blocks])
        else:
            self._engine.registered(blocks)

    def moved(self, new_ids: NDArray[np.int32]) -> None:
        """Blocks i32[N] are called otherwise now: each that moved is told as gone here and as new there."""
        moved = [block for block in self._residents.values() if new_ids[block.block_id] != block.block_id]
        self._publisher.deleted(Tier.G1, [block.block_id for block in moved], [block.record.key for block in moved])
        renamed = [block._replace(block_id=int(new_ids[block.block_id])) for block in moved]
        if renamed:
            self.registered(renamed)

    def regrouped(self, blocks: Sequence[Resident], block_size: int) -> None:
        """The device holds blocks of another size now, these and no others."""
        self._residents.clear()
        self._publisher.cleared(Tier.G1)
        self._publisher.block_size = block_size
        self.registered(blocks)

    def released(self, hashes: NDArray[np.uint32]) -> None:
        """A sequence has let go of registered blocks u32[M, 4]; its last block is the first to go."""
        if self._engine is not None:
            self.let_go(block_keys(hashes))

    def let_go(self, keys: Sequence[BlockKey]) -> None:
        """Blocks have lost a holder, the last of them first."""
        if self._engine is not None:  # their order matters to a flush alone
            for key in reversed(keys):
                if key in self._residents:
                    self._residents.move_to_end(key)

    def evicted(self, cache: KVCache, evicted: EvictedBlocks) -> None:
        """The device has given up blocks; their contents are still in `cache`, and are offered below."""
        keys = self._count_evicted(evicted)
        gone = [self._residents.pop(key) for key in keys]
        if self._engine is None:
            self._publisher.deleted(Tier.G1, evicted.block_ids, keys)
        elif gone:
            self._engine.offload(cache, gone)

    def share(self, cache: KVCache, hashes: NDArray[np.uint32]) -> None:
        """Copies those of blocks u32[M, 4] that the device holds to host memory, for peers."""
        if self._engine is not None:
            keys = block_keys(hashes)
            self._engine.share(cache, [self._residents[key] for key in keys if key in self._residents])

    def forgotten(self, evicted: EvictedBlocks) -> None:
        """The device has been told to forget blocks; the tiers below are not offered them."""
        self._forget(evicted, self._publisher.deleted)

    def handed_over(self, evicted: EvictedBlocks, to_worker: str) -> None:
        """The device has given up blocks that another worker has now; host memory forgets them, too."""
        keys = self._forget(evicted, functools.partial(self._publisher.handed_over, to_worker=to_worker))
        self.discard(keys, [Tier.G2])

    def cleared(self, evicted: EvictedBlocks) -> None:
        """The device has been told to forget blocks; the tiers below forget all of theirs."""
        self.forgotten(evicted)
        self.clear_tiers(None)

    def clear_tiers(self, tiers: Collection[Tier] | None) -> None:
        """Empties tiers below; None for all of them."""
        if self._engine is not None:
            self._engine.clear(tiers)

    def discard(self, keys: Sequence[BlockKey], tiers: Collection[Tier] | None = None) -> None:
        """Takes blocks out of tiers below; None for all of them."""
        if self._engine is not None:
            self._engine.discard(keys, tiers)

    def settle(self) -> None:
        """Waits until what moves to host memory can be read there."""
        if self._engine is not None:
            self._engine.settle()

    def block_id(self, key: BlockKey) -> int | None:
        """Returns where on the device a block lies; None if it does not."""
        resident = self._residents.get(key)
        return None if resident is None else resident.block_id

    def tiers_below(self, key: BlockKey) -> list[Tier]:
        """Returns the tiers below that hold a block."""
        return [] if self._engine is None else self._engine.holding(key)

    def records(self) -> dict[Tier, list[tuple[int, BlockRecord]]]:
        """Returns what each tier holds, with its block ids; the device is the first."""
        device = [(block.block_id, block.record) for block in self._residents.values()]
        return {Tier.G1: device} | ({} if self._engine is None else self._engine.records())

    def lost(self) -> None:
        """The device holds nothing any more; why it does not may have left the tiers in the middle of something."""
        self._residents.clear()
        self._publisher.cleared(Tier.G1)
        if self._engine is not None:
            self._engine.reconcile()

    def locate(self, hashes: NDArray[np.uint32]) -> list[Tier]:
        """Returns where the longest prefix of u32[M, 4] would be read from, block by block; nothing is read."""
        return [] if self._engine is None else self._engine.locate(block_keys(hashes))

    def load(self, hashes: NDArray[np.uint32]) -> Loaded | None:
        """Reads the longest prefix of u32[M, 4] that the tiers below hold; None where there is nothing."""
        if self._engine is None or not len(hashes):
            return None
        with on_interrupt(self._engine.reconcile):
            loaded = self._engine.load(block_keys(hashes))
        return loaded if loaded.tiers else None

    def flush(self, cache: Callable[[], KVCache], seconds: float | None) -> Generator[Wait, bool | None, FlushReport]:
        """Copies what is registered to the lowest tier, in parts; see `OffloadEngine.flush`."""
        if self._engine is None:
            return FlushReport(0, 0, 0)
        parts = self._engine.flush(cache, self._residents, seconds)
        answer: bool | None = None
        while True:
            try:
                with on_interrupt(self._engine.reconcile):
                    wait = parts.send(answer)
            except StopIteration as end:
                report: FlushReport = end.value
                return report
            answer = yield wait

    def stats(self) -> dict[Tier, StoreStats]:
        """Returns sizes and counters of the tiers below."""
        return {} if self._engine is None else self._engine.stats()

    def counts(self) -> dict[Tier, int]:
        """Returns how many blocks each tier below has been decided to hold."""
        return {} if self._engine is None else self._engine.counts()

    def warm_up(self, cache: KVCache) -> None:
        """Compiles the programs of offloading."""
        if self._engine is not None:
            self._engine.warm_up(cache)

    def close(self, seconds: float | None) -> None:
        """Ends the tiers below; moves under way have `seconds`."""
        if self._engine is not None:
            self._engine.close(seconds)

    def _forget(
        self, evicted: EvictedBlocks, tell: Callable[[Tier, NDArray[np.int32], list[BlockKey]], None]
    ) -> list[BlockKey]:
        """Blocks are on the device no more, and offered to no tier; returns their keys."""
        keys = self._count_evicted(evicted)
        tell(Tier.G1, evicted.block_ids, keys)
        for key in keys:
            self._residents.pop(key, None)
        return keys

    def _count_evicted(self, evicted: EvictedBlocks) -> list[BlockKey]:
        if len(evicted.block_ids):
            self._metrics.count("kvbm_eviction_count_total", len(evicted.block_ids))
        return block_keys(evicted.hashes)
