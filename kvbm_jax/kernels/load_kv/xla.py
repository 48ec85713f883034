"""`load_kv` as one XLA gather."""

import jax

__all__ = ["load_kv"]


def load_kv(array: jax.Array, slots: jax.Array) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.load_kv`."""
    block_size = array.shape[2]
    rows = array.at[slots // block_size, :, slots % block_size].get(mode="fill", fill_value=0)
    return tuple(rows[:, component] for component in range(array.shape[1]))
