"""The moving kernels, every implementation by one suite; Mosaic's run in Pallas's interpreter."""

import contextlib
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import moves
import pytest
from moves import KINDS, RUNS, Case

from kvbm_jax import cache as kv_cache
from kvbm_jax import kernels
from kvbm_jax.kernels import target
from kvbm_jax.kernels.configs import CopyConfig, using
from kvbm_jax.layout import ElementFormat, KVLayout, LayoutKind

pytestmark = pytest.mark.core

IMPLEMENTATIONS = kernels.OPERATIONS["store_kv"].implementations
SMALL = {"num_layers": 2, "num_blocks": 6, "block_size": 8, "num_kv_heads": 2, "head_dim": 64}
DTYPES = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")
QUANTIZED = {"dtype": "int8", "quantized": True}
SEPARATE, STACKED = LayoutKind.LAYER_SEPARATE, LayoutKind.LAYER_STACKED


def running(implementation):
    """Where an implementation runs here."""
    return target.interpreted() if implementation == "mosaic_gpu" else contextlib.nullcontext()


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    with running(request.param):
        yield request.param


def layout(**sizes):
    return KVLayout(**SMALL | sizes)


@pytest.mark.parametrize(("own", "kind"), [(SEPARATE, RUNS[0]), (STACKED, RUNS[1]), (RUNS[1], RUNS[1])])
def test_quantised_blocks_move_with_their_scales(implementation, own, kind):
    case = Case(layout(kind=own, **QUANTIZED), implementation)
    moves.check_gather_and_scatter(case, 4, kind, with_out=own == SEPARATE)
    moves.check_copy(case, disjoint=own != STACKED)
    if own == STACKED:
        moves.check_permute(case, SEPARATE)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
@pytest.mark.parametrize(("own", "kind"), list(itertools.product(KINDS, KINDS)))
def test_quantised_blocks_between_all_kinds(own, kind, dtype):
    case = Case(layout(kind=own, dtype=dtype, quantized=True, num_kv_heads=3, head_dim=5), "xla")
    moves.check_permute(case, kind)
    moves.check_copy(case, disjoint=True)
    if kind in RUNS:
        for with_out in (False, True):
            moves.check_gather_and_scatter(case, 4, kind, with_out=with_out)


PLAIN, INT8 = ElementFormat("bfloat16"), ElementFormat("int8", quantized=True)
FORMATS = [PLAIN, INT8, ElementFormat("float8_e4m3fn", quantized=True), ElementFormat("float32")]
NARROW = {"num_layers": 2, "num_blocks": 4, "block_size": 2, "num_kv_heads": 3, "head_dim": 6}


@pytest.mark.parametrize(("own", "there", "kind"), [(PLAIN, INT8, RUNS[0]), (INT8, PLAIN, RUNS[1])])
def test_blocks_are_converted_on_the_way(own, there, kind):
    case = Case(KVLayout(**NARROW).with_format(own), "xla")
    moves.check_conversions(case, there, kind)
    moves.check_converting_permute(case, there, kind)


@pytest.mark.parametrize(("own", "dtype"), [(SEPARATE, "int8"), (STACKED, "float8_e4m3fn")])
def test_mosaic_converts_in_registers(own, dtype):
    made = KVLayout(2, 4, 16, 2, 64, "bfloat16", own)
    with target.interpreted():
        moves.check_conversions(Case(made, "mosaic_gpu"), ElementFormat(dtype, quantized=True), RUNS[0])


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(16, 2, 128, 2), (64, 1, 64, 1), (8, 8, 128, 2)])
@pytest.mark.parametrize(("own", "there"), [("bfloat16", "float8_e4m3fn"), ("float16", "int8")])
def test_mosaic_converts_many_shapes(own, there, sizes):
    size, heads, dim, components = sizes
    made = KVLayout(1, 4, size, heads, dim, own, components=components)
    with target.interpreted():
        moves.check_conversions(Case(made, "mosaic_gpu"), ElementFormat(there, quantized=True), RUNS[0])


@pytest.mark.long
@pytest.mark.parametrize("own_kind", KINDS)
@pytest.mark.parametrize(("own", "there"), list(itertools.permutations(FORMATS, 2)))
def test_every_format_to_every_other(own_kind, own, there):
    for kind in RUNS:
        case = Case(KVLayout(**NARROW, kind=own_kind).with_format(own), "xla")
        moves.check_conversions(case, there, kind)
        moves.check_converting_permute(case, there, kind)


