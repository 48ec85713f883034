"""Staging arrays: where blocks lie on the device between the cache and the host.

Order is kept by data dependence. Offloading dispatches a gather of the victims into a staging array before any program
that may overwrite them, so the blocks may be reused at once: no pin, no wait. Copying to the host happens later, in
the background. Onboarding goes the other way: bytes that the host has verified are scattered into the donated cache.

A staging array holds a fixed number of blocks in the layout `fully_contiguous`, in the element format of the tiers: if
that is not the cache's, blocks are quantised or dequantised as they are gathered and scattered. Arrays form a ring: a
gather writes into one by donation, so warm memory is used again, once its copy to the host is done. There are small
arrays, for the block or two that a decode step evicts, and large ones.

A GPU copies to pinned host memory only at its full speed, and beside what it computes. There, the copy is dispatched
right behind the gather, and what the background waits for lies in pinned memory.

Axes: R rows (blocks) of a staging array; P bytes of a block.
"""

import functools
import threading
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvbm_jax import cache as kv_cache
from kvbm_jax.layout import ElementFormat, KVLayout

__all__ = ["StagingRing", "onboard", "rows_for", "rows_of_array", "warm_up"]

_SMALL, _LARGE = 4, 32
_PINNED = "pinned_host"
_MAX_ARRAY_BYTES = 64 << 20  # of device memory, unless one block is more


class StagingRing:
    """Staging arrays for one cache layout.

    Args:
      layout: of the cache, in the element format of the tiers.
      pinned: whether arrays are copied to pinned host memory as they are gathered; None: if the device is a GPU.
    """

    def __init__(self, layout: KVLayout, *, pinned: bool | None = None) -> None:
        self._layout = layout
        self._pinned = jax.default_backend() == "gpu" if pinned is None else pinned
        self._block_bytes = layout.block_bytes
        self._free: dict[int, list[jax.Array]] = {rows: [] for rows in _row_counts(layout.block_bytes)}
        self._lock = threading.Lock()

    def bytes_for(self, count: int) -> int:
        """Returns the bytes of the staging arrays that `count` blocks need."""
        return rows_for(count, self._block_bytes) * self._block_bytes

    def gather(self, cache: kv_cache.KVCache, block_ids: NDArray[np.int32]) -> list[jax.Array]:
        """Dispatches the gather of blocks i32[n] and returns at once.

        Returns:
          Staging arrays, filled in order and all but the last of each size wholly, to be given back by `release`.
        """
        sharding = cache.arrays[0].sharding
        arrays = []
        for _, ids in _pieces(block_ids, cache.layout.num_blocks, self._block_bytes):
            rows = len(ids)
            with self._lock:
                target = self._free[rows].pop() if self._free[rows] else None
            if target is None:
                staging = self._layout.staging(rows)
                target = jax.device_put(jnp.zeros(staging.array_shape, staging.array_dtype), sharding)
            staged = _gather(target, cache, ids, self._layout.element_format)
            if self._pinned:
                arrays.append(jax.device_put(staged, sharding.with_memory_kind(_PINNED)))
                self._give_back(staged)  # whoever is next writes behind the copy
            else:
                arrays.append(staged)
        return arrays

    def release(self, arrays: Sequence[jax.Array]) -> None:
        """Takes arrays back whose copies are done. No view of their memory may be alive."""
        if not self._pinned:
            for array in arrays:
                self._give_back(array)

    def warm_up(self, cache: kv_cache.KVCache) -> None:
        """Compiles the gathers."""
        for rows in _row_counts(self._block_bytes):
            self.release(self.gather(cache, np.full((rows,), cache.layout.num_blocks, np.int32)))

    def _give_back(self, array: jax.Array) -> None:
        with self._lock:
            self._free[array.shape[0]].append(array)


def rows_of_array(array: jax.Array) -> NDArray[np.uint8]:
    """Waits for a staging array and returns its bytes on the host, u8[R, P].

    A view of its memory, on CPU and where one device has copied it to pinned memory.
    """
    if array.sharding.memory_kind == _PINNED and len(array.sharding.device_set) == 1:
        return np.asarray(_PinnedBytes(array)).reshape(array.shape[0], -1)
    host = np.asarray(array)
    return host.reshape(host.shape[0], -1).view(np.uint8)


