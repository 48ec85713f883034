"""`store_kv` as an XLA scatter for each component."""

from collections.abc import Sequence

import jax

__all__ = ["store_kv"]


def store_kv(array: jax.Array, data: Sequence[jax.Array], slots: jax.Array) -> jax.Array:
    """See `kvbm_jax.kernels.store_kv`."""
    block_size = array.shape[2]
    # One after the other: on a CPU, XLA scatters rows that lie apart in what is scattered many times slower.
    for component, rows in enumerate(data):
        array = array.at[slots // block_size, component, slots % block_size].set(rows.astype(array.dtype), mode="drop")
    return array
