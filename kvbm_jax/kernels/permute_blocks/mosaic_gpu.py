"""`permute_blocks` by bulk copies: one kernel for each layer of separate arrays, else one.

Scales that are arrays of their own are permuted in XLA.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from kvbm_jax.kernels.mosaic import boxes
from kvbm_jax.kernels.mosaic.boxes import Side, as_bytes, move_blocks
from kvbm_jax.kernels.mosaic.heads import by_heads, letters_of, share_of
from kvbm_jax.kernels.permute_blocks import xla
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["permute_blocks", "refusal"]


def permute_blocks(arrays: tuple[jax.Array, ...], layout: KVLayout, target: KVLayout) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.permute_blocks`; `target` describes the result."""
    if layout.kind is target.kind:
        return arrays
    from_layers, to_layers = (side.kind is LayoutKind.LAYER_SEPARATE for side in (layout, target))

    def permute(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        own = share_of(layout, arrays[0])
        local = replace(target, num_kv_heads=own.num_kv_heads)
        moving = jnp.uint8 if layout.quantized else local.dtype
        results = [jnp.empty(local.array_shape, moving) for _ in range(local.num_arrays)]
        for layer in range(layout.num_layers if from_layers or to_layers else 1):
            here, there = layer if from_layers else 0, layer if to_layers else 0
            results[there] = move_blocks(
                "permute_blocks",
                Side(
                    as_bytes(arrays[here], layout),
                    layout.axes,
                    layer=None if from_layers or not to_layers else layer,
                ),
                Side(results[there], local.axes, layer=layer if from_layers else None),
                count=layout.num_blocks,
            )
        elements = tuple(jax.lax.bitcast_convert_type(array, target.dtype) for array in results)
        if not layout.quantized:
            return elements
        # Scales are the one element of plain rows.
        of_scales = (replace(one, dtype="float32", quantized=False, head_dim=1) for one in (own, local))
        scales = tuple(array[..., None] for array in arrays[layout.num_arrays :])
        return elements + tuple(array[..., 0] for array in xla.permute_blocks(scales, *of_scales))

    axes = [target.axes] * target.num_arrays
    if layout.quantized:
        axes += [letters.removesuffix("D") for letters in axes]
    return by_heads(permute, letters_of(arrays, layout), axes)


def refusal(arrays: tuple[jax.Array, ...], layout: KVLayout, target: KVLayout) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    if layout.is_packed or target.is_packed:
        return "it does not take quantised blocks apart or put them together"
    return boxes.refusal(layout, target)
