"""G2: blocks in one arena of host memory.

The arena lies at one address from opening to closing. It is cut into slots, one block each, whose stride is the block's
size rounded up to whole pages, so that a transfer library can register it once and address any block:

    address                address + slot_stride
    | block 0 .... | pad   | block 1 .... | pad   | ...      block_id = slot number

Peers may read slots without asking the store (`kvbm_jax.transfer`): `pin` keeps slots from being written until `unpin`,
whatever becomes of their blocks. At most `pinned_blocks` slots are pinned at a time, and the arena has that many slots
more than blocks, so a put finds room however peers dawdle.

Copies run on one worker thread, in the order of the calls, so no caller ever waits for one. Every block has an xxh3-64
checksum, taken from its slot as it is put and compared with what has arrived in the reader's buffer as it is got: the
bytes that are verified are the bytes that are used. It is a shelf: it never evicts, it does not survive the process.

Axes: n blocks of a call, P bytes of a block, N blocks, S slots: N and as many as may be pinned.
"""

import collections
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import xxhash
from numpy.typing import NDArray

from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.offload.allocator import PAGE_BYTES, Allocator, AnonymousAllocator
from kvbm_jax.offload.checks import check_out, check_rows
from kvbm_jax.protocols import BlockKey, BlockRecord, Outcome, StoreRow, StoreStats, Tier

__all__ = ["HostBlockStore", "Pins"]

type Rows = tuple[StoreRow, ...]


class _Held(NamedTuple):
    slot: int
    record: BlockRecord
    checksum: int


class Pins(NamedTuple):
    """Where the blocks of a `pin` lie, those that are held and could be pinned."""

    block_ids: list[int]  # n; the slot, S where the block is not pinned
    checksums: list[int]  # n; XXH3-64 of the bytes, anything where the block is not pinned
    refused: list[int]  # places of blocks that are held, and of which as many are pinned as may be


