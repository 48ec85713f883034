"""Copying whole blocks within a cache, as copy-on-write does."""

import jax

from kvbm_jax.errors import LayoutError
from kvbm_jax.kernels import dispatch
from kvbm_jax.kernels.copy_blocks import xla

__all__ = ["copy_blocks"]

_IMPLEMENTATIONS = {"xla": xla.copy_blocks}


def copy_blocks(
    array: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    *,
    implementation: dispatch.Implementation | None = None,
) -> jax.Array:
    """Copies `sources[i]` to `targets[i]`, all reads before all writes; in place where `array` is donated.

    Args:
      array: [N, ...].
      sources: i32[M].
      targets: i32[M], distinct; N and beyond drops the copy.
      implementation: which kernel.

    Returns:
      The array with the copies made.

    Raises:
      LayoutError: at trace time, if there are not as many sources as targets.
      NotImplementedError: if there is no such implementation.
    """
    if sources.shape != targets.shape:
        raise LayoutError(f"{sources.shape[0]} sources for {targets.shape[0]} targets; give one target for each")
    return dispatch.select("copy_blocks", _IMPLEMENTATIONS, implementation)(array, sources, targets)
