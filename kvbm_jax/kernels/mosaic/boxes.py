"""Whole blocks between two arrays of any axes, by block id on either side.

A block of one layer is cut into boxes. Where both arrays hold [C, T, H, D] of a block in one run, a box is a piece of
that run; where one of them is `universal`, it is [t, D], some tokens of one component and head, which the copy engine
collects with a stride. Axes are the letters of `kvbm_jax.layout`; the array of a single layer is "NCTHD".

Of a quantised cache it is elements that move, as bytes. A packed side is u8[N, P]; in it the elements of a block come
first, or those of each of its heads, and their places are counted off from there.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvbm_jax.kernels.configs import copy_config
from kvbm_jax.kernels.mosaic.pipeline import Refs, bring, in_place, move, shape_of
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["Side", "as_bytes", "largest_divisor", "move_blocks", "refusal", "side_of", "whole_blocks"]

_MOST_ROWS = 16  # boxes of a tile
_RUN = "CTHD"
_ALIGNMENT = 16  # bytes
_BOX_ALIGNMENT = 128  # bytes, of strided boxes in shared memory
_MOST_STRIDED = 256  # elements along each axis of a strided copy


@dataclass(frozen=True)
class Side:
    """Where blocks are read or written."""

    array: jax.Array
    axes: str
    block_ids: jax.Array | None = None  # i32[M]: which block is the m-th; None: block m
    layer: int | None = None  # which layer is meant, if there is an axis L; None for all
    packed: KVLayout | None = None  # of the array, if it is packed

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes."""
        shape = self.array.shape
        if (layout := self.packed) is not None:
            heads, dim = layout.num_kv_heads, layout.head_dim
            of_axes = {"L": layout.num_layers, "C": layout.components, "T": layout.block_size, "H": heads, "D": dim}
            shape = tuple((of_axes | {"N": shape[0]})[axis] for axis in self.axes)
        return dict(zip(self.axes, shape, strict=True))


