"""The kernels' cases: one list, which is lowered, compiled for an H100, checked and timed.

A case is a call of an operation of `kvbm_jax.kernels` on a cache of some shape. Contents are small integers, which
every dtype holds exactly. One id of each call is past the end.

Axes: L layers, N blocks, C components, T tokens of a block, H kv heads, D head dim, S tokens of a call, M blocks of a
call, B rows of a batch, W width of a block table.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from kvbm_jax import cache as kv
from kvbm_jax import grants, kernels, sequences
from kvbm_jax.kernels.dispatch import Implementation
from kvbm_jax.layout import ElementFormat, KVLayout, LayoutKind

type Arguments = tuple[Any, ...]

SEPARATE, STACKED, CONTIGUOUS, UNIVERSAL = LayoutKind
RUNS = (CONTIGUOUS, UNIVERSAL)
INT8 = ElementFormat("int8", quantized=True)
CONVERTED_DIM = 128  # D of caches whose blocks are converted on their way too


@dataclasses.dataclass(frozen=True)
class Case:
    """A call of an operation.

    Attributes:
      operation: its name.
      about: what sets the case apart from the operation's others.
      unit_bytes: what lies in one run on both sides, by which a kernel's config is chosen; 0 if it has none.
      must_move: bytes that have to be read, and those that have to be written.
      large_bytes: what no temporary may reach: the bytes of one layer of the cache.
      call: the operation, of `implementation=` and of the arguments.
      arguments: some, other ones for another seed, u32[]; may be traced.
      donated: numbers of the arguments that are updated in place.
      heads: H, the size of the axes that a mesh may share out among its devices; 0 if there are none.
      exact: whether all implementations give the same bits; else quotients may differ in their last one.
    """

    operation: str
    about: str
    unit_bytes: int
    must_move: int
    large_bytes: int
    call: Callable[..., Any]
    arguments: Callable[[Any], Arguments]
    donated: tuple[int, ...] = ()
    heads: int = 0
    exact: bool = True

    @property
    def name(self) -> str:
        """Of the case, unlike any other's."""
        return f"{self.operation}, {self.about}"

    @property
    def shapes(self) -> Arguments:
        """Of the arguments."""
        shapes: Arguments = jax.eval_shape(self.arguments, jnp.uint32(0))
        return shapes

    def function(self, implementation: Implementation | None) -> Callable[..., Any]:
        """The call by one implementation, a function of the arguments; not jitted."""
        return functools.partial(self.call, implementation)


@dataclasses.dataclass(frozen=True)
class Scale:
    """How large cases are."""

    num_layers: int  # L
    num_blocks: int  # N
    tokens: int  # S
    blocks: int  # M
    rows: int  # B
    shapes: dict[str, dict[str, Any]]  # fields of a layout by name; the first is tried with all kinds of cache


SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"block_size": 64, "num_kv_heads": 8, "head_dim": 128},
    "mla": {"block_size": 64, "num_kv_heads": 1, "head_dim": 576, "components": 1},
    "d80": {"block_size": 16, "num_kv_heads": 8, "head_dim": 80},
    "fp8": {"block_size": 64, "num_kv_heads": 8, "head_dim": 128, "dtype": "float8_e4m3fn"},
    "q8": {"block_size": 64, "num_kv_heads": 8, "head_dim": 128, "dtype": "int8", "quantized": True},
}
FULL = Scale(2, 4096, tokens=256, blocks=256, rows=256, shapes=SHAPES)
TINY = Scale(2, 8, tokens=8, blocks=4, rows=8, shapes={"tiny": {"block_size": 8, "num_kv_heads": 2, "head_dim": 32}})


def all_cases(scale: Scale) -> list[Case]:
    """Every operation on every shape; all kinds of cache for the first shape."""
    moves = [
        case
        for index, (shape, fields) in enumerate(scale.shapes.items())
        for case in _of_shape(scale, shape, KVLayout(scale.num_layers, scale.num_blocks, **fields), every=index == 0)
    ]
    return [*moves, _advance(scale.rows)]


def _of_shape(scale: Scale, shape: str, layout: KVLayout, *, every: bool) -> Iterator[Case]:
    yield from _rows(shape, layout, scale.tokens)
    for own in (SEPARATE, STACKED) if every else ():
        yield _store_in_all_layers(shape, layout.with_kind(own), scale.tokens)
    kinds = tuple(LayoutKind) if every else (SEPARATE,)
    for own in kinds:
        cache = layout.with_kind(own)
        for run in RUNS:
            yield from _between(shape, cache, cache.staging(scale.blocks, run))
        for disjoint in (True, False):
            yield _copy(shape, cache, scale.blocks, disjoint=disjoint)
    pairs = itertools.permutations(kinds, 2) if every else ((SEPARATE, UNIVERSAL), (UNIVERSAL, SEPARATE))
    if layout.quantized:  # blocks in one run are put together and taken apart by XLA
        pairs = itertools.permutations((SEPARATE, STACKED), 2)
    for own, other in pairs:
        yield _permute(shape, layout.with_kind(own), other)
    for own in (SEPARATE, STACKED) if every and layout.head_dim == CONVERTED_DIM else ():
        cache = layout.with_kind(own)
        yield from _between(f"{shape}, int8", cache, cache.with_format(INT8).staging(scale.blocks))


