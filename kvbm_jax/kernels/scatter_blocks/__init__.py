"""Putting whole blocks, arranged as tiers and transfers have them, into their places in a cache."""

from collections.abc import Sequence

import jax

from kvbm_jax.errors import LayoutError
from kvbm_jax.kernels.dispatch import Implementation, Operation
from kvbm_jax.kernels.scatter_blocks import xla
from kvbm_jax.layout import ElementFormat, KVLayout, LayoutKind

__all__ = ["OPERATION", "scatter_blocks"]

OPERATION = Operation(xla.scatter_blocks, ("mosaic_gpu",))


def scatter_blocks(
    arrays: Sequence[jax.Array],
    layout: KVLayout,
    block_ids: jax.Array,
    blocks: jax.Array,
    *,
    kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS,
    element_format: ElementFormat | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """Writes blocks of all layers; in place where the caller donates `arrays`.

    Args:
      arrays: of the cache, those of scales last.
      layout: of the cache, of any kind.
      block_ids: i32[M], distinct; N and beyond drops the block.
      blocks: [M, L, C, T, H, D], or [M, H, L, C, T, D] if universal; u8[M, P], P bytes of a block, if quantised.
        Plain ones are cast to the dtype that is named for them.
      kind: of `blocks`, `fully_contiguous` or `universal`.
      element_format: of `blocks`, converted as `kvbm_jax.kernels.quantize` says; None for that of the cache.
      implementation: which kernel.

    Returns:
      The arrays with the blocks written.

    Raises:
      LayoutError: at trace time, if the shapes do not fit.
      NotImplementedError: if there is no such implementation, or it cannot serve this call.
    """
    staging = layout.with_format(element_format or layout.element_format).staging(block_ids.shape[0], kind)
    if blocks.shape != staging.array_shape:
        raise LayoutError(
            f"blocks {list(staging.axes)} are {list(blocks.shape)}; {block_ids.shape[0]} ids and the cache ask for "
            f"{list(staging.array_shape)}"
        )
    if not staging.is_packed:
        blocks = blocks.astype(staging.dtype)
    elif blocks.dtype != staging.array_dtype:
        raise LayoutError(f"blocks are {blocks.dtype}; quantised ones are bytes, {staging.array_dtype}")
    return OPERATION(implementation, tuple(arrays), layout, block_ids, blocks, staging)
