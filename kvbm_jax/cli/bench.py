"""`kvbm-jax bench`: how fast parts of the library are here, each beside a baseline of the same run."""

import argparse
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Concatenate

from kvbm_jax.cli.arguments import at_least, folder
from kvbm_jax.cli.report import Report, progress

if TYPE_CHECKING:
    from kvbm_jax.bench.timing import Row, Timing

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "time parts of the library beside a baseline"
_OFFLOAD = "time how blocks move between device, host memory and disk"
_POOL = "time the bookkeeping of a server's step"
_EVENTS = "time how events are published over ZeroMQ and to JetStream, and what that costs a decode step"
_KERNELS = "time how blocks and tokens move within and out of a cache"
_TRANSFER = "time how blocks are pulled out of another process's memory"
_HASH = "time how the blocks of a sequence are hashed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the benches and their arguments."""
    positive = at_least(1)
    common = argparse.ArgumentParser(add_help=False)
    # Suppressed where it is absent, or it would undo a --json given before the bench's name.
    common.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print one JSON object")
    common.add_argument("--repeats", type=positive, default=7, metavar="R", help="times that count (default 7)")
    benches = parser.add_subparsers(required=True, metavar="BENCH")

    offload = benches.add_parser("offload", parents=[common], help=_OFFLOAD, description=_OFFLOAD.capitalize() + ".")
    offload.add_argument("--blocks", type=positive, default=96, metavar="N", help="blocks moved at once (default 96)")
    offload.add_argument(
        "--path", type=folder, metavar="DIR", help="folder on the disk to time (default the system's temporary folder)"
    )
    offload.set_defaults(bench=_offload)

    pools = benches.add_parser("pool", parents=[common], help=_POOL, description=_POOL.capitalize() + ".")
    pools.add_argument(
        "--blocks",
        type=at_least(65_536),  # the largest batch holds most of them
        default=65_536,
        metavar="N",
        help="blocks of the pool, at least 65536 (default 65536)",
    )
    pools.set_defaults(bench=_pool)

    events = benches.add_parser("events", parents=[common], help=_EVENTS, description=_EVENTS.capitalize() + ".")
    events.add_argument(
        "--blocks", type=positive, default=200_000, metavar="N", help="blocks of the longest trial (default 200000)"
    )
    events.set_defaults(bench=_events)

    moves = benches.add_parser("kernels", parents=[common], help=_KERNELS, description=_KERNELS.capitalize() + ".")
    moves.add_argument(
        "--mebibytes",
        type=at_least(4),  # one of the largest blocks
        default=32,
        metavar="N",
        help="what is moved at once, at least 4 (default 32)",
    )
    moves.set_defaults(bench=_kernels)

    transfers = benches.add_parser(
        "transfer", parents=[common], help=_TRANSFER, description=_TRANSFER.capitalize() + "."
    )
    transfers.add_argument(
        "--mebibytes", type=positive, default=64, metavar="N", help="what is pulled at once (default 64)"
    )
    transfers.set_defaults(bench=_transfer)

    hashes = benches.add_parser("hash", parents=[common], help=_HASH, description=_HASH.capitalize() + ".")
    hashes.add_argument(
        "--tokens",
        type=at_least(64),  # one block of the largest size
        default=131_072,
        metavar="N",
        help="length of the sequence, at least 64 (default 131072)",
    )
    hashes.set_defaults(bench=_hash)


def run(args: argparse.Namespace) -> Report:
    """Runs one bench."""
    report: Report = args.bench(args)
    return report


def _offload(args: argparse.Namespace) -> Report:
    from kvbm_jax.bench.offload import BLOCK_BYTES, measure  # noqa: PLC0415 (it brings JAX; `--help` need not)

    rows = _timed(args.repeats, measure, args.blocks, args.path)
    head = f"{args.blocks:,} blocks of {BLOCK_BYTES:,} bytes, medians of {args.repeats:,}"
    return _report("offload", head, rows)


def _pool(args: argparse.Namespace) -> Report:
    # XLA shares each gather from more than half a MiB out among its CPU threads, which takes longer than the gather.
    os.environ.setdefault("NPROC", "1")
    from kvbm_jax.bench.pool import measure  # noqa: PLC0415

    rows = _timed(args.repeats, measure, args.blocks)
    return _report("pool", f"{args.blocks:,} blocks, a step, medians of {args.repeats:,}", rows)


def _kernels(args: argparse.Namespace) -> Report:
    from kvbm_jax.bench.kernels import measure  # noqa: PLC0415

    rows = _timed(args.repeats, measure, args.mebibytes)
    return _report("kernels", f"{args.mebibytes:,} MiB, medians of {args.repeats:,}", rows)


def _hash(args: argparse.Namespace) -> Report:
    from kvbm_jax.bench.hash import measure  # noqa: PLC0415 (the hashing packages, too, `--help` need not)

    rows = _timed(args.repeats, measure, args.tokens)
    return _report("hash", f"{args.tokens:,} tokens, medians of {args.repeats:,}", rows, args.tokens)


def _events(args: argparse.Namespace) -> Report:
    from kvbm_jax.bench import events, telling  # noqa: PLC0415 (the packages of the transports)

    rows = _timed(args.repeats, events.measure, args.blocks) + _timed(args.repeats, telling.measure)
    return _report("events", f"to {args.blocks:,} blocks a trial, medians of {args.repeats:,}", rows)


def _transfer(args: argparse.Namespace) -> Report:
    from kvbm_jax.bench.transfer import measure  # noqa: PLC0415 (what it brings, `--help` need not)

    rows = _timed(args.repeats, measure, args.mebibytes << 20)
    return _report("transfer", f"{args.mebibytes:,} MiB a pull, medians of {args.repeats:,}", rows)


def _timed[**P](
    repeats: int,
    measure: "Callable[Concatenate[Timing, P], list[Row]]",
    *args: P.args,
    **kwargs: P.kwargs,
) -> "list[Row]":
    """Takes measurements, showing a person what is under way."""
    from kvbm_jax.bench.timing import Timing  # noqa: PLC0415

    with progress() as show:
        return measure(Timing(repeats, show), *args, **kwargs)


def _report(bench: str, head: str, rows: Sequence["Row"], tokens: int | None = None) -> Report:
    """Lays out the rows; people also see how many tokens a second that is, if each trial is over `tokens` of them."""
    width = max(len(row.case) for row in rows)
    rate = f"  {'tokens/s':>13}" if tokens else ""
    lines = [head, f"{'case':<{width}}  {'ms':>12}  {'baseline ms':>12}  {'ratio':>6}{rate}  baseline"]
    for row in rows:
        rate = f"  {tokens / row.seconds:>13,.0f}" if tokens else ""
        lines.append(
            f"{row.case:<{width}}  {row.seconds * 1e3:>12,.3f}  {row.baseline_seconds * 1e3:>12,.3f}  "
            f"{row.ratio:>6.2f}{rate}  {row.baseline}"
        )
    return Report({"bench": bench, "rows": [row.as_dict() for row in rows]}, "\n".join(lines))
