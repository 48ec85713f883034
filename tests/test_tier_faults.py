"""What may fail below the device: whatever does, policy, stores and subscribers agree, and wrong bytes reach nobody."""

import pytest
from tiered import (
    BLOCK_BYTES,
    HOST,
    SIZE,
    Faulty,
    View,
    assert_in_agreement,
    believed,
    disk,
    make,
    prompt,
    serve,
    settle,
)

from kvbm_jax import invariants
from kvbm_jax.errors import BlockStateError, CacheLostError, OutOfBlocksError
from kvbm_jax.hashing import hash_bytes, hash_sequence
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.offload import MemoryBlockStore
from kvbm_jax.protocols import BlockKey, Tier


@pytest.fixture
def faulty():
    return {
        tier: Faulty(MemoryBlockStore(BLOCK_BYTES, capacity=blocks, tier=tier))
        for tier, blocks in ((Tier.G2, 8), (Tier.G3, 40))
    }


@pytest.mark.parametrize("tier", [Tier.G2, Tier.G3])
def test_a_failed_put_is_a_miss_later_and_counted(faulty, tier):
    metrics = InMemoryMetrics()
    with make(7, stores=list(faulty.values()), metrics=metrics) as manager:
        events, view = manager.subscribe_events(), View()
        faulty[tier].fail_puts = True
        for first in (0, 1000, 2000, 3000):
            serve(manager, prompt(first, 6))
        settle(manager)
        faulty[tier].fail_puts = False
        for first in (4000, 5000, 6000, 0, 7000, 4000, 5000, 6000):
            serve(manager, prompt(first, 6))
            settle(manager)
        held = believed(events, view)
        for store in faulty.values():
            assert {record.key.sequence_hash for _, record in store.records()} == held[store.tier]
            assert manager._device.residency._engine._tiers.count(store.tier) == len(held[store.tier])
        assert sum(serve(manager, prompt(4000, 6)).values()) == 24
    failures = [value for name, value in metrics.snapshot().items() if "failures" in name]
    assert sum(failures) >= 8


def go_through(manager, faulty, monkeypatch, *fault):
    """Serves a crowd, in the middle of it with an attribute set to something faulty; all agree afterwards."""
    events, view = manager.subscribe_events(), View()
    for first in (0, 1000):
        serve(manager, prompt(first, 6))
    settle(manager)
    with monkeypatch.context() as patch:
        patch.setattr(*fault)
        serve(manager, prompt(2000, 6))
        settle(manager)
    for first in range(3000, 9000, 1000):
        serve(manager, prompt(first, 6))
    assert_in_agreement(manager, faulty.values(), events, view)


@pytest.mark.parametrize("fault", ["raise_once", "raise_late_once", "fail_gets", "forget_records"])
def test_a_fault_between_tiers_leaves_policy_stores_and_subscribers_in_agreement(faulty, fault, monkeypatch):
    with make(7, stores=list(faulty.values())) as manager:
        go_through(manager, faulty, monkeypatch, faulty[Tier.G2], fault, True)
        assert serve(manager, prompt(7000, 6))
        assert faulty[Tier.G2].stats().refused == 0


def test_a_device_that_fails_to_deliver_leaves_them_in_agreement_too(faulty, monkeypatch):
    def broken(array):
        raise RuntimeError("the device has fallen off the bus")

    with make(7, stores=list(faulty.values())) as manager:
        go_through(manager, faulty, monkeypatch, "kvbm_jax.offload.mover.rows_of_array", broken)


@pytest.mark.parametrize("late", [False, True])
def test_a_store_that_raises_on_the_way_up_is_a_miss(faulty, late):
    metrics = InMemoryMetrics()
    with make(7, stores=[faulty[Tier.G2]], metrics=metrics) as manager:
        events, view = manager.subscribe_events(), View()
        serve(manager, prompt(0, 6))
        serve(manager, prompt(1000, 6))
        settle(manager)
        setattr(faulty[Tier.G2], "raise_late_once" if late else "raise_once", True)
        assert serve(manager, prompt(0, 6)) == {}
        assert_in_agreement(manager, [faulty[Tier.G2]], events, view)
    assert metrics.snapshot()['kvbm_transfer_failures_total{source="g2",target="g1",reason="failed"}'] == 6


def test_a_store_that_has_less_room_than_it_said_goes_on_with_what_it_has(faulty):
    store = faulty[Tier.G3]
    store.room = 18
    with make(7, stores=[store]) as manager:
        events, view = manager.subscribe_events(), View()
        for first in range(0, 12_000, 1000):
            serve(manager, prompt(first, 6))
            settle(manager)
        assert_in_agreement(manager, [store], events, view)
        assert sum(serve(manager, prompt(9000, 6)).values()) == 24  # a late one is there


