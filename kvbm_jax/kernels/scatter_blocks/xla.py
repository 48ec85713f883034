"""`scatter_blocks` as an XLA scatter into each array; on a CPU block by block."""

from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax

from kvbm_jax.kernels.arrangement import arrays_of, elements_of, layer_of
from kvbm_jax.kernels.placing import put_row
from kvbm_jax.kernels.quantize import convert
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["scatter_blocks"]


def scatter_blocks(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    block_ids: jax.Array,
    blocks: jax.Array,
    staging: KVLayout,
) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.scatter_blocks`; `staging` describes `blocks`."""
    axis = layout.axes.index("N")

    def at_once(arrays: tuple[jax.Array, ...], ids: jax.Array, blocks: jax.Array) -> tuple[jax.Array, ...]:
        where = (slice(None),) * axis + (ids,)
        parts = _parts_of(blocks, staging, layout)
        return tuple(array.at[where].set(part, mode="drop") for array, part in zip(arrays, parts, strict=True))

    def one_by_one(arrays: tuple[jax.Array, ...], ids: jax.Array, blocks: jax.Array) -> tuple[jax.Array, ...]:
        def put(m: jax.Array, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            block = lax.dynamic_slice_in_dim(blocks, m, 1)
            parts = _parts_of(block, replace(staging, num_blocks=1), layout)
            pairs = zip(arrays, parts, strict=True)
            return tuple(put_row(array, ids[m], part, axis=axis) for array, part in pairs)

        written: tuple[jax.Array, ...] = lax.fori_loop(0, ids.shape[0], put, arrays)
        return written

    ids = jnp.asarray(block_ids)  # outside of a jit it may be numpy's, which a loop cannot index
    written: tuple[jax.Array, ...] = lax.platform_dependent(arrays, ids, blocks, cpu=one_by_one, default=at_once)
    return written


def _parts_of(blocks: jax.Array, staging: KVLayout, layout: KVLayout) -> tuple[jax.Array, ...]:
    """What of some blocks goes into each array of a cache."""
    formats = (staging.element_format, layout.element_format)
    incoming = replace(layout, num_blocks=staging.num_blocks)
    if layout.kind is LayoutKind.LAYER_SEPARATE:
        layers = [convert(*layer_of(blocks, staging, layer), *formats) for layer in range(layout.num_layers)]
        return tuple(part for parts in zip(*layers, strict=True) for part in parts if part is not None)
    if incoming == staging:
        return (blocks,)
    return arrays_of(convert(*elements_of((blocks,), staging), *formats), incoming)
