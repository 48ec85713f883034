"""Eviction policies: worked examples, and pools with a policy against the oracle with its twin."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import OraclePool
from policy_oracles import LineageOracle, LruOracle, PriorityOracle, ScoredOracle, TinyLfuOracle
from test_sequences import BLOCKS, HYBRID, MAX_BLOCKS, ONE, B, Driver, Model, T, queue_order, stack, walk
from test_step import P, make_plan, observed

from kvbm_jax import invariants, policies, pool, selection, sequences, sketch, step
from kvbm_jax.errors import LayoutError
from kvbm_jax.types import Status

pytestmark = pytest.mark.core


WIDTH = 8  # blocks that a call names at most
SIZE = 9


def worth(block):
    return (block.uses - 2 * block.priority) / (1 + block.age) - block.depth


def worth_in_numpy(uses, age, depth, priority):
    return (uses - 2 * priority) / (1 + age) - depth


POLICIES = {
    "lru": (policies.lru, lambda n: LruOracle()),
    "lineage": (policies.lineage, lambda n: LineageOracle()),
    "priority": (policies.priority, PriorityOracle),
    "tiny_lfu": (policies.tiny_lfu, TinyLfuOracle),
    "scored": (functools.partial(policies.scored, worth), lambda n: ScoredOracle(n, worth_in_numpy)),
}


@functools.cache
def verbs(name):
    """Verbs of a pool with a policy; all take its memory first."""
    policy = POLICIES[name][0]()

    def allocate(memory, state, counts):
        return pool.allocate(state, counts, max_blocks=WIDTH, scores=policies.bind(policy, memory))

    def evict(memory, state, count):
        return pool.evict(state, count, max_count=WIDTH, scores=policies.bind(policy, memory))

    return {
        "policy": policy,
        "allocate": jax.jit(allocate),
        "evict": jax.jit(evict),
        "registered": jax.jit(policy.registered),
        "hit": jax.jit(policy.hit),
        "register": jax.jit(pool.register),
        "acquire": jax.jit(pool.acquire),
        "release": jax.jit(pool.release),
        "compact": jax.jit(pool.compact),
        "check": jax.jit(invariants.check),
    }


def key_of(number):
    return (number, 7 * number, 0, 1)


class PoolDriver:
    """A pool with a policy and the oracle with its twin: blocks one by one, compared after each call."""

    def __init__(self, name, num_blocks=SIZE):
        self.n = num_blocks
        self.do = verbs(name)
        self.state = pool.init(num_blocks)
        self.memory = self.do["policy"].init(num_blocks)
        self.oracle = OraclePool(num_blocks, POLICIES[name][1](num_blocks))
        self.depths = {}

    def row(self, values, fill=None, dtype=jnp.int32):
        return jnp.array([*values, *[self.n if fill is None else fill] * (WIDTH - len(values))], dtype)

    def allocate(self, counts):
        padded = [*counts, *[0] * (2 - len(counts))]
        self.state, result = self.do["allocate"](self.memory, self.state, jnp.array(padded, jnp.int32))
        granted, status, evicted = self.oracle.allocate(padded)
        assert result.status.tolist() == status
        assert [[b for b in row if b != self.n] for row in result.block_ids.tolist()] == granted
        self.check_evicted(result.evicted, evicted)
        return [block for row in granted for block in row]

    def evict(self, count):
        self.state, result = self.do["evict"](self.memory, self.state, jnp.int32(count))
        expected = self.oracle.evict(count)
        self.check_evicted(result, expected)
        return [block for block, _ in expected]

    def check_evicted(self, found, expected):
        count = int(found.num_blocks)
        keys = [(*words, 0) for words in found.hashes.tolist()]
        assert list(zip(found.block_ids.tolist(), keys, strict=True))[:count] == [(b, (*k[:4], 0)) for b, k in expected]
        assert found.block_ids.tolist()[count:] == [self.n] * (len(found.block_ids) - count)
        self.check()

    def register(self, blocks, numbers, parents=None, priorities=None):
        """Registers held blocks, each after its parent (a block or None), and tells the policies of those it could."""
        parents = parents or [None] * len(blocks)
        priorities = priorities or [0] * len(blocks)
        hashes = np.zeros((1, WIDTH, 4), np.uint32)
        for i, number in enumerate(numbers):
            hashes[0, i] = key_of(number)
        self.state, result = self.do["register"](self.state, self.row(blocks)[None], jnp.asarray(hashes))
        told = self.oracle.register([[(b, (*key_of(k), 0)) for b, k in zip(blocks, numbers, strict=True)]])[0]
        assert result.block_ids[0].tolist()[: len(blocks)] == [block for block, _, _ in told]
        new = [i for i, (_, registered, _) in enumerate(told) if registered]
        for i in new:
            self.depths[blocks[i]] = 0 if parents[i] is None else self.depths[parents[i]] + 1
        entries = [(blocks[i], parents[i], self.depths[blocks[i]], priorities[i]) for i in new]
        self.memory = self.do["registered"](
            self.memory,
            self.state,
            policies.Registered(
                self.row([block for block, *_ in entries]),
                self.row([self.n if parent is None else parent for _, parent, *_ in entries]),
                self.row([depth for *_, depth, _ in entries], 0),
                self.row([priority for *_, priority in entries], 0, jnp.uint32),
            ),
        )
        self.oracle.policy.registered(self.oracle, entries)
        self.check()
        return [block for block, _, _ in told]

    def hit(self, blocks):
        self.state, status = self.do["acquire"](self.state, self.row(blocks)[None])
        assert status.tolist() == [Status.OK]
        self.oracle.acquire([blocks])
        self.memory = self.do["hit"](self.memory, self.state, self.row(blocks))
        self.oracle.policy.hit(self.oracle, blocks)
        self.check()

    def release(self, blocks):
        """The last is released first."""
        self.state, status = self.do["release"](self.state, self.row(blocks)[None])
        assert self.oracle.release([blocks]) == status.tolist() == [Status.OK]
        self.check()

    def fill(self, numbers, parents=None, priorities=None):
        """Allocates, registers and releases blocks, the first first."""
        blocks = self.allocate([len(numbers)])
        self.register(blocks, numbers, parents and [None if p is None else blocks[p] for p in parents], priorities)
        self.release(blocks[::-1])
        return blocks

    def check(self):
        assert not any(map(int, self.do["check"](self.state, jnp.array(self.oracle.refs, jnp.int32))))
        assert stack(self.state) == self.oracle.reset
        assert queue_order(self.state) == list(self.oracle.inactive)


@pytest.mark.parametrize(
    ("name", "num_blocks"), [*((name, SIZE) for name in POLICIES), ("lineage", 3), ("tiny_lfu", 3)]
)
def test_random_calls_match_the_oracle(name, num_blocks):
    rng = np.random.default_rng(num_blocks)
    d = PoolDriver(name, num_blocks)
    held = []  # with repeats
    evicted = 0
    for step_number in range(150):
        move = rng.integers(7)
        resident = sorted(d.oracle.keys)
        unregistered = [b for b in set(held) if b not in d.oracle.keys]
        if move <= 1:
            held += d.allocate(rng.integers(0, 5, 2).tolist())
        elif move == 2 and unregistered:
            blocks = rng.permutation(unregistered)[:4].tolist()
            parents = [int(rng.choice(resident)) if resident and rng.random() < 0.7 else None for _ in blocks]
            canonical = d.register(
                blocks, rng.integers(0, 60, len(blocks)).tolist(), parents, rng.integers(0, 3, len(blocks)).tolist()
            )
            for before, after in zip(blocks, canonical, strict=True):
                held[held.index(before)] = after
        elif move == 3 and resident:
            blocks = rng.choice(resident, int(rng.integers(1, 5))).tolist()
            d.hit(blocks)
            held += blocks
        elif move <= 5 and held:
            # Blocks of any age, in any order: parents before their children too.
            blocks = [held.pop(int(rng.integers(len(held)))) for _ in range(min(len(held), int(rng.integers(1, 5))))]
            d.release(blocks)
        elif move == 6:
            evicted += len(d.evict(int(rng.integers(0, 3))))
        if step_number % 100 == 99:
            d.state = d.do["compact"](d.state)
    assert evicted > 0


class PolicyModel(Model):
    """The model of sequences, telling the policy's twin what `note_hits` and `note_registered` tell the policy."""

    def start(self, rows, numbers, num_hashes, num_tokens):
        cached, status = super().start(rows, numbers, num_hashes, num_tokens)
        found = [
            block
            for row, n in zip(rows, cached, strict=True)
            for table in self.tables
            for block in table[row][: n // T]
            if block is not None
        ]
        self.pool.policy.hit(self.pool, found)
        return cached, status

    def register(self, rows, numbers, first):
        results = super().register(rows, numbers, first)
        told = []
        for table, result in zip(self.tables, results, strict=True):
            for row, start, entries in zip(rows, first, result, strict=True):
                for place, (block, new, _) in enumerate(entries, start):
                    if new:
                        told.append((block, table[row][place - 1] if place else None, place, row))
        self.pool.policy.registered(self.pool, told)
        return results


@functools.cache
def sequence_verbs(name):
    policy = POLICIES[name][0]()

    def start(memory, state, running, rows, hashes, num_hashes, num_tokens):
        scores = policies.bind(policy, memory)
        state, running, began = sequences.start(state, running, rows, hashes, num_hashes, num_tokens, scores=scores)
        return policies.note_hits(policy, memory, state, running, rows, began.num_cached), state, running, began

    def extend(memory, *args):
        scores = policies.bind(policy, memory)
        return memory, *sequences.extend(*args, max_blocks=MAX_BLOCKS, scores=scores)

    def unshare(memory, *args):
        return memory, *sequences.unshare(*args, scores=policies.bind(policy, memory))

    def register(memory, state, running, rows, hashes, first, counts):
        state, running, done = sequences.register(state, running, rows, hashes, first, counts)
        many = hashes.shape[1]
        each = jnp.repeat(rows, many)
        places = (first[:, None] + jnp.arange(many, dtype=jnp.int32)[None, :]).reshape(-1)
        new = done.registered.reshape(done.registered.shape[0], -1)
        memory = policies.note_registered(
            policy, memory, state, running, each, places, new, priorities=each.astype(jnp.uint32)
        )
        return memory, state, running, done

    return {verb.__name__: jax.jit(verb) for verb in (start, extend, unshare, register)}


class PolicyDriver(Driver):
    """Batch, pool and model with a policy; a block's priority is the row that registers it."""

    def __init__(self, windows, name):
        super().__init__(windows)
        policy, twin = POLICIES[name]
        self.memory = policy().init(self.n)
        self.model = PolicyModel(windows)
        self.model.pool.policy = twin(self.n)
        self.do = {**self.do, **{verb: self.remembering(do) for verb, do in sequence_verbs(name).items()}}

    def remembering(self, verb):
        def call(*args):
            self.memory, *results = verb(self.memory, *args)
            return results

        return call


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        *((name, ONE) for name in POLICIES if name != "lru"),
        ("lineage", HYBRID[0]),
        pytest.param("scored", HYBRID[0], marks=pytest.mark.long),
    ],
    ids=str,
)
def test_random_sequences_match_the_model(name, windows):
    hybrid = windows in HYBRID
    seen = walk(PolicyDriver(windows, name), np.random.default_rng([7, hybrid]), 140, hybrid=hybrid)
    assert {("start", Status.OK), ("cached", True), ("extend", Status.OK)} <= seen


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", POLICIES)
def test_twenty_traces_with_forks_trims_and_preemptions(name):
    seen = set()
    for seed in range(20):
        seen |= walk(PolicyDriver(ONE, name), np.random.default_rng([16, seed]), 140, preempting=True)
    assert {"resumed", ("trim", Status.OK), ("rewind", Status.OK), ("unshare", True, Status.OK)} <= seen


