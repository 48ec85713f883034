"""Replaying a trace against the real pool: how many blocks a prefix cache of a given size would have found.

Requests run one after the other, each finished before the next starts: match the longest resident prefix and hold it,
allocate the rest, register, release. Bookkeeping only; no bytes move. Many requests go through one compiled loop, each
padded to one of a few widths. Tiers below the device are victim tiers, which never change what the device does: they
are played afterwards, from the hits and evictions that the loop reports.

An eviction policy sees each request as one call of `hit` after the allocation and one of `registered`. A trace carries
no priorities: the nearer a block is to the beginning of its prompt, the higher the one it gets.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kvbm_jax import eviction, policies, pool, traces
from kvbm_jax.errors import ConfigError, InvariantError
from kvbm_jax.offload.victims import VictimTiers
from kvbm_jax.padding import CLIP
from kvbm_jax.programs import cpu_device
from kvbm_jax.protocols import Tier

__all__ = ["ComparedReplay", "ReplayResult", "compare", "replay", "replay_requests"]

_IDS_PER_CALL = 1 << 16  # with padding
_REQUESTS_PER_CALL = 256  # at most
_MIN_WIDTH = 64
_WIDTH_STEP = 4

type Progress = Callable[[int, int], object]
"""Is told how much is done, and of how much."""


def _silent(done: int, total: int) -> None:
    """Tells nobody."""


@dataclasses.dataclass(frozen=True)
class ReplayResult:
    """Counts of one replay.

    `hits` is by tier, in blocks. `seconds` is the replay alone: parsing and compilation are not in it.
    """

    requests: int
    block_refs: int
    hits: dict[str, int]
    hit_rate: float
    evictions: int
    rejected: int
    seconds: float
    us_per_request: float

    def as_dict(self) -> dict[str, object]:
        """The result as one JSON object."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class ComparedReplay:
    """One replay of a comparison."""

    policy: str
    num_blocks: int
    result: ReplayResult

    def as_dict(self) -> dict[str, object]:
        """The replay as one JSON object."""
        return {"policy": self.policy, "num_blocks": self.num_blocks, **self.result.as_dict()}


@dataclasses.dataclass(frozen=True)
class _Batch:
    """Requests of one call."""

    ids: np.ndarray  # u64[rows, width]
    files: np.ndarray  # u32[rows]: the file of each request
    counts: np.ndarray  # i32[rows]: how many ids each has
    requests: int  # how many rows are requests


@dataclasses.dataclass
class _Totals:
    """What the requests so far add up to."""

    hits: dict[Tier, int]
    evictions: int = 0
    rejected: int = 0


def replay(
    paths: Sequence[Path],
    num_blocks: int,
    *,
    host_blocks: int = 0,
    disk_blocks: int = 0,
    policy: str = "lru",
    limit: int | None = None,
    shared_ids: bool = False,
    progress: Progress = _silent,
) -> ReplayResult:
    """Replays trace files, in order, as one stream of requests.

    Args:
      paths: the files.
      num_blocks: blocks of the pool.
      host_blocks: blocks of tier G2, 0 for none.
      disk_blocks: blocks of tier G3, 0 for none.
      policy: which blocks the pool evicts first: a name that `kvbm_jax.eviction` finds.
      limit: stop after this many requests in all.
      shared_ids: whether equal ids in two files mean the same block.
      progress: is told how many requests have been replayed, and of how many.

    Raises:
      ConfigError: if a size, `limit` or `policy` is out of range.
      TraceError: if a file cannot be read or a line is not a request.
    """
    requests, files = _read(paths, limit, shared_ids)
    return replay_requests(
        requests,
        num_blocks,
        files=files,
        host_blocks=host_blocks,
        disk_blocks=disk_blocks,
        policy=eviction.find(policy),
        progress=progress,
    )


