"""The tiers below the device: hits by tier as the rule says, contents right, events that a subscriber can believe."""

import time

import jax
import numpy as np
import pytest
import synthetic
from tiered import (
    BLOCK_BYTES,
    HOST,
    SIZE,
    TierModel,
    View,
    assert_in_agreement,
    believed,
    check,
    disk,
    make,
    prefill,
    prompt,
    serve,
    settle,
)

from kvbm_jax import invariants
from kvbm_jax.errors import BlockStateError, ConfigError, HashingError
from kvbm_jax.hashing import hash_bytes, hash_sequence
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.offload import MemoryBlockStore
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.offload.segments import SegmentBlockStore
from kvbm_jax.protocols import BlockKey, Tier


def tokens_of(ids):
    """Tokens of a request whose blocks are those of prefix-chained ids, and one token more."""
    return [token for number in ids for token in range(number * SIZE, (number + 1) * SIZE)] + [0]


def requests(seed, count):
    return [
        ids for ids in synthetic.conversations(seed, requests=count, longest=20, users=6, id_bits=32) if len(ids) < 30
    ]


@pytest.mark.parametrize(
    ("capacities", "seed"),
    [
        ({Tier.G2: 40}, 0),
        ({Tier.G2: 7, Tier.G3: 60}, 1),
        ({Tier.G2: 60, Tier.G3: 7}, 2),
        ({Tier.G2: 1, Tier.G3: 30}, 3),
        ({Tier.G2: 0, Tier.G3: 30}, 4),
        ({Tier.G2: 30, Tier.G3: 0}, 5),
        ({Tier.G3: 50}, 6),
    ],
)
def test_hits_are_those_of_the_rule_and_contents_are_right(capacities, seed):
    stores = [MemoryBlockStore(BLOCK_BYTES, capacity=blocks, tier=tier) for tier, blocks in capacities.items()]
    metrics, view = InMemoryMetrics(), View()
    model = TierModel(32, capacities)
    known = {}
    with make(32, stores=stores, metrics=metrics) as manager:
        events = manager.subscribe_events()
        for ids in requests(seed, 150):
            known |= dict(zip(ids, (hash_bytes(words) for words in hash_sequence(tokens_of(ids), SIZE)), strict=True))
            expected = {tier: count * SIZE for tier, count in model.serve(ids).items() if count}
            assert serve(manager, tokens_of(ids)) == expected
        settle(manager)
        invariants.assert_holds(manager._device.pool._pool)
        told = believed(events, view)
        for tier, held in model.held.items():
            assert told.get(tier, set()) == {known[number] for number in held}
        for store in stores:
            assert {record.key.sequence_hash for _, record in store.records()} == told.get(store.tier, set())
        assert metrics.snapshot()["kvbm_eviction_count_total"] == model.evictions > 100
        assert metrics.snapshot()["kvbm_transfer_in_flight_bytes"] == 0
        assert not [name for name in metrics.snapshot() if "failures" in name or "dropped" in name]


def test_real_stores_follow_the_rule_too(tmp_path):
    model, from_disk = TierModel(32, {Tier.G2: 12, Tier.G3: 10_000}), 0
    with make(32, **disk(tmp_path, host_blocks=12)) as manager:
        for ids in requests(7, 120):
            expected = {tier: count * SIZE for tier, count in model.serve(ids).items() if count}
            assert serve(manager, tokens_of(ids)) == expected
            from_disk += expected.get(Tier.G3, 0)
        assert from_disk > 50 * SIZE  # read back, or still on their way there


def test_an_evicted_prefix_comes_back_from_host_memory_and_is_on_the_device_again():
    metrics = InMemoryMetrics()
    with make(7, metrics=metrics, host_blocks=20, **HOST) as manager:
        assert serve(manager, prompt(0, 6)) == {}
        assert serve(manager, prompt(1000, 6)) == {}
        assert serve(manager, prompt(0, 6)) == {Tier.G2: 24}
        assert serve(manager, prompt(0, 6)) == {Tier.G1: 24}
    found = metrics.snapshot()
    assert found['kvbm_transfer_blocks_total{source="g2",target="g1"}'] == 6
    assert found['kvbm_transfer_bytes_total{source="g2",target="g1"}'] == 6 * BLOCK_BYTES
    assert found['kvbm_transfer_blocks_total{source="g1",target="g2"}'] == 12
    assert found['kvbm_transfer_seconds{source="g1",target="g2"}'].count >= 2
    assert found['kvbm_prefix_hit_tokens_total{tier="g2"}'] == 24
    assert found['kvbm_blocks_allocated{tier="g2"}'] == 12
    assert found['kvbm_blocks_free{tier="g2"}'] == 8


