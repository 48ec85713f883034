"""How fast the operations on cache arrays move bytes here, beside a copy of as many bytes in memory.

Blocks of some sizes go from a cache to a staging array that is donated and back, as offload and onboard have it, and
from one place of the cache to another; tokens go to their slots. What `kvbm_jax.kernels` chooses for this device does
it. The baseline is numpy's copy into memory that has been in use before.

Axes: L layers, N blocks, M = N / 2 blocks that are moved, T tokens of a block, H kv heads, D head dim.
"""

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kvbm_jax import cache as kv_cache
from kvbm_jax.bench.timing import Row, Timing
from kvbm_jax.errors import BenchError
from kvbm_jax.layout import KVLayout

__all__ = ["BLOCK_SIZES", "measure"]

BLOCK_SIZES = (8, 32, 128)
"""T of the caches: 64 KiB, 256 KiB and 1 MiB a block and layer."""

_LAYOUT = KVLayout(num_layers=4, num_blocks=1, block_size=1, num_kv_heads=8, head_dim=128, dtype="float32")


def measure(timing: Timing, num_mebibytes: int) -> list[Row]:
    """Times every operation for every block size.

    Args:
      timing: how.
      num_mebibytes: what is moved at once, at least 4.

    Raises:
      BenchError: What came back from the cache is not what went in.
    """
    rows = []
    for block_size in BLOCK_SIZES:
        layout = replace(_LAYOUT, block_size=block_size)
        count = (num_mebibytes << 20) // layout.block_bytes
        moves = _Moves(replace(layout, num_blocks=2 * count))
        what = f"blocks of {layout.block_bytes // layout.num_layers >> 10:,} KiB"
        timing.progress(f"{what}: checking")
        moves.verify()
        for name, trial in (
            ("store_kv", moves.store),
            ("gather_blocks", moves.gather),
            ("scatter_blocks", moves.scatter),
            ("copy_blocks", moves.copy),
        ):
            rows.append(timing.compare(f"{name}, {what}", trial, "copy in memory", moves.plain))
    return rows


class _Moves:
    """A cache, half of whose blocks are moved; the methods named after operations are trials.

    Args:
      layout: of the cache.
    """

    def __init__(self, layout: KVLayout) -> None:
        count, size = layout.num_blocks // 2, layout.block_size
        rng = np.random.default_rng(size)
        order = rng.permutation(layout.num_blocks).astype(np.int32)
        slots = (order[:count, None] * size + np.arange(size, dtype=np.int32)).reshape(-1)
        self._ids, self._others, self._slots = map(jnp.asarray, (order[:count], order[count:], slots))
        self._contents = rng.random(layout.staging(count).array_shape, np.float32)
        self._target = np.zeros_like(self._contents)
        self._blocks = jnp.asarray(self._contents)
        self._rows = jnp.asarray(rng.random((count * size, layout.num_kv_heads, layout.head_dim), np.float32))
        self._cache, self._staging = kv_cache.init(layout), jnp.zeros_like(self._blocks)
        self._store = jax.jit(_store_in_all_layers, donate_argnums=0)
        self._gather = jax.jit(lambda out, cache, ids: kv_cache.gather_blocks(cache, ids, out=out), donate_argnums=0)
        self._scatter = jax.jit(kv_cache.scatter_blocks, donate_argnums=0)
        self._copy = jax.jit(functools.partial(kv_cache.copy_blocks, disjoint=True), donate_argnums=0)

    def verify(self) -> None:
        """Raises `BenchError` unless blocks come back from the cache, and from where they were copied to."""
        self.scatter()
        self.copy()
        for ids in (self._ids, self._others):
            self._staging = self._gather(self._staging, self._cache, ids)
            if not np.array_equal(self._staging, self._contents):
                raise BenchError(f"blocks of {self._cache.layout.block_size} tokens did not come back as they went in")
        self.store()
        keys, values = kv_cache.load_kv(self._cache, 0, self._slots)
        if not (jnp.array_equal(keys, self._rows) and jnp.array_equal(values, self._rows)):
            raise BenchError("tokens did not come back from their slots as they went in")

    def store(self) -> float:
        """Tokens to their slots in every layer."""
        self._cache, seconds = _timed(self._store, self._cache, self._rows, self._slots)
        return seconds

    def gather(self) -> float:
        """Blocks to the staging array."""
        self._staging, seconds = _timed(self._gather, self._staging, self._cache, self._ids)
        return seconds

    def scatter(self) -> float:
        """Blocks from an array like it."""
        self._cache, seconds = _timed(self._scatter, self._cache, self._ids, self._blocks)
        return seconds

    def copy(self) -> float:
        """Blocks to the other half of the cache."""
        self._cache, seconds = _timed(self._copy, self._cache, self._ids, self._others)
        return seconds

    def plain(self) -> float:
        """As many bytes from one numpy array to another."""
        begun = time.perf_counter()
        np.copyto(self._target, self._contents)
        return time.perf_counter() - begun


def _store_in_all_layers(cache: kv_cache.KVCache, rows: jax.Array, slots: jax.Array) -> kv_cache.KVCache:
    for layer in range(cache.layout.num_layers):
        cache = kv_cache.store_kv(cache, layer, rows, rows, slots)
    return cache


def _timed(call: Callable[..., Any], *args: Any) -> tuple[Any, float]:
    """Returns a call's result and its seconds, until the result is there."""
    begun = time.perf_counter()
    result = jax.block_until_ready(call(*args))  # type: ignore[no-untyped-call]
    return result, time.perf_counter() - begun
