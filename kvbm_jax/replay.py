"""Replaying a trace against the real pool: how many blocks a prefix cache of a given size would have found.

Requests run one after the other, each finished before the next starts: match the longest resident prefix and hold it,
allocate the rest, register, release. Bookkeeping only; no bytes move. Runs of requests go through one compiled loop,
padded to one of a few widths.
"""

import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kvbm_jax import pool, traces
from kvbm_jax.errors import ConfigError, InvariantError
from kvbm_jax.types import Status

__all__ = ["ReplayResult", "replay", "replay_requests"]

_REQUESTS_PER_CALL = 64
_MIN_WIDTH = 32
_WIDTH_STEP = 8


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
class _Batch:
    """Requests of one call: ids u64[64, width], how many ids each has, i32[64], and how many rows are requests."""

    ids: np.ndarray
    counts: np.ndarray
    requests: int


def replay(paths: Sequence[Path], num_blocks: int, *, limit: int | None = None) -> ReplayResult:
    """Replays trace files, in order, as one stream of requests.

    Args:
      paths: the files; equal ids in two files mean the same block.
      num_blocks: blocks of the pool.
      limit: stop after this many requests in all.

    Raises:
      ConfigError: if `num_blocks` or `limit` is not positive.
      TraceError: if a file cannot be read or a line is not a request.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit is {limit}; it must be at least 1")
    requests: list[np.ndarray] = []
    for path in paths:
        left = None if limit is None else limit - len(requests)
        requests.extend(traces.read(path, limit=left))
    return replay_requests(requests, num_blocks)


def replay_requests(requests: Sequence[np.ndarray], num_blocks: int) -> ReplayResult:
    """Replays requests given as arrays of prefix-chained ids, u64[blocks] each.

    Raises:
      ConfigError: if `num_blocks` is not positive.
    """
    if num_blocks < 1:
        raise ConfigError(f"num_blocks is {num_blocks}; a pool has at least 1 block")
    device = jax.local_devices(backend="cpu")[0]
    with jax.default_device(device):
        state = pool.init(num_blocks)
        room = int(pool.release_room(state))
        batches = list(_batches(requests, room))
        for width in sorted({batch.ids.shape[1] for batch in batches}):
            _warm_up(num_blocks, width)

        totals = np.zeros((3,), np.int64)
        start = time.perf_counter()
        pushed = 0
        pending = []
        for batch in batches:
            pushes = int(batch.counts.sum())
            if pushed + pushes > room:
                state, pushed = _compact(state), 0
            pushed += pushes
            state, counts = _run(state, _split(batch.ids), batch.counts, batch.requests)
            pending.append(counts)
        for counts in pending:
            totals += np.asarray(counts)
        seconds = time.perf_counter() - start
    if pushed and int(pool.stats(state).held):
        raise InvariantError(f"{int(pool.stats(state).held)} blocks are still held after the last request")

    refs = sum(len(ids) for ids in requests)
    hits, evictions, rejected = (int(n) for n in totals)
    return ReplayResult(
        requests=len(requests),
        block_refs=refs,
        hits={"g1": hits, "g2": 0, "g3": 0},
        hit_rate=hits / refs if refs else 0.0,
        evictions=evictions,
        rejected=rejected,
        seconds=seconds,
        us_per_request=seconds / len(requests) * 1e6 if requests else 0.0,
    )


def _batches(requests: Iterable[np.ndarray], room: int) -> Iterator[_Batch]:
    """Cuts the stream into runs of requests of one padded width that fit the room of the inactive queue."""
    run: list[np.ndarray] = []
    width = pushes = 0
    for ids in requests:
        wanted = _width(len(ids))
        if run and (wanted != width or len(run) == _REQUESTS_PER_CALL or pushes + len(ids) > room):
            yield _pad(run, width)
            run, pushes = [], 0
        run.append(ids)
        width, pushes = wanted, pushes + len(ids)
    if run:
        yield _pad(run, width)


def _width(count: int) -> int:
    width = _MIN_WIDTH
    while width < count:
        width *= _WIDTH_STEP
    return width


def _pad(run: Sequence[np.ndarray], width: int) -> _Batch:
    ids = np.zeros((_REQUESTS_PER_CALL, width), np.uint64)
    counts = np.zeros((_REQUESTS_PER_CALL,), np.int32)
    for row, request in enumerate(run):
        ids[row, : len(request)] = request
        counts[row] = len(request)
    return _Batch(ids, counts, len(run))


def _split(ids: np.ndarray) -> np.ndarray:
    """Ids u64[...] as 128-bit hashes u32[..., 4]."""
    words = ids.astype("<u8").view("<u4").reshape(*ids.shape, 2)
    return np.concatenate([words, np.zeros_like(words)], axis=-1)


def _warm_up(num_blocks: int, width: int) -> None:
    """Compiles the programs of one width, by running them on an empty batch."""
    empty = _pad([], width)
    state, _ = _run(_compact(pool.init(num_blocks)), _split(empty.ids), empty.counts, 0)
    jax.tree.map(lambda leaf: leaf.block_until_ready(), state)


_compact = jax.jit(pool.compact, donate_argnums=0)


@functools.partial(jax.jit, donate_argnums=0)
def _run(
    state: pool.PoolState, hashes: jax.Array, counts: jax.Array, requests: jax.Array
) -> tuple[pool.PoolState, jax.Array]:
    """Replays the first `requests` rows; donates the state. Returns i32[3]: hits, evictions, rejected requests."""

    def body(row: jax.Array, carry: tuple[pool.PoolState, jax.Array]) -> tuple[pool.PoolState, jax.Array]:
        state, totals = carry
        state, counted = _request(state, hashes[row], counts[row])
        return state, totals + counted

    state, totals = jax.lax.fori_loop(0, requests, body, (state, jnp.zeros((3,), jnp.int32)))
    return state, totals


def _request(state: pool.PoolState, hashes: jax.Array, count: jax.Array) -> tuple[pool.PoolState, jax.Array]:
    """One request: hashes u32[W, 4], of which the first `count` are asked for."""
    width = hashes.shape[0]
    column = jnp.arange(width, dtype=jnp.int32)
    matched = pool.match(state, hashes[None], count[None])
    hits = matched.num_blocks[0]
    state, _ = pool.acquire(state, matched.block_ids)
    state, grant = pool.allocate(state, (count - hits)[None], max_blocks=width)
    granted = grant.status[0] == Status.OK
    fresh = grant.block_ids[0].at[column - hits].get(mode="clip")
    new = granted & (column >= hits) & (column < count)
    state, result = pool.register(state, jnp.where(new, fresh, state.num_blocks)[None], hashes[None])
    held = jnp.where(column < hits, matched.block_ids[0], result.block_ids[0])
    state, _ = pool.release(state, held[None])
    return state, jnp.stack([hits, grant.evicted.num_blocks, 1 - granted.astype(jnp.int32)])