class HostBlockStore:
    """Blocks in host memory.

    Args:
      block_bytes: Bytes of one block, `P`.
      num_blocks: Blocks it can hold, `N`.
      identity: What the blocks' bytes mean.
      allocator: Where the arena's memory comes from; None for fresh memory.
      pinned_blocks: Slots that may be pinned at a time, at least 0; so many more than `num_blocks` the arena has.

    Raises:
      ConfigError: A size is not positive, or the memory cannot be had.
    """

    def __init__(
        self,
        block_bytes: int,
        num_blocks: int,
        *,
        identity: CacheIdentity,
        allocator: Allocator | None = None,
        pinned_blocks: int = 0,
    ) -> None:
        for name, value, least in (
            ("block_bytes", block_bytes, 1),
            ("num_blocks", num_blocks, 1),
            ("pinned_blocks", pinned_blocks, 0),
        ):
            if value < least:
                raise ConfigError(f"{name} = {value}: allowed is an integer >= {least}")
        self._block_bytes = block_bytes
        self._identity = identity
        self._allocator = allocator or AnonymousAllocator()
        self._stride = -(-block_bytes // PAGE_BYTES) * PAGE_BYTES
        self._memory: NDArray[np.uint8] | None = self._allocator.allocate((num_blocks + pinned_blocks) * self._stride)
        self._address = self._memory.ctypes.data
        self._num_blocks = num_blocks
        self._num_slots = num_blocks + pinned_blocks
        self._held: dict[tuple[bytes, int], _Held] = {}  # by BlockKey, which is such a pair
        self._free = list(range(self._num_slots - 1, -1, -1))
        self._pinned_blocks = pinned_blocks
        self._pins: collections.Counter[int] = collections.Counter()  # how often each slot is pinned that is
        self._left: set[int] = set()  # slots whose block is gone, and that are free once they are not pinned
        self._counts = dict.fromkeys(("puts", "refused", "hits", "misses", "corrupt", "deletes"), 0)
        self._calls: collections.deque[Future[Rows]] = collections.deque()  # not done when last looked at
        self._closed = False
        self._worker: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()

    @property
    def tier(self) -> Tier:
        """G2."""
        return Tier.G2

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, `P`."""
        return self._block_bytes

    @property
    def identity(self) -> CacheIdentity:
        """What the blocks' bytes mean."""
        return self._identity

    @property
    def pinned_blocks(self) -> int:
        """Slots that may be pinned at a time."""
        return self._pinned_blocks

    @property
    def address(self) -> int:
        """Where slot 0 begins, a multiple of 4,096."""
        return self._address

    @property
    def slot_stride(self) -> int:
        """Bytes from one slot to the next, a multiple of 4,096."""
        return self._stride

    @property
    def slots(self) -> NDArray[np.uint8]:
        """The arena's blocks, u8[S, P], row = block_id; a view, to register and to read, not to write."""
        with self._lock:
            self._check_open()
            return self._slots()

    def put(self, records: Sequence[BlockRecord], blocks: NDArray[np.uint8]) -> Future[Rows]:
        """Copies `blocks`, u8[n, P], into free slots."""
        self._refuse_closed()
        check_rows(blocks, len(records), self._block_bytes)
        kept = tuple(records)
        return self._submit(lambda: tuple(self._put(record, row) for record, row in zip(kept, blocks, strict=True)))

    def get(self, keys: Sequence[BlockKey], out: NDArray[np.uint8]) -> Future[Rows]:
        """Copies blocks into `out`, u8[n, P], and verifies them there."""
        self._refuse_closed()
        check_out(out, len(keys), self._block_bytes)
        kept = tuple(keys)
        return self._submit(lambda: tuple(self._get(key, row) for key, row in zip(kept, out, strict=True)))

    def delete(self, keys: Sequence[BlockKey]) -> Future[Rows]:
        """Frees the slots of blocks."""
        kept = tuple(keys)
        return self._submit(lambda: tuple(self._delete(key) for key in kept))

    def contains(self, keys: Sequence[BlockKey]) -> tuple[bool, ...]:
        """Returns which blocks it holds."""
        with self._lock:
            self._check_open()
            return tuple(key in self._held for key in keys)

    def pin(self, keys: Iterable[tuple[bytes, int]]) -> Pins:
        """Keeps the slots of blocks from being written, until `unpin`; at once.

        Args:
          keys: Of the blocks; pairs as in `BlockKey` will do.
        """
        nowhere = self._num_slots
        with self._lock:
            self._check_open()
            found = [self._held.get(key) for key in keys]
            block_ids = [nowhere if held is None else held.slot for held in found]
            checksums = [0 if held is None else held.checksum for held in found]
            refused = self._without_room(block_ids)
            for place in refused:
                block_ids[place] = nowhere
            self._pins.update(block_ids)
            self._pins.pop(nowhere, None)
        return Pins(block_ids, checksums, refused)

    def unpin(self, block_ids: Iterable[int]) -> None:
        """Takes back as many pins as it is given slots.

        Raises:
          BlockStateError: A slot is not pinned.
        """
        with self._lock:
            for slot in block_ids:
                count = self._pins.get(slot, 0)
                if not count:
                    raise BlockStateError(f"slot {slot} is not pinned")
                if count > 1:
                    self._pins[slot] = count - 1
                    continue
                del self._pins[slot]
                if slot in self._left:
                    self._left.remove(slot)
                    self._free.append(slot)

    def _without_room(self, block_ids: list[int]) -> list[int]:
        """Returns the places of slots that cannot be pinned, for so many are already."""
        room = self._pinned_blocks - len(self._pins)
        if len(block_ids) <= room:
            return []
        fresh = [slot for slot in dict.fromkeys(block_ids) if slot not in self._pins and slot != self._num_slots]
        barred = set(fresh[room:])
        return [place for place, slot in enumerate(block_ids) if slot in barred]

    def records(self) -> Iterator[tuple[int, BlockRecord]]:
        """Yields (block_id, record) of every block held when called, the oldest put first."""
        with self._lock:
            self._check_open()
            return iter([(held.slot, held.record) for held in self._held.values()])

    def stats(self) -> StoreStats:
        """Returns its size and counters."""
        with self._lock:
            pending = sum(not call.done() for call in self._calls)
            return StoreStats(len(self._held), self._num_blocks, pending, **self._counts)

    def close(self) -> None:
        """Waits for the call under way, cancels those behind it, and gives the memory back."""
        with self._lock:
            self._closed = True
            worker, self._worker = self._worker, None
        if worker is not None:
            worker.shutdown(wait=True, cancel_futures=True)
        with self._lock:
            memory, self._memory = self._memory, None
            self._held.clear()
        if memory is not None:
            self._allocator.release(memory)

    # What follows runs on the worker, which alone writes slots and changes `_held`.

    def _put(self, record: BlockRecord, block: NDArray[np.uint8]) -> StoreRow:
        held = self._held.get(record.key)
        if held is not None:
            return StoreRow(Outcome.PRESENT, held.slot)
        if len(self._held) >= self._num_blocks:
            with self._lock:
                self._counts["refused"] += 1
            return StoreRow(Outcome.REFUSED, reason=f"full: {self._num_blocks} of {self._num_blocks} blocks held")
        with self._lock:
            slot = self._free.pop()
        target = self._slots()[slot]
        np.copyto(target, block)
        held = _Held(slot, record, xxhash.xxh3_64_intdigest(target))
        with self._lock:
            self._held[record.key] = held
            self._counts["puts"] += 1
        return StoreRow(Outcome.OK, slot)

    def _get(self, key: BlockKey, out: NDArray[np.uint8]) -> StoreRow:
        held = self._held.get(key)
        if held is None:
            with self._lock:
                self._counts["misses"] += 1
            return StoreRow(Outcome.MISS)
        np.copyto(out, self._slots()[held.slot])
        found = xxhash.xxh3_64_intdigest(np.ascontiguousarray(out))
        if found != held.checksum:
            self._drop(key, held, "corrupt")
            reason = f"checksum {found:016x}, stored with {held.checksum:016x}"
            return StoreRow(Outcome.CORRUPT, held.slot, reason=reason)
        with self._lock:
            self._counts["hits"] += 1
        return StoreRow(Outcome.OK, held.slot, held.record)

    def _delete(self, key: BlockKey) -> StoreRow:
        held = self._held.get(key)
        if held is None:
            return StoreRow(Outcome.MISS)
        self._drop(key, held, "deletes")
        return StoreRow(Outcome.OK, held.slot)

    def _drop(self, key: BlockKey, held: _Held, counter: str) -> None:
        with self._lock:
            del self._held[key]
            if held.slot in self._pins:
                self._left.add(held.slot)
            else:
                self._free.append(held.slot)
            self._counts[counter] += 1

    # What follows runs anywhere.

    def _slots(self) -> NDArray[np.uint8]:
        assert self._memory is not None  # noqa: S101 (gone only after the worker)
        return self._memory.reshape(self._num_slots, self._stride)[:, : self._block_bytes]

    def _submit(self, call: Callable[[], Rows]) -> Future[Rows]:
        with self._lock:
            self._check_open()
            while self._calls and self._calls[0].done():
                self._calls.popleft()
            if self._worker is None:
                self._worker = ThreadPoolExecutor(1, thread_name_prefix="kvbm-host-store")
            future = self._worker.submit(call)
            self._calls.append(future)
        return future

    def _refuse_closed(self) -> None:
        with self._lock:
            self._check_open()

    def _check_open(self) -> None:
        if self._closed:
            raise BlockStateError("the store is closed")
