"""From a configuration to the layout of a cache: which sizes are set, and how many blocks the device has room for."""

import functools
import math

import jax

from kvbm_jax.config import KvBlockManagerConfig
from kvbm_jax.errors import ConfigError
from kvbm_jax.layout import KVLayout

__all__ = ["layout_of"]


def layout_of(config: KvBlockManagerConfig) -> KVLayout:
    """Returns the layout that a configuration asks for.

    Raises:
      ConfigError: if a size is unset, what it asks for is not there, or the device has no room for one block.
      LayoutError: if a size is out of range.
    """
    unset = [name for name in ("num_layers", "num_kv_heads", "head_dim") if getattr(config, name) is None]
    if unset:
        raise ConfigError(f"{', '.join(unset)} unset; take them from the model's configuration")
    layout = functools.partial(
        KVLayout,
        num_layers=config.num_layers or 0,
        num_kv_heads=config.num_kv_heads or 0,
        head_dim=config.head_dim or 0,
        block_size=config.block_size,
        dtype=config.dtype,
        quantized=config.dtype.element_format.quantized,
    )
    if config.num_blocks is not None:
        return layout(num_blocks=config.num_blocks)
    device = jax.devices()[0]
    memory = device.memory_stats()
    if not memory or "bytes_limit" not in memory:
        raise ConfigError(
            f"num_blocks is unset and {device} reports no memory limit to take gpu_memory_fraction of; set num_blocks"
        )
    left = (memory["bytes_limit"] - memory["bytes_in_use"]) * config.gpu_memory_fraction
    num_blocks = math.floor(left / layout(num_blocks=1).block_bytes)
    if num_blocks < 1:
        raise ConfigError(
            f"gpu_memory_fraction = {config.gpu_memory_fraction} leaves {left:,.0f} bytes, not one block of "
            f"{layout(num_blocks=1).block_bytes:,}; free memory or use smaller blocks"
        )
    return layout(num_blocks=num_blocks)
