"""The metrics of `kvbm_jax.metrics`, as Prometheus collects them; needs the extra `prometheus`.

A manager measures into `InMemoryMetrics`, a dictionary; everything else is done when somebody collects, on that thread.

    metrics = InMemoryMetrics()
    manager = BlockManager(config, metrics=metrics)
    registry.register(PrometheusCollector(metrics))       into a registry that is served already, or:
    endpoint = PrometheusEndpoint(metrics, port=9464)     http://127.0.0.1:9464/metrics

A metric without labels is told from the beginning, as 0; series with labels once they have been touched.
"""

import itertools
from collections.abc import Iterator

from kvbm_jax.closing import Closing
from kvbm_jax.errors import TransportError
from kvbm_jax.extras import needs
from kvbm_jax.metrics import METRICS, Histogram, InMemoryMetrics, Metric, MetricKind

with needs("prometheus", "the Prometheus exporter"):
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
    from prometheus_client.registry import Collector

__all__ = ["PrometheusCollector", "PrometheusEndpoint"]

type _Family = CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily

_LEGACY = {"kvbm_allocation_latency_seconds": "kvbm_allocation_latency"}
_FAMILIES = {
    MetricKind.COUNTER: CounterMetricFamily,
    MetricKind.GAUGE: GaugeMetricFamily,
    MetricKind.HISTOGRAM: HistogramMetricFamily,
}


class PrometheusCollector(Collector):
    """Hands what was measured to a registry of prometheus-client, whenever that is collected.

    One `InMemoryMetrics` may serve several managers; a registry takes one collector.

    Args:
      metrics: what managers measure into.
      legacy_metric_names: tell metrics under their former names too: `kvbm_allocation_latency`.
    """

    def __init__(self, metrics: InMemoryMetrics, *, legacy_metric_names: bool = False) -> None:
        self._metrics = metrics
        self._names = {name: [name] for name in METRICS}
        if legacy_metric_names:
            for name, former in _LEGACY.items():
                self._names[name].append(former)

    def describe(self) -> Iterator[_Family]:
        """Yields the families without series, so that a registry finds what it has already."""
        for name, metric in METRICS.items():
            for told in self._names[name]:
                yield _family(metric, told)

    def collect(self) -> Iterator[_Family]:
        """Yields the families with their series."""
        families = {name: [_family(metric, told) for told in self._names[name]] for name, metric in METRICS.items()}
        touched = set()
        for metric, label_values, value in self._metrics.series():
            touched.add(metric.name)
            for family in families[metric.name]:
                _add(family, label_values, value)
        for name, metric in METRICS.items():
            if name not in touched and not metric.labels:
                for family in families[name]:
                    _add(family, (), _nothing(metric))
        yield from itertools.chain.from_iterable(families.values())


class PrometheusEndpoint(Closing):
    """Serves metrics over HTTP, from a thread of its own, until it is closed.

    Args:
      metrics: what managers measure into.
      host: address to listen at; the default is reached from this machine alone.
      port: 0 for a free one.
      legacy_metric_names: see `PrometheusCollector`.

    Raises:
      TransportError: if the address cannot be had.
    """

    def __init__(
        self, metrics: InMemoryMetrics, *, host: str = "127.0.0.1", port: int = 0, legacy_metric_names: bool = False
    ) -> None:
        registry = prometheus_client.CollectorRegistry()
        registry.register(PrometheusCollector(metrics, legacy_metric_names=legacy_metric_names))
        try:
            self._server, self._thread = prometheus_client.start_http_server(port, host, registry)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise TransportError(f"metrics cannot be served at {host}:{port}: {reason}") from error
        self.url = f"http://{host}:{self._server.server_port}/metrics"

    def close(self) -> None:
        """Stops serving. Idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()


def _family(metric: Metric, name: str) -> _Family:
    made: _Family = _FAMILIES[metric.kind](name, metric.help, labels=metric.labels)
    return made


def _add(family: _Family, label_values: tuple[str, ...], value: float | Histogram) -> None:
    if isinstance(value, Histogram):
        assert isinstance(family, HistogramMetricFamily)  # noqa: S101 (a family is made of its metric's kind)
        counts = itertools.accumulate(count for _, count in value.buckets)
        bounds = ("+Inf" if bound == float("inf") else repr(bound) for bound, _ in value.buckets)
        family.add_metric(label_values, list(zip(bounds, counts, strict=True)), value.total)
    else:
        assert not isinstance(family, HistogramMetricFamily)  # noqa: S101
        family.add_metric(label_values, value)


def _nothing(metric: Metric) -> float | Histogram:
    if metric.kind is MetricKind.HISTOGRAM:
        return Histogram(0, 0.0, tuple((bound, 0) for bound in (*metric.buckets, float("inf"))))
    return 0.0
