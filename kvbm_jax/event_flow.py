"""The way of a manager's events, as its configuration says: to subscribers in this process, and to a transport.

    consolidate = none        manager ───────────────────────────────────────────────┬→ bus → subscribe_events()
    per_tier, merged          manager ───────────────────────────┬→ Consolidator ────┤
                    engine_events, each → Renamer ───────────────┘                   └→ transport (`events`)

An engine beside the manager, vLLM or SGLang, has blocks of its own on the device and tells of them in a stream of its
own. Here a thread for each stream follows it, puts its blocks under our hashes, and adds them to what the manager says:
a router hears one worker. An engine that is not there yet is waited for; one that was restarted begins anew. Where
messages are lost for good, what the stream said before stands.
"""

import contextlib
import logging
import threading

from kvbm_jax.addresses import public
from kvbm_jax.closing import Closing
from kvbm_jax.config import EventConsolidation, EventTransport, KvBlockManagerConfig
from kvbm_jax.events import (
    Consolidation,
    Consolidator,
    EventBus,
    EventType,
    KvEvent,
    KvEventBatch,
    NullEventSink,
    Renamer,
    StreamItem,
    Subscription,
    WorkerSnapshot,
    open_inlet,
    open_outlet,
)
from kvbm_jax.protocols import Clock, EventSink, MetricsSink

__all__ = ["EventFlow"]

_LOG = logging.getLogger(__name__)


class EventFlow(Closing):
    """What a manager's events go through.

    Args:
      config: says how.
      metrics: where counters go.
      clock: for the time of what follows from an engine's doings.

    Attributes:
      sink: where the manager publishes.

    Raises:
      ConfigError: if the transport is not there, or an address is none.
      MissingDependencyError: if the package of a transport is not installed.
      TransportError: if the transport reaches nobody, or its address is taken.
    """

    def __init__(self, config: KvBlockManagerConfig, *, metrics: MetricsSink, clock: Clock) -> None:
        self._bus = EventBus(config.worker_id, metrics=metrics)
        self._opened = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            opening.callback(self._bus.close)
            sink = opening.enter_context(contextlib.closing(_outlet(config, self._bus, metrics)))
            if config.consolidate is not EventConsolidation.NONE:
                mode = Consolidation(config.consolidate)
                consolidator = Consolidator(sink, worker_id=config.worker_id, mode=mode, clock=clock)
                sink = consolidator.source("manager")
                for url in config.engine_events:
                    renamer = Renamer(consolidator.source(url), algorithm=config.hash_algorithm)
                    opening.enter_context(_Engine(open_inlet("zmq", config.worker_id, url), renamer, public(url)))
            self._opened = opening.pop_all()
        self.sink = sink

    def subscribe(self, *, snapshot: bool = False) -> Subscription:
        """Returns a subscription, within this process, to what is told from now on, after what stands now if asked."""
        return self._bus.subscribe(snapshot=snapshot)

    def close(self) -> None:
        """Delivers what has been published, and ends. Idempotent."""
        self._opened.close()


class _Engine(Closing):
    """A thread that follows an engine's stream.

    Args:
      stream: the engine's.
      sink: takes its batches.
      name: of the stream, for people.
    """

    def __init__(self, stream: Subscription, sink: EventSink[KvEventBatch], name: str) -> None:
        self._stream = stream
        self._sink = sink
        self._name = name
        self._complained = False
        self._thread = threading.Thread(target=self._follow, name="kvbm-engine-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leaves the stream; what it has claimed stands. Idempotent."""
        self._stream.close()
        self._thread.join()

    def _follow(self) -> None:
        for item in self._stream:
            try:
                self._take(item)
            except Exception:  # noqa: BLE001 (what an engine tells must not end the thread)
                if not self._complained:
                    self._complained = True
                    _LOG.exception("events of %s are passed over (later ones are not told)", self._name)

    def _take(self, item: StreamItem) -> None:
        if isinstance(item, KvEventBatch):
            self._sink.publish(item)
        elif isinstance(item, WorkerSnapshot):
            nothing = KvEvent(EventType.CLEARED, 0, item.worker_id, item.timestamp)
            for batch in (KvEventBatch.from_events([nothing]), *item.batches):
                self._sink.publish(batch)
        else:
            _LOG.warning("%s: %d batches are lost; what was told before stands", self._name, item.batches)


def _outlet(config: KvBlockManagerConfig, bus: EventBus, metrics: MetricsSink) -> EventSink[KvEventBatch]:
    match config.events:
        case EventTransport.NONE:
            return NullEventSink()
        case EventTransport.INPROC:
            return bus
        case transport:
            return open_outlet(transport, bus, worker_id=config.worker_id, url=config.events_url, metrics=metrics)
