"""What every codec of events offers, and what all of them share: bounds, and one error for all bad input.

A codec turns a `KvEventBatch` into the bytes of one message and back. Those that carry all of a batch are *native*:

    msgpack    the default of queues and wires           `kvbm_jax.events.native`
    json       the same fields for people and scripts    `kvbm_jax.events.native`
    protobuf   the same fields, from a published .proto  `kvbm_jax.transports.protobuf`

and those that speak another program's language carry what it knows:

    engine     the messages of vLLM and SGLang           `kvbm_jax.events.engine`
    dynamo     the JSON of Dynamo's router               `kvbm_jax.events.dynamo`

Decoders are total: any bytes give batches or an `EventDecodeError`, in memory that grows with their length alone.
"""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import msgspec

from kvbm_jax.errors import EventDecodeError, LayoutError
from kvbm_jax.events.schema import SCHEMA_VERSION, KvEventBatch

__all__ = ["MAX_MESSAGE_BYTES", "EventCodec", "check_version", "total"]

MAX_MESSAGE_BYTES = 64 << 20
_NUM_TIERS = 4
_NUM_TYPES = 4


class EventCodec(Protocol):
    """Turns batches into messages and back; holds no state, and may be called from any thread."""

    @property
    def name(self) -> str:
        """The codec's name in configurations."""
        ...

    @property
    def native(self) -> bool:
        """Whether messages carry all of a batch; others say neither whose events they are nor their ids."""
        ...

    def encode(self, batch: KvEventBatch, /) -> bytes:
        """Returns the bytes of one message.

        Raises:
          LayoutError: The batch has what the codec's language cannot say.
        """
        ...

    def decode(self, data: bytes, /, first_event_id: int = 0) -> tuple[KvEventBatch, ...]:
        """Returns the batches of one message, in order.

        Args:
          data: The message.
          first_event_id: Ids count up from here, if messages do not say them.

        Raises:
          EventDecodeError: The bytes are no message of this codec.
        """
        ...


def total[**P](decode: Callable[P, tuple[KvEventBatch, ...]]) -> Callable[P, tuple[KvEventBatch, ...]]:
    """Makes every failure of a codec's `decode` on bad bytes an `EventDecodeError`."""

    @functools.wraps(decode)
    def whole(*args: P.args, **kwargs: P.kwargs) -> tuple[KvEventBatch, ...]:
        codec: Any = args[0]
        data: Any = args[1]
        if len(data) > MAX_MESSAGE_BYTES:
            raise EventDecodeError(f"a message of {len(data):,} bytes; at most {MAX_MESSAGE_BYTES:,} are read")
        try:
            return decode(*args, **kwargs)
        except (msgspec.MsgspecError, UnicodeError, LayoutError, OverflowError, RecursionError) as error:
            raise EventDecodeError(f"{len(data):,} bytes are no {codec.name} message of events: {error}") from error

    return whole


def check_version(version: int) -> None:
    """Refuses messages of a schema that is not known here.

    Raises:
      EventDecodeError: It is newer than this library.
    """
    if not 1 <= version <= SCHEMA_VERSION:
        raise EventDecodeError(
            f"the message is of schema version {version}; this library reads 1 to {SCHEMA_VERSION}: update the reader"
        )


def check_codes(batch: KvEventBatch) -> KvEventBatch:
    """Returns a batch read from a wire if its types and tiers are ones that there are.

    Raises:
      EventDecodeError: They are not.
    """
    for name, limit in (("event_types", _NUM_TYPES - 1), ("tiers", _NUM_TIERS), ("from_tiers", _NUM_TIERS)):
        codes = getattr(batch, name).tobytes()
        if codes and max(codes) > limit:
            raise EventDecodeError(f"{name} are numbers from 0 to {limit}; one is {max(codes)}")
    return batch
