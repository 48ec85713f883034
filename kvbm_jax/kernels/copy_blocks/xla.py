"""`copy_blocks` as a gather and a scatter."""

import jax

from kvbm_jax.kernels.gather_blocks.xla import gather_blocks
from kvbm_jax.kernels.scatter_blocks.xla import scatter_blocks
from kvbm_jax.ordering import fence

__all__ = ["copy_blocks"]


def copy_blocks(array: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
    """See `kvbm_jax.kernels.copy_blocks`."""
    # The scatter waits for the gather; otherwise XLA may copy the whole array to keep what the gather reads.
    array, blocks = fence((array, gather_blocks(array, sources)))
    return scatter_blocks(array, targets, blocks)
