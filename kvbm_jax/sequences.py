"""Sequences: a batch of block tables and lengths, as an immutable pytree beside the pool.

A row of the batch is one running request. Its table names, for each group, the blocks that hold its tokens, in order.
The verbs take the pool and the batch and return both:

    start      match the prompt's prefix, hold it, allocate the rest       (tokens are slots now, not yet written)
    extend     make room for the next tokens, crossing into new blocks as needed
    register   make completed blocks findable; duplicates give way to the canonical block
    fork       begin copies of running sequences; every block is shared, the partial tail too
    unshare    give rows that are about to be written a tail of their own (copy on write)
    trim       roll back to a shorter length and give the surplus blocks back
    rewind     roll back inside a compiled loop; the blocks stay for the tokens to come
    slide      give back what the windows of sliding-window groups have passed
    release    give everything back, last block first

A block that others hold, or can find by its hash, is never written: `extend` refuses a row whose tail is such a block
until `unshare` has replaced it.

Groups serve hybrid models: layers of one group share a table, all groups draw on one pool of equal-byte blocks, and a
prefix hit is what every group can serve (`kvbm_jax.groups`). A plain model has one group. The table of a window group
has no blocks before place `first`: its entries there hold N.

Axes: G groups, B rows of the batch, W blocks of a table, T tokens of a block, N blocks of the pool, R rows of one call,
M hashes of a row, K blocks that one call appends or frees in a row's table.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvbm_jax import pool
from kvbm_jax.errors import LayoutError
from kvbm_jax.groups import Group, first_places, has_windows, longest_hit
from kvbm_jax.ordering import fence
from kvbm_jax.padding import CLIP, DROP, FILL
from kvbm_jax.types import Status

__all__ = [
    "ExtendResult",
    "RegisterResult",
    "SequenceBatch",
    "StartResult",
    "UnshareResult",
    "append",
    "begin_rows",
    "blocks_for",
    "drop_passed",
    "empty_rows",
    "extend",
    "find_prefixes",
    "fork",
    "fresh_blocks",
    "init",
    "last_first",
    "passed",
    "register",
    "release",
    "rewind",
    "set_rows",
    "slide",
    "slots",
    "start",
    "tails",
    "trim",
    "unshare",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SequenceBatch:
    """Tables and lengths of B running sequences."""

    block_tables: jax.Array  # i32[G, B, W], padded with N
    lengths: jax.Array  # i32[B]: tokens that have a slot
    num_blocks: jax.Array  # i32[B]: places taken in each table, the same in every group
    first: jax.Array  # i32[G, B]: the first place that holds a block; 0 in full groups
    block_size: int = field(metadata={"static": True})  # T
    pool_blocks: int = field(metadata={"static": True})  # N, which pads tables
    groups: tuple[Group, ...] = field(metadata={"static": True})  # G of them


class StartResult(NamedTuple):
    """Outcome of `start` for each row of the call."""

    num_cached: jax.Array  # i32[R]: tokens whose keys and values are in the cache already
    status: jax.Array  # i32[R]
    evicted: pool.Evicted


class ExtendResult(NamedTuple):
    """Outcome of `extend` for each row of the batch."""

    status: jax.Array  # i32[B]
    evicted: pool.Evicted


class UnshareResult(NamedTuple):
    """Outcome of `unshare` for each row of the batch: what `cache.copy_blocks` has to copy."""

    sources: jax.Array  # i32[B, G], N where nothing is copied
    targets: jax.Array  # i32[B, G]
    status: jax.Array  # i32[B]
    evicted: pool.Evicted


class RegisterResult(NamedTuple):
    """Outcome of `register` for each row of the call."""

    block_ids: jax.Array  # i32[G, R, M]: the blocks that hold the hashes now, padded with N
    registered: jax.Array  # bool[G, R, M]: newly findable
    status: jax.Array  # i32[G, R, M]


def init(
    max_sequences: int, max_blocks: int, *, block_size: int, pool_blocks: int, groups: tuple[Group, ...] = (Group(),)
) -> SequenceBatch:
    """Returns a batch of empty rows.

    Args:
      max_sequences: B.
      max_blocks: W, which bounds the length of a sequence at W * T tokens.
      block_size: T.
      pool_blocks: N of the pool that the batch draws on.
      groups: G of them, what each needs of the past; one full group for a plain model.

    Raises:
      LayoutError: if a size is not positive, or there is no group.
    """
    sizes = {
        "max_sequences": max_sequences,
        "max_blocks": max_blocks,
        "block_size": block_size,
        "pool_blocks": pool_blocks,
        "number of groups": len(groups),
    }
    for name, value in sizes.items():
        if value < 1:
            raise LayoutError(f"{name} is {value}; it must be at least 1")
    return SequenceBatch(
        block_tables=jnp.full((len(groups), max_sequences, max_blocks), pool_blocks, jnp.int32),
        lengths=jnp.zeros((max_sequences,), jnp.int32),
        num_blocks=jnp.zeros((max_sequences,), jnp.int32),
        first=jnp.zeros((len(groups), max_sequences), jnp.int32),
        block_size=block_size,
        pool_blocks=pool_blocks,
        groups=groups,
    )


def blocks_for(tokens: jax.Array, block_size: int) -> jax.Array:
    """Returns how many blocks hold that many tokens."""
    return (tokens + block_size - 1) // block_size


def start(
    state: pool.PoolState,
    sequences: SequenceBatch,
    rows: jax.Array,
    hashes: jax.Array,
    num_hashes: jax.Array,
    num_tokens: jax.Array,
    *,
    scores: pool.Scores | None = None,
) -> tuple[pool.PoolState, SequenceBatch, StartResult]:
    """Begins sequences: their longest cached prefix is held, the rest of their tokens gets fresh blocks.

    The prefix is the longest that every group can serve. Of it a window group holds only the blocks that the tokens
    after it can see; after it, every group gets a block for each place, which `slide` frees once they are computed.

    Args:
      state: the pool.
      sequences: the batch.
      rows: i32[R], distinct empty rows of the batch; B for padding.
      hashes: u32[R, M, 4], sequence hashes of the prompt's whole blocks, M at most W.
      num_hashes: i32[R], how many of them may match; cap it at (num_tokens - 1) // T, so that the last token is
        computed.
      num_tokens: i32[R], tokens of each prompt; 0 for padding.
      scores: which inactive blocks are evicted first, as in `pool.allocate`.

    Returns:
      Pool, batch and result. A row that does not fit stays empty, holds nothing and leaves no trace (OUT_OF_BLOCKS, as
      are all later ones; TABLE_FULL if the table is too narrow).
    """
    groups, batch, width = sequences.block_tables.shape
    count, asked = hashes.shape[:2]
    if asked > width:
        raise LayoutError(f"{asked} hashes a row exceed the table's {width} blocks; start fewer or widen the table")
    needed = blocks_for(num_tokens, sequences.block_size)
    wide = needed <= width
    prefix, cached = find_prefixes(state, sequences, hashes, jnp.where(wide, num_hashes, 0))
    fresh = jnp.where(wide, needed - cached, 0)
    state, begun = pool.exchange(state, jnp.zeros((0,), jnp.int32), prefix.reshape(count, -1))
    state, drawn = pool.admit(state, begun, groups * fresh, max_count=count * groups * width, scores=scores)
    granted = wide & drawn.granted
    picked = fresh_blocks(sequences, drawn, cached, fresh)
    sequences = begin_rows(sequences, jnp.where(granted, rows, batch), prefix, cached, picked, num_tokens)
    status = jnp.where(drawn.granted, Status.OK, Status.OUT_OF_BLOCKS)
    status = jnp.where(wide, status, Status.TABLE_FULL).astype(jnp.int32)
    cached_tokens = jnp.where(granted, cached * sequences.block_size, 0)
    return state, sequences, StartResult(cached_tokens, status, drawn.evicted)


def fresh_blocks(sequences: SequenceBatch, drawn: pool.DrawResult, cached: jax.Array, fresh: jax.Array) -> jax.Array:
    """Lays out the blocks drawn by the first R rows for `begin_rows`.

    Args:
      sequences: the batch.
      drawn: what they got.
      cached: i32[R], places of the prefix that come first.
      fresh: i32[R], blocks drawn for each group.

    Returns:
      i32[R, G, W], a block for each place from `cached` on.
    """
    groups, _, width = sequences.block_tables.shape
    group = jnp.arange(groups, dtype=jnp.int32)[None, :, None]
    column = jnp.arange(width, dtype=jnp.int32)[None, None, :]
    begin = drawn.first[: len(cached)] - cached
    nth = begin[:, None, None] + group * fresh[:, None, None] + column
    return drawn.block_ids.at[nth].get(**CLIP)


def find_prefixes(
    state: pool.PoolState, sequences: SequenceBatch, hashes: jax.Array, counts: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Finds the longest prefixes that every group can serve.

    Args:
      state: the pool.
      sequences: the batch.
      hashes: u32[R, M, 4], sequence hashes.
      counts: i32[R], how many of them may match.

    Returns:
      i32[R, G, M] blocks to hold, padded with N, and i32[R] the prefixes in blocks.
    """
    groups = range(len(sequences.groups))
    found = jnp.stack([pool.scan(state, hashes, counts, group=group) for group in groups], axis=1)
    return longest_hit(sequences.groups, found, block_size=sequences.block_size, num_blocks=sequences.pool_blocks)


