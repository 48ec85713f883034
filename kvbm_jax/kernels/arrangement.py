"""Elements of a cache out of its arrays and into them, for every layout of `kvbm_jax.layout`, in XLA.

In between they are in *logical order*: payload [N, L, C, T, H, D], and scales [N, L, C, T, H] if they are quantised, or
the same of a single layer, without L. The arrays of a cache are one tuple: those of the payload, then those of the
scales where these are arrays of their own.

Axes: N blocks, L layers, C components (K, V), T tokens of a block, H kv heads, D head dim, P bytes of a block.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["arrays_of", "elements_of", "layer_of", "scales_of", "with_layer", "with_scales"]

_LOGICAL = "NLCTHD"
_OF_LAYER = _LOGICAL.replace("L", "")
_HEADS = _LOGICAL.index("H")

type Elements = tuple[jax.Array, jax.Array | None]
"""Payload and scales, the latter None where elements are plain."""


def elements_of(arrays: Sequence[jax.Array], layout: KVLayout) -> Elements:
    """Returns all elements of a cache in logical order."""
    if layout.is_packed:
        return _unpacked(arrays[0], layout, 0, layout.num_layers)
    count = layout.num_arrays
    payload = _ordered(arrays[:count], layout, _LOGICAL)
    return payload, _ordered(arrays[count:], layout, _LOGICAL.removesuffix("D")) if layout.quantized else None


def arrays_of(elements: Elements, layout: KVLayout) -> tuple[jax.Array, ...]:
    """Returns the arrays of a cache that holds elements given in logical order."""
    parts = [part for part in elements if part is not None]
    if layout.is_packed:
        return (_packed(jnp.zeros(layout.array_shape, jnp.uint8), parts, layout, 0),)
    if layout.kind is LayoutKind.LAYER_SEPARATE:
        return tuple(part[:, layer] for part in parts for layer in range(layout.num_layers))
    return tuple(part.transpose([_LOGICAL.index(axis) for axis in layout.axes[: part.ndim]]) for part in parts)


def layer_of(blocks: jax.Array, staging: KVLayout, layer: int) -> Elements:
    """Returns one layer of an array whose blocks are runs, in logical order."""
    if staging.is_packed:
        payload, scales = _unpacked(blocks, staging, layer, 1)
        return payload[:, 0], scales[:, 0]
    rest = staging.axes.replace("L", "")
    part: jax.Array = jax.lax.index_in_dim(blocks, layer, staging.axes.index("L"), keepdims=False)
    return part.transpose([rest.index(axis) for axis in _OF_LAYER]), None


def with_layer(blocks: jax.Array, staging: KVLayout, layer: int, elements: Elements) -> jax.Array:
    """Writes one layer, in logical order, into an array whose blocks are runs."""
    if staging.is_packed:
        return _packed(blocks, [part[:, None] for part in elements if part is not None], staging, layer)
    payload, _ = elements
    order = [_OF_LAYER.index(axis) for axis in staging.axes.replace("L", "")]
    where = staging.axes.index("L")
    written: jax.Array = jax.lax.dynamic_update_index_in_dim(blocks, payload.transpose(order), layer, where)
    return written


def with_scales(blocks: jax.Array, staging: KVLayout, first: int, scales: jax.Array) -> jax.Array:
    """Writes the scales f32[N, l, C, T, H] of layers from `first` on into packed blocks, and nothing else."""
    return _with_region(blocks, scales, staging, _regions(staging)[1], first)


def scales_of(blocks: jax.Array, staging: KVLayout) -> jax.Array:
    """Returns the scales of packed blocks, f32[N, L, C, T, H]."""
    return _unpacked(blocks, staging, 0, staging.num_layers)[1]


def _ordered(arrays: Sequence[jax.Array], layout: KVLayout, order: str) -> jax.Array:
    """The arrays of payload or scales as one, its axes in an order."""
    axes, array = layout.axes, arrays[0]
    if layout.kind is LayoutKind.LAYER_SEPARATE:
        axes, array = "L" + axes, jnp.stack(arrays)
    return array.transpose([axes.index(axis) for axis in order])


def _num_runs(layout: KVLayout) -> int:
    """How many runs, each of payload and scales, a packed block has."""
    return layout.num_kv_heads if layout.kind is LayoutKind.UNIVERSAL else 1


def _regions(layout: KVLayout) -> tuple[tuple[str, int, int], ...]:
    """Payload and scales in such a run: dtype, first byte, bytes of a layer."""
    runs = _num_runs(layout)
    scale_bytes = layout.block_bytes - layout.payload_bytes
    return (
        (layout.dtype, 0, layout.payload_bytes // layout.num_layers // runs),
        ("float32", layout.payload_bytes // runs, scale_bytes // layout.num_layers // runs),
    )


def _packed(blocks: jax.Array, parts: Sequence[jax.Array], layout: KVLayout, first: int) -> jax.Array:
    """Writes payload and scales of layers from `first` on, in logical order, into packed blocks u8[N, P]."""
    for part, region in zip(parts, _regions(layout), strict=True):
        blocks = _with_region(blocks, part, layout, region, first)
    return blocks


def _with_region(
    blocks: jax.Array, part: jax.Array, layout: KVLayout, region: tuple[str, int, int], first: int
) -> jax.Array:
    """Writes layers from `first` on into one region of packed blocks u8[N, P]."""
    _, start, size = region
    runs = blocks.reshape(blocks.shape[0], _num_runs(layout), -1)
    ordered = jnp.moveaxis(part, _HEADS, 1) if layout.kind is LayoutKind.UNIVERSAL else part
    data = jax.lax.bitcast_convert_type(ordered, jnp.uint8).reshape(*runs.shape[:2], -1)
    return jax.lax.dynamic_update_slice(runs, data, (0, 0, start + first * size)).reshape(blocks.shape)


def _unpacked(blocks: jax.Array, layout: KVLayout, first: int, count: int) -> tuple[jax.Array, jax.Array]:
    """Layers from `first` on out of packed blocks u8[N, P], in logical order."""
    num_blocks = blocks.shape[0]
    runs = blocks.reshape(num_blocks, _num_runs(layout), -1)
    heads, tokens = layout.num_kv_heads, (layout.components, layout.block_size)
    universal = layout.kind is LayoutKind.UNIVERSAL
    shape = (num_blocks, heads, count, *tokens) if universal else (num_blocks, count, *tokens, heads)

    def part(dtype: str, start: int, size: int, *row: int) -> jax.Array:
        data = jax.lax.slice_in_dim(runs, start + first * size, start + (first + count) * size, axis=2)
        found = jax.lax.bitcast_convert_type(data.reshape(*shape, *row), jnp.dtype(dtype))
        return jnp.moveaxis(found, 1, _HEADS) if universal else found

    payload, scales = _regions(layout)
    return part(*payload, layout.head_dim), part(*scales, 4)
