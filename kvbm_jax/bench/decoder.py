"""A decoder of SmolLM2-135M's sizes with random weights: the work of a real decode step, without a model's file.

Axes: B sequences, one token each; E hidden width; F feed-forward width; H query heads; K kv heads; D head dim; V words.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvbm_jax.attention import attend, decode_batch
from kvbm_jax.cache import KVCache
from kvbm_jax.sequences import SequenceBatch

__all__ = ["SMOLLM2_135M", "Sizes", "Weights", "decode", "init"]


class Sizes(NamedTuple):
    """Of a decoder."""

    layers: int
    hidden: int  # E
    heads: int  # H
    kv_heads: int  # K
    head_dim: int  # D
    forward: int  # F
    words: int  # V


SMOLLM2_135M = Sizes(layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, forward=1536, words=49_152)


class _Layer(NamedTuple):
    qkv: jax.Array  # f32[E, (H + 2 * K) * D]
    out: jax.Array  # f32[H * D, E]
    gate_up: jax.Array  # f32[E, 2 * F]
    down: jax.Array  # f32[F, E]


class Weights(NamedTuple):
    """Of a decoder."""

    embedding: jax.Array  # f32[V, E], for words in and out
    layers: tuple[_Layer, ...]


def init(sizes: Sizes) -> Weights:
    """Returns weights that keep the scale of what passes through them."""
    keys = iter(jax.random.split(jax.random.key(0), 1 + 4 * sizes.layers))

    def matrix(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns), jnp.float32) / jnp.sqrt(rows)

    width = sizes.heads * sizes.head_dim
    layers = [
        _Layer(
            matrix(sizes.hidden, width + 2 * sizes.kv_heads * sizes.head_dim),
            matrix(width, sizes.hidden),
            matrix(sizes.hidden, 2 * sizes.forward),
            matrix(sizes.forward, sizes.hidden),
        )
        for _ in range(sizes.layers)
    ]
    return Weights(matrix(sizes.words, sizes.hidden), tuple(layers))


def decode(
    cache: KVCache, running: SequenceBatch, weights: Weights, tokens: jax.Array, sizes: Sizes
) -> tuple[KVCache, jax.Array]:
    """Computes one token of every sequence, and the likeliest next.

    Args:
      cache: float32; donate it.
      running: the sequences, extended by the token of this step.
      weights: of the decoder.
      tokens: i32[B], of this step.
      sizes: of the decoder; static.

    Returns:
      The cache, and i32[B].
    """
    batch = decode_batch(running, jnp.ones(tokens.shape, bool))
    x = weights.embedding[tokens]
    for number, layer in enumerate(weights.layers):
        heads = (_normed(x) @ layer.qkv).reshape(len(tokens), -1, sizes.head_dim)
        queries, keys, values = jnp.split(heads, (sizes.heads, sizes.heads + sizes.kv_heads), axis=1)
        mixed, cache = attend(cache, number, queries, keys, values, batch)
        x += mixed.reshape(len(tokens), -1) @ layer.out
        gate, up = jnp.split(_normed(x) @ layer.gate_up, 2, axis=1)
        x += (jax.nn.silu(gate) * up) @ layer.down
    return cache, jnp.argmax(_normed(x) @ weights.embedding.T, axis=1).astype(jnp.int32)


def _normed(x: jax.Array) -> jax.Array:
    scale: jax.Array = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + 1e-6)
    return x * scale
