"""Every operation is lowered, without a GPU, for those that its kernel can serve; for others it lowers in XLA."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from benchmarks.cases import FULL, all_cases

pytestmark = pytest.mark.core

CASES = all_cases(FULL)
FIRST = {case.operation: case for case in reversed(CASES)}
HOPPER, BLACKWELL, AMPERE = ("NVIDIA H100 80GB HBM3", 132), ("NVIDIA B200", 148), ("NVIDIA A100-SXM4-80GB", 108)


def lowered(case, gpu, implementation=None):
    """The program for a GPU, as text."""
    mesh = AbstractMesh((), (), abstract_device=AbstractDevice(*gpu, "gpu"))
    with jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(case.function(implementation), donate_argnums=case.donated).trace(*case.shapes)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def shape_of(case):
    return case.operation, case.about.split(",")[0]


QUICK = {shape_of(case): case.name for case in reversed(CASES)}.values()


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.long) for case in CASES],
)
def test_kernels_lower_for_hopper(case):
    assert "mosaic_gpu" in lowered(case, HOPPER)


@pytest.mark.parametrize("operation", FIRST)
def test_kernels_lower_for_blackwell(operation):
    assert "mosaic_gpu" in lowered(FIRST[operation], BLACKWELL)


@pytest.mark.parametrize("operation", FIRST)
def test_on_ampere_the_kernel_is_refused_and_xla_lowers(operation):
    with pytest.raises(NotImplementedError, match=r"needs the bulk copies of compute capability 9\.0"):
        lowered(FIRST[operation], AMPERE, "mosaic_gpu")
    text = lowered(FIRST[operation], AMPERE)
    assert "mosaic_gpu" not in text
    assert "stablehlo." in text
