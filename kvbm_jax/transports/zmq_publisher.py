"""Events over ZeroMQ, the way engines publish them, from the worker's side.

    PUB     topic | sequence, 8 bytes big-endian | payload                one message a batch
    ROUTER  <- identity | "" | first sequence wanted, 8 bytes big-endian
            -> identity | "" | topic | sequence | payload                 each message from there on that is still kept
            -> identity | "" | "" | -1 | ""                               the end

A request for the sequence `SNAPSHOT` is answered by what the worker holds instead: its payloads are a clearing and then
stored blocks, and their sequence is that of the first message that the snapshot does not include. To publishers that do
not know it, it is a sequence far beyond their last, and they answer with the end alone.
"""

import itertools
import logging
import struct
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from kvbm_jax.addresses import public
from kvbm_jax.closing import Closing
from kvbm_jax.errors import TransportError
from kvbm_jax.events import EngineCodec, EventCodec, KvEventBatch
from kvbm_jax.extras import needs
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.protocols import MetricsSink
from kvbm_jax.transports.checks import check_least
from kvbm_jax.transports.encoder import Encoder
from kvbm_jax.transports.outbox import Outbox, OutboxStats, Overflow
from kvbm_jax.transports.snapshots import to_batches

with needs("zmq", "events over ZeroMQ"):
    import zmq

__all__ = ["END", "SEQUENCE", "SNAPSHOT", "ZmqKvEventPublisher", "ZmqKvEventPublisherConfig"]

_LOG = logging.getLogger(__name__)

SEQUENCE = struct.Struct(">Q")
SNAPSHOT = b"snapshot"  # as a sequence, 8 bytes like every other
END = b"\xff" * 8  # -1
_CHUNK = 64  # batches between two looks at the queue
_LONGEST_REQUEST = 4096  # bytes of what readers send, subscriptions included; who sends more is cut off
_PATIENCE_MS = 1000  # for a reader of replays that does not read
_POLL_MS = 100


@dataclass(frozen=True, kw_only=True)
class ZmqKvEventPublisherConfig:
    """Where and how a worker publishes over ZeroMQ."""

    worker_id: str = "0"
    endpoint: str = "tcp://127.0.0.1:5557"  # bound; port * for a free one
    replay_endpoint: str | None = "tcp://127.0.0.1:5558"  # bound; None for no replay and no snapshots
    topic: str = ""
    buffer_steps: int = 10_000  # messages kept for replay
    hwm: int = 100_000  # messages that may wait for one slow subscriber
    max_queue_size: int = 100_000  # batches that may wait to be sent
    overflow: Overflow = Overflow.DROP_OLDEST
    linger: float = 1.0  # seconds that closing may take to deliver
    codec: EventCodec = field(default_factory=EngineCodec)

    def __post_init__(self) -> None:
        check_least(self, buffer_steps=1, hwm=0, max_queue_size=1, linger=0)


