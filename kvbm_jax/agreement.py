"""One plan for all processes of a mesh: what differs between hosts is decided in one place.

Processes that apply the same calls to their managers hold bit-identical pools without talking, as long as what the
calls find is the same. One thing is not: which blocks the tiers below really brought up, since disks differ and fail
each for itself. An `Agreement` is asked after each attempt, on every process at the same point of the plan, and says
what all of them use.
"""

from collections.abc import Sequence
from typing import Protocol

import jax
import numpy as np

from kvbm_jax.protocols import Tier

__all__ = ["Agreement", "agree_alone", "agree_by_process_zero"]


class Agreement(Protocol):
    """Decides how much of what was brought up is used."""

    def __call__(self, brought: Sequence[Tier], /) -> int:
        """Returns how many blocks count as brought up, at most as many as every process has.

        Args:
          brought: the tier that each block in a row was found in by this process; its contents are on the device.
        """
        ...


def agree_alone(brought: Sequence[Tier], /) -> int:
    """Uses all that there is: for one process."""
    return len(brought)


def agree_by_process_zero(brought: Sequence[Tier], /) -> int:
    """Has process 0 hear how many blocks each process of `jax.distributed` has, and tell all of them the least.

    A collective: every process must make the same calls in the same order. It waits for the slowest.
    """
    from jax.experimental import multihost_utils  # noqa: PLC0415 (initialises the back end)

    counts = np.asarray(multihost_utils.process_allgather(np.int32(len(brought))))
    decided = counts.min() if jax.process_index() == 0 else np.int32(0)
    return int(multihost_utils.broadcast_one_to_all(np.int32(decided)))
