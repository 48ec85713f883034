"""Blocks that go from worker to worker.

`nixl` and `tcp` are the two engines (`kvbm_jax.protocols.TransferEngine`): they move bytes between memory that both
ends have registered, and know nothing of blocks; `engines` opens one by name. `access`, `listener`, `streams` and
`frames` are what connections are made of: who may come, how they begin, bytes, messages.
"""

from kvbm_jax.transfer.access import SocketConfig
from kvbm_jax.transfer.engines import open_engine

__all__ = ["SocketConfig", "open_engine"]
