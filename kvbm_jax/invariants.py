"""Conservation laws of a pool and its sequences: what must hold after every verb, whatever was asked of it.

`check` gives the numbers as values, usable inside jit; `assert_holds` raises on the host with them. Both cost work in
proportion to the pool and are meant for tests, debugging and the `inspect` of a snapshot, not for the hot path.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kvbm_jax import index as block_index
from kvbm_jax import lru
from kvbm_jax.errors import InvariantError
from kvbm_jax.groups import first_places
from kvbm_jax.pool import PoolState
from kvbm_jax.quotas import Quotas, settle, usage
from kvbm_jax.sequences import SequenceBatch, blocks_for

__all__ = [
    "QuotaViolations",
    "SequenceViolations",
    "Violations",
    "assert_holds",
    "check",
    "check_quotas",
    "check_sequences",
    "holders",
]


class Violations(NamedTuple):
    """How many blocks break each law, i32[] each; all are 0 in a sound pool."""

    negative_ref_counts: jax.Array
    misplaced: jax.Array
    """Blocks that are not in exactly one of: reset stack, inactive queue, held."""
    reset_but_registered: jax.Array
    inactive_but_unregistered: jax.Array
    index_disagrees: jax.Array
    """Registered blocks that a lookup of their own key does not find."""
    stray_ways: jax.Array
    """Difference between the entries of the index and the registered blocks."""
    queue_counts_disagree: jax.Array
    """Groups of the queue whose count differs from their bits, plus a wrong total."""
    held_by_tables: jax.Array
    """Blocks whose ref count differs from the given number of holders; 0 if none is given."""


class SequenceViolations(NamedTuple):
    """How many table entries and rows break each law, i32[] each; all are 0 in a sound batch."""

    misplaced_entries: jax.Array
    """Entries that hold a block outside of the places from `first` up to `num_blocks`, or none inside."""
    rows_without_room: jax.Array
    """Rows whose tables have too few places for their length."""
    passed_too_far: jax.Array
    """Groups of rows that have freed a block which the next token sees."""


class QuotaViolations(NamedTuple):
    """How many blocks and tenants break each law of settled quotas, i32[] each."""

    unknown_owners: jax.Array
    """Blocks, and rows, that belong to neither a tenant nor nobody; 0 in sound quotas."""
    charged_elsewhere: jax.Array
    """Blocks in tables that are charged to a tenant none of whose rows holds them; 0 in sound quotas."""
    over_limit: jax.Array
    """Tenants that hold more than their limit: such as were left with blocks they shared, or had it lowered."""


def check(state: PoolState, holders: jax.Array | None = None) -> Violations:
    """Counts the blocks that break each law.

    Args:
      state: the pool.
      holders: i32[N], how many table entries name each block, if the caller knows.
    """
    num_blocks = state.num_blocks
    blocks = jnp.arange(num_blocks, dtype=jnp.int32)
    stacked = jnp.where(blocks < state.num_reset, state.reset_stack, num_blocks)
    in_reset = jnp.zeros((num_blocks,), jnp.int32).at[stacked].add(1, mode="drop")

    queue = state.inactive
    bits = lru.live(queue)
    entries = jnp.where(bits, queue.ring, num_blocks)
    in_queue = jnp.zeros((num_blocks,), jnp.int32).at[entries].add(1, mode="drop")
    held = (state.ref_counts > 0).astype(jnp.int32)

    registered = block_index.is_registered(state.index, blocks)
    keys = state.index.keys
    found = block_index.lookup(state.index, keys[:, :4], keys[:, 4])
    entries_in_table = jnp.sum(state.index.table[:, :, 1] != 0)

    def count(mask: jax.Array) -> jax.Array:
        return jnp.sum(mask, dtype=jnp.int32)

    return Violations(
        negative_ref_counts=count(state.ref_counts < 0),
        misplaced=count(in_reset + in_queue + held != 1),
        reset_but_registered=count((in_reset > 0) & registered),
        inactive_but_unregistered=count((in_queue > 0) & ~registered),
        index_disagrees=count(registered & (found != blocks)),
        stray_ways=jnp.abs(entries_in_table - jnp.sum(registered)).astype(jnp.int32),
        queue_counts_disagree=sum(
            (count(right != level) for right, level in zip(lru.tree_of(bits), queue.tree, strict=True)),
            (count(bits) != queue.size).astype(jnp.int32),
        ),
        held_by_tables=jnp.int32(0) if holders is None else count(holders != state.ref_counts),
    )


def check_sequences(sequences: SequenceBatch) -> SequenceViolations:
    """Counts the entries and rows that break each law."""
    place = jnp.arange(sequences.block_tables.shape[2], dtype=jnp.int32)[None, None, :]
    within = (place >= sequences.first[:, :, None]) & (place < sequences.num_blocks[None, :, None])
    blocks = sequences.block_tables
    held = (blocks >= 0) & (blocks < sequences.pool_blocks)
    seen = first_places(sequences.groups, sequences.lengths, sequences.block_size)
    wrong = jnp.where(within, ~held, blocks != sequences.pool_blocks)
    short = sequences.num_blocks < blocks_for(sequences.lengths, sequences.block_size)
    return SequenceViolations(
        misplaced_entries=jnp.sum(wrong, dtype=jnp.int32),
        rows_without_room=jnp.sum(short, dtype=jnp.int32),
        passed_too_far=jnp.sum(sequences.first > seen, dtype=jnp.int32),
    )


def check_quotas(quotas: Quotas, state: PoolState, sequences: SequenceBatch) -> QuotaViolations:
    """Counts the blocks and tenants that break each law."""

    def unknown(tenants: jax.Array) -> jax.Array:
        return jnp.sum((tenants < 0) | (tenants > len(quotas.limits)), dtype=jnp.int32)

    moved = settle(quotas, sequences).owners != quotas.owners
    return QuotaViolations(
        unknown_owners=unknown(quotas.owners) + unknown(quotas.tenants),
        charged_elsewhere=jnp.sum(moved, dtype=jnp.int32),
        over_limit=jnp.sum(usage(quotas, state).held > quotas.limits, dtype=jnp.int32),
    )


def holders(sequences: SequenceBatch) -> jax.Array:
    """Counts the table entries that name each block, i32[N], as `check` takes them."""
    named = sequences.block_tables.reshape(-1)
    return jnp.zeros((sequences.pool_blocks,), jnp.int32).at[named].add(1, mode="drop")


def assert_holds(state: PoolState, holders: jax.Array | None = None) -> None:
    """Raises `InvariantError` with the numbers if a law is broken."""
    broken = {name: int(n) for name, n in check(state, holders)._asdict().items() if int(n)}
    if broken:
        listing = ", ".join(f"{name}: {n}" for name, n in broken.items())
        raise InvariantError(f"the pool of {state.num_blocks} blocks breaks its laws ({listing})")
