"""Choosing the least entries of a large array, in an order of several words, without sorting it.

A radix select: the threshold of each word is found bit by bit, by counting what lies below a candidate, so the work is
32 passes over N for each word, whatever the data. Only what is chosen is sorted.

Axes: N entries, F chosen entries at most.
"""

from collections.abc import Callable, Sequence
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np

from kvbm_jax.padding import DROP, FILL

__all__ = ["lowest", "lowest_of_each", "ordered"]

_SIGN: Final = np.uint32(0x80000000)
_INFINITY: Final = np.uint32(0x7F800000)  # bits of the float; above it, without the sign, are NaNs


def lowest(words: Sequence[jax.Array], mask: jax.Array, count: jax.Array, *, max_count: int) -> jax.Array:
    """Finds the `count` least masked entries.

    Args:
      words: u32[N] each, compared in their order: the first decides, later ones break ties.
      mask: bool[N], the entries to choose from; no two of them are equal in all words.
      count: i32[], at most the number of masked entries and at most `max_count`.
      max_count: static F.

    Returns:
      i32[F], the indices of the chosen entries, the least first, padded with N.
    """
    size = mask.shape[0]
    chosen = _least(words, mask, count, lambda some: jnp.sum(some, dtype=jnp.int32), lambda each: each)
    place = jnp.where(chosen, jnp.cumsum(chosen, dtype=jnp.int32) - 1, max_count)
    entries = jnp.full((max_count,), size, jnp.int32).at[place].set(jnp.arange(size, dtype=jnp.int32), **DROP)
    # Of entries that are equal in all words one is padding, and has the greater index.
    keys = [word.at[entries].get(**FILL, fill_value=0xFFFFFFFF) for word in words]
    *_, in_order = jax.lax.sort((*keys, entries), num_keys=len(keys) + 1)
    return in_order


def lowest_of_each(words: Sequence[jax.Array], mask: jax.Array, parts: jax.Array, counts: jax.Array) -> jax.Array:
    """Finds the least masked entries of each part.

    Costs 32 gathers and 32 scatters over N for each word.

    Args:
      words: u32[N] each, as in `lowest`.
      mask: bool[N], the entries to choose from; no two of one part are equal in all words.
      parts: i32[N], the part of each entry; Q and more: none.
      counts: i32[Q], how many of each part; all of it if there are fewer.

    Returns:
      bool[N].
    """
    size = counts.shape[0]

    def total(some: jax.Array) -> jax.Array:
        return jnp.zeros((size,), jnp.int32).at[parts].add(some.astype(jnp.int32), **DROP)

    def spread(each: jax.Array) -> jax.Array:
        return each.at[parts].get(**FILL, fill_value=0)

    return _least(words, mask & (parts < size), counts, total, spread)


type _Part = Callable[[jax.Array], jax.Array]


def _least(words: Sequence[jax.Array], mask: jax.Array, count: jax.Array, total: _Part, spread: _Part) -> jax.Array:
    """Finds the `count` least masked entries of each part, bool[N].

    Args:
      words: u32[N] each.
      mask: bool[N].
      count: i32[*], for each part.
      total: sums bool[N] over each part, i32[*].
      spread: gives each entry its part's value, [N] from [*].
    """
    chosen, tied, left = jnp.zeros_like(mask), mask, count
    for word in words:
        threshold = spread(_nth(word, tied, left, total, spread))
        below = tied & (word < threshold)
        chosen |= below
        left = left - total(below)
        tied &= word == threshold
    return chosen | tied & (spread(left) > 0)


def _nth(word: jax.Array, mask: jax.Array, n: jax.Array, total: _Part, spread: _Part) -> jax.Array:
    """Returns the n-th least masked value of u32[N] in each part, u32[*]; n counts from 1."""

    def one_bit(bit: jax.Array, least: jax.Array) -> jax.Array:
        candidate = least | (_SIGN >> bit.astype(jnp.uint32))
        below = total(mask & (word < spread(candidate)))
        return jnp.where(below < n, candidate, least)

    least: jax.Array = jax.lax.fori_loop(0, 32, one_bit, jnp.zeros_like(n, jnp.uint32))
    return least


def ordered(values: jax.Array) -> jax.Array:
    """Maps numbers to u32 in the same order.

    Args:
      values: f32, i32 or u32 of any shape, or a narrower type of these.

    Returns:
      u32 of the same shape. The two zeros are equal; a NaN, whatever its sign and payload, is below everything else.
    """
    if jnp.issubdtype(values.dtype, jnp.floating):
        bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.uint32)
        magnitude = bits & ~_SIGN
        negative = (bits >= _SIGN) & (magnitude > 0)
        return jnp.where(magnitude > _INFINITY, jnp.uint32(0), jnp.where(negative, ~bits, magnitude | _SIGN))
    if jnp.issubdtype(values.dtype, jnp.signedinteger):
        return jax.lax.bitcast_convert_type(values.astype(jnp.int32), jnp.uint32) ^ _SIGN
    return values.astype(jnp.uint32)
