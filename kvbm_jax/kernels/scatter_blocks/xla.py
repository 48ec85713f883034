"""`scatter_blocks` as an XLA scatter into each array."""

import jax

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
    if layout.kind is LayoutKind.LAYER_SEPARATE:
        own = [staging.axes.replace("L", "").index(letter) for letter in layout.axes]
        place = staging.axes.index("L")
        return tuple(
            array.at[block_ids].set(
                jax.lax.index_in_dim(blocks, layer, place, keepdims=False).transpose(own), mode="drop"
            )
            for layer, array in enumerate(arrays)
        )
    blocks = blocks.transpose([staging.axes.index(letter) for letter in layout.axes])
    where = (slice(None),) * layout.axes.index("N") + (block_ids,)
    return (arrays[0].at[where].set(blocks, mode="drop"),)
