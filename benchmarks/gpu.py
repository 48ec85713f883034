"""Everything that needs a GPU, in one call of a few minutes: `python -m benchmarks.gpu`.

First the tests marked `gpu`, in a process of their own; then how fast the cache's verbs move bytes. Each figure
stands beside a plain copy on the same device of an array of as many bytes, timed in the same run: both are medians
over calls that were waited for. Results go to `benchmarks/results/`, as JSON and as a table, under the name of the
device. Nothing but the base dependencies is needed, and what `tests/` needs for the tests.

Axes: H kv heads, D head dim, S tokens of a call, M blocks of a call.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib

from kvbm_jax import __version__
from kvbm_jax import cache as kv
from kvbm_jax.layout import KVLayout

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEST_SECONDS = 330  # of the 480 that the whole call may take


@dataclasses.dataclass(frozen=True)
class Sizes:
    """A cache and the calls on it."""

    num_layers: int  # L
    num_blocks: int  # N
    block_size: int  # T
    num_kv_heads: int  # H
    head_dim: int  # D
    dtype: str
    steps: tuple[int, ...]  # S
    moves: tuple[int, ...]  # M
    repeats: int


FULL = Sizes(4, 4096, 64, 8, 128, "bfloat16", steps=(256, 8192), moves=(32, 1024), repeats=30)
SMALL = Sizes(2, 64, 16, 2, 32, "float32", steps=(32,), moves=(8,), repeats=3)


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement beside its baseline."""

    case: str
    bytes: int  # moved: read once and written once
    seconds: float
    baseline: str
    baseline_seconds: float
    ratio: float  # baseline_seconds / seconds: 1 is as fast as a copy


def main(argv: Sequence[str] | None = None) -> int:
    """Runs tests and measurements, writes the results; exit status 1 without a GPU or if a test fails."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Everything that needs a GPU.")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write the JSON here too")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results", metavar="DIR")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    parser.add_argument("--allow-cpu", action="store_true", help="without a GPU, run tiny sizes on the CPU")
    args = parser.parse_args(argv)
    # Read when the device is first used: the process of the tests wants memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = find_device(allow_cpu=args.allow_cpu)
    if device is None:
        print("benchmarks.gpu: jax finds no GPU here; --allow-cpu makes a dry run on the CPU", file=sys.stderr)
        return 1
    start = time.perf_counter()
    tests = {"status": "skipped", "summary": "--skip-tests"} if args.skip_tests else run_tests()
    print(f"tests marked gpu: {tests['status']} ({tests['summary']})", flush=True)
    sizes = FULL if device.platform == "gpu" else SMALL
    rows = []
    for row in measure(sizes, device):
        rows.append(row)
        print(format_row(row), flush=True)
    result = describe(device, sizes, tests, rows, time.perf_counter() - start)
    write(result, args.out, args.json)
    return 1 if tests["status"] == "failed" else 0


def find_device(*, allow_cpu: bool) -> Any | None:
    """Returns the first GPU; without one the CPU if that is allowed, else None."""
    try:
        devices = jax.devices()
    except RuntimeError:
        return None
    return next((d for d in devices if d.platform == "gpu" or allow_cpu), None)


def run_tests() -> dict[str, str]:
    """Runs the tests marked gpu in a process of their own, from the files that have any."""
    files = [p for p in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in p.read_text(encoding="utf-8")]
    if not files:
        return {"status": "none", "summary": "no test carries the marker"}
    if importlib.util.find_spec("pytest") is None:
        return {"status": "skipped", "summary": f"pytest is absent; {len(files)} files not run"}
    command = [sys.executable, "-m", "pytest", "-m", "gpu", *map(str, files)]
    try:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=TEST_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return {"status": "failed", "summary": f"not done after {TEST_SECONDS} s"}
    print(done.stdout)
    summary = (done.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    status = {0: "passed", 5: "none"}.get(done.returncode, "failed")
    return {"status": status, "summary": summary}


def measure(sizes: Sizes, device: Any) -> Iterator[Row]:
    """Yields store, gather and scatter at every size, each beside a copy of as many bytes."""
    layout = KVLayout(
        sizes.num_layers, sizes.num_blocks, sizes.block_size, sizes.num_kv_heads, sizes.head_dim, sizes.dtype
    )
    token_shape = (sizes.num_kv_heads, sizes.head_dim)
    layer_bytes = 2 * sizes.num_kv_heads * sizes.head_dim * jnp.dtype(sizes.dtype).itemsize  # of one token

    def store(cache: kv.KVCache, keys: jax.Array, values: jax.Array, slots: jax.Array) -> kv.KVCache:
        for layer in range(sizes.num_layers):
            cache = kv.store_kv(cache, layer, keys, values, slots)
        return cache

    store = jax.jit(store, donate_argnums=0)
    gather = jax.jit(kv.gather_blocks)
    scatter = jax.jit(kv.scatter_blocks, donate_argnums=0)
    copy = jax.jit(jnp.copy)

    with jax.default_device(device):
        state = kv.init(layout)
        order = jax.random.permutation(jax.random.key(0), layout.num_blocks).astype(jnp.int32)
        for count in sizes.steps:
            keys = jax.random.normal(jax.random.key(1), (count, *token_shape)).astype(sizes.dtype)
            slots = jnp.arange(count, dtype=jnp.int32)
            slots = order[slots // sizes.block_size] * sizes.block_size + slots % sizes.block_size
            state, seconds = time_donating(lambda c, k=keys, s=slots: store(c, k, k, s), state, sizes.repeats)
            yield beside_copy(f"store_kv, {count} tokens", count * layer_bytes * sizes.num_layers, seconds, copy, sizes)
        for count in sizes.moves:
            num_bytes = count * sizes.block_size * layer_bytes * sizes.num_layers
            ids = order[:count]
            staging = gather(state, ids)
            seconds = time_calls(lambda i=ids, c=state: gather(c, i), sizes.repeats)
            yield beside_copy(f"gather_blocks, {count} blocks", num_bytes, seconds, copy, sizes)
            state, seconds = time_donating(lambda c, i=ids, b=staging: scatter(c, i, b), state, sizes.repeats)
            yield beside_copy(f"scatter_blocks, {count} blocks", num_bytes, seconds, copy, sizes)


def beside_copy(case: str, num_bytes: int, seconds: float, copy: Callable[[Any], Any], sizes: Sizes) -> Row:
    """Times a copy of as many bytes and returns both as a row."""
    source = jnp.zeros(num_bytes, jnp.uint8)
    baseline = time_calls(lambda: copy(source), sizes.repeats)
    return Row(case, num_bytes, seconds, "copy on the device", baseline, baseline / seconds)


def time_calls(call: Callable[[], Any], repeats: int) -> float:
    """Returns the median seconds of `call`, result waited for, after two calls that do not count."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def time_donating(call: Callable[[Any], Any], state: Any, repeats: int) -> tuple[Any, float]:
    """Like `time_calls` for a call that consumes its state; returns the last state too."""
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        state = jax.block_until_ready(call(state))
        times.append(time.perf_counter() - start)
    return state, statistics.median(times[2:])


