"""Eviction policies at the host: pools and managers that evict by one, against the oracle with its twin."""

import functools
import importlib.metadata
import re
from collections import Counter

import jax
import numpy as np
import pytest
import tiered
from oracle import OraclePool
from policy_oracles import LineageOracle, LruOracle, PriorityOracle, ScoredOracle, TinyLfuOracle
from shelves import Shelves
from synthetic import conversations

from kvbm_jax import BlockManager, BlockPool, KvBlockManagerConfig, eviction, grants, policies, programs, sequences
from kvbm_jax import pool as pool_verbs
from kvbm_jax import step as step_verb
from kvbm_jax.errors import ConfigError
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.offload import MemoryBlockStore
from kvbm_jax.protocols import Tier

pytestmark = pytest.mark.core
LONG = pytest.mark.long

SIZE = 16
NUM_BLOCKS = 40
WIDTH = 32  # blocks of a table


def worth(block):
    return block.uses / (1 + block.age) + block.priority


def worth_in_numpy(uses, age, depth, priority):
    return uses / (1 + age) + priority


TWINS = {
    "lru": lambda n: LruOracle(),
    "lineage": lambda n: LineageOracle(),
    "priority": PriorityOracle,
    "tiny_lfu": TinyLfuOracle,
    "scored": lambda n: ScoredOracle(n, worth_in_numpy),
}
CHOICES = {name: worth if name == "scored" else name for name in TWINS}


def tokens_of(ids):
    """A prompt of whole blocks, each told by its id, and one token more."""
    return [*np.repeat(np.array(ids, np.uint32), SIZE).tolist(), 0]


def make(name, **config):
    values = {"block_size": SIZE, "num_blocks": NUM_BLOCKS, "num_layers": 1, "num_kv_heads": 1, "head_dim": 1}
    policy = {"eviction_policy": name} if name in policies.NAMES else {}
    return BlockManager(
        KvBlockManagerConfig(**(values | {"dtype": "float32"} | policy | config)),
        max_sequences=2,
        max_sequence_tokens=WIDTH * SIZE,
        eviction_policy=worth if name == "scored" else None,
    )


class Twin:
    """The oracle of a pool, request by request."""

    def __init__(self, name, num_blocks=NUM_BLOCKS):
        self.policy = TWINS[name](num_blocks)
        self.pool = OraclePool(num_blocks, self.policy)

    def start(self, keys, num_blocks):
        """Returns the table, how many blocks of it were found, and what was evicted."""
        held = self.pool.match(keys)
        self.pool.acquire([held])
        granted, _, evicted = self.pool.allocate([num_blocks - len(held)])
        self.policy.hit(self.pool, held)
        return held + granted[0], len(held), evicted

    def register(self, table, keys, first, priority=0):
        """Registers the blocks from index `first` on."""
        entries = self.pool.register([list(zip(table[first:], keys[first:], strict=False))])[0]
        new = [first + i for i, (_, new, _) in enumerate(entries) if new]
        table[first : first + len(entries)] = [block for block, _, _ in entries]
        self.policy.registered(self.pool, [(table[i], table[i - 1] if i else None, i, priority) for i in new])


# `lru` at a manager is compared with its rule in tests/test_tiers.py too, in the quick suite.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=LONG if name in {"lru", "scored"} else ()) for name in TWINS]
)
def test_hits_and_evictions_of_a_manager_are_those_of_the_oracle(name):
    rng = np.random.default_rng(3)
    twin, evicted = Twin(name), []
    with make(name) as manager:
        events = manager.subscribe_events()
        for ids in conversations(3, requests=100, longest=24, id_bits=32):
            tokens, priority = tokens_of(ids), int(rng.integers(3))
            keys = [(*words, 0) for words in hash_sequence(tokens, SIZE).tolist()]
            table, found, gone = twin.start(keys, len(keys) + 1)
            with manager.start(tokens, priority=priority) as seq:
                assert seq.num_cached == SIZE * found
                manager.register(seq)
            twin.register(table, keys, found, priority)
            twin.pool.release([table])
            evicted += [np.array(key[:4], "<u4").tobytes() for _, key in gone]
        told = [event for batch in events.drain() for event in batch if event.event_type == "deleted"]
    assert [event.sequence_hash for event in told] == evicted
    assert len(evicted) > 50


