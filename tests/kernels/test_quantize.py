"""Quantising rows: against numpy bit for bit, within the bounds that are promised, and at the edges."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized

from kvbm_jax.kernels.quantize import Quantized, convert, dequantize, quantize
from kvbm_jax.layout import ElementFormat

pytestmark = pytest.mark.core

DTYPES = ["int8", "float8_e4m3fn"]
INT8, FP8 = DTYPES
ROWS, D = 24, 32


@functools.partial(jax.jit, static_argnames="dtype")
def there(values, dtype):
    return quantize(values, dtype)


@jax.jit
def back(rows):
    return dequantize(rows, "float32")


def bits(array):
    return np.asarray(array).view(np.uint8)


def assert_same(found, payload, scales):
    np.testing.assert_array_equal(bits(found.payload), bits(payload))
    np.testing.assert_array_equal(np.asarray(found.scales), scales)


def many(seed=0):
    """Rows of all magnitudes."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(ROWS, D)) * 2.0 ** rng.integers(-100, 100, (ROWS, 1))).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("given", ["float32", "bfloat16"])
def test_it_is_what_numpy_computes(dtype, given):
    values = many().astype(jnp.dtype(given))
    expected = quantized.quantize(values, dtype)
    assert_same(there(values, dtype), *expected)
    assert_same(quantize(jnp.asarray(values), dtype), *expected)
    np.testing.assert_array_equal(back(Quantized(*expected)), quantized.dequantize(*expected))


def assert_within_bounds(values, found, dtype):
    scales = np.asarray(found.scales, np.float64)[..., None]
    error = np.abs(np.asarray(back(found), np.float64) - values)
    bound = scales / 2 if dtype == INT8 else np.maximum(np.abs(values) / 16, scales / 1024)
    tiny = np.finfo(np.float32).tiny * quantized.LIMITS[dtype]
    bound = np.where(scales == 0, tiny, bound)
    assert (error <= bound * (1 + 1e-4)).all(), (error / bound).max()


@pytest.mark.parametrize("dtype", DTYPES)
@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(values=hnp.arrays(np.float32, (ROWS, D), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_what_comes_back_is_within_the_bounds(dtype, values):
    assert_within_bounds(values.astype(np.float64), there(values, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bounds_are_reached(dtype):
    found = there(many(), dtype)
    error = np.abs(np.asarray(back(found), np.float64) - many())
    worst = np.asarray(found.scales)[:, None] / 2 if dtype == INT8 else np.abs(many()) / 16
    assert (error > worst * 0.9).any()


def test_ties_go_to_even_and_the_largest_saturates():
    row = np.zeros((ROWS, D), np.float32)
    row[0, :6] = [127, 0.5, 1.5, 2.5, -0.5, -2.5]
    np.testing.assert_array_equal(there(row, INT8).payload[0, :6], [127, 0, 2, 2, 0, -2])
    row[0, :6] = [448, 1.0625, 1.1875, 447, -448, 2.0**-10]
    np.testing.assert_array_equal(np.asarray(there(row, FP8).payload[0, :6], np.float32), [448, 1, 1.25, 448, -448, 0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_rows_and_rows_too_small_for_a_scale_are_zeros(dtype):
    values = many()
    values[1] = 0
    values[2] = 1e-37
    found = there(values, dtype)
    assert not np.asarray(found.scales)[1:3].any()
    assert not np.asarray(back(found))[1:3].any()
    assert np.asarray(found.scales)[[0, *range(3, ROWS)]].all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_poisons_its_row_alone(dtype, bad):
    values = many()
    values[3, 5] = bad
    found = there(values, dtype)
    assert_same(found, *quantized.quantize(values, dtype))
    came = np.asarray(back(found))
    assert np.isnan(came[3]).all()
    assert np.isfinite(np.delete(came, 3, axis=0)).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantising_again_changes_no_element(dtype):
    once = there(many(), dtype)
    again = there(back(once), dtype)
    np.testing.assert_array_equal(bits(again.payload), bits(once.payload))
    np.testing.assert_allclose(again.scales, once.scales, rtol=3e-7)


def test_formats_are_converted_through_float32_and_equal_ones_not_at_all():
    plain, int8, fp8 = ElementFormat("bfloat16"), ElementFormat(INT8, True), ElementFormat(FP8, True)
    rows = there(many(), INT8)
    assert convert(*rows, int8, int8) == (rows.payload, rows.scales)
    payload, scales = convert(*rows, int8, plain)
    assert (payload.dtype, scales) == (jnp.bfloat16, None)
    np.testing.assert_array_equal(payload, quantized.dequantize(*map(np.asarray, rows), "bfloat16"))
    other = Quantized(*convert(*rows, int8, fp8))
    assert_same(other, *quantized.quantize(back(rows), FP8))
    assert_same(Quantized(*convert(payload, None, plain, int8)), *quantized.quantize(payload, INT8))