def compare(
    paths: Sequence[Path],
    num_blocks: Sequence[int],
    names: Sequence[str],
    *,
    host_blocks: int = 0,
    disk_blocks: int = 0,
    limit: int | None = None,
    shared_ids: bool = False,
    progress: Progress = _silent,
) -> list[ComparedReplay]:
    """Replays trace files once for every policy and size of the pool.

    Args:
      paths: the files.
      num_blocks: sizes of the pool.
      names: policies, as `kvbm_jax.eviction` finds them.
      host_blocks: blocks of tier G2, 0 for none.
      disk_blocks: blocks of tier G3, 0 for none.
      limit: stop after this many requests in all.
      shared_ids: whether equal ids in two files mean the same block.
      progress: is told how many requests have been replayed in all, and of how many.

    Returns:
      The replays, policy by policy.

    Raises:
      ConfigError: if a size, `limit` or a policy is out of range.
      TraceError: if a file cannot be read or a line is not a request.
    """
    chosen = {name: eviction.find(name) for name in names}
    requests, files = _read(paths, limit, shared_ids)
    cases = list(itertools.product(chosen, num_blocks))
    rows = []
    for number, (name, size) in enumerate(cases):

        def told(done: int, total: int, before: int = number) -> None:
            progress(before * total + done, len(cases) * total)

        result = replay_requests(
            requests,
            size,
            files=files,
            host_blocks=host_blocks,
            disk_blocks=disk_blocks,
            policy=chosen[name],
            progress=told,
        )
        rows.append(ComparedReplay(name, size, result))
    return rows


def _read(paths: Sequence[Path], limit: int | None, shared_ids: bool) -> tuple[list[np.ndarray], list[int]]:
    """The requests of all files, and the number of each request's file."""
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1")
    requests: list[np.ndarray] = []
    files: list[int] = []
    for number, path in enumerate(paths):
        left = None if limit is None else limit - len(requests)
        requests.extend(traces.read(path, limit=left))
        files += [0 if shared_ids else number] * (len(requests) - len(files))
    return requests, files


def replay_requests(
    requests: Sequence[np.ndarray],
    num_blocks: int,
    *,
    files: Sequence[int] | None = None,
    host_blocks: int = 0,
    disk_blocks: int = 0,
    policy: policies.EvictionPolicy | None = None,
    progress: Progress = _silent,
) -> ReplayResult:
    """Replays requests given as arrays of prefix-chained ids, u64[blocks] each.

    Args:
      requests: the ids of each request.
      num_blocks: blocks of the pool.
      files: a number for each request; ids are compared within equal numbers only. None: with all.
      host_blocks: blocks of tier G2, 0 for none.
      disk_blocks: blocks of tier G3, 0 for none.
      policy: which blocks the pool evicts first; None: the least recently released. Each is compiled once.
      progress: is told how many requests have been replayed, and of how many.

    Raises:
      ConfigError: if `num_blocks` is not positive, or the size of a tier negative.
    """
    if num_blocks < 1:
        raise ConfigError(f"num_blocks is {num_blocks}; a pool has at least 1 block")
    for name, blocks in (("host_blocks", host_blocks), ("disk_blocks", disk_blocks)):
        if blocks < 0:
            raise ConfigError(f"{name} is {blocks}; it must be at least 0")
    tiers = (
        VictimTiers[tuple[int, int]]([(Tier.G2, host_blocks), (Tier.G3, disk_blocks)])
        if host_blocks or disk_blocks
        else None
    )
    chosen = policies.named("lru") if policy is None else policy
    totals = _Totals(dict.fromkeys((Tier.G1, Tier.G2, Tier.G3), 0))
    with jax.default_device(cpu_device()):
        state, memory = pool.init(num_blocks), chosen.init(num_blocks)
        room = int(pool.release_room(state))
        # After a compaction the queue may hold all of the pool, so a batch must fit what is left then.
        numbered = zip(requests, itertools.repeat(0) if files is None else files, strict=files is not None)
        widths = _widths(max(map(len, requests), default=0))
        batches = list(_batches(numbered, widths[-1], num_blocks, room - num_blocks))
        run = functools.partial(_run, widths=widths, policy=chosen, with_evicted=tiers is not None)
        warm = _compact(pool.init(num_blocks)), chosen.init(num_blocks)
        empty = _pad([], widths[-1])
        jax.device_get(run(*warm, _split(empty), empty.counts, 0)[2])

        start = time.perf_counter()
        done = []
        for batch in batches:
            pushes = int(np.minimum(batch.counts, num_blocks).sum())
            if pushes > room:
                state = _compact(state)
                room = int(pool.release_room(state))
            room -= pushes
            state, memory, report = run(state, memory, _split(batch), batch.counts, batch.requests)
            done.append((batch, report))
        replayed = 0
        for batch, report in done:
            _add(totals, batch, jax.device_get(report), tiers)
            replayed += batch.requests
            progress(replayed, len(requests))
        seconds = time.perf_counter() - start
    held = int(pool.stats(state).held)
    if held:
        raise InvariantError(f"{held} blocks are still held after the last request")

    refs = sum(len(ids) for ids in requests)
    return ReplayResult(
        requests=len(requests),
        block_refs=refs,
        hits={tier.label: count for tier, count in totals.hits.items()},
        hit_rate=sum(totals.hits.values()) / refs if refs else 0.0,
        evictions=totals.evictions,
        rejected=totals.rejected,
        seconds=seconds,
        us_per_request=seconds / len(requests) * 1e6 if requests else 0.0,
    )


