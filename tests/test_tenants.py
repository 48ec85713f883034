"""Quotas at the host: what a manager refuses, keeps and tells."""

import jax
import numpy as np
import pytest

from kvbm_jax import BlockManager, KvBlockManagerConfig, grants, invariants
from kvbm_jax.errors import OutOfBlocksError, QuotaExceededError
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.tenants import TenantBlocks

pytestmark = pytest.mark.core

SIZE, BLOCKS, ROWS = 4, 10, 4
QUOTAS = {"a": 4, "b": 0.6, "*": 3}  # the same in all tests: programs are compiled for each


def make(quotas=QUOTAS, num_blocks=BLOCKS, **options):
    config = KvBlockManagerConfig(
        block_size=SIZE,
        num_blocks=num_blocks,
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        dtype="float32",
        quotas=quotas,
    )
    return BlockManager(config, max_sequences=ROWS, **options)


_check = jax.jit(invariants.check_quotas)


@pytest.fixture
def manager():
    with make() as made:
        yield made
        sound(made)


def sound(manager):
    """What is charged follows from the tables; none of it in a pool without quotas."""
    pool = manager._device.pool
    found = _check(pool.account.quotas, pool._pool, pool.sequences)
    assert (int(found.unknown_owners), int(found.charged_elsewhere)) == (0, 0)
    assert not np.asarray(pool.account.coming).any()


def prompt(first, blocks, extra=1):
    return list(range(first, first + blocks * SIZE + extra))


def leave(manager, tokens, **options):
    with manager.start(tokens, **options) as seq:
        manager.register(seq)
    return seq.num_cached


def held(manager):
    return {name: blocks.held for name, blocks in manager.tenant_stats().items() if blocks.held}


def test_a_tenant_is_refused_beyond_its_quota_and_others_are_not(manager):
    first = manager.start(prompt(0, 2), salt="a")
    with pytest.raises(
        QuotaExceededError, match=r"3 blocks are needed.* tenant 'a' holds 3 of at most 4.*sequences of"
    ):
        manager.start(prompt(100, 2), salt="a")
    with pytest.raises(QuotaExceededError, match=r"5 blocks are needed.*quotas\['a'\]: raise it, or ask for less"):
        manager.start(prompt(100, 4), salt="a")
    nothing = {"b": TenantBlocks(0, 0, 6), "*": TenantBlocks(0, 0, 3)}
    assert manager.tenant_stats() == {"a": TenantBlocks(3, 3, 4)} | nothing
    assert manager.stats().held == 3
    with manager.start(prompt(0, 5), salt="b"):
        loose = manager.allocate_blocks(1)  # which no tenant pays for
        with pytest.raises(OutOfBlocksError, match="1 blocks are needed") as caught:
            manager.start(prompt(0, 0), salt="a")
        assert not isinstance(caught.value, QuotaExceededError)
    manager.free_blocks(loose)
    first.release()


def test_a_prompt_is_charged_for_what_it_shares_once(manager):
    seqs = [manager.start(prompt(0, 3), salt="a")]
    manager.register(seqs[0])
    with pytest.raises(QuotaExceededError):
        manager.start(prompt(0, 3), salt="a")
    seqs.pop().release()
    seqs = [manager.start([*prompt(0, 3, 0), 7], salt="a")]
    assert held(manager)["a"] == 4
    seqs.pop().release()
    # Another tenant under the same salt finds it, and pays from then on.
    with manager.start(prompt(0, 3), salt="a", tenant="b") as seq:
        assert seq.num_cached == 3 * SIZE
        assert (seq.tenant, held(manager)) == ("b", {"b": 4})


@pytest.mark.long
def test_growth_is_refused_row_by_row_and_the_others_go_on(manager):
    a, b = manager.start(prompt(0, 3), salt="a"), manager.start(prompt(0, 0, 4), salt="b")
    with pytest.raises(QuotaExceededError, match="tenant 'a' holds 4 of at most 4"):
        manager.extend({a: [1] * SIZE, b: [1]})
    assert (len(a.tokens), len(b.tokens)) == (3 * SIZE + 1, 5)
    with pytest.raises(QuotaExceededError, match="tenant 'a' holds 4 of at most 4"):
        manager.step({a: [1] * SIZE, b: [1] * SIZE})
    assert (len(a.tokens), len(b.tokens)) == (3 * SIZE + 1, 5 + SIZE)
    manager.extend({a: [1, 2]})  # in the block that it has
    # What ends in a step is given back before.
    other = manager.start(prompt(500, 0), salt="b")
    manager.step({b: [1] * SIZE}, ending=[a, other])
    assert held(manager) == {"b": 4}
    b.release()


