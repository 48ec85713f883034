"""A functional, block-based KV cache for JAX.

Pure functions over immutable pytrees, which a server calls inside its own jitted step:

    pool        which block is free, held, cached or evictable       pool.init, match, allocate, register, release
    sequences   block tables and lengths of running requests         sequences.start, extend, register, release
    grants      allocation inside a compiled loop                    grants.reserve, extend, commit
    resize      another size for a live pool                         resize.resize
    policies    which cached block is evicted first                  policies.lineage, priority, tiny_lfu, scored
    cache       the tensors: store, load, gather, scatter, copy      cache.init, store_kv, load_kv
    attention   what a model's attention layer calls                 attend, decode_batch, step_batch

and one host-side owner outside it: `BlockManager`, made from a `KvBlockManagerConfig`.

Importing this package needs jax and numpy only, starts no thread and initialises no back end.
"""

from typing import TYPE_CHECKING, Any

from kvbm_jax import attention, cache, grants, invariants, kernels, layout, policies, pool, resize, sequences
from kvbm_jax.attention import AttentionBatch, attend, decode_batch, paged_attention, step_batch
from kvbm_jax.cache import KVCache, copy_blocks, gather_blocks, load_kv, scatter_blocks, store_kv
from kvbm_jax.errors import KvbmError
from kvbm_jax.groups import Group
from kvbm_jax.layout import ElementFormat, KVLayout, LayoutKind
from kvbm_jax.pool import PoolState
from kvbm_jax.sequences import SequenceBatch
from kvbm_jax.types import Status

if TYPE_CHECKING:
    from kvbm_jax.block_pool import BlockPool
    from kvbm_jax.config import KvBlockManagerConfig
    from kvbm_jax.events import KvEvent
    from kvbm_jax.handles import Block, Sequence
    from kvbm_jax.manager import BlockManager

__version__ = "0.1.0.dev0"

__all__ = [
    "attention",
    "cache",
    "grants",
    "invariants",
    "kernels",
    "layout",
    "policies",
    "pool",
    "resize",
    "sequences",
    "AttentionBatch",
    "attend",
    "decode_batch",
    "paged_attention",
    "step_batch",
    "KVCache",
    "copy_blocks",
    "gather_blocks",
    "load_kv",
    "scatter_blocks",
    "store_kv",
    "ElementFormat",
    "Group",
    "KVLayout",
    "LayoutKind",
    "PoolState",
    "SequenceBatch",
    "Status",
    "KvbmError",
    "Block",
    "BlockManager",
    "BlockPool",
    "KvBlockManagerConfig",
    "KvEvent",
    "Sequence",
]

_HOST_NAMES = {
    "Block": "kvbm_jax.handles",
    "BlockManager": "kvbm_jax.manager",
    "BlockPool": "kvbm_jax.block_pool",
    "KvBlockManagerConfig": "kvbm_jax.config",
    "KvEvent": "kvbm_jax.events",
    "Sequence": "kvbm_jax.handles",
}


def __getattr__(name: str) -> Any:
    """Loads the host side when it is first asked for, so that pure users do not pay for it."""
    if name not in _HOST_NAMES:
        raise AttributeError(f"module 'kvbm_jax' has no attribute {name!r}")
    import importlib  # noqa: PLC0415

    return getattr(importlib.import_module(_HOST_NAMES[name]), name)
