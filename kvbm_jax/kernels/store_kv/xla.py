"""`store_kv` as one XLA scatter."""

import jax

__all__ = ["store_kv"]


def store_kv(array: jax.Array, data: jax.Array, slots: jax.Array) -> jax.Array:
    """See `kvbm_jax.kernels.store_kv`."""
    block_size = array.shape[2]
    return array.at[slots // block_size, :, slots % block_size].set(data.astype(array.dtype), mode="drop")
