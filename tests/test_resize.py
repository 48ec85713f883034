"""Growing and shrinking a pool: against the oracle in random traces, and each promise of the docstring by itself."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import hash_grid, id_grid, key
from oracle import OraclePool

from kvbm_jax import invariants, pool, resize, sequences
from kvbm_jax.errors import LayoutError
from kvbm_jax.groups import Group
from kvbm_jax.types import Status

pytestmark = pytest.mark.core

ROWS, WIDTH = 2, 5
KEYS = 40
PLAIN = (Group(),)


@functools.cache
def verbs():
    return {
        "match": jax.jit(pool.match),
        "acquire": jax.jit(pool.acquire),
        "allocate": jax.jit(functools.partial(pool.allocate, max_blocks=WIDTH)),
        "register": jax.jit(pool.register),
        "release": jax.jit(pool.release),
        "compact": jax.jit(pool.compact),
        "check": jax.jit(invariants.check),
        "generations": jax.jit(pool.check_generations),
        "resize": jax.jit(resize.resize, static_argnums=2, static_argnames="max_blocks"),
        "inactive": jax.jit(resize.inactive_blocks, static_argnames="max_count"),
    }


def grid(rows, num_blocks):
    return id_grid(rows, (ROWS, WIDTH), num_blocks)


def hashes(*rows):
    return hash_grid(rows, (ROWS, WIDTH))


def empty(num_blocks, groups=PLAIN):
    return sequences.init(ROWS, WIDTH, block_size=4, pool_blocks=num_blocks, groups=groups)


def with_registered(state, numbers):
    """A pool that holds blocks under these keys, and the blocks."""
    n = state.num_blocks
    state, granted = verbs()["allocate"](state, jnp.array([len(numbers), 0], jnp.int32))
    state, done = verbs()["register"](state, granted.block_ids, hashes(numbers))
    assert n not in done.block_ids[0, : len(numbers)].tolist()
    return state, done.block_ids[0, : len(numbers)].tolist()


def release(state, blocks):
    state, status = verbs()["release"](state, grid([blocks], state.num_blocks))
    assert not np.any(status)
    return state


def listed(state):
    """Keys of the inactive blocks in the order of their eviction."""
    order = verbs()["inactive"](state, max_count=state.num_blocks)
    return [int(state.index.keys[block, 0]) for block in order if block < state.num_blocks]


class Twin:
    """Pool and oracle doing the same."""

    def __init__(self, num_blocks, seed):
        self.rng = np.random.default_rng(seed)
        self.state, self.oracle = pool.init(num_blocks), OraclePool(num_blocks)
        self.held = []  # one entry for each hold

    def allocate(self):
        wanted = self.rng.integers(0, WIDTH + 1, ROWS).tolist()
        self.state, result = verbs()["allocate"](self.state, jnp.array(wanted, jnp.int32))
        granted, _, evicted = self.oracle.allocate(wanted)
        np.testing.assert_array_equal(result.block_ids, grid(granted, self.oracle.num_blocks))
        count = int(result.evicted.num_blocks)
        assert result.evicted.block_ids.tolist()[:count] == [block for block, _ in evicted]
        fresh = [block for row in granted for block in row]
        for first in range(0, len(fresh), WIDTH):
            part = fresh[first : first + WIDTH]
            named = self.rng.choice(KEYS, len(part), replace=False).tolist()
            self.state, done = verbs()["register"](self.state, grid([part], self.oracle.num_blocks), hashes(named))
            self.oracle.register([[(block, key(number)) for block, number in zip(part, named, strict=True)]])
            self.held += done.block_ids[0, : len(part)].tolist()
        if self.rng.random() < 0.5:  # some that are held without being findable
            self.state, result = verbs()["allocate"](self.state, jnp.array([1, 0], jnp.int32))
            granted, _, _ = self.oracle.allocate([1])
            self.held += granted[0]

    def hit(self):
        numbers = self.rng.choice(KEYS, 3, replace=False).tolist()
        for number in numbers:
            found = self.oracle.match([key(number)])
            result = verbs()["match"](self.state, hashes([number]), jnp.array([1, 0], jnp.int32))
            assert result.block_ids[0, : len(found)].tolist() == found
            assert int(result.num_blocks[0]) == len(found)
            self.state, _ = verbs()["acquire"](self.state, grid([found], self.oracle.num_blocks))
            self.oracle.acquire([found])
            self.held += found

    def drop(self):
        self.rng.shuffle(self.held)
        count = int(self.rng.integers(0, min(WIDTH, len(self.held)) + 1))
        blocks, self.held = self.held[:count], self.held[count:]
        self.state, _ = verbs()["release"](self.state, grid([blocks], self.oracle.num_blocks))
        self.oracle.release([blocks])

    def resize(self, num_blocks, generation):
        before = self.state
        state, running, result = verbs()["resize"](before, empty(before.num_blocks), num_blocks, generation=generation)
        expected = self.oracle.resize(num_blocks)
        if expected is None:
            assert int(result.status) == Status.OUT_OF_BLOCKS
            return generation
        assert int(result.status) == Status.OK
        moved, evicted = expected
        count = int(result.evicted.num_blocks)
        assert result.evicted.block_ids.tolist()[:count] == [block for block, _ in evicted]
        assert [tuple(h) for h in result.evicted.hashes.tolist()[:count]] == [k for _, k in evicted]
        new_ids = np.asarray(result.new_ids)
        alive = np.flatnonzero(new_ids < num_blocks)
        assert {int(b): int(new_ids[b]) for b in alive if new_ids[b] != b} == moved
        kept = np.flatnonzero(np.asarray(result.sources) < before.num_blocks)
        assert sorted(new_ids[alive].tolist()) == kept.tolist()
        np.testing.assert_array_equal(new_ids[np.asarray(result.sources)[kept]], kept)
        assert running.pool_blocks == num_blocks
        self.state = state
        self.held = [int(new_ids[block]) for block in self.held]
        return result.generation

    def check(self):
        broken = verbs()["check"](self.state, jnp.array(self.oracle.refs, jnp.int32))
        assert not any(int(count) for count in broken), broken
        assert self.state.reset_stack.tolist()[: int(self.state.num_reset)] == self.oracle.reset
        assert listed(self.state) == [self.oracle.keys[block][0] for block in self.oracle.inactive]
        for number in range(KEYS):
            found = verbs()["match"](self.state, hashes([number]), jnp.array([1, 0], jnp.int32))
            expected = self.oracle.match([key(number)]) or [self.state.num_blocks]
            assert int(found.block_ids[0, 0]) == expected[0]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
def test_equals_the_oracle_in_random_traces(seed):
    twin = Twin(9, seed)
    generation, refused = jnp.uint32(0), 0
    sizes = [4, 9, 17]
    for _ in range(25):
        for _ in range(3):
            twin.rng.choice([twin.allocate, twin.hit, twin.drop, twin.drop])()
            twin.state = verbs()["compact"](twin.state)
        before = twin.oracle.num_blocks
        wanted = int(twin.rng.choice(sizes))
        generation = twin.resize(wanted, generation)
        refused += twin.oracle.num_blocks == before != wanted
        twin.check()
    assert refused < 25


@pytest.mark.long  # it compiles for many sizes
def test_only_blocks_beyond_the_new_size_move():
    state, blocks = with_registered(pool.init(8), range(5))  # blocks 0 to 4
    state = release(state, blocks[:2])
    state, more = with_registered(state, [7, 8])  # 5 and 6
    assert more == [5, 6]
    state, _, result = verbs()["resize"](state, empty(8), 6)
    # One must go: 1 was released first. Its place is taken by 6, the only one that lies beyond.
    assert result.new_ids.tolist() == [0, 6, 2, 3, 4, 5, 1, 6]
    assert result.sources.tolist() == [0, 6, 2, 3, 4, 5]
    assert result.evicted.hashes.tolist()[:1] == [list(key(1))]
    invariants.assert_holds(state)


def test_what_is_held_must_fit_and_a_refusal_leaves_the_former_pool():
    state, blocks = with_registered(pool.init(6), range(4))
    before = jax.tree.map(np.array, state)
    _, _, result = verbs()["resize"](state, empty(6), 3)
    assert int(result.status) == Status.OUT_OF_BLOCKS
    jax.tree.map(np.testing.assert_array_equal, before, state)
    _, _, result = verbs()["resize"](release(state, blocks[3:]), empty(6), 3)
    assert int(result.status) == Status.OK
    assert result.evicted.hashes.tolist()[0] == list(key(3))


@pytest.mark.long  # it compiles for many sizes
def test_holders_and_generations_stay_and_tables_follow():
    state, running = pool.init(10), empty(10)
    start = jax.jit(sequences.start)
    state, _ = with_registered(state, [30, 31, 32])  # held by nobody's table: blocks 0 to 2
    state, running, _ = start(
        state, running, jnp.array([0]), hashes([0])[:1], jnp.array([0]), jnp.array([13])
    )  # blocks 3 to 6
    state, running, _ = jax.jit(sequences.fork)(state, running, jnp.array([0]), jnp.array([1]))
    state = release(state, [0, 1])
    old = np.asarray(state.generations)
    resized, rows, result = verbs()["resize"](state, running, 5)
    assert int(result.status) == Status.OK
    # 0 and 1 were inactive and are evicted, 5 and 6 go where they were: 1 was evicted first, so 0 lies on top.
    assert rows.block_tables.tolist() == [[[3, 4, 0, 1, 5]] * 2]
    assert rows.lengths.tolist() == [13, 13]
    assert resized.ref_counts.tolist() == [2, 2, 1, 2, 2]
    assert resized.generations.tolist() == [old[0] + 1, old[1] + 1, old[2], old[3], old[4]]
    assert rows.pool_blocks == 5
    invariants.assert_holds(resized, jnp.array([2, 2, 1, 2, 2]))
    # All is given back as ever.
    resized, _, status = jax.jit(sequences.release)(resized, rows, jnp.array([0, 1]))
    assert not np.any(status)
    assert tuple(map(int, pool.stats(resized))) == (4, 0, 1)


@pytest.mark.long  # it compiles for many sizes
def test_handles_stay_current_or_go_stale_for_good():
    """No sequence of resizes and grants makes an old handle current again."""
    state = pool.init(6)
    handles, generation = [], jnp.uint32(0)
    current = {}
    rng = np.random.default_rng(3)
    for num_blocks in [6, 3, 8, 3, 6, 3, 8]:
        state, _, result = verbs()["resize"](state, empty(state.num_blocks), num_blocks, generation=generation)
        assert int(result.status) == Status.OK
        generation = result.generation
        current = {int(result.new_ids[block]): block for block in current}
        current = {block: int(state.generations[block]) for block in current if block < num_blocks}
        for _ in range(4):
            if current and rng.random() < 0.6:
                block = next(iter(current))
                del current[block]
                state = release(state, [block])
            elif len(current) < num_blocks:
                state, granted = verbs()["allocate"](state, jnp.array([1, 0], jnp.int32))
                block = int(granted.block_ids[0, 0])
                current[block] = int(state.generations[block])
                handles.append((block, current[block]))
        while len(current) > 1:  # so that the next size fits
            block = next(iter(current))
            del current[block]
            state = release(state, [block])
        ids = jnp.array([block for block, _ in handles], jnp.int32)
        status = verbs()["generations"](state, ids, jnp.array([g for _, g in handles], jnp.uint32))
        found = {handle for handle, code in zip(handles, status.tolist(), strict=True) if code == Status.OK}
        assert found <= set(current.items())
    assert len(handles) > 12
    assert len(set(handles)) == len(handles)


def test_order_survives_near_the_wrap_of_positions():
    state, blocks = with_registered(pool.init(8), range(5))
    near = jnp.uint32(2**32 - 3)
    state = replace(
        state,
        generations=state.generations.at[7].set(2**32 - 1),
        inactive=replace(state.inactive, head=near, tail=near),
    )
    for block in [2, 0, 4, 1, 3]:
        state = release(state, [blocks[block]])
    state, _, result = verbs()["resize"](state, empty(8), 4)
    assert listed(state) == [0, 4, 1, 3]
    assert int(result.generation) == 2**32 - 1


@pytest.mark.long  # it compiles for many sizes
def test_groups_and_wider_tables():
    state, running = pool.init(12), empty(12, (Group(), Group()))
    state, running, _ = jax.jit(sequences.start)(
        state, running, jnp.array([1]), hashes([0])[:1], jnp.array([0]), jnp.array([9])
    )
    resized, rows, result = verbs()["resize"](state, running, 20, max_blocks=7)
    assert int(result.status) == Status.OK
    assert rows.block_tables.shape == (2, ROWS, 7)
    np.testing.assert_array_equal(rows.block_tables[:, 1, :3], running.block_tables[:, 1, :3])
    assert set(np.asarray(rows.block_tables[:, 1, 3:]).ravel().tolist()) == {20}
    _, _, result = verbs()["resize"](state, running, 20, max_blocks=2)
    assert int(result.status) == Status.TABLE_FULL
    invariants.assert_holds(resized)


@pytest.mark.long  # it compiles for many sizes
def test_windows_that_have_passed_stay_passed():
    state, running = pool.init(12), empty(12, (Group(), Group(window=4)))
    state, running, _ = jax.jit(sequences.start)(
        state, running, jnp.array([1]), hashes([0])[:1], jnp.array([0]), jnp.array([17])
    )
    slide = jax.jit(sequences.slide, static_argnames="max_blocks")
    state, running, _ = slide(state, running, jnp.array([0, 16]), max_blocks=4)
    assert running.first.tolist() == [[0, 0], [0, 3]]
    resized, rows, result = verbs()["resize"](state, running, 8)
    assert int(result.status) == Status.OK
    assert rows.first.tolist() == running.first.tolist()
    assert rows.block_tables[1, 1, :3].tolist() == [8, 8, 8]
    assert not any(int(count) for count in invariants.check_sequences(rows))
    invariants.assert_holds(resized, jnp.bincount(rows.block_tables.ravel(), length=9)[:8])


def test_index_takes_another_seed():
    state, blocks = with_registered(pool.init(8), range(5))
    resized, _, result = verbs()["resize"](release(state, blocks), empty(8), 16, seed=jnp.uint32(9))
    assert int(result.status) == Status.OK
    assert int(resized.index.seed) == 9
    assert listed(resized) == [4, 3, 2, 1, 0]


def test_mistakes_raise_with_numbers():
    with pytest.raises(LayoutError, match="pool of 6 blocks, the pool has 5"):
        resize.resize(pool.init(5), empty(6), 4)
    with pytest.raises(LayoutError, match="num_blocks is 0"):
        resize.resize(pool.init(5), empty(5), 0)
