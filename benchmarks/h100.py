"""Compiles every kernel for an H100, without one: `python -m benchmarks.h100`.

In an environment of its own, `.venv-h100`, stand the running jax's CUDA plugin and NVIDIA's assembler, 1.1 GB in all;
it is made by uv when it is first wanted. Child processes compile the cases there (`benchmarks.h100_compile`); here is
read what comes out, checked, and written to `docs/kernels.md`. Exit status 1 if a check fails, 2 if the environment
cannot be made.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence

import jax
import jaxlib

from benchmarks.cases import FULL, Case, all_cases
from benchmarks.h100_compile import KERNEL, MARK, SHARED, SHARED_DEVICES, XLA, Launch, Program, programs
from kvbm_jax.kernels import configs, target

ROOT = pathlib.Path(__file__).resolve().parent.parent
REPORT = ROOT / "docs" / "kernels.md"
BEGIN = "<!-- From here on written by python -m benchmarks.h100 -->\n"
_ENVIRONMENT = ROOT / ".venv-h100"
_CORE_BYTES = 228 * 1024  # of shared memory that a multiprocessor has
_RESERVED_BYTES = 1024  # of it, for each thread block that runs there
_BANDWIDTH = 3.35e12  # bytes a second
_INSTALL_SECONDS, _COMPILE_SECONDS = 600, 600
_FLAGS = {
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "MOSAIC_GPU_DUMP_PTX": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
}
_COPIES = {
    "load": re.compile(r"cp\.async\.bulk\.shared"),
    "tensor load": re.compile(r"cp\.async\.bulk\.tensor\.\d+d\.shared"),
    "store": re.compile(r"cp\.async\.bulk\.global"),
    "tensor store": re.compile(r"cp\.async\.bulk\.tensor\.\d+d\.global"),
}


class Unavailable(Exception):  # noqa: N818 (no error of this program)
    """The environment cannot be made here."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """Machine code of a kernel, as the assembler tells."""

    registers: int  # of a thread
    stack_bytes: int  # of a thread
    spill_bytes: int  # stored and loaded
    copies: dict[str, int]  # bulk copy instructions by kind


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled case."""

    case: Case
    program: Program
    kernels: list[Kernel]


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, checks, writes the report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.h100", description="Compile every kernel for an H100.")
    parser.add_argument("--report", type=pathlib.Path, default=REPORT, metavar="FILE", help="default docs/kernels.md")
    args = parser.parse_args(argv)
    try:
        found = compile_all(environment())
    except Unavailable as error:
        print(f"benchmarks.h100: {error}", file=sys.stderr)
        return 2
    wrong = [f"{one.case.name}, {one.program.how}: {fault}" for one in found for fault in faults(one)]
    for line in wrong:
        print(line, file=sys.stderr)
    head, _, _ = args.report.read_text(encoding="utf-8").partition(BEGIN)
    args.report.write_text(head + BEGIN + report(found), encoding="utf-8")
    print(f"{len(found)} programs compiled for {target.H100.kind}, {len(wrong)} faults; wrote {args.report}")
    return 1 if wrong else 0


def environment() -> pathlib.Path:
    """Returns the Python of the environment, made if it is not there; all its packages are those of this jax.

    Raises:
      Unavailable: there is no uv, or a package cannot be had.
    """
    if (uv := shutil.which("uv")) is None:
        raise Unavailable("uv is not installed; it makes the environment with jax's CUDA compiler")
    python = _ENVIRONMENT / "bin" / "python"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    packages = [
        *(each for each in project["dependencies"] if not each.startswith("jax")),
        *(f"{name}=={jaxlib.__version__}" for name in ("jaxlib", "jax-cuda12-plugin", "jax-cuda12-pjrt")),
        f"jax=={jax.__version__}",
        "nvidia-cuda-nvcc-cu12",
    ]
    commands = [[uv, "pip", "install", "--quiet", "--python", str(python), *packages]]
    if not python.exists():
        commands.insert(0, [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(_ENVIRONMENT)])
    for command in commands:
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=_INSTALL_SECONDS, check=False)
        if done.returncode:
            raise Unavailable(f"uv cannot make {_ENVIRONMENT.name}: {done.stderr.strip()[-500:]}")
    return python


