import math
import re
import threading

import pytest

from kvbm_jax.errors import ConfigError
from kvbm_jax.metrics import METRICS, InMemoryMetrics, MetricKind, NullMetrics
from kvbm_jax.protocols import MetricsSink, Tier


def test_the_table_follows_the_conventions_of_prometheus():
    for name, metric in METRICS.items():
        assert re.fullmatch(r"kvbm_[a-z_]+", name)
        assert name == metric.name
        assert metric.help
        assert name.endswith("_total") == (metric.kind is MetricKind.COUNTER)
        assert bool(metric.buckets) == (metric.kind is MetricKind.HISTOGRAM)
        assert list(metric.buckets) == sorted(set(metric.buckets))


def test_the_fixed_names_are_declared():
    assert METRICS["kvbm_blocks_allocated"].labels == METRICS["kvbm_blocks_free"].labels == ("tier",)
    assert METRICS["kvbm_allocation_latency_seconds"].kind is MetricKind.HISTOGRAM
    assert METRICS["kvbm_eviction_count_total"].kind is MetricKind.COUNTER


def test_counters_add_and_gauges_hold_the_last_value():
    metrics = InMemoryMetrics()
    metrics.count("kvbm_eviction_count_total")
    metrics.count("kvbm_eviction_count_total", 4)
    for tier in (Tier.G1, Tier.G2):
        metrics.gauge("kvbm_blocks_free", 9, tier=tier.label)
        metrics.gauge("kvbm_blocks_free", int(tier), tier=tier.label)
    assert metrics.snapshot() == {
        "kvbm_eviction_count_total": 5,
        'kvbm_blocks_free{tier="g1"}': 1,
        'kvbm_blocks_free{tier="g2"}': 2,
    }


def test_histograms_count_by_bucket_bounds_included():
    metrics = InMemoryMetrics()
    bounds = METRICS["kvbm_allocation_latency_seconds"].buckets
    for value in (0, bounds[0], bounds[1], 100.0):
        metrics.observe("kvbm_allocation_latency_seconds", value)
    found = metrics.snapshot()["kvbm_allocation_latency_seconds"]
    assert (found.count, found.total) == (4, pytest.approx(100 + bounds[0] + bounds[1]))
    assert [n for _, n in found.buckets] == [2, 1, *[0] * (len(bounds) - 2), 1]
    assert found.buckets[-1] == (math.inf, 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.count("kvbm_evictions"), "no metric 'kvbm_evictions' is declared; declared are kvbm_"),
        (lambda m: m.gauge("kvbm_eviction_count_total", 1), "is a counter, used as a gauge"),
        (lambda m: m.gauge("kvbm_blocks_free", 1), r"has the labels \[tier\]; given are \[\]"),
        (lambda m: m.gauge("kvbm_blocks_free", 1, level="g1"), r"given are \[level\]"),
        (lambda m: m.observe("kvbm_allocation_latency_seconds", 1, tier="g1"), r"given are \[tier\]"),
        (lambda m: m.count("kvbm_eviction_count_total", -1), "cannot go down by 1"),
    ],
)
def test_undeclared_use_is_an_error(call, message):
    metrics = InMemoryMetrics()
    with pytest.raises(ConfigError, match=message):
        call(metrics)
    assert metrics.snapshot() == {}


def test_counting_from_many_threads_loses_nothing():
    metrics = InMemoryMetrics()
    threads = [
        threading.Thread(target=lambda: [metrics.count("kvbm_eviction_count_total") for _ in range(2000)])
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.snapshot() == {"kvbm_eviction_count_total": 8000}


def test_null_metrics_takes_anything_and_keeps_nothing():
    sink: MetricsSink = NullMetrics()
    sink.count("kvbm_eviction_count_total")
    sink.gauge("kvbm_blocks_free", 1, tier="g1")
    sink.observe("kvbm_allocation_latency_seconds", 1)
    assert vars(sink) == {}