def test_lru_is_the_order_of_releases():
    d = PoolDriver("lru")
    a, b, c = d.fill([1, 2, 3])
    d.hit([a])
    d.release([a])
    assert d.evict(4) == [b, c, a]


def test_lineage_takes_leaves_and_then_their_parents():
    #     a        released in the order a b c e d f
    #    / \       leaves, oldest first: c, d, f. c goes; b is a leaf then, older than d.
    #   b   d      b goes; d is next, which leaves a to be a leaf: the oldest.
    #   |          Last e's only child f, then e.
    #   c     e-f
    d = PoolDriver("lineage")
    a, b, c, e, d_, f = d.fill([1, 2, 3, 4, 5, 6], parents=[None, 0, 1, None, 0, 3])
    assert d.evict(8) == [c, b, d_, a, f, e]


def test_lineage_spares_what_held_blocks_descend_from():
    d = PoolDriver("lineage")
    a, b, c = d.allocate([3])
    d.register([a, b, c], [1, 2, 3], [None, a, b])
    d.release([b, a])  # a first
    (other,) = d.fill([4])
    assert d.evict(1) == [other]
    assert d.evict(2) == [b, a]  # for want of any other, the deepest first
    d.release([c])
    assert d.evict(1) == [c]


def test_lineage_forgets_links_to_blocks_that_hold_something_else_now():
    d = PoolDriver("lineage")
    a, b = d.allocate([2])
    d.register([a, b], [1, 2], [None, a])
    d.release([a])
    assert d.evict(1) == [a]  # b, which follows it, is held
    again = d.allocate([1])
    assert again == [a]
    d.register([a], [3])
    d.release([a])
    d.release([b])
    assert d.evict(1) == [a]  # no leaf, had b still followed it


