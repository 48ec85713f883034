"""Elements of 8 bits with a scale for each row: what `quantized` means in `kvbm_jax.layout`.

A row is the D elements of one token and kv head. Its scale is the largest magnitude in it over the largest number of
the element type, and its elements are multiples of the scale: symmetric absmax quantisation by token (Yao et al.,
ZeroQuant, 2022; Dettmers et al., LLM.int8(), 2022), the 8-bit floats those of Micikevicius et al., FP8 Formats for Deep
Learning, 2022 (E4M3, whose largest number is 448, finite and with one NaN: `float8_e4m3fn`).

    scale = amax * (1 / limit)          element = cast(value * (1 / scale))          value ~ element * scale

in float32, `limit` 127 or 448; the cast rounds to nearest, ties to even, and saturates. What comes back differs from
the value by no more than

    int8            scale / 2, that is amax / 254
    float8_e4m3fn   the larger of 1/16 of the value and scale / 1024

and by the rounding of float32. A row of zeros has scale 0 and comes back as zeros, and so does one whose scale would
be no normal float32 (magnitudes below 1.5e-36 or 5.3e-36). A row with a NaN or an infinity in it has scale NaN and
comes back as NaN, all of it: a fault stays visible, and stays in its row.

This is XLA for every back end: the arithmetic is fused into what makes the values or uses them.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvbm_jax.layout import ElementFormat

__all__ = ["LIMITS", "Quantized", "convert", "dequantize", "quantize"]

LIMITS = {"int8": 127, "float8_e4m3fn": 448}
"""The largest number that elements of a dtype take."""


class Quantized(NamedTuple):
    """Rows of elements and their scales."""

    payload: jax.Array  # int8 or float8_e4m3fn [..., D]
    scales: jax.Array  # f32[...]


def quantize(values: jax.Array, dtype: str) -> Quantized:
    """Quantises rows [..., D] of floating-point numbers.

    Raises:
      KeyError: if elements of that dtype have no scales.
    """
    limit = LIMITS[dtype]
    values = values.astype(jnp.float32)
    amax = jnp.max(jnp.abs(values), axis=-1)
    scales = amax * np.float32(1 / limit)
    present = jnp.isfinite(amax) & (scales >= np.finfo(np.float32).tiny)
    inverse = jnp.where(present, 1 / jnp.where(present, scales, 1), 0)
    scaled = jnp.where(present[..., None], values * inverse[..., None], 0)
    if dtype == "int8":
        scaled = jnp.round(scaled)
    payload = jnp.clip(scaled, -limit, limit).astype(dtype)
    return Quantized(payload, jnp.where(present, scales, jnp.where(jnp.isfinite(amax), 0, jnp.nan)))


def dequantize(rows: Quantized, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns rows [..., D] as numbers of a floating-point dtype; the product is float32."""
    return (rows.payload.astype(jnp.float32) * rows.scales[..., None]).astype(dtype)


def convert(
    payload: jax.Array, scales: jax.Array | None, source: ElementFormat, target: ElementFormat
) -> tuple[jax.Array, jax.Array | None]:
    """Brings elements from one format to another.

    Args:
      payload: [..., D], of the dtype of `source`.
      scales: f32[...] if `source` is quantised, else None.
      source: what they are.
      target: what they shall be. Elements that are so already stay bit for bit.

    Returns:
      Payload and scales as `target` has them, the latter None if it is plain.
    """
    if source == target:
        return payload, scales
    values = payload if scales is None else dequantize(Quantized(payload, scales), "float32")
    return quantize(values, target.dtype) if target.quantized else (values.astype(target.dtype), None)
