"""Events over NATS from the reader's side: the streams of all workers, each whole and in order.

A reader begins with what the workers hold now, and goes on from there: a snapshot of each, then the stream. A jump in a
worker's sequence, or a worker met in the middle of its life, is healed by another snapshot; what cannot be healed is
marked by an `EventGap`. Messages that come twice are passed over.

With JetStream the position is a sequence of the stream, which survives a broken connection, a restarted server and,
under the name of a durable consumer, the reader itself; messages count as read once they are taken from the
subscription. A reader that comes back goes on where it was.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kvbm_jax.errors import ConfigError, EventDecodeError
from kvbm_jax.events import EventCodec, EventGap, KvEventBatch, MsgpackCodec, StreamItem, Subscription, WorkerSnapshot
from kvbm_jax.extras import needs
from kvbm_jax.transports.checks import check_above, check_least
from kvbm_jax.transports.first_time import FirstTime
from kvbm_jax.transports.nats_connection import NatsConnection, NatsThread
from kvbm_jax.transports.nats_wire import MessageId, NatsStream, Subjects, open_stream, status_of
from kvbm_jax.transports.snapshots import from_batches

with needs("nats", "events over NATS"):
    import nats.errors
    import nats.js.errors
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.aio.subscription import Subscription as NatsSubscription
    from nats.js import JetStreamContext
    from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

__all__ = ["NatsKvEventSubscriberConfig", "subscribe_nats"]

_LOG = logging.getLogger(__name__)
_FETCH = 256  # messages asked for at once
_WAIT = 0.5  # seconds that asking may take
_QUIET = 0.25  # seconds of silence after which no further worker will answer
_FORGOTTEN = 60.0  # seconds after which the server forgets a nameless reader


@dataclass(frozen=True, kw_only=True)
class NatsKvEventSubscriberConfig:
    """Whose events are read, and from where on."""

    connection: NatsConnection = field(default_factory=NatsConnection)
    jetstream: bool = True
    stream: NatsStream = field(default_factory=NatsStream)
    subjects: Subjects = field(default_factory=Subjects)
    durable: str | None = None  # name under which JetStream remembers how far the reader is
    start_sequence: int | None = None  # of the stream: from there on, and no snapshot; for a durable's first time
    capacity: int = 4096  # items that may wait to be read
    patience: float = 5.0  # seconds that a worker's snapshot may take
    codec: EventCodec = field(default_factory=MsgpackCodec)

    def __post_init__(self) -> None:
        check_least(self, capacity=1)
        check_above(self, "patience")
        if not self.jetstream and (self.durable is not None or self.start_sequence is not None):
            raise ConfigError("durable and start_sequence are JetStream's; without it there is no history")
        if self.durable is not None and (not self.durable.isprintable() or set(self.durable) & set(" .*>/\\")):
            raise ConfigError(f"durable = {self.durable!r}: allowed are printable characters but blanks and . * > / \\")
        if self.start_sequence is not None and self.start_sequence < 1:
            raise ConfigError(f"start_sequence = {self.start_sequence}: allowed is an integer >= 1")
        if not self.codec.native:
            raise ConfigError(f"codec {self.codec.name}: NATS carries native messages, such as msgpack")


def subscribe_nats(
    config: NatsKvEventSubscriberConfig | None = None, *, resolve: Callable[[], NatsConnection] | None = None
) -> Subscription:
    """Returns a subscription to the events of all workers.

    Args:
      config: Whose events, and from where on.
      resolve: Says where the server is, before each attempt to connect; None for the configuration's.

    Raises:
      TransportError: Nobody is there, the credentials are refused, or the stream cannot be had.
    """
    reader = _Reader(NatsKvEventSubscriberConfig() if config is None else config, resolve)
    reader.thread.start()
    return reader.subscription


class _Position(NamedTuple):
    """Where a worker's stream goes on."""

    life: int
    next_sequence: int


class _Unread(NamedTuple):
    """A message that is read once so many items of the subscription have been taken."""

    items: int
    stream_sequence: int
    message: Msg


