"""The transports of this package as managers ask for them: by worker and address."""

import contextlib
import urllib.parse
from collections.abc import Callable

from kvbm_jax.addresses import public
from kvbm_jax.errors import ConfigError
from kvbm_jax.events import KvEventBatch, ParentGate, Subscription
from kvbm_jax.peers import PeerNetwork
from kvbm_jax.protocols import Discovery, EventSink, MetricsSink

__all__ = ["nats_peers", "nats_sink", "replay_endpoint", "zmq_sink", "zmq_source"]


def zmq_sink(worker_id: str, url: str | None, metrics: MetricsSink) -> EventSink[KvEventBatch]:
    """Publishes over ZeroMQ in the engines' language, by default at port 5557 of loopback.

    Who reads that language may know a block by its parent: a block is announced when its parent is (`ParentGate`).
    Replays and snapshots are served at the next port, or for other addresses than TCP's at the same with `-replay`.
    """
    from kvbm_jax.transports.zmq_publisher import (  # noqa: PLC0415 (an extra)
        ZmqKvEventPublisher,
        ZmqKvEventPublisherConfig,
    )

    if url is None:
        config = ZmqKvEventPublisherConfig(worker_id=worker_id)
    else:
        config = ZmqKvEventPublisherConfig(worker_id=worker_id, endpoint=url, replay_endpoint=replay_endpoint(url))
    return ParentGate(ZmqKvEventPublisher(config, metrics=metrics), worker_id=worker_id)


def zmq_source(worker_id: str, url: str) -> Subscription:
    """Subscribes to an engine's stream over ZeroMQ: `tcp://host:port`, or `ipc://path`.

    Gaps are filled if the address says where replays are served, as `tcp://host:port?replay=tcp://host:port` does.

    Raises:
      ConfigError: The address asks for something else.
      TransportError: It is none.
    """
    from kvbm_jax.transports.zmq_subscriber import (  # noqa: PLC0415 (an extra)
        ZmqKvEventSubscriberConfig,
        subscribe_zmq,
    )

    endpoint, _, query = url.partition("?")
    asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
    replay = asked.pop("replay", None)
    if asked:
        raise ConfigError(
            f"{public(url)!r} asks for {', '.join(sorted(asked))}; known is replay, such as ?replay=tcp://host:port"
        )
    return subscribe_zmq(ZmqKvEventSubscriberConfig(endpoint=endpoint, replay_endpoint=replay, worker_id=worker_id))


def nats_sink(worker_id: str, url: str | None, metrics: MetricsSink) -> EventSink[KvEventBatch]:
    """Publishes to JetStream, by default at the server that this user's workers share on this host."""
    from kvbm_jax.transports.nats_connection import NatsConnection  # noqa: PLC0415 (an extra)
    from kvbm_jax.transports.nats_publisher import (  # noqa: PLC0415
        NatsKvEventPublisher,
        NatsKvEventPublisherConfig,
    )
    from kvbm_jax.transports.nats_server import SharedNatsServer  # noqa: PLC0415

    if url is not None:
        config = NatsKvEventPublisherConfig(worker_id=worker_id, connection=NatsConnection.from_url(url))
        return NatsKvEventPublisher(config, metrics=metrics)
    server = SharedNatsServer()
    try:
        config = NatsKvEventPublisherConfig(worker_id=worker_id)
        publisher = NatsKvEventPublisher(config, metrics=metrics, resolve=server.connection)
    except BaseException:
        server.close()
        raise
    return _WithServer(publisher, server.close)


def nats_peers(worker_id: str, url: str | None) -> PeerNetwork:
    """The workers of one NATS server, by default the one that this user's workers share on this host."""
    from kvbm_jax.transports.nats_connection import NatsConnection  # noqa: PLC0415 (an extra)
    from kvbm_jax.transports.nats_discovery import NatsDiscovery, NatsDiscoveryConfig  # noqa: PLC0415
    from kvbm_jax.transports.nats_server import SharedNatsServer  # noqa: PLC0415
    from kvbm_jax.transports.nats_subscriber import NatsKvEventSubscriberConfig, subscribe_nats  # noqa: PLC0415

    with contextlib.ExitStack() as opened:
        if url is None:
            server = SharedNatsServer()
            opened.callback(server.close)
            connection, resolve = server.connection(), server.connection
        else:
            connection, resolve = NatsConnection.from_url(url), None
        discovery = NatsDiscovery(NatsDiscoveryConfig(connection=connection), resolve=resolve)
        opened.callback(discovery.close)
        events = subscribe_nats(NatsKvEventSubscriberConfig(connection=connection), resolve=resolve)
        closing = opened.pop_all()
    return PeerNetwork(discovery=_DiscoveryWithServer(discovery, closing), events=[events])


class _DiscoveryWithServer:
    """Discovery and the share in a server that it needs."""

    def __init__(self, discovery: Discovery, closing: contextlib.ExitStack) -> None:
        self._discovery = discovery
        self._closing = closing
        self.announce = discovery.announce
        self.withdraw = discovery.withdraw
        self.workers = discovery.workers

    def close(self) -> None:
        """Closes discovery, then the server if it is this process's own. Idempotent."""
        self._closing.close()


class _WithServer:
    """A publisher and the share in a server that it needs."""

    def __init__(self, publisher: EventSink[KvEventBatch], close_server: Callable[[], None]) -> None:
        self._publisher = publisher
        self._close_server = close_server

    def publish(self, batch: KvEventBatch, /) -> None:
        """Passes a batch on."""
        self._publisher.publish(batch)

    def close(self) -> None:
        """Closes the publisher, then the server if it is this process's own. Idempotent."""
        try:
            self._publisher.close()
        finally:
            self._close_server()


def replay_endpoint(url: str) -> str:
    """Returns where replays are served beside a ZeroMQ address.

    Raises:
      ConfigError: There is no next port.
    """
    if not url.startswith("tcp://"):
        return f"{url}-replay"
    head, _, port = url.rpartition(":")
    if port == "*":
        return url
    if not port.isdecimal() or not 0 < int(port) < 65_535:
        raise ConfigError(f"{public(url)!r}: allowed is an address such as tcp://127.0.0.1:5557")
    return f"{head}:{int(port) + 1}"