def test_lineage_sees_as_far_as_its_depth():
    n = 9
    hashes = jnp.zeros((1, n, 4), jnp.uint32).at[0, :, 0].set(jnp.arange(n, dtype=jnp.uint32))
    chain = jnp.arange(n, dtype=jnp.int32)

    def order(policy):
        """In which a chain goes that is released root first."""
        state, memory = pool.init(n), policy.init(n)
        state, granted = pool.allocate(state, jnp.array([n], jnp.int32), max_blocks=n)
        blocks = granted.block_ids
        state, _ = pool.register(state, blocks, hashes)
        parents = jnp.roll(blocks[0], 1).at[0].set(n)
        told = policies.Registered(blocks[0], parents, chain, chain.astype(jnp.uint32))
        scores = policies.bind(policy, policy.registered(memory, state, told))
        state, _ = pool.release(state, blocks[:, ::-1])
        return pool.evict(state, jnp.int32(n), max_count=n, scores=scores)[1].block_ids

    for depth in (n, None):
        assert jax.jit(order, static_argnums=0)(policies.lineage(max_depth=depth)).tolist() == list(range(n))[::-1]


def test_the_lowest_priority_goes_first():
    d = PoolDriver("priority")
    a, b, c, e, f = d.fill([1, 2, 3, 4, 5], priorities=[7, 0, 7, 2**31, 0])
    d.hit([b])
    d.release([b])
    assert d.evict(5) == [f, b, a, c, e]