def describe(device: Any, sizes: Sizes, tests: dict[str, str], rows: list[Row], seconds: float) -> dict[str, Any]:
    """Returns the whole result as one JSON object."""
    return {
        "bench": "gpu",
        "device": device.device_kind,
        "platform": device.platform,
        "kvbm_jax": __version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "sizes": dataclasses.asdict(sizes),
        "tests": tests,
        "seconds": round(seconds, 1),
        "rows": [dataclasses.asdict(row) for row in rows],
    }


def format_row(row: Row) -> str:
    """Returns a row as a line of the Markdown table."""
    speeds = [2 * row.bytes / s / 1e9 for s in (row.seconds, row.baseline_seconds)]
    return (
        f"| {row.case} | {row.bytes / 2**20:,.2f} | {row.seconds * 1e6:,.0f} | {speeds[0]:,.1f} | "
        f"{row.baseline_seconds * 1e6:,.0f} | {speeds[1]:,.1f} | {row.ratio:.2f} |"
    )


def write(result: dict[str, Any], out: pathlib.Path, extra: pathlib.Path | None) -> None:
    """Writes the result as JSON and Markdown, named after the device."""
    name = re.sub(r"[^a-z0-9]+", "-", result["device"].lower()).strip("-")
    text = json.dumps(result, indent=2) + "\n"
    versions = ", ".join(f"{package} {result[package]}" for package in ("kvbm_jax", "jax", "jaxlib"))
    head = [
        f"# {result['device']}",
        "",
        f"{versions}; {result['seconds']} s in all.",
        f"Tests marked `gpu`: {result['tests']['status']} ({result['tests']['summary']}).",
        "GB/s count each byte once read and once written. Ratio: 1 is as fast as a copy.",
        "",
        "| case | MiB | µs | GB/s | copy µs | copy GB/s | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    lines = [*head, *(format_row(Row(**row)) for row in result["rows"]), ""]
    out.mkdir(parents=True, exist_ok=True)
    for path, content in (
        (out / f"{name}.json", text),
        (out / f"{name}.md", "\n".join(lines)),
        *(((extra, text),) if extra else ()),
    ):
        path.write_text(content, encoding="utf-8")
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
