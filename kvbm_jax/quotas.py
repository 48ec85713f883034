"""Quotas: how many blocks each tenant may have, as an immutable pytree beside the pool and its sequences.

A tenant has one number, its limit, which bounds two things:

    held        blocks in tables of its rows: what would take it further is refused with QUOTA_EXCEEDED
    resident    held and cached ones: beyond the limit, its cached blocks are the first that anyone's allocation evicts

So a tenant is never refused for what it has cached, uses what others leave idle, and loses that first. Where the limits
sum to no more than the pool, and each tenant's prompts have a salt of their own, no tenant within its limit is refused
for lack of blocks, and none loses cached blocks while it is within its limit.

A block is charged once, to a tenant one of whose rows holds it. Who shares a prefix within a tenant pays once for it;
tenants meet in a block only where their prompts are hashed alike, under one salt: then the first pays until it lets go,
and the charge passes to the first row that still holds the block, even beyond its tenant's limit. A cached block stays
charged to the last that held it. What is in no table is charged as `charge` says, and to nobody without it.

    quotas, state, running, result = start(quotas, state, running, ...)    extend, unshare, reserve: may refuse
    state, running, result = sequences.register(state, running, ...)       all other verbs are those of the pool
    quotas = settle(quotas, running)                                       after each that changes tables

Without quotas nothing of this is called or compiled. With them, a verb costs in addition work in proportion to N and to
the tables, and what `scores` says.

Axes: Q tenants, N blocks, B rows of the batch, R rows of a call, G groups, W blocks of a table, M hashes of a row,
F blocks of a call, K blocks of a grant.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvbm_jax import grants, lru, pool, selection, sequences
from kvbm_jax.errors import LayoutError
from kvbm_jax.ordering import fence
from kvbm_jax.padding import CLIP, DROP, FILL
from kvbm_jax.types import Status

__all__ = [
    "Quotas",
    "Usage",
    "admit",
    "after_release",
    "assign",
    "by_tenant",
    "charge",
    "charge_prefixes",
    "extend",
    "fresh_blocks",
    "init",
    "newly_held",
    "prompt_blocks",
    "reserve",
    "scores",
    "settle",
    "start",
    "unshare",
    "usage",
]

_BOUNDLESS: Final = np.int32(2**31 - 1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quotas:
    """Who has which block, and how many each tenant may have. Q stands for no tenant, which has no limit."""

    limits: jax.Array  # i32[Q]: blocks
    tenants: jax.Array  # i32[B]: tenant of each row; of an empty row it means nothing
    owners: jax.Array  # i32[N]: tenant that each block is charged to; of a reset block it means nothing


class Usage(NamedTuple):
    """Blocks that are charged to each tenant."""

    held: jax.Array  # i32[Q]: those with holders
    resident: jax.Array  # i32[Q]: held ones and cached ones


def init(limits: Sequence[int], *, num_blocks: int, max_sequences: int) -> Quotas:
    """Returns quotas under which nothing is charged yet.

    Args:
      limits: blocks that each of Q tenants may hold, none of them negative; more than the pool has is no limit.
      num_blocks: N of the pool.
      max_sequences: B of the batch.

    Raises:
      LayoutError: if there is no tenant, or a limit is negative or not i32.
    """
    if not limits or not all(0 <= limit <= _BOUNDLESS for limit in limits):
        raise LayoutError(f"limits are {list(limits)}; give one tenant or more, each with 0 to {_BOUNDLESS} blocks")
    nobody = len(limits)
    return Quotas(
        limits=jnp.array(limits, jnp.int32),
        tenants=jnp.full((max_sequences,), nobody, jnp.int32),
        owners=jnp.full((num_blocks,), nobody, jnp.int32),
    )


def usage(quotas: Quotas, state: pool.PoolState) -> Usage:
    """Counts what is charged to each tenant. Costs work in proportion to N."""
    held = state.ref_counts > 0
    return Usage(_count(quotas, held), _count(quotas, held | pool.is_inactive(state)))


def assign(quotas: Quotas, rows: jax.Array, tenants: jax.Array) -> Quotas:
    """Says whose rows are: `start` does so, and a fork's rows are its source's, `quotas.tenants[sources]`.

    Args:
      quotas: the quotas.
      rows: i32[R], distinct, padded with B.
      tenants: i32[R], Q for none.
    """
    return replace(quotas, tenants=quotas.tenants.at[rows].set(tenants, **DROP))


def charge(quotas: Quotas, block_ids: jax.Array, tenants: jax.Array) -> Quotas:
    """Charges blocks that are in no table, such as `pool.allocate` grants.

    Args:
      quotas: the quotas.
      block_ids: i32[F], distinct, padded with N.
      tenants: i32[F], Q for nobody.
    """
    return replace(quotas, owners=quotas.owners.at[block_ids].set(tenants, **DROP))


def settle(quotas: Quotas, running: sequences.SequenceBatch) -> Quotas:
    """Charges each block in the tables to a tenant that holds it: to the former one if it does, else by the first row.

    Blocks in no table stay charged as they are. Costs work in proportion to N and to the tables.
    """
    groups, batch, width = running.block_tables.shape
    tables = running.block_tables.transpose(1, 0, 2).reshape(batch, groups * width)
    return replace(quotas, owners=_owners(quotas.owners, quotas.tenants, tables))


def admit(quotas: Quotas, state: pool.PoolState, tenants: jax.Array, wanted: jax.Array) -> jax.Array:
    """Tells which rows stay within their tenant's limit, rows in order.

    Once a tenant's row is refused, so are all its later ones; one that wants nothing never is.

    Args:
      quotas: the quotas, settled.
      state: the pool.
      tenants: i32[R], Q for none.
      wanted: i32[R], blocks that each row is to be charged for.

    Returns:
      bool[R].
    """
    left = quotas.limits - usage(quotas, state).held
    row = jnp.arange(len(tenants), dtype=jnp.int32)
    before = (tenants[:, None] == tenants[None, :]) & (row[:, None] >= row[None, :])
    total = jnp.sum(jnp.where(before, wanted[None, :], 0), axis=1)
    return (wanted <= 0) | (total <= left.at[tenants].get(**FILL, fill_value=_BOUNDLESS))


def scores(quotas: Quotas, more: jax.Array, policy: pool.Scores | None = None) -> pool.Scores:
    """Scores by which a tenant's cached blocks beyond its limit are evicted first, exactly so many, then all others.

    Which of a tenant's blocks those are, and what goes first among them and among the others, is the policy's to say.

    Costs 32 (W + 1) scatters over N for a policy of W words (none: the least recently released), in addition to what
    `pool.Scores` costs.

    Args:
      quotas: the quotas, settled.
      more: i32[Q], blocks that each tenant is about to get.
      policy: the scores of a policy (`policies.bind`).
    """

    def score(state: pool.PoolState) -> jax.Array:
        words = [] if policy is None else list(jnp.atleast_2d(policy(state)))
        beyond = jnp.maximum(usage(quotas, state).resident + more - quotas.limits, 0)
        order = [*words, lru.order(state.inactive)]
        first = selection.lowest_of_each(order, pool.is_inactive(state), quotas.owners, beyond)
        return jnp.stack([jnp.where(first, jnp.uint32(0), jnp.uint32(1)), *words])

    return score


def start(
    quotas: Quotas,
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    rows: jax.Array,
    tenants: jax.Array,
    hashes: jax.Array,
    num_hashes: jax.Array,
    num_tokens: jax.Array,
    *,
    scores: pool.Scores | None = None,
) -> tuple[Quotas, pool.PoolState, sequences.SequenceBatch, sequences.StartResult]:
    """Begins sequences as `sequences.start` does, those whose tenants have room for them.

    A row is charged for its new blocks, and for those of its cached prefix that nobody holds. Of the latter a block
    that rows of one call share counts for the first of them, and for each row of another tenant.

    Args:
      quotas: the quotas, settled.
      state: the pool.
      running: the batch.
      rows: i32[R], as in `sequences.start`.
      tenants: i32[R], Q for none.
      hashes: u32[R, M, 4].
      num_hashes: i32[R].
      num_tokens: i32[R].
      scores: a policy's, among blocks that quotas treat alike.

    Returns:
      Quotas, pool, batch and result. A row that is refused (QUOTA_EXCEEDED) takes nothing, as if it were not named.
    """
    prefix, fresh = prompt_blocks(state, running, rows, hashes, num_hashes, num_tokens)
    admitted = admit(quotas, state, tenants, fresh + newly_held(state, tenants, prefix))
    charged = charge_prefixes(quotas, state, tenants, jnp.where(admitted[:, None], prefix, state.num_blocks))
    state, admitted, charged = fence((state, admitted, charged))
    more = by_tenant(quotas, tenants, jnp.where(admitted, fresh, 0))
    batch = len(running.lengths)
    state, running, result = sequences.start(
        state,
        running,
        jnp.where(admitted, rows, batch),
        hashes,
        jnp.where(admitted, num_hashes, 0),
        jnp.where(admitted, num_tokens, 0),
        scores=_scores(charged, more, scores),
    )
    status = jnp.where(admitted, result.status, Status.QUOTA_EXCEEDED).astype(jnp.int32)
    quotas = assign(quotas, jnp.where(status == Status.OK, rows, batch), tenants)
    return settle(quotas, running), state, running, result._replace(status=status)


def extend(
    quotas: Quotas,
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    num_tokens: jax.Array,
    *,
    max_blocks: int = 1,
    scores: pool.Scores | None = None,
) -> tuple[Quotas, pool.PoolState, sequences.SequenceBatch, sequences.ExtendResult]:
    """Makes room for the next tokens of each row as `sequences.extend` does, where the tenant may have the blocks.

    Args:
      quotas: the quotas, settled.
      state: the pool.
      running: the batch.
      num_tokens: i32[B].
      max_blocks: static, as in `sequences.extend`.
      scores: a policy's, among blocks that quotas treat alike.

    Returns:
      Quotas, pool, batch and result. A row that is refused (QUOTA_EXCEEDED) keeps its length.
    """
    row = jnp.arange(len(num_tokens), dtype=jnp.int32)
    fresh = fresh_blocks(state, running, row, num_tokens, max_blocks=max_blocks)
    admitted = admit(quotas, state, quotas.tenants, fresh)
    more = by_tenant(quotas, quotas.tenants, jnp.where(admitted, fresh, 0))
    state, running, result = sequences.extend(
        state,
        running,
        jnp.where(admitted, num_tokens, 0),
        max_blocks=max_blocks,
        scores=_scores(quotas, more, scores),
    )
    status = jnp.where(admitted, result.status, Status.QUOTA_EXCEEDED).astype(jnp.int32)
    return settle(quotas, running), state, running, result._replace(status=status)


def unshare(
    quotas: Quotas,
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    mask: jax.Array,
    *,
    scores: pool.Scores | None = None,
) -> tuple[Quotas, pool.PoolState, sequences.SequenceBatch, sequences.UnshareResult]:
    """Gives rows a tail of their own as `sequences.unshare` does, where the tenant may have the blocks.

    A row is charged for the tails that others hold too; one that only a hash finds is exchanged for the new one.

    Args:
      quotas: the quotas, settled.
      state: the pool.
      running: the batch.
      mask: bool[B].
      scores: a policy's, among blocks that quotas treat alike.

    Returns:
      Quotas, pool, batch and result. A row that is refused (QUOTA_EXCEEDED) keeps its tail.
    """
    batch, groups = len(mask), len(running.groups)
    rows = jnp.where(mask, jnp.arange(batch, dtype=jnp.int32), batch)
    tails, shared = sequences.tails(state, running, rows)
    needs = jnp.any(shared, axis=1)
    sole = state.ref_counts.at[tails].get(**FILL, fill_value=0) == 1
    wanted = jnp.where(needs, groups - jnp.sum(sole, axis=1, dtype=jnp.int32), 0)
    state, admitted = fence((state, admit(quotas, state, quotas.tenants, wanted)))
    more = by_tenant(quotas, quotas.tenants, jnp.where(needs & admitted, groups, 0))
    state, running, result = sequences.unshare(state, running, mask & admitted, scores=_scores(quotas, more, scores))
    status = jnp.where(admitted, result.status, Status.QUOTA_EXCEEDED).astype(jnp.int32)
    return settle(quotas, running), state, running, result._replace(status=status)


def reserve(
    quotas: Quotas,
    state: pool.PoolState,
    growth: jax.Array,
    *,
    max_blocks: int,
    scores: pool.Scores | None = None,
) -> tuple[Quotas, pool.PoolState, grants.ReserveResult]:
    """Sets blocks aside as `grants.reserve` does, for rows whose tenants may have them; all or none.

    Until the grant is committed, which `settle` is to follow, its blocks are charged as they were asked for.

    Args:
      quotas: the quotas, settled.
      state: the pool.
      growth: i32[B], blocks for each row.
      max_blocks: static bound K of their sum.
      scores: a policy's, among blocks that quotas treat alike.

    Returns:
      Quotas, pool and result.
    """
    admitted = jnp.all(admit(quotas, state, quotas.tenants, growth))
    growth = jnp.where(admitted, growth, 0)
    more = by_tenant(quotas, quotas.tenants, growth)
    state, result = grants.reserve(
        state, jnp.sum(growth, dtype=jnp.int32), max_blocks=max_blocks, scores=_scores(quotas, more, scores)
    )
    tenants = jnp.repeat(quotas.tenants, growth, total_repeat_length=max_blocks)
    status = jnp.where(admitted, result.status, Status.QUOTA_EXCEEDED).astype(jnp.int32)
    return charge(quotas, result.grant.block_ids, tenants), state, result._replace(status=status)


def by_tenant(quotas: Quotas, tenants: jax.Array, counts: jax.Array) -> jax.Array:
    """Sums counts i32[R] of tenants i32[R], Q for none; returns i32[Q]."""
    return jnp.zeros_like(quotas.limits).at[tenants].add(counts, **DROP)


def after_release(
    state: pool.PoolState, running: sequences.SequenceBatch, rows: jax.Array
) -> tuple[pool.PoolState, sequences.SequenceBatch]:
    """Returns the pool (its ref counts alone) and the batch as they were without rows i32[R], padded with B."""
    tables = running.block_tables.at[:, rows].get(**FILL, fill_value=running.pool_blocks)
    counts = state.ref_counts.at[tables.reshape(-1)].add(-1, **DROP)
    return replace(state, ref_counts=counts), sequences.empty_rows(running, rows)


def prompt_blocks(
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    rows: jax.Array,
    hashes: jax.Array,
    num_hashes: jax.Array,
    num_tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Finds the blocks that rows need to begin; arguments as in `sequences.start`.

    Returns:
      i32[R, G * M] those of their cached prefixes, padded with N, and i32[R] how many fresh ones in all groups; none of
      either for a row that no table has room for.
    """
    batch, width = running.block_tables.shape[1:]
    needed = sequences.blocks_for(num_tokens, running.block_size)
    possible = (rows < batch) & (needed <= width)
    prefix, cached = sequences.find_prefixes(state, running, hashes, jnp.where(possible, num_hashes, 0))
    return prefix.reshape(len(rows), -1), jnp.where(possible, len(running.groups) * (needed - cached), 0)