def begin_rows(
    sequences: SequenceBatch,
    rows: jax.Array,
    prefix: jax.Array,
    cached: jax.Array,
    fresh: jax.Array,
    num_tokens: jax.Array,
) -> SequenceBatch:
    """Writes rows that begin: what is cached of each, then fresh blocks.

    Args:
      sequences: the batch.
      rows: i32[R], padded with B.
      prefix: i32[R, G, M], what was found.
      cached: i32[R], how many blocks of it.
      fresh: i32[R, G, W], a block for each place after them.
      num_tokens: i32[R].
    """
    width = sequences.block_tables.shape[2]
    needed = blocks_for(num_tokens, sequences.block_size)
    column = jnp.arange(width, dtype=jnp.int32)[None, None, :]
    more = ((0, 0), (0, 0), (0, width - prefix.shape[2]))
    table = jnp.pad(prefix, more, constant_values=sequences.pool_blocks)
    table = jnp.where(column < cached[:, None, None], table, fresh)
    table = jnp.where(column < needed[:, None, None], table, sequences.pool_blocks)
    first = first_places(sequences.groups, cached * sequences.block_size, sequences.block_size)
    return set_rows(sequences, rows, tables=table.transpose(1, 0, 2), lengths=num_tokens, counts=needed, first=first)