def test_the_least_frequent_goes_first_and_old_fame_fades():
    # A pool of 4 halves its counts after every 40 occurrences.
    d = PoolDriver("tiny_lfu", 4)
    a, b, c = d.fill([1, 2, 3])  # counts 1 1 1
    for _ in range(2):
        d.hit([a, a, b])
        d.release([a, a, b])  # counts 5 3 1
    assert sketch.estimate(d.memory, d.state.index.keys)[jnp.array([a, b, c])].tolist() == [5, 3, 1]
    for _ in range(7):
        d.hit([c, c, c, c])
        d.release([c, c, c, c])  # 3 + 6 + 28 = 37 occurrences; c stopped at 15
    assert sketch.estimate(d.memory, d.state.index.keys)[jnp.array([a, b, c])].tolist() == [5, 3, 15]
    d.hit([b, b, b])
    d.release([b, b, b])  # the 40th: 5 6 15 become 2 3 7
    assert sketch.estimate(d.memory, d.state.index.keys)[jnp.array([a, b, c])].tolist() == [2, 3, 7]
    assert int(d.memory.samples) == 20
    assert d.evict(3) == [a, b, c]
    (back,) = d.fill([3])  # frequencies outlive evictions
    assert sketch.estimate(d.memory, d.state.index.keys[back]) == 8


