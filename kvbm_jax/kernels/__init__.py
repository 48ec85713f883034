"""Operations on cache arrays, one folder each.

A folder holds the truth in plain XLA (`xla.py`), which works on every back end, alternatives beside it, and one public
function with `implementation=`: `"xla"`, `"mosaic_gpu"` (NVIDIA GPUs from Hopper on), or `None` for the best that can
serve. An alternative that cannot raises `NotImplementedError` if it is asked for; `OPERATIONS[name].choose(...)` tells
what would serve a call, and why not another. `kvbm_jax.cache` and `kvbm_jax.attention` put these functions together for
a whole cache.

    store_kv        tokens of a step to slots               rows [H, D]
    load_kv         slots to tokens
    gather_blocks   blocks of a cache to one array          any kind of layout to one whose blocks are runs
    scatter_blocks  the other way
    copy_blocks     blocks within a cache
    permute_blocks  a whole cache to another kind of layout
    paged_attention attention through block tables
    advance         blocks of a decode step in a compiled loop, given back and taken

The arrays of a quantised cache are those of its elements and then those of its scales. Operations on whole blocks take
them all, and convert where another element format is asked for (`quantize`); those on rows take one array at a time.

To add a kernel: write the truth; give its folder a module named after the implementation, with a function of the same
name and parameters and `refusal`; name it in the folder's `OPERATION`. The suite in `tests/kernels` then runs it.

Axes: N blocks, C components (K, V), T tokens of a block, H kv heads, D head dim, S tokens of a step, M blocks of a
call, B sequences, L layers.
"""

from types import MappingProxyType
from typing import Any

from kvbm_jax.kernels.advance import OPERATION as _ADVANCE
from kvbm_jax.kernels.advance import advance
from kvbm_jax.kernels.copy_blocks import OPERATION as _COPY_BLOCKS
from kvbm_jax.kernels.copy_blocks import copy_blocks
from kvbm_jax.kernels.dispatch import Operation
from kvbm_jax.kernels.gather_blocks import OPERATION as _GATHER_BLOCKS
from kvbm_jax.kernels.gather_blocks import gather_blocks
from kvbm_jax.kernels.load_kv import OPERATION as _LOAD_KV
from kvbm_jax.kernels.load_kv import load_kv
from kvbm_jax.kernels.paged_attention import OPERATION as _PAGED_ATTENTION
from kvbm_jax.kernels.paged_attention import paged_attention
from kvbm_jax.kernels.permute_blocks import OPERATION as _PERMUTE_BLOCKS
from kvbm_jax.kernels.permute_blocks import permute_blocks
from kvbm_jax.kernels.scatter_blocks import OPERATION as _SCATTER_BLOCKS
from kvbm_jax.kernels.scatter_blocks import scatter_blocks
from kvbm_jax.kernels.store_kv import OPERATION as _STORE_KV
from kvbm_jax.kernels.store_kv import store_kv

__all__ = [
    "OPERATIONS",
    "advance",
    "copy_blocks",
    "gather_blocks",
    "load_kv",
    "paged_attention",
    "permute_blocks",
    "scatter_blocks",
    "store_kv",
]

OPERATIONS: MappingProxyType[str, Operation[Any, Any]] = MappingProxyType(
    {
        operation.name: operation
        for operation in (
            _ADVANCE,
            _COPY_BLOCKS,
            _GATHER_BLOCKS,
            _LOAD_KV,
            _PAGED_ATTENTION,
            _PERMUTE_BLOCKS,
            _SCATTER_BLOCKS,
            _STORE_KV,
        )
    }
)
"""What there is, by name."""
