"""`scatter_blocks` as one XLA scatter."""

import jax

__all__ = ["scatter_blocks"]


def scatter_blocks(array: jax.Array, block_ids: jax.Array, blocks: jax.Array) -> jax.Array:
    """See `kvbm_jax.kernels.scatter_blocks`."""
    return array.at[block_ids].set(blocks.astype(array.dtype), mode="drop")
