"""The hash index against a dict, at full load, and with keys that were made to collide."""

from functools import cache, partial

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kvbm_jax import index as block_index
from kvbm_jax import invariants, pool
from kvbm_jax.types import Status

pytestmark = pytest.mark.core

WAYS = 8
N, M = 40, 8  # 16 sets


def lookup(index, keys):
    return block_index.lookup(index, keys[..., :4], keys[..., 4])


@cache
def verbs():
    return {
        "lookup": jax.jit(lookup),
        "insert": jax.jit(block_index.insert),
        "delete": jax.jit(block_index.delete),
        "rebuild": jax.jit(block_index.rebuild),
    }


def random_keys(count, seed=0):
    return np.random.default_rng(seed).integers(0, 2**32, (count, block_index.KEY_WORDS), np.uint32)


def insert_all(index, keys, blocks, do=None, width=256):
    """Inserts in calls of one width; returns the index and the owners."""
    do = do or verbs()
    width = min(width, len(keys))
    owners = []
    for i in range(0, len(keys), width):
        part = slice(i, i + width)
        short = width - len(keys[part])
        padded = jnp.asarray(np.pad(keys[part], ((0, short), (0, 0))))
        ids = jnp.asarray(np.pad(blocks[part], (0, short)), jnp.int32)
        index, owner = do["insert"](index, padded, ids, jnp.arange(width) < width - short)
        owners.append(np.asarray(owner)[: width - short])
    return index, np.concatenate(owners)


def check_sets(index, expected):
    """No two live entries of a set share a fingerprint, and there are as many as `expected`."""
    num_blocks = index.ways.shape[0]
    ids, prints = np.asarray(index.table)[:, :, 0], np.asarray(index.table)[:, :, 1]
    for row, marks in zip(ids, prints, strict=True):
        live = marks[marks != 0]
        assert (row[marks != 0] < num_blocks).all()
        assert len(set(live.tolist())) == len(live)
    assert (prints != 0).sum() == expected


@pytest.mark.parametrize("num_blocks", [M, N])
def test_a_key_that_repeats_in_one_call_is_held_once_by_its_first_row(num_blocks):
    rng = np.random.default_rng(num_blocks)
    universe = random_keys(6)
    for seed in range(200):
        numbers = rng.integers(0, len(universe), M)
        blocks = rng.permutation(num_blocks)[:M]
        first = {number: blocks[i] for i, number in reversed(list(enumerate(numbers)))}
        index = block_index.init(num_blocks, seed)
        index, owners = verbs()["insert"](
            index, jnp.asarray(universe[numbers]), jnp.asarray(blocks, jnp.int32), jnp.ones((M,), bool)
        )
        assert owners.tolist() == [first[number] for number in numbers]
        check_sets(index, len(first))
        np.testing.assert_array_equal(verbs()["lookup"](index, jnp.asarray(universe[numbers])), owners)


def test_random_moves_match_a_dict():
    rng = np.random.default_rng(1)
    universe = random_keys(120)
    index, model = block_index.init(N), {}  # number of the key -> block
    do = verbs()
    for _ in range(200):
        if rng.random() < 0.5:
            free = [b for b in range(N) if b not in model.values()]
            absent = [k for k in range(len(universe)) if k not in model]
            blocks = rng.permutation(free)[:M]
            numbers = rng.permutation(absent)[: len(blocks)]
            mask = rng.random(M) < 0.7
            mask[len(blocks) :] = False
            ids = np.full((M,), N, np.int32)
            ids[: len(blocks)] = blocks
            keys = np.zeros((M, block_index.KEY_WORDS), np.uint32)
            keys[: len(numbers)] = universe[numbers]
            index, owners = do["insert"](index, jnp.asarray(keys), jnp.asarray(ids), jnp.asarray(mask))
            np.testing.assert_array_equal(owners, np.where(mask, ids, N))
            model.update({int(k): int(b) for k, b, on in zip(numbers, blocks, mask, strict=False) if on})
        else:
            gone = rng.integers(0, N + 1, M)  # blocks that are not in it, padding and repeats stay as they are
            index = do["delete"](index, jnp.asarray(gone, jnp.int32))
            model = {k: b for k, b in model.items() if b not in gone}
        found = do["lookup"](index, jnp.asarray(universe))
        np.testing.assert_array_equal(found, [model.get(k, N) for k in range(len(universe))])
        check_sets(index, len(model))
        registered = block_index.is_registered(index, jnp.arange(N + 1))
        np.testing.assert_array_equal(registered, [b in model.values() for b in range(N + 1)])


