"""What every `BlockStore` must do. A new store joins by a line in `STORES`; nothing else here knows which it is."""

import dataclasses
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm_jax.errors import BlockStateError, ConfigError, LayoutError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload import MemoryBlockStore, NullBlockStore
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.offload.segments import SegmentBlockStore
from kvbm_jax.protocols import BlockKey, BlockRecord, BlockStore, Outcome, Tier

BLOCK_BYTES = 48
IDENTITY = CacheIdentity.of(KVLayout(1, 4, 4, 1, 6, "uint8"), model_id="none", hash_algorithm="blake3")


@dataclasses.dataclass(frozen=True)
class StoreCase:
    """How to open a store of `capacity` blocks of `block_bytes` in an empty folder."""

    name: str
    open: Callable[..., BlockStore]  # (folder, block_bytes, capacity) -> store
    holds: bool = True  # False for a store that by design holds nothing


def open_segments(folder, block_bytes, capacity):
    return SegmentBlockStore(
        folder, block_bytes, identity=IDENTITY, capacity_bytes=1 << 24, capacity_blocks=capacity, clock=time
    )


STORES = [
    StoreCase("memory", lambda folder, block_bytes, capacity: MemoryBlockStore(block_bytes, capacity=capacity)),
    StoreCase("host", lambda folder, block_bytes, capacity: HostBlockStore(block_bytes, capacity, identity=IDENTITY)),
    StoreCase("segments", open_segments),
    StoreCase("null", lambda folder, block_bytes, capacity: NullBlockStore(block_bytes), holds=False),
]
every_store = pytest.mark.parametrize("case", STORES, ids=lambda case: case.name)
holding_store = pytest.mark.parametrize("case", [c for c in STORES if c.holds], ids=lambda case: case.name)


@pytest.fixture
def store(case, tmp_path):
    opened = case.open(tmp_path, BLOCK_BYTES, 4)
    yield opened
    opened.close()


def key(number, group_idx=0):
    return BlockKey(number.to_bytes(16, "little"), group_idx)


def record(number, group_idx=0):
    parent = None if number == 0 else key(number - 1).sequence_hash
    return BlockRecord(key(number, group_idx), parent, tuple(range(number, number + 4)), "lora" if number % 2 else None)


def block(number, group_idx=0):
    return np.random.default_rng([number, group_idx]).integers(0, 256, BLOCK_BYTES, np.uint8)


def blocks(*numbers):
    return np.stack([block(number) for number in numbers])


def put(store, *numbers):
    return store.put([record(n) for n in numbers], blocks(*numbers)).result(30)


def get(store, *numbers):
    out = np.full((len(numbers), BLOCK_BYTES), 0xEE, np.uint8)
    return store.get([key(n) for n in numbers], out).result(30), out


def outcomes(rows):
    return [row.outcome for row in rows]


@holding_store
def test_what_was_put_is_read_back_with_its_record(store):
    stored = put(store, 1, 0, 2)
    assert outcomes(stored) == [Outcome.OK] * 3
    assert len({row.block_id for row in stored}) == 3
    rows, out = get(store, 2, 1)
    assert outcomes(rows) == [Outcome.OK] * 2
    assert [row.record for row in rows] == [record(2), record(1)]
    assert [row.block_id for row in rows] == [stored[2].block_id, stored[0].block_id]
    np.testing.assert_array_equal(out, blocks(2, 1))


@every_store
def test_what_was_not_put_is_a_miss_in_its_row(store, case):
    put(store, 1)
    rows, out = get(store, 7, 1)
    assert outcomes(rows) == [Outcome.MISS, Outcome.OK if case.holds else Outcome.MISS]
    assert rows[0].block_id is rows[0].record is None
    assert store.contains([key(7), key(1)]) == (False, case.holds)
    if case.holds:
        np.testing.assert_array_equal(out[1], block(1))


@holding_store
def test_a_second_put_of_a_key_writes_nothing(store):
    first = put(store, 1)
    again = store.put([record(1)], blocks(9)).result(30)
    assert outcomes(again) == [Outcome.PRESENT]
    assert again[0].block_id == first[0].block_id
    np.testing.assert_array_equal(get(store, 1)[1][0], block(1))
    assert store.stats().blocks == 1


