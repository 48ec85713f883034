"""Copying whole blocks within a cache, as copy-on-write and resizing do."""

from collections.abc import Sequence

import jax

from kvbm_jax.errors import LayoutError
from kvbm_jax.kernels.copy_blocks import xla
from kvbm_jax.kernels.dispatch import Implementation, Operation
from kvbm_jax.layout import KVLayout

__all__ = ["OPERATION", "copy_blocks"]

OPERATION = Operation(xla.copy_blocks, ("mosaic_gpu",))


def copy_blocks(
    arrays: Sequence[jax.Array],
    layout: KVLayout,
    sources: jax.Array,
    targets: jax.Array,
    *,
    disjoint: bool = False,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, ...]:
    """Copies block `sources[i]` to `targets[i]`, in all layers; in place where the caller donates `arrays`.

    All reads come before all writes.

    Args:
      arrays: of the cache, those of scales last.
      layout: of the cache, of any kind.
      sources: i32[M].
      targets: i32[M], distinct; N and beyond drops the copy.
      disjoint: whether the caller promises that no block is a source and a target, as in copy-on-write, whose targets
        are fresh; some kernels then need no array in between.
      implementation: which kernel.

    Returns:
      The arrays with the copies made.

    Raises:
      LayoutError: at trace time, if there are not as many sources as targets.
      NotImplementedError: if there is no such implementation, or it cannot serve this call.
    """
    if sources.shape != targets.shape:
        raise LayoutError(f"{sources.shape[0]} sources for {targets.shape[0]} targets; give one target for each")
    return OPERATION(implementation, tuple(arrays), layout, sources, targets, disjoint)
