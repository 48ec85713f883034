"""Registered memory as both engines keep it, and the checks that they make before anything is queued."""

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import LayoutError, TransferError
from kvbm_jax.protocols import Slots

__all__ = ["check_ids", "check_transfer", "described"]


def described(memory: NDArray[np.uint8], region: int) -> Slots:
    """Returns the slots that `memory`, u8[N, P], is cut into.

    Raises:
      LayoutError: It is no such array, or its rows are not contiguous and apart from each other.
    """
    if memory.dtype != np.uint8 or memory.ndim != 2 or not memory.size:
        raise LayoutError(f"slots must be uint8[N, P], not empty; they are {memory.dtype}{list(memory.shape)}")
    (count, nbytes), (stride, step) = memory.shape, memory.strides
    if count == 1:
        stride = nbytes
    if step != 1 or stride < nbytes:
        raise LayoutError(f"slots of {nbytes:,} bytes lie {stride:,} bytes apart, bytes {step} apart; rows are runs")
    return Slots(region, stride, 0, nbytes, count)


def check_transfer(source: Slots, source_ids: NDArray[np.int32], target: Slots, target_ids: NDArray[np.int32]) -> None:
    """Checks that both ends of a transfer are of equal size.

    Raises:
      TransferError: They are not, or an id lies outside its slots.
    """
    if source.nbytes != target.nbytes or len(source_ids) != len(target_ids):
        raise TransferError(
            f"{len(source_ids):,} slots of {source.nbytes:,} bytes do not fit {len(target_ids):,} of {target.nbytes:,}"
        )
    check_ids(source, source_ids)
    check_ids(target, target_ids)


def check_ids(slots: Slots, ids: NDArray[np.int32]) -> None:
    """Raises `TransferError` if an id lies outside `slots`, or the part that moves outside each slot."""
    if slots.offset < 0 or slots.nbytes < 1 or slots.offset + slots.nbytes > slots.stride:
        raise TransferError(
            f"{slots.nbytes:,} bytes at {slots.offset:,} do not lie within a slot of {slots.stride:,} bytes"
        )
    if len(ids) and not (int(ids.min()) >= 0 and int(ids.max()) < slots.count):
        raise TransferError(f"slots {int(ids.min())} to {int(ids.max())} are not all among {slots.count:,}")