def set_rows(
    sequences: SequenceBatch,
    rows: jax.Array,
    *,
    tables: jax.Array | int,
    lengths: jax.Array | int,
    counts: jax.Array | int,
    first: jax.Array | int,
) -> SequenceBatch:
    """Writes whole rows.

    Args:
      sequences: the batch.
      rows: i32[R], distinct, padded with B.
      tables: i32[G, R, W].
      lengths: i32[R].
      counts: i32[R], the `num_blocks` of each.
      first: i32[G, R].
    """
    return replace(
        sequences,
        block_tables=sequences.block_tables.at[:, rows].set(tables, **DROP),
        lengths=sequences.lengths.at[rows].set(lengths, **DROP),
        num_blocks=sequences.num_blocks.at[rows].set(counts, **DROP),
        # Without windows it is 0 everywhere.
        first=sequences.first.at[:, rows].set(first, **DROP) if has_windows(sequences.groups) else sequences.first,
    )


def empty_rows(sequences: SequenceBatch, rows: jax.Array) -> SequenceBatch:
    """Empties rows i32[R], padded with B; what they held is the caller's to release."""
    return set_rows(sequences, rows, tables=sequences.pool_blocks, lengths=0, counts=0, first=0)


def extend(
    state: pool.PoolState,
    sequences: SequenceBatch,
    num_tokens: jax.Array,
    *,
    max_blocks: int = 1,
    scores: pool.Scores | None = None,
) -> tuple[pool.PoolState, SequenceBatch, ExtendResult]:
    """Makes room for the next tokens of each row, in row order.

    Args:
      state: the pool.
      sequences: the batch.
      num_tokens: i32[B], new tokens of each row.
      max_blocks: static bound of the new blocks of a row in one group.
      scores: which inactive blocks are evicted first, as in `pool.allocate`.

    Returns:
      Pool, batch and result; a row that gets no room keeps its length. A row whose tail is shared gets SHARED_TAIL.
    """
    groups, batch, width = sequences.block_tables.shape
    lengths = sequences.lengths + num_tokens
    needed = blocks_for(lengths, sequences.block_size)
    wide = needed <= width
    row = jnp.arange(batch, dtype=jnp.int32)
    _, shared = tails(state, sequences, jnp.where(num_tokens != 0, row, batch))
    private = ~jnp.any(shared, axis=1)
    fresh = jnp.where(wide & private, jnp.maximum(needed - sequences.num_blocks, 0), 0)
    fits = (fresh <= max_blocks) & (num_tokens >= 0)
    state, grant = pool.allocate(
        state,
        jnp.where(fits, groups * fresh, groups * max_blocks + 1),
        max_blocks=groups * max_blocks,
        scores=scores,
    )
    blocks = jnp.arange(groups, dtype=jnp.int32)[None, :, None] * fresh[:, None, None]
    blocks = blocks + jnp.arange(max_blocks, dtype=jnp.int32)[None, None, :]
    picked = jnp.take_along_axis(grant.block_ids, blocks.reshape(batch, -1), axis=1, mode="clip")
    granted = wide & private & (grant.status == Status.OK)
    sequences = append(sequences, picked.reshape(batch, groups, max_blocks), jnp.where(granted, fresh, 0))
    status = jnp.where(private, grant.status, Status.SHARED_TAIL)
    status = jnp.where(wide, status, Status.TABLE_FULL).astype(jnp.int32)
    sequences = replace(sequences, lengths=jnp.where(granted, lengths, sequences.lengths))
    return state, sequences, ExtendResult(status, grant.evicted)


