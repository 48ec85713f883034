"""`permute_blocks` as an XLA transposition."""

import jax
import jax.numpy as jnp

from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["permute_blocks"]


def permute_blocks(arrays: tuple[jax.Array, ...], layout: KVLayout, target: KVLayout) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.permute_blocks`; `target` describes the result."""
    if layout.kind is target.kind:
        return arrays
    axes = layout.axes
    array = arrays[0]
    if layout.kind is LayoutKind.LAYER_SEPARATE:
        axes, array = "L" + axes, jnp.stack(arrays)
    if target.kind is LayoutKind.LAYER_SEPARATE:
        return tuple(array.transpose([axes.index(letter) for letter in "L" + target.axes]))
    return (array.transpose([axes.index(letter) for letter in target.axes]),)
