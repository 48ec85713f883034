"""The shape of a KV cache: what a block is, and where each of its bytes lies.

A `KVLayout` is static, hashable and pure description; it allocates nothing. Four kinds arrange the same elements:

  kind               arrays                       for
  layer_separate     L arrays [N, C, T, H, D]     models that loop over layers (default on device)
  layer_stacked      one [L, N, C, T, H, D]       models that scan over layers
  fully_contiguous   one [N, L, C, T, H, D]       tiers and transfers: a block is one contiguous run
  universal          one [N, H, L, C, T, D]       moving between tensor-parallel sizes: a head slice is contiguous

Arrays are row-major, so the byte offset of element (l, n, c, t, h, d), with item size s, is s times

  layer_separate     (((n*C + c)*T + t)*H + h)*D + d            in array l
  layer_stacked      ((((l*N + n)*C + c)*T + t)*H + h)*D + d
  fully_contiguous   ((((n*L + l)*C + c)*T + t)*H + h)*D + d
  universal          ((((n*H + h)*L + l)*C + c)*T + t)*D + d

Axes: L layers, N blocks, C components (K and V: 2; an MLA latent: 1), T tokens of a block, H kv heads, D head dim.
"""

import enum
import math
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from kvbm_jax.errors import LayoutError

__all__ = ["KVLayout", "LayoutKind"]


class LayoutKind(enum.StrEnum):
    """How the elements of a cache are arranged."""

    LAYER_SEPARATE = "layer_separate"
    LAYER_STACKED = "layer_stacked"
    FULLY_CONTIGUOUS = "fully_contiguous"
    UNIVERSAL = "universal"


_AXES = {
    LayoutKind.LAYER_SEPARATE: "NCTHD",
    LayoutKind.LAYER_STACKED: "LNCTHD",
    LayoutKind.FULLY_CONTIGUOUS: "NLCTHD",
    LayoutKind.UNIVERSAL: "NHLCTD",
}


@dataclass(frozen=True)
class KVLayout:
    """Sizes, dtype and arrangement of a cache.

    Attributes:
      num_layers: L.
      num_blocks: N.
      block_size: T, tokens of a block.
      num_kv_heads: H.
      head_dim: D.
      dtype: name of the element type, such as "bfloat16".
      kind: arrangement of the axes.
      components: C.

    Raises:
      LayoutError: if a size is not a positive integer, or dtype or kind is unknown.
    """

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    kind: LayoutKind = LayoutKind.LAYER_SEPARATE
    components: int = 2

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_blocks", "block_size", "num_kv_heads", "head_dim", "components"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise LayoutError(f"{name} is {value!r}; it must be a positive integer")
        try:
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        except TypeError as error:
            raise LayoutError(f"dtype is {self.dtype!r}; it must name a JAX element type") from error
        try:
            object.__setattr__(self, "kind", LayoutKind(self.kind))
        except ValueError as error:
            kinds = ", ".join(LayoutKind)
            raise LayoutError(f"kind is {self.kind!r}; it must be one of {kinds}") from error
        # Stacked layers are addressed as one array of L * N blocks.
        names, slots = "num_blocks * block_size", self.num_blocks * self.block_size
        if self.kind is LayoutKind.LAYER_STACKED:
            names, slots = f"num_layers * {names}", self.num_layers * slots
        if slots >= 2**31:
            raise LayoutError(
                f"{names} is {slots}; slots are int32, so it must stay below {2**31}: use fewer or smaller blocks"
            )

    def with_kind(self, kind: LayoutKind) -> "KVLayout":
        """Returns the same cache in another arrangement.

        Raises:
          LayoutError: if that is out of range.
        """
        return replace(self, kind=kind)

    def staging(self, num_blocks: int, kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS) -> "KVLayout":
        """Returns the layout of an array that holds so many blocks of this cache, each in one run.

        Raises:
          LayoutError: if blocks of that kind are no runs.
        """
        if kind not in (LayoutKind.FULLY_CONTIGUOUS, LayoutKind.UNIVERSAL):
            raise LayoutError(f"a block of a {kind} cache is no run of bytes; use fully_contiguous or universal")
        return replace(self, num_blocks=num_blocks, kind=kind)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return np.dtype(jnp.dtype(self.dtype)).itemsize

    @property
    def num_slots(self) -> int:
        """N * T, which is also the slot that pads slot arrays."""
        return self.num_blocks * self.block_size

    @property
    def axes(self) -> str:
        """Letters of the axes of one array, outermost first."""
        return _AXES[self.kind]

    @property
    def num_arrays(self) -> int:
        """How many arrays hold the cache: L for `layer_separate`, else 1."""
        return self.num_layers if self.kind is LayoutKind.LAYER_SEPARATE else 1

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Shape of each of these arrays."""
        return tuple(self._sizes()[axis] for axis in self.axes)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and components."""
        sizes = self._sizes()
        return self.itemsize * math.prod(sizes[axis] for axis in "LCTHD")

    @property
    def total_bytes(self) -> int:
        """Bytes of the whole cache."""
        return self.num_blocks * self.block_bytes

    def byte_offset(
        self, *, layer: int, block: int, component: int = 0, token: int = 0, head: int = 0, dim: int = 0
    ) -> tuple[int, int]:
        """Returns (array number, byte offset in it) of one element.

        Raises:
          LayoutError: if an index lies outside its axis.
        """
        sizes = self._sizes()
        index = {"L": layer, "N": block, "C": component, "T": token, "H": head, "D": dim}
        for axis, value in index.items():
            if not 0 <= value < sizes[axis]:
                raise LayoutError(f"index {value} of axis {axis} lies outside [0, {sizes[axis]})")
        offset = 0
        for axis in self.axes:
            offset = offset * sizes[axis] + index[axis]
        return (layer if self.num_arrays > 1 else 0), offset * self.itemsize

    def _sizes(self) -> dict[str, int]:
        return {
            "L": self.num_layers,
            "N": self.num_blocks,
            "C": self.components,
            "T": self.block_size,
            "H": self.num_kv_heads,
            "D": self.head_dim,
        }
