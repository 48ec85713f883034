"""The hash index of the pool: from a block's key to the block that holds it, exact and without tombstones.

A two-choice set-associative table. Every key has two candidate sets of 8 ways, chosen by a seeded mix of all its
bits; a way holds a block id and a 32-bit fingerprint, so that a lookup reads two rows of 64 bytes, compares
fingerprints, and checks one full key per set. Within a set no two entries share a fingerprint; an insertion that
would break this, or that finds both sets full, is refused with `owner == N`. With at most half of the ways ever in
use that does not happen by chance (two choices keep sets far from full); after it has been forced, by colliding keys
say, `rebuild` with another seed spreads the same keys anew, so the capacity of the index is exactly `num_blocks`.

Deletion is eager: each block remembers its way.

Axes: N blocks, S sets (a power of two, at least N / 4), W = 8 ways, M keys of one call, 5 words of a key.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from kvbm_jax.ordering import fence

__all__ = ["KEY_WORDS", "BlockIndex", "delete", "init", "insert", "lookup", "rebuild"]

KEY_WORDS: Final = 5
"""Words of a key: 4 of the sequence hash, 1 of the group id."""

_WAYS: Final = 8
_FEW: Final = 128  # rows that may be compared each with each
_LEFT_OVER: Final = 1e-9  # expected rows, for which no other pass is made
_EXCESS: Final = 1e-13  # probability that a pass has more rows than it takes


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class BlockIndex:
    """Table from key to block. Keys themselves live beside the blocks, in `keys`."""

    table: jax.Array  # i32[S, 2W]: block ids (N where empty), then their fingerprints as bits
    keys: jax.Array  # u32[N, 5]: key of each registered block
    ways: jax.Array  # i32[N]: place in `table` of each registered block, as set * 2W + way; S * 2W if none
    seed: jax.Array  # u32[]: of the mix that chooses sets and fingerprints


def init(num_blocks: int, seed: int = 0) -> BlockIndex:
    """Returns an empty index for `num_blocks` blocks."""
    sets = 2
    while sets * _WAYS < 2 * num_blocks:
        sets *= 2
    return BlockIndex(
        table=jnp.concatenate(
            [jnp.full((sets, _WAYS), num_blocks, jnp.int32), jnp.zeros((sets, _WAYS), jnp.int32)], axis=1
        ),
        keys=jnp.zeros((num_blocks, KEY_WORDS), jnp.uint32),
        ways=jnp.full((num_blocks,), sets * 2 * _WAYS, jnp.int32),
        seed=jnp.uint32(seed),
    )


def is_registered(index: BlockIndex, blocks: jax.Array) -> jax.Array:
    """Tells for i32[M] blocks whether each is in the index; False for padding."""
    none = index.table.size
    return index.ways.at[blocks].get(mode="fill", fill_value=none) != none


def lookup(index: BlockIndex, keys: jax.Array) -> jax.Array:
    """Finds the blocks that hold the keys.

    Args:
      index: the index.
      keys: u32[..., 5].

    Returns:
      i32[...] block ids, N where no block holds the key.
    """
    num_blocks = index.ways.shape[0]
    # Without barriers XLA computes the mix anew for every word of a row that it reads.
    set_a, set_b, fingerprint = fence(_mix(keys, index.seed, index.table.shape[0]))
    row = index.table[jnp.stack([set_a, set_b])]  # [2, ..., 2W]
    ids = row[..., :_WAYS]
    hit = (row[..., _WAYS:] == fingerprint[None, ..., None]) & (ids < num_blocks)
    block = fence(jnp.min(jnp.where(hit, ids, num_blocks), axis=-1))
    held = index.keys.at[block].get(mode="fill", fill_value=0)
    equal = jnp.all(held == keys[None], axis=-1)  # N's key is the padding, which could be asked for
    return jnp.min(jnp.where(equal, block, num_blocks), axis=0)


def insert(index: BlockIndex, keys: jax.Array, blocks: jax.Array, mask: jax.Array) -> tuple[BlockIndex, jax.Array]:
    """Puts keys into the index; of equal keys in one call the first wins.

    At first each set takes one key, the first row that wants it. What is left over goes on, fewer rows with every pass;
    once they are few, they are ranked within their sets and take free ways by rank. So the outcome is that of some
    sequential order that respects rows, on every back end. Sizes and number of passes are static; they are reckoned to
    leave a row over in less than one of 1e9 calls (see `_passes`), in tables of a few sets more often, since then both
    sets of a key may be full.

    Args:
      index: the index; none of the masked keys is in it.
      keys: u32[M, 5].
      blocks: i32[M], distinct and not registered where masked.
      mask: bool[M].

    Returns:
      The index, and i32[M] owners: the block that now holds the row's key (another row's for a repeated key), N where
      the key was refused or the row is not masked.
    """
    num_blocks, num_sets = index.ways.shape[0], index.table.shape[0]
    count, nowhere = blocks.shape[0], index.table.size
    rows = _Rows(keys, blocks, *fence(_mix(keys, index.seed, num_sets)))
    table, ways, owners, pending = _claim(index.table, rows, mask, num_blocks)
    numbers = jnp.arange(count, dtype=jnp.int32)
    for few in _passes(count, num_sets):
        rank = jnp.cumsum(pending, dtype=jnp.int32)
        slot = jnp.where(pending, rank - 1, few)
        numbers = fence(jnp.full((few,), count, jnp.int32).at[slot].set(numbers, mode="drop"))
        rest = jax.tree.map(lambda leaf, at=numbers: leaf.at[at].get(mode="clip"), rows)
        again = _claim if few > _FEW else _settle
        table, late_ways, late_owners, pending = again(table, rest, numbers < count, num_blocks)
        owners = owners.at[numbers].set(late_owners, mode="drop")
        ways = ways.at[numbers].set(late_ways, mode="drop")
    target = jnp.where(ways != nowhere, blocks, num_blocks)
    return (
        replace(
            index,
            table=table,
            keys=index.keys.at[target].set(keys, mode="drop"),
            ways=index.ways.at[target].set(ways, mode="drop"),
        ),
        owners,
    )


class _Rows(NamedTuple):
    """What is to be inserted."""

    keys: jax.Array  # u32[M, 5]
    blocks: jax.Array  # i32[M]
    set_a: jax.Array  # i32[M]
    set_b: jax.Array  # i32[M]
    fingerprints: jax.Array  # i32[M]


class _Outcome(NamedTuple):
    """What a pass has done."""

    table: jax.Array  # i32[S, 2W]
    ways: jax.Array  # i32[M]: the way that the row has got; S * 2W if none
    owners: jax.Array  # i32[M]: the block that holds the key, N if none does yet
    pending: jax.Array  # bool[M]


class _Room(NamedTuple):
    """The two sets of each row."""

    sets: jax.Array  # i32[2, M]
    free: jax.Array  # bool[2, M, W]: their free ways
    num_free: jax.Array  # i32[2, M]: how many; 0 where a set holds the row's fingerprint already


def _room(table: jax.Array, rows: _Rows, num_blocks: int) -> _Room:
    sets = jnp.stack([rows.set_a, rows.set_b])
    row = table[sets]  # [2, M, 2W]
    free = row[..., :_WAYS] == num_blocks
    taken = jnp.any(~free & (row[..., _WAYS:] == rows.fingerprints[None, :, None]), axis=2)
    return _Room(sets, free, jnp.where(taken, 0, jnp.sum(free, axis=2, dtype=jnp.int32)))


def _claim(table: jax.Array, rows: _Rows, mask: jax.Array, num_blocks: int) -> _Outcome:
    """Masked rows claim the first free way of the emptier of their sets; the first row of each set wins."""
    num_sets, width = table.shape
    count, nowhere = rows.blocks.shape[0], table.size
    room = _room(table, rows, num_blocks)
    ways = room.sets * width + jnp.argmax(room.free, axis=2).astype(jnp.int32)
    fits = mask & (jnp.max(room.num_free, axis=0) > 0)
    fits, way = fence(
        (fits, jnp.where(fits, jnp.where(room.num_free[1] > room.num_free[0], ways[1], ways[0]), nowhere))
    )
    # A claim is the row's number less M: negative, so below every block id, and the first row's is the least.
    order = jnp.arange(-count, 0, dtype=jnp.int32)
    claimed = table.reshape(-1).at[way].min(order, mode="drop")
    claimed, winner = fence((claimed, claimed.at[way].get(mode="fill", fill_value=0) + count))
    won = fits & (winner == order + count)
    same = fits & ~won & jnp.all(rows.keys.at[winner].get(mode="clip") == rows.keys, axis=1)
    won, same = fence((won, same))
    owner = jnp.where(won | same, rows.blocks.at[winner].get(mode="clip"), num_blocks)
    way = jnp.where(won, way, nowhere)
    return _Outcome(_put(claimed, way, rows).reshape(num_sets, width), way, owner, mask & ~won & ~same)


def _settle(table: jax.Array, rows: _Rows, mask: jax.Array, num_blocks: int) -> _Outcome:
    """Masked rows take free ways of one of their sets by rank; compares each row with each.

    A row chooses the set that would have more ways to spare if every earlier row that can go there went there. Rows
    that repeat an earlier one's key do not choose: they share its lot.
    """
    num_sets, width = table.shape
    count, nowhere = rows.blocks.shape[0], table.size
    room = fence(_room(table, rows, num_blocks))
    order = jnp.arange(count, dtype=jnp.int32)
    earlier = (order[None, :] < order[:, None]) & mask[None, :]
    twins = rows.fingerprints[None, :] == rows.fingerprints[:, None]
    repeats = earlier & twins & jnp.all(room.sets[:, :, None] == room.sets[:, None, :], axis=0)
    first = jnp.min(jnp.where(repeats, order[None, :], count), axis=1)
    leads = fence(mask & (first == count))
    earlier &= leads[None, :]

    meets = jnp.any(room.sets[:, :, None, None] == room.sets.T[None, None, :, :], axis=3)  # [2, M, M]
    spare = room.num_free - jnp.sum(meets & earlier[None], axis=2, dtype=jnp.int32)
    second = fence((spare[1] > spare[0]) & (room.num_free[1] > 0) | (room.num_free[0] == 0))
    sets = jnp.where(second, room.sets[1], room.sets[0])
    free = jnp.where(second[:, None], room.free[1], room.free[0])
    beside = earlier & (sets[None, :] == sets[:, None])
    rank = jnp.sum(beside, axis=1, dtype=jnp.int32)
    fits = ~jnp.any(beside & twins, axis=1) & (rank < jnp.where(second, room.num_free[1], room.num_free[0]))
    lane = jnp.arange(_WAYS, dtype=jnp.int32)
    below = jnp.sum(free[:, None, :] & (lane[None, :] < lane[:, None])[None], axis=2, dtype=jnp.int32)
    place = jnp.argmax(free & (below == rank[:, None]), axis=1).astype(jnp.int32)
    won = leads & fits
    won, way = fence((won, jnp.where(won, sets * width + place, nowhere)))
    same = mask & won.at[first].get(mode="fill", fill_value=False)
    same &= jnp.all(rows.keys.at[first].get(mode="clip") == rows.keys, axis=1)
    owner = jnp.where(won, rows.blocks, jnp.where(same, rows.blocks.at[first].get(mode="clip"), num_blocks))
    return _Outcome(_put(table.reshape(-1), way, rows).reshape(num_sets, width), way, owner, mask & ~won & ~same)


def _put(table: jax.Array, way: jax.Array, rows: _Rows) -> jax.Array:
    """Writes rows into distinct ways i32[M], padded with S * 2W, of the flat table."""
    return (
        table.at[way]
        .set(rows.blocks, mode="drop")
        .at[jnp.where(way < table.size, way + _WAYS, way)]
        .set(rows.fingerprints, mode="drop")
    )


def delete(index: BlockIndex, blocks: jax.Array) -> BlockIndex:
    """Takes blocks, i32[M] padded with N, out of the index; one that is not in it stays as it is."""
    num_blocks = index.ways.shape[0]
    nowhere = index.table.size
    ways = index.ways.at[blocks].get(mode="fill", fill_value=nowhere)
    old, ways = fence((index.ways, ways))
    return replace(
        index,
        table=index.table.reshape(-1).at[ways].set(num_blocks, mode="drop").reshape(index.table.shape),
        ways=old.at[blocks].set(nowhere, mode="drop"),
    )


def rebuild(index: BlockIndex, seed: jax.Array) -> tuple[BlockIndex, jax.Array]:
    """Spreads all keys anew under another seed.

    Costs work in proportion to N: a call of its own, made between steps.

    Returns:
      The index, and i32[] the number of keys that did not fit: 0, else call again with another seed.
    """
    num_blocks = index.ways.shape[0]
    registered = is_registered(index, jnp.arange(num_blocks))
    chunk = min(_WAYS * 32, num_blocks)
    chunks = -(-num_blocks // chunk)
    empty = replace(
        index,
        table=index.table.at[:, :_WAYS].set(num_blocks),
        ways=jnp.full_like(index.ways, index.table.size),
        seed=jnp.asarray(seed, jnp.uint32),
    )

    def insert_chunk(new: BlockIndex, first: jax.Array) -> tuple[BlockIndex, jax.Array]:
        blocks = first + jnp.arange(chunk, dtype=jnp.int32)
        mask = registered.at[blocks].get(mode="fill", fill_value=False)
        keys = new.keys.at[blocks].get(mode="fill", fill_value=0)
        new, owners = insert(new, keys, blocks, mask)
        return new, jnp.sum(mask & (owners == num_blocks), dtype=jnp.int32)

    rebuilt, left = jax.lax.scan(insert_chunk, empty, jnp.arange(chunks, dtype=jnp.int32) * chunk)
    return rebuilt, jnp.sum(left)


def _passes(count: int, num_sets: int) -> Iterator[int]:
    """Yields how many of `count` random keys each pass after the first must be able to take.

    A row is left over by a claim if an earlier one chose its set. Claims are assumed to go to half of the sets, since
    emptier ones are chosen more often. Ranking leaves a row over if in both of its sets there are as many earlier rows
    as free ways, taken to be at least two; in a second ranking, none of those that are placed by then count.
    """

    def lost(claims: float) -> float:
        return claims - num_sets / 2 * -math.expm1(-2 * claims / num_sets)

    left = lost(count)
    while (few := _bound(left, count)) > _FEW:
        yield few
        left = lost(left)
    yield few
    left *= min((2 * left / num_sets) ** 4 / 4, 0.5)
    if left > _LEFT_OVER:
        yield _bound(left, count)


def _bound(mean: float, count: int) -> int:
    """How many events of a Poisson distribution, at most `count`, are exceeded with a probability below `_EXCESS`."""
    few = math.ceil(mean)
    # Chernoff's bound of the tail.
    while few < count and few - mean + few * math.log(mean / few) > math.log(_EXCESS):
        few += 1
    return min(few, count)


def _mix(keys: jax.Array, seed: jax.Array, num_sets: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Two sets i32[...] and a fingerprint i32[...] of keys u32[..., 5]; MurmurHash3's body and finaliser, twice."""
    first = _murmur3(keys, seed)
    second = _murmur3(keys, seed ^ jnp.uint32(0x9E3779B9))
    fingerprint = _finalise(first + (second << 16 | second >> 16))
    low = jnp.uint32(num_sets - 1)
    return (
        (first & low).astype(jnp.int32),
        (second & low).astype(jnp.int32),
        jax.lax.bitcast_convert_type(fingerprint, jnp.int32),
    )


def _murmur3(keys: jax.Array, seed: jax.Array) -> jax.Array:
    """MurmurHash3_x86_32 (Appleby, 2011) of the words of u32[..., 5]."""
    h = jnp.broadcast_to(seed, keys.shape[:-1])
    for word in range(KEY_WORDS):
        k = keys[..., word] * jnp.uint32(0xCC9E2D51)
        k = (k << 15 | k >> 17) * jnp.uint32(0x1B873593)
        h = h ^ k
        h = (h << 13 | h >> 19) * jnp.uint32(5) + jnp.uint32(0xE6546B64)
    return _finalise(h ^ jnp.uint32(4 * KEY_WORDS))


def _finalise(h: jax.Array) -> jax.Array:
    h = (h ^ h >> 16) * jnp.uint32(0x85EBCA6B)
    h = (h ^ h >> 13) * jnp.uint32(0xC2B2AE35)
    return h ^ h >> 16
