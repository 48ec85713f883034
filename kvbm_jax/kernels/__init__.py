"""Operations on cache arrays, one folder each.

A folder holds the truth in plain XLA (`xla.py`), which works on every back end, alternatives beside it, and one public
function with `implementation=`: `"xla"`, or `None` for the best that is available. An alternative that cannot serve
raises `NotImplementedError`. Functions here know arrays `[N, C, T, H, D]` of one layer; `kvbm_jax.cache` and
`kvbm_jax.attention` put them together for a whole cache.

Axes: N blocks, C components (K, V), T tokens of a block, H kv heads, D head dim, S tokens of a step, B sequences.
"""

from kvbm_jax.kernels.copy_blocks import copy_blocks
from kvbm_jax.kernels.gather_blocks import gather_blocks
from kvbm_jax.kernels.load_kv import load_kv
from kvbm_jax.kernels.paged_attention import paged_attention
from kvbm_jax.kernels.scatter_blocks import scatter_blocks
from kvbm_jax.kernels.store_kv import store_kv

__all__ = ["copy_blocks", "gather_blocks", "load_kv", "paged_attention", "scatter_blocks", "store_kv"]