@pytest.mark.parametrize(
    ("own", "there", "sizes", "reason"),
    [
        (PLAIN, INT8, {}, "it does not convert to or from universal"),
        (PLAIN, INT8, {"kind": RUNS[0]}, "it does not convert blocks of a fully_contiguous cache"),
        (PLAIN, INT8, {"head_dim": 96, "num_kv_heads": 1}, "it converts rows of 64 or 128 elements; head_dim is 96"),
        (PLAIN, INT8, {"block_size": 8, "num_kv_heads": 1}, "a block of a layer has 16 rows; it converts 64 at a time"),
        (ElementFormat("float32"), INT8, {"num_kv_heads": 1}, "it converts numbers of 16 bits; the cache is float32"),
        (INT8, PLAIN, {}, "it copies, and does not convert int8 and bfloat16"),
        (INT8, INT8, {"kind": RUNS[0]}, "quantised blocks of a fully_contiguous cache to or from universal"),
        (INT8, INT8, {"num_layers": 1, "block_size": 1, "num_kv_heads": 1}, "has 136 bytes, not a multiple of 16"),
        (INT8, INT8, {"block_size": 1}, "a head of a quantised block has 272 bytes, not a multiple of head_dim 64"),
    ],
)
def test_what_mosaic_cannot_move_is_refused(own, there, sizes, reason):
    made = layout(**sizes).with_format(own)
    arrays = jax.eval_shape(lambda: jax.tree.leaves(kv_cache.permute_blocks(kv_cache.init(
        made.with_kind(SEPARATE)), made.kind)))  # fmt: skip
    staging = made.with_format(there).staging(3, RUNS[1])
    with target.interpreted():
        choice = kernels.OPERATIONS["gather_blocks"].choose(None, tuple(arrays), made, None, staging, None)
    assert choice.implementation == "xla"
    assert reason in choice.refusals["mosaic_gpu"]


def test_mosaic_leaves_it_to_xla_to_take_quantised_blocks_apart():
    made = layout(**QUANTIZED)
    permute = kernels.OPERATIONS["permute_blocks"]
    with target.interpreted():
        assert permute.choose(None, (), made, made.with_kind(STACKED)).implementation == "mosaic_gpu"
        for kind in RUNS:
            refused = permute.choose(None, (), made, made.with_kind(kind)).refusals["mosaic_gpu"]
            assert refused == "it does not take quantised blocks apart or put them together"


def test_the_interpreter_is_one_of_them():
    assert IMPLEMENTATIONS == ("mosaic_gpu", "xla")


@pytest.mark.parametrize("tokens", [1, 7, 12])
def test_store_and_load(implementation, tokens):
    moves.check_store_and_load(Case(layout(), implementation), tokens)


@pytest.mark.parametrize(("kind", "with_out"), [(RUNS[0], False), (RUNS[1], True)])
@pytest.mark.parametrize("own", KINDS)
def test_gather_and_scatter(implementation, own, kind, with_out):
    moves.check_gather_and_scatter(Case(layout(kind=own), implementation), 4, kind, with_out=with_out)


@pytest.mark.parametrize("disjoint", [False, True])
@pytest.mark.parametrize("own", [SEPARATE, LayoutKind.UNIVERSAL])
def test_copy(implementation, own, disjoint):
    moves.check_copy(Case(layout(kind=own), implementation), disjoint=disjoint)


@pytest.mark.parametrize(("own", "kind"), [(SEPARATE, RUNS[1]), (RUNS[1], STACKED), (RUNS[0], SEPARATE)])
def test_permute(implementation, own, kind):
    moves.check_permute(Case(layout(kind=own), implementation), kind)


@pytest.mark.long
@pytest.mark.parametrize(("own", "kind"), list(itertools.product(KINDS, KINDS)))
def test_permute_between_all_kinds(implementation, own, kind):
    moves.check_permute(Case(layout(kind=own), implementation), kind)


SHAPES = [  # block size, heads, head dim, components
    (8, 2, 64, 2),
    (16, 1, 80, 2),
    (32, 3, 96, 2),
    (64, 2, 128, 2),
    (128, 1, 192, 2),
    (256, 1, 256, 2),
    (16, 1, 576, 1),
]


def every(sizes, dtype):
    """Marked `long` where each shape has one dtype of all, `soak` else."""
    both = SHAPES.index(sizes) % len(DTYPES) == DTYPES.index(dtype)
    return pytest.param(sizes, dtype, marks=[pytest.mark.long] if both else [pytest.mark.long, pytest.mark.soak])


