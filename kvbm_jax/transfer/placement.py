"""Where the elements of a stored block lie, and how one worker's block becomes another's.

Two workers of one model may arrange their blocks differently, and under tensor parallelism hold different heads. What a
block means is the identity's business (`kvbm_jax.identity`); this is the rest. Blocks that travel are runs of bytes, in
one of two kinds of `kvbm_jax.layout`:

  fully_contiguous   [L, C, T, h, D], then scales [L, C, T, h]
  universal          for each of h heads [L, C, T, D], then scales [L, C, T]

Scales, float32, are there in quantised caches alone.

Axes: n blocks, L layers, C components, T tokens of a block, h heads of this worker, D head dim, P bytes of a block.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import LayoutError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout, LayoutKind

__all__ = ["Placement", "convert"]

_KINDS = (LayoutKind.FULLY_CONTIGUOUS, LayoutKind.UNIVERSAL)
_SCALE_BYTES = 4


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
        if self.kind not in _KINDS:
            kinds = ", ".join(_KINDS)
            raise LayoutError(f"kind is {str(self.kind)!r}; blocks that travel are one of {kinds}")
        if self.num_heads < 1 or self.first_head < 0:
            raise LayoutError(f"{self.num_heads} heads from {self.first_head} on are no range of heads")

    @classmethod
    def whole(cls, identity: CacheIdentity, kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS) -> "Placement":
        """Returns the placement of a worker that has all heads."""
        return cls(identity.num_kv_heads, 0, kind)

    def block_bytes(self, identity: CacheIdentity) -> int:
        """Returns the bytes of a block, P."""
        return self.layout(identity).block_bytes

    def covers(self, other: "Placement") -> bool:
        """Returns whether all heads of another are among those of this one."""
        return (
            self.first_head <= other.first_head
            and other.first_head + other.num_heads <= self.first_head + self.num_heads
        )

    def layout(self, identity: CacheIdentity) -> KVLayout:
        """Returns the layout of one such block."""
        return KVLayout(
            num_layers=identity.num_layers,
            num_blocks=1,
            block_size=identity.block_size,
            num_kv_heads=self.num_heads,
            head_dim=identity.head_dim,
            dtype=identity.dtype,
            kind=self.kind,
            components=identity.components,
            quantized=identity.scale_format is not None,
        )


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
    first = target.first_head - source.first_head
    parts = [part[:, first : first + target.num_heads] for part in _taken_apart(blocks, source.layout(identity))]
    if target.kind is LayoutKind.UNIVERSAL:
        joined = np.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=2)
        return joined.reshape(len(blocks), -1)
    return np.concatenate([np.moveaxis(part, 1, 4).reshape(len(blocks), -1) for part in parts], axis=1)


def _taken_apart(blocks: NDArray[np.uint8], layout: KVLayout) -> list[NDArray[np.uint8]]:
    """Returns views of elements and, where there are any, scales: u8[n, h, L, C, T, bytes of one row]."""
    n, heads = len(blocks), layout.num_kv_heads
    shape = layout.num_layers, layout.components, layout.block_size
    widths = [layout.head_dim * layout.itemsize, *([_SCALE_BYTES] if layout.quantized else [])]
    by_head = layout.kind is LayoutKind.UNIVERSAL
    runs = blocks.reshape(n, heads, -1) if by_head else blocks.reshape(n, 1, -1)
    parts, begin = [], 0
    for width in widths:
        end = begin + width * math.prod(shape) * (1 if by_head else heads)
        run = runs[:, :, begin:end]
        parts.append(
            run.reshape(n, heads, *shape, width) if by_head else np.moveaxis(run.reshape(n, *shape, heads, width), 4, 1)
        )
        begin = end
    return parts
