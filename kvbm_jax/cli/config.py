"""`kvbm-jax config`: the configuration that file and environment add up to, or its JSON Schema."""

import argparse
import json
from pathlib import Path

from kvbm_jax.cli.report import Report, table

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "show the configuration that a manager would get"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--file", type=Path, metavar="F", help="read this TOML file too")
    what.add_argument("--schema", action="store_true", help="print the JSON Schema of the file instead")


def run(args: argparse.Namespace) -> Report:
    """Loads and checks the configuration."""
    from kvbm_jax.config import KvBlockManagerConfig  # noqa: PLC0415 (it brings numpy; `--help` need not)

    if args.schema:
        schema = KvBlockManagerConfig.json_schema()
        return Report(schema, json.dumps(schema, indent=2))
    values = KvBlockManagerConfig.load(args.file).as_dict()
    shown = ((name, "(unset)" if value is None else json.dumps(value)) for name, value in values.items())
    return Report(dict(values), table(shown))
