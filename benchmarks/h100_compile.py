"""Compiles cases for an H100 that is not there; `benchmarks.h100` runs it, where XLA's CUDA compiler is installed.

    python -m benchmarks.h100_compile FIRST STEP

On stdout comes, for every case from FIRST on in steps of STEP, first what Mosaic dumps of its kernels when
`MOSAIC_GPU_DUMP_PTX` and `MOSAIC_GPU_DUMP_PTXAS` are set, then a line with what XLA says of the program.
"""

import contextlib
import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, Mesh, NamedSharding, PartitionSpec

from benchmarks.cases import FULL, SEPARATE, Case, all_cases
from kvbm_jax.kernels import target
from kvbm_jax.kernels.dispatch import Implementation

MARK = "=== compiled "
KERNEL, XLA = "kernel", "XLA"
SHARED_DEVICES = 8
SHARED = f"kernel, heads on {SHARED_DEVICES} devices"
_TARGET = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84929347584
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
_NEW = re.compile(r"= \(?(\w+)\[([\d,]+)\]\S* (?:copy|copy-start|transpose|broadcast|concatenate|pad)\(")
_COLLECTIVE = re.compile(r"\b(all-gather|all-reduce|all-to-all|collective-\w+|reduce-scatter)(?:-start)?\(")
_SHARED_MEMORY = re.compile(r"Ref<smem>\{(\w+)\[([\d,]+)\]\}")
_HASH = re.compile(r'kernel_hash = ("(?:[^"\\]|\\.)*")')
_BARRIER_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel as a program asks for it."""

    thread_blocks: int
    shared_bytes: int  # of each


@dataclasses.dataclass(frozen=True)
class Program:
    """What is said of a compiled case, but for its machine code."""

    name: str
    how: str
    launches: list[Launch]
    kernels: list[str]  # hashes; the machine code of each is dumped where a process meets it first
    donated_bytes: int
    aliased_bytes: int
    temporary_bytes: int
    copies: list[str]  # instructions that make a new array as large as a layer
    collectives: list[str]  # their names


def main(argv: Sequence[str]) -> None:
    """Compiles every STEP-th case."""
    first, step = map(int, argv)
    for case, how in programs()[first::step]:
        program = inspect(case, how)
        print(MARK + json.dumps(dataclasses.asdict(program)), flush=True)


def programs() -> list[tuple[Case, str]]:
    """Every case and how it is compiled; of the first shape also in XLA, and with its heads on many devices."""
    cases = all_cases(FULL)
    first = [case for case in cases if case.about.startswith(next(iter(FULL.shapes)))]
    return [
        *((case, KERNEL) for case in cases),
        *((case, SHARED) for case in first if case.heads and (SEPARATE in case.about or case.about in FULL.shapes)),
        *((case, XLA) for case in first if case.donated),
    ]


def inspect(case: Case, how: str) -> Program:
    """Compiles a case for H100s and reads what came out; bytes are those of one device."""
    devices = SHARED_DEVICES if how == SHARED else 1
    with on_h100s(devices) as mesh:

        def placed(x: Any) -> Any:
            spec = PartitionSpec(*("heads" if devices > 1 and size == case.heads else None for size in x.shape))
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

        shapes = jax.tree.map(placed, case.shapes)
        implementation: Implementation = "xla" if how == XLA else "mosaic_gpu"
        traced = jax.jit(case.function(implementation), donate_argnums=case.donated).trace(*shapes)
        compiled = traced.lower().compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    donated = jax.tree.leaves([shapes[number] for number in case.donated])
    return Program(
        case.name,
        how,
        list(launches(traced.jaxpr)) if how == KERNEL else [],
        list(dict.fromkeys(_HASH.findall(text))),
        donated_bytes=sum(x.size * x.dtype.itemsize for x in donated) // devices,
        aliased_bytes=memory.alias_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        copies=list(large_copies(text, case.large_bytes // devices)),
        collectives=_COLLECTIVE.findall(text),
    )


@contextlib.contextmanager
def on_h100s(count: int) -> Iterator[Mesh]:
    """Programs are traced, lowered and compiled for so many H100s, a mesh of one axis, "heads"."""
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", target_config=_TARGET, topology=f"1x1x{count}"
    )
    device = AbstractDevice(target.H100.kind, target.H100.num_cores, "gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield topologies.make_mesh(described, (count,), ("heads",))


def launches(jaxpr: Any) -> Iterator[Launch]:
    """The kernels that a jaxpr launches."""
    for equation in equations(jaxpr, "mpmd_map"):
        (mesh,), (kernel,) = equation.params["meshes"], equation.params["jaxprs"]
        variables = (v for each in equations(kernel, "run_scoped") for v in each.params["jaxpr"].invars)
        refs = (_SHARED_MEMORY.fullmatch(str(variable.aval)) for variable in variables)
        yield Launch(math.prod(mesh.grid), sum(_bytes(ref[1], ref[2]) for ref in refs if ref))


def equations(jaxpr: Any, primitive: str) -> Iterator[Any]:
    """All equations of a primitive in a jaxpr and in those that it calls, but for what they call themselves."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            yield equation
            continue
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=_is_jaxpr):
            if _is_jaxpr(value):
                yield from equations(getattr(value, "jaxpr", value), primitive)


def large_copies(text: str, limit: int) -> Iterator[str]:
    """Instructions of a compiled program that make a new array of so many bytes and more out of another."""
    for line in text.splitlines():
        if (found := _NEW.search(line)) and _bytes(found[1], found[2]) >= limit:
            yield line.strip()[:160]


def _bytes(dtype: str, sizes: str) -> int:
    """Bytes of an array whose type is told as "bf16", "f8e4m3fn", "float8_e4m3fn", "s32" or "barrier"."""
    bits = re.search(r"(\d+)", dtype)
    each = _BARRIER_BYTES if dtype == "barrier" else int(bits[1]) // 8 if bits else 1
    return each * math.prod(map(int, sizes.split(",")))


def _is_jaxpr(value: Any) -> bool:
    return hasattr(getattr(value, "jaxpr", value), "eqns")


if __name__ == "__main__":
    main(sys.argv[1:])
