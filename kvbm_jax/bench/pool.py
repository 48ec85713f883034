"""How long the pool's bookkeeping takes for one step of a server, beside a pool in plain Python that does the same.

The server runs B sequences on a full pool. In each step B / 64 of them end and as many begin, each looking up 63 keys,
of which the first 31 are found; B / 16 cross into a new block; every block that the step before has completed is
registered. So a sequence lives for 64 steps, begins with 64 blocks and ends with 68. `kvbm_jax.step` does that as one
jitted call, waited for, or many times inside `lax.scan`; plans are on the device beforehand, as they are Python objects
beforehand for the baseline. `compact`, which is due at most once in as many releases as the pool has blocks, is called
between the trials and not timed.

Axes: B rows, K steps, R = B / 64 rows that begin.
"""

import dataclasses
import functools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvbm_jax import pool, sequences
from kvbm_jax.bench.timing import Row, Timing
from kvbm_jax.errors import BenchError
from kvbm_jax.step import StepPlan, StepResult, step

__all__ = ["BATCHES", "measure"]

BATCHES = (64, 256, 1024)
"""Rows of the batch, B, of each pair of cases."""

_BLOCK_SIZE = 16
_LIFE = 64  # steps of a sequence
_KEYS = 63  # whole blocks of a prompt
_SHARED = 31  # of them begin many prompts
_PREFIXES = 64  # different beginnings
_CROSSINGS = (8, 24, 40, 56)  # ages at which a sequence begins a new block
_PROMPT = _KEYS * _BLOCK_SIZE + 1  # tokens
_WIDTH = _KEYS + 1 + len(_CROSSINGS)
_STEPS = 64  # of a trial
_PERIOD = _LIFE // len(_CROSSINGS)  # steps from one crossing of a sequence to the next

type _Carry = tuple[pool.PoolState, sequences.SequenceBatch]


def measure(timing: Timing, num_blocks: int, batches: Sequence[int] | None = None) -> list[Row]:
    """Times a step for each B, as a call of its own and inside a scan.

    Args:
      timing: how.
      num_blocks: blocks of the pool, enough for the largest B.
      batches: each B; None for `BATCHES`.

    Raises:
      BenchError: The plain pool found or evicted other numbers of blocks.
    """
    rows = []
    for batch in BATCHES if batches is None else batches:
        ours, plain = _Ours(num_blocks, batch), _Plain(num_blocks, batch)
        for i in range(trials := _trials_to_fill(num_blocks, batch)):
            timing.progress(f"batch {batch}: filling the pool, {i} of {trials}")
            ours.fill()
            plain.trial()
        for how, trial in (("one dispatch", ours.dispatched), ("in scan", ours.scanned)):
            case = f"batch {batch:,}, {how}"
            rows.append(timing.compare(case, trial, "pool in plain Python", plain.trial))
            if ours.counts != plain.counts:
                raise BenchError(
                    f"{case}: {ours.counts.found:,} blocks found and {ours.counts.evicted:,} evicted; in plain Python "
                    f"{plain.counts.found:,} and {plain.counts.evicted:,}"
                )
    return rows


@dataclasses.dataclass
class _Counts:
    """What a pool has done so far, in blocks."""

    found: int = 0
    evicted: int = 0


