"""The columns of a batch as bytes, as numbers and as keys: what codecs, stages and publishers turn them to and from.

Messages leave out a column that is zero for every event: it is written as nothing, and nothing is read as zeros. Bytes
are little-endian.

Axis legend: `E` events of a batch.
"""

import math
import sys
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvbm_jax.errors import EventDecodeError

__all__ = ["from_bytes", "from_numbers", "hash_keys", "hash_rows", "offsets_of", "to_bytes", "to_numbers"]

_LITTLE = sys.byteorder == "little"


def to_bytes(column: NDArray[np.generic]) -> bytes:
    """Returns the bytes of a column, none if all are zero."""
    raw = (column if _LITTLE else column.byteswap()).tobytes()
    return raw if raw.strip(b"\0") else b""


def from_bytes[T: np.generic](
    name: str, data: bytes, dtype: type[T], count: int, tail: tuple[int, ...] = ()
) -> NDArray[T]:
    """Returns the column `[count, *tail]` that `to_bytes` made bytes of.

    Raises:
      EventDecodeError: There are more or fewer bytes.
    """
    if not data:
        return np.zeros((count, *tail), dtype)
    if len(data) != (size := count * math.prod(tail) * np.dtype(dtype).itemsize):
        raise EventDecodeError(f"{name} has {len(data)} bytes; {count} events have {size}")
    column = np.frombuffer(data, dtype)
    if not _LITTLE:
        column = column.byteswap()
    return column.reshape(count, *tail) if tail else column


def to_numbers(column: NDArray[np.generic]) -> list[int]:
    """Returns the numbers of a column, none if all are zero."""
    numbers: list[int] = column.tolist() if column.any() else []
    return numbers


def from_numbers[T: np.generic](numbers: Iterable[int], dtype: type[T], count: int) -> NDArray[T]:
    """Returns the column that `to_numbers` made numbers of, for a batch of `count` events.

    Raises:
      OverflowError: A number does not fit.
    """
    return np.array(list(numbers) or [0] * count, dtype)  # a list: NumPy would wrap what is too big in other containers


def hash_rows(data: bytes) -> NDArray[np.uint32]:
    """Returns hashes of 16 bytes, one after the other, as `uint32[E, 4]`."""
    return np.frombuffer(data, "<u4").astype(np.uint32, copy=False).reshape(-1, 4)


def hash_keys(hashes: NDArray[np.uint32], hash_bytes: int = 16) -> list[bytes]:
    """Returns hashes `uint32[E, 4]` as bytes, the first `hash_bytes` of each."""
    words = np.ascontiguousarray(hashes[:, : hash_bytes // 4], "<u4")
    keys: list[bytes] = words.view(f"V{hash_bytes}").ravel().tolist()
    return keys


def offsets_of(counts: ArrayLike) -> NDArray[np.int64]:
    """Returns where each of E rows of so many entries begins, and where the last ends: `int64[E + 1]`."""
    counts = np.asarray(counts, np.int64)
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
