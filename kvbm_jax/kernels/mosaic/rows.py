"""Rows of tokens between arrays of a step [S, H, D] and slots of a cache [N, C, T, H, D].

A row is one token of one component, [H, D] in one run. A tile is some rows of one component: one run on the side of
the step, a copy for each row on the side of the cache.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvbm_jax.kernels.configs import copy_config
from kvbm_jax.kernels.mosaic.boxes import largest_divisor
from kvbm_jax.kernels.mosaic.pipeline import Refs, bring, in_place, move, shape_of

__all__ = ["load_rows", "refusal", "store_rows"]

_MOST_ROWS = 16  # of a tile
_ALIGNMENT = 16  # bytes


def store_rows(name: str, array: jax.Array, data: Sequence[jax.Array], slots: jax.Array) -> jax.Array:
    """Writes rows into an array [N, C, T, H, D], in place where it is donated; slots from N * T on are dropped.

    Args:
      name: of the operation.
      array: the cache.
      data: C arrays [S, H, D].
      slots: i32[S].
    """
    cut = _Cut(name, array, slots.shape[0])
    flat = [component.reshape(-1, cut.row) for component in data]

    def load(refs: Refs, tile: jax.Array, buffer: Any, barrier: Any) -> None:
        component, first = cut.decode(tile)
        for c in range(cut.components):

            @pl.when(component == c)
            def run(c: int = c) -> None:
                bring(refs[c].at[pl.ds(first, cut.rows)], buffer, barrier)

    def store(refs: Refs, tile: jax.Array, buffer: Any) -> None:
        component, first = cut.decode(tile)
        *_, slots, written = refs

        def row(r: jax.Array, _: None) -> None:
            place, present = cut.place(slots[first + r], component)

            @pl.when(present)
            def copy() -> None:
                plgpu.copy_smem_to_gmem(buffer.at[r], written.at[place], commit_group=False)

        lax.fori_loop(0, cut.rows, row, None)

    def launch(written: Any) -> None:
        move(
            name,
            (*flat, slots, written),
            num_tiles=cut.num_tiles,
            tile=shape_of((cut.rows, cut.row), array.dtype),
            copies=1,
            load=load,
            store=store,
            config=cut.config,
        )

    return in_place(launch, array.reshape(cut.shape)).reshape(array.shape)


def load_rows(name: str, array: jax.Array, slots: jax.Array) -> tuple[jax.Array, ...]:
    """Reads rows of an array [N, C, T, H, D] as C arrays [S, H, D]; slots from N * T on are zeros."""
    tokens = slots.shape[0]
    cut = _Cut(name, array, tokens)

    def load(refs: Refs, tile: jax.Array, buffer: Any, barrier: Any) -> None:
        component, first = cut.decode(tile)
        cache, slots, zeros, *_ = refs

        def row(r: jax.Array, _: None) -> None:
            place, present = cut.place(slots[first + r], component)

            @pl.when(present)
            def copy() -> None:
                bring(cache.at[place], buffer.at[r], barrier)

            @pl.when(jnp.logical_not(present))
            def clear() -> None:
                bring(zeros, buffer.at[r], barrier)

        lax.fori_loop(0, cut.rows, row, None)

    def store(refs: Refs, tile: jax.Array, buffer: Any) -> None:
        component, first = cut.decode(tile)
        for c in range(cut.components):

            @pl.when(component == c)
            def run(c: int = c) -> None:
                plgpu.copy_smem_to_gmem(buffer, refs[3 + c].at[pl.ds(first, cut.rows)], commit_group=False)

    out = move(
        name,
        (array.reshape(cut.shape), slots, jnp.zeros((cut.row,), array.dtype)),
        num_tiles=cut.num_tiles,
        tile=shape_of((cut.rows, cut.row), array.dtype),
        copies=cut.rows,
        load=load,
        store=store,
        config=cut.config,
        out=[shape_of((tokens, cut.row), array.dtype)] * cut.components,
    )
    return tuple(component.reshape(tokens, *array.shape[3:]) for component in out)


def refusal(array: jax.Array, slots: jax.Array) -> str | None:
    """Returns why rows of such a cache cannot be moved, or None."""
    row = array.shape[3] * array.shape[4] * array.dtype.itemsize
    if row % _ALIGNMENT:
        return f"a token of {list(array.shape[3:])} {array.dtype} has {row} bytes, not a multiple of {_ALIGNMENT}"
    return None if slots.shape[0] else "there is no token"


class _Cut:
    """How the rows of a step are cut into tiles."""

    def __init__(self, name: str, array: jax.Array, tokens: int) -> None:
        self.num_blocks, self.components, self.block_size, heads, dim = array.shape
        self.row = heads * dim  # elements
        row_bytes = self.row * array.dtype.itemsize
        self.shape = (self.num_blocks, self.components, self.block_size, self.row)
        self.config = copy_config(name, row_bytes)
        self.rows = largest_divisor(tokens, min(self.config.tile_bytes // row_bytes, _MOST_ROWS))
        self._parts = tokens // self.rows
        self.num_tiles = self._parts * self.components

    def decode(self, tile: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Component of a tile, and its first token."""
        parts = jnp.int32(self._parts)
        return lax.div(tile, parts), lax.rem(tile, parts) * self.rows

    def place(self, slot: jax.Array, component: jax.Array) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Where the row of a slot lies, and whether the cache has it."""
        size = jnp.int32(self.block_size)
        block = lax.div(slot, size)
        present = jnp.logical_and(slot >= 0, block < self.num_blocks)
        return (block, component, lax.rem(slot, size)), present
