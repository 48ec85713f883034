"""Peers that have been wrong too often, and are not asked for a while."""

import logging
import threading
import time

from kvbm_jax.errors import ConfigError
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.protocols import Clock, MetricsSink

__all__ = ["Quarantine"]

_LOG = logging.getLogger(__name__)


class Quarantine:
    """Shuts a peer out after so many faults with nothing good in between.

    Args:
      strikes: faults that are too many, at least 1.
      seconds: how long a peer is shut out.
      metrics: takes measurements.
      clock: for the time that it lasts.

    Raises:
      ConfigError: There are to be no strikes.
    """

    def __init__(
        self,
        strikes: int = 3,
        seconds: float = 300.0,
        *,
        metrics: MetricsSink | None = None,
        clock: Clock = time,
    ) -> None:
        if strikes < 1:
            raise ConfigError(f"strikes = {strikes}: allowed is an integer >= 1")
        self._strikes = strikes
        self._seconds = seconds
        self._metrics = metrics or NullMetrics()
        self._clock = clock
        self._faults: dict[str, int] = {}
        self._until: dict[str, int] = {}  # monotonic ns
        self._lock = threading.Lock()

    def holds(self, worker_id: str) -> bool:
        """Returns whether a peer is shut out now."""
        with self._lock:
            until = self._until.get(worker_id)
            if until is None or self._clock.monotonic_ns() < until:
                return until is not None
            del self._until[worker_id]
            return False

    def strike(self, worker_id: str, reason: str) -> None:
        """Notes a fault."""
        with self._lock:
            faults = self._faults[worker_id] = self._faults.get(worker_id, 0) + 1
            if faults < self._strikes:
                return
            del self._faults[worker_id]
            self._until[worker_id] = self._clock.monotonic_ns() + round(self._seconds * 1e9)
        self._metrics.count("kvbm_peer_quarantines_total")
        _LOG.warning("%s is not asked for %g seconds, after %d faults: %s", worker_id, self._seconds, faults, reason)

    def clear(self, worker_id: str) -> None:
        """Notes that all was well."""
        with self._lock:
            self._faults.pop(worker_id, None)
