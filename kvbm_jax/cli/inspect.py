"""`kvbm-jax inspect`: what lies in a folder of the disk tier, and with `--verify` whether it is still what was written.

Reads only, and needs no lock: it may run beside the store at work, whose segments come and go meanwhile.
"""

import argparse
import dataclasses
from pathlib import Path

from kvbm_jax.cli.report import Report

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "list the segments of a disk tier and check them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the command's arguments."""
    parser.add_argument("path", type=Path, metavar="PATH", help="folder of the disk tier")
    parser.add_argument("--verify", action="store_true", help="read every block and compare its checksum")


def run(args: argparse.Namespace) -> Report:
    """Lists segments; status 1 if one cannot be read, or a block does not verify."""
    from kvbm_jax.offload.segments import inspect  # noqa: PLC0415 (it brings numpy; `--help` need not)

    found = inspect(args.path, verify=args.verify)
    segments = []
    for report in found:
        fields = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
        if report.identity is not None:
            fields["identity"] = dataclasses.asdict(report.identity)
            fields["fingerprint"] = report.identity.fingerprint.hex()
        segments.append(fields)
    bad = [report for report in found if report.status != "ok"]
    data = {
        "path": str(args.path),
        "verified": args.verify,
        "segments": segments,
        "blocks": sum(report.blocks for report in found),
        "live_bytes": sum(report.live_bytes for report in found),
        "physical_bytes": sum(report.physical_bytes for report in found),
        "corrupt_blocks": sum(report.corrupt_blocks or 0 for report in found) if args.verify else None,
        "unreadable": sum(report.status == "unreadable" for report in found),
        "ok": not bad,
    }
    lines = [f"{'segment':<18}  {'status':<10}  {'blocks':>7}  {'live bytes':>15}  {'on disk':>15}  identity"]
    for report in found:
        identity = report.reason
        if report.identity is not None:
            identity = f"{report.identity.fingerprint.hex()[:12]} {report.identity.model_id}"
        if report.corrupt_blocks:
            identity += f"; {report.corrupt_blocks} corrupt blocks"
        lines.append(
            f"{report.name:<18}  {report.status:<10}  {report.blocks:>7,}  {report.live_bytes:>15,}  "
            f"{report.physical_bytes:>15,}  {identity}"
        )
    if not found:
        lines = [f"no segments in {args.path}"]
    return Report(data, "\n".join(lines), status=1 if bad else 0)
