"""The transports of events for tests: each as it is, and all of them under one interface."""

import socket
import threading

from kvbm_jax.events import MsgpackCodec
from kvbm_jax.transports.nats_publisher import NatsKvEventPublisher, NatsKvEventPublisherConfig
from kvbm_jax.transports.nats_subscriber import NatsKvEventSubscriberConfig, subscribe_nats
from kvbm_jax.transports.zmq_publisher import ZmqKvEventPublisher, ZmqKvEventPublisherConfig
from kvbm_jax.transports.zmq_subscriber import ZmqKvEventSubscriberConfig, subscribe_zmq

ANY = "tcp://127.0.0.1:*"


def free_ports():
    """Two free ports, one after the other."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def zmq_publisher(**fields):
    fields = {"worker_id": "w-1", "endpoint": ANY, "replay_endpoint": ANY, "codec": MsgpackCodec()} | fields
    return ZmqKvEventPublisher(ZmqKvEventPublisherConfig(**fields))


def zmq_subscription(source, **fields):
    fields = {"codec": MsgpackCodec(), "worker_id": "w-1"} | fields
    return subscribe_zmq(
        ZmqKvEventSubscriberConfig(endpoint=source.endpoint, replay_endpoint=source.replay_endpoint, **fields)
    )


def nats_publisher(place, **fields):
    return NatsKvEventPublisher(NatsKvEventPublisherConfig(**{"worker_id": "w-1"} | place | fields))


def nats_subscription(place, **fields):
    return subscribe_nats(NatsKvEventSubscriberConfig(**place | fields))


class OverZmq:
    """A worker and its readers over ZeroMQ."""

    def publisher(self, *, after=None, **fields):
        """Begins the worker, or with `after` its next life at the same address."""
        if after is not None:
            fields |= {"endpoint": after.endpoint, "replay_endpoint": after.replay_endpoint}
        return zmq_publisher(**fields)

    def subscribe(self, source):
        return zmq_subscription(source, quiet=0.2)

    def settle(self, source):
        """Waits until a snapshot has all that was published."""
        while source.stats().waiting:
            threading.Event().wait(0.001)


class OverNats:
    """The same over NATS, at a subject of its own."""

    def __init__(self, place, *, jetstream):
        self._place = place | {"jetstream": jetstream}

    def publisher(self, *, after=None, **fields):
        return nats_publisher(self._place, **fields)

    def subscribe(self, source):
        return nats_subscription(self._place)

    def settle(self, source):
        assert source.flush(20)
