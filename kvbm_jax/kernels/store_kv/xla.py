"""`store_kv` as one XLA scatter."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ["store_kv"]


def store_kv(array: jax.Array, data: Sequence[jax.Array], slots: jax.Array) -> jax.Array:
    """See `kvbm_jax.kernels.store_kv`."""
    block_size = array.shape[2]
    rows = jnp.stack(data, axis=1).astype(array.dtype)
    return array.at[slots // block_size, :, slots % block_size].set(rows, mode="drop")
