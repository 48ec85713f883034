"""What a manager hands out: blocks and sequences.

Handles are host objects that name state kept elsewhere. They never free anything when they are garbage-collected:
leave their `with` block, or give them back to the manager.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvbm_jax.hashing import HashAlgorithm, Multimodal, hash_bytes, hash_sequence
from kvbm_jax.offload.engine import Resident
from kvbm_jax.protocols import BlockKey, BlockRecord, Tier

__all__ = ["Block", "Hasher", "ResizeReport", "Sequence"]


@dataclass(frozen=True)
class Hasher:
    """How a manager names the blocks of its sequences."""

    block_size: int
    algorithm: HashAlgorithm

    def __call__(
        self,
        tokens: ArrayLike,
        salt: str = "",
        lora_name: str | None = None,
        multimodal: Multimodal = (),
        parent: NDArray[np.uint32] | None = None,
    ) -> NDArray[np.uint32]:
        """Hashes whole blocks, u32[M, 4]; see `kvbm_jax.hashing.hash_sequence`."""
        return hash_sequence(
            tokens,
            self.block_size,
            algorithm=self.algorithm,
            salt=salt,
            lora_name=lora_name,
            multimodal=multimodal,
            parent=parent,
        )


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


@dataclass(frozen=True)
class ResizeReport:
    """What `BlockManager.resize` did."""

    num_blocks: int  # of the device now
    num_evicted: int  # cached blocks that no longer fit: they went to the tiers below, or are gone
    moved: Mapping[int, int]  # ids of held and cached blocks that are called otherwise now
    handles: Mapping[tuple[int, int], tuple[int, int]] = field(repr=False)  # the same with generations

    def follow(self, block: Block) -> Block:
        """Returns the handle of a block as it is now; one that did not move is returned as it is."""
        block_id, generation = self.handles.get((block.block_id, block.generation), (block.block_id, block.generation))
        return replace(block, block_id=block_id, generation=generation)


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
    hashes: NDArray[np.uint32] = field(repr=False)  # [M, 4], of whole blocks of `tokens`; see `hash_blocks`
    hasher: Hasher = field(repr=False)
    on_release: Callable[["Sequence"], None] = field(repr=False)
    multimodal: Multimodal = ()  # (position in `tokens`, hash of the input that stands there)
    hits: Mapping[Tier, int] = field(default_factory=dict)  # the tokens of `num_cached` by the tier they were found in
    tenant: str = ""  # whose quota its blocks count for
    priority: int = 0  # of the blocks that it registers, where the eviction policy asks for one
    reuse: bool = True  # whether it finds and leaves cached blocks
    num_registered: int = 0  # blocks that others can find
    may_share_tail: bool = False  # whether the block of its next token may be one that must not be written
    released: bool = False

    def hash_blocks(self, count: int) -> NDArray[np.uint32]:
        """Returns the hashes of its first `count` whole blocks, u32[count, 4]."""
        known, size = len(self.hashes), self.hasher.block_size
        if known < count:
            first, last = known * size, count * size
            inputs = [(at - first, content) for at, content in self.multimodal if first <= at < last]
            parent = self.hashes[-1] if known else None
            tail = self.hasher(self.tokens[first:last], self.salt, self.lora_name, inputs, parent)
            self.hashes = np.concatenate([self.hashes, tail])
        return self.hashes[:count]

    def rehash(self, hasher: Hasher) -> None:
        """Has another hasher name its blocks."""
        self.hasher = hasher
        self.hashes = self.hashes[:0]

    def resident(self, index: int, block_id: int) -> Resident:
        """Returns what is known about its whole block `index`, which must have been hashed, and lies in `block_id`."""
        first, last = index * self.hasher.block_size, (index + 1) * self.hasher.block_size
        record = BlockRecord(
            key=BlockKey(hash_bytes(self.hashes[index])),
            parent_hash=hash_bytes(self.hashes[index - 1]) if index else None,
            token_ids=tuple(self.tokens[first:last]),
            lora_name=self.lora_name,
        )
        inputs = [(at - first, content) for at, content in self.multimodal if first <= at < last]
        return Resident(block_id, record, self.salt, tuple(inputs))

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