class ZmqKvEventPublisher(Closing):
    """An event sink that publishes over ZeroMQ; encoding and sending happen on a thread of its own.

    Args:
      config: where and how.
      metrics: where counters go.

    Raises:
      TransportError: An endpoint cannot be bound.
    """

    def __init__(self, config: ZmqKvEventPublisherConfig | None = None, *, metrics: MetricsSink | None = None) -> None:
        self._config = config = ZmqKvEventPublisherConfig() if config is None else config
        self._context = zmq.Context()
        self._closing = threading.Event()
        self._deadline = 0.0
        self._wake = threading.Event()
        self._kept: deque[tuple[int, bytes]] = deque(maxlen=config.buffer_steps)
        self._keeping = threading.Lock()
        metrics = NullMetrics() if metrics is None else metrics
        self._encoder = Encoder(config.codec, metrics)
        self._outbox = Outbox(
            config.worker_id,
            capacity=config.max_queue_size,
            overflow=config.overflow,
            wake=self._wake.set,
            metrics=metrics,
        )
        try:
            self._pub, self.endpoint = self._bind(zmq.PUB, config.endpoint, config.hwm)
            self._router, self.replay_endpoint = None, None
            if config.replay_endpoint is not None:
                self._router, self.replay_endpoint = self._bind(
                    zmq.ROUTER, config.replay_endpoint, config.buffer_steps + 1
                )
        except TransportError:
            self._context.destroy(linger=0)
            raise
        self._threads = [threading.Thread(target=self._send_all, name="kvbm-zmq-events", daemon=True)]
        if self._router is not None:
            self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
            self._router.setsockopt(zmq.SNDTIMEO, _PATIENCE_MS)
            self._threads.append(threading.Thread(target=self._serve, name="kvbm-zmq-replay", daemon=True))
        for thread in self._threads:
            thread.start()

    def publish(self, batch: KvEventBatch, /) -> None:
        """Puts a batch in the queue and returns; what happens to a full queue is the configuration's choice."""
        self._outbox.put(batch)

    def stats(self) -> OutboxStats:
        """Returns the counters."""
        return self._outbox.stats()._replace(unsent=self._encoder.unsent)

    def close(self) -> None:
        """Sends what is waiting, for `linger` seconds at most, and ends. Idempotent."""
        if self._closing.is_set():
            return
        self._deadline = time.monotonic() + self._config.linger
        self._outbox.close()
        self._closing.set()
        self._wake.set()
        for thread in self._threads:
            thread.join()
        self._context.destroy(linger=int(self._config.linger * 1000))

    def _bind(self, kind: int, endpoint: str, hwm: int) -> tuple["zmq.Socket[bytes]", str]:
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.SNDHWM, hwm)
        socket.setsockopt(zmq.MAXMSGSIZE, _LONGEST_REQUEST)
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise TransportError(
                f"events cannot be published at {public(endpoint)}: {error}; choose another address"
            ) from error
        return socket, socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _send_all(self) -> None:
        """The sender's thread."""
        topic, more = self._config.topic.encode(), int(zmq.SNDMORE)
        send = super(zmq.Socket, self._pub).send  # at half the cost, without what other kinds of sockets need
        while True:
            self._wake.clear()
            while (taken := self._outbox.take(_CHUNK))[1]:
                numbered = enumerate(taken[1], taken[0])
                messages = [
                    (sequence, payload)
                    for sequence, batch in numbered
                    if (payload := self._encoder.encode(batch)) is not None
                ]
                with self._keeping:
                    self._kept.extend(messages)  # before they can be read: who has one may ask for it
                for sequence, payload in messages:
                    send(topic, more)
                    send(SEQUENCE.pack(sequence), more)
                    send(payload)
                if self._closing.is_set() and time.monotonic() > self._deadline:
                    return
            if self._closing.is_set():
                return
            self._wake.wait()

    def _serve(self) -> None:
        """The thread that answers requests for replays and snapshots."""
        assert self._router is not None  # noqa: S101 (for the type checker)
        while not self._closing.is_set():
            if not self._router.poll(_POLL_MS):
                continue
            frames = self._router.recv_multipart()
            if len(frames) != 3 or frames[1] or len(frames[2]) != SEQUENCE.size:
                continue  # no request that anybody knows
            head, wanted, topic = frames[:2], frames[2], self._config.topic.encode()
            try:
                for sequence, payload in self._answer(wanted):
                    self._router.send_multipart([*head, topic, SEQUENCE.pack(sequence), payload])
                self._router.send_multipart([*head, b"", END, b""])
            except zmq.ZMQError as error:
                _LOG.info("a reader of replays went away, or does not read: %s", error)

    def _answer(self, wanted: bytes) -> list[tuple[int, bytes]]:
        """The messages of an answer, without its end."""
        if wanted == SNAPSHOT:
            sequence, snapshot = self._outbox.snapshot()
            return [(sequence, payload) for payload in self._encoder.encode_all(to_batches(snapshot))]
        (first,) = SEQUENCE.unpack(wanted)
        with self._keeping:
            return list(itertools.dropwhile(lambda message: message[0] < first, self._kept))