class _PinnedBytes:
    """The bytes of an array in pinned host memory, which NumPy keeps alive with its view.

    NumPy knows neither bfloat16 nor float8 by DLPack.
    """

    def __init__(self, array: jax.Array) -> None:
        self._array = array.block_until_ready()
        self.__array_interface__ = {
            "version": 3,
            "data": (array.unsafe_buffer_pointer(), True),
            "typestr": "|u1",
            "shape": (array.nbytes,),
        }


def onboard(
    cache: kv_cache.KVCache,
    block_ids: NDArray[np.int32],
    rows: NDArray[np.uint8],
    element_format: ElementFormat | None = None,
) -> tuple[kv_cache.KVCache, None]:
    """Scatters the first n of `rows` into blocks i32[n] of the cache, which it takes donated.

    `rows` is u8[M, P], M as `rows_for` says, of the element format of the tiers; None for that of the cache. JAX's CPU
    device takes aligned memory over without a copy, so `rows` must not be written as long as anything refers to it.
    """
    sharding, element_format = cache.arrays[0].sharding, element_format or cache.layout.element_format
    staging = cache.layout.with_format(element_format).staging(len(rows))
    blocks = rows.view(jnp.dtype(staging.array_dtype)).reshape(staging.array_shape)
    # Put explicitly, and all before the first scatter: as numpy arguments of a program they take several times longer.
    pieces = [
        (ids, jax.device_put(blocks[first : first + len(ids)], sharding))
        for first, ids in _pieces(block_ids, cache.layout.num_blocks, staging.block_bytes)
    ]
    for ids, piece in pieces:
        cache = _scatter(cache, ids, piece, element_format)
    return cache, None


def warm_up(cache: kv_cache.KVCache, element_format: ElementFormat | None = None) -> tuple[kv_cache.KVCache, None]:
    """Compiles what `onboard` runs, by scattering nothing; takes the cache donated."""
    layout = cache.layout.with_format(element_format or cache.layout.element_format)
    for rows in _row_counts(layout.block_bytes):
        nowhere = np.full((rows,), layout.num_blocks, np.int32)
        cache, _ = onboard(cache, nowhere, np.zeros((rows, layout.block_bytes), np.uint8), element_format)
    return cache, None


def rows_for(count: int, block_bytes: int) -> int:
    """Returns how many rows `onboard` reads for `count` blocks: the last piece is whole."""
    return sum(_sizes(count, block_bytes))


def _pieces(block_ids: NDArray[np.int32], padding: int, block_bytes: int) -> Iterator[tuple[int, NDArray[np.int32]]]:
    """Cuts blocks i32[n] into pieces of the sizes of staging arrays.

    Yields:
      Index of the first block, and ids i32[R], padded by an id that names no block.
    """
    first = 0
    for size in _sizes(len(block_ids), block_bytes):
        ids = np.full((size,), padding, np.int32)
        part = block_ids[first : first + size]
        ids[: len(part)] = part
        yield first, ids
        first += size


def _row_counts(block_bytes: int) -> tuple[int, int]:
    """R of a small and of a large staging array."""
    large = max(min(_LARGE, _MAX_ARRAY_BYTES // block_bytes), 1)
    return min(_SMALL, large), large


def _sizes(count: int, block_bytes: int) -> list[int]:
    """The staging arrays for `count` blocks: large ones, then small ones unless a large one is hardly more."""
    small, large = _row_counts(block_bytes)
    full, rest = divmod(count, large)
    few = -(-rest // small)
    return [large] * full + ([small] * few if few <= 2 else [large])


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _gather(
    target: jax.Array, cache: kv_cache.KVCache, block_ids: jax.Array, element_format: ElementFormat
) -> jax.Array:
    """Gathers blocks i32[R] into a donated staging array of R rows."""
    return kv_cache.gather_blocks(cache, block_ids, element_format=element_format, out=target)


@functools.partial(jax.jit, donate_argnums=0, static_argnums=3)
def _scatter(
    cache: kv_cache.KVCache, block_ids: jax.Array, blocks: jax.Array, element_format: ElementFormat
) -> kv_cache.KVCache:
    """Scatters a staging array of R rows to blocks i32[R] of the donated cache."""
    return kv_cache.scatter_blocks(cache, block_ids, blocks, element_format=element_format)
