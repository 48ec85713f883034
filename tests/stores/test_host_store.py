"""The host tier beyond the contract: its arena, its checksums, its worker."""

import mmap
import threading

import numpy as np
import pytest
import xxhash

from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload.allocator import PAGE_BYTES, AnonymousAllocator, BufferAllocator
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.protocols import BlockKey, BlockRecord, Outcome

P = 5000
IDENTITY = CacheIdentity.of(KVLayout(1, 4, 4, 1, 6, "uint8"), model_id="none", hash_algorithm="blake3")


def key(number):
    return BlockKey(number.to_bytes(16, "little"))


def record(number):
    return BlockRecord(key(number), None, (number,))


def blocks(*numbers):
    return np.stack([np.random.default_rng(n).integers(0, 256, P, np.uint8) for n in numbers])


def put(store, *numbers):
    return store.put([record(n) for n in numbers], blocks(*numbers)).result(30)


@pytest.fixture
def store():
    opened = HostBlockStore(P, 4, identity=IDENTITY)
    yield opened
    opened.close()


def page_aligned(nbytes):
    return mmap.mmap(-1, nbytes)


def test_slots_lie_where_the_store_says(store):
    assert store.identity == IDENTITY
    assert store.address % PAGE_BYTES == store.slot_stride % PAGE_BYTES == 0
    assert store.slot_stride == 8192
    (_, row) = put(store, 1, 2)
    slots = store.slots
    assert slots.shape == (4, P)
    assert slots.ctypes.data == store.address
    assert slots[row.block_id].ctypes.data == store.address + row.block_id * store.slot_stride
    np.testing.assert_array_equal(slots[row.block_id], blocks(2)[0])


def test_no_thread_before_the_first_call():
    before = threading.active_count()
    store = HostBlockStore(P, 1, identity=IDENTITY)
    assert threading.active_count() == before
    put(store, 1)
    assert threading.active_count() == before + 1
    store.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("offset", [0, 1, 2500, P - 1])
def test_a_flipped_bit_is_corrupt_once_and_then_a_miss(store, offset):
    _, row = put(store, 1, 2)
    store.slots[row.block_id, offset] ^= 4
    out = np.zeros((2, P), np.uint8)
    first, second = store.get([key(1), key(2)], out).result(30)
    assert (first.outcome, second.outcome) == (Outcome.OK, Outcome.CORRUPT)
    assert second.block_id == row.block_id
    assert "checksum" in second.reason
    assert store.get([key(2)], out[:1]).result(30)[0].outcome is Outcome.MISS
    assert (store.stats().corrupt, store.stats().misses, store.stats().blocks) == (1, 1, 1)
    assert put(store, 2)[0].outcome is Outcome.OK


class HeldRow(np.ndarray):
    """A row that keeps whoever copies from it until it is let go."""

    begun = threading.Event()
    go = threading.Event()

    def __array_function__(self, func, types, args, kwargs):
        self.begun.set()
        assert self.go.wait(30)
        plain = [np.asarray(arg) if isinstance(arg, HeldRow) else arg for arg in args]
        return func(*plain, **kwargs)


def test_a_call_behind_one_that_runs_can_be_cancelled(store):
    running = store.put([record(1)], blocks(1).view(HeldRow))
    behind = store.put([record(2)], blocks(2))
    assert HeldRow.begun.wait(30)
    assert store.stats().pending == 2
    assert not running.cancel()
    assert behind.cancel()
    HeldRow.go.set()
    assert running.result(30)[0].outcome is Outcome.OK
    store.delete([]).result(30)
    assert store.contains([key(1), key(2)]) == (True, False)
    assert store.stats().pending == 0


def test_a_buffer_of_the_user_is_the_arena():
    buffer = page_aligned(5 * 8192)
    allocator = BufferAllocator(buffer)
    store = HostBlockStore(P, 4, identity=IDENTITY, allocator=allocator)
    (row,) = put(store, 1)
    assert buffer[row.block_id * 8192 :][:P] == blocks(1).tobytes()
    with pytest.raises(ConfigError, match="in use by another store"):
        HostBlockStore(P, 4, identity=IDENTITY, allocator=allocator)
    store.close()
    HostBlockStore(P, 5, identity=IDENTITY, allocator=allocator).close()


