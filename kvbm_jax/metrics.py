"""The library's metrics: their declared names, and the two sinks that need no metrics library.

Every metric stands in the table `METRICS` with its kind, its labels and a line of help; exporters
(Prometheus, say) build themselves from it. `NullMetrics` is what runs when nobody measures, `InMemoryMetrics`
serves tests and notebooks. A name that is not declared, or labels other than the declared ones, is an error
and not a new series.
"""

import contextlib
import enum
import logging
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from kvbm_jax.errors import ConfigError, KvbmError
from kvbm_jax.protocols import MetricsSink

__all__ = ["METRICS", "Metric", "MetricKind", "Histogram", "Series", "NullMetrics", "InMemoryMetrics", "GuardedMetrics"]


_LOG = logging.getLogger(__name__)


class MetricKind(enum.StrEnum):
    """How a metric moves: a counter up, a gauge to any value, a histogram collects observations."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """Declaration of one metric."""

    name: str
    kind: MetricKind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()  # upper bounds of a histogram's buckets, rising; one more is open above


_SECONDS = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0)
_EDGE = ("source", "target")
_ENGINE = ("engine", "operation")
METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("kvbm_blocks_allocated", MetricKind.GAUGE, "blocks held by sequences", ("tier",)),
        Metric("kvbm_blocks_free", MetricKind.GAUGE, "blocks that an allocation could take", ("tier",)),
        Metric("kvbm_tenant_blocks_held", MetricKind.GAUGE, "blocks held by a tenant's sequences", ("tenant",)),
        Metric("kvbm_tenant_blocks_resident", MetricKind.GAUGE, "these, and what it has cached", ("tenant",)),
        Metric(
            "kvbm_allocation_latency_seconds",
            MetricKind.HISTOGRAM,
            "time of one allocation call, evictions included",
            buckets=_SECONDS,
        ),
        Metric("kvbm_eviction_count_total", MetricKind.COUNTER, "registered blocks evicted from the device"),
        Metric("kvbm_prefix_query_tokens_total", MetricKind.COUNTER, "tokens looked up in the prefix index"),
        Metric("kvbm_prefix_hit_tokens_total", MetricKind.COUNTER, "of these, tokens found, by tier", ("tier",)),
        Metric("kvbm_transfer_blocks_total", MetricKind.COUNTER, "blocks copied from tier to tier", _EDGE),
        Metric("kvbm_transfer_bytes_total", MetricKind.COUNTER, "bytes copied from tier to tier", _EDGE),
        Metric("kvbm_transfer_failures_total", MetricKind.COUNTER, "blocks that failed to cross", (*_EDGE, "reason")),
        Metric("kvbm_transfer_seconds", MetricKind.HISTOGRAM, "time of one batch of copies", _EDGE, _SECONDS),
        Metric("kvbm_transfer_in_flight_bytes", MetricKind.GAUGE, "staging memory in use"),
        Metric("kvbm_transfer_queue_depth", MetricKind.GAUGE, "batches waiting for the offload worker"),
        Metric("kvbm_offload_dropped_blocks_total", MetricKind.COUNTER, "evicted blocks lost to backpressure"),
        Metric("kvbm_engine_bytes_total", MetricKind.COUNTER, "bytes read from peers or written to them", _ENGINE),
        Metric("kvbm_engine_requests_total", MetricKind.COUNTER, "batches read from peers or written to them", _ENGINE),
        Metric("kvbm_engine_failures_total", MetricKind.COUNTER, "of these, batches that failed", (*_ENGINE, "reason")),
        Metric("kvbm_engine_seconds", MetricKind.HISTOGRAM, "time of one batch, waiting included", _ENGINE, _SECONDS),
        Metric("kvbm_peer_quarantines_total", MetricKind.COUNTER, "peers shut out after repeated faults"),
        Metric("kvbm_leased_blocks", MetricKind.GAUGE, "host blocks that peers may be reading"),
        Metric("kvbm_leases_expired_total", MetricKind.COUNTER, "leases that peers did not give back in time"),
        Metric(
            "kvbm_migrations_total",
            MetricKind.COUNTER,
            "sequences handed over between workers, by how it ended",
            ("direction", "outcome"),
        ),
        Metric(
            "kvbm_migration_seconds",
            MetricKind.HISTOGRAM,
            "time from the last token here to the end of the hand-over",
            ("direction",),
            _SECONDS,
        ),
        Metric("kvbm_events_published_total", MetricKind.COUNTER, "events published"),
        Metric(
            "kvbm_events_dropped_total",
            MetricKind.COUNTER,
            "events dropped for a subscriber or a network too slow, or a message too long",
        ),
        Metric("kvbm_events_queue_depth", MetricKind.GAUGE, "batches waiting to be sent to the network"),
    )
}


@dataclass(frozen=True, slots=True)
class Histogram:
    """What a histogram has collected."""

    count: int
    total: float
    buckets: tuple[tuple[float, int], ...]  # (upper bound, observations at or below it and above the last)


class Series(NamedTuple):
    """One series: a metric under one set of label values."""

    metric: Metric
    label_values: tuple[str, ...]  # in the order of `metric.labels`
    value: float | Histogram

    @property
    def name(self) -> str:
        """As Prometheus writes it."""
        pairs = ",".join(f'{k}="{v}"' for k, v in zip(self.metric.labels, self.label_values, strict=True))
        return f"{self.metric.name}{{{pairs}}}" if pairs else self.metric.name


class NullMetrics:
    """Measures nothing."""

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Does nothing."""

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Does nothing."""

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Does nothing."""


