"""The bookkeeping of one scheduler step as one call: what ends, begins, grows and is complete, for the whole batch.

A server calls it once a step, jitted with pool and batch donated, or from within its own compiled step. It goes phase
by phase, rows in order within a phase:

    release     windows give back what they have passed, sequences that ended everything
    match       new ones find and hold their longest cached prefix
    allocate    new ones, then those that grow, get blocks, until the first that does not fit
    register    completed blocks become findable: by the next call, not by this one

A plan has static sizes and says what is to be done as data: one compiled program serves every step of a server. Sizes
cost time; a server keeps a few and pads to the next. Nothing in it depends on data: no `while`, no `cond`, no callback.

Axes: G groups, B rows of the batch, W blocks of a table, T tokens of a block, N blocks of the pool, E rows that end,
R rows that begin, M hashes of such a row, X rows that grow, P completed blocks, F blocks that may be evicted.
"""

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvbm_jax import pool, sequences
from kvbm_jax.errors import LayoutError
from kvbm_jax.groups import has_windows
from kvbm_jax.ordering import fence
from kvbm_jax.padding import CLIP, DROP, FILL
from kvbm_jax.types import Status

__all__ = ["StepPlan", "StepResult", "step"]


class StepPlan(NamedTuple):
    """What one step does. Rows are padded with B; no row is named twice in one field."""

    ending: jax.Array  # i32[E]: rows whose sequences have ended
    starting: jax.Array  # i32[R]: rows that begin; empty, or among `ending`
    hashes: jax.Array  # u32[R, M, 4]: sequence hashes of each prompt's whole blocks, M at most W
    num_hashes: jax.Array  # i32[R]: how many of them may match, at most (num_tokens - 1) // T
    num_tokens: jax.Array  # i32[R]: tokens of each prompt
    growing: jax.Array  # i32[X]: running rows that need slots for new tokens, in the order of their claim to blocks
    new_tokens: jax.Array  # i32[X]: how many
    complete_rows: jax.Array  # i32[P]: row of each completed block
    complete_places: jax.Array  # i32[P]: its index in the row's table
    complete_hashes: jax.Array  # u32[P, 4]: its sequence hash
    num_computed: jax.Array | None = None  # i32[B]: as `sequences.slide` takes it; None: no window slides


class StepResult(NamedTuple):
    """Outcome of a step."""

    num_cached: jax.Array  # i32[R]: tokens whose keys and values are in the cache already
    start_status: jax.Array  # i32[R]: OK, OUT_OF_BLOCKS, TABLE_FULL; QUEUE_FULL: the step did nothing
    grow_status: jax.Array  # i32[X]: the same, SHARED_TAIL and INVALID_COUNT
    registered: jax.Array  # bool[G, P]: newly findable
    register_status: jax.Array  # i32[G, P]
    evicted: pool.Evicted


