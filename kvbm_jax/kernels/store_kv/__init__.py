"""Writing the keys and values of new tokens into their slots."""

from collections.abc import Sequence

import jax

from kvbm_jax.errors import LayoutError
from kvbm_jax.kernels.dispatch import Implementation, Operation
from kvbm_jax.kernels.store_kv import xla

__all__ = ["OPERATION", "store_kv"]

OPERATION = Operation(xla.store_kv, ("mosaic_gpu",))


def store_kv(
    array: jax.Array,
    data: Sequence[jax.Array],
    slots: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Writes one row per token and component; in place where the caller donates `array`.

    Args:
      array: [N, C, T, H, D].
      data: C arrays [S, H, D], keys and values, cast to the dtype of `array`.
      slots: i32[S], block * T + offset, distinct; N * T and beyond drops the row.
      implementation: which kernel.

    Returns:
      The array with the rows written.

    Raises:
      LayoutError: at trace time, if the shapes do not fit.
      NotImplementedError: if there is no such implementation, or it cannot serve this call.
    """
    _, components, _, heads, dim = array.shape
    expected = (slots.shape[0], heads, dim)
    if len(data) != components or any(component.shape != expected for component in data):
        raise LayoutError(
            f"keys and values have shapes {[list(component.shape) for component in data]}; the cache and "
            f"{slots.shape[0]} slots ask for {components} of [S, H, D] = {list(expected)}"
        )
    return OPERATION(implementation, array, data, slots)
