"""The tiers below the device: decisions on the caller's thread, bytes in the background.

The tiers are victim tiers (`victims`): what the device evicts is offered to the host, what the host takes out to the
disk. Which tier holds what is decided at once and in the order of calls, so that a run finds exactly what a replay of
the same requests finds. The bytes follow on one worker (`mover`), in the same order.

    evicted --gather--> staging --worker--> G2 store --worker--> G3 store
                                               |                    |
    cache <--scatter-- verified rows <---------+--------------------+

A decode step never waits: when a slow disk has too much in flight, what would go there is dropped and counted, and the
host tier goes on; when even that is too much, what is evicted is dropped. Stores verify what they read; a block that
cannot be had is a miss, is counted, and is forgotten.

Axes: n blocks of a call, P bytes of a block.
"""

import collections
import functools
import logging
import sys
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvbm_jax import logs
from kvbm_jax.cache import KVCache
from kvbm_jax.errors import ConfigError
from kvbm_jax.events import EventPublisher
from kvbm_jax.hashing import Multimodal
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload.announcer import Arrival, TierAnnouncer
from kvbm_jax.offload.buffer_pool import BufferPool
from kvbm_jax.offload.calls import attempt, rows_of
from kvbm_jax.offload.edges import EdgeMetrics
from kvbm_jax.offload.mover import Job, JobResult, Mover, Staged
from kvbm_jax.offload.staging import StagingRing, rows_for
from kvbm_jax.offload.victims import Plan, Transfer, VictimTiers, plan
from kvbm_jax.protocols import (
    BlockKey,
    BlockRecord,
    BlockStore,
    Clock,
    MetricsSink,
    OffloadPolicy,
    Outcome,
    PeerBlocks,
    StoreRow,
    StoreStats,
    Tier,
)

__all__ = ["FlushReport", "Loaded", "OffloadEngine", "Resident", "Wait"]

_LOG = logging.getLogger(__name__)
_FLUSH_BLOCKS = 64
_MAX_BYTES_IN_FLIGHT = 1 << 30
_SHARE_OF_SLOW_TIERS = 0.75  # of these: the rest is for the way to host memory


class Resident(NamedTuple):
    """A registered block on the device, and what is known about it."""

    block_id: int
    record: BlockRecord
    salt: str = ""
    multimodal: Multimodal = ()  # (offset in the block, hash of the input that stands there)


class Loaded(NamedTuple):
    """Blocks brought up from the tiers, verified."""

    rows: NDArray[np.uint8]  # [M, P]: the first n, and room that pads them for `staging.onboard`
    tiers: tuple[Tier, ...]  # [n]: where each was found


class FlushReport(NamedTuple):
    """What a flush did by its deadline, in blocks."""

    written: int  # the lowest tier has them now, and had not before
    failed: int
    pending: int  # not there yet


type Wait = Callable[[], bool]
"""Waits for something under way; returns whether it came in time."""


