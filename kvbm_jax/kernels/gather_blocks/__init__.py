"""Collecting whole blocks into a contiguous array."""

import jax

from kvbm_jax.kernels import dispatch
from kvbm_jax.kernels.gather_blocks import xla

__all__ = ["gather_blocks"]

_IMPLEMENTATIONS = {"xla": xla.gather_blocks}


def gather_blocks(
    array: jax.Array, block_ids: jax.Array, *, implementation: dispatch.Implementation | None = None
) -> jax.Array:
    """Reads blocks.

    Args:
      array: [N, ...].
      block_ids: i32[M]; N and beyond reads zeros.
      implementation: which kernel.

    Returns:
      [M, ...].

    Raises:
      NotImplementedError: if there is no such implementation.
    """
    return dispatch.select("gather_blocks", _IMPLEMENTATIONS, implementation)(array, block_ids)
