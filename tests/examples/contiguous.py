"""The model with a plain contiguous cache, written from the weights alone: what the paged path must reproduce.

It shares no code with `smollm2.model` or kvbm_jax: dense causal attention, one sequence, layers unrolled, the cache a
pair of arrays [P, K, D] a layer, updated in place at the next position.

Axes: P positions of the cache, S tokens, E hidden, H query heads, K kv heads, D head dim.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


class ContiguousDecoder:
    """Greedy decoding of one sequence of at most `max_len` tokens."""

    def __init__(self, config, weights, max_len):
        self.config = config
        self.max_len = max_len
        join = functools.partial(np.concatenate, axis=-1)
        self.params = {
            "embed": weights["token_embd.weight"],
            "norm": weights["output_norm.weight"],
            "layers": [
                {
                    "norm": weights[f"{at}.attn_norm.weight"],
                    "qkv": join([weights[f"{at}.attn_{x}.weight"] for x in "qkv"]),
                    "out": weights[f"{at}.attn_output.weight"],
                    "ffn_norm": weights[f"{at}.ffn_norm.weight"],
                    "gate": weights[f"{at}.ffn_gate.weight"],
                    "up": weights[f"{at}.ffn_up.weight"],
                    "down": weights[f"{at}.ffn_down.weight"],
                }
                for at in (f"blk.{layer}" for layer in range(config.num_layers))
            ],
        }
        self.params = jax.tree.map(jnp.asarray, self.params)
        self.prefill = jax.jit(self._prefill, donate_argnums=0)
        self.decode = jax.jit(self._decode, donate_argnums=0, static_argnames="steps")

    def init(self):
        shape = (self.max_len, self.config.num_kv_heads, self.config.head_dim)
        return [(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(self.config.num_layers)]

    def generate(self, prompt, count):
        """Greedy continuation of `count` tokens, and the logits after the prompt."""
        # Positions after the prompt hold rubbish until decoding writes them, and are never attended to before.
        padded = np.zeros((-(-len(prompt) // 64) * 64,), np.int32)
        padded[: len(prompt)] = prompt
        cache, logits = self.prefill(self.init(), self.params, jnp.asarray(padded), jnp.int32(len(prompt)))
        first = jnp.argmax(logits).astype(jnp.int32)
        tokens = [int(first)]
        if count > 1:
            _, rest = self.decode(cache, self.params, first, jnp.int32(len(prompt)), steps=count - 1)
            tokens += np.asarray(rest).tolist()
        return tokens, np.asarray(logits)

    def _prefill(self, cache, params, tokens, count):
        return self._forward(cache, params, tokens, jnp.int32(0), count - 1)

    def _decode(self, cache, params, token, position, *, steps):
        def step(carry, _):
            cache, token, position = carry
            cache, logits = self._forward(cache, params, token[None], position, jnp.int32(0))
            token = jnp.argmax(logits).astype(jnp.int32)
            return (cache, token, position + 1), token

        (cache, _, _), tokens = jax.lax.scan(step, (cache, token, position), length=steps)
        return cache, tokens

    def _forward(self, cache, params, tokens, start, wanted):
        """Runs tokens i32[S] from position `start`; returns the cache and the logits f32[V] of one of them."""
        c, count = self.config, tokens.shape[0]
        positions = start + jnp.arange(count)
        half = c.head_dim // 2
        angle = positions[:, None] * (c.rope_base ** (-jnp.arange(half) / half))[None, :]
        cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]

        def rope(x):
            a, b = x[..., :half], x[..., half:]
            return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

        def norm(x, scale):
            return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + c.norm_eps) * scale[None, :]

        causal = jnp.arange(self.max_len)[None, :] <= positions[:, None]
        shares = c.num_heads // c.num_kv_heads
        x = params["embed"][tokens]
        new_cache = []
        for (old_keys, old_values), p in zip(cache, params["layers"], strict=True):
            heads = (norm(x, p["norm"]) @ p["qkv"]).reshape(count, -1, c.head_dim)
            q, k, v = jnp.split(heads, [c.num_heads, c.num_heads + c.num_kv_heads], axis=1)
            keys = jax.lax.dynamic_update_slice(old_keys, rope(k), (start, 0, 0))
            values = jax.lax.dynamic_update_slice(old_values, v, (start, 0, 0))
            new_cache.append((keys, values))
            grouped = rope(q).reshape(count, c.num_kv_heads, shares, c.head_dim)
            scores = jnp.einsum("skgd,pkd->kgsp", grouped, keys) * c.head_dim**-0.5
            weights = jax.nn.softmax(jnp.where(causal[None, None], scores, -1e30), axis=-1)
            mixed = jnp.einsum("kgsp,pkd->skgd", weights, values).reshape(count, -1)
            x = x + mixed @ p["out"]
            y = norm(x, p["ffn_norm"])
            x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return new_cache, norm(x[wanted][None], params["norm"])[0] @ params["embed"].T
