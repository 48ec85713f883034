"""What publishers and subscribers over NATS agree on.

    PREFIX.events.WORKER     a worker's messages, in order: payload one encoded batch, header Nats-Msg-Id
                             "WORKER:LIFE:SEQUENCE"; an empty payload says which sequence comes next
    PREFIX.snapshot.WORKER   a request for what the worker holds, and
    PREFIX.snapshot          the same of all workers: answered by the batches of a snapshot and then an empty payload,
                             each with the id of the first message that the snapshot does not include

WORKER is the id, percent-encoded; LIFE the time at which its publisher began, in nanoseconds; SEQUENCE counts batches
from 0. In JetStream one stream holds the messages of all workers, and the server drops a message whose id it knows.
"""

import urllib.parse
from dataclasses import dataclass
from typing import NamedTuple

from kvbm_jax.errors import ConfigError, TransportError
from kvbm_jax.extras import needs

with needs("nats", "events over NATS"):
    import nats.errors
    import nats.js.errors
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext
    from nats.js.api import RetentionPolicy, StorageType, StreamConfig

__all__ = ["MESSAGE_ID", "MessageId", "NatsStream", "Subjects", "open_stream", "status_of"]

MESSAGE_ID = "Nats-Msg-Id"


class MessageId(NamedTuple):
    """Which message of which life of which worker."""

    worker_id: str
    life: int
    sequence: int

    def __str__(self) -> str:
        return f"{self.worker_id}:{self.life}:{self.sequence}"

    @classmethod
    def of(cls, message: Msg) -> "MessageId | None":
        """Returns the id of a message; None if it has none."""
        worker_id, *numbers = (message.headers or {}).get(MESSAGE_ID, "").rsplit(":", 2)
        if len(numbers) != 2 or not all(n.isascii() and n.isdecimal() and len(n) < 20 for n in numbers):
            return None
        return cls(worker_id, int(numbers[0]), int(numbers[1]))


@dataclass(frozen=True)
class Subjects:
    """The subjects under one prefix."""

    prefix: str = "kvbm"

    def __post_init__(self) -> None:
        tokens = self.prefix.split(".")
        if not all(token and token.isprintable() and not set(token) & set(" *>") for token in tokens):
            raise ConfigError(f"prefix = {self.prefix!r}: allowed are tokens of a NATS subject, without wildcards")

    def events(self, worker_id: str) -> str:
        """Where a worker's messages are."""
        return f"{self.prefix}.events.{_token(worker_id)}"

    @property
    def all_events(self) -> str:
        """Where the messages of all workers are."""
        return f"{self.prefix}.events.*"

    def snapshot(self, worker_id: str) -> str:
        """Where a worker is asked for what it holds."""
        return f"{self.all_snapshots}.{_token(worker_id)}"

    @property
    def all_snapshots(self) -> str:
        """Where all workers are asked."""
        return f"{self.prefix}.snapshot"


@dataclass(frozen=True, kw_only=True)
class NatsStream:
    """The stream of JetStream that keeps the messages, and for how long; whoever comes first makes it."""

    name: str = "KVBM_EVENTS"
    max_age: float = 86_400.0  # seconds; 0 for no limit
    max_bytes: int = 1 << 30  # -1 for no limit, here and below
    max_msgs: int = -1
    max_msgs_per_worker: int = -1
    in_memory: bool = False
    replicas: int = 1


async def open_stream(client: Client, stream: NatsStream, subjects: Subjects) -> JetStreamContext:
    """Returns JetStream with the stream in it.

    Raises:
      TransportError: The server has no JetStream, or refuses the stream.
    """
    js = client.jetstream()
    try:
        try:
            await js.stream_info(stream.name)
        except nats.js.errors.NotFoundError:
            await js.add_stream(
                StreamConfig(
                    name=stream.name,
                    subjects=[subjects.all_events],
                    retention=RetentionPolicy.LIMITS,
                    storage=StorageType.MEMORY if stream.in_memory else StorageType.FILE,
                    max_age=stream.max_age,
                    max_bytes=stream.max_bytes,
                    max_msgs=stream.max_msgs,
                    max_msgs_per_subject=stream.max_msgs_per_worker,
                    num_replicas=stream.replicas,
                )
            )
    except (nats.js.errors.ServiceUnavailableError, nats.errors.NoRespondersError) as error:
        raise TransportError(
            "the NATS server has no JetStream; start it with -js, or publish without it (jetstream = false)"
        ) from error
    except nats.js.errors.APIError as error:
        raise TransportError(f"the stream {stream.name} cannot be had: {error.description}") from error
    return js


def status_of(message: Msg) -> str | None:
    """What the server, and not a peer, has to say: its code, 503 if nobody listens."""
    return (message.headers or {}).get("Status")


def _token(worker_id: str) -> str:
    return urllib.parse.quote(worker_id, safe="").replace(".", "%2E")
