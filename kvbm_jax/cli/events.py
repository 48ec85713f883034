"""`kvbm-jax events tail`: what workers say about their blocks, line by line as it comes.

Every item is a line: an event, a snapshot, a gap; with `--json` an object each, whose `item` says which. The last line
is the summary. Ctrl-C ends it, and is no error.
"""

import argparse
import collections
import contextlib
import datetime
import itertools
import json
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from kvbm_jax.cli.arguments import at_least
from kvbm_jax.cli.report import Report
from kvbm_jax.errors import ConfigError

if TYPE_CHECKING:
    from kvbm_jax.events import KvEvent, StreamItem, Subscription

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "follow the events of workers"
_TAIL = "print events as they come"
_POLL = 0.2  # seconds between looks at the clock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the subcommand and its arguments."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    tail = commands.add_parser("tail", help=_TAIL, description=_TAIL.capitalize() + ".")
    # Suppressed where it is absent, or it would undo a --json given before the subcommand's name.
    tail.add_argument("--json", action="store_true", default=argparse.SUPPRESS, help="print JSON objects")
    tail.add_argument(
        "--url",
        metavar="URL",
        help="tcp://HOST:PORT of a ZeroMQ publisher, or nats://HOST of a server (default: this host's own)",
    )
    tail.add_argument("--worker-id", default="0", metavar="ID", help="who a ZeroMQ publisher is (default 0)")
    tail.add_argument("--core", action="store_true", help="NATS without JetStream")
    tail.add_argument("--events", type=at_least(1), metavar="N", help="stop after N events")
    tail.add_argument("--seconds", type=at_least(1), metavar="S", help="stop after S seconds")
    tail.set_defaults(tail=_tail)


def run(args: argparse.Namespace) -> Report:
    """Runs the subcommand."""
    report: Report = args.tail(args)
    return report


def _tail(args: argparse.Namespace) -> Report:
    counts: collections.Counter[str] = collections.Counter()
    # Ctrl-C is how a person ends it.
    with _subscribe(args) as subscription, contextlib.suppress(KeyboardInterrupt):
        for line in itertools.chain.from_iterable(map(_lines, _until(subscription, args.seconds))):
            counts[line["item"]] += 1
            print(json.dumps(line) if args.json else _text(line), flush=True)
            if counts["event"] == args.events:
                break
    data = {"events": counts["event"], "snapshots": counts["snapshot"], "gaps": counts["gap"]}
    return Report(data, ", ".join(f"{count:,} {name}" for name, count in data.items()))


def _subscribe(args: argparse.Namespace) -> "Subscription":
    if args.url is not None and args.url.startswith(("tcp://", "ipc://")):
        from kvbm_jax.transports.factories import replay_endpoint  # noqa: PLC0415 (the packages of the transports)
        from kvbm_jax.transports.zmq_subscriber import (  # noqa: PLC0415
            ZmqKvEventSubscriberConfig,
            subscribe_zmq,
        )

        return subscribe_zmq(
            ZmqKvEventSubscriberConfig(
                endpoint=args.url, replay_endpoint=replay_endpoint(args.url), worker_id=args.worker_id
            )
        )
    from kvbm_jax.transports.nats_connection import NatsConnection  # noqa: PLC0415
    from kvbm_jax.transports.nats_server import SharedNatsServer  # noqa: PLC0415
    from kvbm_jax.transports.nats_subscriber import NatsKvEventSubscriberConfig, subscribe_nats  # noqa: PLC0415

    connection = SharedNatsServer().find() if args.url is None else NatsConnection.from_url(args.url)
    if connection is None:
        raise ConfigError("no worker of this host runs a NATS server; say with --url whose events to follow")
    return subscribe_nats(NatsKvEventSubscriberConfig(connection=connection, jetstream=not args.core))


def _until(subscription: "Subscription", seconds: int | None) -> "Iterator[StreamItem]":
    """The items of a subscription until it or the time has ended."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while not subscription.ended and (deadline is None or time.monotonic() < deadline):
        item = subscription.poll(_POLL)
        if item is not None:
            yield item


def _lines(item: "StreamItem") -> Iterator[dict[str, Any]]:
    """An item as objects fit for JSON."""
    from kvbm_jax.events import EventGap, WorkerSnapshot  # noqa: PLC0415

    if isinstance(item, EventGap):
        yield {"item": "gap", "batches": item.batches, "events": item.events}
    elif isinstance(item, WorkerSnapshot):
        blocks = sum(map(len, item.batches))
        yield {"item": "snapshot", "worker_id": item.worker_id, "blocks": blocks, "next_event_id": item.next_event_id}
    else:
        for event in item:
            yield {"item": "event", **_fields(event)}


def _fields(event: "KvEvent") -> dict[str, Any]:
    return {
        "event_id": event.event_id,
        "timestamp": event.timestamp,
        "worker_id": event.worker_id,
        "dp_rank": event.dp_rank,
        "event_type": str(event.event_type),
        "tier": event.tier and event.tier.label,
        "block_id": event.block_id,
        "group_idx": event.group_idx,
        "sequence_hash": event.sequence_hash and event.sequence_hash.hex(),
        "parent_hash": event.parent_hash and event.parent_hash.hex(),
        "tokens": len(event.token_ids),
        "lora_name": event.lora_name,
        "from_tier": event.from_tier and event.from_tier.label,
        "to_worker": event.to_worker,
    }


def _text(line: dict[str, Any]) -> str:
    """A line for people."""
    if line["item"] == "gap":
        return f"{'':15}  gap: {line['batches']:,} batches are lost"
    if line["item"] == "snapshot":
        return f"{'':15}  {line['worker_id']}: holds {line['blocks']:,} blocks before event {line['next_event_id']}"
    when = datetime.datetime.fromtimestamp(line["timestamp"] / 1e9, datetime.UTC).strftime("%H:%M:%S.%f")
    words = [when, f"{line['worker_id']} #{line['event_id']}", f"{line['event_type']:<8}", line["tier"] or "all"]
    if line["sequence_hash"]:
        words += [f"block {line['block_id']}", line["sequence_hash"]]
    words += [
        f"{name.replace('_', ' ')} {line[name]}" for name in ("from_tier", "to_worker", "lora_name") if line[name]
    ]
    return "  ".join(words)