@pytest.mark.parametrize("where", ["gather", "bytes_for"])
def test_an_interrupt_while_offloading_leaves_them_in_agreement(faulty, monkeypatch, where):
    with make(7, stores=list(faulty.values())) as manager:
        events, view = manager.subscribe_events(), View()
        for first in (0, 1000, 2000):
            serve(manager, prompt(first, 6))

        def interrupted(*args):
            raise KeyboardInterrupt

        pointers = [array.unsafe_buffer_pointer() for array in manager.cache.arrays]
        monkeypatch.setattr(f"kvbm_jax.offload.staging.StagingRing.{where}", interrupted)
        with pytest.raises(KeyboardInterrupt):
            manager.start(prompt(3000, 6))
        monkeypatch.undo()
        assert manager.stats() == (7, 0, 0)
        assert [array.unsafe_buffer_pointer() for array in manager.cache.arrays] == pointers
        for first in range(4000, 9000, 1000):
            serve(manager, prompt(first, 6))
        assert_in_agreement(manager, faulty.values(), events, view)


def test_a_start_that_cannot_fit_reads_nothing(faulty):
    with make(8, max_sequences=2, stores=[faulty[Tier.G2]]) as manager:
        serve(manager, prompt(0, 7))
        serve(manager, prompt(1000, 7))
        settle(manager)
        before = faulty[Tier.G2].stats().hits
        with manager.start(prompt(2000, 3)), pytest.raises(OutOfBlocksError):
            manager.start(prompt(0, 7))
        assert faulty[Tier.G2].stats().hits == before


def test_closing_that_is_interrupted_still_closes(tmp_path, monkeypatch):
    manager = make(7, **disk(tmp_path))
    events = manager.subscribe_events()
    serve(manager, prompt(0, 6))

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("kvbm_jax.offload.engine.OffloadEngine.flush", interrupted)
    with pytest.raises(KeyboardInterrupt):
        manager.close()
    monkeypatch.undo()
    manager.close()
    assert len(list(events)) >= 1  # the stream has an end
    with make(7, **disk(tmp_path)) as manager:  # and the folder is free
        assert serve(manager, prompt(0, 6)) == {}


def test_a_closed_manager_says_so_and_lets_sequences_go(faulty):
    manager = make(16, max_sequences=2, stores=[faulty[Tier.G2]])
    with manager.start(prompt(0, 2)) as seq:
        manager.close()
        for call in (
            lambda: manager.start(prompt(0, 2)),
            lambda: manager.extend({seq: [1]}),
            lambda: manager.reserve({seq: 1}),
            lambda: manager.fork(seq),
            lambda: manager.allocate_blocks(1),
            manager.flush,
            manager.clear,
        ):
            with pytest.raises(BlockStateError, match="the manager is closed"):
                call()
    assert seq.released


def test_a_failed_read_is_a_miss_and_forgotten(faulty):
    metrics = InMemoryMetrics()
    with make(7, stores=[faulty[Tier.G2]], metrics=metrics) as manager:
        serve(manager, prompt(0, 6))
        serve(manager, prompt(1000, 6))
        settle(manager)
        faulty[Tier.G2].fail_gets = True
        assert serve(manager, prompt(0, 6)) == {}
        faulty[Tier.G2].fail_gets = False
        settle(manager)
        invariants.assert_holds(manager._device.pool._pool)
        assert manager.stats().held == 0
    assert metrics.snapshot()['kvbm_transfer_failures_total{source="g2",target="g1",reason="failed"}'] == 6


def test_a_block_that_fails_in_one_tier_is_read_from_the_next():
    stores = [MemoryBlockStore(BLOCK_BYTES, capacity=20, tier=tier) for tier in (Tier.G2, Tier.G3)]
    with make(7, stores=stores) as manager:
        serve(manager, prompt(0, 6))
        serve(manager, prompt(1000, 6))
        manager.flush()
        gone = BlockKey(hash_bytes(hash_sequence(prompt(0, 6), SIZE)[2]))
        stores[0].delete([gone])
        assert serve(manager, prompt(0, 6)) == {Tier.G2: 20, Tier.G3: 4}


def test_a_disk_that_lies_is_a_counted_miss_and_a_recomputation(tmp_path, caplog):
    """A byte flipped in every file of the folder, in the middle and at the end; then a file cut short."""

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 0x40
        data[-1] ^= 1
        path.write_bytes(data)

    prompts = [prompt(first, 6) for first in range(0, 4000, 1000)]
    for damage in (flip, lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])):
        with make(32, **disk(tmp_path)) as manager:
            for tokens in prompts:
                serve(manager, tokens)
        for path in [path for path in tmp_path.rglob("*") if path.is_file() and path.stat().st_size]:
            damage(path)
        metrics = InMemoryMetrics()
        with make(32, metrics=metrics, **disk(tmp_path)) as manager:
            unreadable = manager.tier_stats()[Tier.G3].unreadable
            for tokens in prompts:
                serve(manager, tokens)  # right contents, wherever they come from
            failures = sum(value for name, value in metrics.snapshot().items() if "failures" in name)
            assert unreadable or failures
            settle(manager)
    assert "seg-" in caplog.text


