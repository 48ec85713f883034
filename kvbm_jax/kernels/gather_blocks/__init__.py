"""Collecting whole blocks of a cache into one array, of the arrangement that tiers and transfers use."""

from collections.abc import Sequence

import jax

from kvbm_jax.errors import LayoutError
from kvbm_jax.kernels.dispatch import Implementation, Operation
from kvbm_jax.kernels.gather_blocks import xla
from kvbm_jax.layout import ElementFormat, KVLayout, LayoutKind

__all__ = ["OPERATION", "gather_blocks"]

OPERATION = Operation(xla.gather_blocks, ("mosaic_gpu",))


def gather_blocks(
    arrays: Sequence[jax.Array],
    layout: KVLayout,
    block_ids: jax.Array,
    *,
    kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS,
    element_format: ElementFormat | None = None,
    out: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Reads blocks of all layers.

    Args:
      arrays: of the cache, those of scales last.
      layout: of the cache, of any kind.
      block_ids: i32[M]; N and beyond reads zeros.
      kind: of the result, one with all of a block in one run: `fully_contiguous` or `universal`.
      element_format: of the result, converted as `kvbm_jax.kernels.quantize` says; None for that of the cache.
      out: an array to write to, in place where the caller donates it; None for a new one.
      implementation: which kernel.

    Returns:
      [M, L, C, T, H, D], or [M, H, L, C, T, D] if universal; u8[M, P], P bytes of a block, if quantised.

    Raises:
      LayoutError: at trace time, if a block of that kind is no run, or `out` does not fit.
      NotImplementedError: if there is no such implementation, or it cannot serve this call.
    """
    expected = layout.with_format(element_format or layout.element_format).staging(block_ids.shape[0], kind)
    if out is not None and (out.shape, out.dtype.name) != (expected.array_shape, expected.array_dtype):
        raise LayoutError(
            f"out is {list(out.shape)} {out.dtype}; {block_ids.shape[0]} blocks ask for "
            f"{list(expected.array_shape)} {expected.array_dtype}"
        )
    return OPERATION(implementation, tuple(arrays), layout, block_ids, expected, out)
