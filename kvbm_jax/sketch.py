"""A count-min sketch with ageing: how often keys were seen lately, in a few bytes for each block.

The frequency filter of TinyLFU (Einziger, Friedman, Manes, "TinyLFU: A Highly Efficient Cache Admission Policy", ACM
Transactions on Storage 13(4), 2017): every occurrence of a key adds one to a counter in each of 4 rows, the estimate is
the least of them, counters stop at 15, and once a sample of 10 N occurrences is complete, all counters and the size of
the sample are halved, so that old fame fades. Collisions make estimates too high, never too low (short of halving).
Of the paper's refinements neither the doorkeeper nor the minimal increment is here: counters are those of a plain
count-min sketch.

Axes: N blocks of the cache, D = 4 rows, C counters a row (a power of two, at least 4 N), M keys of one call, 5 words of
a key.
"""

from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp

__all__ = ["FrequencySketch", "add", "estimate", "init", "resize"]

_ROWS: Final = 4
_LIMIT: Final = 15
_SAMPLE: Final = 10  # occurrences for each block
_CHUNK: Final = 128  # keys whose increments a counter at its limit can take without wrapping


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class FrequencySketch:
    """Counters of recent occurrences; 16 to 32 bytes a block."""

    counters: jax.Array  # u8[D * C]: row after row, each at most 15
    samples: jax.Array  # u32[]: occurrences that the counters stand for
    period: jax.Array  # u32[]: occurrences at which everything is halved


def init(num_blocks: int) -> FrequencySketch:
    """Returns a sketch that has seen nothing, for a cache of `num_blocks` blocks."""
    return FrequencySketch(
        counters=jnp.zeros((_ROWS * _width(num_blocks),), jnp.uint8),
        samples=jnp.uint32(0),
        period=jnp.uint32(_SAMPLE * num_blocks),
    )


def add(sketch: FrequencySketch, keys: jax.Array, mask: jax.Array) -> FrequencySketch:
    """Counts one occurrence of each masked key; repeats count.

    Halves everything afterwards, once, if the sample is complete. Costs work in proportion to M and, for the halving,
    to N.

    Args:
      sketch: the sketch.
      keys: u32[M, 5].
      mask: bool[M].
    """
    nowhere = sketch.counters.size
    places = jnp.where(mask[:, None], _places(sketch, keys), nowhere)
    chunks = -(-places.shape[0] // _CHUNK)
    padded = jnp.full((chunks * _CHUNK, _ROWS), nowhere, jnp.int32).at[: places.shape[0]].set(places)

    def add_chunk(counters: jax.Array, places: jax.Array) -> tuple[jax.Array, None]:
        flat = places.reshape(-1)
        counters = counters.at[flat].add(jnp.uint8(1), mode="drop")
        return counters.at[flat].min(jnp.uint8(_LIMIT), mode="drop"), None

    counters, _ = jax.lax.scan(add_chunk, sketch.counters, padded.reshape(chunks, _CHUNK, _ROWS))
    samples = sketch.samples + jnp.sum(mask, dtype=jnp.uint32)
    halved = (samples >= sketch.period).astype(jnp.uint8)
    return FrequencySketch(counters >> halved, samples >> halved.astype(jnp.uint32), sketch.period)


def resize(sketch: FrequencySketch, num_blocks: int) -> FrequencySketch:
    """Returns a sketch of the same keys for a cache of another size.

    Estimates stay what they were where the rows grow; where they shrink, of counters that meet the greatest stays.

    Args:
      sketch: the sketch.
      num_blocks: static, of the cache from now on.
    """
    rows = sketch.counters.reshape(_ROWS, -1)
    width, wanted = rows.shape[1], _width(num_blocks)
    if wanted >= width:
        rows = jnp.tile(rows, (1, wanted // width))
    else:
        rows = jnp.max(rows.reshape(_ROWS, width // wanted, wanted), axis=1)
    return FrequencySketch(rows.reshape(-1), sketch.samples, jnp.uint32(_SAMPLE * num_blocks))


def estimate(sketch: FrequencySketch, keys: jax.Array) -> jax.Array:
    """Returns how often keys u32[..., 5] have been seen lately, u32[...] of at most 15."""
    return jnp.min(sketch.counters[_places(sketch, keys)], axis=-1).astype(jnp.uint32)


def _width(num_blocks: int) -> int:
    """Counters of a row."""
    width = 16
    while width < 4 * num_blocks:
        width *= 2
    return width


def _places(sketch: FrequencySketch, keys: jax.Array) -> jax.Array:
    """The counter of each key u32[..., 5] in each row, i32[..., D], by double hashing (Kirsch, Mitzenmacher, 2006)."""
    width = sketch.counters.size // _ROWS
    first, second = _mix(keys, 0x9E3779B9), _mix(keys, 0x85EBCA6B) | jnp.uint32(1)
    columns = [(first + jnp.uint32(row) * second) & jnp.uint32(width - 1) for row in range(_ROWS)]
    places = [jnp.uint32(row * width) + column for row, column in enumerate(columns)]
    return jnp.stack(places, axis=-1).astype(jnp.int32)


def _mix(keys: jax.Array, seed: int) -> jax.Array:
    """A hash u32[...] of keys u32[..., 5]: each word is added, and the sum multiplied and folded."""
    h = jnp.full(keys.shape[:-1], seed, jnp.uint32)
    for word in range(keys.shape[-1]):
        h = (h + keys[..., word]) * jnp.uint32(0x9E3779B1)
        h = h ^ h >> 15
        h = h * jnp.uint32(0x85EBCA77)
        h = h ^ h >> 13
    return h
