"""`gather_blocks` by bulk copies: one kernel for each array of the cache; scales follow in XLA.

Blocks of a plain cache that are quantised pass through registers, a kernel for each layer.
"""

import jax
import jax.numpy as jnp

from kvbm_jax.kernels.arrangement import with_scales
from kvbm_jax.kernels.mosaic import boxes, conversions
from kvbm_jax.kernels.mosaic.boxes import move_blocks, side_of, whole_blocks
from kvbm_jax.kernels.mosaic.conversions import quantize_layer, rows_of_layer
from kvbm_jax.kernels.mosaic.heads import by_heads, letters_of, share_of, whole
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["gather_blocks", "refusal"]


def gather_blocks(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    block_ids: jax.Array,
    staging: KVLayout,
    out: jax.Array | None,
) -> jax.Array:
    """See `kvbm_jax.kernels.gather_blocks`; `staging` describes the result."""
    if out is None:
        out = jnp.empty(staging.array_shape, staging.array_dtype)
    if layout.element_format != staging.element_format:
        return _quantize(arrays, layout, block_ids, staging, out)

    def gather(out: jax.Array, block_ids: jax.Array, *arrays: jax.Array) -> tuple[jax.Array]:
        own, run = share_of(layout, arrays[0]), share_of(staging, out)
        gathered = _gather([whole(array, own) for array in arrays], own, block_ids, run, whole(out, run))
        return (gathered.reshape(out.shape),)

    [target] = letters_of([out], staging, "M")
    (gathered,) = by_heads(gather, [target, (block_ids, "M"), *letters_of(arrays, layout)], [target[1]])
    return gathered.reshape(out.shape)


def _gather(
    arrays: list[jax.Array], layout: KVLayout, block_ids: jax.Array, staging: KVLayout, out: jax.Array
) -> jax.Array:
    count = staging.num_blocks
    if layout.is_packed:
        source, target = whole_blocks(arrays[0], block_ids), whole_blocks(out)
        return move_blocks("gather_blocks", source, target, count=count).reshape(out.shape)
    separate = layout.kind is LayoutKind.LAYER_SEPARATE
    for layer, array in enumerate(arrays[: layout.num_arrays]):
        target = side_of(out, staging, layer=layer if separate else None)
        out = move_blocks("gather_blocks", side_of(array, layout, block_ids), target, count=count)
    for layer, scales in enumerate(arrays[layout.num_arrays :]):
        where = (slice(None),) * layout.axes.index("N") + (block_ids,)
        found = scales.at[where].get(mode="fill", fill_value=0)
        out = with_scales(out, staging, layer, found[:, None] if separate else found.swapaxes(0, 1))
    return out


def _quantize(
    arrays: tuple[jax.Array, ...], layout: KVLayout, block_ids: jax.Array, staging: KVLayout, out: jax.Array
) -> jax.Array:
    for layer in range(layout.num_layers):
        view, ids = rows_of_layer(arrays, layout, layer, block_ids)
        out, scales = quantize_layer(view, ids, out, staging, layer)
        shape = (staging.num_blocks, 1, layout.components, layout.block_size, layout.num_kv_heads)
        out = with_scales(out, staging, layer, scales.reshape(shape))
    return out


def refusal(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    block_ids: jax.Array,
    staging: KVLayout,
    out: jax.Array | None,
) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    if not layout.quantized and staging.quantized:
        return conversions.refusal(layout, staging)
    return boxes.refusal(layout, staging)
