"""Lent memory comes back when nothing refers to it, and not before."""

import gc

import jax
import numpy as np
import pytest

from kvbm_jax.offload.buffer_pool import BufferPool


def address(array):
    return array.ctypes.data


def test_memory_is_lent_again_once_nothing_refers_to_it():
    pool = BufferPool()
    rows = pool.lend(3, 5000)
    assert rows.shape == (3, 5000)
    assert rows.flags.writeable
    first = address(rows)
    assert first % 4096 == 0
    view = rows[1:].view(np.float32)
    del rows
    other = pool.lend(3, 5000)
    assert address(other) != first
    del view
    again = pool.lend(2, 100)
    assert address(again) == first
    assert again.shape == (2, 100)


@pytest.mark.core
def test_memory_that_a_jax_array_took_over_is_not_lent_again():
    pool = BufferPool()
    rows = pool.lend(4, 4096)
    rows[:] = 7
    first = address(rows)
    taken = jax.device_put(rows.view(np.float32), jax.devices("cpu")[0])
    assert taken.unsafe_buffer_pointer() == first  # without a copy, or this test proves nothing
    del rows
    gc.collect()
    other = pool.lend(4, 4096)
    assert address(other) != first
    other[:] = 0
    doubled = taken + taken
    del taken
    np.testing.assert_array_equal(
        np.asarray(doubled).view(np.uint8).reshape(-1)[:4],
        (np.full(4, 7, np.uint8).view(np.float32) * 2).view(np.uint8),
    )
    doubled.block_until_ready()
    gc.collect()
    assert address(pool.lend(4, 4096)) == first


def test_the_largest_are_kept():
    pool = BufferPool(max_free=2)
    lent = [pool.lend(1, size) for size in (10_000, 30_000, 20_000)]
    addresses = [address(rows) for rows in lent]
    del lent
    gc.collect()
    assert {address(rows) for rows in (pool.lend(1, 5_000), pool.lend(1, 25_000))} <= set(addresses[1:])
    assert pool.lend(0, 100).shape == (0, 100)
