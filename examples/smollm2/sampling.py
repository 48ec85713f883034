"""Choosing the next token: greedy, by temperature, from the nucleus.

Pure functions of logits and a key, usable inside `jax.lax.scan`. `sample` takes temperature and top_p as
arrays, one for each row if need be; `Sampler` holds them as static numbers, so that what they do not ask for
(searching the nucleus above all) is never traced. There are no penalties, no grammars, no beams.

Axes: `B` denotes sequences, `V` the vocabulary.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kvbm_jax.errors import ConfigError

__all__ = ["Sampler", "nucleus", "sample"]


_COLDEST = 1e-3  # logits over less than this overflow float32


def _greedy(logits: jax.Array) -> jax.Array:
    """The most likely token, the first among equals: float32[B, V] → i32[B]."""
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """The smallest set of likeliest tokens that reaches top_p; of equals at its edge, the first.

    f32[B, V], f32[B, 1] → bool[B, V]. The edge is found by halving over the bits of probabilities, which
    order as the numbers themselves do: 30 sums over V, a quarter of the time that sorting V takes on CPU.
    """
    top_p = jnp.maximum(top_p, np.finfo(np.float32).tiny)
    probabilities = jax.nn.softmax(logits, axis=-1)
    bits = jax.lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # i32[B, 1]: tokens of at least `low` reach top_p, tokens of at least `high` do not
        middle = low + (high - low) // 2
        reached = jnp.sum(probabilities, axis=-1, keepdims=True, where=bits >= middle) >= top_p
        return jnp.where(reached, middle, low), jnp.where(reached, high, middle)

    low = jnp.zeros(top_p.shape, jnp.int32)
    one = jax.lax.bitcast_convert_type(jnp.ones(top_p.shape, jnp.float32), jnp.int32)
    edge, _ = jax.lax.fori_loop(0, 30, halve, (low, one + 1))
    above, tied = bits > edge, bits == edge
    missing = top_p - jnp.sum(probabilities, axis=-1, keepdims=True, where=above)
    tied_before = jnp.cumsum(tied, axis=-1, dtype=jnp.int32) - 1
    # Rounding in the sums must not cut the tail off where all tokens are wanted.
    return above | (tied & (tied_before.astype(jnp.float32) * probabilities < missing)) | (top_p >= 1.0)


def sample(logits: jax.Array, key: jax.Array, temperature: ArrayLike, top_p: ArrayLike) -> jax.Array:
    """Sample one token a row, with settings that may differ by row and be traced.

    Args:
        logits: float32[B, V].
        key: A PRNG key; rows draw independently from it.
        temperature: float32 scalar or [B]; 0 means greedy.
        top_p: float32 scalar or [B], in (0, 1]; the probability that the nucleus must reach, 1 for all.

    Returns:
        Token ids i32[B].
    """
    rows = logits.shape[0]
    temperature = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), (rows,))[:, None]
    top_p = jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), (rows,))[:, None]
    scaled = logits / jnp.where(temperature > 0.0, temperature, 1.0)
    drawn = jax.random.categorical(key, jnp.where(nucleus(scaled, top_p), scaled, -jnp.inf), axis=-1)
    return jnp.where(temperature[:, 0] > 0.0, drawn.astype(jnp.int32), _greedy(logits))


@dataclass(frozen=True)
class Sampler:
    """Static sampling settings: hashable, and traced into exactly the work they ask for.

    Raises:
        ConfigError: `temperature` is neither 0 nor a finite number from 0.001, or `top_p` not in (0, 1].
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature == 0.0 or _COLDEST <= self.temperature < math.inf):
            raise ConfigError(
                f"temperature is {self.temperature}, allowed are 0 for greedy and finite numbers from {_COLDEST}"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"top_p is {self.top_p}, allowed are numbers in (0, 1]")

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """float32[B, V] and a PRNG key → token ids i32[B]."""
        if self.temperature == 0.0:
            return _greedy(logits)
        if self.top_p == 1.0:
            return jax.random.categorical(key, logits / self.temperature, axis=-1).astype(jnp.int32)
        return sample(logits, key, self.temperature, self.top_p)
