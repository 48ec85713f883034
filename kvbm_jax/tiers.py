"""From a configuration to the tiers below the device."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvbm_jax import extensions
from kvbm_jax.config import KvBlockManagerConfig
from kvbm_jax.errors import ConfigError
from kvbm_jax.events import EventPublisher
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload.allocator import Allocator, AnonymousAllocator
from kvbm_jax.offload.engine import OffloadEngine
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.protocols import BlockStore, Clock, MetricsSink, OffloadPolicy

if TYPE_CHECKING:
    from kvbm_jax.peers import PeerNetwork, Peers

__all__ = ["identity_of", "open_engine", "open_stores"]

_PINNED_SHARE, _LEAST_PINNED = 8, 16
_STORE_METHODS = ("put", "get", "delete", "contains", "records", "stats", "close")


def identity_of(config: KvBlockManagerConfig, layout: KVLayout) -> CacheIdentity:
    """Returns what a cache's bytes mean; without a `model_id` only this process may read them."""
    return CacheIdentity.of(layout, model_id=config.model_id or "", hash_algorithm=config.hash_algorithm)


def open_engine(
    config: KvBlockManagerConfig,
    layout: KVLayout,
    stores: Sequence[BlockStore] | None,
    *,
    publisher: EventPublisher,
    metrics: MetricsSink,
    clock: Clock,
    network: "PeerNetwork | None" = None,
) -> OffloadEngine | None:
    """Puts an engine over the tiers below a device; None where there are none.

    Args:
      config: says which tiers, if `stores` is None; see `open_stores` for what is raised then.
      layout: of the cache; blocks below it are of `offload_dtype`, if the configuration names one.
      stores: the fastest first.
      publisher: tells events.
      metrics: where measurements go.
      clock: for durations.
      network: of peers, closed with the engine; None for what `config` says.

    Raises:
      ConfigError: if there are peers, and no host memory that they could read or no `model_id`.
    """
    if config.offload_dtype is not None:
        layout = layout.with_format(config.offload_dtype.element_format)
    with contextlib.ExitStack() as opened:
        if network is None and config.peers != "none":
            from kvbm_jax.peers import open_network  # noqa: PLC0415 (sockets, which a worker alone has no use for)

            network = open_network(config)
        if stores is None:
            stores = open_stores(config, layout, clock, pinned_blocks=0 if network is None else _pins(config))
            for store in stores:
                opened.callback(store.close)
        peers = None if network is None else opened.enter_context(_join(config, network, stores, metrics, clock))
        if not stores:
            return None
        engine = OffloadEngine(
            layout,
            stores,
            identity=identity_of(config, layout),
            publisher=publisher,
            metrics=metrics,
            clock=clock,
            policy=_offload_policy(config.offload_policy),
            peers=peers,
        )
        opened.pop_all()
    return engine


def open_stores(
    config: KvBlockManagerConfig, layout: KVLayout, clock: Clock, *, pinned_blocks: int = 0
) -> Sequence[BlockStore]:
    """Opens the stores that a configuration asks for, from the fastest down; none without `enable_offload`.

    `layout` is that of the cache, in the element format of the tiers.

    Raises:
      ConfigError: if the disk tier has no `model_id`, its folder cannot be used, or memory cannot be had.
      MissingDependencyError: if the disk tier's package is absent.
    """
    if not config.enable_offload:
        return []
    if config.disk_bytes and config.model_id is None:
        raise ConfigError(
            "model_id is unset; the disk tier outlives this process, and must know whose keys and values it holds: "
            "name the model and its weights, for example by name and revision"
        )
    identity = identity_of(config, layout)
    stores: list[BlockStore] = []
    try:
        if config.host_blocks:
            allocator = _allocator(config.host_allocator)
            stores.append(
                HostBlockStore(
                    layout.block_bytes,
                    config.host_blocks,
                    identity=identity,
                    allocator=allocator,
                    pinned_blocks=pinned_blocks,
                )
            )
        if config.disk_bytes:
            stores.append(_open_disk(config, layout, identity, clock))
    except BaseException:
        for store in stores:
            store.close()
        raise
    return stores


def _pins(config: KvBlockManagerConfig) -> int:
    """How many slots of host memory peers may keep from being written at a time."""
    return max((config.host_blocks or 0) // _PINNED_SHARE, _LEAST_PINNED)


def _join(
    config: KvBlockManagerConfig,
    network: "PeerNetwork",
    stores: Sequence[BlockStore],
    metrics: MetricsSink,
    clock: Clock,
) -> "Peers":
    from kvbm_jax.peers import Peers  # noqa: PLC0415 (as above)

    store = next((store for store in stores if isinstance(store, HostBlockStore)), None)
    if store is None:
        raise ConfigError("peers read host memory, and there is none: set enable_offload and host_blocks")
    if config.model_id is None:
        raise ConfigError(
            "model_id is unset; peers must know whose keys and values they read: name the model and its weights, for "
            "example by name and revision"
        )
    return Peers(
        network,
        worker_id=config.worker_id,
        store=store,
        block_size=config.block_size,
        metrics=metrics,
        clock=clock,
    )


def _offload_policy(name: str) -> OffloadPolicy | None:
    if name == "always":
        return None
    policy: OffloadPolicy = extensions.load(
        extensions.OFFLOAD_POLICIES, name, lambda offered: offered(), methods=("select",)
    )
    return policy


def _allocator(name: str) -> Allocator:
    if name in extensions.HOST_ALLOCATORS.builtin:
        return AnonymousAllocator(huge_pages=name == "huge_pages")
    allocator: Allocator = extensions.load(
        extensions.HOST_ALLOCATORS, name, lambda offered: offered(), methods=("allocate", "release")
    )
    return allocator


def _open_disk(config: KvBlockManagerConfig, layout: KVLayout, identity: CacheIdentity, clock: Clock) -> BlockStore:
    if config.disk_store not in extensions.BLOCK_STORES.builtin:
        store: BlockStore = extensions.load(
            extensions.BLOCK_STORES,
            config.disk_store,
            lambda offered: offered(config, identity, layout.block_bytes),
            methods=_STORE_METHODS,
        )
        return store
    from kvbm_jax.offload.segments import SegmentBlockStore  # noqa: PLC0415 (Orbax takes seconds to import)

    return SegmentBlockStore(
        config.offload_path, layout.block_bytes, identity=identity, capacity_bytes=config.disk_bytes, clock=clock
    )
