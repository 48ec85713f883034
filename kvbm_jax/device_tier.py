"""G1: the pool, the cache tensors, and what the world and the tiers below know of them, changed together.

Whatever takes a block away does it in one order: the pool decides, the contents of the evicted are gathered for the
tiers below, and only then may a program write. The manager above knows tokens and sequences; here are rows and blocks.
"""

import functools
import logging
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

import jax
import numpy as np
from numpy.typing import NDArray

from kvbm_jax import grants, logs
from kvbm_jax.block_pool import BlockPool
from kvbm_jax.cache import KVCache, copy_blocks, regroup_tokens, resize_blocks, scrub_blocks
from kvbm_jax.device_cache import DeviceCache
from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.handles import Hasher
from kvbm_jax.handles import Sequence as RunningSequence
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload import staging
from kvbm_jax.offload.engine import FlushReport, Wait
from kvbm_jax.outcomes import EvictedBlocks, Stepped
from kvbm_jax.policies import EvictionPolicy, ScoreFunction
from kvbm_jax.protocols import BlockKey, Clock, MetricsSink, Tier
from kvbm_jax.reblock import ReblockPlan, Running, build_pool, plan_reblock
from kvbm_jax.residency import Residency
from kvbm_jax.resize_plan import Resized
from kvbm_jax.tenants import TenantQuotas

__all__ = ["DeviceTier"]

_LOG = logging.getLogger(__name__)


