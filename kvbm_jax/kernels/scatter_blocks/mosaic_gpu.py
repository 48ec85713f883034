"""`scatter_blocks` by bulk copies: one kernel for each array of the cache."""

import jax

from kvbm_jax.kernels.mosaic import boxes
from kvbm_jax.kernels.mosaic.boxes import Side, move_blocks
from kvbm_jax.kernels.mosaic.heads import by_heads
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
    separate = layout.kind is LayoutKind.LAYER_SEPARATE

    def scatter(block_ids: jax.Array, blocks: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(
            move_blocks(
                "scatter_blocks",
                Side(blocks, staging.axes, layer=layer if separate else None),
                Side(array, layout.axes, block_ids),
                count=staging.num_blocks,
            )
            for layer, array in enumerate(arrays)
        )

    given = [(block_ids, "M"), (blocks, staging.axes.replace("N", "M")), *((array, layout.axes) for array in arrays)]
    return by_heads(scatter, given, [layout.axes] * len(arrays))


def refusal(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    block_ids: jax.Array,
    blocks: jax.Array,
    staging: KVLayout,
) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    return boxes.refusal(layout, staging)