def test_every_way_to_allocate_offloads_what_it_evicts():
    with make(8, max_sequences=2, host_blocks=40, **HOST) as manager:
        serve(manager, prompt(0, 7))
        blocks = manager.allocate_blocks(5)
        manager.free_blocks(blocks)
        serve(manager, prompt(100, 7))
        with manager.start(prompt(200, 0)) as seq:
            manager.extend({seq: prompt(201, 6)})
            grant = manager.reserve({seq: 1})
            manager.give_back(grant)
        settle(manager)
        for first in (0, 100):
            assert serve(manager, prompt(first, 7)) == {Tier.G2: 28}


def test_events_tell_every_move(tmp_path):
    with make(4, host_blocks=3, **disk(tmp_path)) as manager:
        events = manager.subscribe_events()
        serve(manager, prompt(0, 3))
        serve(manager, prompt(1000, 3))  # 3 blocks to G2
        serve(manager, prompt(2000, 3))  # 3 blocks to G2, 3 to G3
        settle(manager)
        told = [
            (event.event_type.value, event.from_tier, event.tier, event.token_ids[:1] or None)
            for batch in events.drain()
            for event in batch
        ]
    moves = [entry for entry in told if entry[0] == "migrated"]
    assert sorted(moves) == sorted(
        [("migrated", Tier.G1, Tier.G2, (token,)) for first in (0, 1000) for token in range(first, first + 12, 4)]
        + [("migrated", Tier.G2, Tier.G3, (token,)) for token in range(0, 12, 4)]
    )
    assert not [entry for entry in told if entry[0] == "deleted"]


def test_a_sequence_without_reuse_finds_and_leaves_nothing():
    with make(16, host_blocks=20, **HOST) as manager:
        serve(manager, prompt(0, 6))
        assert serve(manager, prompt(0, 6), reuse=False) == {}
        assert serve(manager, prompt(500, 6), reuse=False) == {}
        assert serve(manager, prompt(500, 6)) == {}
        assert serve(manager, prompt(0, 6)) == {Tier.G1: 24}


def test_salts_keep_prefixes_apart_in_every_tier():
    with make(7, host_blocks=20, **HOST) as manager:
        serve(manager, prompt(0, 6), salt="a")
        serve(manager, prompt(1000, 6))
        assert serve(manager, prompt(0, 6), salt="b") == {}
        serve(manager, prompt(2000, 6))
        assert serve(manager, prompt(0, 6), salt="a") == {Tier.G2: 24}


def test_clear_forgets_all_tiers(tmp_path):
    with make(7, host_blocks=6, **disk(tmp_path)) as manager:
        events, view = manager.subscribe_events(), View()
        for first in (0, 1000, 2000, 3000):
            serve(manager, prompt(first, 6))
        assert manager.clear() == 6
        settle(manager)
        assert not believed(events, view)
        assert {tier: stats.blocks for tier, stats in manager.tier_stats().items()} == {Tier.G2: 0, Tier.G3: 0}
        for first in (0, 1000, 2000, 3000):
            assert serve(manager, prompt(first, 6)) == {}


def test_an_unbounded_store_takes_everything():
    with make(7, stores=[MemoryBlockStore(BLOCK_BYTES)], metrics=InMemoryMetrics()) as manager:
        for first in range(0, 20_000, 1000):
            serve(manager, prompt(first, 6))
        assert serve(manager, prompt(0, 6)) == {Tier.G2: 24}


def test_staging_arrays_are_used_again():
    with make(40, host_blocks=200, **HOST) as manager:
        for first in range(0, 40_000, 1000):
            serve(manager, prompt(first, 36))
            settle(manager)
        free = manager._device.residency._engine._ring._free
        assert {rows: len(arrays) for rows, arrays in free.items()} == {4: 1, 32: 1}


def test_sequences_that_compute_the_same_blocks_leave_them_once():
    with make(64, max_sequences=2, host_blocks=30, **HOST) as manager:
        with manager.start(prompt(0, 20)) as first, manager.start(prompt(0, 20)) as second:
            for seq in (first, second):
                prefill(manager, seq)
            manager.register(first)
            manager.register(second)
            check(manager, first)
            check(manager, second)
        for number in range(1, 8):
            serve(manager, prompt(1000 * number, 40))
        serve(manager, prompt(0, 20))
        assert manager.stats().held == 0