def append(sequences: SequenceBatch, blocks: jax.Array, counts: jax.Array) -> SequenceBatch:
    """Appends blocks to the tables; lengths stay.

    Args:
      sequences: the batch.
      blocks: i32[B, G, K].
      counts: i32[B], how many of a row's K blocks are appended in each group.
    """
    groups, batch, width = sequences.block_tables.shape
    column = jnp.arange(blocks.shape[2], dtype=jnp.int32)[None, :]
    place = jnp.where(column < counts[:, None], sequences.num_blocks[:, None] + column, width)
    row = jnp.arange(batch, dtype=jnp.int32)[None, :, None]
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    return replace(
        sequences,
        block_tables=sequences.block_tables.at[group, row, place[None]].set(blocks.transpose(1, 0, 2), **DROP),
        num_blocks=sequences.num_blocks + counts,
    )


def register(
    state: pool.PoolState,
    sequences: SequenceBatch,
    rows: jax.Array,
    hashes: jax.Array,
    first: jax.Array,
    counts: jax.Array,
) -> tuple[pool.PoolState, SequenceBatch, RegisterResult]:
    """Makes completed blocks of rows findable, in every group.

    Args:
      state: the pool.
      sequences: the batch.
      rows: i32[R], B for padding.
      hashes: u32[R, M, 4], sequence hashes of the blocks from `first` on.
      first: i32[R], index in the table of the first block to register.
      counts: i32[R], how many blocks.

    Returns:
      Pool, batch (tables name the canonical blocks) and result.
    """
    groups, batch, width = sequences.block_tables.shape
    column = jnp.arange(hashes.shape[1], dtype=jnp.int32)[None, :]
    place = jnp.where((column < counts[:, None]) & (rows < batch)[:, None], first[:, None] + column, width)
    results = []
    tables = sequences.block_tables
    for group in range(groups):
        ids = tables.at[group, rows[:, None], place].get(**FILL, fill_value=sequences.pool_blocks)
        state, result = pool.register(state, ids, hashes, group=group)
        tables, block_ids = fence((tables, result.block_ids))
        tables = tables.at[group, rows[:, None], place].set(block_ids, **DROP)
        results.append(result)
    stacked = RegisterResult(*(jnp.stack(parts) for parts in zip(*results, strict=True)))
    return state, replace(sequences, block_tables=tables), stacked


def release(
    state: pool.PoolState, sequences: SequenceBatch, rows: jax.Array
) -> tuple[pool.PoolState, SequenceBatch, jax.Array]:
    """Ends sequences: their blocks lose a holder, last block first, rows in order.

    Args:
      state: the pool.
      sequences: the batch.
      rows: i32[R], distinct; B for padding.

    Returns:
      Pool, batch with the rows empty, and i32[R] status (QUEUE_FULL: nothing was released; compact the pool and call
      again).
    """
    batch = sequences.block_tables.shape[1]
    tables = sequences.block_tables.at[:, rows].get(**FILL, fill_value=sequences.pool_blocks)
    state, status = pool.release(state, last_first(tables.transpose(1, 0, 2)))
    done = jnp.where(status == Status.QUEUE_FULL, batch, rows)
    old, done = fence((sequences.block_tables, done))
    return state, empty_rows(replace(sequences, block_tables=old), done), status