def _rows(shape: str, layout: KVLayout, tokens: int) -> Iterator[Case]:
    row = layout.num_kv_heads * layout.head_dim
    sizes = {
        "unit_bytes": row * layout.itemsize,
        "must_move": 2 * tokens * layout.components * row * layout.itemsize,
        "large_bytes": layer_bytes(layout),
        "heads": layout.num_kv_heads,
    }

    def given(seed: Any) -> Arguments:
        shape = (tokens, layout.num_kv_heads, layout.head_dim)
        parts = tuple(values(seed + 1 + component, shape, layout.dtype) for component in range(layout.components))
        return values(seed, layout.array_shape, layout.dtype), parts, distinct(seed, layout.num_slots, tokens)

    def store(implementation: Implementation | None, array: Any, parts: Any, slots: Any) -> Any:
        return kernels.store_kv(array, parts, slots, implementation=implementation)

    def load(implementation: Implementation | None, array: Any, slots: Any) -> Any:
        return kernels.load_kv(array, slots, implementation=implementation)

    yield Case("store_kv", shape, call=store, arguments=given, donated=(0,), **sizes)
    yield Case("load_kv", shape, call=load, arguments=lambda seed: given(seed)[::2], **sizes)


def _store_in_all_layers(shape: str, layout: KVLayout, tokens: int) -> Case:
    """As a model does it: one program, a store for each layer of a cache."""
    token = layout.num_kv_heads * layout.head_dim * layout.itemsize

    def given(seed: Any) -> Arguments:
        rows = (values(seed + i, (tokens, layout.num_kv_heads, layout.head_dim), layout.dtype) for i in (1, 2))
        return kv.KVCache(cache_of(seed + 3, layout), layout), *rows, distinct(seed, layout.num_slots, tokens)

    def store(implementation: Implementation | None, cache: kv.KVCache, keys: Any, rows: Any, slots: Any) -> Any:
        for layer in range(layout.num_layers):
            cache = kv.store_kv(cache, layer, keys, rows, slots, implementation=implementation)
        return cache

    moved = 2 * tokens * layout.num_layers * layout.components * token
    about = f"{shape}, all of {layout.kind}"
    large, heads = layer_bytes(layout), layout.num_kv_heads
    return Case("store_kv", about, token, moved, large, call=store, arguments=given, donated=(0,), heads=heads)


def _between(shape: str, layout: KVLayout, staging: KVLayout) -> Iterator[Case]:
    """Gather and scatter of blocks, from and to an array of runs, which may be of another element format."""
    count, run, converts = staging.num_blocks, staging.kind, staging.element_format != layout.element_format
    sizes = {
        "unit_bytes": 0 if converts else unit_bytes(layout, staging),
        "must_move": count * (layout.block_bytes + staging.block_bytes),
        "large_bytes": layer_bytes(layout),
        "heads": 0 if converts else layout.num_kv_heads,
        "exact": not converts,
    }
    how = {"kind": run, "element_format": staging.element_format}

    def given(seed: Any) -> Arguments:
        if staging.is_packed:  # scales are no bytes of any value
            few = dataclasses.replace(layout, num_blocks=count)
            ids = jnp.arange(count, dtype=jnp.int32)
            blocks = kernels.gather_blocks(cache_of(seed, few), few, ids, **how, implementation="xla")
        else:
            blocks = values(seed, staging.array_shape, staging.array_dtype)
        return cache_of(seed + 1, layout), distinct(seed, layout.num_blocks, count), blocks

    def gather(implementation: Implementation | None, arrays: Any, ids: Any, out: Any) -> Any:
        return kernels.gather_blocks(arrays, layout, ids, **how, out=out, implementation=implementation)

    def scatter(implementation: Implementation | None, arrays: Any, ids: Any, blocks: Any) -> Any:
        return kernels.scatter_blocks(arrays, layout, ids, blocks, **how, implementation=implementation)

    there, back = f"{shape}, {layout.kind} to {run}", f"{shape}, {run} to {layout.kind}"
    yield Case("gather_blocks", there, call=gather, arguments=given, donated=(2,), **sizes)
    yield Case("scatter_blocks", back, call=scatter, arguments=given, donated=(0,), **sizes)


