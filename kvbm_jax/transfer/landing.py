"""Where pulled blocks arrive: slots of memory that the engine knows, lent for one pull and given back.

A slot that a transfer may still write to is not given back, however long that takes.
"""

import threading
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import ConfigError
from kvbm_jax.offload.allocator import PAGE_BYTES, Allocator, AnonymousAllocator
from kvbm_jax.protocols import Slots, TransferEngine

__all__ = ["Landing"]


class Landing:
    """Slots of one engine.

    Args:
      engine: registers them.
      block_bytes: of a block, P.
      count: how many blocks may lie there at a time.
      allocator: where the memory comes from; None for fresh memory.

    Raises:
      ConfigError: A size is not positive, or the memory cannot be had.
    """

    def __init__(
        self, engine: TransferEngine, block_bytes: int, count: int, allocator: Allocator | None = None
    ) -> None:
        if block_bytes < 1 or count < 1:
            raise ConfigError(f"{count} slots of {block_bytes} bytes: both are at least 1")
        stride = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
        memory = (allocator or AnonymousAllocator()).allocate(count * stride)
        self._rows = memory.reshape(count, stride)[:, :block_bytes]
        self._bytes = memoryview(memory)
        self._stride = stride
        self._nbytes = block_bytes
        self.slots: Slots = engine.register(self._rows)
        self._free = list(range(count - 1, -1, -1))
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        """Slots that could be lent now."""
        with self._lock:
            return len(self._free)

    def lend(self, count: int) -> list[int]:
        """Returns up to `count` slots, fewer if there are no more."""
        with self._lock:
            first = max(len(self._free) - count, 0)
            lent = self._free[first:]
            del self._free[first:]
        return lent[::-1]

    def give_back(self, slots: Iterable[int]) -> None:
        """Takes slots back."""
        back = sorted(slots, reverse=True)  # so that they are lent rising, which is read fastest
        with self._lock:
            self._free.extend(back)

    def block(self, slot: int) -> NDArray[np.uint8]:
        """Returns the bytes of a slot, u8[P], a view."""
        row: NDArray[np.uint8] = self._rows[slot]
        return row

    def bytes_of(self, slot: int) -> memoryview:
        """Returns the same as memory, which takes less to make."""
        first = slot * self._stride
        return self._bytes[first : first + self._nbytes]
