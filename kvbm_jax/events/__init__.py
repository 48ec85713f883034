"""Events: what happens to blocks, told to routers, other workers and people.

`schema` says what an event is, `publisher` numbers and stamps them, `bus` carries them within this process to its
subscribers (`subscription`), `sinks` has the trivial receivers, `outlets` finds transports by name. `prefix_index` is
what a router believes, `snapshot` what it is told first, `live` what a worker makes that from. `consolidator` makes one
stream of several sources, `parent_gate` one that peers with trees can follow, `rename` one under our hashes; all three
see batches as `rows`. `codec`, `native`, `engine` and `dynamo` turn batches into messages and back, with `columns`,
`runs` and `parts` beneath them. Transports beyond the process are floor 5 (`kvbm_jax.transports`) and not imported from
here.
"""

from kvbm_jax.events.bus import EventBus
from kvbm_jax.events.codec import EventCodec
from kvbm_jax.events.consolidator import Consolidation, Consolidator, EventSource
from kvbm_jax.events.dynamo import DynamoCodec
from kvbm_jax.events.engine import EngineCodec
from kvbm_jax.events.live import LiveBlocks
from kvbm_jax.events.native import JsonCodec, MsgpackCodec
from kvbm_jax.events.outlets import open_inlet, open_outlet
from kvbm_jax.events.parent_gate import ParentGate
from kvbm_jax.events.parts import parts
from kvbm_jax.events.prefix_index import Holder, IndexStats, Overlap, PrefixIndex
from kvbm_jax.events.publisher import EventPublisher
from kvbm_jax.events.rename import Renamer
from kvbm_jax.events.schema import SCHEMA_VERSION, EventType, KvEvent, KvEventBatch
from kvbm_jax.events.sinks import FanOutSink, NullEventSink, RecordingEventSink
from kvbm_jax.events.snapshot import WorkerSnapshot
from kvbm_jax.events.subscription import EventGap, StreamItem, Subscription

__all__ = [
    "SCHEMA_VERSION",
    "EventType",
    "KvEvent",
    "KvEventBatch",
    "EventBus",
    "EventGap",
    "EventPublisher",
    "Holder",
    "IndexStats",
    "Overlap",
    "PrefixIndex",
    "WorkerSnapshot",
    "Consolidation",
    "Consolidator",
    "EventSource",
    "ParentGate",
    "Renamer",
    "LiveBlocks",
    "StreamItem",
    "Subscription",
    "open_inlet",
    "open_outlet",
    "EventCodec",
    "MsgpackCodec",
    "JsonCodec",
    "EngineCodec",
    "DynamoCodec",
    "FanOutSink",
    "NullEventSink",
    "RecordingEventSink",
    "parts",
]