# Tenants and inputs.


def test_inputs_in_a_prompt_are_part_of_its_key_also_in_what_comes_later():
    cat, dog = b"hash of a cat", b"hash of a dog"
    with make(16, max_sequences=2) as manager:
        tokens = prompt(0, 3, 2)
        with manager.start(tokens, multimodal=[(5, cat), (13, cat)]) as seq:
            prefill(manager, seq)
            grow(manager, seq, [1, 2, 3])
            assert manager.register(seq) == 4
        longer = [*tokens, 1, 2, 3]
        found = {
            name: manager.match(longer, multimodal=inputs)
            for name, inputs in {
                "same": [(13, cat), (5, cat)],
                "other in the tail": [(5, cat), (13, dog)],
                "other": [(5, dog), (13, cat)],
                "moved": [(6, cat), (13, cat)],
                "none": [],
            }.items()
        }
        assert found == {"same": 16, "other in the tail": 12, "other": 4, "moved": 4, "none": 4}
        with pytest.raises(HashingError, match="position 14 is outside the 14 tokens"):
            manager.start(tokens, multimodal=[(14, cat)])


def test_what_one_tenant_writes_is_never_read_by_another(tmp_path):
    """NaN in every block of one tenant, on the device and below: others find none of it under any key of theirs."""
    with make(7, host_blocks=6, **disk(tmp_path)) as manager:
        tokens = prompt(0, 6)
        for salt in ("poisoner", "poisoner of the disk"):
            with manager.start(tokens, salt=salt) as seq:
                poison(manager)
                manager.register(seq)
        for options in ({}, {"salt": "victim"}, {"lora_name": "poisoner"}, {"salt": "poisoner", "lora_name": "x"}):
            assert serve(manager, tokens, **options) == {}
        with manager.start(tokens, salt="poisoner") as seq:
            assert seq.num_cached == 24  # its own, from below
        assert manager.clear() == 6
        assert manager.scrub() == 7
        assert not any(np.asarray(array).any() for array in manager.cache.arrays)


def test_blocks_are_granted_clean_if_asked():
    with make(4) as manager:
        poison(manager)
        dirty = manager.allocate_blocks(1)[0]
        clean = manager.allocate_blocks(1, scrub=True)[0]
        assert np.isnan(np.asarray(manager.load_kv(dirty, 1))).all()
        assert not np.asarray(manager.load_kv(clean, 1)).any()
        assert not np.asarray(manager.load_kv(clean, 0)).any()


def poison(manager):
    """Overwrites the whole cache."""
    manager.run(lambda cache: (jax.tree.map(lambda array: array * 0 + np.nan, cache), None))


# Sequences that branch, roll back and come again.


def grow(manager, seq, tokens):
    """Appends tokens and writes their contents."""
    first = len(seq.tokens)
    manager.extend({seq: tokens})
    prefill(manager, seq, first)
    check(manager, seq)


