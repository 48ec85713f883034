"""`kvbm-jax replay`: how much of a trace a pool of a given size would have found in its cache."""

import argparse
from pathlib import Path

from kvbm_jax.cli.arguments import at_least
from kvbm_jax.cli.report import Report, show_progress, table

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "replay traces against the pool and count what its cache would have found"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    count, positive = at_least(0), at_least(1)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="trace files, plain or gzipped, in order")
    parser.add_argument("--num-blocks", type=positive, required=True, metavar="N", help="blocks of the pool")
    parser.add_argument("--host-blocks", type=count, default=0, metavar="N", help="blocks of tier G2 (default none)")
    parser.add_argument("--disk-blocks", type=count, default=0, metavar="N", help="blocks of tier G3 (default none)")
    parser.add_argument("--limit", type=positive, metavar="R", help="stop after this many requests")
    parser.add_argument(
        "--shared-ids",
        action="store_true",
        help="equal ids in different files mean the same block (default: they do not)",
    )


def run(args: argparse.Namespace) -> Report:
    """Replays the traces."""
    from kvbm_jax.replay import replay  # noqa: PLC0415 (it compiles; `--help` need not)

    result = replay(
        args.traces,
        args.num_blocks,
        host_blocks=args.host_blocks,
        disk_blocks=args.disk_blocks,
        limit=args.limit,
        shared_ids=args.shared_ids,
        progress=lambda done, total: show_progress(f"{done:,} of {total:,} requests"),
    )
    show_progress("")
    data = result.as_dict()
    rows = []
    for name, value in data.items():
        words = name.replace("_", " ")
        if isinstance(value, dict):
            rows += [(f"{words} {part}", f"{count:,}") for part, count in value.items()]
        else:
            rows.append((words, _number(name, value)))
    return Report(data, table(rows))


def _number(name: str, value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}"
    return f"{value:.1%}" if name.endswith("_rate") else f"{value:,.3f}"
