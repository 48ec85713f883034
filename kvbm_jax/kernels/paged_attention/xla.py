"""`paged_attention` in plain XLA: chunks of blocks, gathered one after the other, with a running softmax.

The number of chunks follows the longest context at hand, so a wide block table costs nothing by itself. A chunk is
small enough to stay in a CPU's cache, which makes this as fast there as attention over a contiguous cache.
"""

import functools

import jax
import jax.numpy as jnp

__all__ = ["paged_attention"]

_CHUNK_TOKENS = 512
_MASKED = -1e30


def paged_attention(
    queries: jax.Array,
    array: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_starts: jax.Array,
    *,
    max_query_len: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """See `kvbm_jax.kernels.paged_attention`."""
    tokens = queries.shape[0]
    rows = block_tables.shape[0]
    query_lens = query_starts[1:] - query_starts[:-1]
    attend = functools.partial(_attend, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)
    if rows == 1:
        padded = attend(queries[None], array, block_tables, context_lens, query_lens)
        return padded[0]
    token = jnp.arange(tokens, dtype=jnp.int32)
    column = jnp.arange(max_query_len, dtype=jnp.int32)
    source = query_starts[:-1, None] + column[None, :]
    padded = attend(queries.at[source].get(mode="clip"), array, block_tables, context_lens, query_lens)
    row = jnp.searchsorted(query_starts[1:], token, side="right", method="compare_all").astype(jnp.int32)
    offset = token - query_starts.at[row].get(mode="clip")
    return padded.at[row, offset].get(mode="fill", fill_value=0)


def _attend(
    queries: jax.Array,  # [B, Q, Hq, D]
    array: jax.Array,  # [N, 2, T, H, D]
    block_tables: jax.Array,  # i32[B, W]
    context_lens: jax.Array,  # i32[B]
    query_lens: jax.Array,  # i32[B]
    *,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """Attention of padded rows, [B, Q, Hq, D]."""
    batch, width, query_heads, dim = queries.shape
    _, _, block_size, heads, _ = array.shape
    blocks = min(max(_CHUNK_TOKENS // block_size, 1), block_tables.shape[1])
    chunk = blocks * block_size
    padding = -block_tables.shape[1] % blocks
    tables = jnp.pad(block_tables, ((0, 0), (0, padding)))
    grouped = queries.reshape(batch, width, heads, query_heads // heads, dim)

    column = jnp.arange(width, dtype=jnp.int32)
    query_positions = (context_lens - query_lens)[:, None] + column[None, :]  # [B, Q]
    real = column[None, :] < query_lens[:, None]

    def step(i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        peak, total, output = carry
        ids = jax.lax.dynamic_slice_in_dim(tables, i * blocks, blocks, axis=1)
        positions = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        # Slots that this sequence has not written may hold anything, NaN included: weight 0 would not silence it.
        written = positions[None, :] < context_lens[:, None]  # [B, c]
        chunk_kv = array.at[ids].get(mode="clip")  # [B, blocks, 2, T, H, D]
        keys, values = (chunk_kv[:, :, c].reshape(batch, chunk, heads, dim) for c in (0, 1))
        values = jnp.where(written[:, :, None, None], values, 0)

        scores = jnp.einsum("bqhgd,bchd->bhgqc", grouped, keys, preferred_element_type=jnp.float32) * scale
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        seen = written[:, None, :] & (positions[None, None, :] <= query_positions[:, :, None])
        if sliding_window is not None:
            seen &= positions[None, None, :] > query_positions[:, :, None] - sliding_window
        seen = seen[:, None, None]
        scores = jnp.where(seen, scores, _MASKED)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
        decay = jnp.exp(peak - new_peak)
        weights = jnp.where(seen, jnp.exp(scores - new_peak[..., None]), 0)
        part = jnp.einsum("bhgqc,bchd->bhgqd", weights.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return (
            new_peak,
            total * decay + jnp.sum(weights, axis=-1),
            output * decay[..., None] + part,
        )

    shape = (batch, heads, query_heads // heads, width)
    first = jnp.int32(0)
    if sliding_window is not None:
        oldest = jnp.where(query_lens > 0, query_positions[:, 0] - sliding_window + 1, jnp.max(context_lens))
        first = jnp.maximum(jnp.min(oldest), 0) // chunk
    _, total, output = jax.lax.fori_loop(
        first,
        (jnp.max(context_lens) + chunk - 1) // chunk,
        step,
        (
            jnp.full(shape, _MASKED, jnp.float32),
            jnp.zeros(shape, jnp.float32),
            jnp.zeros((*shape, dim), jnp.float32),
        ),
    )
    output = output / jnp.where(total == 0, 1, total)[..., None]
    output = jnp.where(real[:, None, None, :, None], output, 0)
    return output.transpose(0, 3, 1, 2, 4).reshape(queries.shape).astype(queries.dtype)
