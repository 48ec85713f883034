"""`paged_attention` in plain XLA: chunks of blocks, gathered one after the other, with a running softmax.

The number of chunks follows the longest context at hand, so a wide block table costs nothing by itself. A chunk is
small enough to stay in a CPU's cache, which makes this as fast there as attention over a contiguous cache.

The scale of a quantised row is a factor of its score, or of its weight: it is applied there, once for each query and
row, and elements are never multiplied out. They are whole numbers or short floats, exact in the dtype of the queries.
"""

import functools

import jax
import jax.numpy as jnp

__all__ = ["paged_attention"]

_CHUNK_TOKENS = 256
_MASKED = -1e30

type _Running = tuple[jax.Array, jax.Array, jax.Array]
"""Peak f32[B, H, R], sum of weights f32[B, H, R] and weighted sum of values f32[B, H, R, D] so far."""


def paged_attention(
    queries: jax.Array,
    array: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_starts: jax.Array,
    *,
    scales: jax.Array | None,
    max_query_len: int,
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """See `kvbm_jax.kernels.paged_attention`."""
    tokens = queries.shape[0]
    rows = block_tables.shape[0]
    query_lens = query_starts[1:] - query_starts[:-1]
    attend = functools.partial(_attend, scales=scales, scale=scale, sliding_window=sliding_window, soft_cap=soft_cap)
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
    scales: jax.Array | None,  # f32[N, 2, T, H]
    scale: float,
    sliding_window: int | None,
    soft_cap: float | None,
) -> jax.Array:
    """Attention of padded rows, [B, Q, Hq, D]."""
    batch, width, query_heads, dim = queries.shape
    _, _, block_size, heads, _ = array.shape
    blocks = min(max(_CHUNK_TOKENS // block_size, 1), block_tables.shape[1])
    chunk = blocks * block_size
    tables = jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % blocks)))
    # Heads lead in both factors of each product: CPU multiplies such batches several times faster.
    shares = query_heads // heads
    rows = shares * width  # the queries that share a kv head, R in the shapes below
    grouped = (
        queries.reshape(batch, width, heads, shares, dim).transpose(0, 2, 3, 1, 4).reshape(batch, heads, rows, dim)
    )

    column = jnp.arange(width, dtype=jnp.int32)
    query_positions = (context_lens - query_lens)[:, None] + column[None, :]  # [B, Q]
    row_positions = jnp.tile(query_positions, (1, shares))  # [B, R]
    oldest = jnp.zeros_like(context_lens) if sliding_window is None else query_positions[:, 0] - (sliding_window - 1)

    def step(masked: bool, i: jax.Array, carry: _Running) -> _Running:
        peak, total, output = carry
        ids = jax.lax.dynamic_slice_in_dim(tables, i * blocks, blocks, axis=1)
        positions = i * chunk + jnp.arange(chunk, dtype=jnp.int32)
        context = array.at[ids].get(mode="clip")  # [B, blocks, 2, T, H, D]
        keys, values = (context[:, :, c].reshape(batch, chunk, heads, dim).transpose(0, 2, 1, 3) for c in (0, 1))
        if scales is not None:
            keys, values = keys.astype(queries.dtype), values.astype(queries.dtype)
            factors = scales.at[ids].get(mode="clip")  # [B, blocks, 2, T, H]
            key_factors, value_factors = (
                factors[:, :, c].reshape(batch, chunk, heads).transpose(0, 2, 1)[:, :, None] for c in (0, 1)
            )  # [B, H, 1, c]
        scores = jnp.einsum("bhrd,bhcd->bhrc", grouped, keys, preferred_element_type=jnp.float32) * scale
        if scales is not None:
            scores = scores * key_factors
        if soft_cap is not None:
            scores = soft_cap * jnp.tanh(scores / soft_cap)
        if masked:
            # Slots that a sequence has not written, or has freed behind its window, may hold anything, NaN included:
            # weight 0 would not silence it.
            own = (positions[None, :] < context_lens[:, None]) & (positions[None, :] >= oldest[:, None])  # [B, c]
            values = jnp.where(own[:, None, :, None], values, 0)
            if scales is not None:
                value_factors = jnp.where(own[:, None, None, :], value_factors, 0)
            seen = own[:, None, :] & (positions[None, None, :] <= row_positions[:, :, None])  # [B, R, c]
            if sliding_window is not None:
                seen &= positions[None, None, :] > row_positions[:, :, None] - sliding_window
            scores = jnp.where(seen[:, None], scores, _MASKED)
        new_peak = jnp.maximum(peak, jnp.max(scores, axis=-1))
        decay = jnp.exp(peak - new_peak)
        weights = jnp.exp(scores - new_peak[..., None])
        if masked:
            weights = jnp.where(seen[:, None], weights, 0)
        shares_of = weights if scales is None else weights * value_factors
        part = jnp.einsum("bhrc,bhcd->bhrd", shares_of.astype(values.dtype), values, preferred_element_type=jnp.float32)
        return new_peak, total * decay + jnp.sum(weights, axis=-1), output * decay[..., None] + part

    active = (query_lens > 0) & (context_lens > 0)
    end = (jnp.max(context_lens) + chunk - 1) // chunk
    if sliding_window is None:
        # Chunks that every query sees whole need no mask.
        first, unmasked_end = jnp.int32(0), jnp.min(jnp.where(active, (query_positions[:, 0] + 1) // chunk, end))
    else:
        earliest = jnp.min(jnp.where(active, oldest, jnp.max(context_lens)))
        first = unmasked_end = jnp.maximum(earliest, 0) // chunk
    shape = (batch, heads, rows)
    carry = (
        jnp.full(shape, _MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, dim), jnp.float32),
    )
    carry = jax.lax.fori_loop(first, unmasked_end, functools.partial(step, False), carry)
    _, total, output = jax.lax.fori_loop(unmasked_end, end, functools.partial(step, True), carry)
    output = output / jnp.where(total == 0, 1, total)[..., None]
    output = output.reshape(batch, heads, shares, width, dim).transpose(0, 3, 1, 2, 4).reshape(queries.shape)
    real = column[None, :] < query_lens[:, None]
    return jnp.where(real[:, :, None, None], output, 0).astype(queries.dtype)
