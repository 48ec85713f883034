"""Byte offsets of every layout against the strides of real arrays, and against a golden file."""

import dataclasses
import itertools
import json
from pathlib import Path

import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kvbm_jax.errors import LayoutError
from kvbm_jax.layout import KVLayout, LayoutKind

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
