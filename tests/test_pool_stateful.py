"""Pool and oracle driven side by side; the conservation laws hold after every step."""

import functools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from oracle import OraclePool

from kvbm_jax import invariants, pool
from kvbm_jax.types import Status

ROWS, WIDTH = 3, 4
KEYS = st.integers(0, 24)


@functools.cache
def verbs():
    return {
        "match": jax.jit(pool.match),
        "acquire": jax.jit(pool.acquire, donate_argnums=0),
        "allocate": jax.jit(functools.partial(pool.allocate, max_blocks=WIDTH), donate_argnums=0),
        "register": jax.jit(pool.register, donate_argnums=0),
        "release": jax.jit(pool.release, donate_argnums=0),
        "evict": jax.jit(functools.partial(pool.evict, max_count=WIDTH), donate_argnums=0),
        "compact": jax.jit(pool.compact, donate_argnums=0),
        "rehash": jax.jit(pool.rehash, donate_argnums=0),
        "check": jax.jit(invariants.check),
    }


def key_of(number: int) -> tuple[int, ...]:
    return (number, 7 * number, 0, 1)


def grid(rows, fill, dtype=np.int32, depth=()):
    """Pads lists of rows to [ROWS, WIDTH, *depth]."""
    out = np.full((ROWS, WIDTH, *depth), fill, dtype)
    for i, row in enumerate(rows):
        for j, value in enumerate(row):
            out[i, j] = value
    return jnp.asarray(out)


class PoolMachine(RuleBasedStateMachine):
    @initialize(num_blocks=st.sampled_from([1, 3, 8, 13]))
    def start(self, num_blocks):
        self.n = num_blocks
        self.state = pool.init(num_blocks)
        self.oracle = OraclePool(num_blocks)
        self.do = verbs()

    def block_rows(self, data, strategy):
        row = st.lists(strategy, max_size=WIDTH)
        return data.draw(st.lists(row, min_size=1, max_size=ROWS))

    @rule(data=st.data())
    def allocate(self, data):
        counts = data.draw(st.lists(st.integers(0, WIDTH), min_size=ROWS, max_size=ROWS))
        self.state, result = self.do["allocate"](self.state, jnp.array(counts, jnp.int32))
        granted, statuses, evicted = self.oracle.allocate(counts)
        np.testing.assert_array_equal(result.block_ids, grid(granted, self.n))
        np.testing.assert_array_equal(result.status, statuses)
        assert int(result.evicted.num_blocks) == len(evicted)
        got = zip(result.evicted.block_ids.tolist(), map(tuple, result.evicted.hashes.tolist()), strict=True)
        assert list(got)[: len(evicted)] == evicted

    @rule(data=st.data())
    def register(self, data):
        # Any known block, held or not, and now and then one that does not exist.
        rows = self.block_rows(data, st.integers(0, self.n - 1) | st.just(self.n + 5) | st.just(-1))
        keyed = [[(b, key_of(data.draw(KEYS))) for b in row] for row in rows]
        self.state, result = self.do["register"](
            self.state,
            grid(rows, self.n),
            grid([[k for _, k in row] for row in keyed], 0, np.uint32, (4,)),
        )
        for i, row in enumerate(self.oracle.register(keyed)):
            for j, (block, new, status) in enumerate(row):
                assert result.status[i, j] == status, (i, j, Status(int(result.status[i, j])), status)
                assert bool(result.registered[i, j]) == new
                assert int(result.block_ids[i, j]) == block

    @rule(numbers=st.lists(KEYS, max_size=WIDTH), hold=st.booleans())
    def match(self, numbers, hold):
        keys = [key_of(k) for k in numbers]
        result = self.do["match"](
            self.state,
            grid([keys], 0, np.uint32, (4,)),
            jnp.array([len(keys)] + [0] * (ROWS - 1), jnp.int32),
        )
        found = self.oracle.match(keys)
        assert int(result.num_blocks[0]) == len(found)
        np.testing.assert_array_equal(result.block_ids, grid([found], self.n))
        if hold:
            self.state, status = self.do["acquire"](self.state, result.block_ids)
            assert status.tolist() == [Status.OK] * ROWS
            self.oracle.acquire([found])

    @rule(data=st.data())
    def acquire(self, data):
        rows = self.block_rows(data, st.integers(0, self.n - 1) | st.just(self.n + 1))
        self.state, status = self.do["acquire"](self.state, grid(rows, self.n))
        assert status.tolist()[: len(rows)] == self.oracle.acquire(rows)

    @rule(data=st.data())
    def release(self, data):
        rows = self.block_rows(data, st.integers(0, self.n - 1))
        self.state, status = self.do["release"](self.state, grid(rows, self.n))
        assert status.tolist()[: len(rows)] == self.oracle.release(rows)

    @rule(count=st.integers(0, WIDTH))
    def evict(self, count):
        self.state, result = self.do["evict"](self.state, jnp.int32(count))
        evicted = self.oracle.evict(count)
        assert result.block_ids.tolist()[: int(result.num_blocks)] == [b for b, _ in evicted]

    @rule()
    def compact(self):
        self.state = self.do["compact"](self.state)

    @rule(seed=st.integers(0, 2**32 - 1))
    def rehash(self, seed):
        self.state, left = self.do["rehash"](self.state, jnp.uint32(seed))
        assert int(left) == 0

    @invariant()
    def laws(self):
        if not hasattr(self, "state"):
            return
        violations = self.do["check"](self.state, jnp.array(self.oracle.refs, jnp.int32))
        assert not any(int(v) for v in violations), violations
        counts = pool.stats(self.state)
        assert int(counts.reset) == len(self.oracle.reset)
        assert int(counts.inactive) == len(self.oracle.inactive)


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPoolAgainstOracle = pytest.mark.core(PoolMachine.TestCase)