@pytest.mark.parametrize("num_blocks", [1, 8, 9, 40, 257, 4096])
def test_every_block_fits_whatever_the_seed(num_blocks):
    for seed in (0, 7):
        keys = random_keys(num_blocks, seed + num_blocks)
        index, owners = insert_all(block_index.init(num_blocks, seed), keys, np.arange(num_blocks))
        np.testing.assert_array_equal(owners, np.arange(num_blocks))
        np.testing.assert_array_equal(verbs()["lookup"](index, jnp.asarray(keys)), np.arange(num_blocks))
        absent = random_keys(num_blocks, seed + num_blocks + 1)
        np.testing.assert_array_equal(verbs()["lookup"](index, jnp.asarray(absent)), num_blocks)
        check_sets(index, num_blocks)


def test_no_refusal_in_many_fillings_at_half_load():
    num_blocks, fillings = 4096, 150
    index = block_index.init(num_blocks)
    assert index.table.shape[0] * WAYS == 2 * num_blocks
    index, _ = insert_all(index, random_keys(num_blocks), np.arange(num_blocks))

    @jax.jit
    def refused(index, seeds):
        def fill(seed):
            rebuilt, left = block_index.rebuild(index, seed)
            return left, jnp.max(jnp.sum(rebuilt.table[:, :, 1] != 0, axis=1))

        return jax.lax.map(fill, seeds)

    left, fullest = refused(index, jnp.arange(1, fillings + 1, dtype=jnp.uint32))
    assert int(left.sum()) == 0
    assert int(fullest.max()) < WAYS  # two choices stay clear of the brim


