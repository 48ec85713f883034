"""Metrics as Prometheus collects them, and everything that names them: exposition, dashboard, documentation, code."""

import ast
import json
import math
import pathlib
import re
import urllib.request

import pytest

import kvbm_jax
from kvbm_jax.cli import main
from kvbm_jax.errors import TransportError
from kvbm_jax.metrics import METRICS, InMemoryMetrics, MetricKind
from kvbm_jax.monitoring import dashboard
from tests.tiered import HOST, make, prompt, serve, settle

prometheus_client = pytest.importorskip("prometheus_client")
from prometheus_client import parser  # noqa: E402
from prometheus_client.openmetrics import exposition as openmetrics  # noqa: E402
from prometheus_client.openmetrics import parser as openmetrics_parser  # noqa: E402

from kvbm_jax.monitoring.prometheus import PrometheusCollector, PrometheusEndpoint  # noqa: E402

PACKAGE = pathlib.Path(kvbm_jax.__file__).parent
DOCUMENT = PACKAGE.parent / "docs" / "metrics.md"
NAME = re.compile(r"\bkvbm_(?!jax)[a-z_]+")


def expose(metrics, **options):
    registry = prometheus_client.CollectorRegistry()
    registry.register(PrometheusCollector(metrics, **options))
    return prometheus_client.generate_latest(registry).decode()


def parsed(text):
    return {family.name: family for family in parser.text_string_to_metric_families(text)}


def family_name(name):
    return name.removesuffix("_total") if METRICS[name].kind is MetricKind.COUNTER else name


def test_every_metric_is_told_from_the_beginning():
    families = parsed(expose(InMemoryMetrics()))
    assert families.keys() == {family_name(name) for name in METRICS}
    for name, metric in METRICS.items():
        family = families[family_name(name)]
        assert family.type == metric.kind.value
        assert family.documentation == metric.help
        values = {sample.value for sample in family.samples}
        assert values == (set() if metric.labels else {0.0})


def test_what_a_manager_measures_is_exposed_as_it_is():
    metrics = InMemoryMetrics()
    with make(**HOST, host_blocks=4, metrics=metrics, max_sequences=2) as manager:
        for _ in range(2):
            for first in (0, 100, 200):
                serve(manager, prompt(first, 3))
        settle(manager)
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parsed(expose(metrics)).values()
        for sample in family.samples
    }
    for series in metrics.series():
        labels = frozenset(zip(series.metric.labels, series.label_values, strict=True))
        if series.metric.kind is not MetricKind.HISTOGRAM:
            assert found[series.metric.name, labels] == series.value
            continue
        assert found[f"{series.metric.name}_sum", labels] == series.value.total
        assert found[f"{series.metric.name}_count", labels] == series.value.count
        below = 0
        for bound, count in series.value.buckets:
            below += count
            shown = "+Inf" if math.isinf(bound) else repr(bound)
            assert found[f"{series.metric.name}_bucket", labels | {("le", shown)}] == below
    assert found["kvbm_prefix_hit_tokens_total", frozenset({("tier", "g2")})] > 0
    assert found["kvbm_allocation_latency_seconds_count", frozenset()] == 6


def test_names_of_tenants_are_escaped():
    metrics = InMemoryMetrics()
    odd = 'a"b\\c\nd}'
    metrics.gauge("kvbm_tenant_blocks_held", 3, tenant=odd)
    [sample] = parsed(expose(metrics))["kvbm_tenant_blocks_held"].samples
    assert (sample.labels, sample.value) == ({"tenant": odd}, 3)


def test_former_names_are_told_when_asked_for():
    metrics = InMemoryMetrics()
    metrics.observe("kvbm_allocation_latency_seconds", 0.5)
    assert "kvbm_allocation_latency" not in parsed(expose(metrics))
    families = parsed(expose(metrics, legacy_metric_names=True))
    former, now = families["kvbm_allocation_latency"], families["kvbm_allocation_latency_seconds"]
    assert [(s.labels, s.value) for s in former.samples] == [(s.labels, s.value) for s in now.samples]