def fork(
    state: pool.PoolState, sequences: SequenceBatch, sources: jax.Array, rows: jax.Array
) -> tuple[pool.PoolState, SequenceBatch, jax.Array]:
    """Begins copies of running sequences: beams, parallel samples.

    Every block is shared, the partial tail too; a row that goes on writing needs `unshare` first. (PagedAttention,
    Kwon et al., SOSP 2023, section 4.4.)

    Args:
      state: the pool.
      sequences: the batch.
      sources: i32[R], rows to copy; one may be named often.
      rows: i32[R], distinct empty rows of the batch; B for padding.

    Returns:
      Pool, batch, and i32[R] status.
    """
    groups, batch, width = sequences.block_tables.shape
    lengths = sequences.lengths.at[sources].get(**FILL, fill_value=0)
    lengths = jnp.where(rows < batch, lengths, 0)
    # Blocks beyond the length are the source's own, kept by `rewind` for tokens to come.
    count = blocks_for(lengths, sequences.block_size)
    column = jnp.arange(width, dtype=jnp.int32)[None, None, :]
    tables = sequences.block_tables.at[:, sources].get(**FILL, fill_value=sequences.pool_blocks)
    tables = jnp.where(column < count[None, :, None], tables, sequences.pool_blocks)
    state, status = pool.acquire(state, tables.transpose(1, 0, 2).reshape(-1, groups * width))
    first = sequences.first.at[:, sources].get(**FILL, fill_value=0)
    old, tables = fence((sequences.block_tables, tables))
    forked = set_rows(
        replace(sequences, block_tables=old), rows, tables=tables, lengths=lengths, counts=count, first=first
    )
    return state, forked, status


