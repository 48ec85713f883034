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

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp

from kvbm_jax.bits import select_bit
from kvbm_jax.ordering import fence
from kvbm_jax.padding import CLIP, DROP, FILL

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

    table: jax.Array  # i32[S, W, 2]: block ids, and their fingerprints as bits; 0 where a way is empty
    keys: jax.Array  # u32[N, 5]: key of each registered block
    ways: jax.Array  # i32[N]: place in `table` of each registered block, as set * W + way; S * W if none
    seed: jax.Array  # u32[]: of the mix that chooses sets and fingerprints


def init(num_blocks: int, seed: int = 0) -> BlockIndex:
    """Returns an empty index for `num_blocks` blocks."""
    sets = 2
    while sets * _WAYS < 2 * num_blocks:
        sets *= 2
    return BlockIndex(
        table=jnp.zeros((sets, _WAYS, 2), jnp.int32),
        keys=jnp.zeros((num_blocks, KEY_WORDS), jnp.uint32),
        ways=jnp.full((num_blocks,), sets * _WAYS, jnp.int32),
        seed=jnp.uint32(seed),
    )


def is_registered(index: BlockIndex, blocks: jax.Array) -> jax.Array:
    """Tells for i32[M] blocks whether each is in the index; False for padding."""
    none = _nowhere(index.table)
    return index.ways.at[blocks].get(**FILL, fill_value=none) != none


def lookup(index: BlockIndex, hashes: jax.Array, group: jax.Array | int = 0) -> jax.Array:
    """Finds the blocks that hold the keys.

    Args:
      index: the index.
      hashes: u32[..., 4], the first words of each key.
      group: the last word, u32[] or i32[] for all, or [...] for each.

    Returns:
      i32[...] block ids, N where no block holds the key.
    """
    flat = hashes.reshape(-1, KEY_WORDS - 1)
    last = jnp.asarray(group, jnp.uint32)
    words = (*flat.T, last.reshape(-1) if last.ndim else last)
    return _find(index, words, _probe(index, words)).reshape(hashes.shape[:-1])


def insert(index: BlockIndex, keys: jax.Array, blocks: jax.Array, mask: jax.Array) -> tuple[BlockIndex, jax.Array]:
    """Puts keys into the index that are not in it; of equal keys in one call the first wins.

    At first each set takes one key, the first row that wants it. What is left over goes on, fewer rows with every pass;
    once they are few, they are ranked within their sets and take free ways by rank. So the outcome is that of some
    sequential order that respects rows, on every back end. Sizes and number of passes are static; they are reckoned to
    leave a row over in less than one of 1e9 calls (see `_passes`), in tables of a few sets more often, since then both
    sets of a key may be full.

    Args:
      index: the index.
      keys: u32[M, 5].
      blocks: i32[M], distinct and not registered where masked.
      mask: bool[M], which rows to insert; of the others the owner is told.

    Returns:
      The index, and i32[M] owners: the block that now holds the row's key, which is another row's for a repeated key
      and an earlier call's for a key that was there; N where the key was refused, or is neither there nor masked.
    """
    num_blocks, num_sets = index.ways.shape[0], index.table.shape[0]
    count, nowhere = blocks.shape[0], _nowhere(index.table)
    keys = fence(keys)
    words = tuple(keys.T)
    probe = _probe(index, words)
    found = _find(index, words, probe)
    index, probe, found = fence((index, probe, found))
    rows = _Rows(keys, blocks, probe.sets, probe.fingerprints)
    absent = mask & (found == num_blocks)
    table, ways, owners, pending = _claim(index.table, rows, probe.rows, absent, num_blocks)
    owners = jnp.where(absent, owners, found)
    numbers = jnp.arange(count, dtype=jnp.int32)
    for few in _passes(count, num_sets):
        rank = jnp.cumsum(pending, dtype=jnp.int32)
        slot = jnp.where(pending, rank - 1, few)
        numbers = fence(jnp.full((few,), count, jnp.int32).at[slot].set(numbers, **DROP))
        rest = _Rows(
            keys.at[numbers].get(**CLIP),
            blocks.at[numbers].get(**CLIP),
            probe.sets.at[:, numbers].get(**CLIP),
            probe.fingerprints.at[numbers].get(**CLIP),
        )
        again = _claim if few > _FEW else _settle
        table, late_ways, late_owners, pending = again(table, rest, table[rest.sets], numbers < count, num_blocks)
        owners = owners.at[numbers].set(late_owners, **DROP)
        ways = ways.at[numbers].set(late_ways, **DROP)
    target = jnp.where(ways != nowhere, blocks, num_blocks)
    return (
        replace(
            index,
            table=table,
            keys=index.keys.at[target].set(keys, **DROP),
            ways=index.ways.at[target].set(ways, **DROP),
        ),
        owners,
    )


