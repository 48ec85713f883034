"""The step of a compiled decode loop, every implementation against a twin in plain Python."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvbm_jax import grants, kernels, sequences
from kvbm_jax.groups import Group
from kvbm_jax.kernels import target
from kvbm_jax.types import Status

pytestmark = pytest.mark.core

IMPLEMENTATIONS = kernels.OPERATIONS["advance"].implementations
T, W, N, K = 4, 6, 2000, 64


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with target.interpreted() if request.param == "mosaic_gpu" else contextlib.nullcontext():
        yield request.param


class Twin:
    """Tables as lists, the grant as a stack."""

    def __init__(self, tables, lengths, grant):
        self.tables = [[list(blocks) for blocks in group] for group in tables]  # [group][row]
        self.lengths = list(lengths)
        self.free = list(reversed(grant))  # the next block last
        self.begun = list(lengths)

    def advance(self, accepted, new, max_blocks):
        statuses, change = [], []
        for row, held in enumerate(self.lengths):
            needed = -(-(accepted[row] + new[row]) // T)
            change.append(needed - len(self.tables[0][row]))
            if needed > W:
                statuses.append(Status.TABLE_FULL)
            elif new[row] < 0 or not self.begun[row] <= accepted[row] <= held or abs(change[row]) > max_blocks:
                statuses.append(Status.INVALID_COUNT)
            else:
                statuses.append(Status.OK)
        for row, status in enumerate(statuses):
            if status is Status.OK and change[row] < 0:
                for group in self.tables:
                    self.free += [group[row].pop() for _ in range(-change[row])]
        empty = False
        for row, status in enumerate(statuses):
            if status is not Status.OK:
                continue
            fresh = max(change[row], 0)
            empty |= len(self.tables) * fresh > len(self.free)
            if empty:
                statuses[row] = Status.OUT_OF_BLOCKS
                self.lengths[row] = accepted[row]
                continue
            for group in self.tables:
                group[row] += [self.free.pop() for _ in range(fresh)]
            self.lengths[row] = accepted[row] + new[row]
        return statuses


def begin(rng, batch, groups, size):
    """Rows of some blocks, and a grant of `size` blocks."""
    lengths = rng.integers(0, 3 * T, batch).tolist()
    blocks = iter(rng.permutation(N).tolist())
    tables = [[[next(blocks) for _ in range(-(-length // T))] for length in lengths] for _ in range(groups)]
    grant = [next(blocks) for _ in range(size)]
    made = sequences.init(batch, W, block_size=T, pool_blocks=N, groups=(Group(),) * groups)
    padded = [[row + [N] * (W - len(row)) for row in group] for group in tables]
    running = sequences.SequenceBatch(
        jnp.array(padded, jnp.int32),
        jnp.array(lengths, jnp.int32),
        jnp.array([len(row) for row in tables[0]], jnp.int32),
        made.first,
        made.block_size,
        made.pool_blocks,
        made.groups,
    )
    ids = jnp.array(grant + [N] * (K - size), jnp.int32)
    return running, grants.Grant(ids, jnp.int32(0), jnp.int32(size), jnp.int32(7)), Twin(tables, lengths, grant)


def check_walk(implementation, *, seed, batch, groups, size, steps, max_blocks=1):
    """Rows grow by drafts of which some are accepted; now and then by numbers out of range."""
    rng = np.random.default_rng(seed)
    running, grant, twin = begin(rng, batch, groups, size)
    begun = running.lengths
    step = jax.jit(functools.partial(kernels.advance, max_blocks=max_blocks, implementation=implementation))
    seen = set()
    for _ in range(steps):
        accepted = [int(rng.integers(low, high + 1)) for low, high in zip(twin.begun, twin.lengths, strict=True)]
        new = rng.integers(0, T * max_blocks, batch).tolist()
        for wild in rng.integers(0, batch, 2):
            new[wild] = int(rng.choice([-1, T * (max_blocks + 2), T * W]))
        accepted[int(rng.integers(batch))] -= 30
        expected = twin.advance(accepted, new, max_blocks)
        running, grant, status = step(running, grant, *(jnp.array(x, jnp.int32) for x in (accepted, new)), begun)
        seen |= set(expected)
        assert status.tolist() == expected
        assert running.lengths.tolist() == twin.lengths
        assert running.num_blocks.tolist() == [len(row) for row in twin.tables[0]]
        padded = [[row + [N] * (W - len(row)) for row in group] for group in twin.tables]
        assert running.block_tables.tolist() == padded
        used, count = int(grant.used), int(grant.count)
        assert grant.block_ids.tolist()[used:count] == twin.free[::-1]
        assert (count, int(grant.ticket)) == (size, 7)
    return seen


@pytest.mark.parametrize(("batch", "groups", "size"), [(8, 1, 2), (12, 2, 8)])
def test_a_walk(implementation, batch, groups, size):
    seen = check_walk(implementation, seed=batch, batch=batch, groups=groups, size=size, steps=4)
    assert seen == {Status.OK, Status.OUT_OF_BLOCKS, Status.TABLE_FULL, Status.INVALID_COUNT}


@pytest.mark.long
@pytest.mark.parametrize("seed", range(4))
def test_more_walks(implementation, seed):
    check_walk(implementation, seed=seed, batch=132, groups=1 + seed % 2, size=60, steps=8, max_blocks=1 + seed // 2)


def test_without_drafts_it_extends():
    rng = np.random.default_rng(3)
    running, grant, _ = begin(rng, 8, 2, 9)
    extend, advance = jax.jit(grants.extend), jax.jit(grants.advance)
    for new in rng.integers(-1, 6, (6, 8)):
        counts = jnp.array(new, jnp.int32)
        extended = extend(running, grant, counts)
        advanced = advance(running, grant, running.lengths, counts, jnp.zeros_like(counts))
        jax.tree.map(np.testing.assert_array_equal, extended, advanced)
        running, grant, _ = extended
