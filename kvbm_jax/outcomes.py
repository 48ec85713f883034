"""What the host's owner of a pool hands back: numbers and numpy arrays, copied out of the state.

Axes: N blocks, E evicted blocks, B rows, X rows that grow, M blocks of one row, P completed blocks.
"""

from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from kvbm_jax import pool

__all__ = ["BlockCounts", "EvictedBlocks", "Registered", "Started", "Stepped", "Unshared"]


class BlockCounts(NamedTuple):
    """Numbers of blocks by state; they sum to the size of the pool."""

    reset: int
    inactive: int  # cached, evictable
    held: int


class EvictedBlocks(NamedTuple):
    """Blocks that lost their contents, in order of eviction."""

    block_ids: NDArray[np.int32]  # [E]
    hashes: NDArray[np.uint32]  # [E, 4]

    @classmethod
    def of(cls, result: pool.Evicted) -> Self:
        """Copies what a verb reports."""
        count = int(result.num_blocks)
        return cls(np.asarray(result.block_ids)[:count].copy(), np.asarray(result.hashes)[:count].copy())


class Started(NamedTuple):
    """A sequence that has its blocks."""

    num_cached: int  # tokens found in the cache
    evicted: EvictedBlocks


class Registered(NamedTuple):
    """What a registration did, one entry for each block that was asked for."""

    block_ids: NDArray[np.int32]  # [M]: the canonical blocks
    new: NDArray[np.bool_]  # [M]: newly findable


class Stepped(NamedTuple):
    """What a step did."""

    statuses: NDArray[np.int32]  # [X], of the rows that grow
    block_ids: NDArray[np.int32]  # [P]: the canonical block of each completed one
    new: NDArray[np.bool_]  # [P]: newly findable
    done: NDArray[np.bool_]  # [P]: False where the index was full; `BlockPool.register` makes room in it
    evicted: EvictedBlocks


class Unshared(NamedTuple):
    """Tails that were replaced: blocks to copy before anything else is written, one entry a row, padded with N."""

    sources: NDArray[np.int32]  # [B]
    targets: NDArray[np.int32]  # [B]
    evicted: EvictedBlocks
