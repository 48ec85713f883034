"""`gather_blocks` as an XLA gather of each array."""

import jax
import jax.numpy as jnp

from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["gather_blocks"]


def gather_blocks(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    block_ids: jax.Array,
    staging: KVLayout,
    out: jax.Array | None,
) -> jax.Array:
    """See `kvbm_jax.kernels.gather_blocks`; `staging` describes the result."""
    axis = layout.axes.index("N")
    parts = [jnp.take(array, block_ids, axis=axis, mode="fill", fill_value=0) for array in arrays]
    if layout.kind is not LayoutKind.LAYER_SEPARATE:
        blocks = parts[0].transpose([layout.axes.index(letter) for letter in staging.axes])
        return blocks if out is None else out.at[:].set(blocks)
    own = [layout.axes.index(letter) for letter in staging.axes.replace("L", "")]
    place = staging.axes.index("L")
    parts = [part.transpose(own) for part in parts]
    if out is None:
        return jnp.stack(parts, axis=place)
    for layer, part in enumerate(parts):
        out = jax.lax.dynamic_update_index_in_dim(out, part, layer, place)
    return out
