"""Which grants are under way, whose they are, and which blocks they had.

A grant goes through a compiled loop as a pytree, and what comes back is the caller's word. What it is checked against
stays here, and is found again by the grant's ticket: once, for a grant ends by being settled or withdrawn.

    issue -> under way -> settle     its loop ran
                       -> withdraw   it did not
                       -> clear      the cache is lost, and all grants with it
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Tokens
from dataclasses import replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import BlockStateError
from kvbm_jax.grants import Grant
from kvbm_jax.handles import Sequence

__all__ = ["GrantLedger", "Settled"]


class Settled(NamedTuple):
    """A grant whose loop ran."""

    rows: list[int]  # of the sequences that it was issued for and that still run
    block_ids: NDArray[np.int32]  # [n]: all blocks that it had


class _Entry(NamedTuple):
    owners: tuple[Sequence, ...]
    block_ids: NDArray[np.int32]  # [n]


class GrantLedger:
    """The grants of one manager that are under way."""

    def __init__(self) -> None:
        self._entries: dict[int, _Entry] = {}
        self._tickets = 0

    def issue(self, grant: Grant, owners: Iterable[Sequence]) -> Grant:
        """Enters a new grant for the sequences that may draw on it; returns it with its ticket."""
        self._tickets += 1
        block_ids = np.asarray(grant.block_ids)[: int(grant.count)].copy()
        self._entries[self._tickets] = _Entry(tuple(owners), block_ids)
        return replace(grant, ticket=jnp.int32(self._tickets))

    def settle(self, grant: Grant, fed: Mapping[Sequence, Tokens[int]], lengths: NDArray[np.int32]) -> Settled:
        """Ends a grant whose loop ran.

        Args:
          grant: as the loop returned it.
          fed: tokens that sequences, which must be running, were fed by the loop, and at most one beyond.
          lengths: i32[B], tokens of each row that have a slot after the loop.

        Raises:
          BlockStateError: if the grant is spent, a sequence is none of its owners, or tokens do not match slots; the
            grant is under way still, then.
        """
        owners, block_ids = self._find(grant)
        known = set(owners)
        for seq in fed:
            if seq not in known:
                raise BlockStateError(f"the grant was not reserved for the sequence of row {seq.row}")
        running = [seq for seq in owners if not seq.released]
        for seq in running:
            new = fed.get(seq, ())
            if not 0 <= len(seq.tokens) + len(new) - lengths[seq.row] <= 1:
                raise BlockStateError(
                    f"row {seq.row} has {lengths[seq.row]} slots for {len(seq.tokens)} tokens and {len(new)} new ones; "
                    "name every token that the loop fed"
                )
        del self._entries[int(grant.ticket)]
        return Settled([seq.row for seq in running], block_ids)

    def withdraw(self, grant: Grant) -> NDArray[np.int32]:
        """Ends a grant whose loop did not run; returns its blocks, i32[n].

        Raises:
          BlockStateError: if the grant is spent.
        """
        block_ids = self._find(grant).block_ids
        del self._entries[int(grant.ticket)]
        return block_ids

    def require_none(self) -> None:
        """Raises `BlockStateError` if a grant is under way."""
        if self._entries:
            raise BlockStateError(f"{len(self._entries)} grants are under way; commit them or give them back first")

    def clear(self) -> None:
        """Ends all grants."""
        self._entries.clear()

    def _find(self, grant: Grant) -> _Entry:
        found = self._entries.get(int(grant.ticket))
        if found is None:
            raise BlockStateError("the grant is spent: it was committed or given back before, or lost with the cache")
        return found
