"""Blocks outside sequences: granted, read, written and given back by their handles."""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from kvbm_jax.device_tier import DeviceTier
from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.handles import Block

__all__ = ["LooseBlocks"]


class LooseBlocks:
    """Turns handles into blocks of a device, and refuses stale ones. See `BlockManager` for its methods.

    Args:
      device: owns the blocks.
    """

    def __init__(self, device: DeviceTier) -> None:
        self._device = device

    def allocate(self, count: int, *, scrub: bool, on_free: Callable[[Block], None]) -> list[Block]:
        """Grants blocks, zeroed with `scrub`, whose handles call `on_free` when they are to be freed."""
        if count < 0:
            raise ConfigError(f"count is {count}; it must be at least 0")
        block_ids, generations = self._device.allocate(count)
        if scrub:
            self._device.scrub(block_ids)
        return [
            Block(int(block), int(generation), self._device.pool, on_free)
            for block, generation in zip(block_ids, generations, strict=True)
        ]

    def free(self, blocks: Sequence[Block]) -> None:
        """Gives blocks back, all or none."""
        self._device.pool.free(*self._columns(blocks))
        self._device.update_gauges()

    def is_current(self, block: Block) -> bool:
        """Tells whether a handle is of this device, of its present cache, and has not been given back."""
        return block.owner is self._device.pool and self._device.pool.is_current(*self._columns([block]))

    def store(self, block: Block, layer: int, data: ArrayLike) -> None:
        """Writes one layer of a block: [C, T, H, D]."""
        self._device.pool.check(*self._columns([block]))
        self._device.cache.store_layer(block.block_id, layer, data)

    def load(self, block: Block, layer: int) -> jax.Array:
        """Reads one layer of a block: [C, T, H, D]."""
        self._device.pool.check(*self._columns([block]))
        return self._device.cache.load_layer(block.block_id, layer)

    def scrub(self) -> int:
        """Zeroes every block that holds nothing, and returns how many."""
        block_ids = self._device.pool.reset_blocks()
        self._device.scrub(block_ids)
        return len(block_ids)

    def _columns(self, blocks: Sequence[Block]) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
        """Ids and generations of handles, which must be of this device and of its present cache."""
        for block in blocks:
            if block.owner is not self._device.pool:
                raise BlockStateError(f"block {block.block_id} is of another manager, or was lost with the cache")
        block_ids = np.array([block.block_id for block in blocks], np.int32)
        return block_ids, np.array([block.generation for block in blocks], np.uint32)
