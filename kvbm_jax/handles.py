"""What a manager hands out: blocks and sequences.

Handles are host objects that name state kept elsewhere. They never free anything when they are garbage-collected:
leave their `with` block, or give them back to the manager.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["Block", "Sequence"]


@dataclass(frozen=True)
class Block:
    """One block held outside any sequence, granted by `BlockManager.allocate_blocks`.

    As a context manager it is freed at the end, unless that has been done.
    """

    block_id: int
    generation: int  # tells a later use of the same block from this one
    owner: object = field(repr=False)  # tells handles of other managers, and of a cache that was lost
    on_free: Callable[["Block"], None] = field(repr=False, compare=False)

    def free(self) -> None:
        """Gives the block back, unless that has been done."""
        self.on_free(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.free()


@dataclass(eq=False)
class Sequence:
    """One running request, begun by `BlockManager.start`; read it, and let the manager change it.

    As a context manager it is released at the end, unless that has been done.
    """

    row: int  # its row in the manager's sequence batch
    tokens: list[int]  # prompt and what was produced since
    num_cached: int  # prompt tokens found in the cache, which need no computation
    salt: str
    lora_name: str | None
    hashes: NDArray[np.uint32] = field(repr=False)  # [M, 4], of the whole blocks of `tokens`
    on_release: Callable[["Sequence"], None] = field(repr=False)
    num_registered: int = 0  # blocks that others can find
    released: bool = False

    def release(self) -> None:
        """Ends the sequence, unless that has been done."""
        if not self.released:
            self.on_release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
