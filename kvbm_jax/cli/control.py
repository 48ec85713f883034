"""`kvbm-jax status`, `reset`, `evict`, `pin`, `unpin`, `flush`, `snapshot`, `log-level`: controls of a manager."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvbm_jax import logs
from kvbm_jax.cli.arguments import at_least, seconds
from kvbm_jax.cli.report import Report, table

__all__ = ["COMMANDS", "ControlCommand"]


@dataclasses.dataclass(frozen=True)
class ControlCommand:
    """One command: what it asks the controller, of which arguments."""

    name: str
    SUMMARY: str
    declare: Callable[[argparse.ArgumentParser], object]
    fields: tuple[str, ...] = ()

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declares the command's arguments."""
        self.declare(parser)
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--worker", metavar="ID", help="the worker of this user (default: the one that runs)")
        where.add_argument("--url", help="address of the controller, unix:///path or http://host:port")
        parser.add_argument("--token-file", type=Path, metavar="F", help="file of the controller's bearer token")
        parser.add_argument(
            "--wait", type=seconds, default=30.0, metavar="S", help="seconds to wait for the manager (30)"
        )

    def ask(self, args: argparse.Namespace) -> dict[str, Any]:
        """Returns what the controller answers."""
        from kvbm_jax.controller import ControlClient  # noqa: PLC0415 (it brings the manager; `--help` need not)
        from kvbm_jax.controller.address import read_token  # noqa: PLC0415

        token = None if args.token_file is None else read_token(args.token_file)
        client = ControlClient(args.url, worker_id=args.worker, token=token)
        given = {name: getattr(args, name) for name in self.fields}
        asked = {name: value for name, value in given.items() if value is not None and value is not False}
        return client.ask(self.name.replace("-", "_"), wait=args.wait, **asked)

    def run(self, args: argparse.Namespace) -> Report:
        """Asks the controller."""
        data = self.ask(args)
        return Report(data, table(_flat("", data)))


def _flat(prefix: str, data: dict[str, Any]) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = []
    for name, value in data.items():
        words = f"{prefix} {name.replace('_', ' ')}".strip()
        if isinstance(value, dict):
            rows += _flat(words, value)
        else:
            rows.append((words, f"{value:,}" if type(value) is int and name != "pid" else _word(value)))
    return rows


def _word(value: object) -> object:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else value


def _listing(data: dict[str, Any]) -> str:
    lines = [f"{'tier':<4}  {'block':>10}  {'hash':<32}  {'parent':<32}  tokens"]
    lines += [
        f"{row['tier']:<4}  {row['block_id']:>10}  {row['hash']:<32}  {row['parent'] or '':<32}  {row['tokens']}"
        for row in data["blocks"]
    ]
    return "\n".join(lines)


def _nothing(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments of its own."""


def _hashes(parser: argparse.ArgumentParser, *others: tuple[str, dict[str, Any]]) -> None:
    if not others:
        parser.add_argument("hashes", nargs="+", metavar="HASH", help="32 hexadecimal digits each")
        return
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--hashes", nargs="+", metavar="HASH", help="these blocks, by 32 hexadecimal digits each")
    for flag, options in others:
        what.add_argument(flag, **options)


_ALL: tuple[str, dict[str, Any]] = ("--all", {"action": "store_true", "help": "all of them"})
_TIER: tuple[str, dict[str, Any]] = ("--tier", {"metavar": "TIER", "help": "those of one tier: g1, g2, g3"})


def _snapshot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tier", metavar="TIER", help="blocks of one tier: g1, g2, g3 (default: all)")


class _Snapshot(ControlCommand):
    """Asks for all tiers if none is named, and lists the blocks."""

    def run(self, args: argparse.Namespace) -> Report:
        args.all = args.tier is None
        data = self.ask(args)
        return Report(data, _listing(data))


def _log_level(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("level", choices=logs.LEVELS)
    parser.add_argument("--logger", default="kvbm_jax", help="kvbm_jax (default) or a logger below it")


def _blocks(parser: argparse.ArgumentParser) -> None:
    _hashes(parser, ("--blocks", {"type": at_least(0), "metavar": "N", "help": "the first N in the order of eviction"}))


def _seconds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=seconds, default=60.0, metavar="S", help="how long it may take (default 60)")


COMMANDS = (
    ControlCommand("status", "show what a running manager holds", _nothing),
    ControlCommand(
        "reset",
        "have a running manager forget cached blocks",
        lambda p: _hashes(p, _ALL, _TIER),
        ("all", "tier", "hashes"),
    ),
    ControlCommand("evict", "have cached blocks leave the device for the tiers below", _blocks, ("blocks", "hashes")),
    ControlCommand("pin", "keep cached blocks on the device", _hashes, ("hashes",)),
    ControlCommand("unpin", "let go of pinned blocks", lambda p: _hashes(p, _ALL), ("all", "hashes")),
    ControlCommand("flush", "copy what is cached to the disk tier", _seconds, ("seconds",)),
    _Snapshot("snapshot", "list the blocks that a running manager holds", _snapshot, ("all", "tier")),
    ControlCommand("log-level", "set the log level of a running manager", _log_level, ("level", "logger")),
)
