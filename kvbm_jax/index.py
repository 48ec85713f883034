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
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from kvbm_jax.ordering import fence

__all__ = ["KEY_WORDS", "BlockIndex", "delete", "init", "insert", "lookup", "rebuild"]

KEY_WORDS: Final = 5
"""Words of a key: 4 of the sequence hash, 1 of the group id."""

_WAYS: Final = 8
_FAILURE: Final = 1e-13


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
    found = jnp.full(keys.shape[:-1], num_blocks, jnp.int32)
    for sets in (set_a, set_b):
        row = index.table[sets]
        ids = row[..., :_WAYS]
        hit = (row[..., _WAYS:] == fingerprint[..., None]) & (ids < num_blocks)
        block = fence(jnp.min(jnp.where(hit, ids, num_blocks), axis=-1))
        held = index.keys.at[block].get(mode="fill", fill_value=0)
        equal = jnp.all(held == keys, axis=-1) & (block < num_blocks)
        found = jnp.where(equal, block, found)
    return found


def insert(index: BlockIndex, keys: jax.Array, blocks: jax.Array, mask: jax.Array) -> tuple[BlockIndex, jax.Array]:
    """Puts keys into the index; of equal keys in one call the first wins.

    Rows claim ways in rounds; in a round each set takes one key, the first row that wants it, so the outcome is that
    of any sequential order that respects rows, on every back end. The number of rounds is static and leaves a row
    over with a probability below 1e-13 a call.

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
    count = blocks.shape[0]
    nowhere = index.table.size
    rows = _Rows(keys, blocks, *fence(_mix(keys, index.seed, num_sets)))
    outcome = _Outcome(jnp.full((count,), num_blocks, jnp.int32), jnp.full((count,), nowhere, jnp.int32), mask)
    table, outcome = _claim(index.table, rows, outcome, num_blocks)

    # Few rows are left over by the first round, and only they go on.
    few = _leftover(count, num_sets)
    rank = jnp.cumsum(outcome.pending, dtype=jnp.int32)
    slot = jnp.where(outcome.pending, rank - 1, few)
    numbers = fence(jnp.full((few,), count, jnp.int32).at[slot].set(jnp.arange(count, dtype=jnp.int32), mode="drop"))
    rest = jax.tree.map(lambda leaf: leaf.at[numbers].get(mode="clip"), rows)
    pending = numbers < count
    owners, ways = (leaf.at[numbers].get(mode="clip") for leaf in outcome[:2])

    def again(_: int, carry: tuple[jax.Array, _Outcome]) -> tuple[jax.Array, _Outcome]:
        return _claim(carry[0], rest, carry[1], num_blocks)

    rounds = _rounds(count, num_sets) - 1
    table, late = jax.lax.fori_loop(0, rounds, again, (table, _Outcome(owners, ways, pending)))
    owners = outcome.owners.at[numbers].set(late.owners, mode="drop")
    ways = outcome.ways.at[numbers].set(late.ways, mode="drop")
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
    """What has become of each row so far."""

    owners: jax.Array  # i32[M]: the block that holds the key, N if none does yet
    ways: jax.Array  # i32[M]: the way that the row has got; S * 2W if none
    pending: jax.Array  # bool[M]


def _claim(table: jax.Array, rows: _Rows, outcome: _Outcome, num_blocks: int) -> tuple[jax.Array, _Outcome]:
    """One round: pending rows claim the first free way of the emptier of their sets; the first row of each set wins."""
    num_sets, width = table.shape
    count, nowhere = rows.blocks.shape[0], table.size
    sets = jnp.stack([rows.set_a, rows.set_b])
    row = table[sets]  # [2, M, 2W]
    free = row[..., :_WAYS] == num_blocks
    taken = jnp.any(~free & (row[..., _WAYS:] == rows.fingerprints[None, :, None]), axis=2)
    num_free = jnp.where(taken, 0, jnp.sum(free, axis=2, dtype=jnp.int32))
    choice = (num_free[1] > num_free[0]).astype(jnp.int32)
    ways = sets * width + jnp.argmax(free, axis=2).astype(jnp.int32)
    fits = outcome.pending & (jnp.max(num_free, axis=0) > 0)
    fits, way = fence((fits, jnp.where(fits, jnp.where(choice == 1, ways[1], ways[0]), nowhere)))
    # A claim is the row's number less M: negative, so below every block id, and the first row's is the least.
    order = jnp.arange(-count, 0, dtype=jnp.int32)
    claimed = table.reshape(-1).at[way].min(order, mode="drop")
    claimed, winner = fence((claimed, claimed.at[way].get(mode="fill", fill_value=0) + count))
    won = fits & (winner == order + count)
    same = fits & ~won & jnp.all(rows.keys.at[winner].get(mode="clip") == rows.keys, axis=1)
    won, same = fence((won, same))
    target = jnp.where(won, way, nowhere)
    table = (
        claimed.at[target]
        .set(rows.blocks, mode="drop")
        .at[jnp.where(won, way + _WAYS, nowhere)]
        .set(rows.fingerprints, mode="drop")
        .reshape(num_sets, width)
    )
    owner = jnp.where(won, rows.blocks, rows.blocks.at[winner].get(mode="clip"))
    return table, _Outcome(
        jnp.where(won | same, owner, outcome.owners),
        jnp.where(won, way, outcome.ways),
        outcome.pending & ~won & ~same,
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


def _rounds(count: int, num_sets: int) -> int:
    """How many rounds leave one of `count` random keys over with a probability below `_FAILURE`.

    A key that is still pending after k rounds has lost to k other keys within its two sets, and after 2W rounds both
    are full.
    """
    share = 2 * count / num_sets
    expected = float(count)
    for k in range(1, 2 * _WAYS):
        expected *= share / k
        if expected < _FAILURE:
            return min(k, count)
    return min(2 * _WAYS, count)


def _leftover(count: int, num_sets: int) -> int:
    """How many of `count` random keys the first round leaves over, exceeded with a probability below `_FAILURE`."""
    mean = count * 2 * count / num_sets
    few = math.ceil(mean)
    # Chernoff's bound of a Poisson tail.
    while few < count and few - mean + few * math.log(mean / few) > math.log(_FAILURE):
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
