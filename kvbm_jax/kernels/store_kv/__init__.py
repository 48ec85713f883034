"""Writing the keys and values of new tokens into their slots."""

import jax

from kvbm_jax.errors import LayoutError
from kvbm_jax.kernels import dispatch
from kvbm_jax.kernels.store_kv import xla

__all__ = ["store_kv"]

_IMPLEMENTATIONS = {"xla": xla.store_kv}


def store_kv(
    array: jax.Array,
    data: jax.Array,
    slots: jax.Array,
    *,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """Writes one row per token; in place where the caller donates `array`.

    Args:
      array: [N, C, T, H, D].
      data: [S, C, H, D], cast to the dtype of `array`.
      slots: i32[S], block * T + offset, distinct; N * T and beyond drops the row.
      implementation: which kernel.

    Returns:
      The array with the rows written.

    Raises:
      LayoutError: at trace time, if the shapes do not fit.
      NotImplementedError: if there is no such implementation.
    """
    _, components, _, heads, dim = array.shape
    expected = (slots.shape[0], components, heads, dim)
    if data.shape != expected:
        raise LayoutError(
            f"keys and values have shape [S, C, H, D] = {list(data.shape)}; the cache and {slots.shape[0]} slots "
            f"ask for {list(expected)}"
        )
    return dispatch.select("store_kv", _IMPLEMENTATIONS, implementation)(array, data, slots)
