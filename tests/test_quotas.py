"""Quotas against their twin in plain Python, and what they promise to tenants."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quota_oracle import QuotaModel
from test_sequences import BLOCKS, HYBRID, MAX_BLOCKS, ONE, B, Driver, T, chain, column, hash_rows, walk

from kvbm_jax import invariants, quotas
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
        "check": jax.jit(invariants.check_quotas),
        "usage": jax.jit(quotas.usage),
    }


class QuotaDriver(Driver):
    """Quotas, batch, pool and model, moved together and compared after each call."""

    def __init__(self, limits, windows=ONE, draw_tenant=None):
        super().__init__(windows)
        self.model = QuotaModel(windows, limits)
        self.quotas = quotas.init(limits, num_blocks=self.n, max_sequences=B)
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
        self.model.open()
        cached, status = self.model.start_for(rows, tenants, numbers, num_hashes, num_tokens)
        assert result.num_cached.tolist()[: len(rows)] == cached
        assert result.status.tolist()[: len(rows)] == status
        self.check()
        return cached, status

    def extend(self, num_tokens):
        self.quotas, self.pool, self.batch, result = verbs()["extend"](
            self.quotas, self.pool, self.batch, jnp.array(num_tokens, jnp.int32)
        )
        self.model.open()
        status = self.model.extend_for(num_tokens)
        assert result.status.tolist() == status
        self.check()
        return status

    def unshare(self, rows):
        mask = jnp.array([b in rows for b in range(B)])
        self.quotas, self.pool, self.batch, result = verbs()["unshare"](self.quotas, self.pool, self.batch, mask)
        self.model.open()
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


@pytest.mark.parametrize("limits", [(3, 6), (20, 2)])
@pytest.mark.parametrize("windows", [ONE, pytest.param(HYBRID[0], marks=pytest.mark.long)], ids=str)
def test_random_steps_match_the_model(windows, limits):
    hybrid = windows in HYBRID
    rng = np.random.default_rng([*limits, hybrid])
    limits = [limit * BLOCKS[windows] // BLOCKS[ONE] for limit in limits]
    d = QuotaDriver(limits, windows, draw_tenant=lambda: int(rng.choice(3, p=(0.4, 0.4, 0.2))))
    seen = walk(d, rng, 260, hybrid=hybrid)
    assert {("start", OK), ("start", EXCEEDED), ("extend", EXCEEDED), ("unshare", True, OK), ("cached", True)} <= seen
    assert d.model.preferred > 0  # evictions that the plain order would have done otherwise
