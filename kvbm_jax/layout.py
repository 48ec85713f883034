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

A *quantised* cache holds int8 or float8_e4m3fn, its payload, and for each token and kv head a float32 scale by which
the D elements are multiplied. On a device the scales are arrays beside the payload: L arrays [N, C, T, H], or one
[L, N, C, T, H]; the offset of scale (l, n, c, t, h) is that of an element without the axis D. Where a block is one run,
the run holds both, and the array is uint8[N, P], P = L*C*T*H*(D + 4) bytes of a block. Scales are little-endian:

  fully_contiguous   payload  n*P + (((l*C + c)*T + t)*H + h)*D + d
                     scale    n*P + L*C*T*H*D + 4*(((l*C + c)*T + t)*H + h)
  universal          payload  n*P + h*P/H + ((l*C + c)*T + t)*D + d
                     scale    n*P + h*P/H + L*C*T*D + 4*((l*C + c)*T + t)

Axes: L layers, N blocks, C components (K and V: 2; an MLA latent: 1), T tokens of a block, H kv heads, D head dim.
"""

import enum
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kvbm_jax.errors import LayoutError

__all__ = ["ElementFormat", "KVLayout", "LayoutKind"]


class LayoutKind(enum.StrEnum):
    """How the elements of a cache are arranged."""

    LAYER_SEPARATE = "layer_separate"
    LAYER_STACKED = "layer_stacked"
    FULLY_CONTIGUOUS = "fully_contiguous"
    UNIVERSAL = "universal"


class ElementFormat(NamedTuple):
    """What the elements of a cache are."""

    dtype: str  # name of the element type
    quantized: bool = False  # whether they have scales


_AXES = {
    LayoutKind.LAYER_SEPARATE: "NCTHD",
    LayoutKind.LAYER_STACKED: "LNCTHD",
    LayoutKind.FULLY_CONTIGUOUS: "NLCTHD",
    LayoutKind.UNIVERSAL: "NHLCTD",
}
_RUNS = (LayoutKind.FULLY_CONTIGUOUS, LayoutKind.UNIVERSAL)
_QUANTIZED_DTYPES = ("int8", "float8_e4m3fn")
_SCALE_BYTES = 4


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
      quantized: whether elements have scales; `dtype` is then int8 or float8_e4m3fn. Without, these are plain numbers.

    Raises:
      LayoutError: if a size is not a positive integer, dtype or kind is unknown, or a dtype cannot have scales.
    """

    num_layers: int
    num_blocks: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: str = "bfloat16"
    kind: LayoutKind = LayoutKind.LAYER_SEPARATE
    components: int = 2
    quantized: bool = False

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
        if self.quantized and self.dtype not in _QUANTIZED_DTYPES:
            known = " or ".join(_QUANTIZED_DTYPES)
            raise LayoutError(f"dtype is {self.dtype!r}; a quantised cache is {known}: use one, or quantized=False")
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

    def with_format(self, element_format: ElementFormat) -> "KVLayout":
        """Returns the same cache of other elements.

        Raises:
          LayoutError: if there are none such.
        """
        return replace(self, dtype=element_format.dtype, quantized=element_format.quantized)

    def staging(self, num_blocks: int, kind: LayoutKind = LayoutKind.FULLY_CONTIGUOUS) -> "KVLayout":
        """Returns the layout of an array that holds so many blocks of this cache, each in one run.

        Raises:
          LayoutError: if blocks of that kind are no runs.
        """
        if kind not in _RUNS:
            raise LayoutError(f"a block of a {kind} cache is no run of bytes; use fully_contiguous or universal")
        return replace(self, num_blocks=num_blocks, kind=kind)

    @property
    def element_format(self) -> ElementFormat:
        """What the elements are."""
        return ElementFormat(self.dtype, self.quantized)

    @property
    def is_packed(self) -> bool:
        """Whether arrays hold blocks as bytes, payload and scales together."""
        return self.quantized and self.kind in _RUNS

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
        """Letters of the axes, outermost first: of one array or, where it is packed, of the payload in it."""
        return _AXES[self.kind]

    @property
    def num_arrays(self) -> int:
        """How many arrays hold the cache, scales not counted: L for `layer_separate`, else 1."""
        return self.num_layers if self.kind is LayoutKind.LAYER_SEPARATE else 1

    @property
    def array_shape(self) -> tuple[int, ...]:
        """Shape of each of these arrays."""
        if self.is_packed:
            return self.num_blocks, self.block_bytes
        sizes = self._sizes()
        return tuple(sizes[axis] for axis in self.axes)

    @property
    def array_dtype(self) -> str:
        """Name of their element type: `dtype`, or uint8 where they are packed."""
        return "uint8" if self.is_packed else self.dtype

    @property
    def scale_shape(self) -> tuple[int, ...] | None:
        """Shape of the float32 arrays of scales, one beside each array; None where there are none."""
        if not self.quantized or self.is_packed:
            return None
        return self.array_shape[:-1]

    @property
    def payload_bytes(self) -> int:
        """Bytes of one block without scales."""
        return self.itemsize * self._num_scales() * self.head_dim

    @property
    def block_bytes(self) -> int:
        """Bytes of one block over all layers and components, its scales included."""
        return self.payload_bytes + (_SCALE_BYTES * self._num_scales() if self.quantized else 0)

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
        index = {"L": layer, "N": block, "C": component, "T": token, "H": head, "D": dim}
        return self._locate(index, self.axes, self.itemsize, first=0)

    def scale_offset(
        self, *, layer: int, block: int, component: int = 0, token: int = 0, head: int = 0
    ) -> tuple[int, int]:
        """Returns (array number, byte offset in it) of one scale: in an array of scales, or in the packed one.

        Raises:
          LayoutError: if an index lies outside its axis, or there are no scales.
        """
        if not self.quantized:
            raise LayoutError(f"this cache of {self.dtype} is not quantised: there are no scales")
        index = {"L": layer, "N": block, "C": component, "T": token, "H": head}
        return self._locate(index, self.axes.removesuffix("D"), _SCALE_BYTES, first=self.payload_bytes)

    def _locate(self, index: dict[str, int], axes: str, itemsize: int, *, first: int) -> tuple[int, int]:
        """Array and byte offset of an index; in a packed block such elements begin at its byte `first`."""
        sizes = self._sizes()
        for axis, value in index.items():
            if not 0 <= value < sizes[axis]:
                raise LayoutError(f"index {value} of axis {axis} lies outside [0, {sizes[axis]})")

        def place(axes: str) -> int:
            found = 0
            for axis in axes:
                found = found * sizes[axis] + index[axis]
            return found

        if not self.is_packed:
            return (index["L"] if self.num_arrays > 1 else 0), place(axes) * itemsize
        outer = "NH" if self.kind is LayoutKind.UNIVERSAL else "N"
        runs = self.num_kv_heads if "H" in outer else 1  # of a block, each of payload and scales
        return 0, (place(outer) * self.block_bytes + first) // runs + place(axes.removeprefix(outer)) * itemsize

    def _num_scales(self) -> int:
        """L * C * T * H."""
        return self.num_layers * self.components * self.block_size * self.num_kv_heads

    def _sizes(self) -> dict[str, int]:
        return {
            "L": self.num_layers,
            "N": self.num_blocks,
            "C": self.components,
            "T": self.block_size,
            "H": self.num_kv_heads,
            "D": self.head_dim,
        }