def test_counters_stop_at_their_limit_however_many_a_call_adds():
    keys = jnp.tile(jnp.array([[1, 2, 3, 4, 5]], jnp.uint32), (1000, 1))
    counted = jax.jit(sketch.add)(sketch.init(1000), keys, jnp.arange(1000) < 700)
    assert sketch.estimate(counted, keys[0]) == 15
    assert int(counted.samples) == 700
    assert sketch.estimate(counted, keys[0] + 1) == 0


def test_a_function_of_ones_own_in_one_line():
    policy = policies.scored(lambda block: block.uses / (1 + block.age))
    state, memory = pool.init(4), policy.init(4)
    state, granted = pool.allocate(state, jnp.array([3], jnp.int32), max_blocks=3)
    blocks = granted.block_ids
    state, _ = pool.register(state, blocks, jnp.arange(12, dtype=jnp.uint32).reshape(1, 3, 4))
    zeros = jnp.zeros(3, jnp.int32)
    told = policies.Registered(blocks[0], zeros + 4, zeros, zeros.astype(jnp.uint32))
    memory = policy.registered(memory, state, told)
    memory = policy.hit(memory, state, blocks[0, jnp.array([1, 1, 1, 1])])  # 5 uses
    memory = policy.hit(memory, state, blocks[0, jnp.array([2])])  # 2 uses
    state, _ = pool.release(state, blocks)
    # Worth 1 / 3, 5 / 2 and 2 / 1.
    _, evicted = pool.evict(state, jnp.int32(3), max_count=3, scores=policies.bind(policy, memory))
    assert evicted.block_ids.tolist() == blocks[0, jnp.array([0, 2, 1])].tolist()


