"""Host memory that is used again: large buffers whose pages are there already.

Fresh memory costs more than the copy into it: the system clears every page at its first use. A buffer is lent as an
array and comes back when nothing refers to that array's memory any more: no view of it, no store that reads it, no
JAX array that took it over without a copy.
"""

import threading
import weakref

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.offload.allocator import AnonymousAllocator

__all__ = ["BufferPool"]


class _Lease:
    """The owner of a buffer's memory as arrays see it: it lives as long as the last of them."""

    __slots__ = ("__weakref__", "_memory")

    def __init__(self, memory: NDArray[np.uint8]) -> None:
        self._memory = memory

    def __buffer__(self, flags: int, /) -> memoryview:
        return memoryview(self._memory)


class BufferPool:
    """Lends memory; its methods may be called from any thread.

    Args:
      max_free: buffers that are kept while nobody uses them; the smallest goes first.
    """

    def __init__(self, *, max_free: int = 3) -> None:
        self._max_free = max_free
        self._free: list[NDArray[np.uint8]] = []
        self._allocator = AnonymousAllocator()
        self._lock = threading.RLock()  # a lease may end in the middle of a call, by garbage collection

    def lend(self, count: int, block_bytes: int) -> NDArray[np.uint8]:
        """Returns memory u8[count, block_bytes], of any contents, at a multiple of 4,096."""
        wanted = count * block_bytes
        if not wanted:
            return np.empty((count, block_bytes), np.uint8)
        with self._lock:
            fitting = [i for i, memory in enumerate(self._free) if memory.nbytes >= wanted]
            memory = self._free.pop(min(fitting, key=lambda i: self._free[i].nbytes)) if fitting else None
        if memory is None:
            memory = self._allocator.allocate(wanted)
        lease = _Lease(memory)
        weakref.finalize(lease, self._take_back, memory).atexit = False
        return np.frombuffer(lease, np.uint8, wanted).reshape(count, block_bytes)

    def _take_back(self, memory: NDArray[np.uint8]) -> None:
        with self._lock:
            self._free.append(memory)
            if len(self._free) > self._max_free:
                self._free.sort(key=len)
                del self._free[0]