def newly_held(state: pool.PoolState, tenants: jax.Array, prefix: jax.Array) -> jax.Array:
    """Counts the blocks of prefixes that nobody holds, those of one tenant once.

    Args:
      state: the pool.
      tenants: i32[R].
      prefix: i32[R, F], blocks that each row has found, padded with N.

    Returns:
      i32[R]: a block counts for the first row that names it, and for each row of another tenant than that row's.
    """
    idle = state.ref_counts.at[prefix].get(**FILL, fill_value=1) == 0
    first = _first_rows(prefix, state.num_blocks).at[prefix].get(**FILL, fill_value=0)
    own = first == jnp.arange(len(tenants), dtype=jnp.int32)[:, None]
    other = tenants.at[first].get(**CLIP) != tenants[:, None]
    return jnp.sum(idle & (own | other), axis=1, dtype=jnp.int32)


def charge_prefixes(quotas: Quotas, state: pool.PoolState, tenants: jax.Array, prefix: jax.Array) -> Quotas:
    """Charges blocks that nobody holds to rows that are about to hold them; arguments as in `newly_held`."""
    held = state.ref_counts.at[prefix].get(**FILL, fill_value=1) > 0
    prefix = jnp.where(held, state.num_blocks, prefix)
    return replace(quotas, owners=_owners(quotas.owners, tenants, prefix))