class InMemoryMetrics:
    """Keeps every series in memory; `snapshot` returns them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, tuple[str, ...]], float] = {}
        self._counts: dict[tuple[str, tuple[str, ...]], list[int]] = {}

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Adds to a counter."""
        if amount < 0:
            raise ConfigError(f"{name} is a counter: it cannot go down by {-amount}")
        key = name, _label_values(name, MetricKind.COUNTER, labels)
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Sets a gauge."""
        key = name, _label_values(name, MetricKind.GAUGE, labels)
        with self._lock:
            self._values[key] = value

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Adds one value to a histogram."""
        key = name, _label_values(name, MetricKind.HISTOGRAM, labels)
        bounds = METRICS[name].buckets
        bucket = sum(value > bound for bound in bounds)
        with self._lock:
            self._values[key] = self._values.get(key, 0) + value
            self._counts.setdefault(key, [0] * (len(bounds) + 1))[bucket] += 1

    def series(self) -> list[Series]:
        """Returns every series touched so far."""
        with self._lock:
            values, counts = dict(self._values), {key: list(found) for key, found in self._counts.items()}
        found = []
        for (name, label_values), value in values.items():
            metric = METRICS[name]
            collected: float | Histogram = value
            if metric.kind is MetricKind.HISTOGRAM:
                in_buckets = counts[name, label_values]
                bounds = (*metric.buckets, float("inf"))
                collected = Histogram(sum(in_buckets), value, tuple(zip(bounds, in_buckets, strict=True)))
            found.append(Series(metric, label_values, collected))
        return found

    def snapshot(self) -> dict[str, float | Histogram]:
        """Returns every series touched so far, named as Prometheus does: `name{label="value"}`."""
        return {series.name: series.value for series in self.series()}


class GuardedMetrics:
    """Passes measurements on to a sink that may break: what it raises is logged, and the caller goes on.

    The library's own mistakes, undeclared names for example, still raise.

    Args:
      sink: takes the measurements.
    """

    def __init__(self, sink: MetricsSink) -> None:
        self._sink = sink

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Adds to a counter."""
        with _logged(name):
            self._sink.count(name, amount, **labels)

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Sets a gauge."""
        with _logged(name):
            self._sink.gauge(name, value, **labels)

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Adds one value to a histogram."""
        with _logged(name):
            self._sink.observe(name, value, **labels)


@contextlib.contextmanager
def _logged(name: str) -> Iterator[None]:
    try:
        yield
    except KvbmError:
        raise
    except Exception:  # noqa: BLE001 (a sink may raise anything)
        _LOG.exception("the metrics sink failed on %s", name)


def _label_values(name: str, kind: MetricKind, labels: dict[str, str]) -> tuple[str, ...]:
    metric = METRICS.get(name)
    if metric is None:
        raise ConfigError(f"no metric {name!r} is declared; declared are {_listed(METRICS)}")
    if metric.kind is not kind:
        raise ConfigError(f"{name} is a {metric.kind}, used as a {kind}")
    if labels.keys() != set(metric.labels):
        raise ConfigError(f"{name} has the labels [{_listed(metric.labels)}]; given are [{_listed(labels)}]")
    return tuple(labels[label] for label in metric.labels)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
