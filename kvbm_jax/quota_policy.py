"""Quotas as an eviction policy: for an owner of a pool that evicts by a policy and keeps its memory beside the pool.

    policy = within(policies.lru(), limits=lambda num_blocks: [num_blocks // 2] * 2, max_sequences=8)
    memory = policy.init(num_blocks)

    memory, admitted = ask(memory, state, running, rows, wanted, ending)      before each verb that takes blocks
    state, running, result = sequences.extend(..., scores=policies.bind(policy, memory))     without the refused rows
    memory = settle(memory, running)                                          after each verb that changes tables

`kvbm_jax.quotas` has the same in one call for each verb, and says what quotas are.

Axes: Q tenants, N blocks, B rows of the batch, R rows of a call, E rows that end, M hashes of a row, F blocks of one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from kvbm_jax import policies, pool, quotas, sequences
from kvbm_jax.padding import DROP, FILL
from kvbm_jax.quotas import Quotas

__all__ = ["Charged", "ask", "ask_to_start", "assign", "charge", "settle", "within"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Charged:
    """Memory of a policy under quotas."""

    quotas: Quotas
    coming: jax.Array  # i32[Q]: blocks that each tenant is about to get
    memory: Any  # of the policy that decides among blocks which quotas treat alike


def within(
    policy: policies.EvictionPolicy, *, limits: Callable[[int], Sequence[int]], max_sequences: int
) -> policies.EvictionPolicy:
    """Returns a policy by which tenants' blocks beyond their limits go first, and otherwise those that another says.

    Costs what `quotas.scores` says at each eviction, and nothing else when it is told of something.

    Args:
      policy: the other policy.
      limits: the limit of each tenant in a pool of so many blocks.
      max_sequences: B of the batch.
    """

    def init(num_blocks: int) -> Charged:
        charged = quotas.init(limits(num_blocks), num_blocks=num_blocks, max_sequences=max_sequences)
        return Charged(charged, jnp.zeros_like(charged.limits), policy.init(num_blocks))

    def registered(memory: Charged, state: pool.PoolState, told: policies.Registered) -> Charged:
        return replace(memory, memory=policy.registered(memory.memory, state, told))

    def hit(memory: Charged, state: pool.PoolState, blocks: jax.Array) -> Charged:
        return replace(memory, memory=policy.hit(memory.memory, state, blocks))

    def scores(memory: Charged, state: pool.PoolState) -> jax.Array:
        return quotas.scores(memory.quotas, memory.coming, policies.bind(policy, memory.memory))(state)

    def resized(memory: Charged, told: policies.Resized) -> Charged:
        size = told.after.num_blocks
        new = init(size)
        owners = new.quotas.owners.at[told.new_ids].set(memory.quotas.owners, **DROP)
        charged = replace(new.quotas, tenants=memory.quotas.tenants, owners=owners)
        return Charged(
            charged, new.coming, new.memory if policy.resized is None else policy.resized(memory.memory, told)
        )

    return policies.EvictionPolicy(init, registered, hit, scores, resized)


def ask(
    memory: Charged,
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    rows: jax.Array,
    wanted: jax.Array,
    ending: jax.Array,
) -> tuple[Charged, jax.Array]:
    """Asks for blocks for running rows, once others have ended.

    Args:
      memory: the memory, settled.
      state: the pool.
      running: the batch.
      rows: i32[R], in the order of their claim to blocks, padded with B.
      wanted: i32[R], blocks that each wants.
      ending: i32[E], rows that are released in the same call, padded with B.

    Returns:
      The memory, and bool[R] which rows may have them (`quotas.admit`).
    """
    left, remaining = quotas.after_release(state, running, ending)
    charged = quotas.settle(memory.quotas, remaining)
    tenants = charged.tenants.at[rows].get(**FILL, fill_value=len(charged.limits))
    admitted = quotas.admit(charged, left, tenants, wanted)
    return _expecting(memory, charged, tenants, jnp.where(admitted, wanted, 0)), admitted


def ask_to_start(
    memory: Charged,
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    rows: jax.Array,
    tenants: jax.Array,
    hashes: jax.Array,
    num_hashes: jax.Array,
    num_tokens: jax.Array,
) -> tuple[Charged, jax.Array]:
    """Asks for what `sequences.start` with these arguments takes, and assigns the rows to their tenants.

    What is cached of their prompts stays charged as it is until `settle`, also while blocks are evicted for the rest.

    Args:
      memory: the memory, settled.
      state: the pool.
      running: the batch.
      rows: i32[R], empty rows, padded with B.
      tenants: i32[R], Q for none.
      hashes: u32[R, M, 4].
      num_hashes: i32[R].
      num_tokens: i32[R].

    Returns:
      The memory, and bool[R] which rows may begin.
    """
    prefix, fresh = quotas.prompt_blocks(state, running, rows, hashes, num_hashes, num_tokens)
    admitted = quotas.admit(memory.quotas, state, tenants, fresh + quotas.newly_held(state, tenants, prefix))
    charged = quotas.assign(memory.quotas, rows, tenants)
    return _expecting(memory, charged, tenants, jnp.where(admitted, fresh, 0)), admitted


def assign(memory: Charged, rows: jax.Array, tenants: jax.Array) -> Charged:
    """Says whose rows are, see `quotas.assign`."""
    return replace(memory, quotas=quotas.assign(memory.quotas, rows, tenants))


def charge(memory: Charged, block_ids: jax.Array, tenants: jax.Array) -> Charged:
    """Charges blocks that are in no table, see `quotas.charge`; nothing more is coming."""
    charged = quotas.charge(memory.quotas, block_ids, tenants)
    return replace(memory, quotas=charged, coming=jnp.zeros_like(memory.coming))


def settle(memory: Charged, running: sequences.SequenceBatch) -> Charged:
    """Charges the blocks of tables, see `quotas.settle`; nothing more is coming."""
    return replace(memory, quotas=quotas.settle(memory.quotas, running), coming=jnp.zeros_like(memory.coming))


def _expecting(memory: Charged, charged: Quotas, tenants: jax.Array, counts: jax.Array) -> Charged:
    """The memory as quotas are now, with `counts` i32[R] blocks coming."""
    return replace(memory, quotas=charged, coming=quotas.by_tenant(charged, tenants, counts))
