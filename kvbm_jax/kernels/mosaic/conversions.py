"""Blocks that are quantised or dequantised on their way between a plain cache and packed blocks in one run.

The rows of a block of one layer, [C, T, H] of D elements each, lie in the same order on both sides. A tile is 64 of
them, which is what the registers of a warpgroup hold, four lanes to a row: it comes by a bulk copy, is converted there
as `kvbm_jax.kernels.quantize` says, operation by operation, and goes by another. Scales pass through an array of their
own, f32[M, G]; XLA puts them into the packed blocks, and takes them out.

Axes: B blocks of a view of the cache, G rows of a block of one layer, D head dim, M blocks of a call, P bytes of a
packed block.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvbm_jax.kernels.configs import CopyConfig
from kvbm_jax.kernels.mosaic.pipeline import Refs, bring, in_place, move, shape_of
from kvbm_jax.kernels.quantize import LIMITS
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["dequantize_layer", "quantize_layer", "refusal", "rows_of_layer"]

_ROWS = 64  # of a tile
_DIMS = (64, 128)  # whose tiles leave registers to work with, and divide what a block's scales take
_CONFIG = CopyConfig(tile_bytes=16384, stages=2, blocks_per_core=4)  # 25 KiB of buffers a stage at D = 128


def quantize_layer(
    array: jax.Array, block_ids: jax.Array, out: jax.Array, staging: KVLayout, layer: int
) -> tuple[jax.Array, jax.Array]:
    """Quantises blocks of one layer into packed ones, in place where `out` is donated.

    Args:
      array: [B, G, D], plain.
      block_ids: i32[M]; B and beyond are zeros.
      out: u8[M, P].
      staging: of `out`.
      layer: which part of it is written.

    Returns:
      `out` but for its scales, and these, f32[M, G].
    """
    num_blocks, group, dim = array.shape
    parts = group // _ROWS

    def load(refs: Refs, tile: jax.Array, buffers: Any, barrier: Any) -> None:
        cache, ids, zeros, *_ = refs
        block, first = _place(ids, tile, parts)
        present = _within(block, num_blocks)

        @pl.when(present)
        def copy() -> None:
            bring(cache.at[block, pl.ds(first, _ROWS)], buffers[0], barrier)

        @pl.when(jnp.logical_not(present))
        def clear() -> None:
            bring(zeros, buffers[0], barrier)

    def store(refs: Refs, tile: jax.Array, buffers: Any) -> None:
        *_, written, scales = refs
        values, payload, factors = buffers
        rows = plgpu.load(values, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        payload[...], factors[...] = _quantized(rows, staging.dtype)
        plgpu.commit_smem()  # type: ignore[no-untyped-call]
        row = _packed_row(staging, tile, layer, parts)
        plgpu.copy_smem_to_gmem(payload, written.at[pl.ds(row, _ROWS)], commit_group=False)
        plgpu.copy_smem_to_gmem(factors, scales.at[pl.ds(tile * _ROWS, _ROWS)], commit_group=False)

    def launch(both: Any) -> None:
        move(
            "gather_blocks",
            (array, block_ids, jnp.zeros((_ROWS, dim), array.dtype), *both),
            num_tiles=block_ids.shape[0] * parts,
            tile=shape_of((_ROWS, dim), array.dtype),
            more=[shape_of((_ROWS, dim), staging.dtype), shape_of((_ROWS,), jnp.float32)],
            copies=1,
            load=load,
            store=store,
            config=_CONFIG,
        )

    elements = jax.lax.bitcast_convert_type(out, staging.dtype).reshape(-1, dim)
    elements, scales = in_place(launch, (elements, jnp.empty((block_ids.shape[0] * group,), jnp.float32)))
    packed = jax.lax.bitcast_convert_type(elements, jnp.uint8).reshape(out.shape)
    return packed, scales.reshape(-1, group)


def dequantize_layer(
    blocks: jax.Array, scales: jax.Array, staging: KVLayout, layer: int, array: jax.Array, block_ids: jax.Array
) -> jax.Array:
    """Writes one layer of packed blocks into a plain cache, in place where that is donated.

    Args:
      blocks: u8[M, P].
      scales: f32[M, G], those of the layer.
      staging: of `blocks`.
      layer: which part of them is read.
      array: [B, G, D].
      block_ids: i32[M]; B and beyond drops the block.
    """
    num_blocks, group, dim = array.shape
    parts = group // _ROWS

    def load(refs: Refs, tile: jax.Array, buffers: Any, barrier: Any) -> None:
        elements, scales, *_ = refs
        row = _packed_row(staging, tile, layer, parts)
        bring(elements.at[pl.ds(row, _ROWS)], buffers[1], barrier)
        bring(scales.at[pl.ds(tile * _ROWS, _ROWS)], buffers[2], barrier)

    def store(refs: Refs, tile: jax.Array, buffers: Any) -> None:
        *_, ids, written = refs
        values, payload, factors = buffers
        rows = plgpu.load(payload, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
        factor = plgpu.load(factors, layout=plgpu.Layout.WGMMA.reduce(1))
        values[...] = (rows * _each(factor, rows.shape)).astype(array.dtype)
        plgpu.commit_smem()  # type: ignore[no-untyped-call]
        block, first = _place(ids, tile, parts)

        @pl.when(_within(block, num_blocks))
        def copy() -> None:
            plgpu.copy_smem_to_gmem(values, written.at[block, pl.ds(first, _ROWS)], commit_group=False)

    def launch(written: Any) -> None:
        move(
            "scatter_blocks",
            (
                jax.lax.bitcast_convert_type(blocks, staging.dtype).reshape(-1, dim),
                scales.reshape(-1),
                block_ids,
                written,
            ),
            num_tiles=block_ids.shape[0] * parts,
            tile=shape_of((_ROWS, dim), array.dtype),
            more=[shape_of((_ROWS, dim), staging.dtype), shape_of((_ROWS,), jnp.float32)],
            copies=2,
            load=load,
            store=store,
            config=_CONFIG,
        )

    return in_place(launch, array)


def rows_of_layer(
    arrays: Sequence[jax.Array], layout: KVLayout, layer: int, block_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the array that holds a layer of a plain cache as [B, G, D], and where blocks i32[M] are in it."""
    if layout.kind is LayoutKind.LAYER_SEPARATE:
        return arrays[layer].reshape(layout.num_blocks, -1, layout.head_dim), block_ids
    view = arrays[0].reshape(layout.num_layers * layout.num_blocks, -1, layout.head_dim)
    known = jnp.logical_and(block_ids >= 0, block_ids < layout.num_blocks)
    return view, jnp.where(known, block_ids + layer * layout.num_blocks, view.shape[0])


