"""Workers that have been heard of lately, and the record of one as bytes."""

import threading
from typing import NamedTuple

import msgspec

from kvbm_jax.errors import ConfigError, FrameError
from kvbm_jax.protocols import Clock, WorkerRecord

__all__ = ["Heard", "check_times", "record_from", "record_to"]

RECORD_VERSION = 1
_FINGERPRINT_BYTES = 16


class _Written(msgspec.Struct):
    version: int
    beat: int  # counts up while the worker lives
    record: WorkerRecord


class _Entry(NamedTuple):
    record: WorkerRecord
    beat: int
    heard: int  # monotonic ns


def record_to(record: WorkerRecord, beat: int) -> bytes:
    """Returns a record as JSON, with a number that says which renewal of it this is."""
    return msgspec.json.encode(_Written(RECORD_VERSION, beat, record))


def record_from(data: bytes) -> tuple[WorkerRecord, int]:
    """Reads what `record_to` wrote: the record, and which renewal it is.

    Raises:
      FrameError: It is none, or of another version.
    """
    try:
        written = msgspec.json.decode(data, type=_Written)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise FrameError(f"{len(data)} bytes are no record of a worker: {error}") from error
    if written.version != RECORD_VERSION or len(written.record.fingerprint) != _FINGERPRINT_BYTES:
        raise FrameError(f"a record of version {written.version}; known is {RECORD_VERSION}")
    return written.record, written.beat


def check_times(ttl: float, heartbeat: float | None) -> float:
    """Returns how often a record is renewed that lives for `ttl` seconds: a third of that, if nothing is said.

    Raises:
      ConfigError: The times do not fit.
    """
    found = ttl / 3 if heartbeat is None else heartbeat
    if not 0 < found < ttl:
        raise ConfigError(f"heartbeat = {found:g} and ttl = {ttl:g}: allowed are seconds, 0 < heartbeat < ttl")
    return found


class Heard:
    """What is known of workers; whoever is not heard of for `ttl` seconds is not there.

    Args:
      ttl: seconds.
      clock: tells how long ago.
    """

    def __init__(self, ttl: float, clock: Clock) -> None:
        self._ttl_ns = round(ttl * 1e9)
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def note(self, record: WorkerRecord, beat: int, age_ns: int = 0) -> None:
        """Notes a renewal. One that is known already counts for nothing; a new one may be `age_ns` old."""
        with self._lock:
            known = self._entries.get(record.worker_id)
            if known is not None and (known.record, known.beat) == (record, beat):
                return
            if known is not None and known.record.started_ns > record.started_ns:
                return  # a former life's
            heard = self._clock.monotonic_ns() - (age_ns if known is None else 0)
            self._entries[record.worker_id] = _Entry(record, beat, heard)

    def forget(self, worker_id: str) -> None:
        """Forgets a worker."""
        with self._lock:
            self._entries.pop(worker_id, None)

    def keep_only(self, worker_ids: set[str]) -> None:
        """Forgets all others."""
        with self._lock:
            for worker_id in self._entries.keys() - worker_ids:
                del self._entries[worker_id]

    def workers(self) -> dict[str, WorkerRecord]:
        """Returns who is there."""
        since = self._clock.monotonic_ns() - self._ttl_ns
        with self._lock:
            return {name: entry.record for name, entry in self._entries.items() if entry.heard >= since}