@pytest.mark.long
def test_forks_and_grants_are_charged_to_the_tenant_of_the_sequence(manager):
    seq = manager.start(prompt(0, 2), salt="a")
    copy = manager.fork(seq)
    assert (copy.tenant, held(manager)["a"]) == ("a", 3)
    with pytest.raises(QuotaExceededError, match="tenant 'a' holds 4 of at most 4"):
        manager.reserve({seq: SIZE})  # the tail that both share has been copied
    manager.give_back(manager.reserve({seq: 1}))
    assert held(manager)["a"] == 4
    with pytest.raises(QuotaExceededError):
        manager.extend({copy: [1] * SIZE})
    copy.release()
    with manager.start(prompt(100, 5), salt="b"):
        loose = manager.allocate_blocks(1)
        with pytest.raises(OutOfBlocksError, match="1 blocks are needed") as caught:
            manager.reserve({seq: SIZE})
        assert not isinstance(caught.value, QuotaExceededError)
        sound(manager)
    manager.free_blocks(loose)
    grant = manager.reserve({seq: SIZE})
    assert held(manager)["a"] == 4
    running, grant, _ = grants.extend(manager.sequences, grant, np.array([SIZE, 0, 0, 0], np.int32))
    manager.commit(grant, running, {seq: [5] * SIZE})
    assert held(manager)["a"] == 4
    with pytest.raises(QuotaExceededError):
        manager.reserve({seq: SIZE})
    manager.trim(seq, 1)
    assert held(manager)["a"] == 1
    seq.release()


def test_what_others_cache_does_not_flush_a_tenant(manager):
    leave(manager, prompt(0, 3), salt="a")
    for first in range(0, 1000, 100):
        leave(manager, prompt(first, 2), salt="c")
    assert manager.match(prompt(0, 3), salt="a") == 3 * SIZE
    # It uses what nobody else does, beyond its limit; that is what goes when another needs blocks.
    assert manager.tenant_stats()["*"] == TenantBlocks(0, 6, 3)
    with manager.start(prompt(500, 1), salt="b"):
        assert manager.tenant_stats()["*"].resident == 5
        assert manager.match(prompt(0, 3), salt="a") == 3 * SIZE


def test_others_share_one_quota_and_metrics_tell():
    metrics = InMemoryMetrics()
    with make(metrics=metrics) as manager:
        with manager.start(prompt(0, 1), salt="x"), manager.start(prompt(0, 0)):
            with pytest.raises(QuotaExceededError, match="tenants without a limit of their own hold 3 of at most 3"):
                manager.start(prompt(0, 0), salt="y")
            assert held(manager) == {"*": 3}
            assert metrics.snapshot()['kvbm_tenant_blocks_held{tenant="*"}'] == 3
        assert metrics.snapshot()['kvbm_tenant_blocks_held{tenant="*"}'] == 0
        assert metrics.snapshot()['kvbm_tenant_blocks_resident{tenant="*"}'] == 0


@pytest.mark.long
def test_quotas_follow_resizing_and_other_blocks():
    with make() as manager:
        a = manager.start(prompt(0, 2), salt="a")
        leave(manager, prompt(50, 2), salt="b")
        manager.resize(8)
        sound(manager)
        assert list(manager.tenant_stats().values()) == [(0, 0, 3), (3, 3, 4), (0, 2, 4)]
        manager.reblock(2)
        sound(manager)
        assert list(manager.tenant_stats().values()) == [(0, 0, 3), (5, 5, 4), (0, 4, 9)]
        with pytest.raises(QuotaExceededError, match="tenant 'a' holds 5 of at most 4"):
            manager.extend({a: [1] * SIZE})
        a.release()


def test_without_quotas_there_is_no_account():
    with make(None) as manager:
        assert manager.tenant_stats() == {}
        assert manager._device.pool.account is None