def _trials_to_fill(num_blocks: int, batch: int) -> int:
    steps = -(-num_blocks // (batch // _LIFE * (_WIDTH - _SHARED)))
    return -(-steps // _STEPS) + 1


class _Load:
    """The plans of steps, in their order.

    Args:
      batch: B.
    """

    def __init__(self, batch: int) -> None:
        self._batch = batch
        self._rng = np.random.default_rng(batch)
        self._prefixes = self._hashes(_PREFIXES, _SHARED)
        self._present = self._hashes(batch, _WIDTH)  # of all the blocks that each row has or will have
        self._now = 0

    def take(self) -> list[dict[str, NDArray[Any]]]:
        """Returns the fields of the next K plans."""
        return [self._next() for _ in range(_STEPS)]

    def _next(self) -> dict[str, NDArray[Any]]:
        now, count = self._now, self._batch // _LIFE
        self._now += 1
        rows = self._rows(now)
        first = now * count + np.arange(count)  # each beginning is met once, then they are drawn at random
        chosen = np.where(first < _PREFIXES, first, self._rng.integers(0, _PREFIXES, count)) % _PREFIXES
        self._present[rows] = self._hashes(count, _WIDTH)
        self._present[rows, :_SHARED] = self._prefixes[chosen]
        # What was met for the first time a step ago is registered from its beginning.
        place = (0 if (now - 1) * count < _PREFIXES else _SHARED) + np.arange(_KEYS - _SHARED)
        complete: list[tuple[NDArray[Any], NDArray[Any]]]
        complete = [(self._rows(now - 1)[:, None], place[None, :])]
        complete += [(self._rows(now - 1 - age), np.full((), _KEYS + i)) for i, age in enumerate(_CROSSINGS)]
        pairs = [tuple(part.ravel() for part in np.broadcast_arrays(*pair)) for pair in complete]
        complete_rows, places = (np.concatenate(parts).astype(np.int32) for parts in zip(*pairs, strict=True))
        growing = np.concatenate([self._rows(now - age) for age in _CROSSINGS])
        return {
            "ending": rows,
            "starting": rows,
            "hashes": self._present[rows, :_KEYS],
            "num_hashes": np.full(count, _KEYS, np.int32),
            "num_tokens": np.full(count, _PROMPT, np.int32),
            "growing": growing,
            "new_tokens": np.full(len(growing), _BLOCK_SIZE, np.int32),
            "complete_rows": complete_rows,
            "complete_places": places,
            "complete_hashes": self._present[complete_rows % self._batch, places],
        }

    def _rows(self, begun: int) -> NDArray[np.int32]:
        """The rows that began at that step, i32[R]; B if that was before the first."""
        count = self._batch // _LIFE
        rows = begun % _LIFE * count + np.arange(count)
        return np.where(begun < 0, self._batch, rows).astype(np.int32)

    def _hashes(self, *shape: int) -> NDArray[np.uint32]:
        return self._rng.integers(0, 1 << 32, (*shape, 4), np.uint32)


class _Ours:
    """The pool of this library; its methods are trials, in seconds a step.

    Args:
      num_blocks: blocks of the pool.
      batch: B.
    """

    def __init__(self, num_blocks: int, batch: int) -> None:
        self.counts = _Counts()
        self._load = _Load(batch)
        self._carry = (
            pool.init(num_blocks),
            sequences.init(batch, _WIDTH, block_size=_BLOCK_SIZE, pool_blocks=num_blocks),
        )
        # A server bounds the tokens of a step: here what its prompts need whose beginnings are found, but for one.
        budget = batch // _LIFE * (_KEYS + 1 - _SHARED) + _SHARED + batch // _PERIOD
        bounded = functools.partial(_step, max_fresh=budget)
        self._step = jax.jit(bounded, donate_argnums=0)
        self._scan = jax.jit(functools.partial(jax.lax.scan, bounded), donate_argnums=0)
        self._fill = jax.jit(functools.partial(jax.lax.scan, _step), donate_argnums=0)
        self._compact = jax.jit(pool.compact, donate_argnums=0)

    def dispatched(self) -> float:
        """A call for each step, waited for."""
        plans = [_ready(StepPlan(**jax.tree.map(jnp.asarray, fields))) for fields in self._take()]
        carry, results = _ready(self._carry), []
        begun = time.perf_counter()
        for plan in plans:
            carry, result = self._step(carry, plan)
            result.start_status.block_until_ready()
            results.append(result)
        seconds = time.perf_counter() - begun
        self._carry = carry
        for result in results:
            self._count(result)
        return seconds / _STEPS

    def fill(self) -> None:
        """Steps that are not timed, with as many new blocks as their prompts need before anything is cached."""
        self._scanned(self._fill)

    def scanned(self) -> float:
        """All steps in one call."""
        return self._scanned(self._scan)

    def _scanned(self, scan: Callable[[_Carry, StepPlan], tuple[_Carry, StepResult]]) -> float:
        taken = self._take()
        plans = _ready(StepPlan(**{name: jnp.asarray(np.stack([plan[name] for plan in taken])) for name in taken[0]}))
        carry = _ready(self._carry)
        begun = time.perf_counter()
        self._carry, results = _ready(scan(carry, plans))
        seconds = time.perf_counter() - begun
        self._count(results)
        return seconds / _STEPS

    def _take(self) -> list[dict[str, NDArray[Any]]]:
        """Returns the next plans, after making room for what they release."""
        state, running = self._carry
        self._carry = self._compact(state), running
        return self._load.take()

    def _count(self, result: StepResult) -> None:
        failed = np.any(np.asarray(result.start_status)) or np.any(np.asarray(result.register_status))
        if failed or np.any(np.asarray(result.grow_status)):
            raise BenchError("a step was not done; the pool is too small for this batch")
        self.counts.found += int(np.sum(result.num_cached)) // _BLOCK_SIZE
        self.counts.evicted += int(np.sum(result.evicted.num_blocks))


def _ready[T](tree: T) -> T:
    """Waits for all arrays of a tree."""
    for leaf in jax.tree.leaves(tree):
        leaf.block_until_ready()
    return tree


def _step(carry: _Carry, plan: StepPlan, *, max_fresh: int | None = None) -> tuple[_Carry, StepResult]:
    state, running, result = step(*carry, plan, max_fresh=max_fresh)
    return (state, running), result


class _Plan(NamedTuple):
    """A plan in Python's own types."""

    ending: list[int]
    starting: list[tuple[int, list[bytes], int]]  # row, hashes, tokens
    growing: list[tuple[int, int]]  # row, tokens
    complete: list[tuple[int, int, bytes]]  # row, place, hash


class _Plain:
    """The baseline: the same pool and sequences as lists and dicts, the fastest way that Python offers.

    Args:
      num_blocks: blocks of the pool.
      batch: B.
    """

    def __init__(self, num_blocks: int, batch: int) -> None:
        self.counts = _Counts()
        self._batch = batch
        self._load = _Load(batch)
        self._reset = list(range(num_blocks - 1, -1, -1))
        self._refs = [0] * num_blocks
        self._generations = [0] * num_blocks
        self._hashes = [b""] * num_blocks  # of each block; empty if it has none
        self._blocks: dict[bytes, int] = {}  # block of each hash
        self._inactive: OrderedDict[int, None] = OrderedDict()
        self._tables: list[list[int]] = [[] for _ in range(batch)]
        self._lengths = [0] * batch
        self._evicted: list[tuple[int, bytes]] = []  # by the present step

    def trial(self) -> float:
        """K steps, in seconds a step."""
        plans = list(self._plans())
        begun = time.perf_counter()
        evicted = [self._step(plan) for plan in plans]
        seconds = time.perf_counter() - begun
        self.counts.evicted += sum(map(len, evicted))
        return seconds / _STEPS

    def _plans(self) -> Iterator[_Plan]:
        for fields in self._load.take():
            named = [[block.tobytes() for block in row] for row in fields["hashes"]]
            complete = [block.tobytes() for block in fields["complete_hashes"]]
            ending, starting, tokens, growing, new, rows, places = (
                fields[name].tolist()
                for name in (
                    "ending",
                    "starting",
                    "num_tokens",
                    "growing",
                    "new_tokens",
                    "complete_rows",
                    "complete_places",
                )
            )
            yield _Plan(
                ending,
                list(zip(starting, named, tokens, strict=True)),
                [pair for pair in zip(growing, new, strict=True) if pair[0] < self._batch],
                [entry for entry in zip(rows, places, complete, strict=True) if entry[0] < self._batch],
            )

    def _step(self, plan: _Plan) -> list[tuple[int, bytes]]:
        """Carries out a plan; returns what it evicted."""
        self._evicted = []
        tables, refs, hashes, blocks, inactive = self._tables, self._refs, self._hashes, self._blocks, self._inactive
        for row in plan.ending:
            self._release(reversed(tables[row]))
            tables[row] = []
        prefixes = []
        for _, named, _ in plan.starting:
            found = []
            for name in named:
                block = blocks.get(name)
                if block is None:
                    break
                found.append(block)
            prefixes.append(found)
        for found in prefixes:
            for block in found:
                if not refs[block]:
                    del inactive[block]
                refs[block] += 1
        full = False
        for (row, _, tokens), found in zip(plan.starting, prefixes, strict=True):
            fresh = -(-tokens // _BLOCK_SIZE) - len(found)
            full = full or fresh > len(self._reset) + len(inactive)
            if full:
                self._release(reversed(found))
                continue
            self.counts.found += len(found)
            tables[row] = found + self._take(fresh)
            self._lengths[row] = tokens
        for row, tokens in plan.growing:
            length = self._lengths[row] + tokens
            fresh = -(-length // _BLOCK_SIZE) - len(tables[row])
            full = full or fresh > len(self._reset) + len(inactive)
            if not full:
                if fresh > 0:
                    tables[row] += self._take(fresh)
                self._lengths[row] = length
        for row, place, name in plan.complete:
            block = tables[row][place]
            canonical = blocks.setdefault(name, block)
            if canonical == block:
                hashes[block] = name
                continue
            if not refs[canonical]:
                del inactive[canonical]
            refs[canonical] += 1
            tables[row][place] = canonical
            self._release((block,))
        return self._evicted

    def _release(self, blocks: Iterable[int]) -> None:
        refs, hashes, inactive, reset = self._refs, self._hashes, self._inactive, self._reset
        for block in blocks:
            refs[block] -= 1
            if not refs[block]:
                if hashes[block]:
                    inactive[block] = None
                else:
                    reset.append(block)

    def _take(self, count: int) -> list[int]:
        reset, hashes, blocks, inactive = self._reset, self._hashes, self._blocks, self._inactive
        refs, generations, evicted = self._refs, self._generations, self._evicted
        from_reset = min(count, len(reset))
        taken = [reset.pop() for _ in range(from_reset)]
        for _ in range(count - from_reset):
            block, _ = inactive.popitem(last=False)
            name = hashes[block]
            del blocks[name]
            hashes[block] = b""
            evicted.append((block, name))
            taken.append(block)
        for block in taken:
            refs[block] = 1
            generations[block] += 1
        return taken
