"""`copy_blocks` by bulk copies: at once if no block is read and written, else through an array in between.

Scales that are arrays of their own are copied in XLA.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from kvbm_jax.kernels.copy_blocks import xla
from kvbm_jax.kernels.mosaic import boxes
from kvbm_jax.kernels.mosaic.boxes import Side, as_bytes, move_blocks, whole_blocks
from kvbm_jax.kernels.mosaic.heads import by_heads, letters_of
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
        all_blocks = whole_blocks(array) if layout.is_packed else Side(as_bytes(array, layout), layout.axes)
        source = replace(all_blocks, block_ids=sources)
        if not disjoint:
            shape = [count if axis == "N" else size for axis, size in all_blocks.sizes.items()]
            between = Side(jnp.empty(shape, all_blocks.array.dtype), all_blocks.axes)
            source = Side(move_blocks("copy_blocks", source, between, count=count), all_blocks.axes)
        moved = move_blocks("copy_blocks", source, replace(all_blocks, block_ids=targets), count=count)
        return jax.lax.bitcast_convert_type(moved, array.dtype).reshape(array.shape)

    def copy(sources: jax.Array, targets: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
        elements = tuple(copied(sources, targets, array) for array in arrays[: layout.num_arrays])
        return elements + xla.copy_blocks(arrays[layout.num_arrays :], layout, sources, targets, disjoint)

    given = letters_of(arrays, layout)
    results = by_heads(copy, [(sources, "M"), (targets, "M"), *given], [letters for _, letters in given])
    return tuple(new.reshape(old.shape) for new, old in zip(results, arrays, strict=True))


def refusal(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    sources: jax.Array,
    targets: jax.Array,
    disjoint: bool,
) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    return boxes.refusal(layout)
