"""Verbs of the pool: what each promises in its docstring, and the ways to call them."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grids import hash_grid, id_grid, key
from hypothesis import given, settings

from kvbm_jax import invariants, lru, pool
from kvbm_jax.errors import LayoutError
from kvbm_jax.types import Status

pytestmark = pytest.mark.core

N, ROWS, WIDTH = 8, 3, 4
OK = Status.OK


@functools.cache
def verbs():
    return {
        "match": jax.jit(pool.match),
        "acquire": jax.jit(pool.acquire),
        "allocate": jax.jit(functools.partial(pool.allocate, max_blocks=WIDTH)),
        "register": jax.jit(pool.register),
        "release": jax.jit(pool.release),
        "evict": jax.jit(functools.partial(pool.evict, max_count=WIDTH)),
        "clear": jax.jit(pool.clear),
        "compact": jax.jit(pool.compact),
        "check": jax.jit(invariants.check),
        "generations": jax.jit(pool.check_generations),
    }


def ids(*rows):
    return id_grid(rows, (ROWS, WIDTH), N)


def hashes(*rows):
    return hash_grid(rows, (ROWS, WIDTH))


def counts(*values):
    return jnp.array([*values, *[0] * (ROWS - len(values))], jnp.int32)


def queue_order(state):
    """Inactive blocks, the next to be evicted first."""
    queue = jax.tree.map(np.asarray, state.inactive)
    position = int(queue.head) + np.arange((int(queue.tail) - int(queue.head)) % 2**32)
    entry = position % len(queue.ring)
    return queue.ring[entry[np.asarray(lru.live(state.inactive))[entry]]].tolist()


def stack(state):
    """Reset blocks, the next to be granted first."""
    return np.asarray(state.reset_stack)[: int(state.num_reset)][::-1].tolist()


class Pool:
    """A pool called row by row with Python lists; its laws are checked after each call."""

    def __init__(self):
        self.state = pool.init(N)
        self.do = verbs()

    def _keep(self, state):
        assert not any(int(broken) for broken in self.do["check"](state))
        self.state = state

    def allocate(self, *wanted):
        state, result = self.do["allocate"](self.state, counts(*wanted))
        self._keep(state)
        self.evicted = result.evicted
        return [[b for b in row if b != N] for row in result.block_ids.tolist()], result.status.tolist()

    def register(self, blocks, numbers, group=0):
        state, result = self.do["register"](self.state, ids(*blocks), hashes(*numbers), group=group)
        self._keep(state)
        return [
            [part[i][: len(row)] for i, row in enumerate(blocks)]
            for part in (result.block_ids.tolist(), result.registered.tolist(), result.status.tolist())
        ]

    def match(self, *numbers, group=0):
        lengths = counts(*map(len, numbers))
        result = self.do["match"](self.state, hashes(*numbers), lengths, group=group)
        found = [[b for b in row if b != N] for row in result.block_ids.tolist()]
        assert [len(row) for row in found] == result.num_blocks.tolist()
        return found[: len(numbers)]

    def acquire(self, *rows):
        state, status = self.do["acquire"](self.state, ids(*rows))
        self._keep(state)
        return status.tolist()[: len(rows)]

    def release(self, *rows):
        state, status = self.do["release"](self.state, ids(*rows))
        self._keep(state)
        return status.tolist()[: len(rows)]

    def cache(self, *numbers):
        """Makes one row of keys resident and inactive."""
        (row, *_), (status, *_) = self.allocate(len(numbers))
        assert status == OK
        (row,), _, _ = self.register([row], [list(numbers)])
        assert self.release(row) == [OK]
        return row

    @property
    def refs(self):
        return self.state.ref_counts.tolist()


def observable(state, universe=range(16)):
    """All that a caller can tell of a pool: not in which way of the index a key stands, nor what is scratch."""
    found = [
        verbs()["match"](state, hashes(*([n] for n in universe[i : i + ROWS])), counts(1, 1, 1)).block_ids[:, 0]
        for i in range(0, len(universe), ROWS)
    ]
    parts = (state.ref_counts, state.generations, *found)
    return [stack(state), queue_order(state), *(part.tolist() for part in parts)]


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- allocate


def test_a_new_pool_grants_block_0_first_and_the_last_reset_block_next():
    p = Pool()
    assert p.allocate(2, 0, 1) == ([[0, 1], [], [2]], [OK] * 3)
    assert p.release([0, 1]) == [OK]
    assert p.allocate(1)[0][0] == [0]  # the last to come was block 0, since tails are released first
    assert pool.stats(p.state) == (6, 0, 2)


def test_the_first_row_that_does_not_fit_and_all_later_ones_get_none():
    p = Pool()
    p.allocate(3)
    granted, status = p.allocate(2, 4, 1)
    assert (granted, status) == ([[3, 4], [], []], [OK, Status.OUT_OF_BLOCKS, Status.OUT_OF_BLOCKS])
    granted, status = p.allocate(4, 0, 0)
    assert (granted, status) == ([[], [], []], [Status.OUT_OF_BLOCKS] * 3)  # even rows that want nothing
    assert p.allocate(3)[1] == [OK] * 3
    assert p.allocate(0)[1] == [OK] * 3


def test_a_count_that_is_no_count_is_told_and_takes_nothing_from_later_rows():
    p = Pool()
    assert p.allocate(-1, WIDTH + 1, 2) == ([[], [], [0, 1]], [Status.INVALID_COUNT, Status.INVALID_COUNT, OK])
    assert p.refs == [1, 1] + [0] * 6


def test_inactive_blocks_are_evicted_after_reset_ones_and_reported_with_hash_and_group():
    p = Pool()
    p.cache(1, 2)
    (row, *_), _ = p.allocate(1)
    p.register([row], [[3]], group=5)
    p.release(row)
    assert p.allocate(4, 1, 3) == ([[3, 4, 5, 6], [7], [1, 0, 2]], [OK] * 3)
    assert p.evicted.num_blocks == 3
    assert p.evicted.block_ids.tolist() == [1, 0, 2] + [N] * 9
    assert p.evicted.hashes.tolist()[:3] == [list(key(n)) for n in (2, 1, 3)]
    assert p.evicted.groups.tolist()[:3] == [0, 0, 5]
    assert p.match([1], [2], [3]) == [[], [], []]


def test_lru_order_of_two_sequences_that_share_a_prefix():
    p = Pool()
    # A = 11 12 13 14 in blocks 0 1 2 3; B = 11 12 23 24 hits 0 1 and gets 4 5.
    (a, *_), _ = p.allocate(4)
    p.register([a], [[11, 12, 13, 14]])
    prefix = p.match([11, 12, 23, 24])[0]
    assert prefix == [0, 1]
    assert p.acquire(prefix) == [OK]
    (fresh, *_), _ = p.allocate(2)
    assert fresh == [4, 5]
    p.register([fresh], [[23, 24]])
    assert p.refs == [2, 2, 1, 1, 1, 1, 0, 0]
    assert p.release(a) == [OK]
    assert queue_order(p.state) == [3, 2]  # 0 and 1 are B's still
    assert p.release([*prefix, *fresh]) == [OK]
    assert queue_order(p.state) == [3, 2, 5, 4, 1, 0]
    # A hit in the middle of the queue leaves it and rejoins at its release.
    assert p.acquire(p.match([11, 12, 13])[0]) == [OK]
    assert queue_order(p.state) == [3, 5, 4]
    assert p.release([0, 1, 2]) == [OK]
    assert queue_order(p.state) == [3, 5, 4, 2, 1, 0]
    # Reset blocks go first, then tails before their prefixes.
    assert p.allocate(4)[0][0] == [6, 7, 3, 5]
    assert p.evicted.hashes.tolist()[:2] == [list(key(n)) for n in (14, 24)]
    assert p.match([11, 12, 13, 14], [11, 12, 23, 24]) == [[0, 1, 2], [0, 1, 4]]


# --- match and acquire


def test_match_stops_at_the_first_miss_and_at_the_count():
    p = Pool()
    row = p.cache(1, 2, 3)
    assert p.match([1, 2, 9, 3], [1, 2, 3], [9, 1]) == [row[:2], row, []]
    capped = p.do["match"](p.state, hashes([1, 2, 3], [1], [1]), counts(2, 0, 99))
    assert capped.num_blocks.tolist()[:2] == [2, 0]
    assert int(capped.num_blocks[2]) == 1  # a count beyond the hashes is no more than the hashes


def test_a_match_of_no_hashes_finds_nothing():
    result = pool.match(pool.init(N), jnp.zeros((2, 0, 4), jnp.uint32), jnp.zeros((2,), jnp.int32))
    assert result.block_ids.shape == (2, 0)
    assert result.num_blocks.tolist() == [0, 0]


def test_acquire_refuses_the_whole_row_that_names_an_unknown_or_a_reset_block():
    p = Pool()
    inactive = p.cache(1)[0]
    (row, *_), _ = p.allocate(1)
    mutable, reset = row[0], 7
    assert p.acquire([inactive, N + 1], [mutable, reset], [mutable, -1, reset]) == [
        Status.UNKNOWN_BLOCK,
        Status.NOT_RESIDENT,
        Status.UNKNOWN_BLOCK,
    ]
    assert (p.refs[inactive], p.refs[mutable], p.refs[reset]) == (0, 1, 0)
    assert p.acquire([inactive, mutable, inactive], []) == [OK, OK]
    assert (p.refs[inactive], p.refs[mutable]) == (2, 2)
    assert queue_order(p.state) == []


# --- register


def test_statuses_of_register():
    p = Pool()
    (a, b, _), _ = p.allocate(2, 1)
    inactive = p.cache(9)[0]
    assert p.register([[a[0], inactive, 7], [N + 1, -1]], [[1, 9, 7], [2, 3]]) == [
        [[a[0], inactive, 7], [N + 1, -1]],
        [[True, False, False], [False, False]],
        [[OK, Status.NOT_HELD, Status.NOT_HELD], [Status.UNKNOWN_BLOCK, Status.UNKNOWN_BLOCK]],
    ]
    # The same hash again is fine and nothing new; another hash is refused.
    assert p.register([[a[0]], [a[0]]], [[1], [2]]) == [
        [[a[0]], [a[0]]],
        [[False], [False]],
        [[OK], [Status.ALREADY_REGISTERED]],
    ]
    # A block named twice counts where it is named first; naming it again by the same hash is fine.
    assert p.register([[a[1], a[1]], [b[0], a[1]]], [[3, 5], [4, 3]]) == [
        [[a[1], a[1]], [b[0], a[1]]],
        [[True, False], [True, False]],
        [[OK, Status.ALREADY_REGISTERED], [OK, OK]],
    ]
    assert p.match([3], [4], [2]) == [[a[1]], b, []]


def test_a_duplicate_can_be_kept():
    p = Pool()
    (first, second, _), _ = p.allocate(1, 1)
    p.register([first], [[1]])
    state, result = pool.register(p.state, ids(second), hashes([1]), keep_duplicates=True)
    assert result.block_ids[0, 0] == second[0]
    assert not result.registered[0, 0]
    assert result.status[0, 0] == OK
    assert [int(state.ref_counts[b]) for b in (*first, *second)] == [1, 1]
    invariants.assert_holds(state)


def test_scanning_does_not_stop_at_a_miss():
    p = Pool()
    cached = p.cache(1, 2, 4)
    found = pool.scan(p.state, hashes([3, 1, 4], [2, 2]), counts(3, 1))
    assert found.tolist()[0][:3] == [N, cached[0], cached[2]]
    assert found.tolist()[1][:2] == [cached[1], N]
    with pytest.raises(LayoutError, match="give B counts"):
        pool.scan(p.state, hashes([1]), jnp.zeros((9,), jnp.int32))


def test_a_duplicate_gives_way_to_the_canonical_block_and_its_hold_moves():
    p = Pool()
    (first, second, third), _ = p.allocate(2, 2, 1)
    p.register([first], [[1, 2]])
    p.acquire([second[1]])  # somebody else holds the second duplicate too
    blocks, new, status = p.register([second, third], [[1, 2], [1]])
    assert blocks == [first, [first[0]]]
    assert new == [[False, False], [False]]
    assert status == [[OK, OK], [OK]]
    assert [p.refs[b] for b in (*first, *second, *third)] == [3, 2, 0, 1, 0]
    assert stack(p.state)[:2] == [third[0], second[0]]  # reset in row order
    assert p.release(first, first, [first[0], second[1]]) == [OK] * 3
    assert p.refs == [0] * N


def test_a_duplicate_of_an_inactive_block_brings_it_back():
    p = Pool()
    old = p.cache(1)[0]
    (row, *_), _ = p.allocate(1)
    assert p.register([row], [[1]])[0] == [[old]]
    assert (p.refs[old], p.refs[row[0]]) == (1, 0)
    assert queue_order(p.state) == []


def test_of_equal_hashes_in_one_call_the_first_wins():
    p = Pool()
    (a, b, _), _ = p.allocate(2, 2)
    assert p.register([a, b], [[1, 1], [2, 1]]) == [
        [[a[0], a[0]], [b[0], a[0]]],
        [[True, False], [True, False]],
        [[OK, OK], [OK, OK]],
    ]
    assert p.refs[a[0]] == 3


def test_one_hash_under_two_groups_is_two_blocks():
    p = Pool()
    (row, *_), _ = p.allocate(2)
    assert p.register([row[:1]], [[1]], group=0)[1] == [[True]]
    assert p.register([row[1:]], [[1]], group=1)[1] == [[True]]
    assert p.match([1], group=0) == [row[:1]]
    assert p.match([1], group=1) == [row[1:]]
    assert p.match([1], group=2) == [[]]


# --- release


def test_a_double_release_is_told_to_every_row_that_took_part():
    p = Pool()
    (row, *_), _ = p.allocate(2)
    assert p.release(row, [row[0]], [row[1], N, N]) == [Status.NOT_HELD] * 3
    assert p.refs == [0] * N
    assert p.release(row, [N + 2], []) == [Status.NOT_HELD, Status.UNKNOWN_BLOCK, OK]
    (row, *_), _ = p.allocate(1)
    assert p.release([row[0], -1]) == [Status.UNKNOWN_BLOCK]  # its known blocks are released all the same
    assert p.refs == [0] * N


def test_one_call_releases_rows_in_order_and_each_row_from_its_end():
    p = Pool()
    (a, b, _), _ = p.allocate(3, 3)
    p.register([a, b], [[1, 2, 3], [4, 5, 6]])
    p.acquire([a[0]])
    assert p.release(b, [*a, a[0]]) == [OK, OK]
    assert queue_order(p.state) == [*b[::-1], *a[::-1]]


def test_without_room_in_the_queue_nothing_is_released_until_it_is_compacted():
    p = Pool()
    resident = [*p.cache(0, 1, 2, 3), *p.cache(4, 5, 6, 7)]
    head = queue_order(p.state)[0]
    rest = [b for b in resident if b != head]

    @jax.jit
    def hit_again_and_again(state, rows):
        def turn(_, state):
            return pool.release(pool.acquire(state, rows)[0], rows)[0]

        return jax.lax.fori_loop(0, (lru.init(N).ring.size - 8 - 4) // 4, turn, state)

    p._keep(hit_again_and_again(p.state, ids(rest[:4])))
    assert int(pool.release_room(p.state)) == 4
    assert p.acquire(rest[:4], [rest[4]]) == [OK, OK]
    before = p.state
    assert p.release(rest[:4], [rest[4]]) == [Status.QUEUE_FULL] * 2
    assert observable(before) == observable(p.state)
    order = queue_order(p.state)
    p._keep(p.do["compact"](p.state))
    assert int(pool.release_room(p.state)) >= N
    assert queue_order(p.state) == order
    assert p.release(rest[:4], [rest[4]]) == [OK, OK]
    assert queue_order(p.state) == [*order, *rest[3::-1], rest[4]]


# --- evict, clear, generations, stats


def test_evict_resets_the_least_recently_released_and_no_more_than_there_are():
    p = Pool()
    p.cache(1, 2, 3)
    held = p.cache(4)
    p.acquire(held)
    p._keep(state := p.do["evict"](p.state, jnp.int32(2))[0])
    assert queue_order(state) == [0]
    state, evicted = p.do["evict"](state, jnp.int32(WIDTH))
    p._keep(state)
    assert evicted.num_blocks == 1
    assert evicted.block_ids.tolist() == [0] + [N] * (WIDTH - 1)
    assert evicted.hashes.tolist()[0] == list(key(1))
    for count in (-3, 0):
        assert p.do["evict"](state, jnp.int32(count))[1].num_blocks == 0
    assert p.match([4]) == [held]
    assert stack(state)[:3] == [0, 1, 2]


def test_clear_resets_all_that_nobody_holds():
    p = Pool()
    p.cache(1, 2)
    held = p.cache(3)
    p.acquire(held)
    state, evicted = p.do["clear"](p.state)
    p._keep(state)
    assert evicted.num_blocks == 2
    assert pool.stats(state) == (N - 1, 0, 1)
    assert p.match([1], [3]) == [[], held]


def test_a_handle_is_stale_once_its_block_is_granted_anew():
    p = Pool()
    (row, *_), _ = p.allocate(2)
    block = jnp.array(row, jnp.int32)
    handle = p.state.generations[block]

    def ask(blocks, generations):
        return p.do["generations"](p.state, blocks, generations).tolist()

    assert ask(block, handle) == [OK, OK]
    p.register([row], [[1, 2]])
    assert ask(block, handle) == [OK, OK]
    p.release(row)
    assert ask(block, handle) == [Status.NOT_HELD] * 2
    p.acquire(row[:1])  # a hit is no new grant
    assert ask(block, handle) == [OK, Status.NOT_HELD]
    p.allocate(4, 3)
    assert ask(block, handle) == [OK, Status.STALE_GENERATION]
    assert ask(jnp.array([N, -1], jnp.int32), handle) == [Status.UNKNOWN_BLOCK] * 2


def test_generations_wrap():
    state = pool.init(N)
    state = jax.tree.map(lambda x: x, state)
    object.__setattr__(state, "generations", jnp.full((N,), 2**32 - 1, jnp.uint32))
    state, _ = verbs()["allocate"](state, counts(1))
    assert state.generations.tolist()[:2] == [0, 2**32 - 1]


# --- ways to call


@functools.cache
def used_state():
    p = Pool()
    p.cache(1, 2, 3)
    (row, *_), _ = p.allocate(2)
    p.register([row[:1]], [[4]])
    return p.state


CALLS = {
    "match": (hashes([1, 2], [4], [9]), counts(2, 1, 1)),
    "acquire": (ids([0, 1], [3], [7]),),
    "allocate": (counts(1, 4, 1),),
    "register": (ids([4, 3], [4], [0]), hashes([1, 4], [5], [1])),
    "release": (ids([3, 4], [3]),),
    "evict": (jnp.int32(2),),
    "clear": (),
    "compact": (),
}


@pytest.mark.parametrize("verb", CALLS)
def test_jit_is_eager(verb):
    eager = {
        "allocate": functools.partial(pool.allocate, max_blocks=WIDTH),
        "evict": functools.partial(pool.evict, max_count=WIDTH),
    }.get(verb, getattr(pool, verb))
    same(eager(used_state(), *CALLS[verb]), verbs()[verb](used_state(), *CALLS[verb]))


def step(state, wanted, tokens):
    """Every verb once: hit and hold, grant, register, release half of it, evict one."""
    found = pool.match(state, tokens, jnp.full((ROWS,), WIDTH, jnp.int32))
    state, acquired = pool.acquire(state, found.block_ids)
    state, grant = pool.allocate(state, wanted, max_blocks=WIDTH)
    state, registered = pool.register(state, grant.block_ids, tokens)
    state, released = pool.release(state, found.block_ids)
    state, again = pool.release(state, registered.block_ids.at[0].set(N))
    state, evicted = pool.evict(state, wanted[0], max_count=2)
    return state, (found, acquired, grant, registered, released, again, evicted)


@functools.cache
def steps(count):
    rng = np.random.default_rng(5)
    wanted = jnp.asarray(rng.integers(0, WIDTH + 1, (count, ROWS)), jnp.int32)
    keys = np.array([key(n) for n in range(16)], np.uint32)
    return wanted, jnp.asarray(keys[rng.integers(0, 16, (count, ROWS, WIDTH))])


@functools.cache
def jitted_step():
    return jax.jit(step)


def test_scan_is_one_call_after_the_other():
    wanted, tokens = steps(6)
    state, results = pool.init(N), []
    for i in range(6):
        state, result = jitted_step()(state, wanted[i], tokens[i])
        results.append(result)
    scanned, stacked = jax.jit(lambda state: jax.lax.scan(lambda s, x: step(s, *x), state, (wanted, tokens)))(
        pool.init(N)
    )
    same(scanned, state)
    same(stacked, jax.tree.map(lambda *parts: np.stack(parts), *results))
    assert len(np.unique(np.asarray(stacked[2].status))) > 1  # some rows fit, some do not
    assert int(stacked[3].registered.sum()) > 4


def test_vmap_over_pools_is_each_pool_by_itself():
    wanted, tokens = steps(6)
    pools = jax.tree.map(lambda *parts: jnp.stack(parts), *(pool.init(N, seed=seed) for seed in range(3)))
    vmapped = jax.jit(jax.vmap(step))
    singles = [pool.init(N, seed=seed) for seed in range(3)]
    for i in (0, 3):
        pools, results = vmapped(pools, wanted[i : i + 3], tokens[i : i + 3])
        pairs = [jitted_step()(single, wanted[i + j], tokens[i + j]) for j, single in enumerate(singles)]
        singles = [state for state, _ in pairs]
        for j, (state, result) in enumerate(pairs):
            same(jax.tree.map(lambda x, j=j: x[j], pools), state)
            same(jax.tree.map(lambda x, j=j: x[j], results), result)


@settings(max_examples=40)
@given(data=st.data())
def test_a_batched_call_is_its_rows_one_after_the_other(data):
    draw, used = data.draw, Pool()
    for numbers in draw(st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=3, unique=True), max_size=2)):
        used.cache(*numbers)
    batched, alone = Pool(), Pool()
    batched.state = alone.state = used.state

    # allocate, until the first row that does not fit
    wanted = draw(st.lists(st.integers(0, WIDTH), min_size=ROWS, max_size=ROWS))
    granted, status = batched.allocate(*wanted)
    for i, count in enumerate(wanted):
        blocks, told = alone.allocate(*[0] * i, count)
        assert (blocks[i], told[i]) == (granted[i], status[i])
        if status[i] != OK:
            assert status[i:] == [Status.OUT_OF_BLOCKS] * (ROWS - i)
            break
    assert observable(alone.state) == observable(batched.state)

    # register, each block once
    numbers = [draw(st.lists(st.integers(0, 7), min_size=len(row), max_size=len(row))) for row in granted]
    got = batched.register(granted, numbers)
    for i in range(ROWS):
        single = alone.register([*[[]] * i, granted[i]], [*[[]] * i, numbers[i]])
        assert [part[i] for part in single] == [part[i] for part in got]
    assert observable(alone.state) == observable(batched.state)

    # acquire
    rows = draw(st.lists(st.lists(st.integers(0, N - 1), max_size=WIDTH), min_size=ROWS, max_size=ROWS))
    got = batched.acquire(*rows)
    assert [alone.acquire(*[[]] * i, rows[i])[i] for i in range(ROWS)] == got
    assert observable(alone.state) == observable(batched.state)

    # release what is held, no more often than that
    names = draw(st.permutations([b for b, refs in enumerate(batched.refs) for _ in range(refs)]))
    rows = [names[i * WIDTH : (i + 1) * WIDTH] for i in range(ROWS)]
    assert batched.release(*rows) == [OK] * ROWS
    assert [alone.release(*[[]] * i, rows[i])[i] for i in range(ROWS)] == [OK] * ROWS
    assert observable(alone.state) == observable(batched.state)


# --- mistakes of shape


def i32(*shape):
    return jnp.zeros(shape, jnp.int32)


def u32(*shape):
    return jnp.zeros(shape, jnp.uint32)


@pytest.mark.parametrize(
    ("call", "numbers"),
    [
        (lambda s: pool.init(0), ("0", "1")),
        (lambda s: pool.init(2**30 + 1), (str(2**30 + 1), str(2**30))),
        (lambda s: pool.match(s, u32(2, 4), i32(2)), ("uint32[2, 4]", "[B, M, 4]")),
        (lambda s: pool.match(s, i32(2, 3, 4), i32(2)), ("int32[2, 3, 4]", "uint32")),
        (lambda s: pool.match(s, u32(2, 3, 4), i32(1)), ("[2, 3, 4]", "[1]")),
        (lambda s: pool.register(s, i32(2, 3), u32(2, 3, 2)), ("[2, 3, 2]",)),
        (lambda s: pool.register(s, i32(2, 3), u32(2, 5, 4)), ("[2, 3]", "[2, 5, 4]")),
        (lambda s: pool.acquire(s, i32(3)), ("int32[3]", "int32[B, M]")),
        (lambda s: pool.release(s, i32(3)), ("int32[3]", "int32[B, M]")),
        (lambda s: pool.release(s, u32(3, 1)), ("uint32[3, 1]", "int32[B, M]")),
        (lambda s: pool.allocate(s, i32(3, 1), max_blocks=2), ("int32[3, 1]", "int32[B]")),
    ],
)
def test_mistakes_of_shape_raise_at_trace_time_with_both_numbers(call, numbers):
    with pytest.raises(LayoutError) as caught:
        jax.eval_shape(call, pool.init(N))
    for number in numbers:
        assert number in str(caught.value)


def test_every_status_has_a_message_with_a_remedy():
    for status in Status:
        assert status.message
