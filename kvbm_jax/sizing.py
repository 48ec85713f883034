"""From a configuration to the layout of a cache: which sizes are set, and how many blocks the device has room for.

Where `num_blocks` is unset, the cache takes `gpu_memory_fraction` of what the device can spare:

    bytes_limit     what JAX may use of the device; its allocator keeps 75 % of a GPU unless told otherwise
    - in use        the model's weights, and whatever else is there by now: load them first
    - step_bytes    what the server's programs need while they run

`step_bytes` reads the last off compiled programs. They are compiled before there is a cache, for a cache of any size:
what a step needs beside the cache does not grow with it.

    abstract = jax.eval_shape(lambda: kvbm_jax.cache.init(layout))
    compiled = jax.jit(step, donate_argnums=0).lower(abstract, ...).compile()
    manager = BlockManager(config, step_bytes=step_bytes(compiled))
"""

import functools
import math

import jax
import jax.numpy as jnp

from kvbm_jax.config import KvBlockManagerConfig
from kvbm_jax.errors import ConfigError
from kvbm_jax.layout import KVLayout

__all__ = ["layout_of", "step_bytes"]

_MAX_SLOTS = 2**31 - 1


def layout_of(config: KvBlockManagerConfig, *, step_bytes: int = 0, device: jax.Device | None = None) -> KVLayout:
    """Returns the layout that a configuration asks for.

    Args:
      config: says so.
      step_bytes: of the device's memory, to be left for the server's programs; looked at if `num_blocks` is unset.
      device: that the cache will be on; None = the one where arrays are made.

    Raises:
      ConfigError: if a size is unset, the device tells no limit of its memory, or has no room for one block.
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
    if step_bytes < 0:
        raise ConfigError(f"step_bytes = {step_bytes}: allowed is an integer >= 0")
    if device is None:
        (device,) = jnp.zeros(()).devices()
    memory = device.memory_stats()
    if not memory or "bytes_limit" not in memory:
        raise ConfigError(
            f"num_blocks is unset and {device} reports no memory limit to take gpu_memory_fraction of; set num_blocks"
        )
    limit, in_use = memory["bytes_limit"], memory["bytes_in_use"]
    left = (limit - in_use - step_bytes) * config.gpu_memory_fraction
    block_bytes = layout(num_blocks=1).block_bytes
    num_blocks = min(math.floor(left / block_bytes), _MAX_SLOTS // config.block_size)
    if num_blocks < 1:
        raise ConfigError(
            f"no room for one block of {block_bytes:,} bytes: {device} has {limit:,}, of which {in_use:,} are in use "
            f"and {step_bytes:,} are for the step; gpu_memory_fraction = {config.gpu_memory_fraction} of the rest is "
            f"{left:,.0f}. Free memory, or use smaller blocks"
        )
    return layout(num_blocks=num_blocks)


def step_bytes(*programs: jax.stages.Compiled) -> int:
    """Returns the device memory that the most demanding of some programs needs beside its arguments.

    That is its temporaries, and what it returns in other memory than that of donated arguments.

    Raises:
      ConfigError: if a program's back end does not tell.
    """
    needed = 0
    for program in programs:
        memory = program.memory_analysis()
        if memory is None:
            raise ConfigError("a compiled program does not tell how much memory it needs; say step_bytes yourself")
        returned = memory.output_size_in_bytes - memory.alias_size_in_bytes
        needed = max(needed, memory.temp_size_in_bytes + returned + memory.generated_code_size_in_bytes)
    return needed
