"""Where the elements of a stored block lie, and how one worker's block becomes another's.

Two workers of one model may arrange their blocks differently, and under tensor parallelism hold different heads. What a
block means is the identity's business (`kvbm_jax.identity`); this is the rest.

  fully_contiguous   [L, C, T, h, D]
  universal          [h, L, C, T, D]

Axes: n blocks, L layers, C components, T tokens of a block, h heads of this worker, D head dim, P bytes of a block.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import LayoutError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import LayoutKind

__all__ = ["Placement", "convert"]

_AXES = {LayoutKind.FULLY_CONTIGUOUS: "LCTHD", LayoutKind.UNIVERSAL: "HLCTD"}


@dataclass(frozen=True)
class Placement:
    """How a worker's stored blocks are arranged.

    Attributes:
      num_heads: h, kv heads that this worker has of each block.
      first_head: Which of the model's heads is its first.
      kind: Arrangement of the axes.

    Raises:
      LayoutError: A block is no run of bytes in that kind, or the heads are no range.
    """

    num_heads: int
    first_head: int = 0
    kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS

    def __post_init__(self) -> None:
        if self.kind not in _AXES:
            kinds = ", ".join(_AXES)
            raise LayoutError(f"kind is {str(self.kind)!r}; blocks that travel are one of {kinds}")
        if self.num_heads < 1 or self.first_head < 0:
            raise LayoutError(f"{self.num_heads} heads from {self.first_head} on are no range of heads")

    @classmethod
    def whole(cls, identity: CacheIdentity, kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS) -> "Placement":
        """Returns the placement of a worker that has all heads."""
        return cls(identity.num_kv_heads, 0, kind)

    def block_bytes(self, identity: CacheIdentity) -> int:
        """Returns the bytes of a block, P."""
        return math.prod(self.shape(identity))

    def covers(self, other: "Placement") -> bool:
        """Returns whether all heads of another are among those of this one."""
        return (
            self.first_head <= other.first_head
            and other.first_head + other.num_heads <= self.first_head + self.num_heads
        )

    def shape(self, identity: CacheIdentity) -> tuple[int, ...]:
        """Returns the sizes of a block's axes, D in bytes."""
        sizes = {
            "L": identity.num_layers,
            "C": identity.components,
            "T": identity.block_size,
            "H": self.num_heads,
            "D": identity.head_dim * np.dtype(jnp.dtype(identity.dtype)).itemsize,
        }
        return tuple(sizes[axis] for axis in _AXES[self.kind])


def convert(
    blocks: NDArray[np.uint8], identity: CacheIdentity, source: Placement, target: Placement
) -> NDArray[np.uint8]:
    """Rearranges blocks.

    Args:
      blocks: u8[n, P] in the source's placement.
      identity: what their bytes mean.
      source: how they lie; has every head of the target.
      target: how they are wanted.

    Returns:
      u8[n, P'] in the target's placement; `blocks` itself if both are the same.

    Raises:
      LayoutError: The source lacks heads of the target, or `blocks` have another size.
    """
    if not source.covers(target):
        raise LayoutError(
            f"heads {target.first_head} to {target.first_head + target.num_heads - 1} are wanted; the peer has "
            f"{source.first_head} to {source.first_head + source.num_heads - 1}"
        )
    wanted = source.block_bytes(identity)
    if blocks.ndim != 2 or blocks.shape[1] != wanted:
        raise LayoutError(f"blocks are uint8{list(blocks.shape)}; in this placement each has {wanted:,} bytes")
    if source == target:
        return blocks
    before, after = _AXES[source.kind], _AXES[target.kind]
    first = target.first_head - source.first_head
    heads = [slice(first, first + target.num_heads) if axis == "H" else slice(None) for axis in before]
    elements = blocks.reshape(len(blocks), *source.shape(identity))[:, *heads]
    order = (0, *(1 + before.index(axis) for axis in after))
    return np.ascontiguousarray(elements.transpose(order)).reshape(len(blocks), target.block_bytes(identity))
