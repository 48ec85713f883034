"""`gather_blocks` as an XLA gather of each array."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from kvbm_jax.kernels.arrangement import arrays_of, elements_of, with_layer
from kvbm_jax.kernels.quantize import convert
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
    parts = tuple(jnp.take(array, block_ids, axis=axis, mode="fill", fill_value=0) for array in arrays)
    formats = (layout.element_format, staging.element_format)
    if out is not None and layout.kind is LayoutKind.LAYER_SEPARATE:
        # Layer by layer, so that no array of all of them is made in between.
        for layer in range(layout.num_layers):
            payload, *scales = parts[layer :: layout.num_layers]
            out = with_layer(out, staging, layer, convert(payload, scales[0] if scales else None, *formats))
        return out
    taken = replace(layout, num_blocks=staging.num_blocks)
    [blocks] = parts if taken == staging else arrays_of(convert(*elements_of(parts, taken), *formats), staging)
    return blocks if out is None else out.at[:].set(blocks)