def _add(totals: _Totals, batch: _Batch, report: "_Report", tiers: VictimTiers[tuple[int, int]] | None) -> None:
    """Adds a batch to the totals, and plays it through the lower tiers."""
    totals.hits[Tier.G1] += int(report.hits.sum())
    totals.evictions += int(report.evictions.sum())
    totals.rejected += int(report.rejected.sum())
    if tiers is None:
        return
    evicted_ids = np.ascontiguousarray(report.evicted[..., :2]).view("<u8")[..., 0]
    for row in range(batch.requests):
        hits = int(report.hits[row])
        below = []
        for key in zip(itertools.repeat(int(batch.files[row])), batch.ids[row, hits : batch.counts[row]].tolist()):
            tier = tiers.locate(key)
            if tier is None:
                break
            below.append((key, tier))
        for key, tier in below:
            tiers.touch(key, tier)
            totals.hits[tier] += 1
        gone = slice(report.evictions[row])
        for key in zip(report.evicted[row, gone, 2].tolist(), evicted_ids[row, gone].tolist(), strict=True):
            tiers.offer(key)


def _batches(requests: Iterable[tuple[np.ndarray, int]], width: int, num_blocks: int, room: int) -> Iterator[_Batch]:
    """Cuts the stream into runs of requests that fit a call and the room of the inactive queue."""
    run: list[tuple[np.ndarray, int]] = []
    pushes = 0
    for ids, file in requests:
        may_push = min(len(ids), num_blocks)
        if run and (len(run) == _rows(width) or pushes + may_push > room):
            yield _pad(run, width)
            run, pushes = [], 0
        run.append((ids, file))
        pushes += may_push
    if run:
        yield _pad(run, width)


