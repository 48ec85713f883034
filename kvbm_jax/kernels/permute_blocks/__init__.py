"""Rearranging a whole cache from one layout kind to another."""

from collections.abc import Sequence

import jax

from kvbm_jax.kernels.dispatch import Implementation, Operation
from kvbm_jax.kernels.permute_blocks import xla
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["OPERATION", "permute_blocks"]

OPERATION = Operation(xla.permute_blocks, ("mosaic_gpu",))


def permute_blocks(
    arrays: Sequence[jax.Array],
    layout: KVLayout,
    kind: LayoutKind,
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """Makes the arrays of another kind from those of a cache.

    Args:
      arrays: of the cache.
      layout: of the cache, of any kind.
      kind: of the result.
      implementation: which kernel.

    Returns:
      Arrays as `layout` with that kind describes them: L, or one.

    Raises:
      LayoutError: if the new layout is out of range.
      NotImplementedError: if there is no such implementation, or it cannot serve this call.
    """
    return OPERATION(implementation, tuple(arrays), layout, layout.with_kind(kind))