class _Probe(NamedTuple):
    """Where keys belong, and what is there."""

    sets: jax.Array  # i32[2, M]
    fingerprints: jax.Array  # i32[M]
    rows: jax.Array  # i32[2, M, W, 2]: of the table


def _probe(index: BlockIndex, words: Sequence[jax.Array]) -> _Probe:
    """Looks up the sets of keys, whose words are u32[M] each, or u32[] where all have the same."""
    # Without barriers XLA computes the mix anew for every word of a row that it reads.
    sets, fingerprints = fence(_mix(words, index.seed, index.table.shape[0]))
    return _Probe(sets, fingerprints, fence(index.table[sets]))


def _find(index: BlockIndex, words: Sequence[jax.Array], probe: _Probe) -> jax.Array:
    """The blocks that hold keys of these words, i32[M]; N where none does."""
    num_blocks = index.ways.shape[0]
    place = jnp.full(probe.sets.shape, -1, jnp.int32)  # no two ways of a set have the same fingerprint
    for way in range(_WAYS):  # unrolled: XLA's loops over a short axis are slow
        place = jnp.where(probe.rows[..., way, 1] == probe.fingerprints[None], way, place)
    place = fence(jnp.where(place < 0, _nowhere(index.table), probe.sets * _WAYS + place))
    block = fence(index.table.reshape(-1, 2).at[place, 0].get(**FILL, fill_value=num_blocks))
    held = index.keys.at[block].get(**FILL, fill_value=0)
    equal = block < num_blocks
    for i, word in enumerate(words):
        equal &= held[..., i] == (word[None] if word.ndim else word)
    return jnp.min(jnp.where(equal, block, num_blocks), axis=0)


class _Rows(NamedTuple):
    """What is to be inserted."""

    keys: jax.Array  # u32[M, 5]
    blocks: jax.Array  # i32[M]
    sets: jax.Array  # i32[2, M]
    fingerprints: jax.Array  # i32[M]


class _Outcome(NamedTuple):
    """What a pass has done."""

    table: jax.Array  # i32[S, W, 2]
    ways: jax.Array  # i32[M]: the way that the row has got; S * W if none
    owners: jax.Array  # i32[M]: the block that holds the key, N if none does yet
    pending: jax.Array  # bool[M]


def _free_ways(rows: jax.Array, fingerprints: jax.Array) -> jax.Array:
    """Which ways of table rows i32[2, M, W, 2] may take an entry of fingerprints i32[M]: u32[2, M], a bit for each.

    None, where the set has that fingerprint already.
    """
    free = jnp.zeros(rows.shape[:2], jnp.uint32)
    taken = jnp.zeros(rows.shape[:2], bool)
    for way in range(_WAYS):
        free |= jnp.where(rows[..., way, 1] == 0, jnp.uint32(1 << way), 0)
        taken |= rows[..., way, 1] == fingerprints[None]
    return jnp.where(taken, 0, free)


def _claim(table: jax.Array, rows: _Rows, content: jax.Array, mask: jax.Array, num_blocks: int) -> _Outcome:
    """Masked rows claim the first free way of the emptier of their sets; the first row of each set wins.

    `content` i32[2, M, W, 2] is what the table has in these sets.
    """
    count, nowhere = rows.blocks.shape[0], _nowhere(table)
    free = fence(_free_ways(content, rows.fingerprints))
    num_free = jax.lax.population_count(free)
    second = num_free[1] > num_free[0]
    chosen = jnp.where(second, free[1], free[0])
    first = jax.lax.population_count((chosen & -chosen) - 1).astype(jnp.int32)
    way = jnp.where(second, rows.sets[1], rows.sets[0]) * _WAYS + first
    fits = mask & (chosen != 0)
    fits, way = fence((fits, jnp.where(fits, way, nowhere)))
    # A claim is the row's number less M: negative, so below every block id, and the first row's is the least.
    order = jnp.arange(-count, 0, dtype=jnp.int32)
    claimed = table.reshape(-1, 2).at[way, 0].min(order, **DROP)
    claimed, winner = fence((claimed, claimed.at[way, 0].get(**FILL, fill_value=0) + count))
    won = fits & (winner == order + count)
    same = fits & ~won & jnp.all(rows.keys.at[winner].get(**CLIP) == rows.keys, axis=1)
    won, same = fence((won, same))
    owner = jnp.where(won | same, rows.blocks.at[winner].get(**CLIP), num_blocks)
    way = jnp.where(won, way, nowhere)
    return _Outcome(_put(claimed, way, rows).reshape(table.shape), way, owner, mask & ~won & ~same)


