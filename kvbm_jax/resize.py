"""Another size for a live pool: held blocks stay held, what is cached stays findable as far as it fits.

    grow     the new blocks come under the stack of reset ones: they are granted last, in the order of their ids
    shrink   reset blocks go first; if they do not suffice, inactive ones are evicted as ever, by default the least
             recently released first; what is left keeps its id if that is below the new size, and otherwise moves into
             the reset block below it that would be granted next, in the order of ids

So as few blocks move as can. Contents follow by `cache.resize_blocks`, tables are rewritten here. Everything costs
work in proportion to the pool and yields arrays of other shapes: a call of its own, made between steps, not donated.

Axes: N blocks before, M after, F = max(N - M, 1), B rows and W blocks of a table, G groups, K entries of a queue.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvbm_jax import index as block_index
from kvbm_jax import lru, pool
from kvbm_jax.errors import LayoutError
from kvbm_jax.sequences import SequenceBatch
from kvbm_jax.types import Status

__all__ = ["PoolParts", "ResizeResult", "assemble", "inactive_blocks", "resize"]


class ResizeResult(NamedTuple):
    """Outcome of `resize`; means nothing but its status unless that is OK."""

    new_ids: jax.Array  # i32[N]: what each block is called now, M where it is gone
    sources: jax.Array  # i32[M]: what each block was called before, N where it holds nothing: see `cache.resize_blocks`
    evicted: pool.Evicted  # F: what no longer fits, in the order of its eviction, under the ids of before
    generation: jax.Array  # u32[]: for the next call, see `generation`
    status: jax.Array  # i32[]


class PoolParts(NamedTuple):
    """What a pool of M blocks is made of, see `assemble`."""

    ref_counts: jax.Array  # i32[M]
    generations: jax.Array  # u32[M]
    reset_stack: jax.Array  # i32[M]: the next block to be granted on top
    num_reset: jax.Array  # i32[]
    keys: jax.Array  # u32[M, 5] of registered blocks, as `pool.keys_of` makes them
    registered: jax.Array  # bool[M]
    inactive: jax.Array  # i32[K]: the least recently released first, padded with M


def resize(
    state: pool.PoolState,
    running: SequenceBatch,
    num_blocks: int,
    *,
    max_blocks: int | None = None,
    seed: jax.Array | None = None,
    generation: jax.Array | int = 0,
    scores: pool.Scores | None = None,
) -> tuple[pool.PoolState, SequenceBatch, ResizeResult]:
    """Makes a pool of another size out of a pool. Do not donate: shapes differ, and a refusal leaves the former ones.

    Held blocks keep their holders, registered ones their keys, inactive ones their order. A handle of a block that
    stays where it is stays current; one of a block that moves or goes is stale from then on, since the block that it
    moves to counts one generation more. Grants are not known here: commit them before.

    Args:
      state: the pool of N blocks.
      running: its sequences; a pool without any takes an empty batch.
      num_blocks: static M.
      max_blocks: static W of the new tables; None leaves it as it is.
      seed: u32[] of the new index; None keeps the present one.
      generation: u32[] that added blocks begin with: what the last `resize` of this pool returned. Handles of blocks
        that were taken away by it stay stale then, also when their ids come back.
      scores: which inactive blocks are evicted first, as in `pool.allocate`.

    Returns:
      Pool, batch and result. The status is OK, or the former pool is to be used on: OUT_OF_BLOCKS if more than M blocks
      are held, TABLE_FULL if a row has more than `max_blocks`, INDEX_FULL if keys found no place (call again with
      another seed).

    Raises:
      LayoutError: if M is out of range, or the batch is of another pool.
    """
    before = state.num_blocks
    if running.pool_blocks != before:
        raise LayoutError(f"the batch is of a pool of {running.pool_blocks} blocks, the pool has {before}")
    if not 1 <= num_blocks <= 2**30:
        raise LayoutError(f"num_blocks is {num_blocks}; a pool has between 1 and {2**30} blocks")
    counts = pool.stats(state)
    surplus = counts.held + counts.inactive - num_blocks
    state, evicted = pool.evict(state, surplus, max_count=max(before - num_blocks, 1), scores=scores)

    blocks = jnp.arange(before, dtype=jnp.int32)
    registered = block_index.is_registered(state.index, blocks)
    kept = (state.ref_counts > 0) | registered
    moving = kept & (blocks >= num_blocks)
    free, num_free = _reset_below(state, num_blocks)
    rank = jnp.cumsum(moving, dtype=jnp.int32)
    target = free.at[num_free - rank].get(mode="clip")
    new_ids = jnp.where(moving, target, jnp.where(kept, blocks, num_blocks))

    added = jnp.full((max(num_blocks - before, 0),), generation, jnp.uint32)
    generations = jnp.concatenate([state.generations[:num_blocks], added])
    order = inactive_blocks(state, max_count=min(before, num_blocks))
    parts = PoolParts(
        jnp.zeros((num_blocks,), jnp.int32).at[new_ids].set(state.ref_counts, mode="drop"),
        generations.at[jnp.where(moving, target, num_blocks)].add(1, mode="drop"),
        free,
        num_free - rank[-1],
        jnp.zeros((num_blocks, block_index.KEY_WORDS), jnp.uint32).at[new_ids].set(state.index.keys, mode="drop"),
        jnp.zeros((num_blocks,), jnp.bool_).at[new_ids].set(registered, mode="drop"),
        new_ids.at[order].get(mode="fill", fill_value=num_blocks),
    )
    resized, left = assemble(parts, state.index.seed if seed is None else seed)
    width = running.block_tables.shape[2] if max_blocks is None else max_blocks
    status = jnp.where(left == 0, Status.OK, Status.INDEX_FULL)
    status = jnp.where(jnp.max(running.num_blocks) <= width, status, Status.TABLE_FULL)
    status = jnp.where(counts.held <= num_blocks, status, Status.OUT_OF_BLOCKS).astype(jnp.int32)
    result = ResizeResult(
        new_ids,
        jnp.full((num_blocks,), before, jnp.int32).at[new_ids].set(blocks, mode="drop"),
        evicted,
        jnp.max(state.generations[num_blocks:], initial=jnp.asarray(generation, jnp.uint32)),
        status,
    )
    return resized, _rename(running, new_ids, num_blocks, width), result


def assemble(parts: PoolParts, seed: jax.Array) -> tuple[pool.PoolState, jax.Array]:
    """Puts a pool together. Costs work in proportion to M.

    Args:
      parts: each block in exactly one place: held, reset, or inactive and registered.
      seed: u32[] of the index.

    Returns:
      The pool, and i32[] the number of keys that found no place in the index: 0, else try another seed.
    """
    num_blocks = parts.ref_counts.shape[0]
    empty = block_index.init(num_blocks)
    # Any way at all marks a key for `rebuild`, which gives it its own.
    index, left = block_index.rebuild(
        replace(empty, keys=parts.keys, ways=jnp.where(parts.registered, 0, empty.ways)), seed
    )
    queue = lru.push(lru.init(num_blocks), parts.inactive, parts.inactive < num_blocks)
    state = pool.PoolState(
        parts.ref_counts, parts.generations, parts.reset_stack, parts.num_reset, inactive=queue, index=index
    )
    return state, left


def inactive_blocks(state: pool.PoolState, *, max_count: int) -> jax.Array:
    """Lists inactive blocks, the least recently released first, i32[max_count], padded with N; changes nothing.

    Args:
      state: the pool.
      max_count: static; the first so many are listed.
    """
    return lru.pop(state.inactive, jnp.minimum(state.inactive.size, max_count), max_count=max_count)[1]


def _reset_below(state: pool.PoolState, num_blocks: int) -> tuple[jax.Array, jax.Array]:
    """The reset stack i32[M] of a pool of M blocks before anything moves, and its height i32[]."""
    before = state.num_blocks
    added = jnp.arange(num_blocks - 1, before - 1, -1, dtype=jnp.int32)
    height = jnp.arange(before, dtype=jnp.int32)
    old = jnp.where(height < state.num_reset, state.reset_stack, num_blocks)
    blocks = jnp.concatenate([added, old])
    rank = jnp.cumsum(blocks < num_blocks, dtype=jnp.int32)
    place = jnp.where(blocks < num_blocks, rank - 1, num_blocks)
    return jnp.full((num_blocks,), num_blocks, jnp.int32).at[place].set(blocks, mode="drop"), rank[-1]


def _rename(running: SequenceBatch, new_ids: jax.Array, num_blocks: int, width: int) -> SequenceBatch:
    """Tables i32[G, B, W'] of blocks as they are called now."""
    tables = new_ids.at[running.block_tables].get(mode="fill", fill_value=num_blocks)[:, :, :width]
    more = ((0, 0), (0, 0), (0, max(width - tables.shape[2], 0)))
    return replace(running, block_tables=jnp.pad(tables, more, constant_values=num_blocks), pool_blocks=num_blocks)
