"""`copy_blocks` by bulk copies: at once if no block is read and written, else through an array in between."""

import jax
import jax.numpy as jnp

from kvbm_jax.kernels.mosaic import boxes
from kvbm_jax.kernels.mosaic.boxes import Side, move_blocks
from kvbm_jax.layout import KVLayout

__all__ = ["copy_blocks", "refusal"]


def copy_blocks(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    sources: jax.Array,
    targets: jax.Array,
    disjoint: bool,
) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.copy_blocks`."""
    count = sources.shape[0]

    def copied(array: jax.Array) -> jax.Array:
        source = Side(array, layout.axes, sources)
        if not disjoint:
            shape = [count if axis == "N" else size for axis, size in zip(layout.axes, array.shape, strict=True)]
            between = Side(jnp.empty(shape, array.dtype), layout.axes)
            source = Side(move_blocks("copy_blocks", source, between, count=count), layout.axes)
        return move_blocks("copy_blocks", source, Side(array, layout.axes, targets), count=count)

    return tuple(copied(array) for array in arrays)


def refusal(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    sources: jax.Array,
    targets: jax.Array,
    disjoint: bool,
) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    return boxes.refusal(layout)
