"""The cache tensors: storing, loading and moving keys and values by slot and by block.

A `KVCache` is a pytree of the arrays that its layout describes. Verbs return a new cache; under a jit that donates the
old one they work in place, whatever the size of the cache. The pool says which block is whose; nothing here does.

For models that scan over layers, `layer` may be a traced i32[] when the layout is `layer_stacked`; carry the cache
through the scan as carry, never as xs and ys.

A cache whose layout is quantised has scales beside its arrays. Storing quantises and loading dequantises, as
`kvbm_jax.kernels.quantize` says; whole blocks move with their scales, bit for bit, unless another element format is
asked for on the way.

Arrays may be shared out by kv heads among the devices of a mesh; each device then works on its own. Within a
`shard_map` the layout is that of one device's heads.

Axes: L layers, N blocks, C components (K, V), T tokens of a block, H kv heads, D head dim, S tokens of a step, M blocks
of a call.
"""

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from kvbm_jax import kernels
from kvbm_jax.errors import LayoutError
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = [
    "KVCache",
    "copy_blocks",
    "gather_blocks",
    "init",
    "layer_view",
    "load_kv",
    "permute_blocks",
    "regroup_tokens",
    "resize_blocks",
    "scatter_blocks",
    "scrub_blocks",
    "store_kv",
]

