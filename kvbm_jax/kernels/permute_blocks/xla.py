"""`permute_blocks` as an XLA transposition."""

import jax

from kvbm_jax.kernels.arrangement import arrays_of, elements_of
from kvbm_jax.kernels.quantize import convert
from kvbm_jax.layout import KVLayout

__all__ = ["permute_blocks"]


def permute_blocks(arrays: tuple[jax.Array, ...], layout: KVLayout, target: KVLayout) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.permute_blocks`; `target` describes the result."""
    if layout == target:
        return arrays
    payload, scales = elements_of(arrays, layout)
    return arrays_of(convert(payload, scales, layout.element_format, target.element_format), target)