def test_corrupt_host_memory_never_reaches_the_device():
    metrics = InMemoryMetrics()
    with make(7, metrics=metrics, host_blocks=20, **HOST) as manager:
        serve(manager, prompt(0, 6))
        serve(manager, prompt(1000, 6))
        settle(manager)
        store = manager._device.residency._engine._stores[Tier.G2]
        numbers = {record.key.sequence_hash: block_id for block_id, record in store.records()}
        third = numbers[hash_bytes(hash_sequence(prompt(0, 6), SIZE)[3])]
        store.slots[third, 5] ^= 1
        assert serve(manager, prompt(0, 6)) == {Tier.G2: 12}
        serve(manager, prompt(1000, 6))
        settle(manager)
        assert serve(manager, prompt(0, 6)) == {Tier.G2: 24}
    assert metrics.snapshot()['kvbm_transfer_failures_total{source="g2",target="g1",reason="corrupt"}'] == 1


def test_blocks_on_their_way_to_a_slow_disk_are_served_from_memory(faulty):
    with make(7, stores=[faulty[Tier.G3]]) as manager:
        events, view = manager.subscribe_events(), View()
        faulty[Tier.G3].gate.clear()
        serve(manager, prompt(0, 6))
        serve(manager, prompt(1000, 6))  # 0 is on its way, and stays there
        assert serve(manager, prompt(0, 6)) == {Tier.G3: 24}
        assert len(believed(events, view)[Tier.G1]) == 12  # 1000's claim stands until it is down
        faulty[Tier.G3].gate.set()
        settle(manager)
        held = believed(events, view)
        assert (len(held[Tier.G1]), len(held[Tier.G3])) == (6, 12)


def test_too_much_in_flight_drops_offloads_and_counts_them(faulty):
    metrics = InMemoryMetrics()
    with make(7, stores=[faulty[Tier.G3]], metrics=metrics) as manager:
        events, view = manager.subscribe_events(), View()
        manager._device.residency._engine._max_bytes = 40 * BLOCK_BYTES
        faulty[Tier.G3].gate.clear()
        for first in range(0, 10_000, 1000):
            serve(manager, prompt(first, 6))
        assert metrics.snapshot()["kvbm_offload_dropped_blocks_total"] >= 30
        assert 0 < metrics.snapshot()["kvbm_transfer_in_flight_bytes"] <= 80 * BLOCK_BYTES
        faulty[Tier.G3].gate.set()
        settle(manager)
        held = believed(events, view)
        assert held[Tier.G3] == {record.key.sequence_hash for _, record in faulty[Tier.G3].records()}
        assert len(held[Tier.G1]) == 6
        assert serve(manager, prompt(0, 6)) == {Tier.G3: 24}


def test_a_hung_disk_does_not_hold_up_the_host_tier():
    host = MemoryBlockStore(BLOCK_BYTES, capacity=12, tier=Tier.G2)
    hung = Faulty(MemoryBlockStore(BLOCK_BYTES, capacity=200, tier=Tier.G3))
    metrics = InMemoryMetrics()
    with make(7, stores=[host, hung], metrics=metrics) as manager:
        events, view = manager.subscribe_events(), View()
        manager._device.residency._engine._max_bytes = 64 * BLOCK_BYTES
        hung.gate.clear()
        for first in range(0, 20_000, 1000):
            serve(manager, prompt(first, 6))
            manager._device.residency._engine._mover.settle()
        assert serve(manager, prompt(18_000, 6)) == {Tier.G2: 24}
        found = metrics.snapshot()
        assert found["kvbm_offload_dropped_blocks_total"] > 30
        assert found["kvbm_transfer_in_flight_bytes"] <= 64 * BLOCK_BYTES
        hung.gate.set()
        assert_in_agreement(manager, [host, hung], events, view)


def test_a_flush_ends_at_its_deadline(faulty):
    manager = make(16, stores=[faulty[Tier.G3]])
    faulty[Tier.G3].gate.clear()
    serve(manager, prompt(0, 6))
    assert manager.flush(0.05) == (0, 0, 6)
    faulty[Tier.G3].gate.set()
    settle(manager)
    assert manager.flush() == (0, 0, 0)
    manager.close()
    manager.close()


def test_a_lost_cache_leaves_the_tiers_below(faulty):
    with make(7, stores=[faulty[Tier.G2]]) as manager:
        serve(manager, prompt(0, 6))
        serve(manager, prompt(1000, 6))

        def destroy(cache):
            for array in cache.arrays:
                array.delete()
            raise RuntimeError("out of memory")

        with pytest.raises(CacheLostError):
            manager.run(destroy)
        assert serve(manager, prompt(1000, 6)) == {}
        assert serve(manager, prompt(0, 6)) == {Tier.G2: 24}
