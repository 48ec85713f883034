"""Discovery through a folder that workers share: a file for each, renewed while its worker lives.

    FOLDER/WORKER.worker      WORKER is the id, percent-encoded; one record, as JSON

A file is replaced whole, so nobody reads half of one. Whether a worker lives is told by its file changing, by the
reader's own clock; only for a file never seen before its age counts. The folder is its user's own: who could write
there could send others to ask at any address.
"""

import contextlib
import logging
import os
import secrets
import stat
import threading
import time
import urllib.parse
from pathlib import Path

from kvbm_jax.closing import Closing
from kvbm_jax.errors import BlockStateError, ConfigError, FrameError
from kvbm_jax.protocols import Clock, WorkerRecord
from kvbm_jax.runtime_folder import runtime_folder
from kvbm_jax.transfer.heard import Heard, check_times, record_from, record_to

__all__ = ["FolderDiscovery"]

_LOG = logging.getLogger(__name__)
_SUFFIX = ".worker"
_LITTER = 100  # times to live after which a file of a worker that died is removed


class FolderDiscovery(Closing):
    """Workers that share a folder.

    Args:
      folder: made if it is not there; None for one in the user's runtime folder, for the processes of one host.
      ttl: seconds after its last renewal that a worker counts as gone.
      heartbeat: seconds between two renewals, and between two looks at the folder; None for a third of `ttl`.
      clock: for both.

    Raises:
      ConfigError: The folder is not this user's own, or the times do not fit.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        ttl: float = 9.0,
        heartbeat: float | None = None,
        clock: Clock = time,
    ) -> None:
        self._heartbeat = check_times(ttl, heartbeat)
        self._litter_ns = round(_LITTER * ttl * 1e9)
        self._folder = _own(runtime_folder() / "workers" if folder is None else folder)
        self._clock = clock
        self._heard = Heard(ttl, clock)
        self._record: WorkerRecord | None = None
        self._beat = 0
        self._lock = threading.Lock()  # of what this worker writes
        self._closed = threading.Event()
        self._look()
        self._thread = threading.Thread(target=self._run, name="kvbm-discovery", daemon=True)
        self._thread.start()

    def announce(self, record: WorkerRecord) -> None:
        """Writes the worker's file, and keeps renewing it.

        Raises:
          ConfigError: The folder cannot be written to.
          BlockStateError: It is closed.
        """
        with self._lock:
            if self._closed.is_set():
                raise BlockStateError("discovery is closed")
            self._remove()
            self._record = record
            try:
                self._renew(record)
            except OSError as error:
                raise ConfigError(f"{self._folder}: {error.strerror}") from error

    def withdraw(self) -> None:
        """Removes the worker's file."""
        with self._lock:
            self._remove()

    def workers(self) -> dict[str, WorkerRecord]:
        """Returns who was there at the last look."""
        return self._heard.workers()

    def look(self) -> None:
        """Looks at the folder now."""
        self._look()

    def close(self) -> None:
        """Withdraws, and ends the thread."""
        self._closed.set()
        self.withdraw()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(self._heartbeat):
            try:
                with self._lock:
                    if self._record is not None:
                        self._renew(self._record)
                self._look()
            except OSError as error:
                _LOG.warning("%s: %s; workers may be taken for gone", self._folder, error)

    def _renew(self, record: WorkerRecord) -> None:
        self._beat += 1
        path = self._path(record.worker_id)
        new = path.with_name(f".{secrets.token_hex(8)}")
        new.touch(mode=0o600)
        try:
            new.write_bytes(record_to(record, self._beat))
            new.replace(path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        self._heard.note(record, self._beat)

    def _remove(self) -> None:
        """Removes this worker's file, unless another life of it has written it."""
        record, self._record = self._record, None
        if record is None:
            return
        path = self._path(record.worker_id)
        with contextlib.suppress(OSError, FrameError):  # it is gone, or somebody else's
            if record_from(path.read_bytes())[0] == record:
                path.unlink()
        self._heard.forget(record.worker_id)

    def _look(self) -> None:
        there = set()
        for path in self._folder.glob(f"*{_SUFFIX}"):
            try:
                age = max(self._clock.time_ns() - path.stat().st_mtime_ns, 0)
                record, beat = record_from(path.read_bytes())
            except FileNotFoundError:
                continue  # withdrawn this moment
            except (OSError, FrameError) as error:
                _LOG.warning("%s: %s", path, error)
                continue
            if age > self._litter_ns:
                path.unlink(missing_ok=True)
                continue
            there.add(record.worker_id)
            self._heard.note(record, beat, age)
        self._heard.keep_only(there)

    def _path(self, worker_id: str) -> Path:
        return self._folder / (urllib.parse.quote(worker_id, safe="") + _SUFFIX)


def _own(folder: Path) -> Path:
    """Returns a folder that is this user's alone to write to; makes it if it is not there."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}") from error
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise ConfigError(
            f"{folder} must be a folder of user {os.getuid()} that nobody else may write to; it is "
            f"{stat.filemode(found.st_mode)} of user {found.st_uid}"
        )
    return folder