def refusal(plain: KVLayout, staging: KVLayout) -> str | None:
    """Returns why blocks cannot be converted between a plain cache and packed ones, or None."""
    if plain.kind not in (LayoutKind.LAYER_SEPARATE, LayoutKind.LAYER_STACKED):
        return f"it does not convert blocks of a {plain.kind} cache"
    if staging.kind is not LayoutKind.FULLY_CONTIGUOUS and plain.num_kv_heads > 1:
        return f"it does not convert to or from {staging.kind}"
    if plain.head_dim not in _DIMS:
        return f"it converts rows of {' or '.join(map(str, _DIMS))} elements; head_dim is {plain.head_dim}"
    if plain.dtype == "float32":
        return "it converts numbers of 16 bits; the cache is float32"
    if (rows := plain.components * plain.block_size * plain.num_kv_heads) % _ROWS:
        return f"a block of a layer has {rows} rows; it converts {_ROWS} at a time"
    return None


def _quantized(rows: Any, dtype: str) -> tuple[Any, Any]:
    """What `quantize` gives for rows f32[64, D] in registers."""
    limit = np.float32(LIMITS[dtype])
    amax = jnp.max(jnp.abs(rows), axis=1)
    scales = amax * np.float32(1 / LIMITS[dtype])
    finite = amax <= np.finfo(np.float32).max  # false for NaN
    present = jnp.logical_and(finite, scales >= np.finfo(np.float32).tiny)
    one, zero = np.float32(1), np.float32(0)
    inverse = jnp.where(present, one / jnp.where(present, scales, one), zero)
    scaled = jnp.where(_each(present, rows.shape), rows * _each(inverse, rows.shape), zero)
    scaled = jnp.minimum(jnp.maximum(scaled, -limit), limit)
    if dtype == "int8":
        payload = lax.round(scaled, lax.RoundingMethod.TO_NEAREST_EVEN).astype(jnp.int32).astype(jnp.int8)
    else:
        payload = scaled.astype(dtype)
    return payload, jnp.where(present, scales, jnp.where(finite, zero, np.float32(np.nan)))


def _each(factor: Any, shape: tuple[int, ...]) -> Any:
    """A number for each row, for all of its elements."""
    return lax.broadcast_in_dim(factor, shape, (0,))


def _place(ids: Any, tile: jax.Array, parts: int) -> tuple[jax.Array, jax.Array]:
    """Block of a tile in the cache, and the first of its rows there."""
    return ids[lax.div(tile, jnp.int32(parts))], lax.rem(tile, jnp.int32(parts)) * _ROWS


def _within(block: jax.Array, num_blocks: int) -> jax.Array:
    return jnp.logical_and(block >= 0, block < num_blocks)


def _packed_row(staging: KVLayout, tile: jax.Array, layer: int, parts: int) -> jax.Array:
    """First row of a tile in packed blocks, seen as rows of D bytes."""
    pitch = staging.block_bytes // staging.head_dim
    m, part = lax.div(tile, jnp.int32(parts)), lax.rem(tile, jnp.int32(parts))
    return m * pitch + (layer * parts + part) * _ROWS