@holding_store
def test_a_key_twice_in_one_call(store):
    assert outcomes(put(store, 1, 1)) == [Outcome.OK, Outcome.PRESENT]
    rows, out = get(store, 1, 1)
    assert outcomes(rows) == [Outcome.OK] * 2
    np.testing.assert_array_equal(out, blocks(1, 1))
    assert outcomes(store.delete([key(1), key(1)]).result(30)) == [Outcome.OK, Outcome.MISS]


@holding_store
def test_groups_of_one_hash_are_different_blocks(store):
    store.put([record(1, 0), record(1, 1)], np.stack([block(1, 0), block(1, 1)])).result(30)
    out = np.zeros((1, BLOCK_BYTES), np.uint8)
    (row,) = store.get([key(1, 1)], out).result(30)
    assert row.record == record(1, 1)
    np.testing.assert_array_equal(out[0], block(1, 1))
    assert store.contains([key(1, 0), key(1, 1), key(1, 2)]) == (True, True, False)


@holding_store
def test_deleted_blocks_are_gone_and_their_room_is_free(store):
    stored = put(store, 0, 1, 2, 3)
    rows = store.delete([key(1), key(9), key(3)]).result(30)
    assert outcomes(rows) == [Outcome.OK, Outcome.MISS, Outcome.OK]
    assert [row.block_id for row in rows] == [stored[1].block_id, None, stored[3].block_id]
    assert outcomes(get(store, 0, 1, 2, 3)[0]) == [Outcome.OK, Outcome.MISS, Outcome.OK, Outcome.MISS]
    assert outcomes(put(store, 4, 5)) == [Outcome.OK] * 2
    held = list(store.records())
    assert len({block_id for block_id, _ in held}) == 4
    assert {r.key for _, r in held} == {key(n) for n in (0, 2, 4, 5)}


@holding_store
def test_a_full_store_refuses_and_keeps_what_it_has(store):
    rows = put(store, 0, 1, 2, 3, 4, 5)
    assert outcomes(rows) == [Outcome.OK] * 4 + [Outcome.REFUSED] * 2
    assert rows[4].block_id is None
    assert "4" in rows[4].reason
    assert outcomes(put(store, 0)) == [Outcome.PRESENT]
    np.testing.assert_array_equal(get(store, 0, 1, 2, 3)[1], blocks(0, 1, 2, 3))


@holding_store
def test_the_caller_may_reuse_its_buffer_once_the_put_is_done(store):
    buffer = blocks(1)
    store.put([record(1)], buffer).result(30)
    buffer[:] = 0
    np.testing.assert_array_equal(get(store, 1)[1][0], block(1))


@holding_store
def test_strided_buffers(store):
    wide = np.zeros((4, 2 * BLOCK_BYTES), np.uint8)
    wide[::2, ::2] = blocks(1, 2)
    store.put([record(1), record(2)], wide[::2, ::2]).result(30)
    out = np.zeros((4, 2 * BLOCK_BYTES), np.uint8)
    store.get([key(1), key(2)], out[::2, ::2]).result(30)
    np.testing.assert_array_equal(out, wide)


@holding_store
def test_records_is_a_picture_of_the_moment(store):
    put(store, 0, 1)
    seen = store.records()
    put(store, 2)
    store.delete([key(0)]).result(30)
    assert {r.key for _, r in seen} == {key(0), key(1)}


@every_store
def test_stats_count(store, case):
    put(store, 0, 1)
    get(store, 0, 7)
    store.delete([key(0), key(7)]).result(30)
    stats = store.stats()
    assert stats.pending == 0
    if case.holds:
        assert (stats.blocks, stats.capacity) == (1, 4)
        assert (stats.puts, stats.hits, stats.misses, stats.deletes, stats.refused) == (2, 1, 1, 1, 0)
    else:
        assert (stats.blocks, stats.capacity) == (0, 0)
        assert (stats.puts, stats.hits, stats.misses, stats.deletes, stats.refused) == (0, 0, 2, 0, 2)
    assert (stats.corrupt, stats.failed) == (0, 0)


@every_store
def test_empty_calls(store):
    nothing = np.zeros((0, BLOCK_BYTES), np.uint8)
    assert store.put([], nothing).result(30) == store.get([], nothing).result(30) == ()
    assert store.delete([]).result(30) == store.contains([]) == ()


