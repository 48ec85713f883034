"""A manager whose device grows, shrinks, or is cut into other blocks, with all that runs and is cached on it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import synthetic
from tiered import SIZE, TierModel, View, check, make, prefill, serve, settle

import kvbm_jax
from kvbm_jax import BlockManager, BlockPool, KvBlockManagerConfig, grants, invariants
from kvbm_jax.errors import BlockStateError, ConfigError, LayoutError, OutOfBlocksError, SequenceTooLongError
from kvbm_jax.hashing import hash_bytes, hash_sequence
from kvbm_jax.protocols import Tier

pytestmark = [pytest.mark.core, pytest.mark.long, pytest.mark.timeout(900)]


def prompt(first, length):
    return list(range(first, first + length))


def tokens_of(ids):
    """Tokens of a request whose blocks are those of prefix-chained ids, and one token more."""
    return [token for number in ids for token in range(number * SIZE, (number + 1) * SIZE)] + [0]


def begin(manager, tokens, **options):
    seq = manager.start(tokens, **options)
    prefill(manager, seq)
    manager.register(seq)
    return seq


def laws(manager):
    invariants.assert_holds(manager._device.pool._pool)
    residents = manager._device.residency.residents
    keys = np.asarray(manager._device.pool._pool.index.keys)
    assert all(keys[r.block_id, :4].astype("<u4").tobytes() == r.record.key.sequence_hash for r in residents)
    counts = manager.stats()
    held = {int(b) for seq in manager._roster for b in manager._device.pool.table(seq.row)}
    assert counts.inactive == sum(r.block_id not in held for r in residents)


class Slots(View):
    """What a subscriber believes about each slot of the device, too."""

    def __init__(self):
        super().__init__()
        self.slots = {}

    def apply(self, event):
        super().apply(event)
        kind, key = event.event_type.value, event.sequence_hash
        if kind == "created" and event.tier is Tier.G1:
            self.slots[key] = event.block_id
        elif kind == "deleted" and event.tier is Tier.G1:
            assert self.slots.pop(key) == event.block_id
        elif kind == "migrated" and event.from_tier is Tier.G1:
            assert self.slots.pop(key) == event.from_block_id
        elif kind == "cleared":
            self.slots.clear()


def believe(view, subscription):
    for batch in subscription.drain():
        for event in batch:
            view.apply(event)


def truth(manager):
    return {r.record.key.sequence_hash: r.block_id for r in manager._device.residency.residents}


# Grow and shrink.


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long)])
def test_hits_are_those_of_the_rule_across_sizes(seed):
    model = TierModel(12, {})
    sizes = np.random.default_rng(seed)
    asked = [ids for ids in synthetic.conversations(seed, requests=80, longest=20, users=6, id_bits=32) if len(ids) < 8]
    with make(12) as manager:
        view, events = Slots(), manager.subscribe_events()
        for number, ids in enumerate(asked):
            if number % 6 == 5:
                size = int(sizes.choice([9, 12, 20]))
                device = model.held[Tier.G1]
                gone = max(len(device) - size, 0)
                for _ in range(gone):
                    device.popitem(last=False)
                model.num_blocks = size
                report = manager.resize(size)
                assert (report.num_blocks, report.num_evicted) == (size, gone)
                assert manager.layout.num_blocks == size == sum(manager.stats())
            expected = model.serve(ids)
            found = serve(manager, tokens_of(ids))
            assert found.get(Tier.G1, 0) == expected[Tier.G1] * SIZE
            believe(view, events)
            assert view.slots == truth(manager)
        laws(manager)


def test_running_sequences_go_on_where_they_are_moved():
    with make(24, max_sequences=4) as manager:
        view, events = Slots(), manager.subscribe_events()
        serve(manager, prompt(500, 17))  # 5 blocks, 4 of them cached at the end
        spacer = manager.start(prompt(900, 28), reuse=False)
        first = begin(manager, prompt(0, 14))
        second = begin(manager, [*prompt(0, 8), *prompt(100, 5)])
        copy = manager.fork(first)
        manager.release(spacer)
        report = manager.resize(11)
        assert report.moved
        for seq in (first, second, copy):
            check(manager, seq)
        assert manager.match(prompt(500, 16)) == 16
        believe(view, events)
        assert view.slots == truth(manager)
        manager.resize(40)
        for seq in (first, second, copy):
            check(manager, seq)
            manager.extend({seq: [7, 8, 9, seq.row]})
            prefill(manager, seq, len(seq.tokens) - 4)
        for seq in (first, second, copy):
            check(manager, seq)
            manager.register(seq)
            manager.release(seq)
        assert manager.match([*prompt(0, 14), 7, 8]) == 16
        assert manager.stats().held == 0
        laws(manager)


def test_attention_reads_the_same_after_a_move():
    @jax.jit
    def read(cache, running, query):
        batch = kvbm_jax.decode_batch(running, jnp.array([True]))
        # The token's own key and value are those that it has already.
        keys, values = kvbm_jax.load_kv(cache, 0, batch.slots[0])
        return kvbm_jax.attend(cache, 0, query, keys, values, batch)[0]

    query = jax.random.normal(jax.random.key(0), (1, 1, 2))
    with make(30) as manager:
        serve(manager, prompt(500, 60))
        with begin(manager, prompt(0, 15)) as seq:
            before = read(manager.cache, manager.sequences, query)
            assert manager.resize(5).moved
            np.testing.assert_array_equal(read(manager.cache, manager.sequences, query), before)
            manager.reblock(3)
            np.testing.assert_allclose(read(manager.cache, manager.sequences, query), before, rtol=1e-6)
            check(manager, seq)


def test_what_no_longer_fits_goes_to_the_tiers_below(tmp_path):
    tiers = {"enable_offload": True, "host_blocks": 6, "disk_budget": 64 << 20, "model_id": "tiny"}
    with make(16, offload_path=tmp_path, **tiers) as manager:
        view, events = Slots(), manager.subscribe_events()
        for first in (0, 100, 200):
            serve(manager, prompt(first, 17))
        manager.resize(5)
        settle(manager)
        believe(view, events)
        assert view.slots == truth(manager)
        # 12 blocks were cached; the first 7 to go are the whole of the first prompt and three of the second.
        for first, expected in ((200, {Tier.G1: 16}), (100, {Tier.G2: 16}), (0, {Tier.G3: 16})):
            assert sum(serve(manager, prompt(first, 17)).values()) == 16, expected
        manager.resize(16)
        assert serve(manager, prompt(0, 17)) == {Tier.G1: 16}
        settle(manager)
        believe(view, events)
        assert view.slots == truth(manager)
        laws(manager)


def test_handles_are_followed_and_old_ones_are_stale():
    with make(10) as manager:
        with begin(manager, prompt(0, 17)):
            low, high = manager.allocate_blocks(1), manager.allocate_blocks(2)
        assert [block.block_id for block in low + high] == [5, 6, 7]
        for layer, block in enumerate(high):
            manager.store_kv(block, layer, jnp.full((2, SIZE, 1, 2), block.block_id))
        report = manager.resize(6)
        kept, moved = low[0], [report.follow(block) for block in high]
        assert report.follow(kept) == kept
        manager.load_kv(kept, 0)
        for layer, (old, new) in enumerate(zip(high, moved, strict=True)):
            assert new.block_id < 6
            np.testing.assert_array_equal(manager.load_kv(new, layer), old.block_id)
            with pytest.raises(BlockStateError):
                manager.load_kv(old, layer)
        manager.resize(10)
        for old in high:  # the id is back; the handle is not
            with pytest.raises(BlockStateError):
                manager.free_blocks([old])
        again = manager.allocate_blocks(7)
        assert not {(b.block_id, b.generation) for b in again} & {(b.block_id, b.generation) for b in high}
        manager.free_blocks([kept, *moved, *again])
        assert manager.stats().held == 0


def test_sequences_may_be_longer_after_growing():
    config = {"block_size": SIZE, "num_layers": 1, "num_kv_heads": 1, "head_dim": 2, "dtype": "float32"}
    with BlockManager(KvBlockManagerConfig(num_blocks=3, **config)) as manager:
        with pytest.raises(SequenceTooLongError):
            manager.start(prompt(0, 13))
        manager.resize(6)
        manager.start(prompt(0, 24)).release()
        manager.resize(2)
        with pytest.raises(SequenceTooLongError):
            manager.start(prompt(0, 9))
        manager.start(prompt(0, 8)).release()


def test_resizes_that_are_refused_change_nothing():
    with make(8, max_sequences=2) as manager:
        seq = begin(manager, prompt(0, 14))
        before = jax.tree.map(np.array, (manager._device.pool._pool, manager.sequences, manager.cache))
        with pytest.raises(OutOfBlocksError, match="4 of 8 blocks are held, more than num_blocks = 3"):
            manager.resize(3)
        with pytest.raises(LayoutError, match="num_blocks is 0"):
            manager.resize(0)
        grant = manager.reserve({seq: 5})
        for refused in (lambda: manager.resize(9), lambda: manager.reblock(2)):
            with pytest.raises(BlockStateError, match="1 grants are under way"):
                refused()
        manager.give_back(grant)
        after = (manager._device.pool._pool, manager.sequences, manager.cache)
        jax.tree.map(np.testing.assert_array_equal, before[1:], after[1:])
        check(manager, seq)
        manager.resize(4)
        check(manager, seq)


def test_a_cache_that_does_not_fit_leaves_the_present_one():
    config = KvBlockManagerConfig(
        block_size=4, num_blocks=2, num_layers=1, num_kv_heads=1, head_dim=2**20, dtype="float32"
    )
    with BlockManager(config) as manager:
        with manager.start([1, 2, 3, 4, 5]) as seq:
            with pytest.raises(ConfigError, match="nothing has changed"):
                manager.resize(2**17)  # 4 terabytes
            assert manager.layout.num_blocks == 2
            manager.register(seq)
        assert manager.match([1, 2, 3, 4]) == 4


def test_a_pool_without_a_manager():
    pool = BlockPool(num_blocks=6, block_size=4, max_sequences=2, max_blocks=4)
    hashes = hash_sequence(prompt(0, 12), 4)
    pool.start(0, hashes, 0, 13)
    pool.register(0, hashes, 0)
    pool.release(0)
    done = pool.resize(2)
    assert done.evicted.block_ids.tolist() == [2]
    assert pool.match(hashes) == 2
    assert pool.inactive_blocks().tolist() == [1, 0]
    assert sum(pool.stats()) == 2


# Other blocks.


def whole(length, *sizes):
    """How many of a prompt's tokens stay found when its blocks go through these sizes."""
    for size in sizes:
        length = length // size * size
    return length


