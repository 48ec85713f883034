"""Groups of hybrid models: what each holds, what a hit needs, what a window gives back, and what attention reads."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_attention import dense
from test_sequences import B, Driver, T, queue_order

from kvbm_jax import attention, groups, invariants, pool, sequences
from kvbm_jax import cache as kv_cache
from kvbm_jax.errors import LayoutError
from kvbm_jax.groups import Group
from kvbm_jax.layout import KVLayout
from kvbm_jax.types import Status

pytestmark = pytest.mark.core

OK, PASSED = Status.OK, Status.WINDOW_PASSED


def test_the_first_place_is_that_of_the_oldest_token_that_the_next_sees():
    windows = [None, 1, 2, 6, 9, 5]
    for length in range(40):
        places = groups.first_places(tuple(map(Group, windows)), jnp.int32(length), T).tolist()
        expected = [0 if w is None else max(length - w + 1, 0) // T for w in windows]
        assert places == expected


@pytest.mark.parametrize(
    "windows", [(None,), (None, None), (None, 40), (24, None, 8), (17,), (None, 1), (40, 8)], ids=str
)
@pytest.mark.parametrize("resident", [0.5, 0.9])
def test_the_longest_hit_is_found_among_any_residents(windows, resident):
    rng = np.random.default_rng([len(windows), round(10 * resident)])
    rows, hashes, size, none = 200, 9, 16, 999
    blocks = np.where(rng.random((rows, len(windows), hashes)) < resident, rng.integers(0, none, hashes), none)
    prefix, cached = groups.longest_hit(
        tuple(map(Group, windows)), jnp.asarray(blocks, jnp.int32), block_size=size, num_blocks=none
    )
    for b in range(rows):
        for length in range(hashes, -1, -1):
            oldest = [0 if w is None else length * size - w + 1 for w in windows]
            needed = [[j for j in range(length) if (j + 1) * size > first] for first in oldest]
            if all(blocks[b, g, j] != none for g, places in enumerate(needed) for j in places):
                break
        assert int(cached[b]) == length
        for g, places in enumerate(needed):
            expected = [blocks[b, g, j] if j in places else none for j in range(hashes)]
            assert prefix[b, g].tolist() == expected
    assert len(set(cached.tolist())) > 1


def test_a_state_space_serves_a_prefix_from_its_last_block_alone():
    d = Driver((Group.state_space(T).window,))
    prompt = [1, 0, 1, 1]
    d.start([0], [prompt], [13])
    blocks = d.tables[0][0]
    d.register([0], [prompt], [0])
    assert d.slide([13, 0, 0, 0]) == [OK] * B
    assert d.tables[0][0] == [None, None, *blocks[2:]]
    assert queue_order(d.pool) == [blocks[1], blocks[0]]  # the last first, findable still
    evict = jax.jit(functools.partial(pool.evict, max_count=2))
    d.pool, _ = evict(d.pool, jnp.int32(2))
    d.model.pool.evict(2)
    d.release([0])
    cached, _ = d.start([1], [prompt], [14], num_hashes=[3])
    assert cached == [3 * T]
    assert d.tables[0][1][:3] == [None, None, blocks[2]]
    # A shorter prompt needs the block that is gone.
    assert d.start([2], [[*prompt[:2], 0]], [9])[0] == [0]


def test_a_full_group_still_needs_all():
    d = Driver((None, 6))
    prompt = [1, 0, 1]
    d.start([0], [prompt], [12])
    d.register([0], [prompt], [0])
    d.release([0])
    evict = jax.jit(functools.partial(pool.evict, max_count=2))
    d.pool, evicted = evict(d.pool, jnp.int32(2))  # both groups lose their last block
    d.model.pool.evict(2)
    assert evicted.groups.tolist() == [1, 0]
    assert d.start([0], [prompt], [13], num_hashes=[3])[0] == [2 * T]
    assert [None in row[0] for row in d.tables] == [False, False]  # 6 tokens back of position 8 lie in block 0


def test_a_window_slides_no_further_than_its_bound_in_one_call():
    d = Driver((10, None, 2))
    d.start([0], [[0, 1, 0, 1]], [16])
    full = d.tables[1][0]
    d.slide([16, 0, 0, 0])
    assert [table[0].count(None) for table in d.tables] == [1, 0, 2]
    d.slide([16, 0, 0, 0])
    assert [table[0].count(None) for table in d.tables] == [1, 0, 3]
    assert d.tables[1][0] == full
    assert d.slide([17, -1, 1, 0]) == [Status.INVALID_COUNT] * 3 + [OK]


@pytest.mark.parametrize("verb", ["trim", "rewind"])
def test_rolling_back_behind_a_window_is_refused_and_changes_nothing(verb):
    d = Driver((None, 6))
    d.start([0], [[0, 1, 0, 1]], [15])
    d.slide([15, 0, 0, 0])
    assert d.tables[1][0].count(None) == 2
    before = d.tables
    # Position 12 sees the tokens from 7 on, position 13 those from 8 on: the third block's.
    assert d.roll_back(verb, [12, 0, 0, 0]) == [PASSED, OK, OK, OK]
    assert (d.tables, d.batch.lengths.tolist()) == (before, [15, 0, 0, 0])
    assert d.roll_back(verb, [13, 0, 0, 0]) == [OK] * B
    assert d.extend([3, 0, 0, 0]) == [OK] * B


def test_what_is_trimmed_whole_begins_anew():
    d = Driver((1, 9))
    d.start([0], [[0, 1]], [7])
    d.slide([7, 0, 0, 0])
    assert d.roll_back("rewind", [0, 0, 0, 0])[0] == PASSED  # the freed block would be written
    assert d.roll_back("trim", [0, 0, 0, 0]) == [OK] * B
    assert d.extend([5, 0, 0, 0]) == [OK] * B
    assert all(None not in table[0] for table in d.tables)


def test_a_fork_has_the_same_holes():
    d = Driver((None, 6))
    d.start([0], [[0, 1, 1]], [11])
    d.slide([11, 0, 0, 0])
    d.fork([0], [2])
    assert [table[2] for table in d.tables] == [table[0] for table in d.tables]
    d.release([0])
    copies, _ = d.unshare([2])
    assert not any(copies)
    d.release([2])
    assert int(pool.stats(d.pool).held) == 0


def test_without_room_in_the_queue_no_window_slides():
    d = Driver((5,))
    d.start([0], [[0, 1, 1]], [12])
    d.register([0], [[0, 1, 1]], [0])
    queue = d.pool.inactive
    room = pool.release_room(d.pool).astype(jnp.uint32)
    state = replace(d.pool, inactive=replace(queue, tail=queue.tail + room - jnp.uint32(1)))
    computed = jnp.array([12, 0, 0, 0], jnp.int32)
    after, batch, status = d.do["slide"](state, d.batch, computed)
    assert status.tolist() == [Status.QUEUE_FULL] * B
    jax.tree.map(np.testing.assert_array_equal, batch, d.batch)
    np.testing.assert_array_equal(after.ref_counts, state.ref_counts)
    _, batch, status = d.do["slide"](pool.compact(after), batch, computed)
    assert (status.tolist(), batch.first.tolist()) == ([OK] * B, [[2, 0, 0, 0]])


def test_broken_laws_of_a_batch_are_counted():
    d = Driver((None, 6))
    d.start([0], [[0, 1, 1]], [12])
    d.slide([12, 0, 0, 0])
    sound = d.batch
    broken = {
        "misplaced_entries": replace(sound, block_tables=sound.block_tables.at[1, 0, 0].set(1)),
        "rows_without_room": replace(sound, lengths=sound.lengths.at[0].set(13)),
        "passed_too_far": replace(
            sound, first=sound.first.at[0, 0].set(1), block_tables=sound.block_tables.at[0, 0, 0].set(d.n)
        ),
    }
    assert set(broken) == set(invariants.SequenceViolations._fields)
    for name, batch in broken.items():
        found = invariants.check_sequences(batch)
        assert {law for law, count in found._asdict().items() if int(count)} == {name}


def test_mistakes_raise():
    with pytest.raises(LayoutError, match="window is 0; it must be at least 1"):
        Group(window=0)
    with pytest.raises(LayoutError, match="number of groups is 0"):
        sequences.init(1, 1, block_size=4, pool_blocks=4, groups=())


# --- attention


HEADS, DIM = 2, 8


def attention_over(windows, tokens, chunk):
    """Prefills `chunk` tokens, then decodes one by one, in one array for all groups; every free block is poisoned.

    Returns:
      Outputs [tokens, G, Hq, D] and the queries, keys and values.
    """
    rng = np.random.default_rng(0)
    count = len(windows)
    data = [rng.standard_normal((tokens, count, heads, DIM)).astype(np.float32) for heads in (2 * HEADS, HEADS, HEADS)]
    n = 5 * count + 1
    layout = KVLayout(1, n, T, HEADS, DIM, "float32")
    cache = kv_cache.init(layout)
    cache = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)
    state = pool.init(n)
    batch = sequences.init(2, tokens // T + 1, block_size=T, pool_blocks=n, groups=tuple(map(Group, windows)))

    @functools.partial(jax.jit, static_argnums=4)
    def compute(state, batch, cache, first, size):
        step = attention.step_batch(
            batch, jnp.array([0]), first[None], jnp.array([size]), num_tokens=size, max_query_len=size
        )
        outputs = []
        for g in range(count):
            q, k, v = (jax.lax.dynamic_slice_in_dim(jnp.asarray(x), first, size)[:, g] for x in data)
            output, cache = attention.attend(cache, 0, q, k, v, step, group=g)
            outputs.append(output)
        state, batch, status = sequences.slide(state, batch, batch.lengths, max_blocks=2)
        free = (state.ref_counts == 0)[:, None, None, None, None]
        cache = jax.tree.map(lambda x: jnp.where(free, jnp.nan, x), cache)
        return state, batch, cache, jnp.stack(outputs, axis=1), status

    none = jnp.zeros((1, 1, 4), jnp.uint32)
    state, batch, begun = sequences.start(state, batch, jnp.array([0]), none, jnp.array([0]), jnp.array([chunk]))
    assert begun.status.tolist() == [OK]
    extend = jax.jit(sequences.extend)
    state, batch, cache, output, _ = compute(state, batch, cache, jnp.int32(0), chunk)
    outputs = [output]
    for position in range(chunk, tokens):
        state, batch, grown = extend(state, batch, jnp.array([1, 0]))
        assert grown.status.tolist() == [OK, OK]
        state, batch, cache, output, status = compute(state, batch, cache, jnp.int32(position), 1)
        assert status.tolist() == [OK, OK]
        outputs.append(output)
    return np.concatenate(outputs), data, batch


@pytest.mark.parametrize("windows", [pytest.param((6,), marks=pytest.mark.long), (10, 2, 1)], ids=str)
def test_a_decode_loop_in_less_memory_than_its_length_is_dense_attention_over_windows(windows):
    tokens = 31  # 8 blocks for each group, of a pool that has 5 and one
    output, (q, k, v), batch = attention_over(windows, tokens, chunk=3)
    for g, window in enumerate(windows):
        expected = dense(q[:, g], k[:, g], v[:, g], 0, scale=DIM**-0.5, sliding_window=window)
        np.testing.assert_allclose(output[:, g], expected, atol=2e-5)
    assert batch.first[:, 0].tolist() == [(tokens - w + 1) // T for w in windows]


def test_full_and_window_groups_attend_side_by_side():
    output, (q, k, v), _ = attention_over((None, 6), 19, chunk=9)
    for g, window in enumerate((None, 6)):
        expected = dense(q[:, g], k[:, g], v[:, g], 0, scale=DIM**-0.5, sliding_window=window)
        np.testing.assert_allclose(output[:, g], expected, atol=2e-5)


def test_a_layer_may_look_less_far_than_its_group_keeps_and_no_further():
    cache = kv_cache.init(KVLayout(1, 4, T, HEADS, DIM, "float32"))
    batch = sequences.init(2, 2, block_size=T, pool_blocks=4, groups=(Group(window=6),))
    decode = attention.decode_batch(batch, jnp.array([True, False]))
    queries = jnp.zeros((2, HEADS, DIM))
    attention.paged_attention(cache, 0, queries, decode, sliding_window=5)
    with pytest.raises(LayoutError, match="sliding_window is 7; group 0 keeps no more than 6 tokens"):
        attention.paged_attention(cache, 0, queries, decode, sliding_window=7)
