"""Quotas on the host: asks before a pool gives blocks to a tenant's rows, and keeps account of what it has.

Beside a `BlockPool`, whose eviction policy it wraps (`kvbm_jax.quota_policy`): the account is that policy's memory, so
it travels with the pool, and pools without quotas have none of this. Its programs are small ones of its own.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvbm_jax import quota_policy, quotas
from kvbm_jax.errors import QuotaExceededError
from kvbm_jax.policies import EvictionPolicy
from kvbm_jax.pool import PoolState
from kvbm_jax.programs import pad
from kvbm_jax.quota_policy import Charged
from kvbm_jax.sequences import SequenceBatch
from kvbm_jax.tenants import OTHERS, TenantBlocks, TenantQuotas

__all__ = ["Prompt", "Tenancy"]

_ROWS = 8  # the least padded number of rows of a call


class Prompt(NamedTuple):
    """A sequence that is to begin, as `sequences.start` takes it."""

    row: int
    tenant: str
    hashes: NDArray[np.uint32]  # [M, 4], padded
    num_hashes: int
    num_tokens: int


class Tenancy:
    """The tenants of one pool. Accounts are values: taken, and returned anew.

    Args:
      limits: of the tenants, at least one.
      policy: decides among blocks that quotas treat alike.
      max_sequences: rows of the batch.
    """

    def __init__(self, limits: TenantQuotas, policy: EvictionPolicy, max_sequences: int) -> None:
        self.policy = _within(limits, policy, max_sequences)
        self._limits = limits
        self._max_sequences = max_sequences

    def ask_to_start(self, account: Charged, state: PoolState, running: SequenceBatch, prompt: Prompt) -> Charged:
        """Asks for the blocks of a prompt.

        Raises:
          QuotaExceededError: if its tenant would hold too many.
        """
        asked, admitted = _ask_to_start(
            account,
            state,
            running,
            np.array([prompt.row], np.int32),
            np.array([self._limits.index(prompt.tenant)], np.int32),
            prompt.hashes[None],
            np.array([prompt.num_hashes], np.int32),
            np.array([prompt.num_tokens], np.int32),
        )
        if not np.asarray(admitted)[0]:
            blocks = -(-prompt.num_tokens // running.block_size)
            raise self._refusal(account, state, self._limits.index(prompt.tenant), blocks)
        begun: Charged = asked
        return begun

    def ask_to_grow(
        self,
        account: Charged,
        state: PoolState,
        running: SequenceBatch,
        growth: Mapping[int, int],
        ending: Sequence[int],
    ) -> tuple[Charged, list[int]]:
        """Asks for blocks for new tokens of rows, in their order, once those of `ending` are released.

        A row that would outgrow its table asks for nothing.

        Returns:
          The account, and the rows whose tenants may not have them.
        """
        lengths, counts = np.asarray(running.lengths), np.asarray(running.num_blocks)
        wanted = {}
        for row, num_tokens in growth.items():
            needed = -(-(int(lengths[row]) + num_tokens) // running.block_size)
            wanted[row] = max(needed - int(counts[row]), 0) if needed <= running.block_tables.shape[2] else 0
        return self._ask(account, state, running, wanted, ending)

    def require(self, account: Charged, state: PoolState, running: SequenceBatch, wanted: Mapping[int, int]) -> Charged:
        """Asks for blocks for rows, in their order.

        Raises:
          QuotaExceededError: if a tenant would hold too many.
        """
        asked, refused = self._ask(account, state, running, wanted, ())
        if refused:
            raise self.refusal(account, state, refused[0], wanted[refused[0]])
        return asked

    def _ask(
        self,
        account: Charged,
        state: PoolState,
        running: SequenceBatch,
        wanted: Mapping[int, int],
        ending: Sequence[int],
    ) -> tuple[Charged, list[int]]:
        nobody = self._max_sequences
        asked, admitted = _ask(
            account,
            state,
            running,
            pad(list(wanted), nobody, _ROWS),
            pad(list(wanted.values()), 0, _ROWS),
            pad(list(ending), nobody, _ROWS),
        )
        return asked, [row for row, good in zip(wanted, np.asarray(admitted), strict=False) if not good]

    def tails(self, state: PoolState, running: SequenceBatch, rows: Sequence[int]) -> dict[int, int]:
        """Returns the blocks that rows want for tails of their own: one for each tail that others hold too."""
        refs = np.asarray(state.ref_counts)
        tables, lengths = np.asarray(running.block_tables)[0], np.asarray(running.lengths)
        wanted = {}
        for row in rows:
            tail = tables[row, lengths[row] // running.block_size :][:1]
            wanted[row] = int(np.any(refs[tail[tail < state.num_blocks]] > 1))
        return wanted

    def settle(self, account: Charged, running: SequenceBatch) -> Charged:
        """Charges what the tables hold."""
        settled: Charged = _settle(account, running)
        return settled

    def follow(self, account: Charged, source: int, row: int) -> Charged:
        """Has a row belong to the tenant of another."""
        tenant = np.asarray(account.quotas.tenants)[[source]]
        assigned: Charged = _assign(account, np.array([row], np.int32), tenant)
        return assigned

    def charge(self, account: Charged, block_ids: NDArray[np.int32], growth: Mapping[int, int]) -> Charged:
        """Charges blocks i32[n] outside tables to tenants of rows, so many for each in this order, or to nobody."""
        tenants = np.full((len(block_ids),), len(self._limits), np.int32)
        if growth:
            tenants[:] = np.repeat(np.asarray(account.quotas.tenants)[list(growth)], list(growth.values()))
        num_blocks = len(account.quotas.owners)
        charged: Charged = _charge(account, pad(block_ids, num_blocks), pad(tenants, len(self._limits)))
        return charged

    def inherit(self, account: Charged, former: Charged, sources: NDArray[np.int32]) -> Charged:
        """Takes rows and owners over from another account: block i is charged as its block `sources[i]` is."""
        owners = np.append(np.asarray(former.quotas.owners), np.int32(len(self._limits)))
        charged = replace(
            account.quotas,
            tenants=jnp.array(former.quotas.tenants),
            owners=jnp.asarray(owners[np.minimum(sources, len(owners) - 1)]),
        )
        inherited: Charged = jax.device_put(replace(account, quotas=charged), account.coming.sharding)
        return inherited

    def blocks(self, account: Charged, state: PoolState) -> dict[str, TenantBlocks]:
        """Returns what each tenant has."""
        used = _usage(account.quotas, state)
        columns = zip(*(np.asarray(part).tolist() for part in (*used, account.quotas.limits)), strict=True)
        return {name: TenantBlocks(*numbers) for name, numbers in zip(self._limits, columns, strict=True)}

    def require_room(self, account: Charged, state: PoolState, tenant: str, blocks: int) -> None:
        """Raises `QuotaExceededError` if a tenant surely cannot have so many blocks more."""
        number = self._limits.index(tenant)
        if number < len(self._limits):
            has = list(self.blocks(account, state).values())[number]
            if has.held + blocks > has.limit:
                raise self._refusal(account, state, number, blocks)

    def refusal(self, account: Charged, state: PoolState, row: int, blocks: int) -> QuotaExceededError:
        """The error that tells the tenant of a row that it cannot have `blocks`."""
        return self._refusal(account, state, int(np.asarray(account.quotas.tenants)[row]), blocks)

    def _refusal(self, account: Charged, state: PoolState, number: int, blocks: int) -> QuotaExceededError:
        name, has = list(self.blocks(account, state).items())[number]
        who = "tenants without a limit of their own hold" if name == OTHERS else f"tenant {name!r} holds"
        remedy = "raise it, or ask for less" if blocks > has.limit else "let sequences of it end, or raise it"
        return QuotaExceededError(
            f"{blocks} blocks are needed, those found cached included; {who} {has.held} of at most {has.limit}, the "
            f"limit quotas[{name!r}]: {remedy}"
        )


@functools.cache
def _within(limits: TenantQuotas, policy: EvictionPolicy, max_sequences: int) -> EvictionPolicy:
    """The policy under quotas, each time the same one, so that what is compiled with it is compiled once."""
    return quota_policy.within(policy, limits=limits.blocks, max_sequences=max_sequences)


_ask: Any = jax.jit(quota_policy.ask)
_ask_to_start: Any = jax.jit(quota_policy.ask_to_start)
_assign: Any = jax.jit(quota_policy.assign)
_charge: Any = jax.jit(quota_policy.charge)
_settle: Any = jax.jit(quota_policy.settle)
_usage = jax.jit(quotas.usage)