@pytest.mark.parametrize("name", ["tiny_lfu", *(pytest.param(name, marks=LONG) for name in ("lineage", "priority"))])
def test_tiers_below_a_device_of_another_policy(name):
    """What the device evicts by its policy goes down, and what comes up again is told to the policy as registered."""
    capacities = {Tier.G2: 12, Tier.G3: 60}
    stores = [MemoryBlockStore(tiered.BLOCK_BYTES, capacity=n, tier=tier) for tier, n in capacities.items()]
    twin, below, found = Twin(name, 32), Shelves(capacities), Counter()
    with tiered.make(32, stores=stores, eviction_policy=name) as manager:
        for ids in conversations(4, requests=120, longest=20, users=6, id_bits=32):
            tokens = [*(np.repeat(ids, tiered.SIZE) + np.tile(range(tiered.SIZE), len(ids))).tolist(), 0]
            keys = [(*words, 0) for words in hash_sequence(tokens, tiered.SIZE).tolist()]
            held = len(twin.pool.match(keys))
            brought = below.find(keys[held:])
            table, _, evicted = twin.start(keys, len(keys) + 1)
            for _, key in evicted:
                below.offer(key)
            last = held + len(brought)
            if brought:
                twin.register(table, keys[:last], held)
            twin.register(table, keys, last)
            twin.pool.release([table])
            hits = Counter({Tier.G1: held, **Counter(brought)})
            assert tiered.serve(manager, tokens) == {tier: n * tiered.SIZE for tier, n in hits.items() if n}
            found += hits
        tiered.settle(manager)
        for store in stores:
            stored = {record.key.sequence_hash for _, record in store.records()}
            assert stored == {np.array(key[:4], "<u4").tobytes() for key in below.held[store.tier]}
    assert min(found[tier] for tier in (Tier.G1, Tier.G2, Tier.G3)) > 20


def test_a_block_is_worth_the_priority_it_was_registered_with():
    first, second, third = (tokens_of(range(i, i + 10)) for i in (100, 200, 300))
    with make("priority") as manager:
        with manager.start(first) as seq:
            assert manager.register(seq, 5 * SIZE, priority=9) == 5  # a system prompt, say
            manager.register(seq)
        with manager.start(second, priority=4) as seq:
            manager.register(seq)
        with manager.start(third, priority=1) as seq:
            manager.register(seq)
        with manager.start(tokens_of(range(400, 426))):  # 17 blocks must go: 5 of the first, 10 of the third, 2
            pass
        assert [manager.match(tokens) for tokens in (first, second, third)] == [5 * SIZE, 8 * SIZE, 0]
        for wrong in (-1, 2**32, 1.0):
            with pytest.raises(ConfigError, match=re.escape(f"priority is {wrong!r}")):
                manager.start(first, priority=wrong)
        with manager.start(first) as seq, pytest.raises(ConfigError, match="from 0 to 4,294,967,295"):
            manager.register(seq, priority=-1)


def chain(first, count):
    return hash_sequence(np.arange(first * SIZE, (first + count) * SIZE), SIZE)


