"""How fast events are published: over ZeroMQ to a reader in another process, and to JetStream.

Over ZeroMQ a trial begins with the arrays of the blocks and ends when the reader has decoded the last message. Each
message makes a `KvEventBatch`, which goes through the publisher's queue, and at the other end becomes one again. The
baseline sends the same bytes, which are compared first: a loop around msgspec's encoder and `send_multipart` over
structures that are there already, and around `recv_multipart` and msgspec's decoder. Tokens and hashes are of the sizes
whose shortest encoding is the widest, so that both encoders write the same.

To JetStream a trial ends when the server has said that everything is stored; the baseline publishes the same payloads
with nats-py's own pipelined publishing.
"""

import asyncio
import contextlib
import itertools
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.bench.event_reader import Cleared, Stored, StoredBatch
from kvbm_jax.bench.timing import Row, Timing, Trial
from kvbm_jax.errors import BenchError
from kvbm_jax.events import EngineCodec, EventType, KvEvent, KvEventBatch, MsgpackCodec
from kvbm_jax.extras import needs
from kvbm_jax.transports.nats_connection import NatsConnection
from kvbm_jax.transports.nats_publisher import NatsKvEventPublisher, NatsKvEventPublisherConfig
from kvbm_jax.transports.nats_server import NatsServer
from kvbm_jax.transports.outbox import Overflow
from kvbm_jax.transports.zmq_publisher import ZmqKvEventPublisher, ZmqKvEventPublisherConfig

with needs("nats,zmq", "the bench of events"):
    import nats
    import zmq

__all__ = ["listening", "measure"]

_BLOCK_SIZE = 16
_TIMESTAMP = 1_700_000_000_500_000_000
_ANY = "tcp://127.0.0.1:*"
_PATIENCE = 60.0


class _Blocks(NamedTuple):
    """The blocks of one message, as a manager has them."""

    block_ids: NDArray[np.uint64]  # [E]
    hashes: NDArray[np.uint32]  # [E, 4]
    parents: NDArray[np.uint32]  # [E, 4]
    tokens: NDArray[np.uint32]  # [E, block_size]

    def batch(self, first_event_id: int) -> KvEventBatch:
        return KvEventBatch.make(
            EventType.CREATED,
            self.block_ids,
            worker_id="w",
            block_size=_BLOCK_SIZE,
            first_event_id=first_event_id,
            timestamp=_TIMESTAMP,
            sequence_hashes=self.hashes,
            parent_hashes=self.parents,
            token_ids=self.tokens,
        )

    def plain(self) -> Stored:
        hashes = self.hashes.view(np.uint64)[:, 0].tolist()
        return Stored(hashes, None, self.tokens.ravel().tolist(), _BLOCK_SIZE, None, "GPU", None)


