"""Events: what happens to blocks, told to routers, other workers and people.

`schema` says what an event is, `publisher` numbers and stamps them, `bus` carries them within this process, `sinks` has
the two trivial receivers. Network transports are floor 5 and not imported from here.
"""

from kvbm_jax.events.bus import EventBus, EventGap, Subscription
from kvbm_jax.events.publisher import EventPublisher
from kvbm_jax.events.schema import SCHEMA_VERSION, EventType, KvEvent, KvEventBatch
from kvbm_jax.events.sinks import NullEventSink, RecordingEventSink

__all__ = [
    "SCHEMA_VERSION",
    "EventType",
    "KvEvent",
    "KvEventBatch",
    "EventBus",
    "EventGap",
    "EventPublisher",
    "Subscription",
    "NullEventSink",
    "RecordingEventSink",
]