def test_numbers_keep_their_order_as_words():
    floats = [-np.inf, -3e38, -1.0, -1e-45, 0.0, 1e-45, 1e-38, 1.0, 2.0, 3e38, np.inf]
    words = selection.ordered(jnp.array(floats, jnp.float32)).tolist()
    assert words == sorted(words)
    assert len(set(words)) == len(words)
    nans = np.array([0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    assert selection.ordered(jnp.asarray(nans)).tolist() == [0] * 4
    assert min(words) > 0
    assert len(set(selection.ordered(jnp.array([0.0, -0.0], jnp.float32)).tolist())) == 1
    for dtype, numbers in ((jnp.int32, [-(2**31), -1, 0, 2**31 - 1]), (jnp.uint32, [0, 1, 2**31, 2**32 - 1])):
        words = selection.ordered(jnp.array(numbers, dtype)).tolist()
        assert words == sorted(set(words))


@pytest.mark.parametrize("seed", range(4))
def test_the_lowest_entries_are_those_of_a_sort(seed):
    rng = np.random.default_rng(seed)
    n, most = 100, 40
    lowest = jax.jit(functools.partial(selection.lowest, max_count=most))
    unique = rng.permutation(2**32 - 1 - np.arange(n, dtype=np.uint64) * (2**25 if seed % 2 else 1)).astype(np.uint32)
    words = [rng.integers(0, 3, n, dtype=np.uint32) * np.uint32(2**31 - 1), unique]
    mask = rng.random(n) < 0.6
    order = [i for i in np.lexsort(words[::-1]) if mask[i]]
    for count in (0, 1, 7, most):
        found = lowest([jnp.asarray(word) for word in words], jnp.asarray(mask), jnp.int32(count))
        assert found.tolist() == order[:count] + [n] * (most - count)


def test_scores_of_the_wrong_shape_or_type_are_told():
    state = pool.init(4)
    for scores in (jnp.zeros(3, jnp.uint32), jnp.zeros(4, jnp.float32), jnp.zeros((2, 1, 4), jnp.uint32)):
        with pytest.raises(LayoutError, match=r"expected uint32\[4\]"):
            pool.evict(state, jnp.int32(1), max_count=1, scores=lambda _, scores=scores: scores)
    policy = policies.scored(lambda block: block.uses[:2])
    with pytest.raises(LayoutError, match=r"scores are \[2\] for 4 blocks"):
        pool.evict(state, jnp.int32(1), max_count=1, scores=policies.bind(policy, policy.init(4)))


@pytest.mark.parametrize(
    "name", ["lineage", *(pytest.param(name, marks=pytest.mark.long) for name in POLICIES if name != "lineage")]
)
def test_a_step_evicts_by_the_policy_what_it_has_just_released(name):
    d = PolicyDriver(ONE, name)
    d.start([0, 1], [[0, 0, 0, 0], [1, 1, 1, 1]], [T * 4, T * 4])
    d.start([3], [[1, 0, 0, 0]], [T * 2])
    d.register([0, 1], [[0, 0, 0, 0], [1, 1, 1, 1]], [0, 0])
    d.release([1])
    policy, memory = POLICIES[name][0](), d.memory
    plan = make_plan(ending=[0], starting=[(1, [1, 0, 1, 1], 4 * T), (2, [0, 1, 1, 1], 3 * T)])
    scores = policies.bind(policy, memory)
    state, running, result = jax.jit(functools.partial(step.step, max_blocks=MAX_BLOCKS, scores=scores))(
        d.pool, d.batch, plan
    )
    assert result.start_status.tolist()[:2] == [Status.OK, Status.OK]
    assert result.num_cached.tolist()[:2] == [T, T]
    assert int(result.evicted.num_blocks) == 3
    d.release([0])
    d.start([1, 2], [[1, 0, 1, 1], [0, 1, 1, 1]], [4 * T, 3 * T])
    assert observed(state, running) == observed(d.pool, d.batch)
    rows, places = jnp.full((P,), B, jnp.int32), jnp.zeros((P,), jnp.int32)
    memory = policies.note_hits(policy, memory, state, running, plan.starting, result.num_cached)
    jax.tree.map(np.testing.assert_array_equal, memory, d.memory)
    untouched = policies.note_registered(policy, memory, state, running, rows, places, result.registered)
    jax.tree.map(np.testing.assert_array_equal, memory, untouched)


@pytest.mark.parametrize("name", POLICIES)
def test_policies_compile_without_loops_of_unknown_length(name):
    policy = POLICIES[name][0]()
    n = BLOCKS[ONE]

    def everything(memory, state, blocks):
        state, _ = pool.evict(state, jnp.int32(2), max_count=4, scores=policies.bind(policy, memory))
        told = policies.Registered(blocks, blocks, blocks, blocks.astype(jnp.uint32))
        return policy.hit(policy.registered(memory, state, told), state, blocks), state

    text = str(jax.make_jaxpr(everything)(policy.init(n), pool.init(n), jnp.arange(4, dtype=jnp.int32)))
    for primitive in ("while", "cond[", "callback"):
        assert primitive not in text
