"""Reading the keys and values of tokens from their slots."""

import jax

from kvbm_jax.kernels.dispatch import Implementation, Operation
from kvbm_jax.kernels.load_kv import xla

__all__ = ["OPERATION", "load_kv"]

OPERATION = Operation(xla.load_kv, ("mosaic_gpu",))


def load_kv(
    array: jax.Array, slots: jax.Array, *, implementation: Implementation | None = None
) -> tuple[jax.Array, ...]:
    """Reads one row per slot and component.

    Args:
      array: [N, C, T, H, D].
      slots: i32[S]; N * T and beyond reads zeros.
      implementation: which kernel.

    Returns:
      C arrays [S, H, D].

    Raises:
      NotImplementedError: if there is no such implementation, or it cannot serve this call.
    """
    return OPERATION(implementation, array, slots)
