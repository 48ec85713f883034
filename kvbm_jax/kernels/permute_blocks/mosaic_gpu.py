"""`permute_blocks` by bulk copies: one kernel for each layer of separate arrays, else one."""

from dataclasses import replace

import jax
import jax.numpy as jnp

from kvbm_jax.kernels.mosaic import boxes
from kvbm_jax.kernels.mosaic.boxes import Side, move_blocks
from kvbm_jax.kernels.mosaic.heads import by_heads
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["permute_blocks", "refusal"]


def permute_blocks(arrays: tuple[jax.Array, ...], layout: KVLayout, target: KVLayout) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.permute_blocks`; `target` describes the result."""
    if layout.kind is target.kind:
        return arrays
    from_layers, to_layers = (side.kind is LayoutKind.LAYER_SEPARATE for side in (layout, target))

    def permute(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        local = replace(target, num_kv_heads=arrays[0].shape[layout.axes.index("H")])
        results = [jnp.empty(local.array_shape, local.dtype) for _ in range(local.num_arrays)]
        for layer in range(layout.num_layers if from_layers or to_layers else 1):
            here, there = layer if from_layers else 0, layer if to_layers else 0
            results[there] = move_blocks(
                "permute_blocks",
                Side(arrays[here], layout.axes, layer=None if from_layers or not to_layers else layer),
                Side(results[there], local.axes, layer=layer if from_layers else None),
                count=layout.num_blocks,
            )
        return tuple(results)

    return by_heads(permute, [(array, layout.axes) for array in arrays], [target.axes] * target.num_arrays)


def refusal(arrays: tuple[jax.Array, ...], layout: KVLayout, target: KVLayout) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    return boxes.refusal(layout, target)
