"""Three workers on one host and what sharing their blocks is worth, on a trace: `python -m benchmarks.workers`.

Each worker is a process with a `BlockManager`: its blocks are written, evicted to host memory, pulled by others over
the engine that is there, and compared byte for byte with what they should hold whenever they are found. Only the model
is left out: its step writes blocks whose contents follow from the trace's ids. A trace's block of 512 tokens is one of
4 here.

    parent: trace ──> choice of a worker ──> worker 0, 1, 2: start, compare what was found, write the rest, register
               PrefixIndex <── events, NATS <──┘

Four ways stand beside each other: one worker with the memory of all; several, each for itself, in turn; several that
share, in turn; and several that share, chosen by overlap and load. Sharing is asked to come within 2 points of the one.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import connection as pipes
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvbm_jax import traces
from kvbm_jax.events import PrefixIndex, Subscription
from kvbm_jax.hashing import hash_sequence

__all__ = ["WAYS", "Result", "Sizes", "Way", "main", "play"]

_BLOCK_SIZE = 4
_POINTS = 0.02  # that sharing may lie below the one large worker
_WIDTH = 32  # of the smallest program; others are twice as wide, and so on
_PATIENCE = 60.0


class Way(NamedTuple):
    """A way to serve a trace."""

    name: str
    workers: int
    memory: int  # of each, in worker's memories
    sharing: bool
    by_overlap: bool


WAYS = (
    Way("one worker, 3 x memory", 1, 3, sharing=False, by_overlap=False),
    Way("3 workers apart, in turn", 3, 1, sharing=False, by_overlap=False),
    Way("3 workers sharing, in turn", 3, 1, sharing=True, by_overlap=False),
    Way("3 workers sharing, by overlap and load", 3, 1, sharing=True, by_overlap=True),
)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Memory of one worker, in blocks."""

    device_blocks: int = 500
    host_blocks: int = 4_500


@dataclasses.dataclass(frozen=True)
class Result:
    """What came of a trace.

    Attributes:
      way: how it was served.
      requests: how many there were.
      block_refs: their blocks.
      hits: by tier, in blocks; G4 are those of peers.
      rejected: requests that no worker has room for.
      wrong: blocks that were found with other bytes than were written.
      busiest: the largest share of one worker in all requests.
      seconds: it took.
    """

    way: str
    requests: int
    block_refs: int
    hits: dict[str, int]
    rejected: int
    wrong: int
    busiest: float
    seconds: float

    @property
    def hit_rate(self) -> float:
        """All hits over all blocks."""
        return sum(self.hits.values()) / max(self.block_refs, 1)


class _Answer(NamedTuple):
    """What a worker says of a request."""

    hits: dict[str, int]
    wrong: int
    rejected: bool