@pytest.mark.parametrize("tail", [0, 1, 3])
def test_forks_share_blocks_until_one_of_them_writes(tail):
    with make(24, max_sequences=3) as manager:
        first = manager.start(prompt(0, 3, tail))
        prefill(manager, first)
        manager.register(first)
        held = manager.stats().held
        second = manager.fork(first)
        third = manager.fork(second)
        assert manager.stats().held == held
        for seq, token in ((second, 7), (third, 8), (first, 9)):
            grow(manager, seq, [token] * 6)
        for seq in (first, second, third):
            check(manager, seq)
            assert manager.register(seq) == (tail + 6) // SIZE
        assert first.hashes[-1].tolist() != second.hashes[-1].tolist()
        manager.release(second)
        check(manager, third)
        with pytest.raises(BlockStateError, match="not running"):
            manager.fork(second)
        manager.release(first)
        manager.release(third)
        assert manager.stats().held == 0
        assert serve(manager, [*prompt(0, 3, tail), *[8] * 6]) == {Tier.G1: (12 + tail + 5) // SIZE * SIZE}


def test_a_fork_that_is_written_by_a_loop_gets_its_tail_first():
    with make(24, max_sequences=2) as manager:
        first = manager.start(prompt(0, 1, 2))
        prefill(manager, first)
        second = manager.fork(first)
        grant = manager.reserve({second: 1})
        tables = np.asarray(manager.sequences.block_tables)[0]
        assert tables[first.row, 0] == tables[second.row, 0]
        assert tables[first.row, 1] != tables[second.row, 1]
        check(manager, second)
        manager.give_back(grant)


def test_a_copied_tail_takes_the_place_of_an_offloaded_block():
    """The victim whose block becomes the copy is saved before it is overwritten."""
    with make(8, max_sequences=2, host_blocks=20, **HOST) as manager:
        serve(manager, prompt(500, 3, 0))
        with manager.start(prompt(0, 5, 2)) as first:
            prefill(manager, first)
            with manager.fork(first) as second:
                grow(manager, second, [7])
                check(manager, first)
        assert serve(manager, prompt(500, 3, 1)) == {Tier.G1: 4, Tier.G2: 8}


def test_rejected_tokens_are_rolled_back_into_a_block_that_others_find():
    with make(16) as manager:
        seq = manager.start(prompt(0, 3, 2))
        prefill(manager, seq)
        manager.register(seq)
        manager.trim(seq, 6)
        assert (len(seq.tokens), seq.num_registered, len(seq.hashes)) == (6, 1, 1)
        grow(manager, seq, [70, 71, 72])
        assert manager.register(seq) == 1
        manager.release(seq)
        assert serve(manager, prompt(0, 3)) == {Tier.G1: 12}
        assert serve(manager, [*range(6), 70, 71, 72]) == {Tier.G1: 8}
        with manager.start(prompt(0, 1)) as seq, pytest.raises(BlockStateError, match="cannot be rolled back to 6"):
            manager.trim(seq, 6)


def test_a_preempted_sequence_comes_again_with_what_is_left_of_it():
    with make(7, host_blocks=20, **HOST) as manager:
        seq = manager.start(prompt(0, 3))
        prefill(manager, seq)
        grow(manager, seq, [5, 6, 7, 8])
        manager.register(seq)
        manager.release(seq)
        serve(manager, prompt(1000, 6))
        manager.resume(seq)
        assert seq.hits == {Tier.G1: 0, Tier.G2: 16}
        prefill(manager, seq)
        check(manager, seq)
        with pytest.raises(BlockStateError, match="is running"):
            manager.resume(seq)
        manager.release(seq)


# Restarts.


def test_a_restart_is_warm(tmp_path):
    with make(16, host_blocks=6, **disk(tmp_path)) as manager:
        for first in (0, 1000, 2000):
            serve(manager, prompt(first, 6))
    with make(16, host_blocks=6, **disk(tmp_path)) as manager:
        assert manager.match(prompt(0, 6)) == 0
        for first in (0, 1000, 2000):
            assert serve(manager, prompt(first, 6)) == {Tier.G3: 24}


def test_a_flush_copies_down_and_evicts_nothing(tmp_path):
    metrics = InMemoryMetrics()
    with make(7, metrics=metrics, host_blocks=6, **disk(tmp_path)) as manager:
        events, view = manager.subscribe_events(), View()
        serve(manager, prompt(0, 6))
        serve(manager, prompt(1000, 6))
        assert manager.flush() == (12, 0, 0)
        assert manager.flush() == (0, 0, 0)
        held = believed(events, view)
        assert {tier: len(blocks) for tier, blocks in held.items()} == {Tier.G1: 6, Tier.G2: 6, Tier.G3: 12}
        assert serve(manager, prompt(1000, 6)) == {Tier.G1: 24}
        assert serve(manager, prompt(0, 6)) == {Tier.G2: 24}
    found = metrics.snapshot()
    assert found['kvbm_transfer_blocks_total{source="g1",target="g3"}'] == 6
    assert found['kvbm_transfer_blocks_total{source="g2",target="g3"}'] == 6


def test_a_flush_keeps_the_newest_where_the_disk_is_too_small():
    stores = [MemoryBlockStore(BLOCK_BYTES, capacity=9, tier=Tier.G3)]
    with make(32, stores=stores) as manager:
        for first in (0, 1000, 2000, 3000):
            serve(manager, prompt(first, 4))
        assert manager.flush() == (9, 0, 0)
        kept = {record.key for _, record in stores[0].records()}
        # The last two whole, and of the one before its first block: last blocks go first.
        wanted = [*hash_sequence(prompt(3000, 4), SIZE), *hash_sequence(prompt(2000, 4), SIZE)]
        wanted += list(hash_sequence(prompt(1000, 4), SIZE)[:1])
        assert kept == {BlockKey(hash_bytes(words)) for words in wanted}


def test_a_flush_writes_again_what_it_has_pushed_out_itself():
    """The third prompt begins to push the first one out of the full disk, and that very prompt comes next."""
    store = MemoryBlockStore(BLOCK_BYTES, capacity=6, tier=Tier.G3)
    with make(32, stores=[store]) as manager:
        events, view = manager.subscribe_events(), View()
        for first in (0, 1000):
            serve(manager, prompt(first, 3))
        assert manager.flush() == (6, 0, 0)
        serve(manager, prompt(2000, 1))
        serve(manager, prompt(0, 3))
        assert manager.flush() == (4, 0, 0)
        assert_in_agreement(manager, [store], events, view)
        wanted = [*hash_sequence(prompt(0, 3), SIZE), *hash_sequence(prompt(2000, 1), SIZE)]
        wanted += list(hash_sequence(prompt(1000, 2), SIZE))
        assert {record.key for _, record in store.records()} == {BlockKey(hash_bytes(words)) for words in wanted}


def test_closing_without_a_flush_and_after_an_error_leaves_the_disk_alone(tmp_path):
    def fails():
        with make(7, **disk(tmp_path)) as manager:
            serve(manager, prompt(0, 6))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    manager = make(7, **disk(tmp_path))
    serve(manager, prompt(1000, 6))
    manager.close(flush=False)
    manager.close()
    with make(7, **disk(tmp_path)) as manager:
        assert serve(manager, prompt(0, 6)) == {}


def test_another_model_layout_or_dtype_finds_nothing(tmp_path):
    with make(7, **disk(tmp_path)) as manager:
        serve(manager, prompt(0, 6))
    for changes in ({"model_id": "other"}, {"dtype": "float16"}, {"block_size": 8}, {"num_layers": 3}):
        with make(7, **(disk(tmp_path) | changes)) as manager:
            assert manager.tier_stats()[Tier.G3].foreign > 0
            with manager.start(prompt(0, 6)) as seq:
                assert seq.num_cached == 0
    with make(7, **disk(tmp_path)) as manager:
        assert serve(manager, prompt(0, 6)) == {Tier.G3: 24}


def test_what_the_budget_has_no_room_for_any_more_is_trimmed(tmp_path):
    def store(blocks):
        identity = CacheIdentity.of(make(1).layout, model_id="tiny", hash_algorithm="blake3")
        return SegmentBlockStore(
            tmp_path, BLOCK_BYTES, identity=identity, capacity_bytes=64 << 20, capacity_blocks=blocks, clock=time
        )

    with make(32, stores=[store(20)], model_id="tiny") as manager:
        for first in (0, 1000, 2000):
            serve(manager, prompt(first, 6))
    with make(32, stores=[store(7)], model_id="tiny") as manager:
        settle(manager)
        assert manager.tier_stats()[Tier.G3].blocks == 7
        assert serve(manager, prompt(2000, 6)) == {Tier.G3: 24}
        assert serve(manager, prompt(0, 6)) == {}


# What is refused.


@pytest.mark.parametrize(
    ("tiers", "message"),
    [
        ([Tier.G3, Tier.G2], "stores of the tiers .G3, G2."),
        ([Tier.G2, Tier.G2], "stores of the tiers .G2, G2."),
        ([Tier.G3, Tier.G4], "one store below it"),
        ([Tier.G1], "stores of the tiers .G1."),
    ],
)
def test_stores_that_cannot_stand_below_a_device_are_refused(tiers, message):
    with pytest.raises(ConfigError, match=message):
        make(stores=[MemoryBlockStore(BLOCK_BYTES, tier=tier) for tier in tiers])


def test_stores_that_do_not_fit_the_cache_are_refused():
    with pytest.raises(ConfigError, match="blocks of 64 bytes, the cache of 128"):
        make(stores=[MemoryBlockStore(64)])
    identity = CacheIdentity.of(make(1).layout, model_id="another", hash_algorithm="blake3")
    store = HostBlockStore(BLOCK_BYTES, 4, identity=identity)
    with pytest.raises(ConfigError, match="model_id: 'another' != 'tiny'"):
        make(stores=[store], model_id="tiny")
    store.close()


def test_a_disk_tier_needs_a_name_and_a_usable_folder(tmp_path):
    with pytest.raises(ConfigError, match="model_id is unset"):
        make(**(disk(tmp_path) | {"model_id": None}))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file"):
        make(host_blocks=3, **disk(tmp_path / "file"))
    with make(**disk(tmp_path / "folder")), pytest.raises(ConfigError, match="in use"):
        make(**disk(tmp_path / "folder"))
