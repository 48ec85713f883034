"""`gather_blocks` by bulk copies: one kernel for each array of the cache."""

import jax
import jax.numpy as jnp

from kvbm_jax.kernels.mosaic import boxes
from kvbm_jax.kernels.mosaic.boxes import Side, move_blocks
from kvbm_jax.kernels.mosaic.heads import by_heads
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
        out = jnp.empty(staging.array_shape, staging.dtype)
    separate = layout.kind is LayoutKind.LAYER_SEPARATE

    def gather(block_ids: jax.Array, out: jax.Array, *arrays: jax.Array) -> tuple[jax.Array]:
        for layer, array in enumerate(arrays):
            source = Side(array, layout.axes, block_ids)
            target = Side(out, staging.axes, layer=layer if separate else None)
            out = move_blocks("gather_blocks", source, target, count=staging.num_blocks)
        return (out,)

    run = staging.axes.replace("N", "M")
    (gathered,) = by_heads(gather, [(block_ids, "M"), (out, run), *((array, layout.axes) for array in arrays)], [run])
    return gathered


def refusal(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    block_ids: jax.Array,
    staging: KVLayout,
    out: jax.Array | None,
) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    return boxes.refusal(layout, staging)
