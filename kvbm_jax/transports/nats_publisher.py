"""Events over NATS, from the worker's side: kept by JetStream, or passed on by the core alone.

With JetStream a batch counts as published once the server has said that it is stored. Messages go out in order and in
bulk, every few of them with a request to be told; what is not acknowledged when a connection breaks is sent again,
first, over the next one, and the server drops what it has already. Without JetStream a message that meets nobody is
gone, and a line now and then says how far the worker is. In both cases the worker answers requests for a snapshot.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec

from kvbm_jax.closing import Closing
from kvbm_jax.errors import ConfigError, TransportError
from kvbm_jax.events import EventCodec, KvEventBatch, MsgpackCodec, parts
from kvbm_jax.extras import needs
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.protocols import MetricsSink
from kvbm_jax.transports.checks import check_least
from kvbm_jax.transports.encoder import Encoder
from kvbm_jax.transports.nats_connection import NatsConnection, NatsThread
from kvbm_jax.transports.nats_wire import MESSAGE_ID, NatsStream, Subjects, open_stream, status_of
from kvbm_jax.transports.outbox import Outbox, OutboxStats, Overflow
from kvbm_jax.transports.snapshots import to_batches

with needs("nats", "events over NATS"):
    import nats.errors
    from nats.aio.client import Client
    from nats.aio.msg import Msg

__all__ = ["NatsKvEventPublisher", "NatsKvEventPublisherConfig"]

_MOST_EVENTS, _MOST_TOKENS = 1024, 65_536  # of a message: some 400 KB, and servers take 1 MB
_CHUNK = 64  # messages for one acknowledgement
_PATIENCE = 5.0  # seconds without an acknowledgement after which a connection is given up
_PULSE = 1.0  # seconds between looks at what is late, and lines that say how far the worker is


@dataclass(frozen=True, kw_only=True)
class NatsKvEventPublisherConfig:
    """Where and how a worker publishes over NATS."""

    worker_id: str = "0"
    connection: NatsConnection = field(default_factory=NatsConnection)
    jetstream: bool = True
    stream: NatsStream = field(default_factory=NatsStream)
    subjects: Subjects = field(default_factory=Subjects)
    max_queue_size: int = 100_000  # batches that may wait to be sent
    max_unacknowledged: int = 4096  # batches that may wait to be acknowledged
    overflow: Overflow = Overflow.DROP_OLDEST
    linger: float = 5.0  # seconds that closing may take to deliver
    codec: EventCodec = field(default_factory=MsgpackCodec)

    def __post_init__(self) -> None:
        check_least(self, max_queue_size=1, max_unacknowledged=1, linger=0)
        if not self.codec.native:
            raise ConfigError(f"codec {self.codec.name}: NATS carries native messages, such as msgpack")


class _Sent(NamedTuple):
    sequence: int
    payload: bytes


class _Answer(msgspec.Struct):
    """What JetStream says of a message that it was asked about."""

    error: dict[str, msgspec.Raw] | None = None


class NatsKvEventPublisher(Closing):
    """An event sink that publishes over NATS, on a thread of its own.

    Args:
      config: where and how.
      metrics: where counters go.
      resolve: says where the server is, before each attempt to connect; None for `config.connection`.

    Raises:
      TransportError: Nobody is there, the credentials are refused, or the stream cannot be had.
    """

    def __init__(
        self,
        config: NatsKvEventPublisherConfig | None = None,
        *,
        metrics: MetricsSink | None = None,
        resolve: Callable[[], NatsConnection] | None = None,
    ) -> None:
        self._config = config = NatsKvEventPublisherConfig() if config is None else config
        self._life = time.time_ns()
        self._subject = config.subjects.events(config.worker_id)
        self._unacknowledged: deque[_Sent] = deque()
        self._last_answer = 0.0
        self._refused: str | None = None
        metrics = NullMetrics() if metrics is None else metrics
        self._encoder = Encoder(config.codec, metrics)
        self._sending = False  # from taking batches off the queue until they are sent
        self._settled = threading.Condition()
        self._deadline = float("inf")
        self._wake = asyncio.Event()
        self._thread = NatsThread(
            "kvbm-nats-events",
            resolve or (lambda: config.connection),
            self._session,
            wake=self._wake.set,
            unfinished=lambda: not self._done(),
        )
        self._outbox = Outbox(
            config.worker_id,
            capacity=config.max_queue_size,
            overflow=config.overflow,
            wake=lambda: self._thread.call(self._wake.set),
            metrics=metrics,
        )
        self._thread.start()

    def publish(self, batch: KvEventBatch, /) -> None:
        """Puts a batch in the queue and returns; what happens to a full queue is the configuration's choice.

        A batch that would be too long for a message of a server with its default limits goes in parts.
        """
        for part in parts(batch, most_events=_MOST_EVENTS, most_tokens=_MOST_TOKENS):
            self._outbox.put(part)

    def flush(self, timeout: float | None = None) -> bool:
        """Waits until what has been published is with the server; returns whether it was in time."""
        with self._settled:
            return self._settled.wait_for(self._delivered, timeout)

    def stats(self) -> OutboxStats:
        """Returns the counters."""
        return self._outbox.stats()._replace(unsent=self._encoder.unsent)

    def close(self) -> None:
        """Delivers what is waiting, for `linger` seconds at most, and ends. Idempotent."""
        self._deadline = min(self._deadline, time.monotonic() + self._config.linger)
        self._outbox.close()
        self._thread.stop()

    async def _session(self, client: Client) -> None:
        inbox = client.new_inbox()
        if self._config.jetstream:
            await open_stream(client, self._config.stream, self._config.subjects)
            await client.subscribe(f"{inbox}.*", cb=self._take_answer)

        async def serve(request: Msg) -> None:
            await self._serve(client, request)

        for subject in (
            self._config.subjects.snapshot(self._config.worker_id),
            self._config.subjects.all_snapshots,
        ):
            await client.subscribe(subject, cb=serve)
        self._refused, self._last_answer = None, time.monotonic()
        await self._send(client, inbox, list(self._unacknowledged))
        await client.flush()
        self._thread.ready()
        while not (self._thread.stopping.is_set() and self._done()):
            self._wake.clear()
            self._sending = True
            while len(self._unacknowledged) < self._config.max_unacknowledged:
                first, batches = self._outbox.take(_CHUNK)
                if not batches:
                    break
                numbered = enumerate(batches, first)
                sent = [
                    _Sent(i, data)
                    for i, batch in numbered
                    if (data := self._encoder.encode(batch, client.max_payload)) is not None
                ]
                if self._config.jetstream:
                    if not self._unacknowledged:
                        self._last_answer = time.monotonic()  # none was waited for
                    self._unacknowledged += sent
                await self._send(client, inbox, sent)
                await asyncio.sleep(0)  # answers are taken meanwhile
            self._sending = False
            if self._delivered():
                with self._settled:
                    self._settled.notify_all()
            if client.is_closed:
                raise nats.errors.ConnectionClosedError
            if self._refused is not None:
                raise TransportError(f"JetStream does not store: {self._refused}")
            if self._unacknowledged and time.monotonic() - self._last_answer > _PATIENCE:
                raise TransportError(f"JetStream has said nothing for {_PATIENCE:.0f} s")
            try:
                await asyncio.wait_for(self._wake.wait(), _PULSE if not self._thread.stopping.is_set() else 0.05)
            except TimeoutError:
                await self._say_how_far(client)
        await client.flush()

    def _delivered(self) -> bool:
        return self._outbox.empty and not self._unacknowledged and not self._sending

    def _done(self) -> bool:
        return self._delivered() or time.monotonic() > self._deadline

    async def _send(self, client: Client, inbox: str, messages: list[_Sent]) -> None:
        """Sends messages in order; the last of every few is to be acknowledged."""
        for i, message in enumerate(messages):
            asks = self._config.jetstream and (i + 1 == len(messages) or i % _CHUNK == _CHUNK - 1)
            await client.publish(
                self._subject,
                message.payload,
                f"{inbox}.{message.sequence}" if asks else "",
                headers={MESSAGE_ID: self._id(message.sequence)},
            )

    async def _take_answer(self, answer: Msg) -> None:
        """Takes what JetStream says of a message, which goes for all before it."""
        self._last_answer = time.monotonic()
        sequence = int(answer.subject.rpartition(".")[2])
        if status_of(answer) is not None:
            self._refused = "nobody listens"
        else:
            error = msgspec.json.decode(answer.data, type=_Answer).error
            if error is None:
                while self._unacknowledged and self._unacknowledged[0].sequence <= sequence:
                    self._unacknowledged.popleft()
            else:
                self._refused = " ".join(f"{name} {bytes(value).decode()}" for name, value in error.items())
        self._wake.set()

    async def _say_how_far(self, client: Client) -> None:
        if not self._config.jetstream:
            await client.publish(self._subject, b"", headers={MESSAGE_ID: self._id(self._outbox.next_sequence)})

    async def _serve(self, client: Client, request: Msg) -> None:
        """Answers a request for what the worker holds."""
        if not request.reply:
            return
        sequence, snapshot = await asyncio.to_thread(self._outbox.snapshot)
        headers = {MESSAGE_ID: self._id(sequence)}
        payloads = self._encoder.encode_all(to_batches(snapshot), client.max_payload)
        for payload in [*payloads, b""] if payloads else ():
            await client.publish(request.reply, payload, headers=headers)

    def _id(self, sequence: int) -> str:
        return f"{self._config.worker_id}:{self._life}:{sequence}"
