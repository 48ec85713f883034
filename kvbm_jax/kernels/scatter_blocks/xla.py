"""`scatter_blocks` as an XLA scatter into each array."""

from dataclasses import replace

import jax

from kvbm_jax.kernels.arrangement import arrays_of, elements_of, layer_of
from kvbm_jax.kernels.quantize import convert
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["scatter_blocks"]


def scatter_blocks(
    arrays: tuple[jax.Array, ...],
    layout: KVLayout,
    block_ids: jax.Array,
    blocks: jax.Array,
    staging: KVLayout,
) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.scatter_blocks`; `staging` describes `blocks`."""
    formats = (staging.element_format, layout.element_format)
    incoming = replace(layout, num_blocks=staging.num_blocks)
    if layout.kind is LayoutKind.LAYER_SEPARATE:
        layers = [convert(*layer_of(blocks, staging, layer), *formats) for layer in range(layout.num_layers)]
        parts = tuple(part for parts in zip(*layers, strict=True) for part in parts if part is not None)
    elif incoming == staging:
        parts = (blocks,)
    else:
        parts = arrays_of(convert(*elements_of((blocks,), staging), *formats), incoming)
    where = (slice(None),) * layout.axes.index("N") + (block_ids,)
    return tuple(array.at[where].set(part, mode="drop") for array, part in zip(arrays, parts, strict=True))