def step(
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    plan: StepPlan,
    *,
    max_blocks: int = 1,
    max_fresh: int | None = None,
    scores: pool.Scores | None = None,
) -> tuple[pool.PoolState, sequences.SequenceBatch, StepResult]:
    """Carries out a plan.

    Tables, lengths, ref counts, generations, hashes, and the order of reset and of inactive blocks end as after
    `sequences.slide`, `release`, `start`, `extend` and `register`, called in this order with what the plan says, rows
    that grow in the plan's order, with two differences. New rows and growing rows draw on one allocation: once a new
    row is OUT_OF_BLOCKS, so are all rows that grow. And a step is not done by half: where what it may release has no
    room in the inactive queue, nothing happens and every row and block gets QUEUE_FULL.

    Args:
      state: the pool.
      running: the batch.
      plan: what to do.
      max_blocks: static bound of the new blocks of a growing row in one group, and of those that its window gives back.
      max_fresh: static bound of all the blocks that a step grants, F; rows that go beyond it are OUT_OF_BLOCKS. A
        server that computes at most so many tokens a step needs no more. None: as many as the rows could ever want.
      scores: which inactive blocks are evicted first, as in `pool.allocate`.

    Returns:
      Pool, batch and result. A row that gets no blocks stays as it was, a new one empty. After QUEUE_FULL, `compact`
      the pool and call again.

    Raises:
      LayoutError: if the plan has more hashes a row than a table has blocks.
    """
    groups, batch, width = running.block_tables.shape
    asked = plan.hashes.shape[1]
    if asked > width:
        raise LayoutError(f"{asked} hashes a row exceed the table's {width} blocks; start fewer or widen the table")

    # What ends stays findable, so that prefixes can be matched before it ends, and room be known beforehand.
    needed = sequences.blocks_for(plan.num_tokens, running.block_size)
    wide = needed <= width
    real = plan.starting < batch
    wanted = jnp.where(wide & real, plan.num_hashes, 0)
    prefix, cached = sequences.find_prefixes(state, running, plan.hashes, wanted)
    ended = running.num_blocks.at[plan.ending].get(**FILL, fill_value=0)
    leaving = groups * jnp.sum(ended)
    passed = None
    if plan.num_computed is not None and has_windows(running.groups):
        passed = sequences.passed(running, plan.num_computed, max_blocks=max_blocks)
        leaving += jnp.sum(passed, dtype=jnp.int32)
    room = jnp.minimum(leaving, pool.stats(state).held) <= pool.release_room(state)

    begun = wide & real & room
    cached = jnp.where(begun, cached, 0)
    prefix = jnp.where(begun[:, None, None], prefix, state.num_blocks)
    dropped = []
    if passed is not None:
        running, behind = sequences.drop_passed(running, jnp.where(room, passed, 0), max_blocks=max_blocks)
        dropped.append(behind[:, ::-1].reshape(-1))
    running, ended = _end(running, jnp.where(room, plan.ending, batch))
    split = len(cached)
    state, exchanged = pool.exchange(state, jnp.concatenate([*dropped, ended]), prefix.reshape(split, -1))
    fresh = jnp.where(begun, needed - cached, 0)
    state, growth = fence((state, _growth(state, running, plan, max_blocks)))
    more = jnp.where(room & (plan.growing < batch) & (growth.status == Status.OK), growth.fresh, 0)
    state, drawn = pool.admit(
        state,
        exchanged,
        groups * jnp.concatenate([fresh, more]),
        max_count=groups * (split * width + len(more) * max_blocks) if max_fresh is None else max_fresh,
        scores=scores,
    )
    granted = begun & drawn.granted[:split]
    blocks = sequences.fresh_blocks(running, drawn, cached, fresh)
    running = sequences.begin_rows(
        running, jnp.where(granted, plan.starting, batch), prefix, cached, blocks, plan.num_tokens
    )
    grown = room & drawn.granted[split:] & (growth.status == Status.OK)
    running = _grow(running, plan, grown, growth, drawn.first[split:], drawn.block_ids, max_blocks)
    state, running, registered, status = _register(state, running, plan, room)

    def told(status: jax.Array) -> jax.Array:
        return jnp.where(room, status, Status.QUEUE_FULL).astype(jnp.int32)

    out = jnp.where(drawn.granted, Status.OK, Status.OUT_OF_BLOCKS)
    result = StepResult(
        jnp.where(granted, cached * running.block_size, 0),
        told(jnp.where(wide, out[:split], Status.TABLE_FULL)),
        told(jnp.where(growth.status == Status.OK, out[split:], growth.status)),
        registered,
        told(status),
        drawn.evicted,
    )
    return state, running, result


class _Growth(NamedTuple):
    """What rows that grow want."""

    lengths: jax.Array  # i32[X]: tokens then
    places: jax.Array  # i32[X]: blocks in the table now
    fresh: jax.Array  # i32[X]: blocks wanted in each group
    status: jax.Array  # i32[X]: why a row cannot grow whatever is free