@settings(max_examples=60)
@given(
    numbers=st.lists(st.integers(0, 5), min_size=M, max_size=M),
    mask=st.lists(st.booleans(), min_size=M, max_size=M),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_batch_is_its_rows_one_by_one_and_the_first_of_equal_keys_wins(numbers, mask, seed):
    universe = random_keys(6)
    keys, blocks = jnp.asarray(universe[numbers]), jnp.arange(10, 10 + M, dtype=jnp.int32)
    empty = block_index.init(N, seed)
    do = verbs()
    batch, owners = do["insert"](empty, keys, blocks, jnp.array(mask))
    first = {}
    for row, (number, on) in enumerate(zip(numbers, mask, strict=True)):
        if on:
            first.setdefault(number, 10 + row)
    expected = [first[number] if on else N for number, on in zip(numbers, mask, strict=True)]
    assert owners.tolist() == expected

    single = empty
    for number, block in first.items():
        only = jnp.arange(M) == block - 10
        single, _ = do["insert"](single, keys, blocks, only)
        assert int(do["lookup"](single, jnp.asarray(universe))[number]) == block
    for index in (batch, single):
        found = do["lookup"](index, jnp.asarray(universe))
        assert found.tolist() == [first.get(k, N) for k in range(len(universe))]
        check_sets(index, len(first))


@cache
def colliding_keys(count, seed=0):
    """Keys of group 0 whose two sets are both among the first two of 16, found by brute force."""
    keys = random_keys(200 * count, 11)
    keys[:, 4] = 0
    (first, second), _ = block_index._mix(jnp.asarray(keys).T, jnp.uint32(seed), 16)
    return keys[(np.asarray(first) < 2) & (np.asarray(second) < 2)][:count]


@pytest.mark.parametrize("width", [1, 24])
def test_two_full_sets_refuse_the_next_key_and_stay_exact(width):
    keys = colliding_keys(24)
    assert len(keys) == 24
    index, owners = insert_all(block_index.init(N), keys, np.arange(24), width=width)
    placed = owners != N
    assert 8 <= placed.sum() <= 16  # keys with both choices in one set may find it full earlier
    np.testing.assert_array_equal(owners[placed], np.arange(24)[placed])
    found = np.asarray(verbs()["lookup"](index, jnp.asarray(keys)))
    np.testing.assert_array_equal(found, owners)
    check_sets(index, placed.sum())
    # A refused key gets in once a way of its sets is free.
    victim = int(np.flatnonzero(placed)[0])
    index = verbs()["delete"](index, jnp.array([victim], jnp.int32))
    (first, second), _ = block_index._mix(jnp.asarray(keys).T, jnp.uint32(0), 16)
    freed = int(np.flatnonzero((np.asarray(index.table)[:2, :, 1] == 0).any(axis=1))[0])
    late = np.flatnonzero(~placed & ((np.asarray(first) == freed) | (np.asarray(second) == freed)))[:1]
    index, owners = insert_all(index, keys[late], late)
    assert owners.tolist() == late.tolist()


def test_rehash_under_another_seed_makes_way_for_a_refused_registration():
    keys = colliding_keys(24)[:, :4]
    register, rehash, match = jax.jit(pool.register), jax.jit(pool.rehash), jax.jit(pool.match)
    allocate = jax.jit(partial(pool.allocate, max_blocks=24))
    check = jax.jit(invariants.check)
    state, grant = allocate(pool.init(N), jnp.array([24], jnp.int32))
    hashes = jnp.asarray(keys)[None]
    state, result = register(state, grant.block_ids, hashes)
    full = np.asarray(result.status[0]) == Status.INDEX_FULL
    assert full.any()
    np.testing.assert_array_equal(np.asarray(result.status[0])[~full], Status.OK)
    np.testing.assert_array_equal(result.registered[0], ~full)
    np.testing.assert_array_equal(result.block_ids, grant.block_ids)
    assert not any(map(int, check(state)))
    assert int(pool.stats(state).held) == 24  # a refused block stays held

    state, left = rehash(state, jnp.uint32(99))
    assert int(left) == 0
    assert not any(map(int, check(state)))
    state, result = register(state, grant.block_ids, hashes)
    assert set(result.status[0].tolist()) == {Status.OK}
    np.testing.assert_array_equal(result.registered[0], full)
    np.testing.assert_array_equal(match(state, hashes, jnp.array([24])).block_ids, grant.block_ids)
    assert not any(map(int, check(state)))


def test_a_rebuild_that_cannot_place_all_says_how_many():
    keys = colliding_keys(24, seed=5)
    index, owners = insert_all(block_index.init(N, seed=0), keys, np.arange(24))
    assert (owners == np.arange(24)).all()
    rebuilt, left = verbs()["rebuild"](index, jnp.uint32(5))
    assert int(left) >= 24 - 16
    check_sets(rebuilt, 24 - int(left))
    _, left = verbs()["rebuild"](index, jnp.uint32(6))  # on the former index
    assert int(left) == 0


@pytest.mark.parametrize("kinds", [1, 3])
def test_equal_fingerprints_never_share_a_set(monkeypatch, kinds):
    """With as few fingerprints as `kinds`, a set holds at most so many keys; what is held is found, nothing else."""
    strong = block_index._mix

    def weak(words, seed, num_sets):
        sets, fingerprint = strong(words, seed, num_sets)
        return sets, jnp.abs(fingerprint) % kinds + 1

    monkeypatch.setattr(block_index, "_mix", weak)
    # Partials, for a jit of the functions themselves may remember a trace with the strong mix.
    do = {"insert": jax.jit(partial(block_index.insert)), "lookup": jax.jit(partial(lookup))}
    keys = random_keys(40, 2)
    for width in (1, 20):
        index, owners = insert_all(block_index.init(N), keys, np.arange(40), do=do, width=width)
        held = int((owners != N).sum())
        assert 0 < held <= 16 * kinds
        if kinds == 1:
            assert held < 40
        check_sets(index, held)
        np.testing.assert_array_equal(do["lookup"](index, jnp.asarray(keys)), owners)
        np.testing.assert_array_equal(do["lookup"](index, jnp.asarray(random_keys(40, 9))), N)
