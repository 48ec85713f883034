"""Byte offsets of every layout against the strides of real arrays, and against a golden file."""

import dataclasses
import itertools
import json
from pathlib import Path

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
import quantized
from hypothesis import given, settings

from kvbm_jax.errors import LayoutError
from kvbm_jax.layout import ElementFormat, KVLayout, LayoutKind

pytestmark = pytest.mark.core

GOLDEN = json.loads((Path(__file__).parent / "golden" / "layouts.json").read_text())
SMALL = KVLayout(num_layers=3, num_blocks=5, block_size=4, num_kv_heads=2, head_dim=6, dtype="float32")
AXES = {"L": "layer", "N": "block", "C": "component", "T": "token", "H": "head", "D": "dim"}


@settings(max_examples=80)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 6),
    kind=st.sampled_from(LayoutKind),
    dtype=st.sampled_from(["bfloat16", "float32", "int8", "float8_e4m3fn"]),
    data=st.data(),
)
def test_offsets_are_those_of_a_row_major_array(sizes, kind, dtype, data):
    size = dict(zip("LNCTHD", sizes, strict=True))
    layout = KVLayout(size["L"], size["N"], size["T"], size["H"], size["D"], dtype, kind, size["C"])
    index = {axis: data.draw(st.integers(0, n - 1)) for axis, n in size.items()}
    arrays = [np.zeros(layout.array_shape, jnp.dtype(dtype)) for _ in range(layout.num_arrays)]
    assert layout.array_shape == tuple(size[axis] for axis in layout.axes)
    assert sum(a.nbytes for a in arrays) == layout.total_bytes == size["N"] * layout.block_bytes
    number, offset = layout.byte_offset(**{AXES[axis]: i for axis, i in index.items()})
    strides = dict(zip(layout.axes, arrays[0].strides, strict=True))
    assert offset == sum(strides[axis] * index[axis] for axis in layout.axes)
    assert number == (index["L"] if kind is LayoutKind.LAYER_SEPARATE else 0)


@pytest.mark.parametrize("kind", LayoutKind)
def test_offsets_cover_every_element_once(kind):
    layout = dataclasses.replace(SMALL, kind=kind)
    places = [
        layout.byte_offset(**dict(zip(AXES.values(), index, strict=True)))
        for index in itertools.product(range(3), range(5), range(2), range(4), range(2), range(6))
    ]
    per_array = layout.total_bytes // layout.num_arrays
    assert sorted(places) == [(a, o) for a in range(layout.num_arrays) for o in range(0, per_array, 4)]


@pytest.mark.parametrize("kind", LayoutKind)
def test_golden(kind):
    layout = KVLayout(**GOLDEN["layout"], kind=kind)
    golden = GOLDEN["kinds"][kind]
    assert layout.axes == golden["axes"]
    assert list(layout.array_shape) == golden["array_shape"]
    assert layout.num_arrays == golden["num_arrays"]
    assert layout.block_bytes == golden["block_bytes"]
    assert layout.total_bytes == golden["total_bytes"]
    for (layer, block, component, token, head, dim), place in golden["offsets"]:
        found = layout.byte_offset(layer=layer, block=block, component=component, token=token, head=head, dim=dim)
        assert list(found) == place


@pytest.mark.parametrize("kind", LayoutKind)
def test_golden_of_quantised_layouts(kind):
    layout = KVLayout(**GOLDEN["quantized"]["layout"], kind=kind)
    golden = GOLDEN["quantized"]["kinds"][kind]
    for name in ("axes", "array_dtype", "num_arrays", "block_bytes", "total_bytes"):
        assert getattr(layout, name) == golden[name]
    assert list(layout.array_shape) == golden["array_shape"]
    assert layout.scale_shape == (golden["scale_shape"] and tuple(golden["scale_shape"]))
    assert layout.is_packed == (golden["scale_shape"] is None)
    for (layer, block, component, token, head, dim), place, scale_place in golden["offsets"]:
        where = {"layer": layer, "block": block, "component": component, "token": token, "head": head}
        assert list(layout.byte_offset(**where, dim=dim)) == place
        assert list(layout.scale_offset(**where)) == scale_place


