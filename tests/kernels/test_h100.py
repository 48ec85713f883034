"""The rig that compiles kernels for an H100: what it reads, what it would find fault with, and its report."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from benchmarks import h100
from benchmarks.cases import FULL, Case, all_cases
from benchmarks.h100_compile import KERNEL, Launch, Program, large_copies, launches, programs
from kvbm_jax.kernels import target

pytestmark = pytest.mark.core

DUMP = """
.visible .entry gather_blocks_mosaic_gpu_kernel(
  @%p11 cp.async.bulk.tensor.5d.shared::cta.global.mbarrier::complete_tx::bytes [%r19], [%rd15, {%r29}], [%r28];
  @%p11 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%rd6], [%rd13], %r26, [%rd9];
  @%p11 cp.async.bulk.shared::cta.global.mbarrier::complete_tx::bytes [%rd6], [%rd13], %r26, [%rd9];
  @%p11 cp.async.bulk.global.shared::cta.bulk_group [%rd27], [%rd28], %r73;
  cp.async.bulk.commit_group;
ptxas info    : Function properties for gather_blocks_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers, used 2 barriers, 1 bytes smem
.visible .entry another(
  @%p11 cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%rd27, {%r1}], [%rd28];
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers
"""
NONE = {"load": 0, "tensor load": 0, "store": 0, "tensor store": 0}


def test_what_the_assembler_tells_is_read():
    assert list(h100.kernels_of(DUMP)) == [
        h100.Kernel(7, 0, 0, {"load": 2, "tensor load": 1, "store": 1, "tensor store": 0}),
        h100.Kernel(255, 16, 12, NONE | {"tensor store": 1}),
    ]


def test_a_kernel_s_thread_blocks_and_shared_memory_are_read_off_its_jaxpr():
    case = next(case for case in all_cases(FULL) if case.operation == "gather_blocks")
    with target.interpreted():
        traced = jax.jit(case.function("mosaic_gpu")).trace(*case.shapes)
    # Three thread blocks a multiprocessor, four tiles of 16 KiB and a barrier for each.
    assert list(launches(traced.jaxpr)) == [Launch(132 * 3, 4 * (16384 + 8))] * FULL.num_layers


def test_copies_of_a_layer_are_seen_in_compiled_text():
    def twice(x):
        return x.at[0].set(1), x

    text = jax.jit(twice, donate_argnums=0).lower(jnp.zeros((64, 64))).compile().as_text()
    assert len(list(large_copies(text, 64 * 64 * 4))) >= 1
    assert not list(large_copies(text, 64 * 64 * 4 + 1))


def sound():
    case = Case("store_kv", "toy", 16, 64, 1000, lambda *_: None, lambda _: (), (0,))
    launch = Launch(132, 1000)
    program = Program(case.name, KERNEL, [launch], ["a"], 4000, 4000, 999, [], [])
    return h100.Compiled(case, program, [h100.Kernel(8, 0, 0, NONE)])


def test_a_sound_program_has_no_fault():
    assert list(h100.faults(sound())) == []


@pytest.mark.parametrize(
    ("changed", "fault"),
    [
        ({"aliased_bytes": 0}, "4,000 bytes are donated, 0 updated in place"),
        ({"temporary_bytes": 1000}, "1,000 bytes of temporaries, of at most 1,000"),
        ({"copies": ["x = copy(y)"]}, "copies a layer: x = copy"),
        ({"collectives": ["all-gather"]}, "devices talk: all-gather"),
        ({"launches": []}, "1 kernels compiled, 0 launched"),
        ({"launches": [Launch(132, 0)]}, "no shared memory"),
        (
            {"launches": [Launch(133, 116_000)]},
            "234,048 bytes of shared memory for a multiprocessor, which has 233,472",
        ),
    ],
)
def test_faults_of_a_program_are_told(changed, fault):
    found = sound()
    found = dataclasses.replace(found, program=dataclasses.replace(found.program, **changed))
    (told,) = h100.faults(found)
    assert fault in told


@pytest.mark.parametrize("kernel", [h100.Kernel(255, 0, 8, NONE), h100.Kernel(255, 8, 0, NONE)])
def test_a_kernel_that_spills_is_a_fault(kernel):
    (told,) = h100.faults(dataclasses.replace(sound(), kernels=[kernel]))
    assert "spilled" in told


def test_cases_have_names_of_their_own_and_every_operation_that_has_a_kernel():
    from kvbm_jax import kernels

    names = [case.name for case in all_cases(FULL)]
    assert len(names) == len(set(names))
    with_kernel = {name for name, op in kernels.OPERATIONS.items() if "mosaic_gpu" in op.implementations}
    assert {case.operation for case in all_cases(FULL)} == with_kernel


def test_the_report_in_the_docs_is_of_these_cases():
    _, _, generated = h100.REPORT.read_text(encoding="utf-8").partition(h100.BEGIN)
    rows = [line.strip("| ").split(" | ") for line in generated.splitlines() if line.startswith("| `")]
    kernels = [(tuple(row[:3]), tuple(row[-2:])) for row in rows if len(row) > 5]
    assert kernels == [(h100.key_of(case), h100.bounds(case)) for case in all_cases(FULL)]
    others = [tuple(row[:3]) for row in rows if len(row) == 5]
    assert others == [(f"`{case.operation}`", case.about, how) for case, how in programs() if how != KERNEL]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_kernel_compiles_for_an_h100(tmp_path, capsys):
    report = tmp_path / "kernels.md"
    report.write_text("The head.\n")
    status = h100.main(["--report", str(report)])
    told = capsys.readouterr()
    if status == 2:
        pytest.skip(told.err.strip())
    assert status == 0, told.err
    assert report.read_text().startswith("The head.\n" + h100.BEGIN)
