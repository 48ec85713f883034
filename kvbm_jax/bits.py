"""Bits and masks, counted and ranked."""

from typing import Final

import jax
import jax.numpy as jnp

__all__ = ["WORD", "last_of", "ranks", "select_bit"]

WORD: Final = 32
"""Bits of a word."""


def ranks(first: jax.Array, second: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Counts, for each place of two masks, what is set up to and with it; one sum does for both while it can.

    Args:
      first: bool[M].
      second: bool[M].

    Returns:
      i32[M] each.
    """
    half = 16
    if first.size >= 1 << (half - 1):
        return jnp.cumsum(first, dtype=jnp.int32), jnp.cumsum(second, dtype=jnp.int32)
    both = jnp.cumsum(first.astype(jnp.int32) + (second.astype(jnp.int32) << half), dtype=jnp.int32)
    return both & ((1 << half) - 1), both >> half


def last_of(rank: jax.Array) -> jax.Array:
    """The last of running counts i32[M], which is how many there are: i32[], 0 if M is 0."""
    return rank[-1] if rank.size else jnp.int32(0)


def select_bit(words: jax.Array, rank: jax.Array) -> jax.Array:
    """Finds set bits by rank.

    Args:
      words: u32[M].
      rank: i32[M], less than the number of bits that are set in the word.

    Returns:
      i32[M], the place of the bit that has `rank` set bits below it.
    """
    place = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):
        low = words & jnp.uint32((1 << width) - 1)
        below = jax.lax.population_count(low).astype(jnp.int32)
        upper = rank >= below
        words = jnp.where(upper, words >> width, low)
        rank = jnp.where(upper, rank - below, rank)
        place = place + jnp.where(upper, width, 0)
    return place
