"""Quantised rows and packed blocks in plain numpy, as simple as can be.

Whole caches are compared in logical order, and a quantised element cannot be told from its scale there: `rows` is
u8[L, N, C, T, H, D + 4], the bytes of a row's payload and then of its scale.
"""

import jax.numpy as jnp
import numpy as np

from kvbm_jax.layout import LayoutKind

LOGICAL = "LNCTHD"
LIMITS = {"int8": 127, "float8_e4m3fn": 448}


def quantize(values, dtype):
    """Payload [..., D] and scales f32[...] of rows."""
    values = np.asarray(values).astype(np.float32)
    limit = LIMITS[dtype]
    payload = np.zeros(values.shape, jnp.dtype(dtype))
    scales = np.zeros(values.shape[:-1], np.float32)
    for index in np.ndindex(scales.shape):
        row = values[index]
        if not np.isfinite(row).all():
            scales[index] = np.nan
            continue
        scale = np.abs(row).max() * np.float32(1 / limit)
        if scale < np.finfo(np.float32).tiny:
            continue
        multiples = np.clip(row * (np.float32(1) / scale), -limit, limit)
        payload[index] = (np.rint(multiples) if dtype == "int8" else multiples).astype(payload.dtype)
        scales[index] = scale
    return payload, scales


def dequantize(payload, scales, dtype="float32"):
    return (payload.astype(np.float32) * scales[..., None]).astype(jnp.dtype(dtype))


def rows_of(payload, scales):
    """Bytes of rows: payload, then scale."""
    return np.concatenate([payload.view(np.uint8), scales[..., None].astype("<f4").view(np.uint8)], axis=-1)


def split(rows, dtype):
    """Payload and scales of such bytes."""
    payload, scales = np.ascontiguousarray(rows[..., :-4]), np.ascontiguousarray(rows[..., -4:])
    return payload.view(jnp.dtype(dtype)), scales.view("<f4")[..., 0]


def arrays_of(rows, layout):
    """The arrays of a quantised layout, those of the payload first."""
    payload, scales = rows[..., :-4], rows[..., -4:]
    if layout.is_packed:
        blocks = []
        for n in range(layout.num_blocks):
            if layout.kind is LayoutKind.FULLY_CONTIGUOUS:
                runs = [payload[:, n], scales[:, n]]
            else:
                runs = [part[:, n, :, :, h] for h in range(layout.num_kv_heads) for part in (payload, scales)]
            blocks.append(b"".join(run.tobytes() for run in runs))
        return (np.frombuffer(b"".join(blocks), np.uint8).reshape(layout.num_blocks, -1),)
    payload, scales = split(rows, layout.dtype)
    if layout.kind is LayoutKind.LAYER_SEPARATE:
        return (*payload, *scales)
    return payload, scales


def rows_in(arrays, layout):
    """What `arrays_of` was given."""
    arrays = [np.asarray(array) for array in arrays]
    if not layout.is_packed:
        count = layout.num_arrays
        stacked = layout.kind is LayoutKind.LAYER_STACKED
        payload, scales = (part[0] if stacked else np.stack(part) for part in (arrays[:count], arrays[count:]))
        return rows_of(payload, scales)
    sizes = dict(zip(LOGICAL, sizes_of(layout), strict=True))
    heads = layout.num_kv_heads if layout.kind is LayoutKind.UNIVERSAL else 1
    runs = arrays[0].reshape(layout.num_blocks, heads, -1)
    end = layout.payload_bytes // heads
    shape = [sizes[axis] for axis in layout.axes if axis != "D"]
    order = [layout.axes.index(axis) for axis in LOGICAL]
    parts = [part.reshape(*shape, -1).transpose(order) for part in (runs[..., :end], runs[..., end:])]
    return np.concatenate(parts, axis=-1)


def sizes_of(layout):
    """Sizes of the axes in logical order."""
    return (
        layout.num_layers,
        layout.num_blocks,
        layout.components,
        layout.block_size,
        layout.num_kv_heads,
        layout.head_dim,
    )
