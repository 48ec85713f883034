"""Rearranging a whole cache from one layout kind to another, and from one element format to another."""

from collections.abc import Sequence

import jax

from kvbm_jax.kernels.dispatch import Implementation, Operation
from kvbm_jax.kernels.permute_blocks import xla
from kvbm_jax.layout import ElementFormat, KVLayout, LayoutKind

__all__ = ["OPERATION", "permute_blocks"]

OPERATION = Operation(xla.permute_blocks, ("mosaic_gpu",))


def permute_blocks(
    arrays: Sequence[jax.Array],
    layout: KVLayout,
    kind: LayoutKind,
    *,
    element_format: ElementFormat | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """Makes the arrays of another kind from those of a cache.

    Args:
      arrays: of the cache, those of scales last.
      layout: of the cache, of any kind.
      kind: of the result.
      element_format: of the result, converted as `kvbm_jax.kernels.quantize` says; None for that of the cache.
      implementation: which kernel.

    Returns:
      Arrays as `layout` with that kind and format describes them.

    Raises:
      LayoutError: if the new layout is out of range.
      NotImplementedError: if there is no such implementation, or it cannot serve this call.
    """
    target = layout.with_kind(kind).with_format(element_format or layout.element_format)
    return OPERATION(implementation, tuple(arrays), layout, target)
