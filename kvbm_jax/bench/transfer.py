"""How fast blocks are pulled out of another process's memory, and how fast it is found who has them.

A pull is the whole of it: lease, read, checksums, lease given back. Beside it stands what moves the same bytes between
the same two processes and does nothing else: bare NIXL with the same descriptors as one prepared read, and a socket
read straight into the same memory. Blocks lie in the peer's arena in an order of chance.

The lookup asks `PrefixIndex` for a prompt of 2,048 blocks, of which two workers have all, among 1,000,000 that others
own; beside it a dict is asked for the same hashes.
"""

import contextlib
import importlib.util
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.bench.timing import Row, Timing, Trial
from kvbm_jax.bench.transfer_peer import Serving, content, identity_of, key
from kvbm_jax.errors import BenchError
from kvbm_jax.events import EventType, KvEventBatch, PrefixIndex
from kvbm_jax.offload.allocator import AnonymousAllocator
from kvbm_jax.protocols import Outcome, Tier
from kvbm_jax.transfer import Puller, open_engine

__all__ = ["BLOCK_BYTES", "measure"]

BLOCK_BYTES = (16 << 10, 256 << 10, 1 << 20, 4 << 20)
_PREFIX, _OWNED, _WORKERS = 2_048, 1_000_000, 8


def measure(timing: Timing, nbytes: int) -> list[Row]:
    """Times pulls of `nbytes` bytes in blocks of each size over each engine that is here, and the lookup.

    Raises:
      BenchError: Other bytes come than were put, or the peer does not start.
    """
    kinds = ["tcp"]
    if any(importlib.util.find_spec(package) for package in ("nixl", "nixl_cu12", "nixl_cu13")):
        kinds.insert(0, "nixl")
    rows = [
        _pull(timing, kind, block_bytes, max(nbytes // block_bytes, 1)) for kind in kinds for block_bytes in BLOCK_BYTES
    ]
    return [*rows, _lookup(timing)]


def _pull(timing: Timing, kind: str, block_bytes: int, count: int) -> Row:
    case = f"{kind} pull, {count:,} blocks of {block_bytes // 1024:,} KiB"
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(_peer(kind, block_bytes, count))
        engine = stack.enter_context(contextlib.closing(open_engine(kind, "reader")))
        puller = stack.enter_context(Puller("reader", identity_of(block_bytes), engine, count, timeout=60.0))
        order = np.random.default_rng(1).permutation(count)
        keys = [key(number) for number in order.tolist()]
        expected = content(block_bytes, count)

        def pull() -> float:
            begun = time.perf_counter()
            pulled = puller.pull(serving.record, keys)
            seconds = time.perf_counter() - begun
            with pulled:
                missing = sum(row.outcome is not Outcome.OK for row in pulled.rows)
            if missing:
                raise BenchError(f"{case}: {missing:,} blocks have not come")
            return seconds

        with puller.pull(serving.record, keys) as pulled:
            if not all(np.array_equal(block, expected[order[place]]) for place, block in pulled.blocks()):
                raise BenchError(f"{case}: other bytes have come")
        memory = AnonymousAllocator().allocate(count * block_bytes)
        if kind == "nixl":
            bare = stack.enter_context(_bare_nixl(serving, memory, block_bytes, order.astype(np.int32)))
            return timing.compare(case, pull, "bare NIXL, one prepared read of the same blocks", bare)
        plain = stack.enter_context(_plain_socket(serving, memory))
        return timing.compare(case, pull, "a plain socket into memory, the same bytes", plain)


@contextlib.contextmanager
def _peer(kind: str, block_bytes: int, count: int) -> Iterator[Serving]:
    command = [sys.executable, "-m", "kvbm_jax.bench.transfer_peer", kind, str(block_bytes), str(count)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:  # noqa: S603 (our own)
        try:
            line = process.stdout.readline() if process.stdout else b""
            if not line:
                raise BenchError("the process that serves blocks does not start")
            yield msgspec.json.decode(line, type=Serving)
        finally:
            process.kill()


@contextlib.contextmanager
def _bare_nixl(
    serving: Serving, memory: NDArray[np.uint8], block_bytes: int, order: NDArray[np.int32]
) -> Iterator[Trial]:
    from kvbm_jax.transfer.nixl import start_agent  # noqa: PLC0415 (an extra)

    agent = start_agent("bare")
    count = len(order)
    agent.register_memory([(memory.ctypes.data, memory.nbytes, 0, "")], "DRAM")
    peer = agent.add_remote_agent(serving.description)

    def prepared(name: Any, address: int, stride: int) -> Any:
        table = np.full((count, 3), (0, block_bytes, 0), np.uint64)
        table[:, 0] = address + np.arange(count, dtype=np.uint64) * np.uint64(stride)
        return agent.prep_xfer_dlist(name, table, "DRAM")

    here = prepared("NIXL_INIT_AGENT", memory.ctypes.data, block_bytes)
    there = prepared(peer, serving.slots.region, serving.slots.stride)
    places = np.arange(count, dtype=np.int32)

    def read() -> float:
        begun = time.perf_counter()
        handle = agent.make_prepped_xfer("READ", here, places, there, order)
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        seconds = time.perf_counter() - begun
        handle.release()
        if state != "DONE":
            raise BenchError(f"bare NIXL says {state}")
        return seconds

    try:
        yield read
    finally:
        here.release()
        there.release()
        agent.remove_remote_agent(peer)


@contextlib.contextmanager
def _plain_socket(serving: Serving, memory: NDArray[np.uint8]) -> Iterator[Trial]:
    with socket.create_connection(("127.0.0.1", serving.port)) as connection:
        target = memoryview(memory)

        def read() -> float:
            begun = time.perf_counter()
            connection.sendall(b"1")
            left = target
            while left:
                left = left[connection.recv_into(left, len(left), socket.MSG_WAITALL) :]
            return time.perf_counter() - begun

        yield read


class _Owned(NamedTuple):
    """A router's view of a million blocks."""

    owners: PrefixIndex
    plain: dict[bytes, int]
    prompt: NDArray[np.uint32]  # [_PREFIX, 4]


def _lookup(timing: Timing) -> Row:
    index, plain, prompt = _owned()
    keys = [row.tobytes() for row in prompt]

    def find() -> float:
        begun = time.perf_counter()
        found = index.find_matches(prompt)
        seconds = time.perf_counter() - begun
        if sorted(overlap.blocks for overlap in found.values()) != [_PREFIX, _PREFIX]:
            raise BenchError(f"two workers have all of the prompt; found are {found}")
        return seconds

    def ask() -> float:
        begun = time.perf_counter()
        for one in keys:
            plain.get(one)
        return time.perf_counter() - begun

    case = f"lookup of {_PREFIX:,} blocks among {_OWNED:,}"
    return timing.compare(case, find, "a dict in a loop, the same hashes", ask)


def _owned() -> _Owned:
    rng = np.random.default_rng(2)
    hashes = rng.integers(1, 1 << 63, (_OWNED - _PREFIX, 2), np.uint64).view(np.uint32)
    prompt = rng.integers(1, 1 << 63, (_PREFIX, 2), np.uint64).view(np.uint32)
    index = PrefixIndex()
    owners = [*zip(np.array_split(hashes, _WORKERS), range(_WORKERS), strict=True), (prompt, 0), (prompt, 1)]
    ids = [0] * _WORKERS
    for rows, worker in owners:
        batch = KvEventBatch.make(
            EventType.CREATED,
            np.arange(len(rows), dtype=np.uint64),
            worker_id=f"worker {worker}",
            block_size=16,
            first_event_id=ids[worker],
            timestamp=1,
            tier=Tier.G2,
            sequence_hashes=rows,
        )
        ids[worker] += len(rows)
        index.apply(batch)
    plain = {row.tobytes(): 1 for row in (*hashes, *prompt)}
    return _Owned(index, plain, prompt)