class _Reader:
    """What stands between the connection and the subscription."""

    def __init__(self, config: NatsKvEventSubscriberConfig, resolve: Callable[[], NatsConnection] | None) -> None:
        self._config = config
        self._workers: dict[str, _Position] = {}
        self._trusting = False  # whether a worker met in the middle of its life is gone on with
        self._begun = False
        self._next: int | None = None  # sequence of the stream from which the next connection goes on
        self._pushed = 0
        self._unread: deque[_Unread] = deque()
        self._complain = FirstTime(_LOG, "a message is passed over: %s")
        self.subscription = Subscription(self._leave, config.capacity)
        self.thread = NatsThread(
            "kvbm-nats-subscriber",
            resolve or (lambda: config.connection),
            self._session,
            ended=self.subscription.end,
        )

    def _leave(self, _: Subscription) -> None:
        self.thread.stop(at_once=True)

    async def _session(self, client: Client) -> None:
        if self._config.jetstream:
            await self._follow_stream(client)
        else:
            await self._follow_core(client)

    async def _follow_core(self, client: Client) -> None:
        source = await client.subscribe(self._config.subjects.all_events)
        await client.flush()
        await self._begin(client)
        while not self.thread.stopping.is_set():
            message = await _next_of(source, _WAIT)
            if message is not None:
                await self._take(client, message)
            elif client.is_closed:
                raise nats.errors.ConnectionClosedError

    async def _follow_stream(self, client: Client) -> None:
        js = await open_stream(client, self._config.stream, self._config.subjects)
        name = await self._make_consumer(js)
        await self._begin(client)
        source = await js.pull_subscribe_bind(name, stream=self._config.stream.name)
        try:
            while not self.thread.stopping.is_set():
                try:
                    messages = await source.fetch(_FETCH, timeout=_WAIT)
                except TimeoutError:
                    messages = []
                if client.is_closed:
                    raise nats.errors.ConnectionClosedError
                for message in messages:
                    await self._take(client, message)
                    stream_sequence = message.metadata.sequence.stream
                    self._next = stream_sequence + 1
                    self._unread.append(_Unread(self._pushed, stream_sequence, message))
                await self._acknowledge()
        finally:
            if not client.is_closed:
                await self._acknowledge()
                await client.flush()

    async def _make_consumer(self, js: JetStreamContext) -> str:
        """Makes the consumer that this connection reads from, and returns its name."""
        stream, durable = self._config.stream.name, self._config.durable
        state = (await js.stream_info(stream)).state
        start = self._next
        if durable is not None:
            try:
                info = await js.consumer_info(stream, durable)
            except nats.js.errors.NotFoundError:
                pass  # its first time
            else:
                # What was delivered and not read would come late, after what is new: a new consumer has it in order.
                start = (info.ack_floor.stream_seq if info.ack_floor else 0) + 1
                self._trusting |= not self._begun and start >= state.first_seq
                self._begun = True
                await js.delete_consumer(stream, durable)
        if start is None and self._config.start_sequence is not None:
            start, self._trusting, self._begun = self._config.start_sequence, True, True
        if start is None:
            start = state.last_seq + 1
        self._unread.clear()
        self._next = start
        made = await js.add_consumer(
            stream,
            ConsumerConfig(
                durable_name=durable,
                deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                opt_start_seq=start,
                ack_policy=AckPolicy.NONE if durable is None else AckPolicy.ALL,
                ack_wait=None if durable is None else 3600.0,
                max_ack_pending=None if durable is None else -1,
                inactive_threshold=_FORGOTTEN if durable is None else None,
            ),
        )
        return made.name or durable or ""

    async def _acknowledge(self) -> None:
        """Tells JetStream how far the subscription has been read."""
        taken, last = self.subscription.taken, None
        while self._unread and self._unread[0].items <= taken:
            last = self._unread.popleft()
        if last is not None and self._config.durable is not None:
            await last.message.ack()

    async def _begin(self, client: Client) -> None:
        """Asks all workers what they hold, the first time."""
        if not self._begun:
            async for worker_id, position, snapshot in self._ask(client, self._config.subjects.all_snapshots, _QUIET):
                await self._replace(worker_id, position, snapshot)
        self._begun = True
        self.thread.ready()

    async def _take(self, client: Client, message: Msg) -> None:
        """Takes the next message of any worker."""
        found = MessageId.of(message)
        if found is None:
            self._complain(EventDecodeError(f"a message on {message.subject} without an id"))
            return
        worker_id, life, sequence = found
        position = self._workers.get(worker_id)
        if position is not None and life < position.life:
            return
        if position is None and self._trusting:
            position = _Position(life, sequence)
        elif position is None or life > position.life:
            if position is not None:  # what was told of the worker's former life holds no more
                await self._push(WorkerSnapshot(worker_id, 0, time.time_ns(), ()))
            position = _Position(life, 0)
        self._workers[worker_id] = position
        if sequence > position.next_sequence:
            position = await self._heal(client, worker_id, _Position(life, sequence))
        if message.data and _Position(life, sequence) == position:
            self._workers[worker_id] = _Position(life, sequence + 1)
            await self._deliver(message.data)

    async def _heal(self, client: Client, worker_id: str, met: _Position) -> _Position:
        """Gets over what is missing before a message; returns where the worker's stream goes on."""
        async for name, position, snapshot in self._ask(
            client, self._config.subjects.snapshot(worker_id), self._config.patience
        ):
            if name == worker_id and position >= met:
                await self._replace(worker_id, position, snapshot)
                return position
        missing = met.next_sequence - self._workers[worker_id].next_sequence
        await self._push(EventGap(missing, 0))
        self._workers[worker_id] = met
        return met

    async def _replace(self, worker_id: str, position: _Position, snapshot: WorkerSnapshot) -> None:
        self._workers[worker_id] = position
        await self._push(snapshot)

    async def _deliver(self, payload: bytes) -> None:
        try:
            batches = self._config.codec.decode(payload)
        except EventDecodeError as error:
            self._complain(error)
            await self._push(EventGap(1, 0))
            return
        for batch in batches:
            await self._push(batch)

    async def _push(self, item: StreamItem) -> None:
        while not self.subscription.push(item, timeout=0):
            if self.thread.stopping.is_set():
                return
            if await asyncio.to_thread(self.subscription.push, item, _WAIT):
                break
        self._pushed += 1

    async def _ask(
        self, client: Client, subject: str, quiet: float
    ) -> AsyncIterator[tuple[str, _Position, WorkerSnapshot]]:
        """Yields the snapshots that answer a request, until nobody has spoken for `quiet` seconds."""
        inbox = client.new_inbox()
        source = await client.subscribe(inbox)
        await client.publish(subject, b"", inbox)
        coming: dict[str, list[KvEventBatch]] = {}
        single = subject != self._config.subjects.all_snapshots
        try:
            while (answer := await _next_of(source, self._config.patience if coming else quiet)) is not None:
                found = MessageId.of(answer)
                if status_of(answer) is not None or found is None:
                    return  # nobody is there
                if answer.data:
                    coming.setdefault(found.worker_id, []).extend(self._decoded(answer.data))
                    continue
                snapshot = self._assembled(coming.pop(found.worker_id, []))
                if snapshot is not None:
                    yield found.worker_id, _Position(found.life, found.sequence), snapshot
                if single:
                    return
        finally:
            await source.unsubscribe()

    def _decoded(self, payload: bytes) -> tuple[KvEventBatch, ...]:
        try:
            return self._config.codec.decode(payload)
        except EventDecodeError as error:
            self._complain(error)
            return ()

    def _assembled(self, batches: list[KvEventBatch]) -> WorkerSnapshot | None:
        try:
            return from_batches(batches)
        except EventDecodeError as error:
            self._complain(error)
            return None


async def _next_of(source: NatsSubscription, timeout: float) -> Msg | None:
    """The next message of a subscription; None if none comes in time."""
    try:
        return await source.next_msg(timeout)
    except TimeoutError:
        return None
