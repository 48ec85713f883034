"""The block pool: which block is free, held, cached or evictable, as an immutable pytree.

A pool knows block ids, not contents. Its life of a block:

                    allocate                     register
      reset -----------------------> mutable --------------------> registered
        ^                            (held)    hash -> block          (held)
        |                              |                            ^       |
        |          last release,       |                    acquire |       | last release
        |<-----------------------------+                   (a hit)  |       v
        |          unregistered                                     inactive
        |                          allocate, evict, clear               |
        +---------------------------------------------------------------+
                              evicted: hash forgotten

"Complete" is a mutable block whose tokens are all written: the sequence that holds it knows that, the pool does not.

Verbs take a state and return a new one and a result. They are not jitted: the owner jits and donates the state. They
are batch-first: rows of `block_ids[B, M]` are requests, and one call has the effect of its rows in order. The cost of
a verb depends on the sizes of its arguments, not on `num_blocks`, except where it says so. No verb holds a `while`, a
`cond` of its own or a host callback.

Order of eviction (the same as vLLM's): reset blocks are granted before any registered one is evicted; among inactive
blocks the least recently released goes first; of one sequence the last block is released first. Verbs that may evict
take `scores`, by which another order is asked for: see `Scores`, and `kvbm_jax.policies`.

Axes: N blocks, B rows (requests), M blocks of a row, F = B * M.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvbm_jax import index as block_index
from kvbm_jax import lru
from kvbm_jax.bits import last_of, ranks
from kvbm_jax.errors import LayoutError
from kvbm_jax.ordering import fence
from kvbm_jax.padding import CLIP, DROP, FILL
from kvbm_jax.types import Status

__all__ = [
    "AllocateResult",
    "DrawResult",
    "EnterResult",
    "Evicted",
    "Exchange",
    "MatchResult",
    "PoolState",
    "PoolStats",
    "RegisterResult",
    "Scores",
    "acquire",
    "admit",
    "allocate",
    "check_generations",
    "clear",
    "compact",
    "draw",
    "drop",
    "enter",
    "evict",
    "exchange",
    "give_up",
    "init",
    "is_inactive",
    "is_shared",
    "keys_of",
    "match",
    "register",
    "rehash",
    "release",
    "release_room",
    "scan",
    "stats",
]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PoolState:
    """Bookkeeping of N blocks; 65 to 90 bytes a block."""

    ref_counts: jax.Array  # i32[N]: holders of each block
    generations: jax.Array  # u32[N]: how often each block was granted, modulo 2**32
    reset_stack: jax.Array  # i32[N]: reset blocks, the next to be granted on top
    num_reset: jax.Array  # i32[]: height of the stack
    inactive: lru.LruQueue  # registered blocks that nobody holds
    index: block_index.BlockIndex  # registered blocks by key

    @property
    def num_blocks(self) -> int:
        """Static number of blocks."""
        return self.ref_counts.shape[0]


type Scores = Callable[[PoolState], jax.Array]
"""Scores blocks at the moment of an eviction: from the pool, u32[N], or u32[W, N] words, the most significant first.
Inactive blocks of the lowest scores are evicted first, equal ones least recently released first. What an eviction costs
then grows with N: 32 passes over the blocks for each word, and 32 for ties."""


class Evicted(NamedTuple):
    """Blocks whose contents an allocation took away, in order of eviction."""

    block_ids: jax.Array  # i32[F], padded with N
    keys: jax.Array  # u32[F, 5]: those that they were registered under
    num_blocks: jax.Array  # i32[]

    @property
    def hashes(self) -> jax.Array:
        """The sequence hashes that they held, u32[F, 4]."""
        return self.keys[..., :4]

    @property
    def groups(self) -> jax.Array:
        """The groups that they were registered under, u32[F]."""
        return self.keys[..., 4]


class MatchResult(NamedTuple):
    """The longest resident prefix of each row."""

    block_ids: jax.Array  # i32[B, M], padded with N after the prefix
    num_blocks: jax.Array  # i32[B]


class AllocateResult(NamedTuple):
    """Blocks granted to each row, all or none."""

    block_ids: jax.Array  # i32[B, M], padded with N
    status: jax.Array  # i32[B]
    evicted: Evicted


class EnterResult(NamedTuple):
    """What each block is after `enter`."""

    canonical: jax.Array  # i32[F]: the block that holds the hash; the block itself if it does, or none does
    registered: jax.Array  # bool[F]: newly registered by this call
    status: jax.Array  # i32[F]


class DrawResult(NamedTuple):
    """Blocks granted to rows one after the other."""

    block_ids: jax.Array  # i32[F] in the order of granting, padded with N
    first: jax.Array  # i32[B]: where each row's blocks begin among them
    granted: jax.Array  # bool[B]
    evicted: Evicted


class RegisterResult(NamedTuple):
    """What each block is after registration."""

    block_ids: jax.Array  # i32[B, M]: the block to use from now on; another one where the hash was held already
    registered: jax.Array  # bool[B, M]: newly registered by this call
    status: jax.Array  # i32[B, M]


class PoolStats(NamedTuple):
    """Numbers of blocks by state; they sum to N."""

    reset: jax.Array  # i32[]
    inactive: jax.Array  # i32[]
    held: jax.Array  # i32[]


def init(num_blocks: int, *, seed: int = 0) -> PoolState:
    """Returns a pool of reset blocks; block 0 is granted first.

    Args:
      num_blocks: N, at least 1.
      seed: of the hash index.

    Raises:
      LayoutError: if `num_blocks` is not in [1, 2**30].
    """
    if not 1 <= num_blocks <= 2**30:
        raise LayoutError(f"num_blocks is {num_blocks}; a pool has between 1 and {2**30} blocks")
    return PoolState(
        ref_counts=jnp.zeros((num_blocks,), jnp.int32),
        generations=jnp.zeros((num_blocks,), jnp.uint32),
        reset_stack=jnp.arange(num_blocks - 1, -1, -1, dtype=jnp.int32),
        num_reset=jnp.int32(num_blocks),
        inactive=lru.init(num_blocks),
        index=block_index.init(num_blocks, seed),
    )


def stats(state: PoolState) -> PoolStats:
    """Counts blocks by state."""
    held = state.num_blocks - state.num_reset - state.inactive.size
    return PoolStats(reset=state.num_reset, inactive=state.inactive.size, held=held)


def match(state: PoolState, hashes: jax.Array, counts: jax.Array, *, group: jax.Array | int = 0) -> MatchResult:
    """Finds the longest resident prefix of each row; the state does not change.

    Args:
      state: the pool.
      hashes: u32[B, M, 4] chained sequence hashes.
      counts: i32[B], how many of them may match. A server caps this at (prompt tokens - 1) // block_size, since the
        last token must be computed anyway.
      group: i32[] group id.

    Returns:
      The blocks, not held yet: `acquire` them before anything else changes the pool.
    """
    found = scan(state, hashes, counts, group=group)
    miss = found == state.num_blocks
    most = hashes.shape[1]
    length = jnp.min(jnp.where(miss, jnp.arange(most)[None, :], most), axis=1, initial=most).astype(jnp.int32)
    prefix = jnp.arange(hashes.shape[1], dtype=jnp.int32)[None, :] < length[:, None]
    return MatchResult(jnp.where(prefix, found, state.num_blocks), length)


def scan(state: PoolState, hashes: jax.Array, counts: jax.Array, *, group: jax.Array | int = 0) -> jax.Array:
    """Finds every resident block of each row, not stopping at a miss; the state does not change.

    Args:
      state: the pool.
      hashes: u32[B, M, 4] sequence hashes.
      counts: i32[B], how many of them are asked for.
      group: i32[] group id.

    Returns:
      i32[B, M] block ids, N where a hash is not resident. They are not held yet.
    """
    return jnp.where(_asked(hashes, counts), block_index.lookup(state.index, hashes, group), state.num_blocks)


def acquire(state: PoolState, block_ids: jax.Array) -> tuple[PoolState, jax.Array]:
    """Adds a holder to registered or held blocks; inactive ones leave the queue.

    Args:
      state: the pool.
      block_ids: i32[B, M], padded with N.

    Returns:
      The pool, and i32[B] status. A row that names an unknown or a reset block gets nothing.
    """
    _check_ids("block_ids", block_ids, "[B, M]")
    flat = block_ids.reshape(-1)
    known = (flat >= 0) & (flat < state.num_blocks)
    padding = flat == state.num_blocks
    resident = known & (_ref_counts(state, flat) > 0) | block_index.is_registered(state.index, flat)
    status = _row_status(
        block_ids.shape, (~known & ~padding, Status.UNKNOWN_BLOCK), (known & ~resident, Status.NOT_RESIDENT)
    )
    granted = known & jnp.repeat(status == Status.OK, block_ids.shape[1])
    return _seal(_hold(state, flat, granted), status)


def allocate(
    state: PoolState, counts: jax.Array, *, max_blocks: int, scores: Scores | None = None
) -> tuple[PoolState, AllocateResult]:
    """Grants blocks to rows in order until the first row that does not fit; that row and all later ones get none.

    Args:
      state: the pool.
      counts: i32[B], blocks wanted by each row.
      max_blocks: static M, the most that a row may want.
      scores: which inactive blocks go first; None: the least recently released, at a cost that does not grow with N.

    Returns:
      The pool and the granted blocks, held once each. Reset blocks are granted first, then inactive ones in the order
      of their eviction, in which they are reported.
    """
    _check_ids("counts", counts, "[B]")
    valid = (counts >= 0) & (counts <= max_blocks)
    counts = jnp.where(valid, counts, 0)
    state, drawn = draw(state, counts, max_count=counts.shape[0] * max_blocks, scores=scores)
    column = jnp.arange(max_blocks, dtype=jnp.int32)[None, :]
    blocks = drawn.block_ids.at[drawn.first[:, None] + column].get(**FILL, fill_value=state.num_blocks)
    blocks = jnp.where(drawn.granted[:, None] & (column < counts[:, None]), blocks, state.num_blocks)
    status = jnp.where(drawn.granted, Status.OK, Status.OUT_OF_BLOCKS)
    status = jnp.where(valid, status, Status.INVALID_COUNT).astype(jnp.int32)
    return state, AllocateResult(blocks, status, drawn.evicted)


def draw(
    state: PoolState, counts: jax.Array, *, max_count: int, scores: Scores | None = None
) -> tuple[PoolState, DrawResult]:
    """Grants blocks like `allocate`, as one list: for rows whose maxima differ.

    Args:
      state: the pool.
      counts: i32[B], blocks wanted by each row.
      max_count: static F, the most that all rows together may want.
      scores: as in `allocate`.

    Returns:
      The pool and the blocks, held once each.
    """
    _check_ids("counts", counts, "[B]")
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    granted = ends <= state.num_reset + state.inactive.size
    return _grant(state, counts, ends, granted, max_count=max_count, scores=scores)


class Exchange(NamedTuple):
    """What `exchange` leaves for `admit` to do."""

    dropped: jax.Array  # i32[K]
    prefixes: jax.Array  # i32[R, M]
    registered: jax.Array  # bool[K], of the dropped blocks
    available: jax.Array  # i32[]: blocks that can be granted while all prefixes are held
    marks: lru.Marks


def exchange(state: PoolState, dropped: jax.Array, prefixes: jax.Array) -> tuple[PoolState, Exchange]:
    """Takes a holder from each dropped block and gives one to each block of the prefixes.

    Nothing but `admit` may change the pool next; until then its queue is not in order.

    Args:
      state: the pool; `release_room` must be at least the number of blocks that become inactive.
      dropped: i32[K] held blocks, in the order of their release, named no more often than they are held, padded with N;
        unchecked.
      prefixes: i32[R, M] registered or held blocks of rows that want to begin, padded with N; unchecked.
    """
    count, taken = dropped.shape[0], prefixes.reshape(-1)
    named = jnp.concatenate([dropped, taken])
    registered = block_index.is_registered(state.index, dropped)
    idle = state.ref_counts.at[taken].get(**FILL, fill_value=1) == 0
    refs, idle, registered = fence((state.ref_counts, idle, registered))
    refs = refs.at[named].add(np.repeat(np.array([-1, 1], np.int32), (count, taken.size)), **DROP)
    left = refs.at[dropped].get(**FILL, fill_value=1)
    refs, left = fence((refs, left))
    queue, marks = lru.mark(state.inactive, dropped, taken, idle)
    change = jnp.concatenate([(marks.last & (left == 0)).astype(jnp.int32), -marks.once.astype(jnp.int32)])
    available = state.num_reset + queue.size + jnp.sum(change, dtype=jnp.int32)
    return replace(state, ref_counts=refs, inactive=queue), Exchange(dropped, prefixes, registered, available, marks)


def admit(
    state: PoolState, begun: Exchange, counts: jax.Array, *, max_count: int, scores: Scores | None = None
) -> tuple[PoolState, DrawResult]:
    """Ends an exchange: grants rows the fresh blocks they want until the first row that does not fit.

    That row and all later ones get nothing, and lose the prefix that they were given without a trace.

    Args:
      state: the pool, as `exchange` returned it.
      begun: likewise.
      counts: i32[B], fresh blocks wanted by each row; rows from R on have no prefix.
      max_count: static F, the most that is granted: a row does not fit either if it takes the sum beyond that.
      scores: as in `allocate`.

    Returns:
      The pool and the fresh blocks, held once each.
    """
    _check_ids("counts", counts, "[B]")
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    granted = ends <= jnp.minimum(begun.available, max_count)
    state = _settle(state, begun, granted[: begun.prefixes.shape[0]])
    return _grant(state, counts, ends, granted, max_count=max_count, scores=scores)


def drop(state: PoolState, blocks: jax.Array) -> PoolState:
    """Takes one holder from each block, in their order, unchecked: what `release` does, for callers who know.

    Args:
      state: the pool; `release_room` must be at least the number of blocks that become inactive.
      blocks: i32[K] held blocks, named no more often than they are held, padded with N.
    """
    state, begun = exchange(state, blocks, jnp.zeros((0, 0), jnp.int32))
    return _seal(_settle(state, begun, jnp.zeros((0,), jnp.bool_)), None)[0]


def _settle(state: PoolState, begun: Exchange, granted: jax.Array) -> PoolState:
    """Takes prefixes back from the rows that are not granted, bool[R], and gives every block its place."""
    dropped, prefixes, registered, _, marks = begun
    count, taken = dropped.shape[0], prefixes.reshape(-1)
    refused = jnp.where(granted[:, None], state.num_blocks, prefixes).reshape(-1)
    refs = state.ref_counts.at[refused].add(-1, **DROP)
    unheld = refs.at[jnp.concatenate([dropped, taken])].get(**FILL, fill_value=1) == 0
    refs, unheld = fence((refs, unheld))
    free = marks.last & unheld[:count]
    pushed, reset = fence((free & registered, free & ~registered))
    push_rank, reset_rank = ranks(pushed, reset)
    queue = lru.settle(state.inactive, marks, dropped, pushed, push_rank, taken, marks.once & ~unheld[count:])
    return _push_reset(replace(state, ref_counts=refs, inactive=queue), dropped, reset, reset_rank)


def _grant(
    state: PoolState,
    counts: jax.Array,
    ends: jax.Array,
    granted: jax.Array,
    *,
    max_count: int,
    scores: Scores | None,
) -> tuple[PoolState, DrawResult]:
    """Grants the first rows their blocks; `ends` i32[B] are the sums of `counts`."""
    total = jnp.max(jnp.where(granted, ends, 0), initial=0)
    from_reset = jnp.minimum(total, state.num_reset)
    state, evicted = _evict(state, total - from_reset, max_count=max_count, scores=scores)
    nth = jnp.arange(max_count, dtype=jnp.int32)
    stacked = state.reset_stack.at[state.num_reset - 1 - nth].get(**CLIP)
    taken = evicted.block_ids.at[nth - from_reset].get(**CLIP)
    blocks = fence(jnp.where(nth < total, jnp.where(nth < from_reset, stacked, taken), state.num_blocks))
    state = replace(
        state,
        ref_counts=state.ref_counts.at[blocks].set(1, **DROP),
        generations=state.generations.at[blocks].add(1, **DROP),
        num_reset=state.num_reset - from_reset,
    )
    return _seal(state, DrawResult(blocks, ends - counts, granted, evicted))


def register(
    state: PoolState,
    block_ids: jax.Array,
    hashes: jax.Array,
    *,
    group: jax.Array | int = 0,
    keep_duplicates: bool = False,
) -> tuple[PoolState, RegisterResult]:
    """Makes complete blocks findable by their hash.

    Where another block holds the hash already, that block is canonical: the caller's hold moves to it, and the
    duplicate is released. The caller goes on with the returned ids. In one call the first of equal hashes wins.

    Args:
      state: the pool.
      block_ids: i32[B, M] held blocks, padded with N.
      hashes: u32[B, M, 4] sequence hashes.
      group: i32[] group id.
      keep_duplicates: static; True leaves a duplicate held and unregistered, so that no table has to change.

    Returns:
      The pool, and ids and status of each block. A block that is refused (see its status) stays held, unregistered
      and unshared; repeating the call is safe.
    """
    _check_ids("block_ids", block_ids, "[B, M]")
    _check_hashes(hashes)
    if hashes.shape[:2] != block_ids.shape:
        raise LayoutError(f"block_ids are {list(block_ids.shape)}, hashes {list(hashes.shape)}; give each block a hash")
    flat = block_ids.reshape(-1)
    state, entered = enter(state, flat, keys_of(hashes, group).reshape(-1, block_index.KEY_WORDS))
    canonical = flat if keep_duplicates else entered.canonical
    duplicate = canonical != flat
    none = jnp.int32(state.num_blocks)
    state = give_up(state, jnp.where(duplicate, flat, none), jnp.where(duplicate, canonical, none))
    shape = block_ids.shape
    result = RegisterResult(canonical.reshape(shape), entered.registered.reshape(shape), entered.status.reshape(shape))
    return _seal(state, result)


def enter(state: PoolState, blocks: jax.Array, keys: jax.Array) -> tuple[PoolState, EnterResult]:
    """Registers like `register`, but leaves the holds to the caller: duplicates stay held and unregistered.

    Args:
      state: the pool.
      blocks: i32[F] held blocks, padded with N.
      keys: u32[F, 5], as `keys_of` makes them.
    """
    num_blocks = state.num_blocks
    known = (blocks >= 0) & (blocks < num_blocks)
    held = known & (_ref_counts(state, blocks) > 0)
    before = held & block_index.is_registered(state.index, blocks)

    # A block named twice counts once, where it is named first.
    inactive, once = lru.first_occurrence(state.inactive, blocks, held & ~before)
    state = replace(state, inactive=inactive)
    # All reads of the index come before its first write; without the barrier XLA copies it.
    index, before, once = fence((state.index, before, once))
    index, owner = block_index.insert(index, keys, blocks, once)
    own_key = jnp.all(index.keys.at[blocks].get(**FILL, fill_value=0) == keys, axis=1)
    own_key &= block_index.is_registered(index, blocks)
    status = jnp.where(once & (owner == num_blocks), Status.INDEX_FULL, Status.OK)
    status = jnp.where(~own_key & (before | ~once), Status.ALREADY_REGISTERED, status)
    status = jnp.where(held, status, Status.NOT_HELD)
    status = jnp.where(known | (blocks == num_blocks), status, Status.UNKNOWN_BLOCK)
    status = jnp.where(blocks == num_blocks, Status.OK, status).astype(jnp.int32)
    canonical = jnp.where(once & (owner < num_blocks), owner, blocks)
    return replace(state, index=index), EnterResult(canonical, once & (owner == blocks), status)


def give_up(state: PoolState, duplicates: jax.Array, canonical: jax.Array) -> PoolState:
    """Moves a hold from each duplicate that `enter` found to the canonical block, unchecked.

    Args:
      state: the pool.
      duplicates: i32[F] distinct held blocks that are not registered, padded with N.
      canonical: i32[F] registered blocks, padded with N.
    """
    idle = state.ref_counts.at[canonical].get(**FILL, fill_value=1) == 0
    refs, idle = fence((state.ref_counts, idle))
    change = np.repeat(np.array([-1, 1], np.int32), duplicates.size)
    refs = refs.at[jnp.concatenate([duplicates, canonical])].add(change, **DROP)
    free = refs.at[duplicates].get(**FILL, fill_value=1) == 0
    refs, free = fence((refs, free))
    state = replace(state, ref_counts=refs, inactive=lru.remove(state.inactive, canonical, idle))
    return _push_reset(state, duplicates, free)


def release(state: PoolState, block_ids: jax.Array) -> tuple[PoolState, jax.Array]:
    """Takes one holder from each block: rows in order, within a row the last block first.

    A block without holders becomes inactive if it is registered, else reset.

    Args:
      state: the pool; at least as many pushes as blocks may become inactive must be left before `compact` is due
        (`release_room`).
      block_ids: i32[B, M], padded with N.

    Returns:
      The pool, and i32[B] status. A block that is released more often than it is held ends without holders, and every
      row that names it gets NOT_HELD. Without room in the queue nothing happens and every row gets QUEUE_FULL.
    """
    _check_ids("block_ids", block_ids, "[B, M]")
    num_blocks = state.num_blocks
    flat = block_ids[:, ::-1].reshape(-1)
    known = (flat >= 0) & (flat < num_blocks)
    held = known & (_ref_counts(state, flat) > 0)
    target = jnp.where(held, flat, num_blocks)
    counts, target = fence((state.ref_counts, target))
    counts = counts.at[target].add(-1, **DROP)
    after = counts.at[target].get(**FILL, fill_value=1)

    inactive, last = lru.last_occurrence(state.inactive, flat, held & (after <= 0))
    registered = block_index.is_registered(state.index, flat)
    fits = jnp.sum(last & registered, dtype=jnp.int32) <= lru.room(inactive)
    counts, after = fence((counts, after))
    counts = counts.at[target].add(jnp.where(fits, 0, 1), **DROP)
    counts = counts.at[jnp.where(fits & (after < 0), target, num_blocks)].set(0, **DROP)
    state = replace(state, ref_counts=counts, inactive=lru.push(inactive, flat, fits & last & registered))
    state = _push_reset(state, flat, fits & last & ~registered)

    shape = block_ids.shape
    status = _row_status(
        shape,
        (~known & (flat != num_blocks), Status.UNKNOWN_BLOCK),
        (known & (~held | (after < 0)), Status.NOT_HELD),
    )
    return _seal(state, jnp.where(fits, status, Status.QUEUE_FULL).astype(jnp.int32))


def release_room(state: PoolState) -> jax.Array:
    """Returns how many blocks may still become inactive before `compact` is due, i32[]; at least N just after it."""
    return lru.room(state.inactive)


def evict(
    state: PoolState, count: jax.Array, *, max_count: int, scores: Scores | None = None
) -> tuple[PoolState, Evicted]:
    """Resets the `count` inactive blocks that go first, or all if there are fewer.

    Args:
      state: the pool.
      count: i32[].
      max_count: static bound of `count`.
      scores: as in `allocate`.
    """
    wanted = jnp.clip(count, 0, jnp.minimum(max_count, state.inactive.size)).astype(jnp.int32)
    state, evicted = _evict(state, wanted, max_count=max_count, scores=scores)
    return _seal(_push_reset(state, evicted.block_ids, evicted.block_ids < state.num_blocks), evicted)


def clear(state: PoolState) -> tuple[PoolState, Evicted]:
    """Resets every inactive block. Held blocks stay registered. Costs work in proportion to N."""
    return evict(state, state.inactive.size, max_count=state.num_blocks)


def compact(state: PoolState) -> PoolState:
    """Makes room in the inactive queue for at least N more releases. Costs work in proportion to N."""
    return replace(state, inactive=lru.compact(state.inactive))


def rehash(state: PoolState, seed: jax.Array) -> tuple[PoolState, jax.Array]:
    """Rebuilds the hash index under another seed, after a registration got INDEX_FULL. Work in proportion to N.

    Do not donate the state: should keys be left over, it is needed again.

    Returns:
      The pool, and i32[] the number of keys that did not fit: 0, else try another seed on the former state.
    """
    index, left = block_index.rebuild(state.index, seed)
    return replace(state, index=index), left


def is_shared(state: PoolState, block_ids: jax.Array) -> jax.Array:
    """Tells which of i32[...] blocks must not be written: those that several hold, or that a hash finds."""
    registered = block_index.is_registered(state.index, block_ids)
    return registered | (state.ref_counts.at[block_ids].get(**FILL, fill_value=0) > 1)


def check_generations(state: PoolState, block_ids: jax.Array, generations: jax.Array) -> jax.Array:
    """Tells which handles are current.

    Args:
      state: the pool.
      block_ids: i32[...].
      generations: u32[...], as in `state.generations` when the block was granted.

    Returns:
      i32[...] status: OK, UNKNOWN_BLOCK, STALE_GENERATION, or NOT_HELD.
    """
    known = (block_ids >= 0) & (block_ids < state.num_blocks)
    current = state.generations.at[block_ids].get(**FILL, fill_value=0) == generations
    return jnp.select(
        [~known, ~current, _ref_counts(state, block_ids) == 0],
        [
            jnp.int32(Status.UNKNOWN_BLOCK),
            jnp.int32(Status.STALE_GENERATION),
            jnp.int32(Status.NOT_HELD),
        ],
        jnp.int32(Status.OK),
    )


def _seal[T](state: PoolState, result: T) -> tuple[PoolState, T]:
    """Orders all reads of a verb before the writes of the next one; XLA would copy the buffers that both touch."""
    return fence((state, result))


def is_inactive(state: PoolState) -> jax.Array:
    """Tells which blocks may be evicted, bool[N]. Costs work in proportion to N."""
    return (state.ref_counts == 0) & block_index.is_registered(state.index, jnp.arange(state.num_blocks))


def _evict(state: PoolState, count: jax.Array, *, max_count: int, scores: Scores | None) -> tuple[PoolState, Evicted]:
    """Takes inactive blocks out of queue and index; the caller gives them a new place."""
    if scores is None:
        inactive, blocks = lru.pop(state.inactive, count, max_count=max_count)
    else:
        words = _words(scores(state), state.num_blocks)
        inactive, blocks = lru.pop_lowest(state.inactive, is_inactive(state), words, count, max_count=max_count)
    blocks = fence(blocks)
    keys = state.index.keys.at[blocks].get(**FILL, fill_value=0)
    evicted = Evicted(blocks, keys, count)
    return replace(state, inactive=inactive, index=block_index.delete(state.index, blocks)), evicted


def _hold(state: PoolState, blocks: jax.Array, mask: jax.Array) -> PoolState:
    """Adds a holder to each masked block of i32[F]; blocks may repeat."""
    target = jnp.where(mask, blocks, state.num_blocks)
    idle = mask & (_ref_counts(state, blocks) == 0)
    counts, idle = fence((state.ref_counts, idle))
    return replace(
        state,
        ref_counts=counts.at[target].add(1, **DROP),
        inactive=lru.remove(state.inactive, blocks, idle),
    )


def _push_reset(state: PoolState, blocks: jax.Array, mask: jax.Array, rank: jax.Array | None = None) -> PoolState:
    """Puts distinct masked blocks of i32[F] on the stack in their order; `rank` counts them up to and with each."""
    rank = jnp.cumsum(mask, dtype=jnp.int32) if rank is None else rank
    target = jnp.where(mask, state.num_reset + rank - 1, state.num_blocks)
    return replace(
        state,
        reset_stack=state.reset_stack.at[target].set(blocks, **DROP),
        num_reset=state.num_reset + last_of(rank),
    )


def _ref_counts(state: PoolState, blocks: jax.Array) -> jax.Array:
    return state.ref_counts.at[blocks].get(**FILL, fill_value=0)


def _row_status(shape: tuple[int, ...], *faults: tuple[jax.Array, Status]) -> jax.Array:
    """The first fault that any block of a row has, i32[B]; faults are bool[F] in any order within a row."""
    status = jnp.zeros((shape[0],), jnp.int32)
    for fault, code in reversed(faults):
        status = jnp.where(jnp.any(fault.reshape(shape), axis=1), jnp.int32(code), status)
    return status


def keys_of(hashes: jax.Array, group: jax.Array | int) -> jax.Array:
    """Appends the group to hashes u32[..., 4]: the keys u32[..., 5] of the index."""
    words = jnp.broadcast_to(jnp.asarray(group, jnp.uint32), (*hashes.shape[:-1], 1))
    return jnp.concatenate([hashes, words], axis=-1)


def _check_ids(name: str, values: jax.Array, axes: str) -> None:
    if values.ndim != axes.count(",") + 1 or values.dtype != jnp.int32:
        raise LayoutError(f"{name} are {values.dtype}{list(values.shape)}; expected int32{axes}")


def _asked(hashes: jax.Array, counts: jax.Array) -> jax.Array:
    """Which of hashes u32[B, M, 4] the counts i32[B] ask for, bool[B, M]."""
    _check_hashes(hashes)
    if counts.shape != hashes.shape[:1]:
        raise LayoutError(f"counts are {list(counts.shape)} for hashes [B, M, 4] = {list(hashes.shape)}; give B counts")
    return jnp.arange(hashes.shape[1], dtype=jnp.int32)[None, :] < counts[:, None]


def _words(scores: jax.Array, num_blocks: int) -> jax.Array:
    """Scores as u32[W, N]."""
    words = scores if scores.ndim == 2 else scores[None]
    if words.dtype != jnp.uint32 or words.ndim != 2 or words.shape[1] != num_blocks:
        raise LayoutError(
            f"scores are {scores.dtype}{list(scores.shape)}; expected uint32[{num_blocks}] or uint32[W, {num_blocks}]"
        )
    return words


def _check_hashes(hashes: jax.Array) -> None:
    if hashes.ndim != 3 or hashes.shape[-1] != 4 or hashes.dtype != jnp.uint32:
        raise LayoutError(
            f"hashes are {hashes.dtype}{list(hashes.shape)}; expected uint32[B, M, 4], the 128 bits of each block"
        )
