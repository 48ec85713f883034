"""Events over ZeroMQ from the reader's side: one worker's stream, whole and in order.

A thread reads the SUB socket and watches the sequences. It begins with a snapshot, so that a reader that comes late
misses nothing; a jump is filled from the replay socket, else by a snapshot, else marked by an `EventGap`. Messages lost
at the end of a stream, when nothing follows that would show it, are found by asking now and then. After a broken
connection, and when asking, the last message is asked for again: if it is another one now, the worker was restarted.
"""

import functools
import logging
import threading
import time
from dataclasses import dataclass
from typing import NamedTuple

from kvbm_jax.addresses import public
from kvbm_jax.errors import EventDecodeError, TransportError
from kvbm_jax.events import EngineCodec, EventCodec, EventGap, StreamItem, Subscription, WorkerSnapshot
from kvbm_jax.extras import needs
from kvbm_jax.transports.checks import check_above, check_least
from kvbm_jax.transports.first_time import FirstTime
from kvbm_jax.transports.snapshots import from_batches
from kvbm_jax.transports.zmq_publisher import END, SEQUENCE, SNAPSHOT

with needs("zmq", "events over ZeroMQ"):
    import zmq
    from zmq.utils.monitor import recv_monitor_message

__all__ = ["ZmqKvEventSubscriberConfig", "subscribe_zmq"]

_LOG = logging.getLogger(__name__)
_POLL_MS = 100
_CHUNK = 256  # messages between two looks at other sockets


@dataclass(frozen=True, kw_only=True)
class ZmqKvEventSubscriberConfig:
    """Whose events are read, and how."""

    endpoint: str = "tcp://127.0.0.1:5557"
    replay_endpoint: str | None = "tcp://127.0.0.1:5558"  # None for a publisher without one
    topic: str = ""
    hwm: int = 100_000  # messages that may wait to be looked at
    capacity: int = 4096  # items that may wait to be read
    quiet: float = 1.0  # seconds without a message after which the last one is asked for again
    patience: float = 2.0  # seconds that the replay socket may be silent
    worker_id: str = "0"  # whose events these are, where messages do not say it
    codec: EventCodec | None = None  # None: the engines'

    def __post_init__(self) -> None:
        check_least(self, hwm=0, capacity=1)
        check_above(self, "quiet", "patience")


def subscribe_zmq(config: ZmqKvEventSubscriberConfig | None = None) -> Subscription:
    """Returns a subscription to one worker's events, beginning with what it holds.

    The worker need not be there yet. Codecs that carry no event ids get them here, counted from 0.

    Raises:
      TransportError: An endpoint is no address.
    """
    config = ZmqKvEventSubscriberConfig() if config is None else config
    reader = _Reader(config)
    return reader.subscription


class _Message(NamedTuple):
    sequence: int
    payload: bytes