@pytest.mark.parametrize("size", [3, *(pytest.param(size, marks=pytest.mark.long) for size in (1, 6, 8))])
def test_cached_prefixes_and_running_sequences_survive_other_blocks(size):
    with make(24, max_sequences=4) as manager:
        view, events = Slots(), manager.subscribe_events()
        cached = [prompt(500, 17), [*prompt(500, 9), *prompt(700, 10)]]
        for tokens in cached:
            serve(manager, tokens)
        first = begin(manager, prompt(0, 14))
        second = begin(manager, [*prompt(0, 9), *prompt(100, 5)])
        private = begin(manager, prompt(0, 11), reuse=False)
        copy = manager.fork(first)
        report = manager.reblock(size)
        assert report.block_size == manager.layout.block_size == size
        assert report.num_blocks == manager.layout.num_blocks == 96 // size
        for seq in (first, second, private, copy):
            check(manager, seq)
        for tokens in cached:
            assert manager.match(tokens) == whole(len(tokens), SIZE, size)
        assert manager.match(first.tokens) == whole(14, SIZE, size)
        believe(view, events)
        assert view.slots == truth(manager)
        laws(manager)
        for number, seq in enumerate((first, second, private, copy)):
            manager.extend({seq: [7, 8, number]})
            prefill(manager, seq, len(seq.tokens) - 3)
        for seq in (first, second, private, copy):
            check(manager, seq)
            manager.register(seq)
            manager.release(seq)
        assert manager.match([*first.tokens, 0]) == whole(17, size)
        assert manager.stats().held == 0
        found = serve(manager, [*first.tokens, 1])
        assert found[Tier.G1] == whole(17, size)
        laws(manager)