def test_who_asks_for_openmetrics_reads_the_same():
    metrics = InMemoryMetrics()
    metrics.count("kvbm_eviction_count_total", 3)
    registry = prometheus_client.CollectorRegistry()
    registry.register(PrometheusCollector(metrics, legacy_metric_names=True))
    text = openmetrics.generate_latest(registry).decode()
    families = {family.name: family for family in openmetrics_parser.text_string_to_metric_families(text)}
    assert families.keys() == {family_name(name) for name in METRICS} | {"kvbm_allocation_latency"}
    [sample] = families["kvbm_eviction_count"].samples
    assert (sample.name, sample.value) == ("kvbm_eviction_count_total", 3)


def test_a_registry_of_the_users_takes_it_once_beside_others():
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.Counter("requests", "of the user's own", registry=registry).inc()
    collector = PrometheusCollector(InMemoryMetrics())
    registry.register(collector)
    with pytest.raises(ValueError, match="Duplicated timeseries"):
        registry.register(PrometheusCollector(InMemoryMetrics()))
    assert registry.get_sample_value("requests_total") == 1
    assert registry.get_sample_value("kvbm_eviction_count_total") == 0
    registry.unregister(collector)
    assert registry.get_sample_value("kvbm_eviction_count_total") is None


def test_the_endpoint_serves_what_is_measured_now():
    metrics = InMemoryMetrics()
    with PrometheusEndpoint(metrics) as endpoint:
        for count in (1, 2):
            metrics.count("kvbm_eviction_count_total")
            with urllib.request.urlopen(endpoint.url, timeout=60) as response:
                families = parsed(response.read().decode())
            assert [sample.value for sample in families["kvbm_eviction_count"].samples] == [count]
        with pytest.raises(
            TransportError, match=r"metrics cannot be served at 127\.0\.0\.1:\d+: Address already in use"
        ):
            PrometheusEndpoint(metrics, port=int(endpoint.url.split(":")[2].split("/")[0]))
    endpoint.close()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(endpoint.url, timeout=60)


def base_of(name):
    """The metric that a series of an exposition belongs to."""
    for suffix in ("", "_bucket", "_sum", "_count"):
        base = name.removesuffix(suffix)
        if name.endswith(suffix) and base in METRICS and (not suffix or METRICS[base].kind is MetricKind.HISTOGRAM):
            return METRICS[base]
    raise AssertionError(f"{name} is no metric")


def expressions():
    found = dashboard()
    for panel in found["panels"]:
        for target in panel["targets"]:
            yield target["expr"]
    for variable in found["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["definition"]


def test_the_dashboard_asks_for_metrics_and_labels_that_exist():
    shown = set()
    for expression in expressions():
        named = [base_of(name) for name in NAME.findall(expression)]
        assert named, expression
        shown |= {metric.name for metric in named}
        labels = {label for metric in named for label in metric.labels} | {"le", "instance"}
        asked = {
            label for group in re.findall(r"(?:by|ignoring) \(([^)]*)\)", expression) for label in group.split(", ")
        }
        assert asked <= labels, expression
        if "le" in asked:
            assert all(metric.kind is MetricKind.HISTOGRAM for metric in named)
        for metric in named:  # counters are looked at by their rate, gauges as they are
            rated = re.search(rf"rate\({metric.name}", expression) is not None
            assert rated == (metric.kind is not MetricKind.GAUGE) or expression.startswith("label_values")
        assert expression.count("(") == expression.count(")")
    assert shown == METRICS.keys()


def test_the_dashboard_is_one_that_grafana_imports():
    found = dashboard()
    assert found["schemaVersion"] >= 36
    assert len({panel["id"] for panel in found["panels"]}) == len(found["panels"])
    places = {(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in found["panels"]}
    assert len(places) == len(found["panels"])
    for panel in found["panels"]:
        assert panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
        legends = {
            label for target in panel["targets"] for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
        }
        assert legends <= {label for target in panel["targets"] for label in re.findall(r"\w+", target["expr"])}


def test_the_command_line_prints_the_dashboard(capsys):
    assert main(["dashboard"]) == 0
    assert json.loads(capsys.readouterr().out) == dashboard()


def test_every_metric_is_documented_as_it_is():
    rows = re.findall(r"^\| `(kvbm_\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    told = {name: (kind, tuple(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows}
    assert told == {name: (metric.kind.value, metric.labels, metric.help) for name, metric in METRICS.items()}


def test_every_metric_is_measured_somewhere():
    measured = set()
    for file in PACKAGE.rglob("*.py"):
        if file.name != "metrics.py" and "monitoring" not in file.parts:
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in METRICS:
                    measured.add(node.value)
    assert measured == METRICS.keys()