def measure(timing: Timing, num_blocks: int) -> list[Row]:
    """Times both transports.

    Args:
      timing: how.
      num_blocks: blocks of a trial over ZeroMQ in long messages; a quarter of it one by one, and to JetStream a tenth.

    Raises:
      BenchError: The messages differ, or some do not arrive.
    """
    rows = [
        _zmq(timing, f"zmq {run} blocks a message", _made(run), count)
        for run, count in ((64, max(num_blocks // 64, 1)), (1, max(num_blocks // 4, 1)))
    ]
    return [*rows, _jetstream(timing, _made(1), max(num_blocks // 10, 1))]


def _made(count: int) -> _Blocks:
    rng = np.random.default_rng(0)
    hashes = rng.integers(1 << 63, (1 << 64) - 1, (count, 2), np.uint64).view(np.uint32)
    parents = np.concatenate([np.zeros((1, 4), np.uint32), hashes[:-1]])
    tokens = rng.integers(1 << 16, 1 << 17, (count, _BLOCK_SIZE)).astype(np.uint32)
    return _Blocks(np.arange(count, dtype=np.uint64), hashes, parents, tokens)


def _zmq(timing: Timing, case: str, blocks: _Blocks, messages: int) -> Row:
    encode = msgspec.msgpack.Encoder().encode
    stored: list[Stored | Cleared] = [blocks.plain()]
    seconds = _TIMESTAMP / 1e9
    if EngineCodec().encode(blocks.batch(0)) != encode(StoredBatch(seconds, stored, 0)):
        raise BenchError(f"{case}: the plain encoder writes other bytes")
    per_message = len(blocks.block_ids)
    config = ZmqKvEventPublisherConfig(
        worker_id="w",
        endpoint=_ANY,
        replay_endpoint=_ANY,
        hwm=0,
        max_queue_size=1024,  # or all of a trial would be there before most of it is sent
        overflow=Overflow.BLOCK,
    )
    with contextlib.ExitStack() as stack:
        publisher = stack.enter_context(ZmqKvEventPublisher(config))
        context = stack.enter_context(zmq.Context())
        socket = stack.enter_context(context.socket(zmq.PUB))
        socket.setsockopt(zmq.SNDHWM, 0)
        socket.bind(_ANY)
        ids = itertools.count()
        pack = struct.Struct(">Q").pack

        def publish() -> None:
            for _ in range(messages):
                publisher.publish(blocks.batch(next(ids) * per_message))

        def send() -> None:
            for _ in range(messages):
                socket.send_multipart([b"", pack(next(ids)), encode(StoredBatch(seconds, stored, 0))])

        cleared = KvEventBatch.from_events([KvEvent(EventType.CLEARED, 0, "w", 0)])
        greeting = [b"", bytes(8), EngineCodec().encode(cleared)]
        ends = publisher.endpoint, publisher.replay_endpoint or ""
        bare_end = socket.getsockopt_string(zmq.LAST_ENDPOINT)
        count = str(messages * per_message)
        reader = stack.enter_context(listening(["ours", *ends, count], lambda: publisher.publish(cleared)))
        bare = stack.enter_context(listening(["bare", bare_end, "", count], lambda: socket.send_multipart(greeting)))
        return timing.compare(
            f"{case}, {messages:,} messages",
            _until_done(publish, reader),
            "msgspec and pyzmq in a bare loop, the same bytes",
            _until_done(send, bare),
        )


@contextlib.contextmanager
def listening(arguments: list[str], greet: Callable[[], object]) -> Iterator[Callable[[], str]]:
    """Starts a `bench.event_reader`, greets it until it has heard, and yields what waits for its next line.

    Raises:
      BenchError: It hears nothing.
    """
    command = [sys.executable, "-m", "kvbm_jax.bench.event_reader", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:  # noqa: S603 (our own module)
        try:
            output = process.stdout
            if output is None:
                raise BenchError("the reader has no output")
            heard = threading.Event()

            def listen() -> None:
                output.readline()
                heard.set()

            listener = threading.Thread(target=listen)
            listener.start()
            deadline = time.monotonic() + _PATIENCE
            while not heard.wait(0.05):
                if time.monotonic() > deadline or process.poll() is not None:
                    raise BenchError("the reader hears nothing")
                greet()
            listener.join()
            yield output.readline
        finally:
            process.kill()


def _until_done(work: Callable[[], None], line: Callable[[], str]) -> Trial:
    def trial() -> float:
        begun = time.perf_counter()
        work()
        if line() != "done\n":
            raise BenchError("the reader has ended")
        return time.perf_counter() - begun

    return trial


def _jetstream(timing: Timing, blocks: _Blocks, messages: int) -> Row:
    payload = MsgpackCodec().encode(blocks.batch(0))
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        server = stack.enter_context(NatsServer(Path(folder)))
        connection = NatsConnection.from_url(server.url)
        config = NatsKvEventPublisherConfig(worker_id="w", connection=connection, overflow=Overflow.BLOCK)
        publisher = stack.enter_context(NatsKvEventPublisher(config))
        ids = itertools.count()
        runner = stack.enter_context(asyncio.Runner())
        client = runner.run(nats.connect(server.url))
        stack.callback(lambda: runner.run(client.close()))
        stream = client.jetstream(publish_async_max_pending=config.max_unacknowledged)
        runner.run(stream.add_stream(name="BARE", subjects=["bare"]))

        def ours() -> float:
            begun = time.perf_counter()
            for _ in range(messages):
                publisher.publish(blocks.batch(next(ids)))
            if not publisher.flush(_PATIENCE):
                raise BenchError("JetStream has not stored everything")
            return time.perf_counter() - begun

        async def pipelined() -> None:
            for _ in range(messages):
                await stream.publish_async("bare", payload)
            await stream.publish_async_completed()

        def theirs() -> float:
            begun = time.perf_counter()
            runner.run(pipelined())
            return time.perf_counter() - begun

        case = f"jetstream one block a message, {messages:,} messages"
        return timing.compare(case, ours, "nats-py's pipelined publishing, the same payloads", theirs)
