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
from kvbm_jax.kernels.quantize import Quantized, dequantize, quantize
from kvbm_jax.layout import ElementFormat, KVLayout, LayoutKind

__all__ = [
    "KVCache",
    "copy_blocks",
    "gather_blocks",
    "init",
    "layer_scales",
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
    """Keys and values of all layers.

    Of a layout kind for tiers and transfers it is one array, as `KVLayout.array_shape` says.
    """

    arrays: tuple[jax.Array, ...]  # L arrays [N, C, T, H, D], or one [L, N, C, T, H, D]
    layout: KVLayout = field(metadata={"static": True})
    scales: tuple[jax.Array, ...] = ()  # if quantised, L arrays f32[N, C, T, H], or one f32[L, N, C, T, H]


def init(layout: KVLayout) -> KVCache:
    """Returns a cache of zeros.

    Raises:
      LayoutError: if the layout's kind is meant for tiers and transfers, not for a device.
    """
    if layout.kind not in _DEVICE_KINDS:
        raise LayoutError(
            f"a cache cannot be {layout.kind}; models use {' or '.join(_DEVICE_KINDS)}, other kinds are for tiers"
        )
    arrays = tuple(jnp.zeros(layout.array_shape, layout.array_dtype) for _ in range(layout.num_arrays))
    if layout.scale_shape is None:
        return KVCache(arrays, layout)
    return KVCache(arrays, layout, tuple(jnp.zeros(layout.scale_shape, jnp.float32) for _ in arrays))


def layer_view(cache: KVCache, layer: int | jax.Array) -> tuple[jax.Array, int | jax.Array]:
    """Returns one layer as an array [N', C, T, H, D] and the block number in it where the layer begins.

    A stacked cache is viewed as L * N blocks, so that nothing is copied.

    Raises:
      LayoutError: if `layer` is out of range, or traced while the layers are separate arrays.
    """
    array = _view(cache.arrays, cache.layout, layer)
    return array, layer * cache.layout.num_blocks if cache.layout.kind is LayoutKind.LAYER_STACKED else 0


def layer_scales(cache: KVCache, layer: int | jax.Array) -> jax.Array | None:
    """Returns the scales of one layer as `layer_view` does its elements, f32[N', C, T, H]; None if it is plain.

    Raises:
      LayoutError: as `layer_view`.
    """
    return _view(cache.scales, cache.layout, layer) if cache.scales else None


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
      keys: [S, H, D], cast to the dtype of the cache, or quantised.
      values: [S, H, D].
      slots: i32[S], block * block_size + offset, distinct; N * T drops the token.
      implementation: see `kvbm_jax.kernels`.

    Raises:
      LayoutError: at trace time, if the shapes do not fit.
    """
    if keys.shape != values.shape:
        raise LayoutError(f"keys are {list(keys.shape)}, values {list(values.shape)}; both are [S, H, D]")
    array, first = layer_view(cache, layer)
    places = _offset(slots, first * cache.layout.block_size, cache.layout.num_slots, array)
    scales = layer_scales(cache, layer)
    if scales is None:
        stored = kernels.store_kv(array, (keys, values), places, implementation=implementation)
        return replace(cache, arrays=_with_layer(cache.arrays, cache.layout, layer, stored))
    rows = [quantize(part, cache.layout.dtype) for part in (keys, values)]
    stored = kernels.store_kv(array, [row.payload for row in rows], places, implementation=implementation)
    stored_scales = kernels.store_kv(
        scales[..., None], [row.scales[..., None] for row in rows], places, implementation=implementation
    )
    return replace(
        cache,
        arrays=_with_layer(cache.arrays, cache.layout, layer, stored),
        scales=_with_layer(cache.scales, cache.layout, layer, stored_scales[..., 0]),
    )


def load_kv(
    cache: KVCache,
    layer: int | jax.Array,
    slots: jax.Array,
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: kernels.dispatch.Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Reads the keys and values at slots i32[S]; zeros at N * T.

    Args:
      cache: the cache.
      layer: its number.
      slots: i32[S].
      dtype: of the result; None for that of the cache, or float32 if it is quantised.
      implementation: see `kvbm_jax.kernels`.

    Returns:
      Keys and values, [S, H, D] each.

    Raises:
      LayoutError: if the cache does not hold two components, keys and values.
    """
    if cache.layout.components != 2:
        raise LayoutError(f"the cache's layout has components = {cache.layout.components}; keys and values are 2")
    array, first = layer_view(cache, layer)
    places = _offset(slots, first * cache.layout.block_size, cache.layout.num_slots, array)
    parts = kernels.load_kv(array, places, implementation=implementation)
    if (scales := layer_scales(cache, layer)) is not None:
        factors = kernels.load_kv(scales[..., None], places, implementation=implementation)
        rows = map(Quantized, parts, (factor[..., 0] for factor in factors))
        keys, values = (dequantize(row, dtype or jnp.float32) for row in rows)
    else:
        keys, values = (part if dtype is None else part.astype(dtype) for part in parts)
    return keys, values


def gather_blocks(
    cache: KVCache,
    block_ids: jax.Array,
    *,
    kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS,
    element_format: ElementFormat | None = None,
    out: jax.Array | None = None,
    implementation: kernels.dispatch.Implementation | None = None,
) -> jax.Array:
    """Collects blocks i32[M] over all layers; zeros at N.

    Args:
      cache: the cache.
      block_ids: i32[M].
      kind: of the result: `fully_contiguous`, [M, L, C, T, H, D], or `universal`, [M, H, L, C, T, D]; u8[M, P], P
        bytes of a block, if that is quantised.
      element_format: of the result, quantised or dequantised on the way; None for that of the cache.
      out: an array to write to; donate it to have that in place. None for a new one.
      implementation: see `kvbm_jax.kernels`.

    Raises:
      LayoutError: at trace time, if `out` does not fit.
    """
    return kernels.gather_blocks(
        _leaves(cache),
        cache.layout,
        block_ids,
        kind=kind,
        element_format=element_format,
        out=out,
        implementation=implementation,
    )


def scatter_blocks(
    cache: KVCache,
    block_ids: jax.Array,
    blocks: jax.Array,
    *,
    kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS,
    element_format: ElementFormat | None = None,
    implementation: kernels.dispatch.Implementation | None = None,
) -> KVCache:
    """Writes blocks, as `gather_blocks` collects them, to block_ids i32[M], distinct; N drops a block.

    `kind` and `element_format` are those of the blocks; None for the format of the cache.

    Raises:
      LayoutError: at trace time, if the shapes do not fit.
    """
    arrays = kernels.scatter_blocks(
        _leaves(cache),
        cache.layout,
        block_ids,
        blocks,
        kind=kind,
        element_format=element_format,
        implementation=implementation,
    )
    return _of(arrays, cache.layout)


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
        _leaves(cache), cache.layout, sources, targets, disjoint=disjoint, implementation=implementation
    )
    return _of(arrays, cache.layout)


