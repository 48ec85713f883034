"""`scatter_blocks` by bulk copies: one kernel for each array of the cache; scales follow in XLA.

Quantised blocks that go into a plain cache pass through registers, a kernel for each layer.
"""

import jax

from kvbm_jax.kernels.arrangement import scales_of
from kvbm_jax.kernels.mosaic import boxes, conversions
from kvbm_jax.kernels.mosaic.boxes import move_blocks, side_of, whole_blocks
from kvbm_jax.kernels.mosaic.conversions import dequantize_layer, rows_of_layer
from kvbm_jax.kernels.mosaic.heads import by_heads, letters_of, share_of, whole
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["refusal", "scatter_blocks"]


def scatter_blocks(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    block_ids: jax.Array,
    blocks: jax.Array,
    staging: KVLayout,
) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.scatter_blocks`; `staging` describes `blocks`."""
    if layout.element_format != staging.element_format:
        return _dequantize(arrays, layout, block_ids, blocks, staging)

    def scatter(blocks: jax.Array, block_ids: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        own, run = share_of(layout, arrays[0]), share_of(staging, blocks)
        scattered = _scatter([whole(array, own) for array in arrays], own, block_ids, whole(blocks, run), run)
        return tuple(new.reshape(old.shape) for new, old in zip(scattered, arrays, strict=True))

    given = letters_of(arrays, layout)
    scattered = by_heads(
        scatter, [*letters_of([blocks], staging, "M"), (block_ids, "M"), *given], [letters for _, letters in given]
    )
    return tuple(new.reshape(old.shape) for new, old in zip(scattered, arrays, strict=True))


def _scatter(
    arrays: list[jax.Array], layout: KVLayout, block_ids: jax.Array, blocks: jax.Array, staging: KVLayout
) -> tuple[jax.Array, ...]:
    count = staging.num_blocks
    if layout.is_packed:
        source, target = whole_blocks(blocks), whole_blocks(arrays[0], block_ids)
        return (move_blocks("scatter_blocks", source, target, count=count),)
    separate = layout.kind is LayoutKind.LAYER_SEPARATE

    def scattered(array: jax.Array, layer: int) -> jax.Array:
        source = side_of(blocks, staging, layer=layer if separate else None)
        moved = move_blocks("scatter_blocks", source, side_of(array, layout, block_ids), count=count)
        return jax.lax.bitcast_convert_type(moved, array.dtype)

    elements = tuple(scattered(array, layer) for layer, array in enumerate(arrays[: layout.num_arrays]))
    if not layout.quantized:
        return elements
    scales = scales_of(blocks, staging).swapaxes(0, 1)  # [L, M, C, T, H]
    if not separate:
        return *elements, arrays[1].at[:, block_ids].set(scales, mode="drop")
    mine = zip(arrays[layout.num_arrays :], scales, strict=True)
    return *elements, *(array.at[block_ids].set(part, mode="drop") for array, part in mine)


def _dequantize(
    arrays: tuple[jax.Array, ...], layout: KVLayout, block_ids: jax.Array, blocks: jax.Array, staging: KVLayout
) -> tuple[jax.Array, ...]:
    scales = scales_of(blocks, staging).reshape(staging.num_blocks, layout.num_layers, -1)
    results = list(arrays)
    for layer in range(layout.num_layers):
        where = layer if layout.kind is LayoutKind.LAYER_SEPARATE else 0
        view, ids = rows_of_layer(results, layout, layer, block_ids)
        written = dequantize_layer(blocks, scales[:, layer], staging, layer, view, ids)
        results[where] = written.reshape(results[where].shape)
    return tuple(results)


def refusal(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    block_ids: jax.Array,
    blocks: jax.Array,
    staging: KVLayout,
) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    if not layout.quantized and staging.quantized:
        return conversions.refusal(layout, staging)
    return boxes.refusal(layout, staging)
