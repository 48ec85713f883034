"""Putting whole blocks from a contiguous array into their places."""

import jax

from kvbm_jax.errors import LayoutError
from kvbm_jax.kernels import dispatch
from kvbm_jax.kernels.scatter_blocks import xla

__all__ = ["scatter_blocks"]

_IMPLEMENTATIONS = {"xla": xla.scatter_blocks}


def scatter_blocks(
    array: jax.Array,
    block_ids: jax.Array,
    blocks: jax.Array,
    *,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """Writes blocks; in place where the caller donates `array`.

    Args:
      array: [N, ...].
      block_ids: i32[M], distinct; N and beyond drops the block.
      blocks: [M, ...], cast to the dtype of `array`.
      implementation: which kernel.

    Returns:
      The array with the blocks written.

    Raises:
      LayoutError: at trace time, if the shapes do not fit.
      NotImplementedError: if there is no such implementation.
    """
    expected = (block_ids.shape[0], *array.shape[1:])
    if blocks.shape != expected:
        raise LayoutError(f"blocks have shape {list(blocks.shape)}; the cache asks for {list(expected)}")
    return dispatch.select("scatter_blocks", _IMPLEMENTATIONS, implementation)(array, block_ids, blocks)
