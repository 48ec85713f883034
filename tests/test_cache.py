"""Storing, loading and moving keys and values against plain numpy arrays, in both layouts that a device uses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvbm_jax import cache as kv_cache
from kvbm_jax import kernels
from kvbm_jax.errors import LayoutError
from kvbm_jax.layout import KVLayout, LayoutKind

pytestmark = pytest.mark.core

L, N, T, H, D = 3, 6, 4, 2, 8
KINDS = [LayoutKind.LAYER_SEPARATE, LayoutKind.LAYER_STACKED]
DTYPES = ["float32", "bfloat16"]
S = 7


def layout(kind, dtype="float32", **sizes):
    return KVLayout(**{"num_layers": L, "num_blocks": N, "block_size": T, "num_kv_heads": H, "head_dim": D} | sizes,
                    dtype=dtype, kind=kind)  # fmt: skip


@functools.cache
def verbs():
    return {
        "store": jax.jit(kv_cache.store_kv, static_argnums=1),
        "load": jax.jit(kv_cache.load_kv, static_argnums=1),
        "gather": jax.jit(kv_cache.gather_blocks),
        "scatter": jax.jit(kv_cache.scatter_blocks),
        "copy": jax.jit(kv_cache.copy_blocks),
        "scrub": jax.jit(kv_cache.scrub_blocks, donate_argnums=0),
    }


def contents(cache):
    """The whole cache as [L, N, C, T, H, D] in float32."""
    stacked = cache.arrays[0] if cache.layout.kind is LayoutKind.LAYER_STACKED else jnp.stack(cache.arrays)
    return np.asarray(stacked, np.float32)


def filled(kind, dtype="float32", seed=0):
    """A cache of random values that the dtype holds exactly."""
    cache = kv_cache.init(layout(kind, dtype))
    values = np.random.default_rng(seed).integers(-128, 128, (L, N, 2, T, H, D)).astype(np.float32)
    parts = [values] if kind is LayoutKind.LAYER_STACKED else list(values)
    # Copies: jax may share the memory of a numpy array, which tests write to.
    return kv_cache.KVCache(tuple(jnp.array(part, dtype) for part in parts), cache.layout), values


def tokens(seed=1, dtype="float32"):
    rng = np.random.default_rng(seed)
    keys, values = rng.integers(-128, 128, (2, S, H, D)).astype(np.float32)
    slots = rng.permutation(N * T)[:S].astype(np.int32)
    return jnp.asarray(keys, dtype), jnp.asarray(values, dtype), slots


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_stored_is_loaded_and_nothing_else_changes(kind, dtype):
    cache, expected = filled(kind, dtype)
    for layer in range(L):
        keys, values, slots = tokens(layer, dtype)
        slots[2] = N * T  # padding
        cache = verbs()["store"](cache, layer, keys, values, slots)
        real = slots < N * T
        for component, data in enumerate((keys, values)):
            expected[layer, slots[real] // T, component, slots[real] % T] = np.asarray(data, np.float32)[real]
        for got, data in zip(verbs()["load"](cache, layer, slots), (keys, values), strict=True):
            assert got.dtype == jnp.dtype(dtype)
            np.testing.assert_array_equal(got[real], data[real])
            np.testing.assert_array_equal(got[~real], 0)
        np.testing.assert_array_equal(contents(cache), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_padding_alone_changes_nothing(kind):
    cache, expected = filled(kind)
    keys, values, _ = tokens()
    for layer in (0, L - 1):
        cache = verbs()["store"](cache, layer, keys, values, np.full((S,), N * T, np.int32))
    np.testing.assert_array_equal(contents(cache), expected)
    loaded = verbs()["load"](cache, L - 1, np.full((S,), N * T, np.int32))
    assert not any(part.any() for part in loaded)


def test_store_casts_to_the_dtype_of_the_cache():
    cache = kv_cache.init(layout(KINDS[0], "bfloat16"))
    keys, values, slots = tokens()
    cache = verbs()["store"](cache, 0, keys + 0.001, values, slots)
    np.testing.assert_array_equal(verbs()["load"](cache, 0, slots)[0], (keys + 0.001).astype(jnp.bfloat16))


def test_a_scan_over_traced_layers_is_a_loop_over_them():
    cache, expected = filled(LayoutKind.LAYER_STACKED)
    data = [tokens(layer) for layer in range(L)]
    keys, values = (jnp.stack([step[i] for step in data]) for i in (0, 1))
    slots = data[0][2]
    slots[4] = N * T

    @functools.partial(jax.jit, donate_argnums=0)
    def run(cache, keys, values, slots):
        def body(cache, step):
            layer, k, v = step
            before = kv_cache.load_kv(cache, layer, slots)
            return kv_cache.store_kv(cache, layer, k, v, slots), before

        return jax.lax.scan(body, cache, (jnp.arange(L, dtype=jnp.int32), keys, values))

    cache, before = run(cache, keys, values, slots)
    real = slots < N * T
    for component, part in enumerate(before):
        np.testing.assert_array_equal(part[:, real], expected[:, slots[real] // T, component, slots[real] % T])
        assert not part[:, ~real].any()
        expected[:, slots[real] // T, component, slots[real] % T] = (keys, values)[component][:, real]
    np.testing.assert_array_equal(contents(cache), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_are_gathered_and_scattered(kind, dtype):
    cache, expected = filled(kind, dtype)
    ids = np.array([4, N, 0, 4], np.int32)
    blocks = verbs()["gather"](cache, ids)
    assert blocks.shape == (4, L, 2, T, H, D)
    assert blocks.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(np.asarray(blocks, np.float32)[[0, 2, 3]], expected.swapaxes(0, 1)[[4, 0, 4]])
    assert not blocks[1].any()

    new = jnp.asarray(np.random.default_rng(3).integers(-9, 9, blocks.shape), dtype)
    ids = np.array([5, 1, N, 2], np.int32)
    cache = verbs()["scatter"](cache, ids, new)
    expected[:, [5, 1, 2]] = np.asarray(new, np.float32).swapaxes(0, 1)[:, [0, 1, 3]]
    np.testing.assert_array_equal(contents(cache), expected)
    np.testing.assert_array_equal(np.asarray(verbs()["gather"](cache, ids))[[0, 1, 3]], np.asarray(new)[[0, 1, 3]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("sources", "targets"),
    [
        ([0, 1, 2, 3], [1, 2, 3, 0]),  # a cycle: all reads before all writes
        ([5, 5, 5, 5], [0, 1, 2, 3]),
        ([0, 1, 2, 3], [3, N, 5, 4]),  # a dropped copy
        ([4, N, 2, 3], [4, N, N, N]),
    ],
)
def test_copies_read_before_they_write(kind, sources, targets):
    cache, expected = filled(kind)
    old = expected.copy()
    cache = verbs()["copy"](cache, np.array(sources, np.int32), np.array(targets, np.int32))
    for source, target in zip(sources, targets, strict=True):
        if target < N:
            expected[:, target] = old[:, source]
    np.testing.assert_array_equal(contents(cache), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_scrubbed_blocks_are_zero_in_every_layer_and_others_stay(kind):
    cache, values = filled(kind)
    pointers = [array.unsafe_buffer_pointer() for array in cache.arrays]
    cache = verbs()["scrub"](cache, jnp.array([2, N, 0], jnp.int32))
    values[:, [0, 2]] = 0
    np.testing.assert_array_equal(contents(cache), values)
    assert [array.unsafe_buffer_pointer() for array in cache.arrays] == pointers


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_a_view(kind):
    cache, expected = filled(kind)
    for layer in range(L):
        array, first = kv_cache.layer_view(cache, layer)
        np.testing.assert_array_equal(array[first : first + N], expected[layer])


@pytest.mark.parametrize("kind", [LayoutKind.FULLY_CONTIGUOUS, LayoutKind.UNIVERSAL])
def test_a_cache_is_of_a_kind_that_models_use(kind):
    with pytest.raises(LayoutError, match=f"{kind}.*layer_separate or layer_stacked"):
        kv_cache.init(layout(kind))


def trace(call, kind=KINDS[0], **sizes):
    cache = jax.eval_shape(lambda: kv_cache.init(layout(kind, **sizes)))
    return jax.eval_shape(call, cache)


def f32(*shape):
    return jnp.zeros(shape, jnp.float32)


def i32(*shape):
    return jnp.zeros(shape, jnp.int32)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("call", "parts"),
    [
        (lambda c: kv_cache.store_kv(c, L, f32(S, H, D), f32(S, H, D), i32(S)), ("layer is 3", "0 to 2")),
        (lambda c: kv_cache.load_kv(c, -1, i32(S)), ("layer is -1", "0 to 2")),
        (lambda c: kv_cache.store_kv(c, 0, f32(S, H, 9), f32(S, H, 9), i32(S)), ("[7, 2, 9]", "[7, 2, 8]")),
        (lambda c: kv_cache.store_kv(c, 0, f32(S, H, D), f32(S, H, D), i32(5)), ("[7, 2, 8]", "5 slots")),
        (lambda c: kv_cache.store_kv(c, 0, f32(S, H, D), f32(S, 1, D), i32(S)), ("[7, 2, 8]", "[7, 1, 8]")),
        (lambda c: kv_cache.scatter_blocks(c, i32(2), f32(3, L, 2, T, H, D)), ("[3, 3, 2, 4, 2, 8]", "[2, 3,")),
        (lambda c: kv_cache.scatter_blocks(c, i32(2), f32(2, L, 2, T, H, 9)), ("9", "8")),
        (lambda c: kv_cache.copy_blocks(c, i32(2), i32(3)), ("2 sources", "3 targets")),
    ],
)
def test_mistakes_of_shape_raise_at_trace_time(kind, call, parts):
    with pytest.raises(LayoutError) as caught:
        trace(call, kind)
    for part in parts:
        assert part in str(caught.value)


def test_a_cache_of_one_component_has_no_keys_and_values():
    with pytest.raises(LayoutError, match="components = 1"):
        trace(lambda c: kv_cache.load_kv(c, 0, i32(S)), components=1)
    with pytest.raises(LayoutError, match="ask for 1 of"):
        trace(lambda c: kv_cache.store_kv(c, 0, f32(S, H, D), f32(S, H, D), i32(S)), components=1)


def test_a_traced_layer_needs_stacked_layers():
    cache = kv_cache.init(layout(KINDS[0]))
    with pytest.raises(LayoutError, match="layer_stacked"):
        jax.eval_shape(lambda layer: kv_cache.load_kv(cache, layer, i32(S)), jnp.int32(0))


@pytest.mark.parametrize(
    ("operation", "args"),
    [
        (kernels.store_kv, (f32(N, 2, T, H, D), (f32(S, H, D), f32(S, H, D)), i32(S))),
        (kernels.load_kv, (f32(N, 2, T, H, D), i32(S))),
        (kernels.gather_blocks, ([f32(N, 2, T, H, D)] * L, layout(KINDS[0]), i32(S))),
        (kernels.scatter_blocks, ([f32(N, 2, T, H, D)] * L, layout(KINDS[0]), i32(S), f32(S, L, 2, T, H, D))),
        (kernels.copy_blocks, ([f32(N, 2, T, H, D)] * L, layout(KINDS[0]), i32(S), i32(S))),
        (kernels.permute_blocks, ([f32(N, 2, T, H, D)] * L, layout(KINDS[0]), LayoutKind.UNIVERSAL)),
    ],
)
def test_an_implementation_that_does_not_exist_is_refused_by_name(operation, args):
    with pytest.raises(NotImplementedError, match=f"{operation.__name__}.*'triton'.*xla"):
        operation(*args, implementation="triton")


def any_cache(kind, seed=0):
    """A cache of any kind, and its contents as [L, N, C, T, H, D]."""
    made = layout(kind)
    values = np.random.default_rng(seed).integers(-128, 128, (L, N, 2, T, H, D)).astype(np.float32)
    if kind is LayoutKind.LAYER_SEPARATE:
        return kv_cache.KVCache(tuple(jnp.array(part) for part in values), made), values
    order = ["LNCTHD".index(axis) for axis in made.axes]
    return kv_cache.KVCache((jnp.array(values.transpose(order)),), made), values


def as_lnc(cache):
    if cache.layout.kind is LayoutKind.LAYER_SEPARATE:
        return np.stack([np.asarray(array) for array in cache.arrays])
    return np.asarray(cache.arrays[0]).transpose([cache.layout.axes.index(axis) for axis in "LNCTHD"])


@pytest.mark.parametrize("kind", LayoutKind)
@pytest.mark.parametrize("sources", [[0, N, 4], [5, 1, N, N, 2, 0, 3, N, 4]], ids=["shrink", "grow"])
def test_resized_blocks_are_copies_and_the_rest_is_zeros(kind, sources):
    cache, values = any_cache(kind)
    resized = jax.jit(kv_cache.resize_blocks)(cache, jnp.array(sources))
    assert resized.layout.num_blocks == len(sources)
    assert all(array.shape == resized.layout.array_shape for array in resized.arrays)
    padded = np.concatenate([values, np.zeros_like(values[:, :1])], axis=1)
    np.testing.assert_array_equal(as_lnc(resized), padded[:, sources])


@pytest.mark.parametrize("kind", LayoutKind)
@pytest.mark.parametrize("size", [1, 3, 8])
def test_regrouped_tokens_are_copies_and_the_rest_is_zeros(kind, size):
    cache, values = any_cache(kind)
    slots = np.random.default_rng(1).integers(0, N * T + 1, (N * T // size, size)).astype(np.int32)
    regrouped = jax.jit(kv_cache.regroup_tokens)(cache, slots)
    assert (regrouped.layout.num_blocks, regrouped.layout.block_size) == slots.shape
    assert all(array.shape == regrouped.layout.array_shape for array in regrouped.arrays)
    by_slot = values.transpose(0, 2, 1, 3, 4, 5).reshape(L, 2, N * T, H, D)
    by_slot = np.concatenate([by_slot, np.zeros_like(by_slot[:, :, :1])], axis=2)
    expected = by_slot[:, :, slots].transpose(0, 2, 1, 3, 4, 5)  # [L, M, C, U, H, D]
    np.testing.assert_array_equal(as_lnc(regrouped), expected)
