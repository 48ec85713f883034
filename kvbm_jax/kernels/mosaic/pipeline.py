"""Tiles through shared memory: loads run ahead of the stores, both by the bulk copy engine.

Each thread block of a grid takes every g-th tile. In its shared memory lies a ring of buffers, one tile each:

    load tile k + ahead   into the buffer whose last store has been read out
    wait for tile k       on the barrier of its buffer
    store tile k          as one group of asynchronous copies

No element passes through registers: a kernel says which copies make up a tile, one thread issues them.

Axes: P buffers of the ring (`stages`), R rows of a tile, E elements of a row.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvbm_jax.kernels import target
from kvbm_jax.kernels.configs import CopyConfig

__all__ = ["bring", "in_place", "move", "shape_of"]

type Refs = Sequence[Any]
"""References to the kernel's operands and results, in that order."""


def move(
    name: str,
    operands: Sequence[Any],
    *,
    num_tiles: int,
    tile: jax.ShapeDtypeStruct,
    more: Sequence[jax.ShapeDtypeStruct] = (),
    copies: int,
    load: Callable[[Refs, jax.Array, Any, Any], None],
    store: Callable[[Refs, jax.Array, Any], None],
    config: CopyConfig,
    out: Sequence[jax.ShapeDtypeStruct] = (),
) -> tuple[jax.Array, ...]:
    """Runs a kernel that moves tiles.

    Args:
      name: of the kernel, for profiles.
      operands: arrays that are read, references that are written (`in_place`).
      num_tiles: how many.
      tile: shape [R, ...] and dtype of one in shared memory.
      more: of further buffers for each tile, in shared memory too; `load` and `store` are then given a list, the
        tile's own first.
      copies: how many asynchronous copies `load` makes for a tile, whichever it is.
      load: `load(refs, tile, buffer, barrier)` starts them, each with the barrier.
      store: `store(refs, tile, buffer)` starts the copies to device memory, `commit_group=False` each.
      config: see there.
      out: shapes and dtypes of new arrays to write.

    Returns:
      The new arrays.
    """
    gpu = target.current() or target.H100
    grid = max(min(num_tiles, gpu.num_cores * config.blocks_per_core), 1)
    stages = config.stages
    ahead = max(stages // 2, 1)
    shapes = [tile, *more]

    def buffers(rings: Sequence[Any], slot: jax.Array) -> Any:
        return [ring.at[slot] for ring in rings] if more else rings[0].at[slot]

    def body(*refs: Any) -> None:
        given, rings, barriers = refs[: -len(shapes) - 1], refs[-len(shapes) - 1 : -1], refs[-1]
        block = lax.axis_index("block")
        mine = (num_tiles - block + grid - 1) // grid

        def prefetch(k: jax.Array | int) -> None:
            @pl.when(k < mine)
            def _() -> None:
                slot = lax.rem(jnp.int32(k), jnp.int32(stages))
                load(given, block + k * grid, buffers(rings, slot), barriers.at[slot])

        for k in range(ahead):
            prefetch(k)

        def step(k: jax.Array, _: None) -> None:
            plgpu.wait_smem_to_gmem(stages - ahead - 1, wait_read_only=True)
            prefetch(k + ahead)
            slot = lax.rem(k, jnp.int32(stages))
            plgpu.barrier_wait(barriers.at[slot])
            store(given, block + k * grid, buffers(rings, slot))
            plgpu.commit_smem_to_gmem_group()

        lax.fori_loop(0, mine, step, None)
        plgpu.wait_smem_to_gmem(0)

    body.__name__ = name
    outs: tuple[jax.Array, ...] = plgpu.kernel(
        body,
        out_type=tuple(out),
        scratch_types=(
            *(plgpu.SMEM((stages, *shape.shape), shape.dtype) for shape in shapes),
            plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
        ),
        grid=(grid,),
        grid_names=("block",),
    )(*operands)
    return tuple(outs)


def bring(source: Any, buffer: Any, barrier: Any) -> None:
    """Starts a copy from device to shared memory; a contiguous source may be of any length."""
    plgpu.copy_gmem_to_smem(source, buffer, barrier, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS)


def in_place[T](launch: Callable[[Any], None], array: T) -> T:
    """Calls `launch` with a reference to an array, or to each of some; what is donated is written in place."""
    # Not `jax.new_ref`: the partitioner of XLA calls functions anew, and may not find references in them.
    written: T = pl.run_state(launch)(array)
    return written


def shape_of(shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
    """Returns an array's description."""
    return jax.ShapeDtypeStruct(shape, dtype)  # type: ignore[no-untyped-call]
