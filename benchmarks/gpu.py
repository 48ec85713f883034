"""Everything that needs a GPU, in one call of at most 8 minutes: `python -m benchmarks.gpu`.

    tests        the tests marked `gpu`
    truth        every kernel against XLA, bit for bit, on large inputs
    moves        bytes a second of every operation, beside a copy on the device
    bookkeeping  a step's bookkeeping: one dispatch, in a scan; with XLA's command buffers
    no-buffers   the same without them
    edges        offload and onboard, beside a copy from and to pinned host memory
    tune         only if asked for: tries configs of kernels and writes `kvbm_jax/kernels/tuned.json`

Each part is a process of its own, with a time of its own: one that crashes or hangs takes nothing along, and what it
told until then stays. Its results are written at once; `--resume` keeps those that did not fail. All of them together
go to `benchmarks/results/`, as JSON and as a table, under the name of the device. Exit status 1 without a GPU, or if a
part fails or a check does; a target that is missed is no failure, and is told.

Nothing but the base dependencies is needed, and what `tests/` needs for the tests.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jaxlib

from benchmarks import bookkeeping, edges, moving
from benchmarks.measuring import Clock, Row, format_row, tell, told
from kvbm_jax import __version__
from kvbm_jax.kernels import target

ROOT = pathlib.Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 460
_GRACE_SECONDS = 25  # for a part to start, and to end what it has begun


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the run."""

    seconds: float
    run: Callable[..., None]  # of a clock and whether sizes are tiny
    flags: str = ""  # for XLA
    by_default: bool = True


def run_tests(clock: Clock, *, tiny: bool) -> None:
    """Runs the tests marked gpu, from the files that have any, unless this is a dry run."""
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    if tiny or not files or importlib.util.find_spec("pytest") is None:
        tell("note", text="no GPU" if tiny else "pytest is absent" if files else "no test carries the marker")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *map(str, files)]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=clock.left, check=False)
    except subprocess.TimeoutExpired:
        tell("check", name="tests: not done in time", passed=False)
        return
    print(done.stdout)
    summary = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    if done.returncode == 5:
        tell("note", text="no test carries the marker")
    else:
        tell("check", name=f"tests: {summary}", passed=done.returncode == 0)


def _steps(about: str) -> Callable[..., None]:
    return lambda clock, *, tiny: bookkeeping.steps(clock, tiny=tiny, about=about)


