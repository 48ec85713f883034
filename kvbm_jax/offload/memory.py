"""The two simplest stores: one holds nothing, one is a dict.

`MemoryBlockStore` is the oracle that other stores are tested against, and a tier for notebooks. It is no host
tier: each block is a Python object of its own, neither pinned nor at a stable address. Both finish every call
before they return, so their futures are always done and nothing can be cancelled.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.offload.checks import check_out, check_rows
from kvbm_jax.protocols import BlockKey, BlockRecord, Outcome, StoreRow, StoreStats, Tier

__all__ = ["MemoryBlockStore", "NullBlockStore"]


class MemoryBlockStore:
    """Blocks in a dict.

    Args:
      block_bytes: Bytes of one block, `P`.
      capacity: Blocks it can hold; None for as many as fit in memory.
      tier: The tier it stands for.
    """

    def __init__(self, block_bytes: int, *, capacity: int | None = None, tier: Tier = Tier.G2) -> None:
        if block_bytes < 1:
            raise ConfigError(f"block_bytes = {block_bytes}: allowed is an integer >= 1")
        if capacity is not None and capacity < 0:
            raise ConfigError(f"capacity = {capacity}: allowed is an integer >= 0, or None")
        self._block_bytes = block_bytes
        self._capacity = capacity
        self._tier = tier
        self._blocks: dict[BlockKey, tuple[int, BlockRecord, bytes]] = {}
        self._free_ids: list[int] = []
        self._counts = dict.fromkeys(("puts", "refused", "hits", "misses", "deletes"), 0)
        self._closed = False
        self._lock = threading.Lock()

    @property
    def tier(self) -> Tier:
        """The tier it stands for."""
        return self._tier

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, `P`."""
        return self._block_bytes

    def put(self, records: Sequence[BlockRecord], blocks: NDArray[np.uint8]) -> Future[tuple[StoreRow, ...]]:
        """Stores copies of `blocks`, `uint8[n, P]`."""
        self._check_open()
        check_rows(blocks, len(records), self._block_bytes)
        with self._lock:
            return _done(self._put(record, row) for record, row in zip(records, blocks, strict=True))

    def get(self, keys: Sequence[BlockKey], out: NDArray[np.uint8]) -> Future[tuple[StoreRow, ...]]:
        """Copies blocks into `out`, `uint8[n, P]`."""
        self._check_open()
        check_out(out, len(keys), self._block_bytes)
        with self._lock:
            return _done(self._get(key, row) for key, row in zip(keys, out, strict=True))

    def delete(self, keys: Sequence[BlockKey]) -> Future[tuple[StoreRow, ...]]:
        """Takes blocks out."""
        self._check_open()
        with self._lock:
            return _done(self._delete(key) for key in keys)

    def contains(self, keys: Sequence[BlockKey]) -> tuple[bool, ...]:
        """Returns which blocks it holds."""
        self._check_open()
        with self._lock:
            return tuple(key in self._blocks for key in keys)

    def records(self) -> Iterator[tuple[int, BlockRecord]]:
        """Yields (block_id, record) of every block held when called."""
        self._check_open()
        with self._lock:
            return iter([(block_id, record) for block_id, record, _ in self._blocks.values()])

    def stats(self) -> StoreStats:
        """Returns its size and counters."""
        with self._lock:
            return StoreStats(len(self._blocks), self._capacity, pending=0, **self._counts)

    def close(self) -> None:
        """Lets go of all blocks; calls after it raise `BlockStateError`."""
        with self._lock:
            self._closed = True
            self._blocks.clear()

    def _put(self, record: BlockRecord, block: NDArray[np.uint8]) -> StoreRow:
        if record.key in self._blocks:
            return StoreRow(Outcome.PRESENT, self._blocks[record.key][0])
        if self._capacity is not None and len(self._blocks) >= self._capacity:
            self._counts["refused"] += 1
            return StoreRow(Outcome.REFUSED, reason=f"full: {self._capacity} of {self._capacity} blocks held")
        block_id = self._free_ids.pop() if self._free_ids else len(self._blocks)
        self._blocks[record.key] = block_id, record, block.tobytes()
        self._counts["puts"] += 1
        return StoreRow(Outcome.OK, block_id)

    def _get(self, key: BlockKey, out: NDArray[np.uint8]) -> StoreRow:
        if key not in self._blocks:
            self._counts["misses"] += 1
            return StoreRow(Outcome.MISS)
        block_id, record, data = self._blocks[key]
        out[:] = np.frombuffer(data, np.uint8)
        self._counts["hits"] += 1
        return StoreRow(Outcome.OK, block_id, record)

    def _delete(self, key: BlockKey) -> StoreRow:
        if key not in self._blocks:
            return StoreRow(Outcome.MISS)
        block_id, _, _ = self._blocks.pop(key)
        self._free_ids.append(block_id)
        self._counts["deletes"] += 1
        return StoreRow(Outcome.OK, block_id)

    def _check_open(self) -> None:
        if self._closed:
            raise BlockStateError("the store is closed")


class NullBlockStore(MemoryBlockStore):
    """Holds nothing: every put is refused, every get is a miss.

    Args:
      block_bytes: Bytes of one block, `P`.
      tier: The tier it stands for.
    """

    def __init__(self, block_bytes: int, *, tier: Tier = Tier.G2) -> None:
        super().__init__(block_bytes, capacity=0, tier=tier)


def _done(rows: Iterable[StoreRow]) -> Future[tuple[StoreRow, ...]]:
    future: Future[tuple[StoreRow, ...]] = Future()
    future.set_result(tuple(rows))
    return future
