"""Attention over the paged cache, as a model's attention layer calls it.

`attend` is the line that takes the place of a contiguous decode cache: it stores the new keys and values, then attends
over everything cached for each sequence. What belongs to the step and not to a layer (which slot each token goes to,
which blocks each sequence owns) is an `AttentionBatch`, built once per step by `step_batch`.

Axes: S tokens of the step, sequences one after the other; B sequences; G groups; W blocks of a table; T tokens of a
block; Hq query heads, H kv heads, D head dim.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from kvbm_jax import cache as kv_cache
from kvbm_jax import kernels, sequences
from kvbm_jax.errors import LayoutError
from kvbm_jax.groups import Group

__all__ = ["AttentionBatch", "attend", "decode_batch", "paged_attention", "step_batch"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionBatch:
    """Where the tokens of one step are and what they see."""

    positions: jax.Array  # i32[S]: position of each token in its sequence, for rotary embeddings
    slots: jax.Array  # i32[G, S]: where each token's key and value go; N * T for padding
    block_tables: jax.Array  # i32[G, B, W]
    context_lens: jax.Array  # i32[B]: tokens of each sequence in the cache once this step is stored
    query_starts: jax.Array  # i32[B + 1]: sequence b owns tokens query_starts[b] : query_starts[b + 1]
    max_query_len: int = field(metadata={"static": True})  # bound of the tokens of one sequence
    groups: tuple[Group, ...] = field(metadata={"static": True})  # G: what each group's layers see

    @property
    def last_tokens(self) -> jax.Array:
        """Index of the last token of each sequence in the step, i32[B]; where a sequence has none, any index."""
        return jnp.maximum(self.query_starts[1:] - 1, 0)


def step_batch(
    running: sequences.SequenceBatch,
    rows: jax.Array,
    first: jax.Array,
    counts: jax.Array,
    *,
    num_tokens: int,
    max_query_len: int,
) -> AttentionBatch:
    """Describes a step that computes some tokens of some sequences: decode, chunks of prompts, or both.

    Args:
      running: the sequences; the tokens of the step have slots already.
      rows: i32[B], rows of `running`.
      first: i32[B], position of the first token of each row in this step.
      counts: i32[B], tokens of each row in this step; 0 for none.
      num_tokens: static S, at least the sum of the counts; the rest is padding.
      max_query_len: static bound of the counts.

    Returns:
      The batch; token ids go into the step in the same order, row after row.
    """
    ends = jnp.cumsum(counts, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.searchsorted(ends, token, side="right", method="compare_all").astype(jnp.int32)
    real = token < ends[-1]
    positions = jnp.where(real, first.at[row].get(mode="clip") + token - starts.at[row].get(mode="clip"), 0)
    owners = jnp.where(real, rows.at[row].get(mode="clip"), running.lengths.shape[0])
    return AttentionBatch(
        positions=positions,
        slots=sequences.slots(running, owners, positions),
        block_tables=running.block_tables.at[:, rows].get(mode="clip"),
        context_lens=jnp.where(counts > 0, first + counts, 0),
        query_starts=starts,
        max_query_len=max_query_len,
        groups=running.groups,
    )


def decode_batch(running: sequences.SequenceBatch, active: jax.Array) -> AttentionBatch:
    """Describes a decode step: one token for each row of `running`, the newest that has a slot.

    Args:
      running: the sequences, extended by the token of this step.
      active: bool[B], rows that take part; the token of another row is stored nowhere and attends to nothing.

    Returns:
      The batch; token b of the step belongs to row b.
    """
    rows = jnp.arange(active.shape[0], dtype=jnp.int32)
    positions = jnp.where(active, running.lengths - 1, 0)
    return AttentionBatch(
        positions=positions,
        slots=sequences.slots(running, jnp.where(active, rows, active.shape[0]), positions),
        block_tables=running.block_tables,
        context_lens=jnp.where(active, running.lengths, 0),
        query_starts=jnp.arange(active.shape[0] + 1, dtype=jnp.int32),
        max_query_len=1,
        groups=running.groups,
    )


def attend(
    cache: kv_cache.KVCache,
    layer: int | jax.Array,
    queries: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    batch: AttentionBatch,
    *,
    group: int = 0,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: kernels.dispatch.Implementation | None = None,
) -> tuple[jax.Array, kv_cache.KVCache]:
    """Stores the keys and values of the step, then attends over the sequences' cached context.

    Args:
      cache: the cache; donate it in the enclosing jit to have it updated in place.
      layer: number of the layer.
      queries: [S, Hq, D].
      keys: [S, H, D].
      values: [S, H, D].
      batch: the step.
      group: which table of the batch this layer uses.
      scale: of the scores; None = D ** -0.5.
      sliding_window: positions that a query sees, its own included, at most the window of its group; None = that.
      soft_cap: bound of the scores by tanh; None = none.
      implementation: see `kvbm_jax.kernels`.

    Returns:
      The attention output [S, Hq, D] and the cache.

    Raises:
      LayoutError: at trace time, if the shapes do not fit, or the window exceeds the group's: its table has no blocks
        further back.
    """
    cache = kv_cache.store_kv(cache, layer, keys, values, batch.slots[group], implementation=implementation)
    output = paged_attention(
        cache,
        layer,
        queries,
        batch,
        group=group,
        scale=scale,
        sliding_window=sliding_window,
        soft_cap=soft_cap,
        implementation=implementation,
    )
    return output, cache


def paged_attention(
    cache: kv_cache.KVCache,
    layer: int | jax.Array,
    queries: jax.Array,
    batch: AttentionBatch,
    *,
    group: int = 0,
    scale: float | None = None,
    sliding_window: int | None = None,
    soft_cap: float | None = None,
    implementation: kernels.dispatch.Implementation | None = None,
) -> jax.Array:
    """Attends queries [S, Hq, D] over what is cached, without storing; see `attend`."""
    window = batch.groups[group].window
    if window is not None and sliding_window is not None and sliding_window > window:
        raise LayoutError(f"sliding_window is {sliding_window}; group {group} keeps no more than {window} tokens")
    array, first = kv_cache.layer_view(cache, layer)
    return kernels.paged_attention(
        queries,
        array,
        batch.block_tables[group] + first,
        batch.context_lens,
        batch.query_starts,
        scales=kv_cache.layer_scales(cache, layer),
        max_query_len=batch.max_query_len,
        scale=scale,
        sliding_window=window if sliding_window is None else sliding_window,
        soft_cap=soft_cap,
        implementation=implementation,
    )
