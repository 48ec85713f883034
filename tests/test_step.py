"""A step as one call against the verbs it stands for and against the model, for one group and for several."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_sequences import (
    BLOCKS,
    HYBRID,
    MAX_BLOCKS,
    ONE,
    TWO,
    WINDOWS,
    B,
    M,
    Model,
    R,
    T,
    W,
    chain,
    queue_order,
    stack,
    tables_of,
)

from kvbm_jax import index as block_index
from kvbm_jax import invariants, lru, pool, sequences, step
from kvbm_jax.errors import LayoutError
from kvbm_jax.groups import Group
from kvbm_jax.types import Status

pytestmark = pytest.mark.core

E, X, P = 2, 3, 6
OK = Status.OK


@functools.cache
def jitted():
    extend = functools.partial(sequences.extend, max_blocks=MAX_BLOCKS)
    return {
        "step": jax.jit(functools.partial(step.step, max_blocks=MAX_BLOCKS)),
        "slide": jax.jit(functools.partial(sequences.slide, max_blocks=MAX_BLOCKS)),
        "release": jax.jit(sequences.release),
        "start": jax.jit(sequences.start),
        "extend": jax.jit(extend),
        "register": jax.jit(sequences.register),
        "check": jax.jit(invariants.check),
        "check_sequences": jax.jit(invariants.check_sequences),
        "lookup": jax.jit(pool.scan),
    }


def padded(values, size, fill):
    return jnp.array([*values, *[fill] * (size - len(values))], jnp.int32)


def hashes(numbers, shape):
    """Hashes u32[*shape, 4] of the numbers of chains, in rows."""
    out = np.zeros((*shape, 4), np.uint32)
    for place, number in numbers.items():
        out[place] = (number, 5, number, 0)
    return jnp.asarray(out)


def make_plan(ending=(), starting=(), growing=(), complete=(), computed=None):
    """A plan of `ending` rows, (row, contents, tokens) that start, (row, tokens) that grow, (row, place, number)."""
    numbers = {(i, j): n for i, (_, contents, _) in enumerate(starting) for j, n in enumerate(chain(contents)[:M])}
    return step.StepPlan(
        ending=padded(ending, E, B),
        starting=padded([row for row, _, _ in starting], R, B),
        hashes=hashes(numbers, (R, M)),
        num_hashes=padded([max(min((n - 1) // T, M), 0) for _, _, n in starting], R, 0),
        num_tokens=padded([n for _, _, n in starting], R, 0),
        growing=padded([row for row, _ in growing], X, B),
        new_tokens=padded([n for _, n in growing], X, 0),
        complete_rows=padded([row for row, _, _ in complete], P, B),
        complete_places=padded([place for _, place, _ in complete], P, 0),
        complete_hashes=hashes({(i,): n for i, (_, _, n) in enumerate(complete)}, (P,)),
        num_computed=computed if computed is None else jnp.array(computed, jnp.int32),
    )


def by_verbs(state, running, plan):
    """The verbs in turn; rows that grow must be in ascending order."""
    do = jitted()
    if plan.num_computed is not None:
        state, running, _ = do["slide"](state, running, plan.num_computed)
    state, running, _ = do["release"](state, running, plan.ending)
    state, running, begun = do["start"](state, running, plan.starting, plan.hashes, plan.num_hashes, plan.num_tokens)
    if Status.OUT_OF_BLOCKS not in begun.status.tolist():
        tokens = jnp.zeros((B,), jnp.int32).at[plan.growing].set(plan.new_tokens, mode="drop")
        state, running, _ = do["extend"](state, running, tokens)
    state, running, _ = do["register"](
        state,
        running,
        plan.complete_rows,
        plan.complete_hashes[:, None],
        plan.complete_places,
        jnp.ones((P,), jnp.int32),
    )
    return state, running


def observed(state, running):
    """All of a pool and its batch that anything can depend on."""
    registered = np.asarray(block_index.is_registered(state.index, jnp.arange(state.num_blocks)))
    return {
        "refs": state.ref_counts.tolist(),
        "generations": state.generations.tolist(),
        "reset": stack(state),
        "inactive": queue_order(state),
        "keys": np.where(registered[:, None], state.index.keys, 0).tolist(),
        "registered": registered.tolist(),
        "tables": running.block_tables.tolist(),
        "lengths": running.lengths.tolist(),
        "num_blocks": running.num_blocks.tolist(),
    }


class Driver:
    """Step, verbs and model side by side, compared after each step."""

    def __init__(self, windows):
        self.n = BLOCKS[windows]
        self.state = pool.init(self.n)
        self.running = sequences.init(B, W, block_size=T, pool_blocks=self.n, groups=tuple(map(Group, windows)))
        self.model = Model(windows)

    def step(self, ending=(), starting=(), growing=(), complete=(), computed=None):
        plan = make_plan(ending, starting, growing, complete, computed)
        ascending = [row for row, _ in growing] == sorted(row for row, _ in growing)
        verbs = by_verbs(self.state, self.running, plan) if ascending else None
        self.state, self.running, result = jitted()["step"](self.state, self.running, plan)
        if verbs:
            assert observed(self.state, self.running) == observed(*verbs)
            assert pool.release_room(self.state) >= pool.release_room(verbs[0])
        told = self.in_model(ending, starting, growing, complete, computed)
        assert result.num_cached.tolist()[: len(starting)] == told["cached"]
        assert result.start_status.tolist()[: len(starting)] == told["start"]
        assert result.grow_status.tolist()[: len(growing)] == told["grow"]
        assert result.registered[:, : len(complete)].tolist() == told["registered"]
        assert result.register_status[:, : len(complete)].tolist() == told["register"]
        evicted = result.evicted
        count = int(evicted.num_blocks)
        gone = list(
            zip(
                evicted.block_ids.tolist(),
                zip(evicted.hashes[:, 0].tolist(), evicted.groups.tolist(), strict=True),
                strict=True,
            )
        )
        assert gone[:count] == told["evicted"]
        assert evicted.block_ids.tolist()[count:] == [self.n] * (len(gone) - count)
        self.check()
        return told

    def in_model(self, ending, starting, growing, complete, computed):
        evicted, evict = [], self.model.pool._evict

        def noted(order):
            evicted.append(evict(order))
            return evicted[-1]

        self.model.pool._evict = noted
        if computed is not None:
            self.model.slide(computed)
        self.model.release(ending)
        rows, contents, tokens = zip(*starting, strict=True) if starting else ((), (), ())
        cached, begun = self.model.start(
            rows, [chain(c)[:M] for c in contents], [max(min((n - 1) // T, M), 0) for n in tokens], tokens
        )
        full = Status.OUT_OF_BLOCKS in begun
        grown = self.model.extend([n for _, n in growing], [row for row, _ in growing], full=full)
        kept = [entry for entry in complete if entry[1] < len(self.model.tables[0][entry[0]])]
        assert len(kept) == len(complete)
        entries = self.model.register(
            [r for r, _, _ in complete], [[n] for _, _, n in complete], [p for _, p, _ in complete]
        )
        self.model.pool._evict = evict
        return {
            "cached": cached,
            "start": begun,
            "grow": grown,
            "registered": [[new for [(_, new, _)] in rows] for rows in entries],
            "register": [[status for [(_, _, status)] in rows] for rows in entries],
            "evicted": evicted,
        }

    def check(self):
        assert tables_of(self.running) == self.model.tables
        assert self.running.lengths.tolist() == self.model.lengths
        assert not any(map(int, jitted()["check_sequences"](self.running)))
        assert not any(map(int, jitted()["check"](self.state, invariants.holders(self.running))))
        assert stack(self.state) == self.model.pool.reset
        assert self.state.ref_counts.tolist() == self.model.pool.refs
        assert queue_order(self.state) == list(self.model.pool.inactive)


class Server:
    """Draws plans at random, as a server would: what is complete is registered a step later, once."""

    def __init__(self, driver, seed):
        self.driver, self.rng = driver, np.random.default_rng(seed)
        self.contents, self.registered = {}, {}

    def step(self):
        rng, model = self.rng, self.driver.model
        before = [b for b in range(B) if model.tables[0][b]]
        ending = rng.permutation(before)[: rng.integers(0, E + 1)].tolist()
        staying = [b for b in before if b not in ending]
        empty = rng.permutation([b for b in range(B) if b not in staying])
        starting = [
            (int(b), rng.integers(0, 2, W + 1).tolist(), int(rng.integers(1, W * T + 2)))
            for b in empty[: rng.integers(0, R + 1)]
        ]
        growing = [(int(b), int(rng.integers(-1, 11))) for b in rng.permutation(staying)[:X]]
        if rng.random() < 0.7:
            growing.sort()
        complete = [
            (b, place, chain(self.contents[b])[place])
            for b in staying
            for place in range(self.registered[b], model.lengths[b] // T)
        ][: rng.integers(0, P + 1)]
        computed = None
        if not all(window is None for window in model.windows):
            # What has been registered, sometimes more or less; also of rows that end.
            computed = [
                int(rng.integers(-1, model.lengths[b] + 2)) if rng.random() < 0.3 else T * self.registered.get(b, 0)
                for b in range(B)
            ]
        told = self.driver.step(ending, starting, growing, complete, computed)
        for b, place, _ in complete:
            self.registered[b] = place + 1
        for (b, contents, _), cached in zip(starting, told["cached"], strict=True):
            self.contents[b], self.registered[b] = contents, cached // T
        return told


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_random_steps_are_the_verbs_in_turn(windows, seed):
    server = Server(Driver(windows), [len(windows), seed])
    seen = set()
    for _ in range(200):
        told = server.step()
        seen |= {("start", s) for s in told["start"]} | {("grow", s) for s in told["grow"]}
        seen |= {("cached", n > 0) for n in told["cached"]} | {("evicted", bool(told["evicted"]))}
        seen |= {("new", new) for group in told["registered"] for new in group}
    assert {("start", s) for s in (OK, Status.OUT_OF_BLOCKS, Status.TABLE_FULL)} <= seen
    assert {("grow", s) for s in (OK, Status.OUT_OF_BLOCKS, Status.TABLE_FULL, Status.INVALID_COUNT)} <= seen
    assert {("cached", True), ("evicted", True), ("new", True), ("new", False)} <= seen
    assert jitted()["step"]._cache_size() <= len([ONE, TWO, *HYBRID])  # a program for each, whatever a plan says


def test_a_row_that_does_not_fit_gives_back_and_nothing_later_is_granted():
    d = Driver(ONE)
    d.step(starting=[(0, [0, 1, 1], 12), (1, [1, 0], 8)])
    d.step(complete=[(0, 0, 2), (0, 1, 5)])
    d.step(starting=[(2, [1, 1], 16)])
    d.step(ending=[0])  # 4 reset, of them none registered; 2 inactive
    told = d.step(starting=[(0, [0, 1, 0], 16), (3, [0, 0, 0, 0], 16)], growing=[(1, 1)])
    assert told["cached"] == [8, 0]
    assert told["start"] == [OK, Status.OUT_OF_BLOCKS]
    assert told["grow"] == [Status.OUT_OF_BLOCKS]


def test_a_shared_tail_does_not_grow():
    d = Driver(TWO)
    d.step(starting=[(0, [0, 1], 6)])
    d.model.fork([0], [1])
    d.state, d.running, _ = jax.jit(sequences.fork)(d.state, d.running, jnp.array([0]), jnp.array([1]))
    told = d.step(growing=[(1, 1), (0, 0)])
    assert told["grow"] == [Status.SHARED_TAIL, OK]
    # What ends in the same step shares no more.
    assert d.step(ending=[0], growing=[(1, 1)])["grow"] == [OK]


def test_a_row_that_ends_may_begin_anew_and_find_what_it_left():
    d = Driver(ONE)
    d.step(starting=[(0, [0, 1, 1], 12)])
    d.step(complete=[(0, 0, 2), (0, 1, 5), (0, 2, 11)])
    assert d.step(ending=[0], starting=[(0, [0, 1, 1, 0], 14)])["cached"] == [12]


def test_a_bound_on_what_a_step_grants_refuses_the_rows_beyond_it():
    d = Driver(ONE)
    bounded = jax.jit(functools.partial(step.step, max_blocks=MAX_BLOCKS, max_fresh=3))
    plan = make_plan(starting=[(0, [0, 1], 2 * T), (1, [1, 1], 2 * T)])
    state, running, result = bounded(d.state, d.running, plan)
    assert result.start_status.tolist() == [OK, Status.OUT_OF_BLOCKS]
    assert running.lengths.tolist() == [2 * T, 0, 0, 0]
    assert int(pool.stats(state).held) == 2
    _, running, result = bounded(state, running, make_plan(starting=[(1, [1, 1], 2 * T)], growing=[(0, T)]))
    assert (result.start_status.tolist()[0], result.grow_status.tolist()[0]) == (OK, OK)
    assert running.lengths.tolist() == [3 * T, 2 * T, 0, 0]


def test_without_room_in_the_queue_nothing_happens():
    d = Driver(ONE)
    d.step(starting=[(0, [0, 1, 1], 12)])
    d.step(complete=[(0, 0, 2), (0, 1, 5)])
    queue = d.state.inactive
    tail = queue.tail + lru.room(queue).astype(jnp.uint32) - jnp.uint32(2)
    state = replace(d.state, inactive=replace(queue, tail=tail))
    plan = make_plan([0], [(1, [1], 4)], [(0, 3)], [(0, 2, 11)])
    after, running, result = jitted()["step"](state, d.running, plan)
    assert observed(after, running) == observed(state, d.running)
    for status in (result.start_status, result.grow_status, result.register_status):
        assert set(np.ravel(status).tolist()) == {Status.QUEUE_FULL}
    assert not np.any(result.registered)
    assert int(result.evicted.num_blocks) == 0
    assert result.num_cached.tolist() == [0, 0]
    _, running, result = jitted()["step"](pool.compact(state), d.running, plan)
    assert result.start_status[0] == OK


def plans(count, windows=ONE):
    """Plans of a random server, stacked, with the pool and batch they begin from and those they end with."""
    d = Driver(windows)
    made, real = [], make_plan

    def noted(*args):
        made.append(real(*args))
        return made[-1]

    server = Server(d, 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "make_plan", noted)
        for _ in range(count):
            server.step()
    begun = Driver(windows)
    return (begun.state, begun.running), (d.state, d.running), made


def stacked(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def one_step(carry, plan):
    state, running, result = step.step(*carry, plan, max_blocks=MAX_BLOCKS)
    return (state, running), result


@pytest.mark.parametrize("windows", [ONE, (None, 6)], ids=str)
def test_a_scan_of_steps_is_one_after_the_other(windows):
    begun, ended, made = plans(30, windows)
    after, _ = jax.jit(functools.partial(jax.lax.scan, one_step), donate_argnums=0)(begun, stacked(made))
    assert observed(*after) == observed(*ended)


@pytest.mark.long
def test_vmap_over_pools_is_each_pool_by_itself():
    begun, _, made = plans(12)
    first, _ = jax.lax.scan(one_step, begun, stacked(made[:6]))
    carries, two = [begun, first], [made[0], made[6]]
    after, results = jax.jit(jax.vmap(one_step))(stacked(carries), stacked(two))
    for i, (carry, plan) in enumerate(zip(carries, two, strict=True)):
        expected, result = one_step(carry, plan)
        assert observed(*jax.tree.map(lambda leaf, i=i: leaf[i], after)) == observed(*expected)
        jax.tree.map(lambda leaf, told, i=i: np.testing.assert_array_equal(leaf[i], told), results, result)


def test_a_thousand_steps_compile_once():
    begun, _, made = plans(50)
    go = jax.jit(one_step, donate_argnums=0)
    for _ in range(20):
        carry = jax.tree.map(jnp.copy, begun)
        for plan in made:
            carry, _ = go(carry, plan)
    assert go._cache_size() == 1


def test_padding_takes_nothing_whatever_it_says():
    d = Driver(ONE)
    tokens = jnp.full((R,), 5, jnp.int32)
    plan = make_plan()._replace(num_hashes=tokens, num_tokens=tokens, new_tokens=jnp.full((X,), 5, jnp.int32))
    state, running, _ = jitted()["step"](d.state, d.running, plan)
    assert observed(state, running) == observed(d.state, d.running)


def test_more_hashes_than_a_table_has_blocks_are_refused():
    d = Driver(ONE)
    plan = make_plan()._replace(hashes=jnp.zeros((R, W + 1, 4), jnp.uint32))
    with pytest.raises(LayoutError, match=rf"{W + 1} hashes a row exceed the table's {W} blocks"):
        step.step(d.state, d.running, plan)


def test_a_step_holds_nothing_that_depends_on_data():
    """No loop of unknown length, no branch, no callback: neither as written nor as compiled."""
    state, running = pool.init(4096), sequences.init(8, 8, block_size=T, pool_blocks=4096)
    plan = make_plan()
    jaxpr = str(jax.make_jaxpr(step.step)(state, running, plan))
    text = jax.jit(step.step, donate_argnums=(0, 1)).lower(state, running, plan).compile().as_text()
    for name in ("while", "cond", "scan", "callback", "io_effect"):
        assert f" {name}[" not in jaxpr
    for name in ("while(", "conditional(", "custom-call("):
        assert f" {name}" not in text
