"""`gather_blocks` as one XLA gather."""

import jax

__all__ = ["gather_blocks"]


def gather_blocks(array: jax.Array, block_ids: jax.Array) -> jax.Array:
    """See `kvbm_jax.kernels.gather_blocks`."""
    return array.at[block_ids].get(mode="fill", fill_value=0)