class PoolTwin:
    """A `BlockPool` and its oracle, moved together; its sequences run one at a time in row 0, all whole blocks."""

    def __init__(self, name, num_blocks):
        self.book = BlockPool(
            num_blocks=num_blocks, block_size=SIZE, max_sequences=2, max_blocks=8, eviction_policy=CHOICES[name]
        )
        self.twin = Twin(name, num_blocks)

    def serve(self, hashes, priority):
        keys = [(*words, 0) for words in hashes.tolist()]
        started = self.book.start(0, hashes, len(hashes), len(hashes) * SIZE)
        table, found, evicted = self.twin.start(keys, len(keys))
        assert started.num_cached == SIZE * found
        assert started.evicted.block_ids.tolist() == [block for block, _ in evicted]
        assert self.book.table(0).tolist() == table
        if found < len(keys):
            self.book.register(0, hashes[found:], found, priority)
        self.twin.register(table, keys, found, priority)
        assert self.book.table(0).tolist() == table
        self.book.release(0)
        self.twin.pool.release([table])

    def resize(self, num_blocks):
        done = self.book.resize(num_blocks)
        _, evicted = self.twin.pool.resize(num_blocks)
        assert done.evicted.block_ids.tolist() == [block for block, _ in evicted]
        assert self.book.inactive_blocks().tolist() == list(self.twin.pool.inactive)


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "sizes"),
    [("priority", (9,)), *(pytest.param(name, (20, 9, 12, 9, 20), marks=LONG) for name in TWINS)],
)
def test_a_policy_remembers_through_other_sizes(name, sizes):
    d, rng = PoolTwin(name, 12), np.random.default_rng(5)
    for size in (12, *sizes):
        if size != d.twin.pool.num_blocks:
            d.resize(size)
        for _ in range(12):
            length, branch = int(rng.integers(1, 7)), int(rng.integers(0, 7))
            hashes = np.concatenate([chain(0, branch), chain(int(rng.integers(1, 4)) * 100, 6)])[:length]
            d.serve(hashes, int(rng.integers(3)))


def bare(policy, num_blocks=NUM_BLOCKS):
    return BlockPool(num_blocks=num_blocks, block_size=SIZE, max_sequences=2, max_blocks=WIDTH, eviction_policy=policy)


def fill(book, first, priority=0):
    """Leaves a chain of two blocks cached."""
    book.start(0, chain(first, 2), 2, 2 * SIZE)
    book.register(0, chain(first, 2), 0, priority)
    book.release(0)


def test_a_pool_made_elsewhere_begins_anew():
    book = bare("priority")
    fill(book, 0, priority=2)
    assert np.any(np.asarray(book._memory))
    book.install(pool_verbs.init(NUM_BLOCKS), book.sequences)
    assert not np.any(np.asarray(book._memory))


@LONG
def test_warming_up_tells_a_policy_nothing():
    counting = policies.EvictionPolicy(
        init=lambda num_blocks: np.zeros((2,), np.int32),
        registered=lambda memory, state, told: memory.at[0].add(1),
        hit=lambda memory, state, blocks: memory.at[1].add(1),
        scores=lambda memory, state: state.generations,
    )
    book = bare(counting, 4)
    for expected in ((0, 0), (1, 1)):
        book.warm_up()
        assert tuple(np.asarray(book._memory).tolist()) == expected
        fill(book, 0)


def test_memory_is_donated_and_written_in_place():
    book = bare("tiny_lfu")
    where = book._memory.counters.unsafe_buffer_pointer()
    for first in (0, 100, 200):
        fill(book, first)
        assert book._memory.counters.unsafe_buffer_pointer() == where


