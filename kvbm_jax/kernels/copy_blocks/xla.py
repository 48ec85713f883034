"""`copy_blocks` as a gather and a scatter of each array."""

import jax
import jax.numpy as jnp

from kvbm_jax.layout import KVLayout
from kvbm_jax.ordering import fence

__all__ = ["copy_blocks"]


def copy_blocks(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    sources: jax.Array,
    targets: jax.Array,
    disjoint: bool,
) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.copy_blocks`."""
    axis = layout.axes.index("N")
    where = (slice(None),) * axis + (targets,)

    def copied(array: jax.Array) -> jax.Array:
        # The scatter waits for the gather; otherwise XLA may copy the whole array to keep what the gather reads.
        array, blocks = fence((array, jnp.take(array, sources, axis=axis, mode="fill", fill_value=0)))
        return array.at[where].set(blocks, mode="drop")

    return tuple(copied(array) for array in arrays)
