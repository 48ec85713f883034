"""Compiled loops: the blocks that they are given, and what they return. See `BlockManager` for the methods."""

from collections.abc import Mapping
from collections.abc import Sequence as Tokens

import numpy as np

from kvbm_jax.device_tier import DeviceTier
from kvbm_jax.errors import ConfigError
from kvbm_jax.grants import Grant
from kvbm_jax.handles import Sequence
from kvbm_jax.hashing import check_tokens
from kvbm_jax.ledger import GrantLedger
from kvbm_jax.progress import Progress
from kvbm_jax.roster import Roster
from kvbm_jax.sequences import SequenceBatch

__all__ = ["Loops"]


class Loops:
    """Issues grants, and takes over what was done with them.

    Args:
      device: holds the blocks.
      roster: knows which sequences run.
      progress: registers what loops have completed.
    """

    def __init__(self, device: DeviceTier, roster: Roster, progress: Progress) -> None:
        self._device = device
        self._roster = roster
        self._progress = progress
        self._ledger = GrantLedger()

    def reserve(self, growth: Mapping[Sequence, int], max_blocks: int | None) -> Grant:
        """Sets aside the blocks that sequences need to grow, on the device of the cache."""
        for seq in growth:
            self._roster.require(seq)
        lacking = self._device.pool.lacking({seq.row: num_tokens for seq, num_tokens in growth.items()})
        count = sum(lacking)
        if max_blocks is not None and count > max_blocks:
            raise ConfigError(f"max_blocks is {max_blocks}, but the growth asked for needs {count} blocks")
        self._progress.unshare([seq for seq, num_tokens in growth.items() if num_tokens])
        grant = self._device.reserve({seq.row: n for seq, n in zip(growth, lacking, strict=True)}, max_blocks)
        return self._device.cache.beside(self._ledger.issue(grant, growth))

    def commit(self, grant: Grant, running: SequenceBatch, tokens: Mapping[Sequence, Tokens[int]]) -> None:
        """Takes over what a loop did."""
        added = {seq: check_tokens(new).tolist() for seq, new in tokens.items()}
        for seq in added:
            self._roster.require(seq)
        settled = self._ledger.settle(grant, added, np.asarray(running.lengths))
        self._device.pool.adopt(settled.rows, running, settled.block_ids)
        for seq, new in added.items():
            seq.tokens.extend(new)
        for seq in added:
            self._progress.register(seq)
        self._device.update_gauges()

    def give_back(self, grant: Grant) -> None:
        """Takes a grant back whose loop did not run."""
        block_ids = self._ledger.withdraw(grant)
        self._device.pool.adopt([], self._device.pool.sequences, block_ids)
        self._device.update_gauges()

    def require_none(self) -> None:
        """Raises `BlockStateError` if a grant is under way."""
        self._ledger.require_none()

    def clear(self) -> None:
        """Ends all grants."""
        self._ledger.clear()