class DeviceTier:
    """Owns what lies on the device; its methods are called from one thread.

    Args:
      layout: of the cache.
      max_sequences: rows of the sequence batch.
      max_sequence_tokens: which a table has room for; None = the whole pool.
      eviction_policy: of the pool, see `BlockPool`.
      quotas: of tenants, see `BlockPool`.
      residency: where evictions and registrations are told.
      metrics: takes the device's gauges and the time of allocations.
      clock: for durations.

    Raises:
      ConfigError: if the device has no room, or there is no CPU device for the pool.
    """

    def __init__(
        self,
        layout: KVLayout,
        *,
        max_sequences: int,
        max_sequence_tokens: int | None,
        eviction_policy: str | EvictionPolicy | ScoreFunction,
        quotas: TenantQuotas | None,
        residency: Residency,
        metrics: MetricsSink,
        clock: Clock,
    ) -> None:
        self._max_sequences = max_sequences
        self._max_sequence_tokens = max_sequence_tokens
        self._eviction_policy = eviction_policy
        self._quotas = quotas
        self._metrics = metrics
        self._clock = clock
        self.residency = residency
        self.cache = DeviceCache(layout)
        self.pool = self._new_pool(layout)
        self.update_gauges()

    @property
    def layout(self) -> KVLayout:
        """Of the cache as it is now."""
        return self.cache.value.layout

    @property
    def max_sequence_tokens(self) -> int:
        """How many tokens a sequence may have."""
        slots = self.layout.num_slots
        return slots if self._max_sequence_tokens is None else min(self._max_sequence_tokens, slots)

    def warm_up(self) -> None:
        """Compiles the programs of this file and of the tiers below."""
        self.pool.warm_up()
        self.residency.warm_up(self.cache.value)
        if self.residency.has_tiers:
            self.cache.run(staging.warm_up, self.residency.element_format)

    def start(self, row: int, hashes: NDArray[np.uint32], num_hashes: int, num_tokens: int, tenant: str) -> int:
        """Gives a sequence its blocks; returns the tokens that were cached. See `BlockPool.start`."""
        begun = self._clock.monotonic_ns()
        started = self.pool.start(row, hashes, num_hashes, num_tokens, tenant)
        try:
            self._allocated(begun, started.evicted)
        except Exception:  # an event sink may raise anything: the caller does not learn that it has the blocks
            self.pool.release(row)
            raise
        return started.num_cached

    def onboard(self, row: int, first: int, count: int, rows: NDArray[np.uint8]) -> None:
        """Writes rows u8[M, P], as they were loaded, into `count` blocks of a sequence from index `first` on."""
        blocks = self.pool.table(row)[first : first + count]
        self.cache.run(staging.onboard, blocks, rows, self.residency.element_format)

    def extend(self, num_tokens: NDArray[np.int32], max_blocks: int) -> NDArray[np.int32]:
        """Makes room for the next tokens of each row, i32[B]; returns i32[B] status. See `BlockPool.extend`."""
        begun = self._clock.monotonic_ns()
        statuses, evicted = self.pool.extend(num_tokens, max_blocks)
        self._allocated(begun, evicted)
        return statuses

    def step(
        self,
        ending: dict[int, NDArray[np.uint32]],
        growing: dict[int, int],
        complete: list[tuple[int, int]],
        hashes: NDArray[np.uint32],
        max_blocks: int,
        priorities: list[int],
    ) -> Stepped:
        """Ends, extends and registers in one call; `ending` names the registered blocks of rows. See `BlockPool.step`.

        The caller tells the residency what has been registered.
        """
        begun = self._clock.monotonic_ns()
        stepped = self.pool.step(list(ending), growing, complete, hashes, max_blocks, priorities)
        for registered in ending.values():
            self.residency.released(registered)
        self._allocated(begun, stepped.evicted)
        return stepped

    def unshare(self, rows: list[int]) -> None:
        """Copies the tails of rows that are about to be written where others hold them too. See `BlockPool.unshare`."""
        begun = self._clock.monotonic_ns()
        copied = self.pool.unshare(rows)
        self._allocated(begun, copied.evicted)
        if np.any(copied.sources < self.layout.num_blocks):
            self.cache.run(_copy_blocks, copied.sources, copied.targets)

    def share(self, hashes: NDArray[np.uint32]) -> None:
        """Copies blocks u32[M, 4] that are registered here to host memory, for peers."""
        self.residency.share(self.cache.value, hashes)

    def reserve(self, growth: Mapping[int, int], max_blocks: int | None) -> grants.Grant:
        """Sets blocks aside for a compiled loop. See `BlockPool.reserve`."""
        begun = self._clock.monotonic_ns()
        grant, evicted = self.pool.reserve(growth, max_blocks)
        self._allocated(begun, evicted)
        return grant

    def allocate(self, count: int) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
        """Grants blocks that belong to no sequence: ids and generations. See `BlockPool.allocate`."""
        begun = self._clock.monotonic_ns()
        block_ids, generations, evicted = self.pool.allocate(count)
        self._allocated(begun, evicted)
        return block_ids, generations

    def release(self, row: int, registered: NDArray[np.uint32]) -> None:
        """Ends the sequence of a row, whose registered blocks have the hashes u32[M, 4]."""
        self.pool.release(row)
        self.residency.released(registered)
        self.update_gauges()

    def scrub(self, block_ids: NDArray[np.int32]) -> None:
        """Zeroes blocks i32[n]."""
        num_blocks = self.layout.num_blocks
        padded = np.full((num_blocks,), num_blocks, np.int32)
        padded[: len(block_ids)] = block_ids
        self.cache.run(_scrub_blocks, padded)

    def evict(self, keys: Sequence[BlockKey] | int) -> int:
        """Gives up cached blocks that nobody holds: these, or the first so many in the order of eviction.

        They are offered to the tiers below. Returns how many there were.
        """
        evicted = self.pool.evict(keys) if isinstance(keys, int) else self.pool.evict_named(self._block_ids(keys))
        self.residency.evicted(self.cache.value, evicted)
        self.update_gauges()
        return len(evicted.block_ids)

    def forget(self, keys: Sequence[BlockKey] | None) -> int:
        """Gives up cached blocks that nobody holds, all with None, and offers them to nobody; returns how many."""
        evicted = self.pool.evict() if keys is None else self.pool.evict_named(self._block_ids(keys))
        self.residency.forgotten(evicted)
        self.update_gauges()
        return len(evicted.block_ids)

    def hand_over(self, keys: Sequence[BlockKey], to_worker: str) -> int:
        """Gives up those of cached blocks that nobody holds, for another worker has them; returns how many."""
        evicted = self.pool.evict_named(self._block_ids(keys))
        self.residency.handed_over(evicted, to_worker)
        self.update_gauges()
        return len(evicted.block_ids)

    def hold(self, keys: Sequence[BlockKey]) -> None:
        """Adds a holder to cached blocks, which must be here."""
        self.pool.acquire(self._block_ids(keys))
        self.update_gauges()

    def let_go(self, keys: Sequence[BlockKey]) -> None:
        """Takes a holder from cached blocks."""
        self.pool.let_go(self._block_ids(keys))
        self.residency.let_go(keys)
        self.update_gauges()

    def clear(self) -> int:
        """Forgets what is cached, here and in the tiers below; returns how many blocks were cached here."""
        evicted = self.pool.evict()
        self.residency.cleared(evicted)
        self.update_gauges()
        return len(evicted.block_ids)

    def renew(self) -> None:
        """Begins again with an empty pool, and with a new cache if that is lost; the tiers below keep theirs."""
        self.cache.renew()
        self.pool = self._new_pool(self.layout)
        self.residency.lost()
        self.update_gauges()

    def resize(self, num_blocks: int) -> Resized:
        """Grows or shrinks pool and cache. See `BlockManager.resize`."""
        old = self.cache.value
        width = max(self._max_blocks(replace(old.layout, num_blocks=num_blocks)), self.pool.longest)
        plan = self.pool.plan_resize(num_blocks, width)
        self.cache.value = self.cache.remade(_resize_blocks, plan.sources)
        self.pool.carry_out(plan)
        self.residency.evicted(old, plan.evicted)
        self.residency.moved(plan.new_ids)
        self.update_gauges()
        return plan

    def reblock(self, running: list[RunningSequence], hasher: Hasher) -> ReblockPlan:
        """Cuts pool and cache into blocks of another size. See `BlockManager.reblock`."""
        if self.residency.has_tiers:
            raise ConfigError(
                "the tiers below hold blocks of one size; close the manager, and open one with the other block_size on "
                "an offload_path of its own, or without tiers"
            )
        here = [Running(seq, self.pool.table(seq.row), self.pool.length(seq.row)) for seq in running]
        stray = self.pool.stats().held - len({int(block) for one in here for block in one.table})
        if stray:
            raise BlockStateError(f"{stray} blocks are held outside sequences; free them first")
        plan = plan_reblock(
            self.layout,
            hasher,
            residents=self.residency.residents,
            inactive=self.pool.inactive_blocks(),
            running=here,
        )
        made = self.cache.remade(_regroup_tokens, plan.slots)
        pool = self._new_pool(made.layout, longest=max(map(len, plan.tables.values()), default=0))
        pool.install(*build_pool(plan, pool.sequences))
        # A new block belongs to whom its first token's block did.
        pool.inherit(self.pool.account, plan.slots[:, 0] // self.layout.block_size)
        self.cache.value, self.pool = made, pool
        self.residency.regrouped(plan.residents, hasher.block_size)
        self.update_gauges()
        return plan

    def flush(self, seconds: float | None) -> Generator[Wait, bool | None, FlushReport]:
        """Copies what is cached to the lowest tier, in parts. See `OffloadEngine.flush`."""
        return self.residency.flush(lambda: self.cache.value, seconds)

    def update_gauges(self) -> None:
        """Tells the metrics how many blocks are in use."""
        counts = self.pool.stats()
        self._metrics.gauge("kvbm_blocks_allocated", counts.held, tier=Tier.G1.label)
        self._metrics.gauge("kvbm_blocks_free", counts.reset + counts.inactive, tier=Tier.G1.label)
        for tenant, blocks in self.pool.tenant_blocks().items():
            self._metrics.gauge("kvbm_tenant_blocks_held", blocks.held, tenant=tenant)
            self._metrics.gauge("kvbm_tenant_blocks_resident", blocks.resident, tenant=tenant)

    def _block_ids(self, keys: Sequence[BlockKey]) -> NDArray[np.int32]:
        """Where blocks lie, i32[n]; those that are not here are left out."""
        found = (self.residency.block_id(key) for key in keys)
        return np.array([block for block in found if block is not None], np.int32)

    def _max_blocks(self, layout: KVLayout) -> int:
        """Blocks of a table."""
        tokens = layout.num_slots if self._max_sequence_tokens is None else self._max_sequence_tokens
        return min(-(-tokens // layout.block_size), layout.num_blocks)

    def _new_pool(self, layout: KVLayout, longest: int = 0) -> BlockPool:
        return BlockPool(
            num_blocks=layout.num_blocks,
            block_size=layout.block_size,
            max_sequences=self._max_sequences,
            max_blocks=max(self._max_blocks(layout), longest),
            eviction_policy=self._eviction_policy,
            quotas=self._quotas,
        )

    def _allocated(self, begun: int, evicted: EvictedBlocks) -> None:
        """Hands over what an allocation has evicted, before anything is written."""
        seconds = (self._clock.monotonic_ns() - begun) / 1e9
        self._metrics.observe("kvbm_allocation_latency_seconds", seconds)
        if _LOG.isEnabledFor(logging.DEBUG):
            _LOG.debug("blocks allocated", extra=logs.fields(seconds=seconds, evicted=evicted.block_ids.tolist()))
        self.residency.evicted(self.cache.value, evicted)
        self.update_gauges()


@functools.partial(jax.jit, donate_argnums=0)
def _scrub_blocks(cache: KVCache, block_ids: jax.Array) -> tuple[KVCache, None]:
    """Zeroes blocks i32[N], padded with N; donates the cache."""
    return scrub_blocks(cache, block_ids), None


@functools.partial(jax.jit, donate_argnums=0)
def _copy_blocks(cache: KVCache, sources: jax.Array, targets: jax.Array) -> tuple[KVCache, None]:
    """Copies blocks i32[B], padded with N, to fresh ones; donates the cache."""
    return copy_blocks(cache, sources, targets, disjoint=True), None


_resize_blocks = jax.jit(resize_blocks)
_regroup_tokens = jax.jit(regroup_tokens)