_DEVICE_KINDS = (LayoutKind.LAYER_SEPARATE, LayoutKind.LAYER_STACKED)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers."""

    arrays: tuple[jax.Array, ...]  # L arrays [N, C, T, H, D], or one [L, N, C, T, H, D]
    layout: KVLayout = field(metadata={"static": True})


def init(layout: KVLayout) -> KVCache:
    """Returns a cache of zeros.

    Raises:
      LayoutError: if the layout's kind is meant for tiers and transfers, not for a device.
    """
    if layout.kind not in _DEVICE_KINDS:
        raise LayoutError(
            f"a cache cannot be {layout.kind}; models use {' or '.join(_DEVICE_KINDS)}, other kinds are for tiers"
        )
    shape, dtype = layout.array_shape, jnp.dtype(layout.dtype)
    return KVCache(tuple(jnp.zeros(shape, dtype) for _ in range(layout.num_arrays)), layout)


def layer_view(cache: KVCache, layer: int | jax.Array) -> tuple[jax.Array, int | jax.Array]:
    """Returns one layer as an array [N', C, T, H, D] and the block number in it where the layer begins.

    A stacked cache is viewed as L * N blocks, so that nothing is copied.

    Raises:
      LayoutError: if `layer` is out of range, or traced while the layers are separate arrays.
    """
    layout = cache.layout
    if isinstance(layer, int) and not 0 <= layer < layout.num_layers:
        raise LayoutError(f"layer is {layer}; the cache has layers 0 to {layout.num_layers - 1}")
    if layout.kind is LayoutKind.LAYER_STACKED:
        stacked = cache.arrays[0]
        return stacked.reshape(-1, *stacked.shape[2:]), layer * layout.num_blocks
    if not isinstance(layer, int):
        raise LayoutError("layer is traced, but layers are separate arrays: use the layout kind layer_stacked")
    return cache.arrays[layer], 0


def store_kv(
    cache: KVCache,
    layer: int | jax.Array,
    keys: jax.Array,
    values: jax.Array,
    slots: jax.Array,
    *,
    implementation: kernels.dispatch.Implementation | None = None,
) -> KVCache:
    """Writes the keys and values of new tokens. Donate the cache to have it in place.

    Args:
      cache: the cache.
      layer: its number.
      keys: [S, H, D].
      values: [S, H, D].
      slots: i32[S], block * block_size + offset, distinct; N * T drops the token.
      implementation: see `kvbm_jax.kernels`.

    Raises:
      LayoutError: at trace time, if the shapes do not fit.
    """
    if keys.shape != values.shape:
        raise LayoutError(f"keys are {list(keys.shape)}, values {list(values.shape)}; both are [S, H, D]")
    array, first = layer_view(cache, layer)
    offset_slots = _offset(slots, first * cache.layout.block_size, cache.layout.num_slots, array)
    stored = kernels.store_kv(array, (keys, values), offset_slots, implementation=implementation)
    return _with_layer(cache, layer, stored)


def load_kv(
    cache: KVCache,
    layer: int | jax.Array,
    slots: jax.Array,
    *,
    implementation: kernels.dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Reads the keys and values at slots i32[S]; zeros at N * T.

    Returns:
      Keys and values, [S, H, D] each.

    Raises:
      LayoutError: if the cache does not hold two components, keys and values.
    """
    if cache.layout.components != 2:
        raise LayoutError(f"the cache's layout has components = {cache.layout.components}; keys and values are 2")
    array, first = layer_view(cache, layer)
    offset_slots = _offset(slots, first * cache.layout.block_size, cache.layout.num_slots, array)
    keys, values = kernels.load_kv(array, offset_slots, implementation=implementation)
    return keys, values


def gather_blocks(
    cache: KVCache,
    block_ids: jax.Array,
    *,
    kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS,
    out: jax.Array | None = None,
    implementation: kernels.dispatch.Implementation | None = None,
) -> jax.Array:
    """Collects blocks i32[M] over all layers; zeros at N.

    Args:
      cache: the cache.
      block_ids: i32[M].
      kind: of the result: `fully_contiguous`, [M, L, C, T, H, D], or `universal`, [M, H, L, C, T, D].
      out: an array to write to; donate it to have that in place. None for a new one.
      implementation: see `kvbm_jax.kernels`.

    Raises:
      LayoutError: at trace time, if `out` does not fit.
    """
    return kernels.gather_blocks(
        cache.arrays, cache.layout, block_ids, kind=kind, out=out, implementation=implementation
    )


def scatter_blocks(
    cache: KVCache,
    block_ids: jax.Array,
    blocks: jax.Array,
    *,
    kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS,
    implementation: kernels.dispatch.Implementation | None = None,
) -> KVCache:
    """Writes blocks, as `gather_blocks` collects them, to block_ids i32[M], distinct; N drops a block.

    Raises:
      LayoutError: at trace time, if the shapes do not fit.
    """
    arrays = kernels.scatter_blocks(
        cache.arrays, cache.layout, block_ids, blocks, kind=kind, implementation=implementation
    )
    return replace(cache, arrays=arrays)


def copy_blocks(
    cache: KVCache,
    sources: jax.Array,
    targets: jax.Array,
    *,
    disjoint: bool = False,
    implementation: kernels.dispatch.Implementation | None = None,
) -> KVCache:
    """Copies blocks sources i32[M] to targets i32[M], distinct, in all layers; a target N drops the copy.

    All reads come before all writes. `disjoint` promises that no block is a source and a target, as in copy-on-write.

    Raises:
      LayoutError: at trace time, if there are not as many sources as targets.
    """
    arrays = kernels.copy_blocks(
        cache.arrays, cache.layout, sources, targets, disjoint=disjoint, implementation=implementation
    )
    return replace(cache, arrays=arrays)


def permute_blocks(
    cache: KVCache, kind: LayoutKind, *, implementation: kernels.dispatch.Implementation | None = None
) -> KVCache:
    """Rearranges the cache as another kind of layout.

    Raises:
      LayoutError: if the new layout is out of range.
    """
    arrays = kernels.permute_blocks(cache.arrays, cache.layout, kind, implementation=implementation)
    return KVCache(arrays, cache.layout.with_kind(kind))


def scrub_blocks(cache: KVCache, block_ids: jax.Array) -> KVCache:
    """Zeroes blocks i32[M] in all layers; N drops one. Donate the cache to have it in place."""
    if cache.layout.kind is LayoutKind.LAYER_STACKED:
        array, _ = layer_view(cache, 0)
        return _with_layer(cache, 0, array.at[_in_all_layers(cache.layout, block_ids)].set(0, mode="drop"))
    return replace(cache, arrays=tuple(array.at[block_ids].set(0, mode="drop") for array in cache.arrays))


def resize_blocks(cache: KVCache, sources: jax.Array) -> KVCache:
    """Makes a cache of another number of blocks, of any layout kind.

    Do not donate: the shapes differ, so that both caches are in memory for a while.

    Args:
      cache: the cache of N blocks.
      sources: i32[M], the block that each block of the new cache is a copy of; zeros at N.

    Raises:
      LayoutError: if the new layout is out of range.
    """
    layout = replace(cache.layout, num_blocks=sources.shape[0])
    axis = layout.axes.index("N")
    arrays = (jnp.take(array, sources, axis=axis, mode="fill", fill_value=0) for array in cache.arrays)
    return KVCache(tuple(arrays), layout)


def regroup_tokens(cache: KVCache, slots: jax.Array) -> KVCache:
    """Makes a cache of blocks of another size, of any layout kind. Do not donate: the shapes differ.

    Args:
      cache: the cache of N blocks of T tokens.
      slots: i32[M, U], for each token of M blocks of U tokens the slot that it had; zeros at N * T.

    Raises:
      LayoutError: if the new layout is out of range.
    """
    old = cache.layout
    layout = replace(old, num_blocks=slots.shape[0], block_size=slots.shape[1])
    block, token = layout.axes.index("N"), layout.axes.index("T")
    places = {block: slots // old.block_size, token: slots % old.block_size}
    where = tuple(places.get(axis, slice(None)) for axis in range(len(layout.axes)))
    # The two indexed axes never lie side by side, so that they come first in the result.
    regrouped = (array.at[where].get(mode="fill", fill_value=0) for array in cache.arrays)
    return KVCache(tuple(jnp.moveaxis(array, (0, 1), (block, token)) for array in regrouped), layout)


def _in_all_layers(layout: KVLayout, block_ids: jax.Array) -> jax.Array:
    """Block ids i32[M] of a stacked cache as i32[M * L] in its view of L * N blocks; padding goes past its end."""
    layers = jnp.arange(layout.num_layers, dtype=jnp.int32)
    ids = block_ids[:, None] + layers[None, :] * layout.num_blocks
    valid = (block_ids < layout.num_blocks)[:, None]
    return jnp.where(valid, ids, layout.num_layers * layout.num_blocks).reshape(-1)


def _offset(slots: jax.Array, first: int | jax.Array, padding: int, array: jax.Array) -> jax.Array:
    """Moves slots to where their layer begins in `array`; padding goes past its end."""
    if isinstance(first, int) and first == 0 and array.shape[0] * array.shape[2] == padding:
        return slots
    return jnp.where(slots < padding, slots + first, array.shape[0] * array.shape[2])


def _with_layer(cache: KVCache, layer: int | jax.Array, array: jax.Array) -> KVCache:
    if cache.layout.kind is LayoutKind.LAYER_STACKED:
        return replace(cache, arrays=(array.reshape(cache.layout.array_shape),))
    index = int(layer)
    return replace(cache, arrays=(*cache.arrays[:index], array, *cache.arrays[index + 1 :]))