@pytest.mark.parametrize("kind", LayoutKind)
def test_offsets_of_a_quantised_layout_find_what_numpy_puts_there(kind):
    layout = dataclasses.replace(SMALL, kind=kind, dtype="int8", quantized=True)
    shape = (3, 5, 2, 4, 2, 6)
    payload = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
    scales = np.arange(np.prod(shape[:-1]), dtype=np.float32).reshape(shape[:-1])
    arrays = quantized.arrays_of(quantized.rows_of(payload, scales), layout)
    memory = [np.asarray(array).tobytes() for array in arrays]
    assert sum(map(len, memory)) == layout.total_bytes
    for layer, block, component, token, head, dim in itertools.product(*map(range, shape)):
        where = {"layer": layer, "block": block, "component": component, "token": token, "head": head}
        number, offset = layout.byte_offset(**where, dim=dim)
        found = np.frombuffer(memory[number], np.int8, 1, offset)
        assert found == payload[layer, block, component, token, head, dim]
        number, offset = layout.scale_offset(**where)
        number += 0 if layout.is_packed else layout.num_arrays
        assert np.frombuffer(memory[number], "<f4", 1, offset) == scales[layer, block, component, token, head]


def test_formats():
    fp8 = SMALL.with_format(ElementFormat("float8_e4m3fn", quantized=True))
    assert fp8.element_format == ElementFormat("float8_e4m3fn", quantized=True)
    assert (fp8.itemsize, fp8.is_packed, fp8.with_kind("universal").is_packed) == (1, False, True)
    assert fp8.with_format(SMALL.element_format) == SMALL
    plain = dataclasses.replace(SMALL, dtype="int8")
    assert (plain.scale_shape, plain.block_bytes) == (None, 3 * 2 * 4 * 2 * 6)
    with pytest.raises(LayoutError, match="int8 is not quantised: there are no scales"):
        plain.scale_offset(layer=0, block=0)


def test_a_block_is_one_run_where_it_should_be():
    contiguous = dataclasses.replace(SMALL, kind="fully_contiguous")
    assert contiguous.byte_offset(layer=0, block=2) == (0, 2 * contiguous.block_bytes)
    universal = dataclasses.replace(SMALL, kind="universal")
    assert universal.byte_offset(layer=0, block=2) == (0, 2 * universal.block_bytes)
    assert universal.byte_offset(layer=0, block=2, head=1) == (
        0,
        2 * universal.block_bytes + universal.block_bytes // 2,
    )


def test_the_description_is_normalised_and_hashable():
    layout = KVLayout(1, 2, 3, 4, 5, dtype=jnp.bfloat16, kind="universal")
    assert (layout.dtype, layout.kind, layout.itemsize, layout.num_slots) == ("bfloat16", LayoutKind.UNIVERSAL, 2, 6)
    assert layout == KVLayout(1, 2, 3, 4, 5, kind=LayoutKind.UNIVERSAL)
    assert len({layout, KVLayout(1, 2, 3, 4, 5, kind=LayoutKind.UNIVERSAL)}) == 1
    assert SMALL.kind is LayoutKind.LAYER_SEPARATE


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"num_layers": 0}, ("num_layers", "0")),
        ({"num_blocks": -1}, ("num_blocks", "-1")),
        ({"block_size": 1.0}, ("block_size", "1.0")),
        ({"num_kv_heads": True}, ("num_kv_heads", "True")),
        ({"head_dim": None}, ("head_dim", "None")),
        ({"components": 0}, ("components", "0")),
        ({"num_blocks": 2**20, "block_size": 2**11}, (str(2**31), "slots")),
        ({"dtype": "bfloat17"}, ("bfloat17",)),
        ({"quantized": True}, ("float32", "int8 or float8_e4m3fn")),
        ({"quantized": True, "dtype": "float8_e4m3"}, ("float8_e4m3'", "int8 or float8_e4m3fn")),
        ({"kind": "paged"}, ("paged", "layer_separate, layer_stacked, fully_contiguous, universal")),
    ],
)
def test_what_is_no_layout_raises(change, parts):
    with pytest.raises(LayoutError) as caught:
        dataclasses.replace(SMALL, **change)
    for part in parts:
        assert part in str(caught.value)
    assert KVLayout(1, 2**20, 2**11 - 1, 1, 1).num_slots < 2**31


@pytest.mark.parametrize("axis", AXES)
def test_an_index_outside_its_axis_raises(axis):
    size = {"L": 3, "N": 5, "C": 2, "T": 4, "H": 2, "D": 6}[axis]
    for value in (-1, size):
        with pytest.raises(LayoutError, match=rf"index {value} of axis {axis} lies outside \[0, {size}\)"):
            SMALL.byte_offset(**({"layer": 0, "block": 0} | {AXES[axis]: value}))
