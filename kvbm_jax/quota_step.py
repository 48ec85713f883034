"""A scheduler step under quotas: `kvbm_jax.step` for the rows whose tenants have room for what the plan wants for them.

What ends in the step is given back before anything is asked for. New rows are asked first, then those that grow, in the
plan's order: once a tenant's row is refused, so are all its later ones that want blocks. Others go on.

Axes: as in `kvbm_jax.step`, and Q tenants.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp

from kvbm_jax import pool, quotas, sequences
from kvbm_jax.groups import has_windows
from kvbm_jax.ordering import fence
from kvbm_jax.padding import DROP, FILL
from kvbm_jax.quotas import Quotas
from kvbm_jax.step import StepPlan, StepResult
from kvbm_jax.step import step as step_all
from kvbm_jax.types import Status

__all__ = ["step"]


def step(
    charged: Quotas,
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    plan: StepPlan,
    tenants: jax.Array,
    *,
    max_blocks: int = 1,
    max_fresh: int | None = None,
    scores: pool.Scores | None = None,
) -> tuple[Quotas, pool.PoolState, sequences.SequenceBatch, StepResult]:
    """Carries out a plan as `kvbm_jax.step.step` does, but for the rows that are refused (QUOTA_EXCEEDED).

    Args:
      charged: the quotas, settled.
      state: the pool.
      running: the batch.
      plan: what to do.
      tenants: i32[R], of the rows that begin; Q for none.
      max_blocks: as in `kvbm_jax.step.step`.
      max_fresh: as in `kvbm_jax.step.step`; rows that are refused use none of it up.
      scores: a policy's, among blocks that quotas treat alike.

    Returns:
      Quotas, pool, batch and result. A refused row stays as it was, as if the plan did not name it.
    """
    batch = running.block_tables.shape[1]
    left, remaining = _after_release(state, running, plan, max_blocks)
    settled = quotas.settle(charged, remaining)

    prompts = plan.starting, plan.hashes, plan.num_hashes, plan.num_tokens
    prefix, fresh = quotas.prompt_blocks(left, running, *prompts)
    growth = quotas.fresh_blocks(left, remaining, plan.growing, plan.new_tokens, max_blocks=max_blocks)

    whose = jnp.concatenate([tenants, charged.tenants.at[plan.growing].get(**FILL, fill_value=0)])
    more = jnp.concatenate([fresh, growth])
    idle = jnp.concatenate([quotas.newly_held(left, tenants, prefix), jnp.zeros_like(growth)])
    admitted = quotas.admit(settled, left, whose, more + idle)
    new, old = admitted[: len(tenants)], admitted[len(tenants) :]

    held = quotas.charge_prefixes(settled, left, tenants, jnp.where(new[:, None], prefix, state.num_blocks))
    state, held, new, old = fence((state, held, new, old))
    coming = quotas.by_tenant(charged, whose, jnp.where(admitted, more, 0))
    masked = plan._replace(
        starting=jnp.where(new, plan.starting, batch),
        num_hashes=jnp.where(new, plan.num_hashes, 0),
        num_tokens=jnp.where(new, plan.num_tokens, 0),
        growing=jnp.where(old, plan.growing, batch),
        new_tokens=jnp.where(old, plan.new_tokens, 0),
    )
    state, running, result = step_all(
        state, running, masked, max_blocks=max_blocks, max_fresh=max_fresh, scores=quotas.scores(held, coming, scores)
    )
    begun = jnp.where(new & (result.start_status == Status.OK), plan.starting, batch)
    after = quotas.settle(quotas.assign(settled, begun, tenants), running)
    result = result._replace(
        start_status=jnp.where(new, result.start_status, Status.QUOTA_EXCEEDED).astype(jnp.int32),
        grow_status=jnp.where(old, result.grow_status, Status.QUOTA_EXCEEDED).astype(jnp.int32),
    )
    return after, state, running, result


def _after_release(
    state: pool.PoolState, running: sequences.SequenceBatch, plan: StepPlan, max_blocks: int
) -> tuple[pool.PoolState, sequences.SequenceBatch]:
    """Pool (its ref counts alone) and batch as the release phase of the step leaves them."""
    if plan.num_computed is not None and has_windows(running.groups):
        passed = sequences.passed(running, plan.num_computed, max_blocks=max_blocks)
        running, behind = sequences.drop_passed(running, passed, max_blocks=max_blocks)
        state = replace(state, ref_counts=state.ref_counts.at[behind].add(-1, **DROP))
    return quotas.after_release(state, running, plan.ending)
