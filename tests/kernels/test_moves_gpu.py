"""The moving kernels on a real GPU, by the suite of `moves.py`, on larger caches than an interpreter has time for."""

import itertools

import moves
import pytest
import test_advance
from moves import KINDS, RUNS, Case

from kvbm_jax.layout import KVLayout, LayoutKind

pytestmark = pytest.mark.gpu

SHAPES = {
    "gqa": {"block_size": 64, "num_kv_heads": 8, "head_dim": 128},
    "mla": {"block_size": 64, "num_kv_heads": 1, "head_dim": 576, "components": 1},
    "d80": {"block_size": 16, "num_kv_heads": 8, "head_dim": 80},
    "d192": {"block_size": 128, "num_kv_heads": 2, "head_dim": 192, "dtype": "float16"},
    "d256": {"block_size": 256, "num_kv_heads": 2, "head_dim": 256, "dtype": "float32"},
    "int8": {"block_size": 8, "num_kv_heads": 8, "head_dim": 96, "dtype": "int8"},
    "fp8": {"block_size": 32, "num_kv_heads": 4, "head_dim": 64, "dtype": "float8_e4m3fn"},
}


def case_of(shape, kind=LayoutKind.LAYER_SEPARATE):
    return Case(KVLayout(2, 128, kind=kind, **SHAPES[shape]), "mosaic_gpu", seed=len(shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 251, 1024])
def test_store_and_load(shape, tokens):
    moves.check_store_and_load(case_of(shape), tokens)


@pytest.mark.parametrize(
    ("shape", "kind"), [*((shape, KINDS[0]) for shape in SHAPES), *(("gqa", kind) for kind in KINDS[1:])]
)
@pytest.mark.parametrize("run", RUNS)
def test_gather_and_scatter(shape, kind, run):
    moves.check_gather_and_scatter(case_of(shape, kind), 60, run, with_out=True)


@pytest.mark.parametrize(("shape", "kind"), [("gqa", KINDS[0]), ("d80", KINDS[3]), ("mla", KINDS[1])])
@pytest.mark.parametrize("disjoint", [False, True])
def test_copy(shape, kind, disjoint):
    moves.check_copy(case_of(shape, kind), disjoint=disjoint)


@pytest.mark.parametrize(("own", "kind"), list(itertools.permutations(KINDS, 2)))
def test_permute(own, kind):
    moves.check_permute(case_of("gqa", own), kind)


def test_a_long_walk_of_decode_steps():
    test_advance.check_walk("mosaic_gpu", seed=1, batch=256, groups=2, size=100, steps=30, max_blocks=2)