def permute_blocks(
    cache: KVCache,
    kind: LayoutKind,
    *,
    element_format: ElementFormat | None = None,
    implementation: kernels.dispatch.Implementation | None = None,
) -> KVCache:
    """Rearranges the cache as another kind of layout, and in another element format if one is given.

    Raises:
      LayoutError: if the new layout is out of range.
    """
    layout = cache.layout.with_kind(kind).with_format(element_format or cache.layout.element_format)
    arrays = kernels.permute_blocks(
        _leaves(cache), cache.layout, kind, element_format=element_format, implementation=implementation
    )
    return _of(arrays, layout)


def scrub_blocks(cache: KVCache, block_ids: jax.Array) -> KVCache:
    """Zeroes blocks i32[M] in all layers, scales included; N drops one. Donate the cache to have it in place."""
    layout = cache.layout
    ids = _in_all_layers(layout, block_ids) if layout.kind is LayoutKind.LAYER_STACKED else block_ids

    def scrubbed(array: jax.Array) -> jax.Array:
        blocks = array.reshape(-1, *array.shape[2:]) if layout.kind is LayoutKind.LAYER_STACKED else array
        return blocks.at[ids].set(0, mode="drop").reshape(array.shape)

    return _of(tuple(scrubbed(array) for array in _leaves(cache)), layout)


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
    arrays = (jnp.take(array, sources, axis=axis, mode="fill", fill_value=0) for array in _leaves(cache))
    return _of(tuple(arrays), layout)


def regroup_tokens(cache: KVCache, slots: jax.Array) -> KVCache:
    """Makes a cache of blocks of another size, of any layout kind. Do not donate: the shapes differ.

    Args:
      cache: the cache of N blocks of T tokens.
      slots: i32[M, U], for each token of M blocks of U tokens the slot that it had; zeros at N * T.

    Raises:
      LayoutError: if the new layout is out of range.
    """
    old = cache.layout
    if old.is_packed:
        unpacked = permute_blocks(cache, LayoutKind.LAYER_SEPARATE)
        return permute_blocks(regroup_tokens(unpacked, slots), old.kind)
    layout = replace(old, num_blocks=slots.shape[0], block_size=slots.shape[1])
    block, token = layout.axes.index("N"), layout.axes.index("T")
    places = {block: slots // old.block_size, token: slots % old.block_size}
    where = tuple(places.get(axis, slice(None)) for axis in range(max(block, token) + 1))
    # The two indexed axes never lie side by side, so that they come first in the result.
    regrouped = (array.at[where].get(mode="fill", fill_value=0) for array in _leaves(cache))
    return _of(tuple(jnp.moveaxis(array, (0, 1), (block, token)) for array in regrouped), layout)


def _leaves(cache: KVCache) -> tuple[jax.Array, ...]:
    """All arrays of a cache, as `kvbm_jax.kernels` takes them."""
    return cache.arrays + cache.scales


def _of(arrays: tuple[jax.Array, ...], layout: KVLayout) -> KVCache:
    """The cache of all its arrays."""
    return KVCache(arrays[: layout.num_arrays], layout, arrays[layout.num_arrays :])


def _view(arrays: tuple[jax.Array, ...], layout: KVLayout, layer: int | jax.Array) -> jax.Array:
    """The array that holds a layer, blocks first."""
    if isinstance(layer, int) and not 0 <= layer < layout.num_layers:
        raise LayoutError(f"layer is {layer}; the cache has layers 0 to {layout.num_layers - 1}")
    if layout.kind is LayoutKind.LAYER_STACKED:
        return arrays[0].reshape(-1, *arrays[0].shape[2:])
    if not isinstance(layer, int):
        raise LayoutError("layer is traced, but layers are separate arrays: use the layout kind layer_stacked")
    return arrays[layer]


def _with_layer(
    arrays: tuple[jax.Array, ...], layout: KVLayout, layer: int | jax.Array, view: jax.Array
) -> tuple[jax.Array, ...]:
    """The arrays with what `_view` gave changed."""
    if layout.kind is LayoutKind.LAYER_STACKED:
        return (view.reshape(arrays[0].shape),)
    index = int(layer)
    return (*arrays[:index], view, *arrays[index + 1 :])


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
