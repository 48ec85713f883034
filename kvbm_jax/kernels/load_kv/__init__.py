"""Reading the keys and values of tokens from their slots."""

import jax

from kvbm_jax.kernels import dispatch
from kvbm_jax.kernels.load_kv import xla

__all__ = ["load_kv"]

_IMPLEMENTATIONS = {"xla": xla.load_kv}


def load_kv(array: jax.Array, slots: jax.Array, *, implementation: dispatch.Implementation | None = None) -> jax.Array:
    """Reads one row per slot.

    Args:
      array: [N, C, T, H, D].
      slots: i32[S]; N * T and beyond reads zeros.
      implementation: which kernel.

    Returns:
      [S, C, H, D].

    Raises:
      NotImplementedError: if there is no such implementation.
    """
    return dispatch.select("load_kv", _IMPLEMENTATIONS, implementation)(array, slots)
