"""Parts of `benchmarks.gpu` that move bytes: kernels against their truths, their speed, the choice of configs.

Axes: S tokens of a call, M blocks of a call.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.cases import FULL, TINY, Case, Scale, all_cases
from benchmarks.measuring import Clock, Row, copy_seconds, seconds_of, tell
from kvbm_jax.kernels import configs, target
from kvbm_jax.kernels.configs import SHARED_BYTES, CopyConfig, shared_bytes
from kvbm_jax.kernels.dispatch import Implementation

TABLE = pathlib.Path(configs.__file__).with_name("tuned.json")
LARGE = dataclasses.replace(FULL, tokens=65_536, blocks=1024)
_TARGETED = ("store_kv", "gather_blocks", "scatter_blocks")
_TARGET, _TARGET_BYTES = 0.9, 2048  # of a copy's speed, for rows from so many bytes on
_MOST_DIFFERENT = 1e-3
_VARIANTS = 8  # of ids, so that no cache holds what the last call read
_REPEATS = 9


def truth(clock: Clock, *, tiny: bool) -> None:
    """Tells for every case whether the kernel gives what XLA gives: bit for bit, if it computes nothing."""
    cases = sorted(all_cases(TINY if tiny else LARGE), key=_variety())
    if tiny:
        cases = list({case.operation: case for case in reversed(cases)}.values())
    with Ahead(_pair, cases, clock, tiny=tiny) as compiled:
        for case, (kernel, plain) in compiled:
            different = _difference(kernel(*_fresh(case)), plain(*_fresh(case)))
            passed = different <= (0 if case.exact else _MOST_DIFFERENT)
            tell("check", name=f"{case.name}: as XLA does, but for {different:.2g} of the elements", passed=passed)


def moves(clock: Clock, *, tiny: bool) -> None:
    """Tells how fast bytes move, beside a copy of as many, by kernel and in XLA."""
    ways: list[tuple[Case, Implementation]] = [
        (case, way) for case in _timed_cases(tiny=tiny) for way in ("mosaic_gpu", "xla")
    ]
    with Ahead(lambda way: _compiled(*way), ways, clock, tiny=tiny) as compiled:
        for (case, way), program in compiled:
            seconds = _seconds(case, program, 2 if tiny else _REPEATS)
            told = Row(
                f"{case.name}, {_size(case)}, {way}",
                case.must_move,
                seconds,
                "copy on the device",
                copy_seconds(case.must_move // 2, 2 if tiny else _REPEATS),
                _target(case) if way == "mosaic_gpu" else None,
            )
            tell("row", **dataclasses.asdict(told))


def tune(clock: Clock, *, tiny: bool) -> None:
    """Tries configs and writes those that are faster than the rule's to `tuned.json`, for this device."""
    kind = (target.current() or target.H100).kind
    best: dict[tuple[str, str], dict[CopyConfig, float]] = {}
    for case in _timed_cases(tiny=tiny):
        key = (case.operation, str(configs.bucket(case.unit_bytes)))
        if not case.unit_bytes or key in best:
            continue
        rule = configs.copy_config(case.operation, case.unit_bytes)
        best[key] = {}
        for config in dict.fromkeys((rule, *(grid()[:1] if tiny else grid()))):
            if clock.allows(f"{case.name}, {config}"):
                with configs.using(config):
                    best[key][config] = _seconds(case, _compiled(case, "mosaic_gpu"), 2 if tiny else _REPEATS)
        if best[key]:
            fastest = min(best[key], key=best[key].__getitem__)
            named = f"{case.operation}, units to {key[1]} bytes: {dataclasses.astuple(fastest)}"
            row = Row(named, 0, best[key][fastest], f"{dataclasses.astuple(rule)}", best[key].get(rule, 0.0))
            tell("row", **dataclasses.asdict(row))
    if not tiny:
        _write(kind, {key: min(times, key=times.__getitem__) for key, times in best.items() if times})


