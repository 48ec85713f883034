"""Staging arrays: how many, how large, and what passes through them."""

import jax
import numpy as np
import pytest

from kvbm_jax import KVLayout
from kvbm_jax import cache as kv_cache
from kvbm_jax.offload.staging import StagingRing, onboard, rows_for, rows_of_array

pytestmark = pytest.mark.core

MIB = 1 << 20


@pytest.mark.parametrize(
    ("count", "block_bytes", "rows"),
    [
        (0, 100, 0),
        (1, 100, 4),
        (8, 100, 8),
        (9, 100, 32),
        (33, 100, 36),
        (64, 100, 64),
        (1, 20 * MIB, 3),
        (4, 20 * MIB, 6),
        (2, 100 * MIB, 2),
    ],
)
def test_arrays_are_few_and_not_large(count, block_bytes, rows):
    assert rows_for(count, block_bytes) == rows


@pytest.mark.parametrize("kind", ["layer_separate", "layer_stacked"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("count", [1, 9, 37])
@pytest.mark.parametrize("pinned", [False, True])
def test_blocks_leave_and_come_back_as_they_were(kind, dtype, count, pinned):
    layout = KVLayout(3, 40, 4, 2, 6, dtype, kind)
    rng = np.random.default_rng(count)
    cache = jax.tree.map(
        lambda array: jax.numpy.asarray(rng.normal(size=array.shape), array.dtype), kv_cache.init(layout)
    )
    whole = jax.tree.map(lambda array: np.asarray(array).copy(), cache)
    blocks = rng.permutation(40)[:count].astype(np.int32)
    ring = StagingRing(layout, pinned=pinned)
    arrays = ring.gather(cache, blocks)
    assert sum(array.shape[0] for array in arrays) * layout.block_bytes == ring.bytes_for(count)
    rows = np.concatenate([rows_of_array(array) for array in arrays])
    emptied, _ = onboard(cache, blocks, np.zeros_like(rows))
    assert not np.asarray(kv_cache.gather_blocks(emptied, jax.numpy.asarray(blocks))).any()
    back, _ = onboard(emptied, blocks, rows)
    for before, after in zip(jax.tree.leaves(whole), jax.tree.leaves(back), strict=True):
        np.testing.assert_array_equal(before, np.asarray(after))


def test_an_array_is_written_again_where_it_lies():
    layout = KVLayout(3, 40, 4, 2, 6, "float32")
    cache, ring = kv_cache.init(layout), StagingRing(layout)
    [array] = ring.gather(cache, np.arange(32, dtype=np.int32))
    pointer = array.unsafe_buffer_pointer()
    rows_of_array(array)
    ring.release([array])
    [again] = ring.gather(cache, np.arange(32, dtype=np.int32))
    assert again.unsafe_buffer_pointer() == pointer
    assert array.is_deleted()


def test_what_lies_in_pinned_memory_stays_when_the_array_is_written_again():
    layout = KVLayout(3, 40, 4, 2, 6, "bfloat16")
    first, second = (
        jax.tree.map(lambda array, n=n: jax.numpy.full(array.shape, n, array.dtype), kv_cache.init(layout))
        for n in (1, 2)
    )
    ring, blocks = StagingRing(layout, pinned=True), np.arange(32, dtype=np.int32)
    [before] = ring.gather(first, blocks)
    rows = rows_of_array(before)
    [after] = ring.gather(second, blocks)
    del before
    assert not rows.flags.writeable
    assert (rows.view(jax.numpy.bfloat16) == 1).all()
    assert (rows_of_array(after).view(jax.numpy.bfloat16) == 2).all()
    assert after.sharding.memory_kind == "pinned_host"