class _Place:
    """A side with its block cut up: what index a box has in which view of the array."""

    def __init__(self, side: Side, box: dict[str, int]) -> None:
        """Args: the side; the box's size along each axis that it spans, in order, "P" being a piece of a run."""
        self._sizes = sizes = side.sizes
        self.num_blocks = sizes["N"]
        self._layer, self._box = side.layer, box
        self._axes = side.axes
        self._packed = side.packed
        if self._packed is not None:
            self.view = side.array if "P" in box else side.array.reshape(-1, box["D"])
        elif "P" in box:
            outer = side.axes.removesuffix(_RUN)
            self._axes = outer + "P"
            self.view = side.array.reshape(*(sizes[axis] for axis in outer), -1, box["P"])
        else:
            self.view = side.array
        self.block_ids = side.block_ids

    def of(self, ref: Any, block: jax.Array, where: dict[str, jax.Array]) -> Any:
        """The box of a block in a reference to the view."""
        if self._packed is not None:
            return self._of_packed(ref, block, where)
        index: list[Any] = []
        for axis in self._axes:
            if axis == "N":
                index.append(block)
            elif axis == "L" and self._layer is not None:
                index.append(self._layer)
            elif axis in self._box and axis != "P":
                index.append(pl.ds(where[axis] * self._box[axis], self._box[axis]) if axis in where else slice(None))
            else:
                index.append(where[axis])
        return ref.at[tuple(index)]

    def _of_packed(self, ref: Any, block: jax.Array, where: dict[str, jax.Array]) -> Any:
        layer = where["L"] if self._layer is None else self._layer
        components, tokens, heads, dim = (self._sizes[axis] for axis in _RUN)
        if (piece := self._box.get("P")) is not None:
            first = layer * (components * tokens * heads * dim // piece) + where["P"]
            return ref.at[block, pl.ds(first * piece, piece)]
        rows = self.view.shape[0] // (self.num_blocks * heads)  # of a head of a block, its scales counted too
        row = (layer * components + where["C"]) * tokens + where["T"] * self._box["T"]
        return ref.at[pl.ds((block * heads + where["H"]) * rows + row, self._box["T"])]


def move_blocks(name: str, source: Side, target: Side, *, count: int) -> jax.Array:
    """Copies `count` blocks into the target, in place where it is donated.

    Blocks of the source from N on are zeros; blocks of the target from N on are dropped. Both sides may be one array,
    if no block is read and written.

    Args:
      name: of the operation.
      source: read.
      target: written; of the source's dtype.
      count: M.

    Returns:
      The target's array.
    """
    one_array, shape = source.array is target.array, target.array.shape
    source, target = _without_heads(source), _without_heads(target)
    sizes = source.sizes
    heads_first = not (source.axes.endswith(_RUN) and target.axes.endswith(_RUN))
    unit = sizes["T"] * sizes["D"] * (1 if heads_first else sizes["C"] * sizes["H"])
    config = copy_config(name, unit * source.array.dtype.itemsize)
    itemsize = source.array.dtype.itemsize
    layers = sizes["L"] if source.layer is None and "L" in source.axes else 1
    if not heads_first:
        grain = _ALIGNMENT // itemsize
        piece = grain * largest_divisor(unit // grain, config.tile_bytes // itemsize // grain)
        box, counts = {"P": piece}, {"L": layers, "P": unit // piece}
    else:
        tokens = _tokens_of_box(sizes["T"], sizes["D"] * itemsize, config.tile_bytes)
        box = {"T": tokens, "D": sizes["D"]}
        counts = {"L": layers, "C": sizes["C"], "T": sizes["T"] // tokens, "H": sizes["H"]}
    here, there = _Place(source, box), _Place(target, box)
    total = count * math.prod(counts.values())
    rows = max(min(config.tile_bytes // (math.prod(box.values()) * itemsize), total, _MOST_ROWS), 1)
    zeros = jnp.zeros(tuple(box.values()), source.array.dtype)
    ids = [side.block_ids for side in (source, target) if side.block_ids is not None]

    def locate(place: _Place, refs: Refs, m: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The m-th block of a side, and whether it has it."""
        if place.block_ids is None:
            return m, m < place.num_blocks
        block = refs[3 + next(i for i, array in enumerate(ids) if array is place.block_ids)][m]
        return block, jnp.logical_and(block >= 0, block < place.num_blocks)

    def decode(number: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The block of a box, and where in the block it is: heads and pieces next to each other in time."""
        where = {}
        for axis, size in reversed(counts.items()):
            where[axis] = lax.rem(number, jnp.int32(size))
            number = lax.div(number, jnp.int32(size))
        return number, where

    def load(refs: Refs, tile: jax.Array, buffer: Any, barrier: Any) -> None:
        def row(r: jax.Array, _: None) -> None:
            m, where = decode(jnp.minimum(tile * rows + r, total - 1))
            block, present = locate(here, refs, m)

            @pl.when(present)
            def copy() -> None:
                bring(here.of(refs[2] if one_array else refs[0], block, where), buffer.at[r], barrier)

            @pl.when(jnp.logical_not(present))
            def clear() -> None:
                bring(refs[1], buffer.at[r], barrier)

        lax.fori_loop(0, rows, row, None)

    def store(refs: Refs, tile: jax.Array, buffer: Any) -> None:
        def row(r: jax.Array, _: None) -> None:
            number = tile * rows + r
            m, where = decode(jnp.minimum(number, total - 1))
            block, present = locate(there, refs, m)

            @pl.when(jnp.logical_and(present, number < total))
            def copy() -> None:
                plgpu.copy_smem_to_gmem(buffer.at[r], there.of(refs[2], block, where), commit_group=False)

        lax.fori_loop(0, rows, row, None)

    def launch(written: Any) -> None:
        move(
            name,
            (zeros if one_array else here.view, zeros, written, *ids),
            num_tiles=-(-total // rows),
            tile=shape_of((rows, *box.values()), source.array.dtype),
            copies=rows,
            load=load,
            store=store,
            config=config,
        )

    return in_place(launch, there.view).reshape(shape)


def as_bytes(array: jax.Array, layout: KVLayout) -> jax.Array:
    """Returns elements as they move: bytes, if they are quantised."""
    return jax.lax.bitcast_convert_type(array, jnp.uint8) if layout.quantized else array


def side_of(
    array: jax.Array, layout: KVLayout, block_ids: jax.Array | None = None, *, layer: int | None = None
) -> Side:
    """Returns one array of a cache, of its elements or packed, as a side; quantised ones as bytes."""
    packed = layout if layout.is_packed else None
    return Side(as_bytes(array, layout), layout.axes, block_ids, layer, packed)


def whole_blocks(array: jax.Array, block_ids: jax.Array | None = None) -> Side:
    """Returns a packed array u8[N, P] as a side whose blocks are runs of P bytes, scales and all."""
    return Side(array.reshape(array.shape[0], 1, 1, 1, -1), "N" + _RUN, block_ids)


def refusal(layout: KVLayout, *others: KVLayout) -> str | None:
    """Returns why blocks of such a cache cannot be moved from or to arrays of other layouts, or None."""
    for other in others:
        if other.element_format != layout.element_format:
            return f"it copies, and does not convert {layout.dtype} and {other.dtype}"
        if layout.is_packed and other.kind is not layout.kind:
            return f"it does not move quantised blocks of a {layout.kind} cache to or from {other.kind}"
    layouts = [layout, *others]
    kinds = [each.kind for each in layouts]
    if (row := layout.head_dim * layout.itemsize) % _ALIGNMENT:
        return f"head_dim {layout.head_dim} in {layout.dtype} is {row} bytes, not a multiple of {_ALIGNMENT}"
    if any(each.is_packed for each in layouts):
        by_head = LayoutKind.UNIVERSAL in kinds and layout.num_kv_heads > 1
        run = layout.block_bytes // (layout.num_kv_heads if by_head else 1)
        if run % _ALIGNMENT:
            return f"a run of a quantised block has {run:,} bytes, not a multiple of {_ALIGNMENT}"
        if by_head and layout.kind is not LayoutKind.UNIVERSAL and run % layout.head_dim:
            return f"a head of a quantised block has {run:,} bytes, not a multiple of head_dim {layout.head_dim}"
    if LayoutKind.UNIVERSAL not in kinds or layout.num_kv_heads == 1:
        return None
    if layout.head_dim > _MOST_STRIDED:
        return f"universal with head_dim {layout.head_dim}: strided copies have at most {_MOST_STRIDED} elements a row"
    if (box := layout.block_size * row) % _BOX_ALIGNMENT:
        return f"universal with {box} bytes a head and block: strided copies want a multiple of {_BOX_ALIGNMENT}"
    return None


def _tokens_of_box(block_size: int, row_bytes: int, limit: int) -> int:
    """How many tokens of a head a box has: as many as fit a tile, so that boxes lie aligned in shared memory."""
    aligned = [d for d in range(1, block_size + 1) if block_size % d == 0 and d * row_bytes % _BOX_ALIGNMENT == 0]
    fitting = [d for d in aligned if d <= _MOST_STRIDED and d * row_bytes <= limit]
    return max(fitting) if fitting else min(aligned)


def _without_heads(side: Side) -> Side:
    """With one head, `universal` is `fully_contiguous`."""
    shape = side.sizes
    if side.axes != "NHLCTD" or shape["H"] > 1:
        return side
    if side.packed is not None:
        return replace(side, axes="NLCTHD")
    return replace(side, array=side.array.reshape(*(shape[axis] for axis in "NLCTHD")), axes="NLCTHD")


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of a number that is not over the limit."""
    return max(d for d in range(1, min(number, max(limit, 1)) + 1) if number % d == 0)
