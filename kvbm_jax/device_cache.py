"""The cache tensors on the device, lent to one program after the other.

Programs take the cache donated and return it. One that fails after donation has destroyed the cache; that is noticed
here, and never passed over. Which block means what is the manager's business.
"""

import functools
import operator
from collections.abc import Callable
from typing import Concatenate

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kvbm_jax import cache as kv_cache
from kvbm_jax.errors import CacheLostError, ConfigError, LayoutError
from kvbm_jax.kernels.quantize import Quantized, dequantize
from kvbm_jax.layout import KVLayout

__all__ = ["DeviceCache"]


class DeviceCache:
    """Owns one `KVCache` on JAX's default device; its methods are called from one thread.

    Args:
      layout: of the cache.

    Raises:
      ConfigError: if the device has no room for it.
    """

    def __init__(self, layout: KVLayout) -> None:
        try:
            self.value = _fresh(layout)
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(
                f"num_blocks = {layout.num_blocks:,}: a cache of {layout.total_bytes:,} bytes does not fit the device "
                f"({' '.join(str(error).split())}); use fewer blocks"
            ) from error
        self._sharding = self.value.arrays[0].sharding

    @property
    def is_lost(self) -> bool:
        """Whether a program has destroyed the cache."""
        return any(array.is_deleted() for array in jax.tree.leaves(self.value))

    def renew(self) -> None:
        """Makes a new cache in the place of one that is lost; another one stays as it is."""
        if self.is_lost:
            for array in jax.tree.leaves(self.value):
                array.delete()  # what is left of it: there may be no room for both
            self.value = _fresh(self.value.layout)

    def run[**P, R](
        self,
        step: Callable[Concatenate[kv_cache.KVCache, P], tuple[kv_cache.KVCache, R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Runs a program on the cache; see `BlockManager.run`.

        Raises:
          LayoutError: if it does not return the cache first.
          CacheLostError: if it failed after donation had destroyed the cache.
        """
        try:
            new, result = step(self.value, *args, **kwargs)
            self._check(new)
        except Exception as error:
            if not self.is_lost:
                raise
            raise CacheLostError(
                f"the step failed after its cache had been donated ({error}); the cache is empty again: "
                "start all sequences anew"
            ) from error
        self.value = new
        return result

    def remade[**P](
        self, program: Callable[Concatenate[kv_cache.KVCache, P], kv_cache.KVCache], *args: P.args, **kwargs: P.kwargs
    ) -> kv_cache.KVCache:
        """Makes a cache of another shape out of the present one, which stays: put it into `value` to go on with it.

        Raises:
          ConfigError: if the device has no room for both.
        """
        try:
            made = program(self.value, *args, **kwargs)
            for array in jax.tree.leaves(made):
                array.block_until_ready()
        except (RuntimeError, MemoryError) as error:
            raise ConfigError(
                f"the device has no room for another cache beside the present one of {self.value.layout.total_bytes:,} "
                f"bytes ({' '.join(str(error).split())}); nothing has changed: use fewer blocks, or a new manager"
            ) from error
        return made

    def store_layer(self, block_id: int, layer: int, data: ArrayLike) -> None:
        """Writes one layer of a block, [C, T, H, D].

        Raises:
          LayoutError: if shape or layer do not fit.
        """
        layout, values = self.value.layout, jnp.asarray(data)
        shape = (layout.components, layout.block_size, layout.num_kv_heads, layout.head_dim)
        if values.shape != shape:
            raise LayoutError(f"data has shape {list(values.shape)}; a block's layer is [C, T, H, D] = {list(shape)}")
        slots = block_id * layout.block_size + jnp.arange(layout.block_size, dtype=jnp.int32)
        self.run(_store_layer, values, slots, layer=operator.index(layer))

    def load_layer(self, block_id: int, layer: int) -> jax.Array:
        """Reads one layer of a block, [C, T, H, D], float32 if the cache is quantised.

        Raises:
          LayoutError: if the layer does not exist.
        """
        array, first = kv_cache.layer_view(self.value, operator.index(layer))
        scales = kv_cache.layer_scales(self.value, operator.index(layer))
        block = array[first + block_id]
        return block if scales is None else dequantize(Quantized(block, scales[first + block_id]), jnp.float32)

    def beside[T](self, tree: T) -> T:
        """Copies a pytree to the device of the cache: the caller may donate it."""
        placed: T = jax.device_put(tree, self._sharding, may_alias=False)
        return placed

    def _check(self, new: object) -> None:
        layout = self.value.layout
        if not isinstance(new, kv_cache.KVCache) or new.layout != layout:
            raise LayoutError(f"the step returned {type(new).__name__} first; it must return the cache, in its layout")


def _fresh(layout: KVLayout) -> kv_cache.KVCache:
    cache = kv_cache.init(layout)
    # Committed from the start: a program compiled for an uncommitted cache would be compiled twice.
    placed: kv_cache.KVCache = jax.device_put(cache, cache.arrays[0].sharding)
    return placed


@functools.partial(jax.jit, donate_argnums=0, static_argnames="layer")
def _store_layer(
    cache: kv_cache.KVCache, data: jax.Array, slots: jax.Array, *, layer: int
) -> tuple[kv_cache.KVCache, None]:
    """Writes [C, T, H, D] to the slots of one block; donates the cache."""
    return kv_cache.store_kv(cache, layer, data[0], data[1], slots), None