def grid() -> list[CopyConfig]:
    """The configs that tuning tries."""
    fields = itertools.product((4096, 8192, 16384, 32768), (2, 4, 6), (1, 2, 3, 4, 6, 8))
    # A multiprocessor that is less than half full moves less than it could.
    return [CopyConfig(*each) for each in fields if SHARED_BYTES // 2 <= shared_bytes(*each) <= SHARED_BYTES]


def _write(kind: str, found: dict[tuple[str, str], CopyConfig]) -> None:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    for (operation, unit), config in found.items():
        table.setdefault(kind, {}).setdefault(operation, {})[unit] = dataclasses.asdict(config)
    TABLE.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _timed_cases(*, tiny: bool) -> list[Case]:
    """Large calls on every shape, and small ones, such as a decode step makes, on the first."""
    scales: Sequence[Scale] = (TINY,) if tiny else (LARGE, dataclasses.replace(FULL, blocks=32))
    chosen = []
    for i, scale in enumerate(scales):
        cases = [case for case in all_cases(scale) if case.operation != "advance" and "stacked" not in case.about]
        cases = [case for case in cases if case.about in scale.shapes or "layer_separate" in case.about]
        if i or tiny:
            cases = list({case.operation: case for case in reversed(cases) if _is_first(case, scale)}.values())
        chosen += sorted(cases, key=_variety())
    return chosen


def _is_first(case: Case, scale: Scale) -> bool:
    return case.about.startswith(next(iter(scale.shapes)))


def _variety() -> Callable[[Case], int]:
    """A sorting key by which the first of each operation and shape come first, then the second ones, and so on."""
    seen: dict[tuple[str, str], int] = {}

    def key(case: Case) -> int:
        kind = case.operation, case.about.split(",")[0]
        seen[kind] = seen.get(kind, 0) + 1
        return seen[kind]

    return key


class Ahead[T, R]:
    """Compiles on many threads ahead of what the results are used for, as long as the clock allows."""

    def __init__(self, compile_one: Callable[[T], R], items: Sequence[T], clock: Clock, *, tiny: bool) -> None:
        # Whether kernels are interpreted is decided where they are traced: in a dry run, here.
        self._pool = None if tiny else concurrent.futures.ThreadPoolExecutor(min(os.cpu_count() or 1, 12))
        self._compile, self._items, self._clock = compile_one, items, clock

    def __enter__(self) -> Iterator[tuple[T, R]]:
        return self._results()

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _results(self) -> Iterator[tuple[T, R]]:
        futures = [self._pool.submit(self._compile, item) for item in self._items] if self._pool else None
        for i, item in enumerate(self._items):
            if self._clock.allows(str(getattr(item, "name", item))):
                yield item, futures[i].result() if futures else self._compile(item)


def _pair(case: Case) -> tuple[Any, Any]:
    return _compiled(case, "mosaic_gpu"), _compiled(case, "xla")


def _compiled(case: Case, implementation: Implementation) -> Any:
    """The compiled program; compiled anew for each call, since configs are none of its arguments."""
    return jax.jit(case.function(implementation), donate_argnums=case.donated).lower(*case.shapes).compile()


def _fresh(case: Case) -> Any:
    return _maker(case)(0)


@functools.cache
def _maker(case: Case) -> Callable[[int], Any]:
    return jax.jit(case.arguments)


def _difference(one: Any, other: Any) -> float:
    """Returns the share of elements that differ, in that array of two results where it is largest."""

    @jax.jit
    def shares(one: Any, other: Any) -> jax.Array:
        leaves = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        return jnp.stack([jnp.mean(a != b, dtype=jnp.float32) for a, b in leaves]).max()

    return float(shares(one, other))


def _seconds(case: Case, program: Any, repeats: int) -> float:
    """Times a case; ids change from call to call, and what is updated in place is passed on to the next."""
    arguments = list(_fresh(case))
    leaves, tree = jax.tree.flatten(arguments)
    are_ids = [leaf.ndim == 1 and leaf.dtype == jnp.int32 for leaf in leaves]

    @jax.jit
    def ids_of(seed: jax.Array) -> list[jax.Array]:
        others = jax.tree.leaves(case.arguments(seed))
        return [leaf for leaf, is_id in zip(others, are_ids, strict=True) if is_id]

    variants = [ids_of(jnp.uint32(seed)) for seed in range(_VARIANTS)]
    jax.block_until_ready(variants)
    state: Any = [arguments[number] for number in case.donated]
    del leaves
    kept = [None if number in case.donated else argument for number, argument in enumerate(arguments)]
    del arguments

    def call(i: int) -> Any:
        nonlocal state
        given = list(kept)
        for number, value in zip(case.donated, state, strict=True):
            given[number] = value
        held = jax.tree.leaves(given)
        ids = iter(variants[i % _VARIANTS])
        result = program(
            *jax.tree.unflatten(tree, [next(ids) if is_id else leaf for leaf, is_id in zip(held, are_ids, strict=True)])
        )
        if case.donated:
            state = [result]
        return result

    return seconds_of(call, repeats)


def _target(case: Case) -> float | None:
    large = case.must_move >= 2 * 256 << 20
    return _TARGET if case.operation in _TARGETED and case.unit_bytes >= _TARGET_BYTES and large else None


def _size(case: Case) -> str:
    return f"{case.must_move / 2**21:,.2f} MiB"