def _settle(table: jax.Array, rows: _Rows, content: jax.Array, mask: jax.Array, num_blocks: int) -> _Outcome:
    """Masked rows take free ways of one of their sets by rank; compares each row with each.

    A row chooses the set that would have more ways to spare if every earlier row that can go there went there. Rows
    that repeat an earlier one's key do not choose: they share its lot. `content` i32[2, M, W, 2] is what the table has
    in these sets.
    """
    count, nowhere = rows.blocks.shape[0], _nowhere(table)
    free = fence(_free_ways(content, rows.fingerprints))
    num_free = jax.lax.population_count(free).astype(jnp.int32)
    order = jnp.arange(count, dtype=jnp.int32)
    earlier = (order[None, :] < order[:, None]) & mask[None, :]
    twins = rows.fingerprints[None, :] == rows.fingerprints[:, None]
    repeats = earlier & twins & jnp.all(rows.sets[:, :, None] == rows.sets[:, None, :], axis=0)
    first = jnp.min(jnp.where(repeats, order[None, :], count), axis=1)
    leads = fence(mask & (first == count))
    earlier &= leads[None, :]

    meets = jnp.any(rows.sets[:, :, None, None] == rows.sets.T[None, None, :, :], axis=3)  # [2, M, M]
    spare = num_free - jnp.sum(meets & earlier[None], axis=2, dtype=jnp.int32)
    second = fence((spare[1] > spare[0]) & (num_free[1] > 0) | (num_free[0] == 0))
    sets = jnp.where(second, rows.sets[1], rows.sets[0])
    chosen = jnp.where(second, free[1], free[0])
    beside = earlier & (sets[None, :] == sets[:, None])
    rank = jnp.sum(beside, axis=1, dtype=jnp.int32)
    fits = ~jnp.any(beside & twins, axis=1) & (rank < jax.lax.population_count(chosen).astype(jnp.int32))
    won = leads & fits
    won, way = fence((won, jnp.where(won, sets * _WAYS + select_bit(chosen, rank), nowhere)))
    same = mask & won.at[first].get(**FILL, fill_value=False)
    same &= jnp.all(rows.keys.at[first].get(**CLIP) == rows.keys, axis=1)
    owner = jnp.where(won, rows.blocks, jnp.where(same, rows.blocks.at[first].get(**CLIP), num_blocks))
    return _Outcome(_put(table.reshape(-1, 2), way, rows).reshape(table.shape), way, owner, mask & ~won & ~same)


def _put(table: jax.Array, way: jax.Array, rows: _Rows) -> jax.Array:
    """Writes rows into distinct ways i32[M], padded with S * W, of the table i32[S * W, 2]."""
    return table.at[way].set(jnp.stack([rows.blocks, rows.fingerprints], axis=1), **DROP)


def _nowhere(table: jax.Array) -> int:
    """The way of a block that has none."""
    return table.shape[0] * _WAYS


def delete(index: BlockIndex, blocks: jax.Array) -> BlockIndex:
    """Takes blocks, i32[M] padded with N, out of the index; one that is not in it stays as it is."""
    nowhere = _nowhere(index.table)
    ways = index.ways.at[blocks].get(**FILL, fill_value=nowhere)
    old, ways = fence((index.ways, ways))
    return replace(
        index,
        table=index.table.reshape(-1, 2).at[ways].set(0, **DROP).reshape(index.table.shape),
        ways=old.at[blocks].set(nowhere, **DROP),
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
        table=jnp.zeros_like(index.table),
        ways=jnp.full_like(index.ways, _nowhere(index.table)),
        seed=jnp.asarray(seed, jnp.uint32),
    )

    def insert_chunk(new: BlockIndex, first: jax.Array) -> tuple[BlockIndex, jax.Array]:
        blocks = first + jnp.arange(chunk, dtype=jnp.int32)
        mask = registered.at[blocks].get(**FILL, fill_value=False)
        keys = new.keys.at[blocks].get(**FILL, fill_value=0)
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


def _mix(words: Sequence[jax.Array], seed: jax.Array, num_sets: int) -> tuple[jax.Array, jax.Array]:
    """Two sets i32[2, M] and a fingerprint i32[M] of keys of the words u32[M], or u32[] where all keys have the same.

    Two multilinear hashes, whose multipliers come from the seed, each finalised.
    """
    number = jnp.arange(2 * KEY_WORDS, dtype=jnp.uint32)
    multipliers = fence(_finalise(seed + number * jnp.uint32(0x9E3779B9)) | 1)

    def multilinear(first: int) -> jax.Array:
        return _finalise(functools.reduce(jnp.add, (word * multipliers[first + i] for i, word in enumerate(words))))

    first, second = fence((multilinear(0), multilinear(KEY_WORDS)))
    fingerprint = jnp.maximum(_finalise(first + (second << 16 | second >> 16)), 1)  # 0 marks an empty way
    sets = jnp.stack([first, second]) & jnp.uint32(num_sets - 1)
    return sets.astype(jnp.int32), jax.lax.bitcast_convert_type(fingerprint, jnp.int32)


def _finalise(h: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3_x86_32 (Appleby, 2011)."""
    h = (h ^ h >> 16) * jnp.uint32(0x85EBCA6B)
    h = (h ^ h >> 13) * jnp.uint32(0xC2B2AE35)
    return h ^ h >> 16
