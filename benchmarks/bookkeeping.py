"""The part of `benchmarks.gpu` that times a step's bookkeeping: op by op, as one dispatch, and in a scan.

    advance   a decode step of 256 rows, each with a new token: `kvbm_jax.kernels.advance`
    step      a scheduler step of 256 rows, as `kvbm-jax bench pool` describes it

Axes: B rows, K steps.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measuring import Clock, Row, seconds_of, tell
from kvbm_jax import grants, kernels, sequences
from kvbm_jax.bench import pool as pool_bench
from kvbm_jax.bench.timing import Timing
from kvbm_jax.kernels.dispatch import Implementation

_STEPS = 64  # K
_TARGET_SECONDS = 15e-6
_TARGET = "15 µs, the target"
_WHILE = re.compile(r"^\s*\S+ = .* while\(.*$", re.MULTILINE)


def steps(clock: Clock, *, tiny: bool, about: str) -> None:
    """Tells how long steps take; `about` is added to the name of each case."""
    batch = 8 if tiny else 256
    for implementation in ("mosaic_gpu", "xla"):
        for how, seconds in _advances(batch, implementation, tiny=tiny):
            name = f"advance, {batch} rows, {implementation}, {how}{about}"
            target = 1.0 if (how, implementation) == ("in a scan", "mosaic_gpu") and not tiny else None
            tell("row", **dataclasses.asdict(Row(name, 0, seconds, _TARGET, _TARGET_SECONDS, target)))
    if tiny or not clock.allows("scheduler steps"):
        return
    for row in pool_bench.measure(Timing(3, lambda _: None), 65_536, batches=(batch,)):
        name = f"step, {row.case}{about}"
        tell("row", **dataclasses.asdict(Row(name, 0, row.seconds, row.baseline, row.baseline_seconds)))


def _advances(batch: int, implementation: Implementation, *, tiny: bool) -> Iterator[tuple[str, float]]:
    repeats, length = (1, 2) if tiny else (5, _STEPS)
    begin = jax.jit(functools.partial(_begin, batch))
    advance = functools.partial(kernels.advance, implementation=implementation)

    def step(carry: Any, _: None) -> Any:
        running, grant, status = advance(*carry, carry[0].lengths, *_new(batch))
        return (running, grant), status

    scan = jax.jit(lambda carry: jax.lax.scan(step, carry, length=length), donate_argnums=0)
    program = scan.lower(begin()).compile()
    loops = _WHILE.findall(program.as_text())
    known = all("known_trip_count" in loop for loop in loops)
    tell("check", name=f"advance, {implementation}: no loop whose length the host must ask for", passed=known)
    states = [jax.block_until_ready(begin()) for _ in range(repeats + 2)]
    times = []
    for state in states:
        begun = time.perf_counter()
        jax.block_until_ready(program(state))
        times.append((time.perf_counter() - begun) / length)
    yield "in a scan", sorted(times[2:])[repeats // 2]

    one = jax.jit(lambda carry: step(carry, None)[0], donate_argnums=0)
    state = one(begin())
    if not tiny or implementation == "xla":  # the interpreter of kernels does such transfers itself
        try:
            with jax.transfer_guard("disallow"):
                state = one(state)
            passed = True
        except jax.errors.JaxRuntimeError:
            state, passed = one(begin()), False
        tell("check", name=f"advance, {implementation}: nothing crosses to or from the host", passed=passed)

    def dispatched(_: int) -> Any:
        nonlocal state
        state = one(state)
        return state

    yield "one dispatch", seconds_of(dispatched, repeats)
    if implementation == "xla" and not tiny:
        state = begin()

        def eager(_: int) -> Any:
            nonlocal state
            state = step(state, None)[0]
            return state

        yield "op by op", seconds_of(eager, 1)


def _begin(batch: int) -> tuple[sequences.SequenceBatch, grants.Grant]:
    """Rows of one block each, a token short of full or not, and a grant that lasts for all steps that are timed."""
    width, size = 256, 16
    empty = sequences.init(batch, width, block_size=size, pool_blocks=batch * (width + 1))
    blocks = jnp.arange(batch * width, dtype=jnp.int32)
    running = dataclasses.replace(
        empty,
        block_tables=empty.block_tables.at[0, :, 0].set(blocks[:batch]),
        lengths=1 + jnp.arange(batch, dtype=jnp.int32) % size,
        num_blocks=jnp.ones(batch, jnp.int32),
    )
    return running, grants.Grant(blocks[batch:], jnp.int32(0), jnp.int32(batch * (width - 1)), jnp.int32(0))


def _new(batch: int) -> tuple[jax.Array, jax.Array]:
    """A token for each row, and what rows had before the loop."""
    return jnp.ones(batch, jnp.int32), jnp.ones(batch, jnp.int32)
