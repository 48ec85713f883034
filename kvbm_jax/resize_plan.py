"""Another size for a pool, made beside it: what the host needs to know before it takes over.

The verb is `kvbm_jax.resize`; here it gets an index that takes all keys, and its report is turned into numpy.

Axes: N blocks before, M after.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvbm_jax import pool, programs, sequences
from kvbm_jax.outcomes import EvictedBlocks
from kvbm_jax.resize import ResizeResult
from kvbm_jax.types import Status

__all__ = ["Resized", "plan_resize"]


class Resized(NamedTuple):
    """A pool of M blocks that is to take the place of one of N; means nothing but its status unless that is OK."""

    state: pool.PoolState
    memory: Any  # the policy's
    running: sequences.SequenceBatch
    new_ids: NDArray[np.int32]  # [N]: what each block is called in it, M where it is gone
    sources: NDArray[np.int32]  # [M]: what each block was called, N where it holds nothing: for `cache.resize_blocks`
    evicted: EvictedBlocks  # what no longer fits
    handles: dict[tuple[int, int], tuple[int, int]]  # (block, generation) of blocks that move, before and after
    generation: np.uint32  # for the next call
    status: Status


def plan_resize(
    verbs: programs.PolicyPrograms,
    memory: Any,
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    num_blocks: int,
    *,
    max_blocks: int | None,
    seed: int,
    generation: np.uint32,
) -> Resized:
    """Makes a pool of another size out of a pool, which does not change.

    Args:
      verbs: of the pool's eviction policy.
      memory: of that policy.
      state: the pool of N blocks.
      running: its sequences.
      num_blocks: M.
      max_blocks: blocks of a table then; None for as many as now.
      seed: of the present index, tried first.
      generation: what the last call returned, 0 before the first.

    Raises:
      LayoutError: if M is out of range.
    """
    before = np.array(state.generations)

    def attempt(seed: np.uint32) -> tuple[tuple[Any, pool.PoolState, sequences.SequenceBatch, ResizeResult], bool]:
        made = verbs.resize_pool(
            memory, state, running, num_blocks, max_blocks=max_blocks, seed=seed, generation=generation
        )
        return made, int(made[3].status) != Status.INDEX_FULL

    remembered, resized, renamed, result = programs.try_seeds(attempt, first=seed)
    new_ids, after = np.array(result.new_ids), np.asarray(resized.generations)
    moved = np.flatnonzero((new_ids != np.arange(len(before))) & (new_ids < num_blocks))
    return Resized(
        resized,
        remembered,
        renamed,
        new_ids,
        np.array(result.sources),
        EvictedBlocks.of(result.evicted),
        {(int(b), int(before[b])): (int(new_ids[b]), int(after[new_ids[b]])) for b in moved},
        np.uint32(result.generation),
        Status(int(result.status)),
    )