def _copy(shape: str, layout: KVLayout, count: int, *, disjoint: bool) -> Case:
    def given(seed: Any) -> Arguments:
        ids = distinct(seed, layout.num_blocks, 2 * count)
        return cache_of(seed, layout), ids[:count], ids[count:] if disjoint else jnp.roll(ids[:count], 1)

    def copy(implementation: Implementation | None, arrays: Any, sources: Any, targets: Any) -> Any:
        return kernels.copy_blocks(arrays, layout, sources, targets, disjoint=disjoint, implementation=implementation)

    return Case(
        "copy_blocks",
        f"{shape}, {layout.kind}, {'disjoint' if disjoint else 'any'}",
        unit_bytes(layout, layout),
        2 * count * layout.block_bytes,
        layer_bytes(layout),
        call=copy,
        arguments=given,
        donated=(0,),
        heads=layout.num_kv_heads,
    )


def _permute(shape: str, layout: KVLayout, kind: LayoutKind) -> Case:
    def permute(implementation: Implementation | None, arrays: Any) -> Any:
        return kernels.permute_blocks(arrays, layout, kind, implementation=implementation)

    return Case(
        "permute_blocks",
        f"{shape}, {layout.kind} to {kind}",
        unit_bytes(layout, layout.with_kind(kind)),
        2 * layout.total_bytes,
        layer_bytes(layout),
        call=permute,
        arguments=lambda seed: (cache_of(seed, layout),),
        heads=layout.num_kv_heads,
    )


def _advance(batch: int) -> Case:
    """A decode step of rows that hold some blocks; every other row needs one more."""
    width, size, pool_blocks = 128, 16, 128 * batch + batch

    def given(seed: Any) -> Arguments:
        held = 1 + (_mixed(seed, (batch,)) % (width - 1)).astype(jnp.int32)
        lengths = held * size - jnp.arange(batch, dtype=jnp.int32) % 2
        blocks = jnp.arange(pool_blocks, dtype=jnp.int32)
        tables = jnp.where(
            jnp.arange(width)[None] < held[:, None], blocks[: batch * width].reshape(batch, width), pool_blocks
        )
        empty = sequences.init(batch, width, block_size=size, pool_blocks=pool_blocks)
        running = dataclasses.replace(empty, block_tables=tables[None], lengths=lengths, num_blocks=held)
        grant = grants.Grant(blocks[-batch:], jnp.int32(0), jnp.int32(batch), jnp.int32(0))
        return running, grant, lengths, jnp.ones(batch, jnp.int32), lengths

    def advance(implementation: Implementation | None, *arguments: Any) -> Any:
        return kernels.advance(*arguments, implementation=implementation)

    ints = 8 * batch  # read: held, three of each row, its count of new tokens; written: length, held, status
    tables = 4 * batch * width
    return Case("advance", f"{batch} rows", 0, 4 * ints, tables, call=advance, arguments=given, donated=(0, 1))


def values(seed: Any, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Integers from -8 to 7 in no order, as numbers of a dtype; from 0 to 15 where they are bytes."""
    return ((_mixed(seed, shape) & 15).astype(jnp.int8) - (0 if dtype == "uint8" else 8)).astype(dtype)


def cache_of(seed: Any, layout: KVLayout) -> tuple[jax.Array, ...]:
    """The arrays of a cache, those of its scales last."""
    seeds = [seed + 100 * number for number in range(layout.num_arrays)]
    arrays = tuple(values(each, layout.array_shape, layout.array_dtype) for each in seeds)
    if layout.scale_shape is None:
        return arrays
    return arrays + tuple(values(each, layout.scale_shape, "float32") for each in seeds)


def distinct(seed: Any, limit: int, count: int) -> jax.Array:
    """Numbers below a limit, i32[count], all different, none near the next; the middle one is the limit itself."""
    largest = min(int(limit * 0.618), (2**32 - 1) // (count + 1))
    step = next(step for step in range(largest, 0, -1) if math.gcd(step, limit) == 1)
    first = _mixed(seed, ()) % step
    numbers = (first + step * jnp.arange(count, dtype=jnp.uint32)) % limit
    return numbers.astype(jnp.int32).at[count // 2].set(limit)


def _mixed(seed: Any, shape: tuple[int, ...]) -> jax.Array:
    """Numbers in no order, u32[shape]; jax.random would be slow to compile on a CPU for so many cases."""
    bits = jax.lax.iota(jnp.uint32, math.prod(shape)).reshape(shape) + jnp.uint32(seed) * jnp.uint32(0x9E3779B9)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    return bits ^ (bits >> 16)


def layer_bytes(layout: KVLayout) -> int:
    """Bytes of one layer of a cache."""
    return layout.total_bytes // layout.num_layers


def unit_bytes(one: KVLayout, other: KVLayout) -> int:
    """Bytes of a layer's block, or of a head of one of its components if only one side has heads outside."""
    per_head = one.num_kv_heads > 1 and UNIVERSAL in (one.kind, other.kind)
    heads = (1,) if per_head else (one.components, one.num_kv_heads)
    return math.prod((one.block_size, one.head_dim, *heads)) * one.itemsize