@pytest.mark.parametrize(("sizes", "dtype"), [every(*case) for case in itertools.product(SHAPES, DTYPES)])
def test_every_shape_and_dtype(implementation, sizes, dtype):
    names = ("block_size", "num_kv_heads", "head_dim", "components")
    made = layout(num_blocks=4, num_layers=1, dtype=dtype, **dict(zip(names, sizes, strict=True)))
    case = Case(made, implementation)
    moves.check_store_and_load(case, 5)
    for kind in RUNS:
        moves.check_gather_and_scatter(case, 3, kind, with_out=True)
    moves.check_copy(case, disjoint=True)


@pytest.mark.long
@pytest.mark.parametrize("sizes", SHAPES)
def test_every_shape_quantised(implementation, sizes):
    names = ("block_size", "num_kv_heads", "head_dim", "components")
    made = layout(num_blocks=4, num_layers=1, **QUANTIZED, **dict(zip(names, sizes, strict=True)))
    case = Case(made, implementation)
    for kind in RUNS:
        staging = made.staging(3, kind)
        served = kernels.OPERATIONS["gather_blocks"].choose(None, (), made, None, staging, None).implementation
        if implementation in (served, "xla"):
            moves.check_gather_and_scatter(case, 3, kind, with_out=True)
    moves.check_copy(case, disjoint=True)


def drawn(draw, **fields):
    """A small layout, of these fields and others drawn."""
    return layout(
        num_layers=draw(st.integers(1, 2)),
        block_size=draw(st.sampled_from([8, 16, 24])),
        kind=draw(st.sampled_from(KINDS)),
        components=draw(st.integers(1, 2)),
        **fields,
    )


def check_shapes(data):
    draw = data.draw
    sizes = drawn(
        draw,
        num_blocks=draw(st.integers(2, 5)),
        num_kv_heads=draw(st.integers(1, 3)),
        head_dim=draw(st.sampled_from([16, 48, 64, 80])),
        dtype=draw(st.sampled_from(DTYPES)),
    )
    config = CopyConfig(
        tile_bytes=draw(st.sampled_from([512, 1024, 4096])),
        stages=draw(st.integers(2, 5)),
        blocks_per_core=draw(st.integers(1, 3)),
    )
    seed = draw(st.integers(0, 99))
    for implementation in IMPLEMENTATIONS:
        case = Case(sizes, implementation, seed)
        with running(implementation), using(config):
            moves.check_store_and_load(case, draw(st.integers(1, 24)))
            moves.check_gather_and_scatter(
                case, draw(st.integers(1, sizes.num_blocks)), draw(st.sampled_from(RUNS)), with_out=draw(st.booleans())
            )
            moves.check_copy(case, disjoint=draw(st.booleans()))
            moves.check_permute(case, draw(st.sampled_from(KINDS)))


def check_quantised_shapes(data):
    draw = data.draw
    own, there = draw(st.sampled_from([INT8, FORMATS[2]])), draw(st.sampled_from(FORMATS))
    sizes = drawn(
        draw,
        num_blocks=draw(st.integers(3, 5)),
        num_kv_heads=draw(st.integers(2, 3)),
        head_dim=draw(st.sampled_from([16, 48, 64, 128])),
        dtype=own.dtype,
        quantized=True,
    )
    kind, with_out = draw(st.sampled_from(RUNS)), draw(st.booleans())
    count, seed = draw(st.integers(1, sizes.num_blocks)), draw(st.integers(0, 99))
    served = kernels.OPERATIONS["gather_blocks"].choose(None, (), sizes, None, sizes.staging(count, kind), None)
    for implementation in {"xla", served.implementation}:
        case = Case(sizes, implementation, seed)
        with running(implementation):
            moves.check_gather_and_scatter(case, count, kind, with_out=with_out)
            moves.check_copy(case, disjoint=True)
    moves.check_conversions(Case(sizes, "xla", seed), there, kind)


@pytest.mark.long
@hypothesis.settings(max_examples=4)
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("check", [check_shapes, check_quantised_shapes])
def test_shapes_drawn_at_random(check, data):
    check(data)


@pytest.mark.long
@pytest.mark.soak
@pytest.mark.timeout(1800)
@hypothesis.settings(max_examples=200)
@hypothesis.given(data=st.data())
@pytest.mark.parametrize("check", [check_shapes, check_quantised_shapes])
def test_many_shapes_drawn_at_random(check, data):
    check(data)
