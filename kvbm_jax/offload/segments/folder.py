"""The files of a segment store: how a segment comes into its folder, is read, and goes.

A segment is an Orbax checkpoint of flat leaves u8[...]: one per block and one for the record, in zarr 3 over OCDBT,
uncompressed. Orbax writes it under a name that counts for nothing; once every file and folder of it is on the disk it
gets its name, and once that is on the disk too it is committed:

    .new-000000000007 --fsync all--> rename --> seg-000000000007 --fsync parent--> committed
    seg-000000000007 --rename--> .trash-000000000007 --> deleted
    seg-000000000007 --rename--> aside-000000000007      its record cannot be read

So a segment of that name is whole, whatever happened to the machine, and what starts with a dot is rubbish. Orbax's own
`restore` reads a segment like any checkpoint; here blocks are read by TensorStore, the library beneath it, because that
puts them straight into the caller's buffer. Nothing in here knows which blocks are alive.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import ConfigError, UnreadableSegmentError
from kvbm_jax.extras import needs
from kvbm_jax.offload.segments.record import RECORD_NAME, SegmentRecord, block_name, decode, encode

__all__ = ["Found", "SegmentFolder", "Wanted", "estimate_bytes", "read_record", "read_rows", "scan"]

_UNIT = 4096  # what the file system hands out, for files and for folders
_SEGMENT_OVERHEAD = 96 << 10  # about a dozen files and folders, and what they waste in their last units
_BLOCK_OVERHEAD = 1 << 10  # a leaf's metadata, in Orbax and in TensorStore
_NAME = re.compile(r"(seg|aside)-(\d{12})")
_RUBBISH = (".new-", ".trash-")
_READS_AT_ONCE = 16


class Wanted(NamedTuple):
    """A block to be read."""

    segment: Path
    row: int
    out: NDArray[np.uint8]  # [P]


class Found(NamedTuple):
    """A segment in a folder."""

    path: Path
    sequence: int
    physical: int
    record: SegmentRecord | None
    reason: str  # why there is no record


def estimate_bytes(num_blocks: int, block_bytes: int, record_bytes: int) -> int:
    """Returns what a segment will take on the disk at most."""
    return _SEGMENT_OVERHEAD + num_blocks * (block_bytes + _BLOCK_OVERHEAD) + record_bytes


def physical_bytes(path: Path) -> int:
    """Returns what a tree takes on the disk: files and folders, rounded up to the file system's units.

    A tree that goes away meanwhile counts with what was still seen of it.
    """
    total = 0
    for folder, _, files in os.walk(path):
        total += _UNIT
        for name in files:
            with contextlib.suppress(OSError):  # gone meanwhile
                total += -(-os.lstat(os.path.join(folder, name)).st_size // _UNIT) * _UNIT
    return total


def scan(root: Path) -> Iterator[Found]:
    """Yields the segments of a folder in the order of their writing, those set aside among them. Writes nothing."""
    numbered = []
    for entry in os.scandir(root):
        name = _NAME.fullmatch(entry.name)
        if name and entry.is_dir(follow_symlinks=False):
            numbered.append((int(name[2]), name[1], root / entry.name))
    for sequence, _, path in sorted(numbered):
        record, reason = None, ""
        try:
            record = read_record(path)
        except UnreadableSegmentError as error:
            reason = str(error)
        yield Found(path, sequence, physical_bytes(path), record, reason)


def read_record(path: Path) -> SegmentRecord:
    """Reads what a segment says of itself.

    Raises:
      UnreadableSegmentError: It cannot be read, or is not what was written.
    """
    try:
        data = _open_leaf(path, RECORD_NAME, _context()).result().read().result()
    except Exception as error:
        # TensorStore has no error class of its own: damage comes as ValueError, RuntimeError, OSError and others.
        raise UnreadableSegmentError(_one_line(error)) from error
    record = decode(np.asarray(data, np.uint8).tobytes())
    record.cache_identity()
    return record


def read_rows(wanted: Sequence[Wanted]) -> list[str]:
    """Reads blocks straight into their buffers, all at once; checks no checksums.

    Returns:
      For each block why it could not be read, empty if it was.
    """
    context = _context()
    opened = [_attempt(_open_leaf, block.segment, block_name(block.row), context) for block in wanted]
    reads = [leaf.then(_start_read, block.out) for leaf, block in zip(opened, wanted, strict=True)]
    # Each is waited for, whatever became of the others: until then it may write into its buffer.
    return [read.then(_wait).reason for read in reads]


class _Attempt(NamedTuple):
    """What a step came to, TensorStore's exceptions turned into words."""

    value: Any
    reason: str  # why there is none; empty if there is

    def then(self, step: Callable[..., Any], *args: Any) -> "_Attempt":
        """Takes the next step with what this one gave, if it gave anything."""
        return self if self.reason else _attempt(step, self.value, *args)


def _attempt(step: Callable[..., Any], *args: Any) -> _Attempt:
    try:
        return _Attempt(step(*args), "")
    except Exception as error:  # noqa: BLE001 (any kind: see read_record)
        return _Attempt(None, _one_line(error))


def _start_read(leaf: Any, out: NDArray[np.uint8]) -> Any:
    return _tensorstore().array(out).write(leaf.result())


def _wait(read: Any) -> Any:
    return read.result()


