"""How fast blocks cross the edges between the tiers, through the parts that the offload engine is made of.

    g1->g2   gather, copy to the host, put     beside a copy in memory
    g2->g1   get, scatter into the cache       beside a copy in memory
    g2->g3   get, put                          beside a plain file, written and fsynced
    g3->g1   get, scatter into the cache       beside a plain file, read

Before anything is timed, blocks take each of these ways once, and what comes back is compared with what went down. The
shape of a block is SmolLM2-135M's, in float32.

Axes: n blocks, P bytes of a block, R rows of a staging array.
"""

import contextlib
import dataclasses
import itertools
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from numpy.typing import NDArray

from kvbm_jax import cache as kv_cache
from kvbm_jax.bench.timing import Row, Timing, Trial
from kvbm_jax.errors import BenchError
from kvbm_jax.hashing import HashAlgorithm
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload.buffer_pool import BufferPool
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.offload.segments import SegmentBlockStore
from kvbm_jax.offload.staging import StagingRing, onboard, rows_for, rows_of_array
from kvbm_jax.protocols import BlockKey, BlockRecord, BlockStore, Outcome, StoreFuture, StoreRow

__all__ = ["BLOCK_BYTES", "measure"]

_LAYOUT = KVLayout(num_layers=30, num_blocks=1, block_size=16, num_kv_heads=3, head_dim=64, dtype="float32")
_NO_BOUND = 1 << 50  # bytes of the disk tier: only what is measured lies there

BLOCK_BYTES = _LAYOUT.block_bytes
"""P of the blocks that are moved."""