def test_without_a_policy_the_programs_are_the_bare_verbs():
    """Least recently released first costs nothing that was not there before there were policies."""
    state, running = pool_verbs.init(NUM_BLOCKS), sequences.init(2, 8, block_size=SIZE, pool_blocks=NUM_BLOCKS)
    lru = programs.of_policy(policies.named("lru"))
    rows, some, hashes = np.zeros((1,), np.int32), np.ones((1,), np.int32), np.zeros((1, 4, 4), np.uint32)
    plan = step_verb.StepPlan(rows, rows, hashes, some, some, rows, some, rows, rows, hashes[0, :1])
    assert lru.priorities([1], 8) is None
    cases = [
        (lru.start, sequences.start, (running, rows, hashes, some, some), {}),
        (lru.register, sequences.register, (running, rows, hashes, rows, some), {}),
        (lru.step, step_verb.step, (running, plan), {"max_blocks": 1}),
        (lru.extend, sequences.extend, (running, np.ones((2,), np.int32)), {"max_blocks": 1}),
        (lru.unshare, sequences.unshare, (running, np.ones((2,), np.bool_)), {}),
        (lru.reserve, grants.reserve, (np.int32(1),), {"max_blocks": 1}),
        (lru.allocate, pool_verbs.allocate, (some,), {"max_blocks": 1}),
        (lru.evict, pool_verbs.evict, (np.int32(1),), {"max_count": 1}),
    ]
    for bound, bare, args, static in cases:
        told = (None,) if bound in (lru.register, lru.step) else ()
        texts = [
            bound.lower((), state, *args, *told, **static).as_text(),
            jax.jit(bare, donate_argnums=0, static_argnames=tuple(static)).lower(state, *args, **static).as_text(),
        ]
        texts = [re.sub(r'module @\w+|result_info = "result[^"]*"', "", text) for text in texts]
        assert texts[0] == texts[1], bare.__name__


def test_a_policy_is_one_and_the_same_for_all_who_name_it():
    assert eviction.find("tiny_lfu") is policies.named("tiny_lfu")
    assert policies.as_policy(worth) is policies.as_policy(worth)
    assert policies.as_policy(policies.named("lru")) is policies.named("lru")


def test_what_is_neither_policy_nor_function_is_refused():
    with pytest.raises(ConfigError, match="5 is no eviction policy; give an EvictionPolicy, or a function"):
        bare(5)


def test_what_is_no_policy_is_refused_with_the_nearest():
    for make_one in (
        functools.partial(KvBlockManagerConfig, eviction_policy="tinylfu"),
        functools.partial(eviction.find, "tinylfu"),
    ):
        with pytest.raises(ConfigError, match=r"'tinylfu' is no eviction policy; .* \(the nearest is 'tiny_lfu'\)"):
            make_one()


PACKAGE = """
from kvbm_jax import policies

oldest = policies.scored(lambda block: -block.age)

def made():
    return policies.scored(lambda block: block.depth)

def broken():
    raise OSError("no such table")

number = int
"""


def test_packages_offer_policies_of_their_own(tmp_path, monkeypatch):
    (tmp_path / "offering.py").write_text(PACKAGE)
    about = tmp_path / "offering-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: offering\nVersion: 1.0\n")
    names = {"oldest": "oldest", "made": "made", "broken": "broken", "number": "number", "absent": "absent"}
    entries = "\n".join(f"{name} = offering:{value}" for name, value in names.items())
    (about / "entry_points.txt").write_text(f"[{eviction.KIND.group}]\n{entries}\nlru = offering:broken\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.metadata.MetadataPathFinder.invalidate_caches()

    for name in ("oldest", "made"):
        assert KvBlockManagerConfig(eviction_policy=name).eviction_policy == name
        assert isinstance(eviction.find(name), policies.EvictionPolicy)
        assert eviction.find(name) is eviction.find(name)
    assert eviction.find("lru") is policies.named("lru")
    for name, message in (
        ("broken", "cannot be loaded: no such table"),
        ("absent", "cannot be loaded"),
        ("number", "a int is there; offer an EvictionPolicy"),
    ):
        with pytest.raises(ConfigError, match=message):
            eviction.find(name)
    with pytest.raises(ConfigError, match="choose from lru, lineage, priority, tiny_lfu, absent, broken, made"):
        eviction.find("nothing")
    book = BlockPool(num_blocks=4, block_size=SIZE, max_sequences=1, max_blocks=4, eviction_policy="made")
    assert sum(book.stats()) == 4