class OffloadEngine:
    """Owns the stores below the device. Its methods are called from one thread, that of the manager.

    Args:
      layout: of the cache, in the element format of the tiers.
      stores: G2, one slower store, or both; what they hold already is taken over.
      identity: what the cache's bytes mean, which a store that has an identity must share.
      publisher: tells events.
      metrics: counts what crosses each edge.
      clock: for durations.
      policy: which evicted blocks the tiers are offered; None for all.
      peers: blocks of other workers, closed with this; None for none.
      max_bytes_in_flight: bound of the memory that moves may hold.

    Raises:
      ConfigError: if the stores are not such, or do not fit the cache.
    """

    def __init__(
        self,
        layout: KVLayout,
        stores: Sequence[BlockStore],
        *,
        identity: CacheIdentity,
        publisher: EventPublisher,
        metrics: MetricsSink,
        clock: Clock,
        policy: OffloadPolicy | None = None,
        peers: PeerBlocks | None = None,
        max_bytes_in_flight: int = _MAX_BYTES_IN_FLIGHT,
    ) -> None:
        _check_stores(stores, layout, identity)
        self._stores = {store.tier: store for store in stores}
        self._capacities = {store.tier: _capacity(store) for store in stores}
        self._tiers = VictimTiers[BlockKey](list(self._capacities.items()))
        roomy = [tier for tier, blocks in self._capacities.items() if blocks] or [Tier.G2]
        self._top, self._lowest = min(roomy), max(roomy)
        self.element_format = layout.element_format
        self._block_bytes = layout.block_bytes
        self._max_bytes = max_bytes_in_flight
        self._metrics = metrics
        self._clock = clock
        self._policy = policy
        self._peers = peers
        self._ring = StagingRing(layout)
        self._buffers = BufferPool()
        self._announcer = TierAnnouncer(publisher)
        self._edges = EdgeMetrics(metrics, clock, layout.block_bytes)
        self._mover = Mover(
            stores,
            block_bytes=layout.block_bytes,
            ring=self._ring,
            buffers=self._buffers,
            announcer=self._announcer,
            edges=self._edges,
            metrics=metrics,
        )
        for store in stores:
            self._adopt(store)
        self._update_gauges()

    def warm_up(self, cache: KVCache) -> None:
        """Compiles the programs of offloading."""
        self._ring.warm_up(cache)

    def registered(self, blocks: Sequence[Resident]) -> None:
        """Tells that the device holds blocks."""
        self._announcer.created(Tier.G1, [Arrival(block.record, block.block_id) for block in blocks])

    def offload(self, cache: KVCache, evicted: Sequence[Resident]) -> None:
        """Offers blocks that the device has just evicted, in order of eviction, to the tiers below.

        The gather of their contents is dispatched before this returns: whatever the caller runs next may overwrite
        them.
        """
        self._forget_lost()
        evicted = self._select(evicted)
        new = sum(self._tiers.locate(block.record.key) is not self._top for block in evicted)
        staged, in_flight = self._ring.bytes_for(new), self._mover.bytes_in_flight
        needed = staged + new * self._block_bytes  # each may push another one down
        on_device = {block.record.key: block for block in evicted}
        if not in_flight or in_flight + needed <= self._max_bytes * _SHARE_OF_SLOW_TIERS:
            decided = plan([move for key in on_device for move in self._tiers.offer(key)])
        elif self._top is not self._lowest and in_flight + staged <= self._max_bytes:
            moves = [move for key in on_device for move in self._tiers.offer(key, down_to=self._top)]
            decided = plan(moves)
            self._count_dropped(sum(move.target is None for move in moves))
        else:
            decided = Plan([], [], list(on_device))
            self._count_dropped(len(evicted))
        self._announcer.deleted(Tier.G1, {key: on_device[key].block_id for key in decided.dropped})
        if decided.transfers or decided.removed:
            self._submit(cache, decided.transfers, decided.removed, on_device, is_copy=False)
        self._update_gauges()

    def share(self, cache: KVCache, blocks: Sequence[Resident]) -> None:
        """Copies blocks of the device to host memory, where peers can read them; the device keeps them.

        Returns at once; an event tells of each block that can be read. Blocks that would take the memory in flight
        beyond its bound are left out, and counted.
        """
        self._forget_lost()
        room = max(self._max_bytes - self._mover.bytes_in_flight, 0) // (2 * self._block_bytes)
        self._count_dropped(max(len(blocks) - room, 0))
        on_device = {block.record.key: block for block in blocks[:room]}
        if on_device and Tier.G2 in self._stores:
            self._copy_down(cache, dict.fromkeys(on_device, Tier.G1), on_device, Tier.G2)
            self._update_gauges()

    def locate(self, keys: Sequence[BlockKey]) -> list[Tier]:
        """Returns where `load` would read the longest prefix of `keys` from, block by block."""
        self._forget_lost()
        tiers = self._located(keys)
        return tiers + [Tier.G4] * self._offered(keys[len(tiers) :])

    def load(self, keys: Sequence[BlockKey]) -> Loaded:
        """Reads the longest prefix of `keys` that the tiers hold, and after it what peers do.

        Blocks of the tiers become the most recent ones there; those of peers are brought into none. Waits for the
        bytes. A block that turns out to be missing or corrupt ends the prefix, and is forgotten.
        """
        self._forget_lost()
        tiers = self._located(keys)
        for key, tier in zip(keys, tiers, strict=False):
            self._tiers.touch(key, tier)
        local = len(tiers)
        offered = self._offered(keys[local:])
        rows = self._buffers.lend(rows_for(local + offered, self._block_bytes), self._block_bytes)
        if tiers:
            self._mover.settle()
        found = self._read(list(keys[:local]), tiers, rows)
        if len(found) < local:
            self._update_gauges()
        elif self._peers and offered:
            wanted = slice(local, local + offered)
            found = [*found, *[Tier.G4] * self._peers.read(keys[wanted], rows[wanted])]
        return Loaded(rows, tuple(found))

    def flush(
        self, cache: Callable[[], KVCache], residents: Mapping[BlockKey, Resident], seconds: float | None
    ) -> Generator[Wait, bool | None, FlushReport]:
        """Copies what the device and the tiers hold to the lowest tier, without taking it from where it is.

        In parts, between which other methods may be called: a generator of waits, each to be called, from any thread,
        and its answer sent. What is gone when its part comes is left out.

        Args:
          cache: returns the cache as it is now.
          residents: registered blocks on the device, the least valuable first; the mapping itself, which may change.
          seconds: how long to wait; None for as long as it takes. What is under way then goes on.

        Returns:
          What was done; all zeros if there is no tier below host memory.
        """
        if self._lowest is Tier.G2:
            return FlushReport(0, 0, 0)
        deadline = _Deadline(self._clock, seconds)
        keys = dict.fromkeys(
            key for tier in reversed(self._stores) if tier is not self._lowest for key in self._tiers.oldest_first(tier)
        )
        for key in residents:
            keys.pop(key, None)  # to be named last, as the most recent
            keys[key] = None
        wanted = list(keys)[-self._capacities[self._lowest] :]
        jobs: list[Job] = []
        step = max(min(_FLUSH_BLOCKS, self._max_bytes // (4 * self._block_bytes)), 1)
        for first in range(0, len(wanted), step):
            if not (yield functools.partial(self._mover.wait_below, max(self._max_bytes // 2, 1), deadline.left())):
                break
            self._forget_lost()
            part = {
                key: Tier.G1 if key in residents else self._tiers.locate(key) for key in wanted[first : first + step]
            }
            origins = {key: origin for key, origin in part.items() if origin is not None}
            jobs.append(self._copy_down(cache(), origins, residents, self._lowest))
        yield functools.partial(self._mover.wait_idle, deadline.left())
        self._forget_lost()
        self._update_gauges()
        results = [job.done.result() if job.done.done() else JobResult() for job in jobs]
        pending = sum(len(job.transfers) for job in jobs if not job.done.done())
        pending += sum(not self._tiers.holds(key, self._lowest) for key in wanted[len(jobs) * step :])
        return FlushReport(sum(r.written for r in results), sum(r.failed for r in results), pending)

    def stats(self) -> dict[Tier, StoreStats]:
        """Returns sizes and counters by tier."""
        return {tier: store.stats() for tier, store in self._stores.items()}

    def counts(self) -> dict[Tier, int]:
        """Returns how many blocks each tier has been decided to hold; stores follow on their own threads."""
        return {tier: self._tiers.count(tier) for tier in self._stores}

    def holding(self, key: BlockKey) -> list[Tier]:
        """Returns the tiers that hold a block."""
        return [tier for tier in self._stores if self._tiers.holds(key, tier)]

    def records(self) -> dict[Tier, list[tuple[int, BlockRecord]]]:
        """Returns what the stores hold, with its block ids."""
        return {tier: list(store.records()) for tier, store in self._stores.items()}

    @property
    def peers(self) -> PeerBlocks | None:
        """Blocks of other workers."""
        return self._peers

    def settle(self) -> None:
        """Waits until what moves to host memory can be read there; may be called beside everything else."""
        self._mover.settle()

    def discard(self, keys: Sequence[BlockKey], tiers: Collection[Tier] | None = None) -> None:
        """Takes blocks out of tiers below the device; None for all of them."""
        for tier in self._stores if tiers is None else self._stores.keys() & tiers:
            held = [key for key in keys if self._tiers.holds(key, tier)]
            for key in held:
                self._tiers.discard(key, tier)
            self._mover.forget(tier, dict.fromkeys(held))
        self._update_gauges()

    def clear(self, tiers: Collection[Tier] | None = None) -> None:
        """Empties tiers below the device; None for all of them."""
        for tier, store in self._stores.items():
            if tiers is not None and tier not in tiers:
                continue
            keys = dict.fromkeys(self._tiers.oldest_first(tier))
            for key in keys:
                self._tiers.discard(key, tier)
            # Also what a store holds without the policy knowing.
            self._mover.forget(tier, dict.fromkeys([*keys, *(record.key for _, record in store.records())]))
        self._update_gauges()

    def reconcile(self) -> None:
        """Makes policy and stores agree again, after an interrupt between a decision and its moves."""
        self._mover.settle()
        self._forget_lost()
        for tier, store in self._stores.items():
            known = set(self._tiers.oldest_first(tier))
            pending = self._mover.pending_keys(tier)  # asked first: what ends meanwhile is held then
            held = {record.key for _, record in store.records()}
            for key in known - held - pending:
                self._tiers.discard(key, tier)
            self._mover.forget(tier, dict.fromkeys(held - known))
        self._update_gauges()

    def close(self, seconds: float | None) -> None:
        """Parts from peers, lets moves under way end, `seconds` at most, and closes the stores."""
        if self._peers is not None:
            self._peers.close()
        self._mover.close(seconds)

    def _adopt(self, store: BlockStore) -> None:
        """Takes over what a store holds, the oldest first."""
        held = {record.key: Arrival(record, block_id) for block_id, record in store.records()}
        surplus = [gone for key in held for gone in self._tiers.insert(key, store.tier)]
        self._mover.forget(store.tier, dict.fromkeys(surplus))
        self._announcer.created(store.tier, [held[key] for key in self._tiers.oldest_first(store.tier)])

    def _located(self, keys: Sequence[BlockKey]) -> list[Tier]:
        """Where the tiers hold the longest prefix of `keys`."""
        tiers: list[Tier] = []
        for key in keys:
            tier = self._tiers.locate(key)
            if tier is None:
                break
            tiers.append(tier)
        return tiers

    def _offered(self, keys: Sequence[BlockKey]) -> int:
        return 0 if self._peers is None or not keys else self._peers.offered(keys)

    def _copy_down(
        self,
        cache: KVCache,
        origins: Mapping[BlockKey, Tier],
        on_device: Mapping[BlockKey, Resident],
        target: Tier,
    ) -> Job:
        """Has blocks copied to a tier where it lacks them."""
        arriving: dict[BlockKey, Tier] = {}  # where their bytes are
        removed: list[tuple[BlockKey, Tier]] = []
        for key, origin in origins.items():
            if not self._tiers.holds(key, target):
                arriving[key] = origin
            surplus = self._tiers.insert(key, target)
            removed += [(gone, target) for gone in surplus if arriving.pop(gone, None) is None]
        transfers = [Transfer(key, origin, target) for key, origin in arriving.items()]
        return self._submit(cache, transfers, removed, on_device, is_copy=True)

    def _submit(
        self,
        cache: KVCache,
        transfers: Sequence[Transfer[BlockKey]],
        removed: Sequence[tuple[BlockKey, Tier]],
        on_device: Mapping[BlockKey, Resident],
        *,
        is_copy: bool,
    ) -> Job:
        """Stages what comes from the device and hands the rest to the mover."""
        going = [on_device[transfer.key] for transfer in transfers if transfer.origin is Tier.G1]
        try:
            arrays = self._ring.gather(cache, np.array([block.block_id for block in going], np.int32))
        except Exception:  # noqa: BLE001 (no memory on the device, say: the mover finds the bytes missing)
            _LOG.exception("%d blocks could not be gathered", len(going))
            arrays = []
        staged, first = [], 0
        for array in arrays:
            part = going[first : first + array.shape[0]]
            staged.append(Staged(array, [block.record for block in part]))
            first += len(part)
        job = Job(
            transfers,
            removed,
            staged,
            {} if is_copy else self._announcer.leave(Tier.G1, {block.record.key: block.block_id for block in going}),
            is_copy,
            staged_bytes=self._ring.bytes_for(len(going)),
            fetched_bytes=(len(transfers) - len(going)) * self._block_bytes,
        )
        self._mover.submit(job)
        return job

    def _read(self, keys: Sequence[BlockKey], tiers: Sequence[Tier], rows: NDArray[np.uint8]) -> list[Tier]:
        """Reads n blocks into the first rows of u8[M, P].

        Returns:
          Where each was found, up to the first that could not be had.
        """
        begun = self._edges.begin()
        found: dict[int, Tier] = {}
        runs: list[tuple[Tier, list[int]]] = []
        for i, (key, tier) in enumerate(zip(keys, tiers, strict=True)):
            pending = self._mover.pending(key, tier)
            if pending is not None:
                rows[i] = pending
                found[i] = tier
            elif runs and runs[-1][0] is tier and runs[-1][1][-1] == i - 1:
                runs[-1][1].append(i)
            else:
                runs.append((tier, [i]))
        futures = [
            attempt(functools.partial(self._stores[tier].get, [keys[i] for i in run], rows[run[0] : run[-1] + 1]))
            for tier, run in runs
        ]
        for (tier, run), future in zip(runs, futures, strict=True):
            results = dict(zip(run, rows_of(future, len(run)), strict=True))
            found |= {i: tier for i, row in results.items() if row.outcome is Outcome.OK}
            self._miss(tier, {keys[i]: row for i, row in results.items() if row.outcome is not Outcome.OK})
        for tier, count in collections.Counter(found.values()).items():
            self._edges.transferred(tier, Tier.G1, count, begun)
        for i, key in enumerate(keys):
            lower = self._tiers.locate(key) if i not in found else None
            if lower is not None and self._read([key], [lower], rows[i : i + 1]):
                found[i] = lower
            if i not in found:
                return [found[j] for j in range(i)]
        return [found[i] for i in range(len(keys))]

    def _miss(self, tier: Tier, rows: Mapping[BlockKey, StoreRow]) -> None:
        """Counts blocks that could not be read, and forgets them."""
        self._edges.failed(tier, Tier.G1, [(key, row.outcome.value) for key, row in rows.items()])
        for key in rows:
            self._tiers.discard(key, tier)
        self._mover.forget(tier, {key: row.block_id or 0 for key, row in rows.items()})

    def _select(self, evicted: Sequence[Resident]) -> Sequence[Resident]:
        """Returns the blocks that the policy has offered below; the others are told as gone."""
        if self._policy is None or not evicted:
            return evicted
        try:
            chosen = [bool(choice) for choice in self._policy.select([block.record for block in evicted])]
            pairs = list(zip(evicted, chosen, strict=True))
        except Exception:  # noqa: BLE001 (a policy of the user's may raise anything; without its word all are offered)
            _LOG.exception("the offload policy failed on %d blocks", len(evicted))
            return evicted
        self._announcer.deleted(Tier.G1, {block.record.key: block.block_id for block, choice in pairs if not choice})
        return [block for block, choice in pairs if choice]

    def _count_dropped(self, blocks: int) -> None:
        """Counts evicted blocks that go nowhere because too much is under way."""
        self._metrics.count("kvbm_offload_dropped_blocks_total", blocks)
        if blocks:
            in_flight = self._mover.bytes_in_flight
            _LOG.warning(
                "evicted blocks are lost to backpressure", extra=logs.fields(blocks=blocks, in_flight=in_flight)
            )

    def _forget_lost(self) -> None:
        """Takes account of blocks that the mover found missing, or could not put."""
        lost = self._mover.take_lost()
        for tier in self._stores:
            here = [one for one in lost if one.tier is tier]
            for one in here:
                self._tiers.discard(one.key, tier)
            # They may have been put again meanwhile: policy and store must agree.
            self._mover.forget(tier, {one.key: one.block_id for one in here})
            if any(one.refused for one in here):
                # The store holds less than it said. What it has now is what it can hold.
                self._tiers.limit(tier, self._tiers.count(tier))
                _LOG.warning("tier %s has room for %d blocks only", tier.label, self._tiers.count(tier))

    def _update_gauges(self) -> None:
        for tier, capacity in self._capacities.items():
            held = self._tiers.count(tier)
            self._metrics.gauge("kvbm_blocks_allocated", held, tier=tier.label)
            if capacity < sys.maxsize:
                self._metrics.gauge("kvbm_blocks_free", capacity - held, tier=tier.label)


class _Deadline:
    """A point in time, or none."""

    def __init__(self, clock: Clock, seconds: float | None) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock.monotonic_ns() + seconds * 1e9

    def left(self) -> float | None:
        """Returns the seconds until then, at least 0; None for no end."""
        return None if self._end is None else max(self._end - self._clock.monotonic_ns(), 0) / 1e9


def _check_stores(stores: Sequence[BlockStore], layout: KVLayout, identity: CacheIdentity) -> None:
    """Raises `ConfigError` unless the stores can stand below this cache."""
    tiers = [store.tier for store in stores]
    if tiers != sorted(set(tiers)) or Tier.G1 in tiers or sum(tier is not Tier.G2 for tier in tiers) > 1:
        named = ", ".join(tier.name for tier in tiers)
        raise ConfigError(f"stores of the tiers [{named}]: allowed are G2, one store below it, or both in this order")
    for store in stores:
        if store.block_bytes != layout.block_bytes:
            raise ConfigError(
                f"the {store.tier.name} store has blocks of {store.block_bytes:,} bytes, the cache of "
                f"{layout.block_bytes:,}; open it for this layout"
            )
        theirs = getattr(store, "identity", identity)
        if theirs != identity:
            raise ConfigError(
                f"the {store.tier.name} store holds blocks of another cache ({theirs.difference(identity)}); open it "
                "for this model and layout"
            )


def _capacity(store: BlockStore) -> int:
    """Blocks that a store may hold."""
    capacity = store.stats().capacity
    return sys.maxsize if capacity is None else capacity