def unshare(
    state: pool.PoolState, sequences: SequenceBatch, mask: jax.Array, *, scores: pool.Scores | None = None
) -> tuple[pool.PoolState, SequenceBatch, UnshareResult]:
    """Gives rows that are about to be written a tail of their own, where the next token's block is shared.

    Args:
      state: the pool.
      sequences: the batch.
      mask: bool[B], rows that will be written.
      scores: which inactive blocks are evicted first, as in `pool.allocate`.

    Returns:
      Pool, batch, and the copies to make, `cache.copy_blocks(cache, sources, targets)`, before any other program
      writes to the cache. Rows that share a tail and are named together all get a new one. A row without room keeps
      its tail (OUT_OF_BLOCKS, as do all later ones); where the tails left behind have no room in the inactive queue,
      nothing happens (QUEUE_FULL).
    """
    groups, batch, width = sequences.block_tables.shape
    rows = jnp.where(mask, jnp.arange(batch, dtype=jnp.int32), batch)
    last, shared = tails(state, sequences, rows)
    needs = jnp.any(shared, axis=1)
    room = groups * jnp.sum(needs, dtype=jnp.int32) <= pool.release_room(state)
    needs = needs & room
    state, grant = pool.allocate(state, jnp.where(needs, groups, 0), max_blocks=groups, scores=scores)
    done = needs & (grant.status == Status.OK)
    sources = jnp.where(done[:, None], last, sequences.pool_blocks)
    targets = jnp.where(done[:, None], grant.block_ids, sequences.pool_blocks)
    state, _ = pool.release(state, sources)
    place = jnp.where(done, sequences.lengths // sequences.block_size, width)
    row = jnp.arange(batch, dtype=jnp.int32)[None, :]
    group = jnp.arange(groups, dtype=jnp.int32)[:, None]
    old, targets = fence((sequences.block_tables, targets))
    tables = old.at[group, row, place[None, :]].set(targets.T, **DROP)
    status = jnp.where(room, grant.status, Status.QUEUE_FULL).astype(jnp.int32)
    return state, replace(sequences, block_tables=tables), UnshareResult(sources, targets, status, grant.evicted)


def trim(
    state: pool.PoolState, sequences: SequenceBatch, lengths: jax.Array, *, max_blocks: int = 1
) -> tuple[pool.PoolState, SequenceBatch, jax.Array]:
    """Rolls sequences back to shorter lengths, as when drafted tokens are rejected, and gives surplus blocks back.

    Args:
      state: the pool.
      sequences: the batch.
      lengths: i32[B], tokens that each row keeps; its present length leaves a row as it is.
      max_blocks: static bound of the blocks that a row gives back in one group.

    Returns:
      Pool, batch, and i32[B] status: INVALID_COUNT where a length is negative, beyond the present one, or gives back
      more than `max_blocks`; WINDOW_PASSED where the next token would see a block that `slide` has freed; QUEUE_FULL
      for all rows, and nothing is done, where what is given back has no room in the inactive queue. A row that ends
      inside a registered block goes on after `unshare`.
    """
    _, batch, width = sequences.block_tables.shape
    kept = blocks_for(jnp.maximum(lengths, 0), sequences.block_size)
    surplus = sequences.num_blocks - kept
    counted = (lengths >= 0) & (lengths <= sequences.lengths) & (surplus <= max_blocks)
    first = jnp.minimum(sequences.first, kept[None, :])  # where everything goes, nothing is missed
    seen = ~_passed_over(sequences, first, lengths)
    valid = counted & seen
    nth = jnp.arange(max_blocks, dtype=jnp.int32)[None, :]
    place = jnp.where(valid[:, None] & (nth < surplus[:, None]), kept[:, None] + nth, width)
    row = jnp.arange(batch, dtype=jnp.int32)[:, None]
    blocks = sequences.block_tables.at[:, row, place].get(**FILL, fill_value=sequences.pool_blocks)
    state, released = pool.release(state, last_first(blocks.transpose(1, 0, 2)))
    done = valid & (released != Status.QUEUE_FULL)
    place = jnp.where(done[:, None], place, width)
    old, place = fence((sequences.block_tables, place))
    trimmed = replace(
        sequences,
        block_tables=old.at[:, row, place].set(sequences.pool_blocks, **DROP),
        lengths=jnp.where(done, lengths, sequences.lengths),
        num_blocks=jnp.where(done, kept, sequences.num_blocks),
        first=jnp.where(done[None, :], first, sequences.first),
    )
    status = jnp.where(seen, released, Status.WINDOW_PASSED)
    status = jnp.where(counted, status, Status.INVALID_COUNT)
    return state, trimmed, jnp.where(released == Status.QUEUE_FULL, released, status).astype(jnp.int32)


def rewind(sequences: SequenceBatch, lengths: jax.Array) -> tuple[SequenceBatch, jax.Array]:
    """Rolls sequences back to shorter lengths without the pool: blocks stay in their tables, for the tokens to come.

    For compiled loops of speculative decoding. A length below what a loop began with may reach into shared blocks.

    Args:
      sequences: the batch.
      lengths: i32[B], tokens that each row keeps.

    Returns:
      The batch, and i32[B] status: INVALID_COUNT where a length is negative or beyond the present one, WINDOW_PASSED
      where the next token would see a block that `slide` has freed.
    """
    counted = (lengths >= 0) & (lengths <= sequences.lengths)
    seen = ~_passed_over(sequences, sequences.first, lengths)
    status = jnp.where(seen, Status.OK, Status.WINDOW_PASSED)
    status = jnp.where(counted, status, Status.INVALID_COUNT).astype(jnp.int32)
    valid = counted & seen
    return replace(sequences, lengths=jnp.where(valid, lengths, sequences.lengths)), status


def slide(
    state: pool.PoolState, sequences: SequenceBatch, num_computed: jax.Array, *, max_blocks: int = 1
) -> tuple[pool.PoolState, SequenceBatch, jax.Array]:
    """Gives back the blocks of window groups that no token to come can see; full groups keep theirs.

    Registered blocks become inactive and stay findable, others are reset, so register completed blocks before. A row
    that has more than `max_blocks` to give back gives its oldest, and goes on in the next call.

    Args:
      state: the pool.
      sequences: the batch.
      num_computed: i32[B], tokens of each row whose keys and values are written, at most its length; 0 leaves a row
        as it is.
      max_blocks: static bound of the blocks that a row gives back in one group.

    Returns:
      Pool, batch, and i32[B] status: INVALID_COUNT where a count is negative or beyond the length; QUEUE_FULL for all
      rows, and nothing is done, where what is given back has no room in the inactive queue.
    """
    counts = passed(sequences, num_computed, max_blocks=max_blocks)
    room = jnp.sum(counts, dtype=jnp.int32) <= pool.release_room(state)
    sequences, blocks = drop_passed(sequences, jnp.where(room, counts, 0), max_blocks=max_blocks)
    state, _ = pool.release(state, blocks)
    valid = (num_computed >= 0) & (num_computed <= sequences.lengths)
    status = jnp.where(valid, Status.OK, Status.INVALID_COUNT)
    return state, sequences, jnp.where(room, status, Status.QUEUE_FULL).astype(jnp.int32)


def passed(sequences: SequenceBatch, num_computed: jax.Array, *, max_blocks: int) -> jax.Array:
    """Counts what `slide` would give back, i32[G, B]; see there."""
    valid = (num_computed >= 0) & (num_computed <= sequences.lengths)
    seen = first_places(sequences.groups, jnp.where(valid, num_computed, 0), sequences.block_size)
    return jnp.clip(seen - sequences.first, 0, max_blocks)


def drop_passed(sequences: SequenceBatch, counts: jax.Array, *, max_blocks: int) -> tuple[SequenceBatch, jax.Array]:
    """Takes the oldest blocks out of tables, and leaves it to the caller to release them.

    Args:
      sequences: the batch.
      counts: i32[G, B], at most `max_blocks`.
      max_blocks: static K.

    Returns:
      The batch, and i32[B, K * G] the blocks as `last_first` lays them out, padded with N.
    """
    groups, batch, width = sequences.block_tables.shape
    nth = jnp.arange(max_blocks, dtype=jnp.int32)[None, None, :]
    place = jnp.where(nth < counts[:, :, None], sequences.first[:, :, None] + nth, width)
    row = jnp.arange(batch, dtype=jnp.int32)[None, :, None]
    group = jnp.arange(groups, dtype=jnp.int32)[:, None, None]
    blocks = sequences.block_tables.at[group, row, place].get(**FILL, fill_value=sequences.pool_blocks)
    old, blocks = fence((sequences.block_tables, blocks))
    tables = old.at[group, row, place].set(sequences.pool_blocks, **DROP)
    left = replace(sequences, block_tables=tables, first=sequences.first + counts)
    return left, last_first(blocks.transpose(1, 0, 2))


def _passed_over(sequences: SequenceBatch, first: jax.Array, lengths: jax.Array) -> jax.Array:
    """Whether tokens from position `lengths` i32[B] on would see places before `first` i32[G, B], bool[B]."""
    if not has_windows(sequences.groups):
        return jnp.zeros(lengths.shape, bool)
    return jnp.any(first_places(sequences.groups, lengths, sequences.block_size) < first, axis=0)


def slots(sequences: SequenceBatch, rows: jax.Array, positions: jax.Array) -> jax.Array:
    """Finds the slots of tokens.

    Args:
      sequences: the batch.
      rows: i32[S], row of each token; B for padding.
      positions: i32[S], position of each token in its sequence.

    Returns:
      i32[G, S]: block * T + offset; N * T for padding and for positions without a block.
    """
    size = sequences.block_size
    blocks = sequences.block_tables.at[:, rows, positions // size].get(**FILL, fill_value=sequences.pool_blocks)
    padding = sequences.pool_blocks * size
    return jnp.where(blocks < sequences.pool_blocks, blocks * size + (positions % size)[None, :], padding)


def tails(state: pool.PoolState, sequences: SequenceBatch, rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the blocks that the next token of each row goes into, where the table has them already.

    Args:
      state: the pool.
      sequences: the batch.
      rows: i32[R], B for padding.

    Returns:
      i32[R, G] blocks, padded with N, and bool[R, G]: others hold or can find them, so that they must not be written.
    """
    place = sequences.lengths.at[rows].get(**FILL, fill_value=0) // sequences.block_size
    blocks = sequences.block_tables.at[:, rows, place].get(**FILL, fill_value=sequences.pool_blocks).T
    return blocks, pool.is_shared(state, blocks)


def last_first(tables: jax.Array) -> jax.Array:
    """Lays tables i32[R, G, W] out as rows i32[R, W * G], so that releasing them ends all groups tail by tail."""
    return tables.transpose(0, 2, 1).reshape(tables.shape[0], -1)
