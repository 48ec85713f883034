"""Where a manager's events go, and where an engine's come from, by the name of a transport.

Transports beyond the process are not known here. Whoever has one, this package's own `kvbm_jax.transports` or another
distribution, declares an entry point of the group `kvbm_jax.event_transports`: its name is the transport's, and it is a
function `(worker_id, url, metrics) -> EventSink`, called once by each manager that asks for it. `url` is None where the
configuration names none. Streams of engines are found likewise, as `(worker_id, url) -> Subscription` in the group
`kvbm_jax.event_sources`.
"""

from collections.abc import Callable
from typing import Final

from kvbm_jax import extensions
from kvbm_jax.events.schema import KvEventBatch
from kvbm_jax.events.sinks import FanOutSink
from kvbm_jax.events.subscription import Subscription
from kvbm_jax.protocols import EventSink, MetricsSink

__all__ = ["KIND", "TransportFactory", "open_inlet", "open_outlet"]

KIND: Final = extensions.Kind("event transport", "kvbm_jax.event_transports", ("inproc", "nats", "zmq", "none"))

_SOURCES: Final = extensions.Kind("source of events", "kvbm_jax.event_sources", ("zmq",))

type TransportFactory = Callable[[str, str | None, MetricsSink], EventSink[KvEventBatch]]


def open_outlet(
    transport: str, bus: EventSink[KvEventBatch], *, worker_id: str, url: str | None, metrics: MetricsSink
) -> EventSink[KvEventBatch]:
    """Returns a sink that publishes on the bus of this process and over a transport beyond it.

    Args:
      transport: Name of the entry point.
      bus: Gets every batch too, and is closed with the sink.
      worker_id: Whose events these are.
      url: Where to; None for the transport's own choice.
      metrics: Where the transport's counters go.

    Raises:
      ConfigError: There is no such transport.
      KvbmError: What the transport says against it: its package is missing, nobody is there, ...
    """

    def use(factory: TransportFactory) -> EventSink[KvEventBatch]:
        return factory(worker_id, url, metrics)

    return FanOutSink([bus, extensions.load(KIND, transport, use, methods=("publish", "close"))])


def open_inlet(transport: str, worker_id: str, url: str) -> Subscription:
    """Returns a subscription to the stream of an engine; the engine need not be there yet.

    Args:
      transport: Name of the entry point.
      worker_id: Whose events they will be.
      url: Of the stream.

    Raises:
      ConfigError: There is no such transport, or the address is none.
      KvbmError: What the transport says against it: its package is missing, ...
    """

    def use(subscribe: Callable[[str, str], Subscription]) -> Subscription:
        return subscribe(worker_id, url)

    return extensions.load(_SOURCES, transport, use, methods=("poll", "close"))