def compile_all(python: pathlib.Path) -> list[Compiled]:
    """Compiles every case, some at a time, in processes of that Python.

    Raises:
      RuntimeError: a process failed.
    """
    count = min(os.cpu_count() or 1, 8)
    started = [
        subprocess.Popen(
            [python, "-m", "benchmarks.h100_compile", str(first), str(count)],
            cwd=ROOT,
            env=os.environ | _FLAGS,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for first in range(count)
    ]
    outputs = []
    try:
        for process in started:
            out, err = process.communicate(timeout=_COMPILE_SECONDS)
            if process.returncode:
                raise RuntimeError(f"compiling ended with status {process.returncode}: {err.strip()[-2000:]}")
            outputs.append(out)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return list(_read(outputs))


def _read(outputs: Sequence[str]) -> Iterator[Compiled]:
    cases = {case.name: case for case in all_cases(FULL)}
    found = {}
    for output in outputs:
        dumped: list[str] = []
        known: dict[str, Kernel] = {}
        for line in output.splitlines():
            if not line.startswith(MARK):
                dumped.append(line)
                continue
            fields = json.loads(line.removeprefix(MARK))
            program = Program(**fields | {"launches": [Launch(**launch) for launch in fields["launches"]]})
            new = (name for name in program.kernels if name not in known)
            known |= zip(new, kernels_of("\n".join(dumped)), strict=True)
            kernels = [known[name] for name in program.kernels]
            found[program.how, program.name] = Compiled(cases[program.name], program, kernels)
            dumped = []
    yield from (found[how, case.name] for case, how in programs())


def kernels_of(dump: str) -> Iterator[Kernel]:
    """Reads what Mosaic dumped: for each kernel its PTX, then the assembler's words."""
    ends = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n.*Used (\d+) registers.*\n"
    begun = 0
    for told in re.finditer(ends, dump + "\n"):
        stack, stores, loads, registers = map(int, told.groups())
        ptx = dump[begun : told.start()]
        copies = {name: len(pattern.findall(ptx)) for name, pattern in _COPIES.items()}
        yield Kernel(registers, stack, stores + loads, copies)
        begun = told.end()


def faults(compiled: Compiled) -> Iterator[str]:
    """What must not be, in words."""
    case, program = compiled.case, compiled.program
    if program.how == KERNEL and not (compiled.kernels and program.launches):
        yield f"{len(compiled.kernels)} kernels compiled, {len(program.launches)} launched"
    for kernel in compiled.kernels:
        if kernel.spill_bytes or kernel.stack_bytes:
            yield f"{kernel.spill_bytes} bytes spilled, {kernel.stack_bytes} bytes of stack"
    for launch in program.launches:
        if not launch.shared_bytes:
            yield "a kernel has no shared memory: tiles cannot be there"
        if (asked := shared_of_core(launch)) > _CORE_BYTES:
            yield f"{asked:,} bytes of shared memory for a multiprocessor, which has {_CORE_BYTES:,}"
    if program.aliased_bytes != program.donated_bytes:
        yield f"{program.donated_bytes:,} bytes are donated, {program.aliased_bytes:,} updated in place"
    limit = case.large_bytes // (SHARED_DEVICES if program.how == SHARED else 1)
    if program.temporary_bytes >= limit:
        yield f"{program.temporary_bytes:,} bytes of temporaries, of at most {limit:,}"
    if program.collectives:
        yield f"devices talk: {', '.join(program.collectives)}"
    yield from (f"copies a layer: {line}" for line in program.copies)


def shared_of_core(launch: Launch) -> int:
    """Bytes of shared memory that a multiprocessor needs for the thread blocks of its share."""
    blocks = -(-launch.thread_blocks // target.H100.num_cores)
    return blocks * (launch.shared_bytes + _RESERVED_BYTES)


def report(found: Sequence[Compiled]) -> str:
    """Returns the generated part of `docs/kernels.md`."""
    sizes = f"{FULL.num_blocks:,} blocks, {FULL.num_layers} layers, {FULL.tokens} tokens or {FULL.blocks} blocks a call"
    lines = [
        f"\nCompiled for {target.H100.kind} with jax {jax.__version__}: caches of {sizes}.\n",
        "| kernel | case | config | registers | stack | shared KiB | bulk copies | MiB | µs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        "| " + " | ".join((*key_of(one.case), *measured(one), *bounds(one.case))) + " |"
        for one in found
        if one.program.how == KERNEL
    ]
    lines += [
        "\nThe same otherwise, bytes of a device:\n",
        "| operation | case | how | in place MiB | temporary KiB |",
        "|---|---|---|---|---|",
    ]
    for one in found:
        if one.program.how in (SHARED, XLA):
            in_place, temporary = one.program.aliased_bytes / 2**20, one.program.temporary_bytes / 2**10
            cells = (f"`{one.case.operation}`", one.case.about, one.program.how)
            lines.append(f"| {' | '.join(cells)} | {in_place:,.0f} | {temporary:,.2f} |")
    return "\n".join(lines) + "\n"


def key_of(case: Case) -> tuple[str, str, str]:
    """What a row of the report tells without compiling: operation, case, config."""
    if not case.unit_bytes:
        return f"`{case.operation}`", case.about, ""
    config = configs.copy_config(case.operation, case.unit_bytes)
    return f"`{case.operation}`", case.about, f"{config.tile_bytes}, {config.stages}, {config.blocks_per_core}"


def measured(compiled: Compiled) -> tuple[str, ...]:
    """Registers, stack, shared memory of a multiprocessor, and bulk copies, the most of any of the kernels."""
    kernels = compiled.kernels
    copies = {name: max(kernel.copies[name] for kernel in kernels) for name in _COPIES}
    return (
        str(max(kernel.registers for kernel in kernels)),
        str(max(kernel.stack_bytes for kernel in kernels)),
        f"{max(map(shared_of_core, compiled.program.launches)) / 1024:.1f}",
        ", ".join(f"{count} {name}" for name, count in copies.items() if count),
    )


def bounds(case: Case) -> tuple[str, str]:
    """MiB that must move, and the microseconds that the bandwidth allows."""
    return f"{case.must_move / 2**20:,.2f}", f"{case.must_move / _BANDWIDTH * 1e6:,.1f}"


if __name__ == "__main__":
    sys.exit(main())