def fresh_blocks(
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    rows: jax.Array,
    num_tokens: jax.Array,
    *,
    max_blocks: int,
) -> jax.Array:
    """Counts the blocks that rows need to grow, in all groups; 0 for one that is refused whatever is free.

    Args:
      state: the pool.
      running: the batch.
      rows: i32[R], padded with B.
      num_tokens: i32[R], new tokens of each.
      max_blocks: static bound of the new blocks of a row in one group.

    Returns:
      i32[R].
    """
    batch, width = running.block_tables.shape[1:]
    lengths = running.lengths.at[rows].get(**FILL, fill_value=0) + num_tokens
    needed = sequences.blocks_for(lengths, running.block_size)
    fresh = jnp.maximum(needed - running.num_blocks.at[rows].get(**FILL, fill_value=0), 0)
    _, shared = sequences.tails(state, running, jnp.where(num_tokens != 0, rows, batch))
    possible = (rows < batch) & (num_tokens >= 0) & (needed <= width) & (fresh <= max_blocks)
    return jnp.where(possible & ~jnp.any(shared, axis=1), len(running.groups) * fresh, 0)


_scores = scores  # verbs have an argument of this name


def _owners(owners: jax.Array, tenants: jax.Array, tables: jax.Array) -> jax.Array:
    """Charges the blocks of rows i32[R, F] of tenants i32[R]: to the former owner if it is among them, or the first."""
    count, size = tables.shape[0], owners.shape[0]
    paid = owners.at[tables].get(**FILL, fill_value=0) == tenants[:, None]
    kept = jnp.zeros((size,), bool).at[jnp.where(paid, tables, size)].set(True, **DROP)
    first = _first_rows(tables, size)
    return jnp.where(kept | (first == count), owners, tenants.at[first].get(**CLIP))


def _first_rows(blocks: jax.Array, num_blocks: int) -> jax.Array:
    """Finds the first row of i32[R, F] that names each block, i32[N]; R where none does."""
    count = blocks.shape[0]
    row = jnp.broadcast_to(jnp.arange(count, dtype=jnp.int32)[:, None], blocks.shape)
    return jnp.full((num_blocks,), count, jnp.int32).at[blocks].min(row, **DROP)


def _count(quotas: Quotas, mask: jax.Array) -> jax.Array:
    """Counts masked blocks bool[N] by owner, i32[Q]."""
    return by_tenant(quotas, quotas.owners, mask.astype(jnp.int32))
