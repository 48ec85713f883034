"""What lies in a segment store's folder, for people and the command line. Reads only, also beside a store at work."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from kvbm_jax.errors import ConfigError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.offload.segments.folder import Found, Wanted, read_rows, scan
from kvbm_jax.offload.segments.record import SegmentRecord
from kvbm_jax.protocols import BlockKey

__all__ = ["SegmentReport", "inspect"]

_BYTES_AT_ONCE = 64 << 20


@dataclass(frozen=True, slots=True)
class SegmentReport:
    """One segment of a folder."""

    name: str
    status: str  # "ok", "unreadable", or "corrupt" if a block of it does not verify
    identity: CacheIdentity | None  # None where it cannot be read
    blocks: int
    live_bytes: int  # of blocks that no later segment holds too
    physical_bytes: int  # on the disk
    corrupt_blocks: int | None  # None where nobody looked
    reason: str  # why it is unreadable


def inspect(path: str | os.PathLike[str], *, verify: bool = False) -> tuple[SegmentReport, ...]:
    """Lists the segments of a folder in the order of their writing.

    Args:
      path: the folder.
      verify: read every block and compare its checksum.

    Raises:
      ConfigError: The folder cannot be read.
      MissingDependencyError: Orbax, and TensorStore with it, is not installed.
    """
    try:
        segments = list(scan(Path(path).absolute()))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    latest: dict[tuple[str, BlockKey], int] = {}
    for found in segments:
        if found.record is not None:
            latest |= {(found.record.identity, block.key): found.sequence for block in found.record.blocks}
    return tuple(_report(found, latest, verify=verify) for found in segments)


def _report(found: Found, latest: dict[tuple[str, BlockKey], int], *, verify: bool) -> SegmentReport:
    record = found.record
    if record is None:
        return SegmentReport(found.path.name, "unreadable", None, 0, 0, found.physical, None, found.reason)
    live = sum(latest[record.identity, block.key] == found.sequence for block in record.blocks)
    corrupt = _corrupt_blocks(found.path, record) if verify else None
    return SegmentReport(
        found.path.name,
        "corrupt" if corrupt else "ok",
        record.cache_identity(),
        len(record.blocks),
        live * record.block_bytes,
        found.physical,
        corrupt,
        "",
    )


def _corrupt_blocks(path: Path, record: SegmentRecord) -> int:
    step = max(_BYTES_AT_ONCE // record.block_bytes, 1)
    rows = np.empty((min(step, len(record.blocks)), record.block_bytes), np.uint8)
    corrupt = 0
    for first in range(0, len(record.blocks), step):
        blocks = record.blocks[first : first + step]
        reasons = read_rows([Wanted(path, first + i, rows[i]) for i in range(len(blocks))])
        for row, block, reason in zip(rows, blocks, reasons, strict=False):
            corrupt += bool(reason) or xxhash.xxh3_64_intdigest(row) != block.checksum
    return corrupt
