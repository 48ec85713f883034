"""The command line, `kvbm-jax`: one module per command, each light until its command runs.

Each command module has `add_arguments(parser)` and `run(args) -> Report`. This file parses, calls, and prints: a
table for people, or with `--json` one JSON object on the last line of standard output. Exit status 0 is fine, 1 a
check that failed or an error of this library (one line on standard error), 2 wrong usage.
"""

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

from kvbm_jax import __version__
from kvbm_jax.cli import bench, config, control, dashboard, doctor, events, inspect, replay
from kvbm_jax.cli.report import Report
from kvbm_jax.errors import KvbmError

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; wrong usage exits with 2.

    Args:
      argv: The arguments after the program's name; None for those of this process.
    """
    args = _parser().parse_args(argv)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            report = _run(args.run, args)
        finally:
            for warning in caught:
                _complain("warning", warning.message)
    if report is None:
        return 1
    print(report.json() if args.json else report.text)
    return report.status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kvbm-jax", description="A block-based KV cache for JAX.")
    parser.add_argument("--version", action="version", version=f"kvbm-jax {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    modules = {
        module.__name__.rpartition(".")[2]: module
        for module in (replay, inspect, config, bench, events, doctor, dashboard)
    }
    for name, asked in (modules | {asked.name: asked for asked in control.COMMANDS}).items():
        command = commands.add_parser(name, help=asked.SUMMARY, description=asked.SUMMARY.capitalize() + ".")
        command.add_argument("--json", action="store_true", help="print one JSON object")
        command.set_defaults(run=asked.run)
        asked.add_arguments(command)
    return parser


def _run(command: Callable[[argparse.Namespace], Report], args: argparse.Namespace) -> Report | None:
    """Runs a command; None if the library refused, which has then been said."""
    try:
        return command(args)
    except KvbmError as error:
        _complain("error", error)
        return None


def _complain(kind: str, what: object) -> None:
    print(f"kvbm-jax: {kind}: {' '.join(str(what).split())}", file=sys.stderr)