class _Reader:
    """The thread between the sockets and the subscription."""

    def __init__(self, config: ZmqKvEventSubscriberConfig) -> None:
        self._config = config
        self._context = zmq.Context()
        self._sub = self._context.socket(zmq.SUB)
        self._sub.setsockopt(zmq.RCVHWM, config.hwm)
        self._sub.setsockopt_string(zmq.SUBSCRIBE, config.topic)
        self._monitor = self._sub.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        try:
            self._sub.connect(config.endpoint)
        except zmq.ZMQError as error:
            self._sub.disable_monitor()
            self._context.destroy(linger=0)
            raise TransportError(f"events cannot be read from {public(config.endpoint)}: {error}") from error
        self._next: int | None = None  # sequence expected; None before the first
        self._last: bytes | None = None  # payload of the message before it, if that was read
        self._newest = -1  # sequence last seen on the SUB socket
        self._next_event_id = 0
        self._codec = EngineCodec(config.worker_id) if config.codec is None else config.codec
        self._complain = functools.partial(
            FirstTime(_LOG, "a message of %s is passed over: %s"), public(config.endpoint)
        )
        self._waiting: list[StreamItem] = []
        self._stop = threading.Event()
        self.subscription = Subscription(self._leave, config.capacity)
        self._thread = threading.Thread(target=self._run, name="kvbm-zmq-subscriber", daemon=True)
        self._thread.start()

    def _leave(self, _: Subscription) -> None:
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            self._follow()
        finally:
            self._sub.disable_monitor()
            self._context.destroy(linger=0)
            self.subscription.end()

    def _follow(self) -> None:
        poller = zmq.Poller()
        poller.register(self._sub, zmq.POLLIN)
        poller.register(self._monitor, zmq.POLLIN)
        connected, last_heard = False, time.monotonic()
        while not self._stop.is_set():
            ready = dict(poller.poll(_POLL_MS))
            if self._monitor in ready:
                connected = True
                self._catch_up()
                self._hand_on()
            if self._sub in ready:
                last_heard = time.monotonic()
                self._read_some()
            elif connected and time.monotonic() - last_heard > self._config.quiet:
                self._catch_up()
                self._hand_on()
                last_heard = time.monotonic()

    def _read_some(self) -> None:
        """Takes what is waiting on the SUB socket, within bounds."""
        receive, now = self._sub.recv, zmq.NOBLOCK
        try:
            for _ in range(_CHUNK):
                receive(now)
                head, payload = receive(now), receive(now)
                sequence = int.from_bytes(head, "big")
                if sequence == self._next and sequence > self._newest and len(head) == SEQUENCE.size:
                    self._newest = sequence
                    self._deliver(sequence, payload)
                elif self._sub.getsockopt(zmq.RCVMORE):  # of another program, as what is not of three parts
                    while self._sub.getsockopt(zmq.RCVMORE):
                        receive(now)
                elif len(head) == SEQUENCE.size:
                    self._take(sequence, payload)
        except zmq.Again:
            pass  # nothing more is waiting
        self._hand_on()

    def _take(self, sequence: int, payload: bytes) -> None:
        """Takes a message of the SUB socket that is not the one expected."""
        if sequence <= self._newest:
            self._begin()  # the worker was restarted and counts anew
        elif self._next is None or sequence > self._next:
            self._catch_up()
        if self._next is None or sequence > self._next:
            self._skip_to(sequence)
        self._newest = sequence
        if sequence == self._next:
            self._deliver(sequence, payload)

    def _catch_up(self) -> None:
        """Gets what has been missed, if anything was and it is still to be had."""
        new_connection = self._meets_anew()
        if self._next is None or (new_connection and self._last is None):
            self._begin()  # if this is another life of the worker, nothing would tell
            return
        before = self._next - 1
        answer = self._ask(SEQUENCE.pack(max(before, 0)))
        if answer is None:
            return
        if answer and answer[0].sequence == before:
            goes_on = self._last in {None, answer[0].payload}
        else:  # the message before is no longer kept, or was never sent; or there is none in a new life
            goes_on = not new_connection and (bool(answer) or self._last is None)
        if not goes_on:
            self._begin()
            return
        for message in answer:
            if message.sequence > self._next:
                snapshot = self._snapshot()
                if not snapshot:
                    self._skip_to(message.sequence)
            if message.sequence == self._next:
                self._deliver(*message)

    def _meets_anew(self) -> bool:
        """Returns whether there has been another connection since this was last asked."""
        count = 0
        while self._monitor.poll(0):
            recv_monitor_message(self._monitor)
            count += 1
        return count > 0

    def _begin(self) -> None:
        """Begins with what the worker holds, or with all that it can replay."""
        begun = self._next is not None
        if self._snapshot():
            return
        if begun:  # what was told of the worker's former life holds no more
            self._push(WorkerSnapshot(self._config.worker_id, self._next_event_id, time.time_ns(), ()))
        answer = self._ask(SEQUENCE.pack(0))
        self._last = None
        self._next = None if answer is None else 0
        for message in answer or ():
            if message.sequence != self._next:
                self._skip_to(message.sequence)
            self._deliver(*message)

    def _snapshot(self) -> bool:
        """Asks for a snapshot and delivers it; returns whether there was one."""
        answer = self._ask(SNAPSHOT)
        if not answer:
            return False
        try:
            batches = [batch for message in answer for batch in self._codec.decode(message.payload)]
            snapshot = from_batches(batches)
        except EventDecodeError as error:
            self._complain(error)
            return False
        if not self._codec.native:
            snapshot = snapshot._replace(next_event_id=self._next_event_id)
        self._push(snapshot)
        self._next, self._last = answer[0].sequence, None
        return True

    def _skip_to(self, sequence: int) -> None:
        """Marks what is missing before a sequence as lost."""
        missing = sequence - (self._next or 0)
        if missing:
            self._push(EventGap(missing, 0))
        self._next = sequence

    def _deliver(self, sequence: int, payload: bytes) -> None:
        """Hands on the message that was expected."""
        self._next, self._last = sequence + 1, payload
        try:
            batches = self._codec.decode(payload, self._next_event_id)
        except EventDecodeError as error:
            self._complain(error)
            self._push(EventGap(1, 0))
            return
        for batch in batches:
            self._next_event_id += len(batch)
        self._push(*batches)

    def _push(self, *items: StreamItem) -> None:
        self._waiting += items
        if len(self._waiting) >= _CHUNK:
            self._hand_on()

    def _hand_on(self) -> None:
        """Puts what has been read into the subscription."""
        if self._waiting and not self.subscription.push_all(self._waiting):
            self._stop.set()
        self._waiting = []

    def _ask(self, request: bytes) -> list[_Message] | None:
        """Returns the answer of the replay socket; None if it is silent or there is none."""
        if self._config.replay_endpoint is None:
            return None
        answer: list[_Message] = []
        with self._context.socket(
            zmq.DEALER
        ) as socket:  # a new one each time, so that no old answer is taken for a new
            socket.setsockopt(zmq.LINGER, 0)
            socket.setsockopt(zmq.RCVHWM, 0)
            socket.connect(self._config.replay_endpoint)
            socket.send_multipart([b"", request])
            while self._wait(socket):
                frames = socket.recv_multipart()
                if len(frames) != 4 or len(frames[2]) != SEQUENCE.size:
                    continue
                if frames[2] == END:
                    return answer
                answer.append(_Message(SEQUENCE.unpack(frames[2])[0], frames[3]))
        return None

    def _wait(self, socket: "zmq.Socket[bytes]") -> bool:
        """Waits for a frame of an answer; returns whether there is one."""
        deadline = time.monotonic() + self._config.patience
        while not self._stop.is_set() and time.monotonic() < deadline:
            if socket.poll(_POLL_MS):
                return True
        return False
