"""`kvbm-jax dashboard`: the Grafana dashboard, to be imported there."""

import argparse
import json

from kvbm_jax.cli.report import Report

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "print the Grafana dashboard of the metrics"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments of its own."""


def run(args: argparse.Namespace) -> Report:
    """Reads the dashboard."""
    from kvbm_jax.monitoring import dashboard  # noqa: PLC0415 (`--help` need not)

    found = dashboard()
    return Report(found, json.dumps(found, indent=1))
