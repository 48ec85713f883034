"""`copy_blocks` by bulk copies: at once if no block is read and written, else through an array in between."""

import jax
import jax.numpy as jnp

from kvbm_jax.kernels.mosaic import boxes
from kvbm_jax.kernels.mosaic.boxes import Side, move_blocks
from kvbm_jax.kernels.mosaic.heads import by_heads
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

    def copied(sources: jax.Array, targets: jax.Array, array: jax.Array) -> jax.Array:
        source = Side(array, layout.axes, sources)
        if not disjoint:
            shape = [count if axis == "N" else size for axis, size in zip(layout.axes, array.shape, strict=True)]
            between = Side(jnp.empty(shape, array.dtype), layout.axes)
            source = Side(move_blocks("copy_blocks", source, between, count=count), layout.axes)
        return move_blocks("copy_blocks", source, Side(array, layout.axes, targets), count=count)

    def copy(sources: jax.Array, targets: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(copied(sources, targets, array) for array in arrays)

    given = [(sources, "M"), (targets, "M"), *((array, layout.axes) for array in arrays)]
    return by_heads(copy, given, [layout.axes] * len(arrays))


def refusal(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    sources: jax.Array,
    targets: jax.Array,
    disjoint: bool,
) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    return boxes.refusal(layout)