class _Worker:
    """A worker's process, as the parent sees it."""

    def __init__(self, name: str, way: Way, sizes: Sizes, url: str, folder: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.under_way: list[int] = []  # blocks to be computed by each request that is
        self.served = 0
        self.pipe, there = context.Pipe()
        self._process = context.Process(target=_work, args=(there, name, way, sizes, url, folder), daemon=True)
        self._process.start()
        there.close()

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(OSError):
            self.pipe.send(None)
        self._process.join(_PATIENCE)
        self._process.kill()
        self._process.join()


def play(way: Way, requests: Sequence[np.ndarray], sizes: Sizes) -> Result:
    """Serves requests, u64[blocks] each, as many at a time as there are workers."""
    hits: Counter[str] = Counter()
    rejected = wrong = refs = 0
    index = PrefixIndex()
    with _workers(way, sizes, index) as workers:
        begun = time.perf_counter()

        def take() -> None:
            nonlocal rejected, wrong
            for pipe in pipes.wait([worker.pipe for worker in workers if worker.under_way], _PATIENCE):
                worker = next(worker for worker in workers if worker.pipe is pipe)
                answer: _Answer = worker.pipe.recv()
                worker.under_way.pop(0)
                hits.update(answer.hits)
                rejected += answer.rejected
                wrong += answer.wrong

        for number, ids in enumerate(requests):
            while sum(len(worker.under_way) for worker in workers) >= len(workers):
                take()
            overlaps = _overlaps(index, ids) if way.by_overlap else {}
            if way.by_overlap:
                worker = max(workers, key=lambda one: (overlaps.get(one.name, 0) - sum(one.under_way), -one.served))
            else:
                worker = workers[number % len(workers)]
            worker.under_way.append(len(ids) - overlaps.get(worker.name, 0))
            worker.served += 1
            worker.pipe.send(ids)
            refs += len(ids)
        while any(worker.under_way for worker in workers):
            take()
        seconds = time.perf_counter() - begun
        busiest = max(worker.served for worker in workers) / max(len(requests), 1)
    return Result(way.name, len(requests), refs, dict(hits), rejected, wrong, busiest, seconds)


@contextlib.contextmanager
def _workers(way: Way, sizes: Sizes, index: PrefixIndex) -> Iterator[list[_Worker]]:
    """Starts a server and a way's workers, and has the index follow them."""
    from kvbm_jax.transports.nats_connection import NatsConnection  # noqa: PLC0415 (an extra)
    from kvbm_jax.transports.nats_server import NatsServer  # noqa: PLC0415
    from kvbm_jax.transports.nats_subscriber import NatsKvEventSubscriberConfig, subscribe_nats  # noqa: PLC0415

    with contextlib.ExitStack() as opened:
        folder = opened.enter_context(tempfile.TemporaryDirectory())
        server = opened.enter_context(NatsServer(Path(folder) / "nats"))
        events = subscribe_nats(NatsKvEventSubscriberConfig(connection=NatsConnection.from_url(server.url)))
        opened.callback(events.close)
        threading.Thread(target=_follow, args=(events, index), daemon=True).start()
        workers = []
        for number in range(way.workers):
            workers.append(_Worker(f"w{number}", way, sizes, server.url, folder))
            opened.callback(workers[-1].close)
        for worker in workers:
            worker.pipe.recv()
        yield workers


def _follow(events: Subscription, index: PrefixIndex) -> None:
    for item in events:
        index.apply(item)


def _tokens(ids: np.ndarray) -> list[int]:
    """Tokens of a request, and one more, which is always computed."""
    tokens: list[int] = (ids[:, None].astype(np.uint32) * _BLOCK_SIZE + np.arange(_BLOCK_SIZE)).ravel().tolist()
    return [*tokens, 0]


def _overlaps(index: PrefixIndex, ids: np.ndarray) -> dict[str, int]:
    """How many leading blocks each worker holds of a request."""
    found = index.find_matches(hash_sequence(_tokens(ids), _BLOCK_SIZE))
    return {holder.worker_id: overlap.blocks for holder, overlap in found.items()}


def _work(pipe: pipes.Connection, name: str, way: Way, sizes: Sizes, url: str, folder: str) -> None:
    """A worker: serves each request that comes through the pipe."""
    os.environ["XDG_RUNTIME_DIR"] = folder  # where the workers' common token is
    from kvbm_jax import BlockManager, KvBlockManagerConfig  # noqa: PLC0415 (the parent has no use for JAX)

    config = KvBlockManagerConfig(
        block_size=_BLOCK_SIZE,
        num_blocks=sizes.device_blocks * way.memory,
        num_layers=2,
        num_kv_heads=2,
        head_dim=128,
        dtype="float32",
        enable_offload=True,
        host_blocks=sizes.host_blocks * way.memory,
        model_id="trace",
        worker_id=name,
        events="nats",
        events_url=url,
        peers="nats" if way.sharing else "none",
    )
    with BlockManager(config, max_sequences=1) as manager:
        pipe.send(None)
        while (ids := pipe.recv()) is not None:
            pipe.send(_serve(manager, ids))


def _serve(manager: Any, ids: np.ndarray) -> _Answer:
    from kvbm_jax.errors import OutOfBlocksError, SequenceTooLongError  # noqa: PLC0415

    try:
        seq = manager.start(_tokens(ids))
    except (OutOfBlocksError, SequenceTooLongError):
        return _Answer({}, 0, rejected=True)
    with seq:
        found = seq.num_cached // _BLOCK_SIZE
        table = np.asarray(manager.sequences.block_tables)[0, seq.row]
        compare, write = _programs()
        width = max(_WIDTH, 1 << (len(ids) - 1).bit_length())
        blocks = np.full((width,), manager.layout.num_blocks, np.int32)
        blocks[: len(ids)] = table[: len(ids)]
        words = np.zeros((width,), np.uint32)
        words[: len(ids)] = ids
        here = np.arange(width) < found
        wrong = manager.run(compare, np.where(here, blocks, manager.layout.num_blocks), words)
        manager.run(write, np.where(here, manager.layout.num_blocks, blocks), words)
        manager.register(seq)
        hits = {tier.label: tokens // _BLOCK_SIZE for tier, tokens in seq.hits.items() if tokens}
        return _Answer(hits, int(wrong), rejected=False)


@functools.cache
def _programs() -> tuple[Any, Any]:
    """The model's steps: what compares blocks i32[W] with what u32[W] ids make them, and what writes them."""
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    from kvbm_jax import cache as kv  # noqa: PLC0415

    def contents(layout: Any, words: jax.Array) -> jax.Array:
        shape = (layout.num_layers, layout.components, layout.block_size, layout.num_kv_heads, layout.head_dim)
        places = jnp.arange(np.prod(shape), dtype=jnp.uint32)
        mixed = (words[:, None] * jnp.uint32(2654435761) + places * jnp.uint32(40503)) >> 9
        return mixed.astype(jnp.float32).reshape(-1, *shape)

    def compare(cache: kv.KVCache, block_ids: jax.Array, words: jax.Array) -> tuple[kv.KVCache, jax.Array]:
        found = kv.gather_blocks(cache, block_ids)
        same = (found == contents(cache.layout, words)).reshape(len(words), -1).all(1)
        return cache, ((block_ids < cache.layout.num_blocks) & ~same).sum()

    def write(cache: kv.KVCache, block_ids: jax.Array, words: jax.Array) -> tuple[kv.KVCache, None]:
        return kv.scatter_blocks(cache, block_ids, contents(cache.layout, words)), None

    return jax.jit(compare, donate_argnums=0), jax.jit(write, donate_argnums=0)


def table(results: Sequence[Result]) -> str:
    """Lays results out as a Markdown table."""
    lines = [
        "| way | hit rate | device | host | peers | computed | rejected | wrong | busiest worker | seconds |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        hits = [result.hits.get(tier, 0) for tier in ("g1", "g2", "g4")]
        computed = result.block_refs - sum(hits)
        cells = [result.way, f"{result.hit_rate:.2%}", *(f"{count:,}" for count in [*hits, computed])]
        cells += [str(result.rejected), str(result.wrong), f"{result.busiest:.0%}", f"{result.seconds:,.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Serves a trace in every way; 0 if sharing reaches what is asked and every byte was right."""
    parser = argparse.ArgumentParser(prog="benchmarks.workers", description=(__doc__ or "").splitlines()[0])
    default = Path(os.environ.get("KVBM_TRACES") or "../shared/traces") / "mooncake_conversation.jsonl"
    parser.add_argument("trace", type=Path, nargs="?", default=default, help=f"default {default}")
    parser.add_argument("--limit", type=int, metavar="R", help="the first R requests only")
    parser.add_argument("--device-blocks", type=int, default=Sizes.device_blocks, metavar="N", help="of a worker")
    parser.add_argument("--host-blocks", type=int, default=Sizes.host_blocks, metavar="N", help="of a worker")
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    args = parser.parse_args(argv)
    requests = list(traces.read(args.trace, limit=args.limit))
    sizes = Sizes(args.device_blocks, args.host_blocks)
    results = []
    for way in WAYS:
        results.append(play(way, requests, sizes))
        print(f"{way.name}: {results[-1].hit_rate:.2%}, {results[-1].seconds:,.0f} s", file=sys.stderr, flush=True)
    print(table(results))
    one, _, sharing, overlap = results
    met = {
        "sharing": sharing.hit_rate >= one.hit_rate - _POINTS,
        "overlap": overlap.hit_rate > sharing.hit_rate,
        "right": not any(result.wrong for result in results),
    }
    if args.json:
        rows = [dataclasses.asdict(result) | {"hit_rate": result.hit_rate} for result in results]
        print(json.dumps({"rows": rows, "met": met}))
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
