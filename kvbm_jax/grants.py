"""Reserve, run, commit: allocation inside a compiled loop, without eviction, hashing or callbacks in it.

Before the loop the owner reserves reset blocks, evicting as needed, so that victims can be saved first. Inside,
`extend` only pops blocks from the grant; an empty grant refuses. Afterwards `commit` registers what was completed,
with hashes computed on the host from the tokens produced, and gives back what is left. The pool does not enter the
loop at all. With drafts that may be rejected, `advance` takes the place of `extend`: it gives back, too.

    state, reserved = reserve(state, count, max_blocks=K)            evicts
    lax.scan:  sequences, grant, status = extend(sequences, grant, num_tokens)
    state, sequences, result = commit(state, sequences, grant, ...)  registers, gives back

Axes: K blocks of a grant, B rows of the sequence batch, R rows and M hashes of a commit, G groups.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvbm_jax import pool, sequences
from kvbm_jax.padding import CLIP, DROP, FILL
from kvbm_jax.types import Status

__all__ = ["Grant", "ReserveResult", "advance", "commit", "extend", "give_back", "reserve"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Grant:
    """Blocks set aside for one compiled loop, held once each."""

    block_ids: jax.Array  # i32[K], padded with N
    used: jax.Array  # i32[]: how many have been handed out
    count: jax.Array  # i32[]: how many there are
    ticket: jax.Array  # i32[]: a number of its owner's, which loops pass on unchanged


class ReserveResult(NamedTuple):
    """Outcome of `reserve`."""

    grant: Grant
    status: jax.Array  # i32[]
    evicted: pool.Evicted


def reserve(
    state: pool.PoolState, count: jax.Array, *, max_blocks: int, scores: pool.Scores | None = None
) -> tuple[pool.PoolState, ReserveResult]:
    """Sets `count` blocks aside, all or none.

    Args:
      state: the pool.
      count: i32[].
      max_blocks: static bound K of the count.
      scores: which inactive blocks are evicted first, as in `pool.allocate`.
    """
    state, result = pool.allocate(state, count[None], max_blocks=max_blocks, scores=scores)
    granted = jnp.where(result.status[0] == Status.OK, count, 0).astype(jnp.int32)
    grant = Grant(result.block_ids[0], jnp.int32(0), granted, jnp.int32(0))
    return state, ReserveResult(grant, result.status[0], result.evicted)


def extend(
    running: sequences.SequenceBatch, grant: Grant, num_tokens: jax.Array, *, max_blocks: int = 1
) -> tuple[sequences.SequenceBatch, Grant, jax.Array]:
    """Makes room for the next tokens of each row, in row order, until the first row that the grant cannot serve.

    Args:
      running: the sequences.
      grant: the blocks set aside.
      num_tokens: i32[B], new tokens of each row.
      max_blocks: static bound of the new blocks of a row in one group.

    Returns:
      Sequences, grant, and i32[B] status (OUT_OF_BLOCKS, TABLE_FULL, INVALID_COUNT); a row without room keeps its
      length.
    """
    groups, _, width = running.block_tables.shape
    lengths = running.lengths + num_tokens
    needed = sequences.blocks_for(lengths, running.block_size)
    fresh = jnp.maximum(needed - running.num_blocks, 0)
    wide = needed <= width
    valid = wide & (num_tokens >= 0) & (fresh <= max_blocks)
    fresh = jnp.where(valid, fresh, 0)
    ends = jnp.cumsum(groups * fresh, dtype=jnp.int32)
    fits = grant.used + ends <= grant.count
    granted = valid & fits
    group = jnp.arange(groups, dtype=jnp.int32)[None, :, None]
    nth = (grant.used + ends - groups * fresh)[:, None, None] + group * fresh[:, None, None]
    nth = nth + jnp.arange(max_blocks, dtype=jnp.int32)[None, None, :]
    blocks = grant.block_ids.at[nth].get(mode="clip")
    appended = sequences.append(running, blocks, jnp.where(granted, fresh, 0))
    status = jnp.where(fits, Status.OK, Status.OUT_OF_BLOCKS)
    status = jnp.where(valid, status, jnp.where(wide, Status.INVALID_COUNT, Status.TABLE_FULL))
    return (
        replace(appended, lengths=jnp.where(granted, lengths, running.lengths)),
        replace(grant, used=grant.used + jnp.max(jnp.where(granted, ends, 0))),
        status.astype(jnp.int32),
    )


def advance(
    running: sequences.SequenceBatch,
    grant: Grant,
    lengths: jax.Array,
    num_tokens: jax.Array,
    begun: jax.Array,
    *,
    max_blocks: int = 1,
) -> tuple[sequences.SequenceBatch, Grant, jax.Array]:
    """Sets each row to the tokens that were accepted and makes room for the next ones: a step of speculative decoding.

    First the rows that need fewer blocks than they hold give the rest back to the grant, then the others draw on it,
    in row order, until the first row that it cannot serve.

    Args:
      running: the sequences.
      grant: the blocks set aside.
      lengths: i32[B], tokens of each row that stay, at most as many as it has.
      num_tokens: i32[B], new tokens of each row.
      begun: i32[B], tokens of each row when the grant was reserved; what they take is not given back.
      max_blocks: static bound of the blocks that a row takes or gives back in one group.

    Returns:
      Sequences, grant, and i32[B] status (OUT_OF_BLOCKS, TABLE_FULL, INVALID_COUNT). A row for which there is no room
      has `lengths` tokens; one whose numbers are out of range, or whose blocks change by more than `max_blocks`, is
      left as it is.
    """
    groups, batch, width = running.block_tables.shape
    held = running.num_blocks
    target = lengths + num_tokens
    needed = sequences.blocks_for(target, running.block_size)
    wide = needed <= width
    valid = wide & (num_tokens >= 0) & (begun <= lengths) & (lengths <= running.lengths)
    valid &= jnp.abs(needed - held) <= max_blocks
    change = jnp.where(valid, needed - held, 0)
    back, fresh = jnp.maximum(-change, 0), jnp.maximum(change, 0)

    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    row = jnp.arange(batch, dtype=jnp.int32)[None, :, None]
    nth = jnp.arange(max_blocks, dtype=jnp.int32)[None, None, :]
    leaving = nth < back[None, :, None]
    place = jnp.where(leaving, held[None, :, None] - 1 - nth, width)
    blocks = running.block_tables.at[group, row, place].get(**FILL, fill_value=running.pool_blocks)
    ends = jnp.cumsum(groups * back, dtype=jnp.int32)
    top = (grant.used - (ends - groups * back))[None, :, None]
    position = jnp.where(leaving, top - 1 - group * back[None, :, None] - nth, grant.block_ids.shape[0])
    block_ids = grant.block_ids.at[position].set(blocks, **DROP)
    used = grant.used - ends[-1]
    trimmed = replace(
        running,
        block_tables=running.block_tables.at[group, row, place].set(running.pool_blocks, **DROP),
        num_blocks=held - back,
    )

    ends = jnp.cumsum(groups * fresh, dtype=jnp.int32)
    fits = used + ends <= grant.count
    granted = valid & fits
    first = (used + ends - groups * fresh)[:, None, None] + group.transpose(1, 0, 2) * fresh[:, None, None]
    drawn = block_ids.at[first + nth].get(**CLIP)
    appended = sequences.append(trimmed, drawn, jnp.where(granted, fresh, 0))
    status = jnp.where(fits, Status.OK, Status.OUT_OF_BLOCKS)
    status = jnp.where(valid, status, jnp.where(wide, Status.INVALID_COUNT, Status.TABLE_FULL))
    return (
        replace(appended, lengths=jnp.where(valid, jnp.where(granted, target, lengths), running.lengths)),
        replace(grant, block_ids=block_ids, used=used + jnp.max(jnp.where(granted, ends, 0))),
        status.astype(jnp.int32),
    )


def commit(
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    grant: Grant,
    rows: jax.Array,
    hashes: jax.Array,
    first: jax.Array,
    counts: jax.Array,
) -> tuple[pool.PoolState, sequences.SequenceBatch, sequences.RegisterResult]:
    """Registers the blocks that a loop completed, and gives back what its grant has left.

    Args:
      state: the pool that the grant was reserved from.
      running: the sequences after the loop.
      grant: the grant after the loop; it is spent.
      rows: i32[R], B for padding.
      hashes: u32[R, M, 4], sequence hashes of the blocks from `first` on.
      first: i32[R], index in the table of the first block to register.
      counts: i32[R], how many blocks.
    """
    return sequences.register(give_back(state, grant), running, rows, hashes, first, counts)


def give_back(state: pool.PoolState, grant: Grant) -> pool.PoolState:
    """Resets the blocks that a grant has left; the grant is spent."""
    nth = jnp.arange(grant.block_ids.shape[0], dtype=jnp.int32)
    left = (nth >= grant.used) & (nth < grant.count)
    # Released last first, so that the stack of reset blocks is again what it was.
    state, _ = pool.release(state, jnp.where(left, grant.block_ids, state.num_blocks)[None])
    return state