def _rows(width: int) -> int:
    """Requests of a call."""
    return max(min(_REQUESTS_PER_CALL, _IDS_PER_CALL // width), 1)


def _widths(most: int) -> tuple[int, ...]:
    """What requests of up to `most` ids are padded to, ascending."""
    widths = [_MIN_WIDTH]
    while widths[-1] < most:
        widths.append(widths[-1] * _WIDTH_STEP)
    return tuple(widths)


def _pad(run: Sequence[tuple[np.ndarray, int]], width: int) -> _Batch:
    rows = _rows(width)
    ids = np.zeros((rows, width), np.uint64)
    files = np.zeros((rows,), np.uint32)
    counts = np.zeros((rows,), np.int32)
    for row, (request, file) in enumerate(run):
        ids[row, : len(request)] = request
        files[row] = file
        counts[row] = len(request)
    return _Batch(ids, files, counts, len(run))


def _split(batch: _Batch) -> np.ndarray:
    """The ids as 128-bit hashes u32[rows, width, 4]: low and high word of the id, its file, 0."""
    words = batch.ids.astype("<u8").view("<u4").reshape(*batch.ids.shape, 2)
    files = np.broadcast_to(batch.files[:, None, None], (*batch.ids.shape, 1))
    return np.concatenate([words, files, np.zeros_like(files)], axis=-1)


_compact = jax.jit(pool.compact, donate_argnums=0)


class _Report(NamedTuple):
    """What became of the requests of a batch."""

    hits: jax.Array  # i32[rows]
    evictions: jax.Array  # i32[rows]
    rejected: jax.Array  # i32[rows]
    evicted: jax.Array  # u32[rows, width, 3]: hashes in order of eviction, or u32[rows, 0, 3] if nobody asks


type _Carry = tuple[jax.Array, pool.PoolState, Any, _Report]


@functools.partial(jax.jit, donate_argnums=(0, 1), static_argnames=("widths", "policy", "with_evicted"))
def _run(
    state: pool.PoolState,
    memory: Any,
    hashes: jax.Array,
    counts: jax.Array,
    requests: jax.Array,
    *,
    widths: tuple[int, ...],
    policy: policies.EvictionPolicy,
    with_evicted: bool,
) -> tuple[pool.PoolState, Any, _Report]:
    """Replays the first `requests` rows of hashes u32[rows, width, 4]; donates the state and the policy's memory."""
    rows, most = hashes.shape[:2]
    zeros = jnp.zeros((rows,), jnp.int32)
    report = _Report(zeros, zeros, zeros, jnp.zeros((rows, most if with_evicted else 0, 3), jnp.uint32))

    def left(carry: _Carry) -> jax.Array:
        return carry[0] < requests

    def run_of(low: int, width: int, carry: _Carry) -> _Carry:
        """Replays requests of more than `low` and up to `width` ids until another comes."""

        def goes_on(carry: _Carry) -> jax.Array:
            count = counts.at[carry[0]].get(**CLIP)
            return left(carry) & (count > low) & (count <= width)

        def one(carry: _Carry) -> _Carry:
            row, state, memory, report = carry
            state, memory, hits, evicted = _request(state, memory, hashes[row, :width], counts[row], policy)
            report = _Report(
                report.hits.at[row].set(hits),
                report.evictions.at[row].set(evicted.num_blocks),
                report.rejected.at[row].set((counts[row] > state.num_blocks).astype(jnp.int32)),
                report.evicted.at[row, :width].set(evicted.hashes[:, :3]) if with_evicted else report.evicted,
            )
            return row + 1, state, memory, report

        return jax.lax.while_loop(goes_on, one, carry)

    def runs(carry: _Carry) -> _Carry:
        # A loop for each width: a choice within one loop would copy the state.
        for low, width in zip((-1, *widths), widths, strict=False):
            carry = run_of(low, width, carry)
        return carry

    _, state, memory, report = jax.lax.while_loop(left, runs, (jnp.int32(0), state, memory, report))
    return state, memory, report


def _request(
    state: pool.PoolState, memory: Any, hashes: jax.Array, count: jax.Array, policy: policies.EvictionPolicy
) -> tuple[pool.PoolState, Any, jax.Array, pool.Evicted]:
    """One request: hashes u32[width, 4], of which the first `count` are asked for.

    Nobody else holds a block, so that a request fits if the pool has as many. One that does not holds and releases what
    it has found, as the rule has it.

    Returns:
      The pool, the policy's memory, hits i32[] and what was evicted.
    """
    width = hashes.shape[0]
    none = jnp.int32(state.num_blocks)
    column = jnp.arange(width, dtype=jnp.int32)
    matched = pool.match(state, hashes[None], count[None])
    found, hits = matched.block_ids[0], matched.num_blocks[0]
    fits = count <= state.num_blocks
    state, begun = pool.exchange(state, jnp.zeros((0,), jnp.int32), found[None])
    scores = policies.bind(policy, memory)
    wanted = jnp.where(fits, count - hits, 0)
    state, drawn = pool.admit(state, begun, wanted[None], max_count=width, scores=scores)
    memory = policy.hit(memory, state, found)
    fresh = drawn.block_ids.at[column - hits].get(**CLIP)
    fresh = jnp.where(fits & (column >= hits) & (column < count), fresh, none)
    state, entered = pool.enter(state, fresh, pool.keys_of(hashes, 0))
    duplicate = entered.canonical != fresh
    state = pool.give_up(state, jnp.where(duplicate, fresh, none), jnp.where(duplicate, entered.canonical, none))
    held = jnp.where(column < hits, found, entered.canonical)
    told = policies.Registered(
        jnp.where(entered.registered, held, none),
        jnp.where(column > 0, jnp.roll(held, 1), none),
        column,
        ~column.astype(jnp.uint32),
    )
    memory = policy.registered(memory, state, told)
    return pool.drop(state, held[::-1]), memory, hits, drawn.evicted