class SegmentFolder:
    """A folder that one store holds: made if it is not there, locked, and rid of what was never committed.

    Args:
      root: the folder.

    Raises:
      ConfigError: It cannot be made or read, or another store has it open.
      MissingDependencyError: Orbax is not installed.
    """

    def __init__(self, root: Path) -> None:
        _tensorstore()
        _orbax()
        self.root = root
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock: int | None = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ConfigError(f"offload folder {root}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.unlock()
            if error.errno not in {errno.EWOULDBLOCK, errno.EACCES}:
                raise ConfigError(f"offload folder {root} cannot be locked: {error.strerror}") from error
            raise ConfigError(
                f"offload folder {root} is in use by another store; close that, or give each worker its own folder"
            ) from error
        self._littered = True
        self._sweep()

    def unlock(self) -> None:
        """Lets another store have the folder. Idempotent."""
        lock, self._lock = self._lock, None
        if lock is not None:
            # Said, not left to the last descriptor: a forked process has one too.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

    def write(self, record: SegmentRecord, rows: Sequence[NDArray[np.uint8]]) -> tuple[Path, int]:
        """Commits a segment: when this returns it would survive a power cut.

        Args:
          record: what it says of itself.
          rows: bytes of each block of the record, u8[P].

        Returns:
          (where it is, what it takes on the disk).

        Raises:
          Exception: of any kind that Orbax knows, and OSError; nothing is left of the segment then.
        """
        staged = self.root / f".new-{record.sequence:012d}"
        path = self.root / f"seg-{record.sequence:012d}"
        self._sweep()
        leaves = {block_name(i): np.ascontiguousarray(row) for i, row in enumerate(rows)}
        leaves[RECORD_NAME] = np.frombuffer(encode(record), np.uint8)
        try:
            _save(staged, leaves)
            _fsync_tree(staged)
            os.rename(staged, path)
            _fsync(self.root)
        except BaseException:
            self._littered = True
            shutil.rmtree(path, ignore_errors=True)
            self._sweep()
            self._littered = True  # TensorStore may still be at it and make the folder once more: swept again next time
            raise
        return path, physical_bytes(path)

    def discard(self, path: Path) -> None:
        """Deletes a segment, in such a way that no half of it is ever found.

        Raises:
          OSError: It is still there.
        """
        trash = self.root / f".trash-{path.name.rpartition('-')[2]}"
        os.rename(path, trash)
        shutil.rmtree(trash, ignore_errors=True)

    def set_aside(self, path: Path) -> Path:
        """Renames a segment that cannot be read, so that nobody takes it for one; returns where it is now."""
        return self._rename(path, "aside")

    def take_back(self, path: Path) -> Path:
        """Gives a segment that was set aside, and can be read after all, its name back."""
        return self._rename(path, "seg")

    def other_bytes(self, known: Sequence[Path]) -> int:
        """Returns what lies in the folder beside the segments named, in bytes on the disk."""
        names = {path.name for path in known}
        total = _UNIT
        for entry in os.scandir(self.root):
            if entry.name not in names:
                if entry.is_dir(follow_symlinks=False):
                    total += physical_bytes(Path(entry.path))
                else:
                    total += -(-entry.stat(follow_symlinks=False).st_size // _UNIT) * _UNIT
        return total

    def _sweep(self) -> None:
        """Removes what was never committed, if there may be any."""
        if self._littered:
            for entry in os.listdir(self.root):
                if entry.startswith(_RUBBISH):
                    shutil.rmtree(self.root / entry, ignore_errors=True)
            self._littered = False

    @staticmethod
    def _rename(path: Path, prefix: str) -> Path:
        target = path.with_name(f"{prefix}-{path.name.rpartition('-')[2]}")
        with contextlib.suppress(OSError):  # a folder that cannot be written: it keeps its name
            return path.rename(target)
        return path


def _save(path: Path, leaves: dict[str, NDArray[np.uint8]]) -> None:
    """Has Orbax write a checkpoint, this process for itself alone."""
    import jax  # noqa: PLC0415 (not needed to read)

    ocp = _orbax()
    options = ocp.options.MultiprocessingOptions()
    if jax.process_count() > 1:
        here = jax.process_index()
        options = ocp.options.MultiprocessingOptions(
            primary_host=here, active_processes={here}, barrier_sync_key_prefix=f"kvbm_segments_{here}"
        )
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=True, use_zarr3=True, use_compression=False, multiprocessing_options=options
    )
    with ocp.Checkpointer(handler, multiprocessing_options=options) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(leaves))


def _fsync_tree(root: Path) -> None:
    for folder, _, files in os.walk(root, topdown=False):
        for name in files:
            _fsync(os.path.join(folder, name))
        _fsync(folder)


def _fsync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_leaf(segment: Path, name: str, context: Any) -> Any:
    """Returns a future of the TensorStore of one leaf."""
    spec = {
        "driver": "zarr3",
        "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{segment}/"}, "path": f"{name}/"},
    }
    return _tensorstore().open(spec, context=context, open=True, read=True)


def _context() -> Any:
    """A context of its own for every read, so that what was read before is not believed again."""
    return _tensorstore().Context({"file_io_concurrency": {"limit": _READS_AT_ONCE}})


def _tensorstore() -> Any:
    with needs("disk", "the disk tier"):
        import tensorstore  # noqa: PLC0415 (an extra)
    return tensorstore


def _orbax() -> Any:
    with needs("disk", "the disk tier"):
        import orbax.checkpoint as ocp  # type: ignore[import-untyped]  # noqa: PLC0415 (an extra, and slow to import)
    return ocp


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]
