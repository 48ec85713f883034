"""Where the memory of a host arena comes from.

A store that keeps blocks in host memory asks an `Allocator` for one run of bytes and gives it back when it closes. The
two here need nothing but the operating system: `AnonymousAllocator` maps fresh memory, `BufferAllocator` hands out what
the user brought (shared memory, memory that a library has pinned). An allocator decides nothing about what lies in the
memory, and registers it with nobody.
"""

import contextlib
import mmap
from collections.abc import Buffer
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import ConfigError

__all__ = ["PAGE_BYTES", "Allocator", "AnonymousAllocator", "BufferAllocator"]

PAGE_BYTES = 4096
"""Alignment of an arena's address and of its slots."""


class Allocator(Protocol):
    """A source of host memory."""

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Returns memory u8[nbytes] at an address that is a multiple of `PAGE_BYTES`, writeable, at rest there.

        Raises:
          ConfigError: There is not that much, or it is not aligned.
        """
        ...

    def release(self, memory: NDArray[np.uint8]) -> None:
        """Takes back what `allocate` returned; its holder reads and writes it no more."""
        ...


class AnonymousAllocator:
    """Fresh memory from the operating system, every page touched so that no copy pays for its first use.

    The mapping goes when its last view does, so a view that outlives the store stays valid.

    Args:
      huge_pages: ask for transparent huge pages where the system has them.
    """

    def __init__(self, *, huge_pages: bool = False) -> None:
        self._huge_pages = huge_pages

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Maps and touches memory u8[nbytes]."""
        try:
            mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, ValueError, OverflowError) as error:
            raise ConfigError(f"{nbytes:,} bytes of host memory: {error}") from error
        if self._huge_pages and hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without them: small pages serve as well
                mapping.madvise(mmap.MADV_HUGEPAGE)
        memory = np.frombuffer(mapping, np.uint8)
        memory[:: mmap.PAGESIZE] = 0
        return memory

    def release(self, memory: NDArray[np.uint8]) -> None:
        """Lets go: the system takes the pages back with the last view."""
        del memory


class BufferAllocator:
    """Hands out the front of one buffer, to one holder at a time.

    Args:
      buffer: writeable contiguous memory that stays where it is; its address a multiple of `PAGE_BYTES`.

    Raises:
      ConfigError: if the buffer is read-only or not aligned.
    """

    def __init__(self, buffer: Buffer) -> None:
        memory = np.frombuffer(buffer, np.uint8)
        address = memory.ctypes.data
        if not memory.flags.writeable:
            raise ConfigError(f"the buffer of {memory.nbytes:,} bytes is read-only; an arena is written")
        if address % PAGE_BYTES:
            raise ConfigError(
                f"the buffer lies at {address:#x}, {address % PAGE_BYTES} bytes past a multiple of {PAGE_BYTES}"
            )
        self._memory = memory
        self._taken = False

    def allocate(self, nbytes: int) -> NDArray[np.uint8]:
        """Returns the first `nbytes` bytes of the buffer."""
        if nbytes > self._memory.nbytes:
            raise ConfigError(f"the buffer has {self._memory.nbytes:,} bytes; needed are {nbytes:,}")
        if self._taken:
            raise ConfigError("the buffer is in use by another store; close that first, or bring another buffer")
        self._taken = True
        return self._memory[:nbytes]

    def release(self, memory: NDArray[np.uint8]) -> None:
        """Makes the buffer free to be handed out again."""
        del memory
        self._taken = False
