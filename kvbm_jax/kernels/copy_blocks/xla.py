"""`copy_blocks` as a gather and a scatter of each array; on a CPU block by block, if none is read and written."""

import jax
import jax.numpy as jnp
from jax import lax

from kvbm_jax.kernels.placing import put_row
from kvbm_jax.layout import KVLayout
from kvbm_jax.ordering import fence

__all__ = ["copy_blocks"]


def copy_blocks(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    sources: jax.Array,
    targets: jax.Array,
    disjoint: bool,
) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.copy_blocks`."""
    axis = layout.axes.index("N")

    def at_once(array: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
        # The scatter waits for the gather; otherwise XLA may copy the whole array to keep what the gather reads.
        array, blocks = fence((array, jnp.take(array, sources, axis=axis, mode="fill", fill_value=0)))
        return array.at[(slice(None),) * axis + (targets,)].set(blocks, mode="drop")

    def one_by_one(array: jax.Array, sources: jax.Array, targets: jax.Array) -> jax.Array:
        def copy(m: jax.Array, array: jax.Array) -> jax.Array:
            block = jnp.take(array, sources[m][None], axis=axis, mode="fill", fill_value=0)
            return put_row(array, targets[m], block, axis=axis)

        written: jax.Array = lax.fori_loop(0, sources.shape[0], copy, array)
        return written

    if not disjoint:
        return tuple(at_once(array, sources, targets) for array in arrays)
    ids = jnp.asarray(sources), jnp.asarray(targets)  # outside of a jit they may be numpy's, which a loop cannot index
    return tuple(lax.platform_dependent(array, *ids, cpu=one_by_one, default=at_once) for array in arrays)
