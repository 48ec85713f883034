"""What looks at a manager from outside: Prometheus, and a Grafana dashboard for what it collects.

prometheus        PrometheusCollector for a registry of yours, PrometheusEndpoint for one of its own; extra `prometheus`
dashboard.json    for Grafana's import; `kvbm-jax dashboard` prints it
tracing           spans of OpenTelemetry for a request's life; extra `opentelemetry`
"""

import importlib.resources
from typing import Any

import msgspec

__all__ = ["dashboard"]


def dashboard() -> dict[str, Any]:
    """Returns the Grafana dashboard."""
    text = importlib.resources.files(__name__).joinpath("dashboard.json").read_bytes()
    found: dict[str, Any] = msgspec.json.decode(text)
    return found
