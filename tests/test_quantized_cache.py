"""Caches of int8 and float8 with scales: what the verbs of `kvbm_jax.cache` do to elements and scales alike."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized

from kvbm_jax import cache as kv_cache
from kvbm_jax.errors import LayoutError
from kvbm_jax.layout import KVLayout, LayoutKind

pytestmark = pytest.mark.core

L, N, T, H, D, S = 3, 6, 4, 2, 8, 7
SEPARATE, STACKED, CONTIGUOUS, UNIVERSAL = LayoutKind
DTYPES = ["int8", "float8_e4m3fn"]
BOTH = pytest.mark.parametrize(("kind", "dtype"), [(SEPARATE, DTYPES[0]), (STACKED, DTYPES[1])])


def filled(kind, dtype="int8", seed=0):
    """A cache, and the bytes of its rows, [L, N, C, T, H, D + 4]."""
    layout = KVLayout(L, N, T, H, D, dtype, kind, quantized=True)
    rng = np.random.default_rng(seed)
    payload = rng.integers(-8, 8, (L, N, 2, T, H, D)).astype(jnp.dtype(dtype))
    rows = quantized.rows_of(payload, rng.normal(size=payload.shape[:-1]).astype(np.float32))
    return with_rows(rows, layout), rows


def with_rows(rows, layout):
    arrays = tuple(map(jnp.array, quantized.arrays_of(rows, layout)))
    return kv_cache.KVCache(arrays[: layout.num_arrays], layout, arrays[layout.num_arrays :])


def rows_in(cache):
    return quantized.rows_in(cache.arrays + cache.scales, cache.layout).copy()


def tokens(seed=1):
    rng = np.random.default_rng(seed)
    keys, values = rng.normal(size=(2, S, H, D)).astype(np.float32)
    slots = rng.permutation(N * T)[:S].astype(np.int32)
    slots[2] = N * T  # padding
    return keys, values, slots


@functools.cache
def verbs():
    return {
        "store": jax.jit(kv_cache.store_kv, static_argnums=1, donate_argnums=0),
        "load": jax.jit(kv_cache.load_kv, static_argnums=1, static_argnames="dtype"),
    }


@BOTH
def test_a_new_cache_is_zeros(kind, dtype):
    cache = kv_cache.init(KVLayout(L, N, T, H, D, dtype, kind, quantized=True))
    assert [(array.shape, array.dtype.name) for array in cache.scales] == [
        (cache.layout.scale_shape, "float32") for _ in cache.arrays
    ]
    assert not rows_in(cache).any()
    assert kv_cache.init(KVLayout(L, N, T, H, D, dtype, kind)).scales == ()


@BOTH
def test_what_is_stored_is_loaded_within_a_step_and_nothing_else_changes(kind, dtype):
    cache, expected = filled(kind, dtype)
    for layer in range(L):
        keys, values, slots = tokens(layer)
        cache = verbs()["store"](cache, layer, keys, values, slots)
        real = slots < N * T
        loaded = verbs()["load"](cache, layer, slots)
        narrow = verbs()["load"](cache, layer, slots, dtype="bfloat16")
        for component, data in enumerate((keys, values)):
            payload, scales = quantized.quantize(data[real], dtype)
            places = slots[real] // T, component, slots[real] % T
            expected[layer][places] = quantized.rows_of(payload, scales)
            assert (loaded[component].dtype, narrow[component].dtype) == (jnp.float32, jnp.bfloat16)
            came = np.asarray(loaded[component])
            np.testing.assert_array_equal(came[real], quantized.dequantize(payload, scales))
            np.testing.assert_array_equal(narrow[component], loaded[component].astype(jnp.bfloat16))
            assert np.abs(came[real] - data[real]).max() < (0.02 if dtype == "int8" else 0.2)
            assert not came[~real].any()
        np.testing.assert_array_equal(rows_in(cache), expected)


def test_a_plain_cache_is_loaded_in_another_dtype_too():
    cache = kv_cache.init(KVLayout(L, N, T, H, D, "bfloat16"))
    keys, values, slots = tokens()
    cache = verbs()["store"](cache, 0, keys, values, slots)
    assert verbs()["load"](cache, 0, slots)[0].dtype == jnp.bfloat16
    found = verbs()["load"](cache, 0, slots, dtype="float32")[0]
    np.testing.assert_array_equal(found[:2], keys[:2].astype(jnp.bfloat16))


def test_a_scan_over_traced_layers_is_a_loop_over_them():
    cache, _ = filled(STACKED)
    looped, _ = filled(STACKED)
    keys, values, slots = tokens()

    def body(cache, layer):
        cache = kv_cache.store_kv(cache, layer, keys + layer, values, slots)
        return cache, kv_cache.load_kv(cache, layer, slots)[0]

    cache, loaded = jax.jit(lambda cache: jax.lax.scan(body, cache, jnp.arange(L)))(cache)
    for layer in range(L):
        looped = verbs()["store"](looped, layer, keys + layer, values, slots)
        np.testing.assert_array_equal(verbs()["load"](looped, layer, slots)[0], loaded[layer])
    np.testing.assert_array_equal(rows_in(cache), rows_in(looped))


@BOTH
@pytest.mark.parametrize("run", [CONTIGUOUS, UNIVERSAL])
def test_blocks_leave_and_come_back_bit_for_bit(kind, dtype, run):
    cache, expected = filled(kind, dtype)
    ids, targets = np.array([4, N, 0, 2], np.int32), np.array([1, 3, N, 5], np.int32)
    blocks = kv_cache.gather_blocks(cache, ids, kind=run)
    assert (blocks.shape, blocks.dtype) == ((4, cache.layout.block_bytes), jnp.uint8)
    taken = np.concatenate([expected, np.zeros_like(expected[:, :1])], axis=1)[:, ids]
    np.testing.assert_array_equal(blocks, quantized.arrays_of(taken, cache.layout.staging(4, run))[0])
    cache = kv_cache.scatter_blocks(cache, targets, blocks, kind=run)
    expected[:, [1, 3, 5]] = taken[:, [0, 1, 3]]
    np.testing.assert_array_equal(rows_in(cache), expected)


@BOTH
def test_copied_and_scrubbed_blocks_take_their_scales_along(kind, dtype):
    cache, expected = filled(kind, dtype)
    cache = kv_cache.copy_blocks(cache, np.array([0, 1, 2], np.int32), np.array([1, 0, N], np.int32))
    expected[:, [1, 0]] = expected[:, [0, 1]]
    np.testing.assert_array_equal(rows_in(cache), expected)
    cache = kv_cache.scrub_blocks(cache, jnp.array([2, N, 5], jnp.int32))
    expected[:, [2, 5]] = 0
    np.testing.assert_array_equal(rows_in(cache), expected)


@pytest.mark.parametrize("kind", LayoutKind)
def test_caches_of_other_sizes_and_kinds_hold_the_same_rows(kind):
    cache, rows = filled(kind)
    padded = np.concatenate([rows, np.zeros_like(rows[:, :1])], axis=1)
    sources = [0, N, 4, 2]
    np.testing.assert_array_equal(rows_in(kv_cache.resize_blocks(cache, jnp.array(sources))), padded[:, sources])
    slots = np.random.default_rng(1).integers(0, N * T + 1, (8, 3)).astype(np.int32)
    regrouped = kv_cache.regroup_tokens(cache, slots)
    assert (regrouped.layout.kind, regrouped.layout.block_size) == (kind, 3)
    np.testing.assert_array_equal(rows_in(regrouped), padded[:, slots // T, :, slots % T].transpose(2, 0, 3, 1, 4, 5))
    for other in LayoutKind:
        permuted = kv_cache.permute_blocks(cache, other)
        assert [leaf.shape for leaf in jax.tree.leaves(permuted)] == [
            shape
            for shape in (permuted.layout.array_shape, permuted.layout.scale_shape)
            if shape is not None
            for _ in permuted.arrays
        ]
        np.testing.assert_array_equal(rows_in(permuted), rows)


@pytest.mark.parametrize("kind", [SEPARATE, STACKED])
def test_the_scales_of_a_layer_are_a_view(kind):
    cache, rows = filled(kind)
    _, scales = quantized.split(rows, "int8")
    for layer in range(L):
        _, first = kv_cache.layer_view(cache, layer)
        np.testing.assert_array_equal(kv_cache.layer_scales(cache, layer)[first : first + N], scales[layer])
    assert kv_cache.layer_scales(kv_cache.init(KVLayout(1, 1, 1, 1, 1)), 0) is None


def test_bytes_that_are_none_are_refused():
    cache, _ = filled(SEPARATE)
    size = cache.layout.block_bytes
    with pytest.raises(LayoutError, match=r"blocks are int8; quantised ones are bytes, uint8"):
        kv_cache.scatter_blocks(cache, jnp.zeros((2,), jnp.int32), jnp.zeros((2, size), jnp.int8))
    with pytest.raises(LayoutError, match=rf"\[2, {L}, 2, {T}, {H}, {D}\].*\[2, {size}\]"):
        kv_cache.scatter_blocks(cache, jnp.zeros((2,), jnp.int32), jnp.zeros((2, L, 2, T, H, D)))
    with pytest.raises(LayoutError, match=rf"out is \[2, {size}\] int8.*\[2, {size}\] uint8"):
        kv_cache.gather_blocks(cache, jnp.zeros((2,), jnp.int32), out=jnp.zeros((2, size), jnp.int8))
