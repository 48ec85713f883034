"""Tiers below the device: stores that hold blocks, each behind `kvbm_jax.protocols.BlockStore`."""

from kvbm_jax.offload.memory import MemoryBlockStore, NullBlockStore

__all__ = ["MemoryBlockStore", "NullBlockStore"]
