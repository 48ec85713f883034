"""The command line, `kvbm-jax`: one module per command, each light until its command runs.

Each command module has `add_arguments(parser)` and `run(args) -> Report`. This file parses, calls, and prints: a
table for people, or with `--json` one JSON object on the last line of standard output. Exit status 0 is fine, 1 a
check that failed or an error of this library (one line on standard error), 2 wrong usage.
"""

import argparse
import os
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
    try:
        args = _parser().parse_args(argv)
    except SystemExit:  # after help, or a complaint
        _say("")
        raise
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        try:
            report = _run(args.run, args)
        finally:
            for warning in caught:
                _complain("warning", warning.message)
    if report is None:
        return 1
    _say(f"{report.json() if args.json else report.text}\n")
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
    except BrokenPipeError:  # the command prints as it goes
        _hang_up()
        return Report({}, "")
    except KvbmError as error:
        _complain("error", error)
        return None


def _say(text: str) -> None:
    """Writes to standard output, whose reader may have left, as `head` does when it has enough."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _hang_up()


def _hang_up() -> None:
    """Has what is still to be written go nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _complain(kind: str, what: object) -> None:
    print(f"kvbm-jax: {kind}: {' '.join(str(what).split())}", file=sys.stderr)