def measure(timing: Timing, num_blocks: int, folder: Path | None = None) -> list[Row]:
    """Times every edge.

    Args:
      timing: how.
      num_blocks: n, blocks that cross an edge together.
      folder: where a temporary folder for the disk tier is made; None for the system's place.

    Raises:
      MissingDependencyError: Orbax is not installed.
      BenchError: Disk or memory do not suffice, or other bytes came back than went down.
    """
    timing.progress("putting blocks into the tiers")
    layout = dataclasses.replace(_LAYOUT, num_blocks=num_blocks)
    identity = CacheIdentity.of(layout, model_id="bench", hash_algorithm=HashAlgorithm.BLAKE3)
    try:
        with contextlib.ExitStack() as stack:
            made = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kvbm-bench-", dir=folder)))
            disk = SegmentBlockStore(
                made / "tier", BLOCK_BYTES, identity=identity, capacity_bytes=_NO_BOUND, clock=time
            )
            stack.enter_context(contextlib.closing(disk))
            host = HostBlockStore(BLOCK_BYTES, 2 * num_blocks, identity=identity)
            stack.enter_context(contextlib.closing(host))
            # No random bytes: they might be numbers that a device changes as it moves them.
            contents = np.random.default_rng(0).random((num_blocks, BLOCK_BYTES // 4), np.float32).view(np.uint8)
            tiers = _Tiers(layout, contents, host, disk)
            tiers.verify()
            plain = _Plain(contents, made)
            cases: list[tuple[str, Trial, str, Trial]] = [
                ("g1->g2", tiers.g1_to_g2, "copy in memory", plain.copy),
                ("g2->g1", tiers.g2_to_g1, "copy in memory", plain.copy),
                ("g2->g3", tiers.g2_to_g3, "plain file written and fsynced", plain.write),
                ("g3->g1", tiers.g3_to_g1, "plain file read", plain.read),
                (
                    "g3->g1, file cache dropped",
                    _uncached(made, tiers.g3_to_g1),
                    "plain file read, file cache dropped",
                    _uncached(made, plain.read),
                ),
            ]
            return [timing.compare(*case) for case in cases]
    except (OSError, MemoryError) as error:
        raise BenchError(f"{num_blocks:,} blocks of {BLOCK_BYTES:,} bytes: {error}") from error


class _Tiers:
    """A cache and two stores that hold the same blocks, n each; the methods named after edges are trials.

    Args:
      layout: of the cache, N = n.
      contents: what the blocks hold, u8[n, P].
      host: empty, with room for 2 * n blocks.
      disk: the same.
    """

    def __init__(
        self, layout: KVLayout, contents: NDArray[np.uint8], host: HostBlockStore, disk: SegmentBlockStore
    ) -> None:
        self._contents = contents
        self._host = host
        self._disk = disk
        self._block_ids = np.random.default_rng(1).permutation(len(contents)).astype(np.int32)  # [n]
        self._numbers = itertools.count()
        self._ring = StagingRing(layout)
        self._buffers = BufferPool()
        self._records = self._new_records()
        rows = self._buffers.lend(rows_for(len(contents), BLOCK_BYTES), BLOCK_BYTES)
        rows[: len(contents)] = contents
        self._cache, _ = onboard(kv_cache.init(layout), self._block_ids, rows)
        self._ring.release(self._offload(self._records))
        self._copy_down(self._records)

    def verify(self) -> None:
        """Raises `BenchError` unless the blocks of both stores arrive in the cache as they left it."""
        for store in (self._host, self._disk):
            self._cache = kv_cache.init(self._cache.layout)
            self._load(store)
            arrays = self._ring.gather(self._cache, self._block_ids)
            found = np.concatenate([rows_of_array(array) for array in arrays])[: len(self._contents)]
            wrong = int((found != self._contents).any(axis=1).sum())
            if wrong:
                raise BenchError(f"{wrong} of {len(found)} blocks came back from {store.tier.label} with other bytes")
            self._ring.release(arrays)

    def g1_to_g2(self) -> float:
        """From the cache until the host store holds them."""
        records = self._new_records()
        begun = time.perf_counter()
        arrays = self._offload(records)
        seconds = time.perf_counter() - begun
        self._forget(self._host, records)
        self._ring.release(arrays)
        return seconds

    def g2_to_g1(self) -> float:
        """From the host store until the cache is ready."""
        begun = time.perf_counter()
        self._load(self._host)
        return time.perf_counter() - begun

    def g2_to_g3(self) -> float:
        """From the host store until they would survive a power cut."""
        records = self._new_records()
        begun = time.perf_counter()
        self._copy_down(records)
        seconds = time.perf_counter() - begun
        self._forget(self._disk, records)
        return seconds

    def g3_to_g1(self) -> float:
        """From the disk store until the cache is ready."""
        begun = time.perf_counter()
        self._load(self._disk)
        return time.perf_counter() - begun

    def _offload(self, records: Sequence[BlockRecord]) -> list[jax.Array]:
        """Puts the cache's blocks to the host store; returns the staging arrays, no longer read."""
        arrays = self._ring.gather(self._cache, self._block_ids)
        pieces = [rows_of_array(array) for array in arrays]  # u8[R, P] each
        waiting = iter(records)
        puts = []
        for rows in pieces:
            part = list(itertools.islice(waiting, len(rows)))
            puts.append(self._host.put(part, rows[: len(part)]))
        for put in puts:
            _expect_ok(put)
        return arrays

    def _copy_down(self, records: Sequence[BlockRecord]) -> None:
        """Puts what the host store holds to the disk store, under other names if `records` has such."""
        rows = self._buffers.lend(len(records), BLOCK_BYTES)
        _expect_ok(self._host.get([record.key for record in self._records], rows))
        _expect_ok(self._disk.put(records, rows))

    def _load(self, store: BlockStore) -> None:
        """Brings the blocks of a store into the cache and waits for it."""
        rows = self._buffers.lend(rows_for(len(self._records), BLOCK_BYTES), BLOCK_BYTES)
        _expect_ok(store.get([record.key for record in self._records], rows[: len(self._records)]))
        self._cache, _ = onboard(self._cache, self._block_ids, rows)
        for array in self._cache.arrays:
            array.block_until_ready()

    def _new_records(self) -> list[BlockRecord]:
        """Names n blocks as none has been named before, so that a put has to write them."""
        tokens = tuple(range(_LAYOUT.block_size))
        numbers = itertools.islice(self._numbers, len(self._contents))
        return [BlockRecord(BlockKey(number.to_bytes(16, "little")), None, tokens) for number in numbers]

    @staticmethod
    def _forget(store: BlockStore, records: Sequence[BlockRecord]) -> None:
        _expect_ok(store.delete([record.key for record in records]))


class _Plain:
    """The baselines: the same bytes, moved by nothing but numpy and the operating system.

    Args:
      contents: the bytes, u8[n, P].
      folder: where files are made.
    """

    def __init__(self, contents: NDArray[np.uint8], folder: Path) -> None:
        self._contents = contents
        self._target = np.zeros_like(contents)
        self._folder = folder
        self._kept = folder / "kept"
        self._write_to(self._kept)

    def copy(self) -> float:
        """From one buffer to another, both in use before."""
        begun = time.perf_counter()
        np.copyto(self._target, self._contents)
        return time.perf_counter() - begun

    def write(self) -> float:
        """Into a new file, until it would survive a power cut."""
        path = self._folder / "written"
        begun = time.perf_counter()
        self._write_to(path)
        seconds = time.perf_counter() - begun
        path.unlink()
        return seconds

    def read(self) -> float:
        """From a file into a buffer that has been in use before."""
        begun = time.perf_counter()
        with self._kept.open("rb") as file:
            file.readinto(self._target.reshape(-1))
        return time.perf_counter() - begun

    def _write_to(self, path: Path) -> None:
        with path.open("wb") as file:
            file.write(self._contents.reshape(-1))
            file.flush()
            os.fsync(file.fileno())
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _uncached(folder: Path, trial: Trial) -> Trial:
    """Has the system drop what it keeps in memory of a folder's files before each trial."""

    def run() -> float:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return trial()

    return run


def _expect_ok(call: StoreFuture[tuple[StoreRow, ...]]) -> None:
    """Waits for a store's call and raises `BenchError` unless every block fared well."""
    for row in call.result():
        if row.outcome is not Outcome.OK:
            raise BenchError(f"a block is {row.outcome.value}: {row.reason or 'no reason given'}")
