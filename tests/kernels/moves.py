"""What every implementation of the moving kernels must do, against plain numpy: one check for each operation.

A cache is compared in logical order, [L, N, C, T, H, D], whatever its kind; a quantised one as bytes, a row's payload
and its scale, u8[L, N, C, T, H, D + 4]. Contents are random numbers that the dtype holds exactly, so that equality is
exact.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import quantized
from quantized import LOGICAL, sizes_of

from kvbm_jax import kernels
from kvbm_jax.layout import ElementFormat, KVLayout, LayoutKind

KINDS = tuple(LayoutKind)
RUNS = (LayoutKind.FULLY_CONTIGUOUS, LayoutKind.UNIVERSAL)


@dataclass(frozen=True)
class Case:
    """A cache, an implementation, and a seed."""

    layout: KVLayout
    implementation: str
    seed: int = 0

    @property
    def rng(self):
        return np.random.default_rng(self.seed)

    def values(self, *shape):
        """Numbers that every dtype of a cache holds, as the cache's dtype."""
        return self.rng.integers(-8, 8, shape).astype(jnp.dtype(self.layout.dtype))

    def logical(self):
        shape = sizes_of(self.layout)
        values = self.values(*shape)
        if not self.layout.quantized:
            return values
        return quantized.rows_of(values, self.rng.normal(size=shape[:-1]).astype(np.float32))

    def ids(self, count, *, distinct=True):
        """Block ids, one of them past the end."""
        blocks = self.layout.num_blocks
        ids = self.rng.permutation(blocks)[:count] if distinct else self.rng.integers(0, blocks, count)
        ids = ids.astype(np.int32)
        ids[count // 2] = blocks
        return ids


def arrange(logical, layout):
    """Logical contents as the arrays of a layout."""
    if layout.quantized:
        return tuple(map(jnp.array, quantized.arrays_of(logical, layout)))
    if layout.kind is LayoutKind.LAYER_SEPARATE:
        return tuple(jnp.array(layer) for layer in logical)
    return (jnp.array(logical.transpose([LOGICAL.index(axis) for axis in layout.axes])),)


def logical_of(arrays, layout):
    if layout.quantized:
        return quantized.rows_in(arrays, layout)
    if layout.kind is LayoutKind.LAYER_SEPARATE:
        return np.stack([np.asarray(array) for array in arrays])
    return np.asarray(arrays[0]).transpose([layout.axes.index(axis) for axis in LOGICAL])


def jitted(function, case, **options):
    # Not cached: whether kernels are interpreted is decided when a program is traced.
    return jax.jit(functools.partial(function, implementation=case.implementation, **options))


def check_store_and_load(case, tokens):
    """Rows go to their slots and come back; what is not named stays as it is."""
    layout = case.layout
    size, blocks = layout.block_size, layout.num_blocks
    logical = case.logical()[:1]
    array = jnp.array(logical[0])
    rows = case.values(layout.components, tokens, layout.num_kv_heads, layout.head_dim)
    slots = case.rng.permutation(blocks * size)[:tokens].astype(np.int32)
    slots[tokens // 2] = blocks * size  # padding
    expected = logical[0].copy()
    real = slots < blocks * size
    for component in range(layout.components):
        expected[slots[real] // size, component, slots[real] % size] = rows[component][real]
    stored = jitted(kernels.store_kv, case)(array, tuple(jnp.array(part) for part in rows), slots)
    np.testing.assert_array_equal(np.asarray(stored), expected)
    loaded = jitted(kernels.load_kv, case)(stored, slots)
    assert len(loaded) == layout.components
    for got, part in zip(loaded, rows, strict=True):
        assert got.dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(got)[real], part[real])
        np.testing.assert_array_equal(np.asarray(got, np.float32)[~real], 0)


def check_gather_and_scatter(case, count, kind, *, with_out):
    """Blocks come as runs of a kind and go to other places of another cache."""
    layout = case.layout
    logical, ids = case.logical(), case.ids(count, distinct=False)
    staging = layout.staging(count, kind)
    out = jnp.full(staging.array_shape, 3, staging.array_dtype) if with_out else None
    expected = np.zeros((layout.num_layers, count, *logical.shape[2:]), logical.dtype)
    real = ids < layout.num_blocks
    expected[:, real] = logical[:, ids[real]]
    gathered = jitted(kernels.gather_blocks, case, layout=layout, kind=kind)(
        arrange(logical, layout), block_ids=ids, out=out
    )
    assert gathered.dtype == staging.array_dtype
    np.testing.assert_array_equal(logical_of((gathered,), staging), expected)
    targets = case.ids(count)
    changed, kept = logical.copy(), targets < layout.num_blocks
    changed[:, targets[kept]] = expected[:, kept]
    scattered = jitted(kernels.scatter_blocks, case, layout=layout, kind=kind)(
        arrange(logical, layout), block_ids=targets, blocks=gathered
    )
    np.testing.assert_array_equal(logical_of(scattered, layout), changed)


def check_copy(case, *, disjoint):
    """Blocks are copied, all reads before all writes."""
    layout = case.layout
    logical, order = case.logical(), case.rng.permutation(layout.num_blocks).astype(np.int32)
    half = layout.num_blocks // 2
    # Not disjoint: a rotation of all blocks, every one of which is read and written.
    sources, targets = (order[:half], order[half : 2 * half].copy()) if disjoint else (order, np.roll(order, 1))
    targets[0] = layout.num_blocks
    expected = logical.copy()
    expected[:, targets[1:]] = logical[:, sources[1:]]
    copied = jitted(kernels.copy_blocks, case, layout=layout, disjoint=disjoint)(
        arrange(logical, layout), sources=sources, targets=targets
    )
    np.testing.assert_array_equal(logical_of(copied, layout), expected)


def check_permute(case, kind):
    """The same contents in another arrangement."""
    logical = case.logical()
    target = case.layout.with_kind(kind)
    permuted = jitted(kernels.permute_blocks, case, layout=case.layout, kind=kind)(arrange(logical, case.layout))
    assert [array.shape for array in permuted[: target.num_arrays]] == [target.array_shape] * target.num_arrays
    np.testing.assert_array_equal(logical_of(permuted, target), logical)


def check_conversions(case, element_format, kind):
    """Blocks are quantised or dequantised on the way out and on the way in; a row that is not finite is NaN."""
    layout = case.layout
    shape = sizes_of(layout)
    values = case.rng.normal(size=shape).astype(np.float32)
    values[0, :, 0, 0, 0] = 0
    values[0, 1, 0, 1, 0, :2] = np.nan, np.inf
    logical = converted(values, ElementFormat("float32"), layout.element_format)
    there = converted(logical, layout.element_format, element_format)
    back = converted(there, element_format, layout.element_format)
    ids, targets = case.ids(3, distinct=False), case.ids(3)
    staging = layout.with_format(element_format).staging(3, kind)
    out = jnp.full(staging.array_shape, 3, staging.array_dtype)
    options = {"layout": layout, "kind": kind, "element_format": element_format}
    for given in (None, out):
        gathered = jitted(kernels.gather_blocks, case, **options)(arrange(logical, layout), block_ids=ids, out=given)
        taken = np.concatenate([there, np.zeros_like(there[:, :1])], axis=1)[:, ids]
        equal(logical_of((gathered,), staging), taken)
    scattered = jitted(kernels.scatter_blocks, case, **options)(
        arrange(logical, layout), block_ids=targets, blocks=gathered
    )
    kept = targets < layout.num_blocks
    expected = logical.copy()
    returned = np.concatenate([back, np.zeros_like(back[:, :1])], axis=1)
    expected[:, targets[kept]] = returned[:, ids[kept]]
    equal(logical_of(scattered, layout), expected)


def check_converting_permute(case, element_format, kind):
    """A whole cache in another format."""
    layout = case.layout
    values = case.rng.normal(size=sizes_of(layout)).astype(np.float32)
    logical = converted(values, ElementFormat("float32"), layout.element_format)
    permuted = jitted(kernels.permute_blocks, case, layout=layout, kind=kind, element_format=element_format)(
        arrange(logical, layout)
    )
    found = logical_of(permuted, layout.with_format(element_format).with_kind(kind))
    equal(found, converted(logical, layout.element_format, element_format))


def equal(found, expected):
    """Equal with NaN where NaN is, which NumPy tells of its own numbers only."""
    assert found.dtype == expected.dtype
    if not np.issubdtype(found.dtype, np.number):
        found, expected = (np.asarray(values, np.float32) for values in (found, expected))
    np.testing.assert_array_equal(found, expected)


def converted(logical, source, target):
    """Logical contents in another format, by numpy."""
    if source == target:
        return logical
    values = quantized.dequantize(*quantized.split(logical, source.dtype)) if source.quantized else logical
    if target.quantized:
        return quantized.rows_of(*quantized.quantize(values, target.dtype))
    return values.astype(jnp.dtype(target.dtype))
