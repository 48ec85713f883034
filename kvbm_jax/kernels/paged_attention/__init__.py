"""Attention of new tokens over their sequences' cached blocks."""

import jax

from kvbm_jax.errors import LayoutError
from kvbm_jax.kernels.dispatch import Implementation, Operation
from kvbm_jax.kernels.paged_attention import xla

__all__ = ["OPERATION", "paged_attention"]

OPERATION = Operation(xla.paged_attention)


def paged_attention(
    queries: jax.Array,
    array: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    query_starts: jax.Array,
    *,
    scales: jax.Array | None = None,
    max_query_len: int,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Causal grouped-query attention, ragged: decode and chunked prefill in one function.

    Sequence b owns queries `query_starts[b] : query_starts[b + 1]`, which are the last tokens of its context, already
    stored. Query i of it, at position `context_lens[b] - query_len + i`, sees the positions up to its own. The context
    is walked in chunks with a running softmax (Milakov & Gimelshein, 2018; Dao et al., FlashAttention, 2022) through
    the block table (Kwon et al., PagedAttention, 2023).

    Args:
      queries: [S, Hq, D], sequences one after the other; rows past `query_starts[B]` are padding.
      array: [N, C=2, T, H, D], one layer's keys and values; Hq is a multiple of H.
      block_tables: i32[B, W], block of each T tokens of a sequence; unused entries, and those
        whose tokens lie behind the window of every query, may hold anything.
      context_lens: i32[B], tokens in the cache, these queries included; 0 for a row without sequence.
      query_starts: i32[B + 1], not decreasing, from 0.
      scales: f32[N, 2, T, H] of a quantised array, as `kvbm_jax.kernels.quantize` has them; None if it is plain.
      max_query_len: static bound of the queries of one sequence.
      scale: of the scores; None = D ** -0.5.
      sliding_window: a query sees only this many positions, its own included; None = all.
      soft_cap: scores become `soft_cap * tanh(score / soft_cap)`; None = unchanged.
      implementation: which kernel.

    Returns:
      [S, Hq, D] in the dtype of `queries`, accumulated in float32; zeros for padding rows.

    Raises:
      LayoutError: at trace time, if the shapes do not fit.
      NotImplementedError: if there is no such implementation.
    """
    tokens, query_heads, dim = queries.shape
    _, components, _, heads, cache_dim = array.shape
    rows = block_tables.shape[0]
    if components != 2 or dim != cache_dim or query_heads % heads:
        raise LayoutError(
            f"queries [S, Hq, D] = {list(queries.shape)} do not fit a cache [N, C, T, H, D] = {list(array.shape)}: "
            "C must be 2, D equal, and Hq a multiple of H"
        )
    if scales is not None and scales.shape != array.shape[:-1]:
        raise LayoutError(
            f"scales are {list(scales.shape)}; a cache of {list(array.shape)} has {list(array.shape[:-1])}, one for "
            "each token and head"
        )
    if context_lens.shape != (rows,) or query_starts.shape != (rows + 1,):
        raise LayoutError(
            f"{rows} block tables need context_lens [{rows}] and query_starts [{rows + 1}]; "
            f"they are {list(context_lens.shape)} and {list(query_starts.shape)}"
        )
    if not 1 <= max_query_len <= max(tokens, 1):
        raise LayoutError(f"max_query_len is {max_query_len}; it must lie in [1, {tokens}], the number of queries")
    return OPERATION(
        implementation,
        queries,
        array,
        block_tables,
        context_lens,
        query_starts,
        scales=scales,
        max_query_len=max_query_len,
        scale=dim**-0.5 if scale is None else scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
    )
