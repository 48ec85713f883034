"""The manager, with real state and a cache small enough to read: what servers call, and what the world is told."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvbm_jax
from kvbm_jax import BlockManager, KvBlockManagerConfig, Status, block_pool, grants, invariants
from kvbm_jax import index as block_index
from kvbm_jax.errors import (
    BlockStateError,
    CacheLostError,
    ConfigError,
    HashingError,
    LayoutError,
    OutOfBlocksError,
    SequenceTooLongError,
)
from kvbm_jax.events import EventType, KvEvent
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.protocols import Tier

pytestmark = pytest.mark.core

SIZE = 4


def make(num_blocks=8, max_sequences=2, metrics=None, **config):
    return BlockManager(
        KvBlockManagerConfig(
            block_size=SIZE, num_blocks=num_blocks, num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32", **config
        ),
        max_sequences=max_sequences,
        metrics=metrics,
    )


@pytest.fixture
def manager():
    """A manager whose pool keeps its laws to the end of the test."""
    with make() as owner:
        yield owner
        invariants.assert_holds(owner._device.pool._pool)


def prompt(length, first=0):
    return list(range(first, first + length))


def drain(subscription):
    return [event for batch in subscription.drain() for event in batch]


def test_a_prefix_is_found_once_it_is_registered(manager):
    first = manager.start(prompt(10))
    assert first.num_cached == 0
    assert manager.match(prompt(10)) == 0
    assert manager.register(first) == 2
    assert manager.register(first) == 0
    assert manager.match(prompt(10)) == 8
    second = manager.start(prompt(10))
    assert second.num_cached == 8
    assert manager._device.pool.table(second.row)[:2].tolist() == manager._device.pool.table(first.row)[:2].tolist()
    manager.release(first)
    manager.release(second)
    assert manager.stats() == (6, 2, 0)


def test_the_last_token_of_a_cached_prompt_is_computed(manager):
    with manager.start(prompt(8)) as seq:
        manager.register(seq)
    with manager.start(prompt(8)) as seq:
        assert seq.num_cached == 4


def test_only_computed_blocks_are_registered(manager):
    with manager.start(prompt(12)) as seq:
        assert manager.register(seq, 7) == 1
        assert manager.match(prompt(12)) == 4
        with pytest.raises(BlockStateError, match="13 tokens cannot be computed in a sequence that has 12 slots"):
            manager.register(seq, 13)


def test_equal_blocks_computed_twice_become_one(manager):
    one, two = manager.start(prompt(9)), manager.start(prompt(9))
    assert manager.register(one) == 2
    assert manager.register(two) == 0
    assert manager._device.pool.table(one.row)[:2].tolist() == manager._device.pool.table(two.row)[:2].tolist()
    manager.release(one)
    manager.release(two)
    assert manager.stats() == (6, 2, 0)


def test_salt_and_lora_keep_prefixes_apart(manager):
    with manager.start(prompt(8), salt="a", lora_name="x") as seq:
        manager.register(seq)
    assert manager.match(prompt(8), salt="a", lora_name="x") == 8
    assert manager.match(prompt(8), salt="b", lora_name="x") == 0
    assert manager.match(prompt(8), salt="a") == 0


def test_events_tell_every_change_in_order(manager):
    events = manager.subscribe_events()
    with manager.start(prompt(9), lora_name="x") as seq:
        manager.register(seq)
    created = drain(events)
    hashes = hash_sequence(prompt(8), SIZE, lora_name="x")
    assert [e.event_type for e in created] == [EventType.CREATED] * 2
    assert [e.sequence_hash for e in created] == [h.tobytes() for h in hashes]
    assert [e.parent_hash for e in created] == [None, hashes[0].tobytes()]
    assert [e.token_ids for e in created] == [(0, 1, 2, 3), (4, 5, 6, 7)]
    assert {(e.tier, e.block_size, e.worker_id, e.lora_name) for e in created} == {(Tier.G1, SIZE, "0", "x")}

    with manager.start(prompt(32, 100)) as seq:
        gone = drain(events)
        assert [e.event_type for e in gone] == [EventType.DELETED] * 2
        # The tail of a sequence dies before its prefix.
        assert [e.sequence_hash for e in gone] == [hashes[1].tobytes(), hashes[0].tobytes()]
        assert [e.block_id for e in gone] == [created[1].block_id, created[0].block_id]
        manager.register(seq)
    assert manager.clear() == 8
    rest = drain(events)
    assert [e.event_type for e in rest] == [EventType.CREATED] * 8 + [EventType.DELETED] * 8
    assert [e.event_id for e in created + gone + rest] == list(range(20))
    assert manager.stats() == (8, 0, 0)


def test_an_event_of_the_caller_is_numbered_and_published(manager):
    events = manager.subscribe_events()
    manager.publish_event(KvEvent(EventType.CREATED, 3, "0", 7, {"note": "mine"}, block_size=SIZE, tier=Tier.G1))
    [event] = drain(events)
    assert (event.event_id, event.metadata) == (0, {"note": "mine"})
    manager.close()
    assert list(events) == []


def test_running_out_of_blocks_holds_nothing(manager):
    with manager.start(prompt(20)):
        before = manager.stats()
        with pytest.raises(OutOfBlocksError, match="of 8, 3 are free, 0 cached and not in use, 5 held"):
            manager.start(prompt(16, 50))
        assert manager.stats() == before


def test_limits_are_said(manager):
    with pytest.raises(SequenceTooLongError, match=r"a prompt of 33 tokens; between 1 and 32 fit"):
        manager.start(prompt(33))
    with pytest.raises(SequenceTooLongError, match="a prompt of 0 tokens"):
        manager.start([])
    with (
        manager.start(prompt(1)),
        manager.start(prompt(1)),
        pytest.raises(BlockStateError, match="2 sequences are run"),
    ):
        manager.start(prompt(1))


def test_a_double_release_is_an_error(manager):
    seq = manager.start(prompt(3))
    manager.release(seq)
    with pytest.raises(BlockStateError, match="is not running"):
        manager.release(seq)
    with manager.start(prompt(3)):
        pass
    assert manager.stats().held == 0


def test_extend_step_by_step(manager):
    with manager.start(prompt(3)) as one, manager.start(prompt(8, 50)) as two:
        manager.extend({one: [3, 4], two: [58]})
        assert one.tokens == prompt(5)
        assert manager._device.pool.length(one.row) == 5
        assert len(manager._device.pool.table(one.row)) == 2
        assert len(manager._device.pool.table(two.row)) == 3
        manager.register(one)
        with pytest.raises(OutOfBlocksError):
            manager.extend({one: prompt(16, 5)})
        assert one.tokens == prompt(5)
        assert manager.match(prompt(4)) == 4


def test_a_step_is_register_release_and_extend_in_one():
    """Two managers, one driven by steps and one verb by verb, agree on everything at each step."""
    rng = np.random.default_rng(0)
    with make(24, 4) as fused, make(24, 4) as apart:
        told = [manager.subscribe_events() for manager in (fused, apart)]
        pairs = []
        for now in range(60):
            while len(pairs) < 4 and rng.random() < 0.7:
                tokens = prompt(int(rng.integers(1, 14)), first=100 * int(rng.integers(0, 3)))
                pairs.append((fused.start(tokens), apart.start(tokens)))
            if pairs and rng.random() < 0.15 and len(pairs) < 4:
                pairs.append(tuple(m.fork(s) for m, s in zip((fused, apart), pairs[0], strict=True)))
            ending = [pair for pair in pairs if rng.random() < 0.2 or len(pair[0].tokens) > 20]
            pairs = sorted(
                (pair for pair in pairs if pair not in ending), key=lambda pair: pair[0].row
            )  # as `extend` goes
            new = [[int(rng.integers(0, 2))] * int(rng.integers(0, 4)) for _ in pairs]
            found = fused.step(
                {pair[0]: tokens for pair, tokens in zip(pairs, new, strict=True)}, ending=[pair[0] for pair in ending]
            )
            for _, seq in ending:
                apart.register(seq)
            computed = [len(seq.tokens) for _, seq in pairs]
            for _, seq in ending:
                apart.release(seq)
            apart.extend({pair[1]: tokens for pair, tokens in zip(pairs, new, strict=True)})
            registered = [apart.register(pair[1], n) for pair, n in zip(pairs, computed, strict=True)]
            assert list(found.values()) == registered
            assert fused.stats() == apart.stats(), now
            for one, other in pairs:
                assert one.tokens == other.tokens
                assert one.num_registered == other.num_registered
                np.testing.assert_array_equal(fused._device.pool.table(one.row), apart._device.pool.table(other.row))
            invariants.assert_holds(fused._device.pool._pool)
            first, second = ([(e.event_type, e.block_id, e.sequence_hash) for e in drain(t)] for t in told)
            assert sorted(first) == sorted(second)


def test_a_step_refuses_what_cannot_be(manager):
    one, two = manager.start(prompt(5)), manager.start(prompt(6, first=50))
    with pytest.raises(BlockStateError, match="named twice"):
        manager.step({one: [1]}, ending=[one])
    with pytest.raises(HashingError):
        manager.step({one: [1], two: [-1]})
    with pytest.raises(SequenceTooLongError):
        manager.step({one: [1], two: [1] * 40})
    with pytest.raises(OutOfBlocksError):
        manager.step({one: [1] * 8, two: [1] * 16})
    assert [len(seq.tokens) for seq in (one, two)] == [13, 6]
    assert manager.step({one: []}, ending=[two]) == {one: 2}
    with pytest.raises(BlockStateError, match="not running"):
        manager.step({two: [1]})
    assert manager.match(prompt(6, first=50)) == 4


def test_a_compiled_loop_draws_on_a_grant(manager):
    @jax.jit
    def loop(running, grant, counts):
        def step(carry, _):
            running, grant, status = grants.extend(*carry, counts)
            return (running, grant), status

        return jax.lax.scan(step, (running, grant), length=6)

    with manager.start(prompt(6)) as seq:
        grant = manager.reserve({seq: 10}, max_blocks=4)
        assert manager.stats().held == 4
        (running, grant), status = loop(manager.sequences, grant, jnp.array([1, 0], jnp.int32))
        assert np.all(np.asarray(status) == Status.OK)
        manager.commit(grant, running, {seq: prompt(6, 6)})
        assert seq.tokens == prompt(12)
        assert manager.stats().held == 3
        assert manager.match(prompt(12)) == 12


def test_a_grant_whose_loop_did_not_run_goes_back(manager):
    with manager.start(prompt(6)) as seq:
        grant = manager.reserve({seq: 10})
        assert manager.stats().held == 4
        manager.give_back(grant)
        assert manager.stats().held == 2


def test_a_commit_names_every_token(manager):
    with manager.start(prompt(6)) as seq:
        grant = manager.reserve({seq: 4})
        running, grant, _ = grants.extend(manager.sequences, grant, jnp.array([4, 0], jnp.int32), max_blocks=2)
        with pytest.raises(BlockStateError, match="row 0 has 10 slots for 6 tokens and 3 new ones"):
            manager.commit(grant, running, {seq: prompt(3, 6)})
        manager.commit(grant, running, {seq: prompt(4, 6)})
        assert manager.match(prompt(10)) == 8


def test_a_grant_is_spent_once(manager):
    with manager.start(prompt(6)) as seq:
        grant = manager.reserve({seq: 2})
        running, grant, _ = grants.extend(manager.sequences, grant, jnp.array([2, 0], jnp.int32))
        manager.commit(grant, running, {seq: prompt(2, 6)})
        for spend in (lambda: manager.commit(grant, running, {}), lambda: manager.give_back(grant)):
            with pytest.raises(BlockStateError, match="the grant is spent"):
                spend()


def test_a_grant_serves_only_the_sequences_it_was_reserved_for(manager):
    with manager.start(prompt(6)) as one, manager.start(prompt(6, 50)) as two:
        grant = manager.reserve({one: 2})
        with pytest.raises(BlockStateError, match="the grant was not reserved for the sequence of row 1"):
            manager.commit(grant, manager.sequences, {one: [], two: []})
        manager.give_back(grant)  # it was not spent by that
        with pytest.raises(SequenceTooLongError, match="1000 tokens more than 6 need 252 blocks"):
            manager.reserve({one: 1000})


def test_sequences_may_begin_and_end_while_a_loop_runs(manager):
    one, two = manager.start(prompt(6)), manager.start(prompt(4, 50))
    grant = manager.reserve({one: 4})
    before = manager.sequences
    manager.release(two)
    three = manager.start(prompt(9, 100))
    table = manager._device.pool.table(three.row)
    running, grant, _ = grants.extend(before, grant, jnp.array([4, 0], jnp.int32), max_blocks=2)
    manager.commit(grant, running, {one: prompt(4, 6)})
    assert manager._device.pool.table(three.row).tolist() == table.tolist()
    manager.release(one)
    manager.release(three)
    assert manager.stats().held == 0


def test_a_sequence_may_end_while_its_loop_runs(manager):
    seq = manager.start(prompt(6))
    grant = manager.reserve({seq: 6})
    running, grant, _ = grants.extend(manager.sequences, grant, jnp.array([6, 0], jnp.int32), max_blocks=2)
    manager.release(seq)
    manager.commit(grant, running, {})
    assert manager.stats() == (8, 0, 0)


def test_bad_tokens_change_nothing(manager):
    with manager.start(prompt(3)) as seq:
        with pytest.raises(HashingError, match="-1 at position 0"):
            manager.extend({seq: [-1]})
        assert (manager._device.pool.length(seq.row), seq.tokens) == (3, prompt(3))
        grant = manager.reserve({seq: 1})
        running, grant, _ = grants.extend(manager.sequences, grant, jnp.array([1, 0], jnp.int32))
        with pytest.raises(HashingError):
            manager.commit(grant, running, {seq: ["x"]})
        manager.commit(grant, running, {seq: [3]})
        assert manager.match(prompt(4)) == 4


def test_a_grant_has_bounds(manager):
    with manager.start(prompt(6)) as seq:
        with pytest.raises(ConfigError, match="max_blocks is 1, but the growth asked for needs 2 blocks"):
            manager.reserve({seq: 10}, max_blocks=1)
        with pytest.raises(SequenceTooLongError, match="a sequence has at most 8"):
            manager.reserve({seq: 27})


def test_blocks_outside_sequences(manager):
    blocks = manager.allocate_blocks(3)
    data = np.arange(2 * SIZE * 2, dtype=np.float32).reshape(2, SIZE, 1, 2)
    manager.store_kv(blocks[1], 1, data)
    np.testing.assert_array_equal(manager.load_kv(blocks[1], 1), data)
    np.testing.assert_array_equal(manager.load_kv(blocks[1], 0), np.zeros_like(data))
    with pytest.raises(LayoutError, match=r"\[C, T, H, D\] = \[2, 4, 1, 2\]"):
        manager.store_kv(blocks[1], 1, data[:, :3])
    with pytest.raises(LayoutError, match="layer is 2; the cache has layers 0 to 1"):
        manager.load_kv(blocks[1], 2)
    with pytest.raises(BlockStateError, match="named twice"):
        manager.free_blocks([blocks[0], blocks[0]])
    manager.free_blocks(blocks)
    with pytest.raises(BlockStateError, match="does not hold it"):
        manager.free_blocks(blocks[:1])
    with manager.allocate_blocks(1)[0] as again:
        stale = next(block for block in blocks if block.block_id == again.block_id)
        with pytest.raises(BlockStateError, match="older than its block's present use"):
            manager.load_kv(stale, 0)
        manager.free_blocks([again])
    assert manager.stats() == (8, 0, 0)
    with pytest.raises(OutOfBlocksError):
        manager.allocate_blocks(9)
    assert manager.allocate_blocks(0) == []


def test_a_step_that_fails_before_donation_changes_nothing(manager):
    def broken(cache):
        raise RuntimeError("no luck")

    with manager.start(prompt(8)) as seq:
        manager.register(seq)
        with pytest.raises(RuntimeError, match="no luck"):
            manager.run(broken)
        assert manager.match(prompt(8)) == 8


def test_a_step_that_fails_after_donation_loses_the_cache_and_says_so(manager):
    eat = jax.jit(lambda cache: (cache, None), donate_argnums=0)

    def broken(cache):
        eat(cache)
        raise RuntimeError("no luck")

    events = manager.subscribe_events()
    [block] = manager.allocate_blocks(1)
    seq = manager.start(prompt(8))
    manager.register(seq)
    with pytest.raises(CacheLostError, match="no luck"):
        manager.run(broken)
    assert [e.event_type for e in drain(events)] == [EventType.CREATED] * 2 + [EventType.CLEARED]
    assert seq.released
    with manager.allocate_blocks(1)[0] as again:
        assert (again.block_id, again.generation) == (block.block_id, block.generation)
        block.free()
        with pytest.raises(BlockStateError, match="of another manager, or was lost"):
            manager.load_kv(block, 0)
        assert manager.stats().held == 1
    with pytest.raises(BlockStateError, match="is not running"):
        manager.register(seq)
    with manager.start(prompt(8)) as seq:
        assert seq.num_cached == 0
        assert manager.register(seq) == 2


def test_events_can_be_switched_off():
    with make(events="none") as manager:
        events = manager.subscribe_events()
        with manager.start(prompt(8)) as seq:
            manager.register(seq)
        assert events.poll() is None


def test_the_sequences_handed_out_may_be_donated(manager):
    with manager.start(prompt(8)):
        jax.jit(lambda running: running.lengths + 1, donate_argnums=0)(manager.sequences)
    assert manager.stats().held == 0


def test_the_bound_of_a_sequence_counts_tokens():
    config = KvBlockManagerConfig(
        block_size=SIZE, num_blocks=8, num_layers=1, num_kv_heads=1, head_dim=2, dtype="float32"
    )
    with BlockManager(config, max_sequence_tokens=10) as manager:
        with pytest.raises(SequenceTooLongError, match="between 1 and 10 fit"):
            manager.start(prompt(11))
        manager.start(prompt(10)).release()


def test_metrics_follow():
    metrics = InMemoryMetrics()
    with make(metrics=metrics) as manager:
        with manager.start(prompt(9)) as seq:
            manager.register(seq)
        with manager.start(prompt(9)):
            found = metrics.snapshot()
            assert found['kvbm_blocks_allocated{tier="g1"}'] == 3
            assert found['kvbm_blocks_free{tier="g1"}'] == 5
        with manager.start(prompt(32, 50)):
            pass
        found = metrics.snapshot()
    assert found["kvbm_prefix_query_tokens_total"] == 9 + 9 + 32
    assert found['kvbm_prefix_hit_tokens_total{tier="g1"}'] == 8
    assert found["kvbm_eviction_count_total"] == 2
    assert found["kvbm_events_published_total"] == 4
    assert found["kvbm_allocation_latency_seconds"].count == 3


def test_a_metrics_sink_that_breaks_changes_nothing(caplog):
    class Broken:
        def count(self, *args, **labels):
            raise OSError("no room for this number")

        gauge = observe = count

    with make(metrics=Broken()) as manager:
        with manager.start(prompt(9)) as seq:
            assert manager.register(seq) == 2
        assert manager.stats() == (6, 2, 0)
    assert "the metrics sink failed on kvbm_blocks_allocated" in caplog.text


@pytest.mark.parametrize("verb", ["start", "register", "release", "reserve", "allocate"])
def test_an_interrupt_within_a_call_leaves_the_manager_empty_and_usable(verb, monkeypatch):
    """Ctrl-C between the end of a donating program and the assignment of its result."""
    with make() as manager:
        seq = manager.start(prompt(9))
        events = manager.subscribe_events()
        original = getattr(block_pool.BlockPool, verb)

        def interrupted(book, *args, **kwargs):
            original(book, *args, **kwargs)
            for leaf in jax.tree.leaves(book._pool):
                leaf.delete()
            raise KeyboardInterrupt

        monkeypatch.setattr(block_pool.BlockPool, verb, interrupted)
        calls = {
            "start": lambda: manager.start(prompt(5)),
            "register": lambda: manager.register(seq),
            "release": lambda: manager.release(seq),
            "reserve": lambda: manager.reserve({seq: 5}),
            "allocate": lambda: manager.allocate_blocks(2),
        }
        with pytest.raises(KeyboardInterrupt):
            calls[verb]()
        monkeypatch.undo()
        assert seq.released
        assert [event.event_type for event in drain(events)] == [EventType.CLEARED]
        assert manager.stats() == (8, 0, 0)
        with manager.start(prompt(9)) as again:
            assert manager.register(again) == 2
        invariants.assert_holds(manager._device.pool._pool)


def test_a_step_must_return_the_cache_first(manager):
    for step in (lambda cache: (1, cache), lambda cache: (None, None)):
        with pytest.raises(LayoutError, match="it must return the cache"):
            manager.run(step)
    donating = jax.jit(lambda cache: (1, cache), donate_argnums=0)
    with pytest.raises(CacheLostError, match="it must return the cache"):
        manager.run(donating)
    assert manager.run(lambda cache: (cache, 5)) == 5


def test_growth_is_not_negative(manager):
    with manager.start(prompt(5)) as seq, pytest.raises(ConfigError, match="cannot grow by -3 tokens"):
        manager.reserve({seq: -3})


def test_a_cache_that_does_not_fit_the_device_is_refused_with_its_size():
    with pytest.raises(ConfigError, match=r"num_blocks = 400,000,000: a cache of .* does not fit the device"):
        BlockManager(
            KvBlockManagerConfig(block_size=4, num_blocks=400_000_000, num_layers=9, num_kv_heads=99, head_dim=512)
        )


def test_the_queue_is_compacted_in_time():
    """A pool of few blocks lives through many times the pushes its queue has room for."""
    with make(num_blocks=4, max_sequences=1) as manager:
        for turn in range(700):
            with manager.start(prompt(13, 100 * (turn % 3))) as seq:
                manager.register(seq)
        assert manager.stats() == (1, 3, 0)
        invariants.assert_holds(manager._device.pool._pool)


def test_an_index_that_refuses_is_rehashed():
    """Prompts chosen so that 17 hashes share both sets of the index: the 17th finds them full."""
    with make(num_blocks=64, max_sequences=1) as manager:
        sets = manager._device.pool._pool.index.table.shape[0]
        hashes = {first: hash_sequence(prompt(SIZE, first), SIZE)[0] for first in range(0, 40_000, 7)}
        keys = jnp.asarray(np.array([[*h, 0] for h in hashes.values()], np.uint32))
        a, b = np.asarray(block_index._mix(keys.T, jnp.uint32(0), sets)[0])
        pairs, counts = np.unique(np.sort(np.stack([a, b]), axis=0), axis=1, return_counts=True)
        busiest = pairs[:, np.argmax(counts)]
        mates = [f for f, x, y in zip(hashes, a, b, strict=True) if sorted((x, y)) == sorted(busiest)][:20]
        assert len(mates) == 20
        for first in mates:
            with manager.start(prompt(SIZE, first)) as seq:
                assert manager.register(seq) == 1
        assert all(manager.match(prompt(SIZE, first)) == SIZE for first in mates)
        assert manager._device.pool._seed > 0
        invariants.assert_holds(manager._device.pool._pool)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None}, "num_layers unset"),
        ({"enable_offload": True}, "model_id is unset"),
        ({"num_blocks": None}, "reports no memory limit"),
    ],
)
def test_what_cannot_be_served_is_refused(changes, message):
    values = {"block_size": SIZE, "num_blocks": 8, "num_layers": 2, "num_kv_heads": 1, "head_dim": 2}
    with pytest.raises(ConfigError, match=message):
        BlockManager(KvBlockManagerConfig(**(values | changes)))


def test_host_names_are_loaded_when_asked_for():
    assert kvbm_jax.BlockManager is BlockManager
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        kvbm_jax.Nothing  # noqa: B018