PARTS = {
    "tests": Part(110, run_tests),
    "truth": Part(85, moving.truth),
    "moves": Part(85, moving.moves),
    "bookkeeping": Part(40, _steps("")),
    "no-buffers": Part(40, _steps(", no command buffers"), flags="--xla_gpu_enable_command_buffer="),
    "edges": Part(25, edges.edges),
    "tune": Part(240, moving.tune, by_default=False),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the parts, writes the results."""
    args = _parser().parse_args(argv)
    # Read when the device is first used: each part's process wants memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.child:
        run_child(args.child, args.seconds, tiny=args.tiny)
        return 0
    if unknown := set(args.parts or ()) - set(PARTS):
        print(f"benchmarks.gpu: no part {', '.join(sorted(unknown))}; there is {', '.join(PARTS)}", file=sys.stderr)
        return 1
    device = find_device(allow_cpu=args.allow_cpu)
    if device is None:
        print("benchmarks.gpu: jax finds no GPU here; --allow-cpu makes a dry run on the CPU", file=sys.stderr)
        return 1
    begun, tiny = time.perf_counter(), device.platform != "gpu"
    name = re.sub(r"[^a-z0-9]+", "-", device.device_kind.lower()).strip("-")
    folder = args.out / f"{name}-parts"
    folder.mkdir(parents=True, exist_ok=True)
    chosen = args.parts or [part for part in PARTS if PARTS[part].by_default or (part == "tune" and args.tune)]
    results = []
    for part in chosen:
        file = folder / f"{part}.json"
        result = json.loads(file.read_text(encoding="utf-8")) if args.resume and file.exists() else {}
        if result.get("status", "failed") == "failed":
            left = TOTAL_SECONDS - (time.perf_counter() - begun)
            # Tuning is not what a run of every day does, and has its time for itself.
            seconds = PARTS[part].seconds if part == "tune" else min(PARTS[part].seconds, left - _GRACE_SECONDS)
            result = run_part(part, seconds, tiny=tiny) if seconds > 0 else outcome(part, [], left_out=["all of it"])
            file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(f"{part}: {result['status']}", flush=True)
        results.append(result)
    whole = describe(device, results, time.perf_counter() - begun)
    write(whole, args.out / name, args.json)
    return 1 if any(result["status"] == "failed" for result in results) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Everything that needs a GPU.")
    parser.add_argument("--parts", type=lambda text: text.split(","), metavar="A,B", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--resume", action="store_true", help="keep results that are there, but for failures")
    parser.add_argument("--tune", action="store_true", help="also try configs of kernels, for 4 minutes more")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the JSON here too")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--allow-cpu", action="store_true", help="without a GPU, run tiny sizes on the CPU")
    for name, kind in (("--child", str), ("--seconds", float)):
        parser.add_argument(name, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    return parser


def find_device(*, allow_cpu: bool) -> Any | None:
    """Returns the first GPU; without one the CPU if that is allowed, else None."""
    try:
        devices = jax.devices()
    except RuntimeError:
        return None
    return next((d for d in devices if d.platform == "gpu" or allow_cpu), None)


def run_child(part: str, seconds: float, *, tiny: bool) -> None:
    """Runs a part in this process; a dry run interprets the kernels."""
    clock = Clock(seconds)
    with target.interpreted() if tiny else contextlib.nullcontext():
        PARTS[part].run(clock, tiny=tiny)
    for what in clock.left_out:
        tell("left out", what=what)


def run_part(part: str, seconds: float, *, tiny: bool) -> dict[str, Any]:
    """Runs a part in a process of its own and returns what it told."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--child", part, "--seconds", str(seconds)]
    flags = " ".join((os.environ.get("XLA_FLAGS", ""), PARTS[part].flags)).strip()
    environment = os.environ | ({"XLA_FLAGS": flags} if flags else {})
    begun, failure = time.perf_counter(), None
    process = subprocess.Popen(
        command + ["--tiny"] * tiny,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = process.communicate(timeout=max(seconds, 1) + _GRACE_SECONDS)
        if process.returncode:
            failure = f"ended with status {process.returncode}: {err.strip()[-1500:]}"
    except subprocess.TimeoutExpired:
        process.kill()
        out, _ = process.communicate()
        failure = f"not done after {seconds:.0f} s"
    return outcome(part, told(out), seconds=time.perf_counter() - begun, failure=failure)


def outcome(
    part: str,
    found: Sequence[dict[str, Any]],
    *,
    seconds: float = 0,
    failure: str | None = None,
    left_out: Sequence[str] = (),
) -> dict[str, Any]:
    """Returns the result of a part: of what it told, and of why it failed, if it did."""

    def of(kind: str) -> list[dict[str, Any]]:
        return [{name: value for name, value in one.items() if name != "kind"} for one in found if one["kind"] == kind]

    rows, checks, notes = of("row"), of("check"), [one["text"] for one in of("note")]
    left_out = [*left_out, *(one["what"] for one in of("left out"))]
    failures = [failure] * bool(failure) + [check["name"] for check in checks if not check["passed"]]
    status = "failed" if failures else "out of time" if left_out else "passed" if rows or checks else "skipped"
    return {
        "part": part,
        "status": status,
        "note": "; ".join([*failures, *notes]),
        "seconds": round(seconds, 1),
        "rows": [row | {"ratio": Row(**row).ratio, "met": Row(**row).met} for row in rows],
        "checks": checks,
        "left_out": left_out,
    }


def describe(device: Any, results: list[dict[str, Any]], seconds: float) -> dict[str, Any]:
    """Returns the whole result as one JSON object."""
    return {
        "bench": "gpu",
        "device": device.device_kind,
        "platform": device.platform,
        "kvbm_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "seconds": round(seconds, 1),
        "parts": results,
    }


def row_of(fields: dict[str, Any]) -> Row:
    """Reads a row of a result."""
    return Row(**{field.name: fields[field.name] for field in dataclasses.fields(Row)})


def write(result: dict[str, Any], stem: pathlib.Path, extra: pathlib.Path | None) -> None:
    """Writes the result as JSON and Markdown."""
    text = json.dumps(result, indent=2) + "\n"
    versions = ", ".join(f"{package} {result[package]}" for package in ("kvbm_jax", "jax", "jaxlib"))
    lines = [
        f"# {result['device']}",
        "",
        f"{versions}; {result['seconds']} s in all.",
        "GB/s count each byte once read and once written. Ratio: 1 is as fast as the baseline.",
    ]
    for part in result["parts"]:
        checks = [f"{sum(check['passed'] for check in part['checks'])} of {len(part['checks'])} checks passed"]
        told_of = [part["status"], *(checks if part["checks"] else []), *([part["note"]] if part["note"] else [])]
        lines += ["", f"## {part['part']}", "", f"{'; '.join(told_of)}. {part['seconds']} s."]
        if part["left_out"]:
            lines += ["", f"For want of time left out: {'; '.join(part['left_out'])}."]
        if part["rows"]:
            lines += [
                "",
                "| case | MiB | µs | GB/s | baseline | µs | GB/s | ratio | target |",
                "|---|---|---|---|---|---|---|---|---|",
                *(format_row(row_of(fields)) for fields in part["rows"]),
            ]
    for path, content in (
        (stem.with_suffix(".json"), text),
        (stem.with_suffix(".md"), "\n".join([*lines, ""])),
        *(((extra, text),) if extra else ()),
    ):
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
