"""The checks that every store makes on the buffers of a call, before anything is queued.

Axes: n blocks of a call, P bytes of a block.
"""

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import LayoutError

__all__ = ["check_out", "check_rows"]


def check_rows(rows: NDArray[np.uint8], count: int, block_bytes: int, name: str = "blocks") -> None:
    """Raises `LayoutError` unless `rows` is u8[count, block_bytes]."""
    if rows.dtype != np.uint8 or rows.shape != (count, block_bytes):
        raise LayoutError(
            f"{name} must be uint8[{count}, {block_bytes}], a row for each of {count} keys; it is "
            f"{rows.dtype}{list(rows.shape)}"
        )


def check_out(out: NDArray[np.uint8], count: int, block_bytes: int) -> None:
    """Raises `LayoutError` unless `out` is u8[count, block_bytes] and can be written."""
    check_rows(out, count, block_bytes, "out")
    if not out.flags.writeable:
        raise LayoutError("out is read-only; blocks are read into it")