def test_buffers_that_cannot_serve_are_refused():
    buffer = page_aligned(8192)
    with pytest.raises(ConfigError, match="has 8,192 bytes; needed are 16,384"):
        HostBlockStore(P, 2, identity=IDENTITY, allocator=BufferAllocator(buffer))
    with pytest.raises(ConfigError, match="16 bytes past a multiple of 4096"):
        BufferAllocator(memoryview(buffer)[16:])
    with pytest.raises(ConfigError, match="read-only"):
        BufferAllocator(memoryview(buffer).toreadonly())


def test_huge_pages_are_memory_like_any_other():
    memory = AnonymousAllocator(huge_pages=True).allocate(3 * PAGE_BYTES)
    assert memory.ctypes.data % PAGE_BYTES == 0
    assert not memory.any()
    memory[:] = 1


@pytest.mark.parametrize(("block_bytes", "num_blocks", "name"), [(0, 1, "block_bytes"), (1, 0, "num_blocks")])
def test_sizes_are_checked(block_bytes, num_blocks, name):
    with pytest.raises(ConfigError, match=f"{name} = 0"):
        HostBlockStore(block_bytes, num_blocks, identity=IDENTITY)


def test_memory_that_is_not_there_is_refused_with_its_size():
    with pytest.raises(ConfigError, match="bytes of host memory"):
        HostBlockStore(1 << 40, 1 << 20, identity=IDENTITY)


def test_a_view_outlives_the_store(store):
    (row,) = put(store, 1)
    slots = store.slots
    store.close()
    np.testing.assert_array_equal(slots[row.block_id], blocks(1)[0])


@pytest.fixture
def shared():
    """Four blocks, of which two may be pinned."""
    opened = HostBlockStore(P, 4, identity=IDENTITY, pinned_blocks=2)
    yield opened
    opened.close()


def test_pinned_slots_keep_their_bytes_whatever_becomes_of_their_blocks(shared):
    put(shared, 1, 2, 3, 4)
    pins = shared.pin([key(1), key(9), key(2)])
    assert pins.block_ids[1] == len(shared.slots) == 6
    assert pins.checksums[::2] == [xxhash.xxh3_64_intdigest(row) for row in blocks(1, 2)]
    assert pins.refused == []
    shared.delete([key(n) for n in (1, 2, 3, 4)]).result(30)
    assert [row.outcome for row in put(shared, 5, 6, 7, 8, 9)] == [Outcome.OK] * 4 + [Outcome.REFUSED]
    np.testing.assert_array_equal(shared.slots[[pins.block_ids[0], pins.block_ids[2]]], blocks(1, 2))
    shared.unpin([pins.block_ids[0], pins.block_ids[2]])
    shared.delete([key(5), key(6)]).result(30)
    assert [row.outcome for row in put(shared, 1, 2)] == [Outcome.OK] * 2


def test_no_more_slots_are_pinned_than_there_is_room_for(shared):
    put(shared, 1, 2, 3)
    first = shared.pin([key(1), key(2), key(3), key(1)])
    one, two, nowhere, again = first.block_ids
    assert first.refused == [2]
    assert (again, nowhere) == (one, 6)
    shared.unpin([one])
    assert shared.pin([key(3)]).refused == [0]  # pinned twice, and once no more
    shared.unpin([one])
    assert shared.pin([key(3)]).refused == []
    with pytest.raises(BlockStateError, match=f"slot {one} is not pinned"):
        shared.unpin([one])
    shared.unpin([two])


def test_pins_and_puts_at_random_never_disturb_a_pinned_slot(shared):
    rng = np.random.default_rng(0)
    pinned = {}  # slot: (number, times)
    for _ in range(500):
        number = int(rng.integers(8))
        match int(rng.integers(4)):
            case 0:
                put(shared, number)
            case 1:
                shared.delete([key(number)]).result(30)
            case 2:
                (slot,), _, refused = shared.pin([key(number)])
                assert not refused or len(pinned) == 2
                if slot < 6:
                    assert pinned.get(slot, (number, 0))[0] == number
                    pinned[slot] = number, pinned.get(slot, (number, 0))[1] + 1
            case 3 if pinned:
                slot = next(iter(pinned))
                shared.unpin([slot])
                number, times = pinned.pop(slot)
                if times > 1:
                    pinned[slot] = number, times - 1
        for slot, (number, _) in pinned.items():
            np.testing.assert_array_equal(shared.slots[slot], blocks(number)[0])


def test_a_number_of_pins_below_none_is_refused():
    with pytest.raises(ConfigError, match="pinned_blocks = -1"):
        HostBlockStore(P, 4, identity=IDENTITY, pinned_blocks=-1)