def _end(running: sequences.SequenceBatch, rows: jax.Array) -> tuple[sequences.SequenceBatch, jax.Array]:
    """Empties rows: the batch, and the blocks that they held in the order of their release, i32[E * W * G]."""
    tables = running.block_tables.at[:, rows].get(**FILL, fill_value=running.pool_blocks)
    blocks = sequences.last_first(tables.transpose(1, 0, 2))[:, ::-1].reshape(-1)
    old, blocks = fence((running.block_tables, blocks))
    return sequences.empty_rows(replace(running, block_tables=old), rows), blocks


def _growth(state: pool.PoolState, running: sequences.SequenceBatch, plan: StepPlan, max_blocks: int) -> _Growth:
    width = running.block_tables.shape[2]
    places = running.num_blocks.at[plan.growing].get(**FILL, fill_value=0)
    lengths = running.lengths.at[plan.growing].get(**FILL, fill_value=0) + plan.new_tokens
    needed = sequences.blocks_for(lengths, running.block_size)
    fresh = jnp.maximum(needed - places, 0)
    _, shared = sequences.tails(state, running, jnp.where(plan.new_tokens != 0, plan.growing, len(running.lengths)))
    valid = (plan.new_tokens >= 0) & (fresh <= max_blocks)
    status = jnp.where(valid, Status.OK, Status.INVALID_COUNT)
    status = jnp.where(jnp.any(shared, axis=1), Status.SHARED_TAIL, status)
    status = jnp.where(needed <= width, status, Status.TABLE_FULL)
    return _Growth(lengths, places, fresh, status)


def _grow(
    running: sequences.SequenceBatch,
    plan: StepPlan,
    grown: jax.Array,
    growth: _Growth,
    first: jax.Array,
    blocks: jax.Array,
    max_blocks: int,
) -> sequences.SequenceBatch:
    """Appends to rows that grow the blocks granted from `first` on."""
    groups, batch, width = running.block_tables.shape
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    column = jnp.arange(max_blocks, dtype=jnp.int32)[None, None, :]
    fresh = growth.fresh[None, :, None]
    nth = first[None, :, None] + group * fresh + column  # [G, X, max_blocks]
    place = jnp.where(column < fresh, growth.places[None, :, None] + column, width)
    target = jnp.where(grown, plan.growing, batch)
    return replace(
        running,
        block_tables=running.block_tables.at[group, target[None, :, None], place].set(
            blocks.at[nth].get(**CLIP), **DROP
        ),
        lengths=running.lengths.at[target].set(growth.lengths, **DROP),
        num_blocks=running.num_blocks.at[target].set(growth.places + growth.fresh, **DROP),
    )


def _register(
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    plan: StepPlan,
    room: jax.Array,
) -> tuple[pool.PoolState, sequences.SequenceBatch, jax.Array, jax.Array]:
    """Registers completed blocks in every group.

    Returns:
      Pool, batch, bool[G, P] newly findable and i32[G, P] status.
    """
    groups, batch, _ = running.block_tables.shape
    rows, places = jnp.where(room, plan.complete_rows, batch), plan.complete_places
    blocks = running.block_tables.at[:, rows, places].get(**FILL, fill_value=running.pool_blocks)
    keys = jnp.concatenate([pool.keys_of(plan.complete_hashes, group) for group in range(groups)])
    state, entered = pool.enter(state, blocks.reshape(-1), keys)
    old, canonical = fence((running.block_tables, entered.canonical.reshape(blocks.shape)))
    duplicate = canonical != blocks
    dropped = jnp.where(duplicate, blocks, running.pool_blocks).reshape(-1)
    taken = jnp.where(duplicate, canonical, running.pool_blocks).reshape(-1)
    state = pool.give_up(state, dropped, taken)
    tables = old.at[:, rows, places].set(canonical, **DROP)
    registered, status = (told.reshape(blocks.shape) for told in (entered.registered, entered.status))
    return state, replace(running, block_tables=tables), registered, status