def evictions(manager):
    """The tokens up to the end of each cached block, in the order of eviction."""
    by_id = {r.block_id: r.record for r in manager._device.residency.residents}
    return [by_id[int(block)].token_ids for block in manager._device.pool.inactive_blocks()]


@pytest.mark.parametrize("size", [2, *(pytest.param(size, marks=pytest.mark.long) for size in (3, 8, 12))])
def test_the_order_of_eviction_is_that_of_blocks_of_this_size_from_the_start(size):
    rng = np.random.default_rng(size)
    served = []
    for _ in range(8):
        head = served[rng.integers(len(served))] if served and rng.random() < 0.6 else []
        head = head[: 24 * rng.integers(0, 1 + len(head) // 24)]
        served.append([*head, *rng.integers(0, 2**31, 24 * rng.integers(1, 3)).tolist()][:192])
    with make(200) as manager, make(800 // size, block_size=size) as native:
        for tokens in served:
            # Whole blocks in every size, and one token more to compute.
            serve(manager, [*tokens, 1])
            serve(native, [*tokens, 1])
        manager.reblock(size)
        assert evictions(manager) == evictions(native)
        for tokens in served:
            assert serve(manager, [*tokens, 1]) == serve(native, [*tokens, 1])
        assert evictions(manager) == evictions(native)


def test_there_and_back_again_and_resized_in_between():
    with make(20) as manager:
        serve(manager, prompt(500, 25))
        with begin(manager, prompt(0, 21)) as seq:
            for size, blocks in ((8, 12), (5, 9)):
                manager.reblock(size)
                check(manager, seq)
                manager.resize(blocks)
                check(manager, seq)
                laws(manager)
        assert serve(manager, prompt(500, 25)) == {Tier.G1: whole(24, 8, 5)}


def test_copies_that_do_not_fit_are_dropped_from_the_least_recent_on():
    with make(7) as manager:
        # Three chains that part after one block: six registered blocks, and as many copies of 8 tokens as chains.
        for first in (100, 200, 300):
            serve(manager, [*prompt(0, 4), *prompt(first, 5)])
        report = manager.reblock(8)
        assert (report.num_blocks, report.num_registered, report.num_dropped) == (3, 3, 0)
        manager.reblock(4)
        manager.resize(5)
        report = manager.reblock(8)
        assert (report.num_blocks, report.num_registered, report.num_dropped) == (2, 2, 1)
        assert [manager.match([*prompt(0, 4), *prompt(first, 4)]) for first in (100, 200, 300)] == [0, 8, 8]


def test_what_enters_the_key_enters_it_anew():
    inputs = ((2, b"cat"), (9, b"dog"))
    keys = ({"salt": "a"}, {"lora_name": "b"}, {"multimodal": inputs}, {})
    with make(40) as manager:
        for options in keys:
            serve(manager, prompt(0, 17), **options)
        manager.reblock(8)
        for options in keys:
            assert manager.match(prompt(0, 17), **options) == 16
            assert serve(manager, prompt(0, 17), **options) == {Tier.G1: 16}
        assert manager.match(prompt(0, 17), multimodal=((2, b"dog"), (9, b"cat"))) == 0
        assert manager.match(prompt(0, 17), salt="c") == 0
        expected = {hash_bytes(words) for words in hash_sequence(prompt(0, 16), 8, multimodal=inputs)}
        assert expected <= set(truth(manager))


def test_a_preempted_sequence_is_resumed_in_the_new_blocks():
    with make(12) as manager:
        seq = begin(manager, prompt(0, 14))
        manager.release(seq)
        manager.reblock(6)
        manager.resume(seq)
        assert seq.num_cached == 12
        prefill(manager, seq)
        check(manager, seq)
        manager.release(seq)


def test_a_loop_goes_on_in_the_new_blocks():
    with make(12) as manager, begin(manager, prompt(0, 14)) as seq:
        manager.reblock(3)
        grant = manager.reserve({seq: 5})

        @jax.jit
        def loop(running, grant):
            def step(carry, _):
                running, grant, _ = grants.extend(*carry, jnp.array([1]))
                return (running, grant), None

            return jax.lax.scan(step, (running, grant), length=5)[0]

        running, grant = loop(manager.sequences, grant)
        manager.commit(grant, running, {seq: [1, 2, 3, 4, 5]})
        prefill(manager, seq, 14)
        check(manager, seq)
        assert manager.match(seq.tokens) == 18


def test_reblocking_that_is_refused_says_why():
    below = {"enable_offload": True, "host_blocks": 4, "disk_budget": 0}
    with make(8, **below) as manager, pytest.raises(ConfigError, match="the tiers below hold blocks of one size"):
        manager.reblock(2)
    with make(8) as manager:
        for size in (0, 33):
            with pytest.raises(LayoutError, match=f"block_size is {size}; .* a block of 1 to 32 tokens"):
                manager.reblock(size)
        with manager.allocate_blocks(1)[0], pytest.raises(BlockStateError, match="1 blocks are held outside"):
            manager.reblock(2)
        old = manager.allocate_blocks(1)
        manager.free_blocks(old)
        manager.reblock(2)
        with pytest.raises(BlockStateError):
            manager.load_kv(old[0], 0)
    with make(2, max_sequences=2) as manager, begin(manager, prompt(0, 2)) as one, begin(manager, prompt(9, 2)) as two:
        with pytest.raises(OutOfBlocksError, match="need 2 blocks of 5 tokens; the cache has room for 1"):
            manager.reblock(5)
        for seq in (one, two):
            check(manager, seq)
        assert manager.layout.block_size == SIZE