@every_store
def test_futures_are_done_after_their_result_and_call_back(store):
    future = store.put([record(1)], blocks(1))
    future.result(30)
    seen = []
    future.add_done_callback(seen.append)
    assert future.done()
    assert not future.cancel()
    assert not future.cancelled()
    assert seen == [future]


@every_store
@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((1, BLOCK_BYTES), np.uint8),
        np.zeros((2, BLOCK_BYTES - 1), np.uint8),
        np.zeros((2, BLOCK_BYTES), np.int8),
        np.zeros(2 * BLOCK_BYTES, np.uint8),
    ],
)
def test_buffers_of_the_wrong_shape_raise_from_the_call(store, wrong):
    with pytest.raises(LayoutError, match=rf"uint8\[2, {BLOCK_BYTES}\]"):
        store.put([record(0), record(1)], wrong)
    with pytest.raises(LayoutError, match=rf"uint8\[2, {BLOCK_BYTES}\]"):
        store.get([key(0), key(1)], wrong)


@every_store
def test_reading_into_a_read_only_buffer_raises(store):
    out = np.zeros((1, BLOCK_BYTES), np.uint8)
    out.flags.writeable = False
    with pytest.raises(LayoutError, match="read-only"):
        store.get([key(0)], out)


@every_store
def test_a_closed_store_refuses_every_call_and_closes_again(store):
    put(store, 1)
    store.close()
    store.close()
    out = np.zeros((1, BLOCK_BYTES), np.uint8)
    for call in (
        lambda: store.put([record(2)], out),
        lambda: store.get([key(1)], out),
        lambda: store.delete([key(1)]),
        lambda: store.contains([key(1)]),
        store.records,
    ):
        with pytest.raises(BlockStateError, match="closed"):
            call()


@every_store
def test_tier_and_block_size_are_told(store):
    assert store.tier in set(Tier)
    assert store.block_bytes == BLOCK_BYTES


@holding_store
def test_calls_from_many_threads_keep_every_block_whole(store):
    keys = range(3)
    faults = []

    def work(seed):
        order = np.random.default_rng(seed)
        for number in order.integers(0, len(keys), 200).tolist():
            match order.integers(3):
                case 0:
                    put(store, number)
                case 1:
                    store.delete([key(number)]).result(30)
                case _:
                    rows, out = get(store, number)
                    if rows[0].outcome is Outcome.OK and not np.array_equal(out[0], block(number)):
                        faults.append(number)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not faults
    held = [block_id for block_id, _ in store.records()]
    assert len(held) == len(set(held)) == store.stats().blocks


@holding_store
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "get", "delete"]), st.lists(st.integers(0, 6), max_size=4)),
        max_size=12,
    )
)
def test_a_store_is_a_bounded_dict(case, tmp_path_factory, steps):
    store = case.open(tmp_path_factory.mktemp("store"), BLOCK_BYTES, 4)
    model = {}
    for verb, numbers in steps:
        if not numbers:
            continue
        if verb == "put":
            for number, row in zip(numbers, put(store, *numbers), strict=True):
                expected = Outcome.PRESENT if number in model else Outcome.OK
                assert row.outcome is (Outcome.REFUSED if number not in model and len(model) == 4 else expected)
                if row.outcome is not Outcome.REFUSED:
                    assert model.setdefault(number, row.block_id) == row.block_id
        elif verb == "get":
            rows, out = get(store, *numbers)
            for number, row, data in zip(numbers, rows, out, strict=True):
                assert row.outcome is (Outcome.OK if number in model else Outcome.MISS)
                if number in model:
                    assert (row.block_id, row.record) == (model[number], record(number))
                    np.testing.assert_array_equal(data, block(number))
        else:
            rows = store.delete([key(n) for n in numbers]).result(30)
            for number, row in zip(numbers, rows, strict=True):
                assert row.outcome is (Outcome.OK if number in model else Outcome.MISS)
                assert row.block_id == model.pop(number, None)
        assert sorted(model.values()) == sorted(block_id for block_id, _ in store.records())
        assert len(set(model.values())) == len(model)
    store.close()


def test_memory_stores_check_their_sizes():
    with pytest.raises(ConfigError, match="block_bytes = 0"):
        MemoryBlockStore(0)
    with pytest.raises(ConfigError, match="capacity = -1"):
        MemoryBlockStore(8, capacity=-1)
