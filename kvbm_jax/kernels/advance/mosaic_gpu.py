"""`advance` in one launch of one thread block.

Every warpgroup sees all rows as vectors in registers, and sums what earlier rows take or give back by masked
reductions; only rows whose blocks change, of which each warpgroup has its share, touch tables and grant:

    give back      grant[top - ...] <- tables             rows that shrink
    -- barrier --  what was given back can be taken
    take           tables <- grant[used + ...]            rows that grow; the first that does not fit is noted
    -- barrier --  the first of all warpgroups is known
    tell           lengths, counts, status                as vectors, by the first warpgroup

The threads of a warpgroup do the same scalar work, not in step: no phase writes what it reads, and so the places that
rows give up are padded in the second.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kvbm_jax.grants import Grant
from kvbm_jax.kernels.mosaic.pipeline import shape_of
from kvbm_jax.sequences import SequenceBatch
from kvbm_jax.types import Status

__all__ = ["advance", "refusal"]

_LANES = 128  # threads of a warpgroup: vectors are whole multiples
_WARPGROUPS = 4
_MOST_ROWS = 2048


def advance(
    running: SequenceBatch,
    grant: Grant,
    lengths: jax.Array,
    num_tokens: jax.Array,
    begun: jax.Array,
    max_blocks: int,
) -> tuple[SequenceBatch, Grant, jax.Array]:
    """See `kvbm_jax.kernels.advance`."""
    groups, batch, width = running.block_tables.shape
    padded = -(-batch // _LANES) * _LANES
    rows = [running.lengths, running.num_blocks, lengths, num_tokens, begun]
    if padded > batch:  # by rows that stay empty
        rows = [jnp.pad(row, (0, padded - batch)) for row in rows]
    size, padding = running.block_size, running.pool_blocks

    def body(
        now_ref: Any, held_ref: Any, accepted_ref: Any, new_ref: Any, begun_ref: Any, used_ref: Any, count_ref: Any,
        tables: Any, grant_ids: Any,
        lengths_ref: Any, taken_ref: Any, top_ref: Any, status_ref: Any,
        changes: Any, helds: Any, firsts: Any, barrier: Any,
    ) -> None:  # fmt: skip
        warpgroup = lax.axis_index("warpgroup")
        now, held, accepted, new = (ref[...] for ref in (now_ref, held_ref, accepted_ref, new_ref))
        used, count = used_ref[0], count_ref[0]
        target = accepted + new
        needed = lax.div(target + (size - 1), jnp.int32(size))
        wide = needed <= width
        valid = wide & (new >= 0) & (begun_ref[...] <= accepted) & (accepted <= now)
        change = needed - held
        valid &= (change <= max_blocks) & (change >= -max_blocks)
        change = jnp.where(valid, change, 0)
        back, fresh = jnp.maximum(-change, 0), jnp.maximum(change, 0)
        row = plgpu.broadcasted_iota(jnp.int32, (padded,), 0, layout=plgpu.Layout.WG_STRIDED((padded,), vec_size=1))
        changes[warpgroup] = change
        helds[warpgroup] = held
        after_return = used - groups * jnp.sum(back)

        def mine(k: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            r = k * _WARPGROUPS + warpgroup
            return r, changes[warpgroup, r], helds[warpgroup, r]

        def give_back(k: jax.Array, _: None) -> None:
            r, change_r, held_r = mine(k)

            @pl.when(change_r < 0)
            def shrink() -> None:
                top = used - groups * jnp.sum(jnp.where(row < r, back, 0)) - 1
                for g in range(groups):
                    for j in range(max_blocks):

                        @pl.when(j < -change_r)
                        def push(g: int = g, j: int = j) -> None:
                            grant_ids[top + g * change_r - j] = tables[g, r, held_r - 1 - j]

        lax.fori_loop(0, padded // _WARPGROUPS, give_back, None)
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

        def take(k: jax.Array, first: jax.Array) -> jax.Array:
            r, change_r, held_r = mine(k)
            end = after_return + groups * jnp.sum(jnp.where(row <= r, fresh, 0))
            grows = change_r > 0
            fits = end <= count

            @pl.when(change_r < 0)
            def clear() -> None:
                for g in range(groups):
                    for j in range(max_blocks):

                        @pl.when(j < -change_r)
                        def pad(g: int = g, j: int = j) -> None:
                            tables[g, r, held_r - 1 - j] = jnp.int32(padding)

            @pl.when(grows & fits)
            def grow() -> None:
                for g in range(groups):
                    for j in range(max_blocks):

                        @pl.when(j < change_r)
                        def pop(g: int = g, j: int = j) -> None:
                            tables[g, r, held_r + j] = grant_ids[end - (groups - g) * change_r + j]

            return jnp.where(grows & jnp.logical_not(fits), jnp.minimum(first, r), first)

        firsts[warpgroup] = lax.fori_loop(0, padded // _WARPGROUPS, take, jnp.int32(padded))
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

        @pl.when(warpgroup == 0)
        def tell() -> None:
            first = firsts[0]
            for other in range(1, _WARPGROUPS):
                first = jnp.minimum(first, firsts[other])
            fits = row < first
            granted = valid & fits
            taken = jnp.where(granted, fresh, 0)
            lengths_ref[...] = jnp.where(valid, jnp.where(granted, target, accepted), now)
            taken_ref[...] = held - back + taken
            top_ref[0] = after_return + groups * jnp.sum(taken)
            status = jnp.where(fits, jnp.int32(Status.OK), jnp.int32(Status.OUT_OF_BLOCKS))
            refused = jnp.where(wide, jnp.int32(Status.INVALID_COUNT), jnp.int32(Status.TABLE_FULL))
            status_ref[...] = jnp.where(valid, status, refused)

    body.__name__ = "advance"
    tables, grant_ids = jax.new_ref(running.block_tables), jax.new_ref(grant.block_ids)
    vector, scalar = shape_of((padded,), jnp.int32), shape_of((1,), jnp.int32)
    new_lengths, num_blocks, used, status = plgpu.kernel(
        body,
        out_type=(vector, vector, scalar, vector),
        scratch_types=(
            plgpu.SMEM((_WARPGROUPS, padded), jnp.int32),
            plgpu.SMEM((_WARPGROUPS, padded), jnp.int32),
            plgpu.SMEM((_WARPGROUPS,), jnp.int32),
            plgpu.Barrier(num_arrivals=_WARPGROUPS),
        ),
        num_threads=_WARPGROUPS,
        thread_name="warpgroup",
    )(*rows, grant.used.reshape(1), grant.count.reshape(1), tables, grant_ids)
    return (
        replace(
            running,
            block_tables=jax.freeze(tables),
            lengths=new_lengths[:batch],
            num_blocks=num_blocks[:batch],
        ),
        replace(grant, block_ids=jax.freeze(grant_ids), used=used.reshape(())),
        status[:batch],
    )


def refusal(
    running: SequenceBatch,
    grant: Grant,
    lengths: jax.Array,
    num_tokens: jax.Array,
    begun: jax.Array,
    max_blocks: int,
) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    if (batch := running.lengths.shape[0]) > _MOST_ROWS:
        return f"{batch} rows are more than one thread block holds, {_MOST_ROWS}"
    return None
