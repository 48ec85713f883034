"""`kvbm-jax replay`: how much of a trace a pool of a given size would have found in its cache."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvbm_jax import eviction, extensions, policies
from kvbm_jax.cli import plot
from kvbm_jax.cli.arguments import at_least, listed
from kvbm_jax.cli.report import Report, progress, table
from kvbm_jax.errors import ConfigError

if TYPE_CHECKING:
    from kvbm_jax.replay import ComparedReplay

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "replay traces against the pool and count what its cache would have found"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    count, positive = at_least(0), at_least(1)
    names = ", ".join(policies.NAMES)
    parser.add_argument("traces", nargs="+", type=Path, metavar="TRACE", help="trace files, plain or gzipped, in order")
    parser.add_argument(
        "--num-blocks",
        type=listed(positive),
        required=True,
        metavar="N[,N...]",
        help="blocks of the pool; several sizes with --compare",
    )
    parser.add_argument("--host-blocks", type=count, default=0, metavar="N", help="blocks of tier G2 (default none)")
    parser.add_argument("--disk-blocks", type=count, default=0, metavar="N", help="blocks of tier G3 (default none)")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--policy",
        type=_policy,
        metavar="NAME",
        help=f"which blocks the pool evicts first: {names} (default lru), or one that a package offers",
    )
    chosen.add_argument(
        "--compare", type=listed(_policy), metavar="NAME,...", help="replay once for each of these policies and sizes"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="with --compare: draw hit rate over pool size (.png, .svg, .pdf)"
    )
    parser.add_argument("--limit", type=positive, metavar="R", help="stop after this many requests")
    parser.add_argument(
        "--shared-ids",
        action="store_true",
        help="equal ids in different files mean the same block (default: they do not)",
    )
    parser.set_defaults(refuse=parser.error)


def run(args: argparse.Namespace) -> Report:
    """Replays the traces."""
    if args.compare:
        return _compare(args)
    if args.plot is not None:
        args.refuse("argument --plot: draws a comparison; give --compare too")
    if len(args.num_blocks) > 1:
        args.refuse("argument --num-blocks: several sizes are for --compare")
    return _single(args)


def _options(args: argparse.Namespace, show: Callable[[str], None]) -> dict[str, Any]:
    """What a replay and a comparison take alike."""
    return {
        "host_blocks": args.host_blocks,
        "disk_blocks": args.disk_blocks,
        "limit": args.limit,
        "shared_ids": args.shared_ids,
        "progress": lambda done, total: show(f"{done:,} of {total:,} requests"),
    }


def _single(args: argparse.Namespace) -> Report:
    from kvbm_jax.replay import replay  # noqa: PLC0415 (it compiles; `--help` need not)

    with progress() as show:
        result = replay(args.traces, args.num_blocks[0], policy=args.policy or "lru", **_options(args, show))
    data = result.as_dict()
    rows = []
    for name, value in data.items():
        words = name.replace("_", " ")
        if isinstance(value, dict):
            rows += [(f"{words} {part}", f"{count:,}") for part, count in value.items()]
        else:
            rows.append((words, _number(name, value)))
    return Report(data, table(rows))


def _compare(args: argparse.Namespace) -> Report:
    from kvbm_jax.replay import compare  # noqa: PLC0415

    if args.plot is not None:
        plot.require(args.plot)
    with progress() as show:
        rows = compare(args.traces, args.num_blocks, args.compare, **_options(args, show))
    if args.plot is not None:
        plot.draw(args.plot, rows)
    return Report({"rows": [row.as_dict() for row in rows]}, _grid(rows))


def _grid(rows: Sequence["ComparedReplay"]) -> str:
    """A line for each replay; tiers that found nothing have no column."""
    tiers = [tier for tier in rows[0].result.hits if tier == "g1" or any(row.result.hits[tier] for row in rows)]
    head = ["policy", "blocks", *(f"hits {tier}" for tier in tiers), "hit rate", "evictions", "rejected", "us/request"]
    lines = [head]
    for row in rows:
        found = row.result
        lines.append(
            [
                row.policy,
                f"{row.num_blocks:,}",
                *(f"{found.hits[tier]:,}" for tier in tiers),
                f"{found.hit_rate:.1%}",
                f"{found.evictions:,}",
                f"{found.rejected:,}",
                f"{found.us_per_request:,.1f}",
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _policy(text: str) -> str:
    try:
        return extensions.check_name(eviction.KIND, text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _number(name: str, value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}"
    return f"{value:.1%}" if name.endswith("_rate") else f"{value:,.3f}"
