"""The other process of `bench.events`: reads what is published over ZeroMQ, decodes it, and says when all is there.

    python -m kvbm_jax.bench.event_reader ours|bare ENDPOINT REPLAY_ENDPOINT BLOCKS

Prints "ready" once the first message has come, and "done" after each so many blocks.
"""

import sys
from typing import Any

import msgspec

from kvbm_jax.events import KvEventBatch
from kvbm_jax.extras import needs
from kvbm_jax.transports.zmq_subscriber import ZmqKvEventSubscriberConfig, subscribe_zmq

with needs("zmq", "the bench of events"):
    import zmq

__all__ = ["Cleared", "Stored", "StoredBatch"]


class Stored(msgspec.Struct, tag_field="type", tag="BlockStored", gc=False):
    """An engine's event as a plain program has it."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class Cleared(msgspec.Struct, tag_field="type", tag="AllBlocksCleared", gc=False):
    """Only says that the connection is there."""


class StoredBatch(msgspec.Struct, array_like=True, gc=False):
    """An engine's payload as a plain program has it."""

    ts: float
    events: list[Stored | Cleared]
    dp_rank: int | None


def main(kind: str, endpoint: str, replay_endpoint: str, blocks: str) -> None:
    """Reads until it is killed."""
    counts = _ours(endpoint, replay_endpoint) if kind == "ours" else _bare(endpoint)
    total, seen, ready = int(blocks), 0, False
    for count in counts:
        if not ready:
            ready = True
            print("ready", flush=True)
        seen += count
        if seen >= total:
            seen -= total
            print("done", flush=True)


def _ours(endpoint: str, replay_endpoint: str) -> Any:
    config = ZmqKvEventSubscriberConfig(endpoint=endpoint, replay_endpoint=replay_endpoint, hwm=0, quiet=3600.0)
    for item in subscribe_zmq(config):
        if isinstance(item, KvEventBatch):
            yield 0 if item.shared is None else len(item)


def _bare(endpoint: str) -> Any:
    decoder = msgspec.msgpack.Decoder(StoredBatch)
    with zmq.Context() as context, context.socket(zmq.SUB) as socket:
        socket.setsockopt(zmq.RCVHWM, 0)
        socket.setsockopt(zmq.SUBSCRIBE, b"")
        socket.connect(endpoint)
        while True:
            _, _, payload = socket.recv_multipart()
            (event,) = decoder.decode(payload).events
            yield len(event.block_hashes) if isinstance(event, Stored) else 0


if __name__ == "__main__":
    main(*sys.argv[1:])
