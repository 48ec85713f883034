"""Host memory that is used again: large buffers whose pages are there already.

Fresh memory costs more than the copy into it: the system clears every page at its first use. A buffer is lent as an
array and comes back when nothing refers to that array's memory any more: no view of it, no store that reads it, no
JAX array that took it over without a copy.
"""

import collections
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
        # Where leases end: at any moment, in the middle of a call too, by garbage collection.
        self._returned: collections.deque[NDArray[np.uint8]] = collections.deque()
        self._allocator = AnonymousAllocator()
        self._lock = threading.Lock()

    def lend(self, count: int, block_bytes: int) -> NDArray[np.uint8]:
        """Returns memory u8[count, block_bytes], of any contents, at a multiple of 4,096."""
        wanted = count * block_bytes
        if not wanted:
            return np.empty((count, block_bytes), np.uint8)
        with self._lock:
            while self._returned:
                self._free.append(self._returned.popleft())
            self._free.sort(key=len)
            del self._free[: -self._max_free]
            fitting = (i for i, memory in enumerate(self._free) if memory.nbytes >= wanted)
            place = next(fitting, None)
            memory = None if place is None else self._free.pop(place)
        if memory is None:
            memory = self._allocator.allocate(wanted)
        lease = _Lease(memory)
        weakref.finalize(lease, self._returned.append, memory).atexit = False
        return np.frombuffer(lease, np.uint8, wanted).reshape(count, block_bytes)
