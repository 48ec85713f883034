"""Quotas against their twin in plain Python, and what they promise to tenants."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quota_oracle import QuotaModel
from test_sequences import BLOCKS, HYBRID, MAX_BLOCKS, ONE, B, Driver, T, chain, column, hash_rows, walk
from test_step import Server, make_plan

from kvbm_jax import grants, invariants, lru, quota_step, quotas, selection
from kvbm_jax.errors import LayoutError
from kvbm_jax.types import Status

pytestmark = pytest.mark.core

OK, EXCEEDED = Status.OK, Status.QUOTA_EXCEEDED
M = 3
NOBODY = 2  # of two tenants


@functools.cache
def verbs():
    return {
        "start": jax.jit(quotas.start),
        "extend": jax.jit(functools.partial(quotas.extend, max_blocks=MAX_BLOCKS)),
        "unshare": jax.jit(quotas.unshare),
        "settle": jax.jit(quotas.settle),
        "assign": jax.jit(quotas.assign),
        "step": jax.jit(functools.partial(quota_step.step, max_blocks=MAX_BLOCKS)),
        "check": jax.jit(invariants.check_quotas),
        "usage": jax.jit(quotas.usage),
    }


class QuotaDriver(Driver):
    """Quotas, batch, pool and model, moved together and compared after each call."""

    def __init__(self, limits, windows=ONE, draw_tenant=None):
        super().__init__(windows)
        self.model = QuotaModel(windows, limits)
        self.quotas = quotas.init(limits, num_blocks=self.n, max_sequences=B)
        self.evicted = []  # by the last call that might
        self.draw_tenant = draw_tenant

    def start(self, rows, contents, num_tokens, num_hashes=None, tenants=None):
        numbers = [chain(c)[:M] for c in contents]
        tenants = [self.draw_tenant() for _ in rows] if tenants is None else tenants
        if num_hashes is None:
            num_hashes = [max(min((n - 1) // T, M), 0) for n in num_tokens]
        self.quotas, self.pool, self.batch, result = verbs()["start"](
            self.quotas,
            self.pool,
            self.batch,
            column(rows, B),
            column(tenants, NOBODY),
            hash_rows(numbers),
            column(num_hashes, 0),
            column(num_tokens, 0),
        )
        self.evicted = result.evicted.block_ids.tolist()[: int(result.evicted.num_blocks)]
        cached, status = self.model.start_for(rows, tenants, numbers, num_hashes, num_tokens)
        assert result.num_cached.tolist()[: len(rows)] == cached
        assert result.status.tolist()[: len(rows)] == status
        self.check()
        return cached, status

    def extend(self, num_tokens):
        self.quotas, self.pool, self.batch, result = verbs()["extend"](
            self.quotas, self.pool, self.batch, jnp.array(num_tokens, jnp.int32)
        )
        self.evicted = result.evicted.block_ids.tolist()[: int(result.evicted.num_blocks)]
        status = self.model.extend_for(num_tokens)
        assert result.status.tolist() == status
        self.check()
        return status

    def unshare(self, rows):
        mask = jnp.array([b in rows for b in range(B)])
        self.quotas, self.pool, self.batch, result = verbs()["unshare"](self.quotas, self.pool, self.batch, mask)
        copies, status = self.model.unshare_for(rows)
        assert result.status.tolist() == status
        self.check()
        return copies, status

    def fork(self, sources, rows):
        tenants = [self.model.tenants[source] for source in sources]
        for row, tenant in zip(rows, tenants, strict=True):
            self.model.tenants[row] = tenant
        self.quotas = verbs()["assign"](self.quotas, column(rows, B), column(tenants, NOBODY))
        super().fork(sources, rows)

    def check(self):
        super().check()
        self.quotas = verbs()["settle"](self.quotas, self.batch)
        self.model.settle()
        owners = self.quotas.owners.tolist()
        for block in set(range(self.n)) - set(self.model.pool.reset):
            assert owners[block] == self.model.owners[block]
        violations = verbs()["check"](self.quotas, self.pool, self.batch)
        assert (int(violations.unknown_owners), int(violations.charged_elsewhere)) == (0, 0)
        held, resident = verbs()["usage"](self.quotas, self.pool)
        assert held.tolist() == [self.model.held()[q] for q in range(2)]
        assert resident.tolist() == [self.model.resident()[q] for q in range(2)]
        over = sum(n > limit for n, limit in zip(held.tolist(), self.model.limits, strict=True))
        assert int(violations.over_limit) == over


@pytest.mark.parametrize("limits", [(3, 6), (5, 5)])
@pytest.mark.parametrize("windows", [ONE, pytest.param(HYBRID[0], marks=pytest.mark.long)], ids=str)
def test_random_steps_match_the_model(windows, limits):
    hybrid = windows in HYBRID
    rng = np.random.default_rng([*limits, hybrid])
    limits = [limit * BLOCKS[windows] // BLOCKS[ONE] for limit in limits]
    d = QuotaDriver(limits, windows, draw_tenant=lambda: int(rng.choice(3, p=(0.4, 0.4, 0.2))))
    seen = walk(d, rng, 260, hybrid=hybrid)
    assert {("start", OK), ("start", EXCEEDED), ("extend", EXCEEDED), ("cached", True)} <= seen
    # The last: evictions that the plain order would have done otherwise.
    assert hybrid or (("unshare", True, OK) in seen and d.model.preferred > 0)


class QuotaStepDriver(QuotaDriver):
    """The same, moved by whole steps."""

    def step(self, ending, starting, growing, complete, computed):
        tenants = [self.draw_tenant() for _ in starting]
        plan = make_plan(ending, starting, growing, complete, computed)
        self.quotas, self.pool, self.batch, result = verbs()["step"](
            self.quotas, self.pool, self.batch, plan, column(tenants, NOBODY)
        )
        if computed is not None:
            self.model.slide(computed)
        self.model.release(ending)
        rows, contents, tokens = zip(*starting, strict=True) if starting else ((), (), ())
        growing, new_tokens = zip(*growing, strict=True) if growing else ((), ())
        cached, begun, grown = self.model.step_for(
            rows,
            tenants,
            [chain(c)[:M] for c in contents],
            [max(min((n - 1) // T, M), 0) for n in tokens],
            tokens,
            growing,
            new_tokens,
        )
        self.model.register([r for r, _, _ in complete], [[n] for _, _, n in complete], [p for _, p, _ in complete])
        assert result.num_cached.tolist()[: len(starting)] == cached
        assert result.start_status.tolist()[: len(starting)] == begun
        assert result.grow_status.tolist()[: len(growing)] == grown
        self.check()
        return {"cached": cached, "start": begun, "grow": grown}


@pytest.mark.long
@pytest.mark.parametrize("limits", [(3, 6), (5, 5)])
@pytest.mark.parametrize("windows", [ONE, HYBRID[0]], ids=str)
def test_random_whole_steps_match_the_model(windows, limits):
    hybrid = windows in HYBRID
    rng = np.random.default_rng([*limits, hybrid])
    limits = [limit * BLOCKS[windows] // BLOCKS[ONE] for limit in limits]
    d = QuotaStepDriver(limits, windows, draw_tenant=lambda: int(rng.choice(3, p=(0.4, 0.4, 0.2))))
    server, seen = Server(d, [*limits, 1]), set()
    for _ in range(200):
        told = server.step()
        seen |= {("start", s) for s in told["start"]} | {("grow", s) for s in told["grow"]}
        seen |= {("cached", n > 0) for n in told["cached"]}
    assert {("start", OK), ("start", EXCEEDED), ("grow", OK), ("grow", EXCEEDED), ("cached", True)} <= seen
    assert Status.OUT_OF_BLOCKS in {status for _, status in seen}
    assert hybrid or d.model.preferred > 0


def test_a_bound_on_what_a_step_grants_is_not_used_up_by_refused_rows():
    d = QuotaDriver((2, 6))
    bounded = jax.jit(functools.partial(quota_step.step, max_blocks=MAX_BLOCKS, max_fresh=3))
    plan = make_plan(starting=[(0, [0, 1], 3 * T), (1, [1, 1], 2 * T)])
    charged, state, running, result = bounded(d.quotas, d.pool, d.batch, plan, column([0, 1], NOBODY))
    assert result.start_status.tolist() == [EXCEEDED, OK]
    assert running.lengths.tolist() == [0, 2 * T, 0, 0]
    plan = make_plan(starting=[(0, [0, 1], 2 * T)], growing=[(1, 2 * T)])
    *_, running, result = bounded(charged, state, running, plan, column([0], NOBODY))
    assert (result.start_status[0], result.grow_status[0]) == (OK, Status.OUT_OF_BLOCKS)
    assert running.lengths.tolist() == [2 * T, 2 * T, 0, 0]


def test_limits_that_fit_the_pool_keep_tenants_apart():
    """Nobody within its limit is refused for lack of blocks, or loses what it has cached; and nobody exceeds it."""
    limits = (4, 6)
    d, rng = QuotaDriver(limits), np.random.default_rng(3)
    assert sum(limits) == d.n
    contents, registered, lost, borrowed = {}, dict.fromkeys(range(B), 0), [0, 0], 0
    for _ in range(400):
        running = [b for b in range(B) if d.model.tables[0][b]]
        empty = [b for b in range(B) if b not in running]
        owners, d.evicted = list(d.model.owners), []
        move = rng.integers(4)
        if move == 0 and empty:
            rows = rng.permutation(empty)[:2].tolist()
            # Each tenant's prompts begin alike, and unlike those of the other.
            tenants = rng.integers(0, 2, len(rows)).tolist()
            wanted = [[tenant, *rng.integers(0, 2, 3).tolist()] for tenant in tenants]
            tokens = rng.integers(1, 4 * T + 1, len(rows)).tolist()
            cached, status = d.start(rows, wanted, tokens, tenants=tenants)
            contents |= dict(zip(rows, wanted, strict=True))
            registered |= {row: c // T for row, c in zip(rows, cached, strict=True)}
            assert set(status) <= {OK, EXCEEDED}
        elif move == 1:
            status = d.extend([int(rng.integers(0, T)) if b in running else 0 for b in range(B)])
            assert set(status) <= {OK, EXCEEDED, Status.TABLE_FULL}
        elif move == 2 and running:
            rows = rng.permutation(running)[:2].tolist()
            counts = d.register(rows, [contents[r] for r in rows], [registered[r] for r in rows])
            registered |= {row: registered[row] + n for row, n in zip(rows, counts, strict=True)}
        elif move == 3 and running:
            d.release(rng.permutation(running)[:2].tolist())
        held, resident = d.model.held(), d.model.resident()
        assert all(held[tenant] <= limit for tenant, limit in enumerate(limits))
        for tenant in {owners[block] for block in d.evicted}:
            assert resident[tenant] >= limits[tenant]
            lost[tenant] += 1
        borrowed += any(resident[tenant] > limit for tenant, limit in enumerate(limits))
    assert min(lost) > 0
    assert borrowed > 0


def test_a_prefix_is_charged_once_within_a_tenant_and_to_whoever_holds_it():
    d = QuotaDriver((5, 5))
    prompt = [0, 1, 1]
    d.start([0], [prompt], [3 * T], tenants=[0])
    d.register([0], [prompt], [0])
    assert d.start([1], [prompt], [3 * T + 1], tenants=[0]) == ([3 * T], [OK])
    assert d.model.held() == {0: 4}
    # The other tenant's rows find it too, and pay for nothing but their own last block.
    assert d.start([2], [prompt], [3 * T + 1], tenants=[1]) == ([3 * T], [OK])
    assert d.model.held() == {0: 4, 1: 1}
    d.release([0, 1])
    assert d.model.held() == {1: 4}
    d.release([2])
    assert d.model.resident() == {1: 3}
    d.start([0], [prompt], [3 * T + 1], tenants=[0])
    assert d.model.resident() == {0: 4}


def test_a_refused_row_takes_nothing_and_those_of_its_tenant_after_it_wait():
    d = QuotaDriver((3, 9))
    assert d.start([0, 1], [[0], [0]], [2 * T, 2 * T], tenants=[0, 0]) == ([0, 0], [OK, EXCEEDED])
    assert d.start([1, 2], [[0], [0]], [2 * T, T], tenants=[0, 0])[1] == [EXCEEDED, EXCEEDED]
    assert d.start([1, 2], [[0], [0]], [2 * T, 2 * T], tenants=[0, 1])[1] == [EXCEEDED, OK]
    assert d.start([1], [[0]], [T - 1], tenants=[0])[1] == [OK]
    # A row that needs no block goes on; the next block is one too many.
    assert d.extend([1, 1, 1, 0]) == [EXCEEDED, OK, OK, OK]
    assert d.extend([1, 1, 0, 0]) == [EXCEEDED, EXCEEDED, OK, OK]
    d.fork([2], [3])
    assert d.model.tenants[3] == 1
    assert d.unshare([3])[1] == [OK] * B
    d.release([0])
    assert d.extend([0, 1, 0, 0]) == [OK] * B


def test_a_copy_of_a_tail_is_charged_unless_it_takes_its_place():
    d = QuotaDriver((2, 9))
    d.start([0], [[0]], [T + 1], tenants=[0])
    d.fork([0], [1])
    assert d.unshare([0])[1][0] == EXCEEDED
    d.release([1])
    d.register([0], [[0]], [0])
    d.roll_back("trim", [T - 1, 0, 0, 0])
    d.start([1], [[1]], [1], tenants=[0])
    copies, status = d.unshare([0])  # the registered tail, which it leaves behind for a new one
    assert (len(copies[0]), status[0]) == (1, OK)
    assert d.model.held() == {0: 2}


@pytest.mark.parametrize("limits", [(), (3, -1), (2**31,)])
def test_limits_out_of_range_are_told(limits):
    with pytest.raises(LayoutError, match=r"give one tenant or more, each with 0 to"):
        quotas.init(limits, num_blocks=4, max_sequences=1)


def test_a_grant_is_charged_as_it_is_asked_for_and_then_as_it_is_used():
    d = QuotaDriver((3, 6))
    d.start([0, 1], [[0], [1]], [T, T], tenants=[0, 1])
    ask = jax.jit(functools.partial(quotas.reserve, max_blocks=8))
    grow = jax.jit(functools.partial(grants.extend, max_blocks=MAX_BLOCKS))
    same, _, refused = ask(d.quotas, d.pool, jnp.array([3, 1, 0, 0], jnp.int32))
    assert (int(refused.status), int(refused.grant.count)) == (EXCEEDED, 0)
    assert verbs()["usage"](same, d.pool).held.tolist() == [1, 1]
    charged, state, reserved = ask(d.quotas, d.pool, jnp.array([2, 3, 0, 0], jnp.int32))
    assert int(reserved.status) == OK
    assert verbs()["usage"](charged, state).held.tolist() == [3, 4]
    # The loop hands them out in another order, and not all.
    running, grant, _ = grow(d.batch, reserved.grant, jnp.array([0, 2 * T, 0, 0]))
    running, grant, _ = grow(running, grant, jnp.array([1, 0, 0, 0]))
    assert running.block_tables[0, 1, 1:3].tolist() == reserved.grant.block_ids.tolist()[:2]
    state = d.do["give_back"](state, grant)
    charged = verbs()["settle"](charged, running)
    assert verbs()["usage"](charged, state).held.tolist() == [2, 3]


def test_a_policy_decides_among_blocks_that_quotas_treat_alike():
    d = QuotaDriver((3, 6))
    prompts = [[0, 1, 1], [1, 0]]
    d.start([0, 1], prompts, [3 * T, 2 * T], tenants=[0, 1])
    d.register([0, 1], prompts, [0, 0])
    d.release([1, 0])
    assert list(d.model.pool.inactive) == [4, 3, 2, 1, 0]

    @functools.partial(jax.jit, static_argnums=0)
    def words(policy, more):
        # Tenant 0 has 3 blocks and, lately, a limit of 2.
        charged = replace(d.quotas, limits=jnp.array([2, 6], jnp.int32))
        return quotas.scores(charged, jnp.stack([more, 0]), policy)(d.pool), lru.order(d.pool.inactive)

    def order(policy, more):
        scores, stands = map(np.asarray, words(policy, more))
        ranked = np.lexsort((stands, *scores[::-1])).tolist()
        return [block for block in ranked if block in d.model.pool.inactive]

    def worth(_):
        values = jnp.array([4, 5, 3, 0, 1, 0, 0, 0, 0, 0], jnp.uint32)
        return jnp.stack([values // 2, values])

    assert order(None, 0) == [2, 4, 3, 1, 0]
    assert order(None, 1) == [2, 1, 4, 3, 0]
    assert order(worth, 0) == [2, 3, 4, 0, 1]
    assert order(worth, 1) == [2, 0, 3, 4, 1]


@pytest.mark.parametrize("seed", range(3))
def test_the_lowest_entries_of_each_part_are_those_of_a_sort(seed):
    rng = np.random.default_rng(seed)
    n, parts = 60, 4
    words = [rng.integers(0, 3, n, dtype=np.uint32) * np.uint32(2**31 - 1), rng.permutation(n).astype(np.uint32)]
    mask, part = rng.random(n) < 0.7, rng.integers(0, parts + 1, n)
    counts = np.array([0, 1, 5, 100])
    chosen = jax.jit(selection.lowest_of_each)(
        [jnp.asarray(word) for word in words], jnp.asarray(mask), jnp.asarray(part), jnp.asarray(counts)
    )
    order = [i for i in np.lexsort(words[::-1]) if mask[i]]
    expected = {i for q in range(parts) for i in [i for i in order if part[i] == q][: counts[q]]}
    assert set(np.flatnonzero(chosen).tolist()) == expected


def test_quotas_compile_without_loops_of_unknown_length():
    d = QuotaDriver((3, 6))
    text = str(jax.make_jaxpr(quotas.extend)(d.quotas, d.pool, d.batch, jnp.zeros((B,), jnp.int32)))
    for primitive in ("while", "cond[", "callback"):
        assert primitive not in text
