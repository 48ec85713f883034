"""What an operator does to a manager: pins hold, resets forget, evictions go down; running sequences never notice."""

import dataclasses
import threading
import time

import pytest

from kvbm_jax import invariants
from kvbm_jax.errors import BlockStateError, ConfigError, OutOfBlocksError
from kvbm_jax.hashing import block_keys, hash_sequence
from kvbm_jax.protocols import Tier
from kvbm_jax.tiers import open_stores
from tests.tiered import HOST, SIZE, Faulty, View, believed, check, disk, make, prefill, prompt, serve, settle


def keys_of(tokens):
    return block_keys(hash_sequence(tokens, SIZE))


@pytest.fixture
def manager():
    with make(**HOST, host_blocks=16, max_sequences=2) as owner:
        yield owner


def test_pinned_blocks_outlive_what_would_evict_them(manager):
    kept, other = prompt(0, 2), prompt(100, 2)
    serve(manager, kept)
    serve(manager, other)
    wanted = keys_of(kept)
    report = manager.command(lambda upkeep: upkeep.pin([*wanted, *wanted, *keys_of(prompt(900, 1))]))
    assert report == (2, tuple(keys_of(prompt(900, 1))))
    assert manager.command(lambda upkeep: upkeep.pin(wanted)).pinned == 2  # once is enough
    assert manager.stats() == (4, 2, 2)
    serve(manager, prompt(200, 5))
    assert manager.match(kept) == 8
    assert manager.match(other) == 0
    assert manager.command(lambda upkeep: upkeep.evict(100)) == 5
    assert manager.command(lambda upkeep: upkeep.reset(Tier.G1)) == {}
    assert manager.match(kept) == 8
    with pytest.raises(OutOfBlocksError):
        manager.start(prompt(300, 6))
    assert manager.command(lambda upkeep: upkeep.unpin()) == 2
    assert manager.command(lambda upkeep: upkeep.unpin(wanted)) == 0
    assert manager.stats() == (6, 2, 0)
    serve(manager, prompt(300, 7))
    assert manager.match(kept) == 0
    invariants.assert_holds(manager._device.pool._pool)


def test_a_pin_is_of_the_content(manager):
    kept = prompt(0, 1)
    with manager.start(prompt(500, 4)):  # so that the pinned block lies high
        serve(manager, kept)
        manager.command(lambda upkeep: upkeep.pin(keys_of(kept)))
    manager.resize(3)
    assert manager.match(kept) == 4
    with pytest.raises(BlockStateError, match="1 blocks are pinned; unpin them first"):
        manager.command(lambda upkeep: upkeep.require_none())
    assert manager.command(lambda upkeep: upkeep.unpin(keys_of(kept))) == 1
    assert manager.stats() == (2, 1, 0)


def test_pins_end_with_the_cache(manager):
    serve(manager, prompt(0, 2))
    manager.command(lambda upkeep: upkeep.pin(keys_of(prompt(0, 2))))

    def destroy(cache):
        for array in cache.arrays:
            array.delete()
        raise RuntimeError("gone")

    with pytest.raises(Exception, match="the cache is empty again"):
        manager.run(destroy)
    assert manager.command(lambda upkeep: upkeep.pinned) == []
    assert manager.command(lambda upkeep: upkeep.unpin()) == 0
    assert manager.stats() == (8, 0, 0)


def test_reblocking_waits_for_pins():
    with make(max_sequences=2) as manager:
        serve(manager, prompt(0, 2))
        manager.command(lambda upkeep: upkeep.pin(keys_of(prompt(0, 1))))
        with pytest.raises(BlockStateError, match="1 blocks are pinned"):
            manager.reblock(2)


def test_evicted_blocks_are_found_below(manager):
    view, events = View(), manager.subscribe_events()
    running, idle = prompt(0, 2), prompt(100, 2)
    serve(manager, idle)
    with manager.start(running) as seq:
        prefill(manager, seq)
        manager.register(seq)
        named = [*keys_of(running), keys_of(idle)[1], *keys_of(prompt(900, 2))]
        assert manager.command(lambda upkeep: upkeep.evict(named)) == 1
        assert manager.command(lambda upkeep: upkeep.evict(0)) == 0
        assert manager.command(lambda upkeep: upkeep.evict(10)) == 1
        check(manager, seq)
    settle(manager)
    assert believed(events, view) == {
        Tier.G1: {key.sequence_hash for key in keys_of(running)},
        Tier.G2: {key.sequence_hash for key in keys_of(idle)},
    }
    assert serve(manager, idle) == {Tier.G2: 8}
    with pytest.raises(ConfigError, match="-1 blocks cannot be evicted"):
        manager.command(lambda upkeep: upkeep.evict(-1))


def test_a_reset_forgets_a_tier_or_blocks_or_everything(manager):
    view, events = View(), manager.subscribe_events()
    first, second, third = prompt(0, 2), prompt(100, 2), prompt(200, 2)
    for tokens in (first, second):
        serve(manager, tokens)
    manager.command(lambda upkeep: upkeep.evict(4))
    serve(manager, third)
    serve(manager, first)  # back on the device, and below
    settle(manager)
    assert manager.command(lambda upkeep: upkeep.reset(keys_of(first)[1:])) == {Tier.G1: 1, Tier.G2: 1}
    settle(manager)
    held = believed(events, view)
    assert held[Tier.G1] == {key.sequence_hash for key in [keys_of(first)[0], *keys_of(third)]}
    assert held[Tier.G2] == {key.sequence_hash for key in [keys_of(first)[0], *keys_of(second)]}
    assert manager.command(lambda upkeep: upkeep.reset(Tier.G2)) == {Tier.G2: 3}
    settle(manager)
    assert serve(manager, second) == {}
    assert manager.command(lambda upkeep: upkeep.reset(Tier.G1)) == {Tier.G1: 5}
    assert serve(manager, second) == {}
    assert manager.command(lambda upkeep: upkeep.reset()) == {Tier.G1: 2}
    settle(manager)
    assert believed(events, view) == {}
    with pytest.raises(ConfigError, match="no tier g3 here; there are g1, g2"):
        manager.command(lambda upkeep: upkeep.reset(Tier.G3))


def test_a_flush_lets_others_have_their_turn(tmp_path):
    with make(max_sequences=2) as sample:
        config = dataclasses.replace(sample.config, **disk(tmp_path))
        [store] = open_stores(config, sample.layout, time)
    store = Faulty(store)
    with make(stores=[store], max_sequences=2, **disk(tmp_path)) as manager:
        serve(manager, prompt(0, 3))
        store.gate.clear()
        reports = []
        flusher = threading.Thread(target=lambda: reports.append(manager.flush(60)))
        flusher.start()
        while not manager._device.residency._engine._mover.bytes_in_flight:
            pass
        assert serve(manager, prompt(100, 7)) == {}  # evicts what is being flushed
        store.gate.set()
        flusher.join(60)
        assert reports == [(3, 0, 0)]
        assert serve(manager, prompt(0, 3)) == {Tier.G3: 12}
