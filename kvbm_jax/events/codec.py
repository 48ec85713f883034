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
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import EventDecodeError, LayoutError
from kvbm_jax.events.columns import offsets_of
from kvbm_jax.events.schema import SCHEMA_VERSION, EventType, KvEventBatch
from kvbm_jax.protocols import Tier

__all__ = [
    "MAX_MESSAGE_BYTES",
    "MAX_MESSAGE_EVENTS",
    "EventCodec",
    "batch_of",
    "check_count",
    "check_version",
    "fields_of",
    "total",
]

MAX_MESSAGE_BYTES = 16 << 20
MAX_MESSAGE_EVENTS = 1 << 20  # for one byte of a message may stand for an event of a hundred
_LONGEST_REASON = 300  # characters of an error, which may quote the message


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
            raise EventDecodeError(
                f"{len(data):,} bytes are no {codec.name} message of events: {error!s:.{_LONGEST_REASON}}"
            ) from error

    return whole


def check_count(count: int) -> None:
    """Refuses messages of too many events, before there is a column of them.

    Raises:
      EventDecodeError: There are more than are read.
    """
    if count > MAX_MESSAGE_EVENTS:
        raise EventDecodeError(f"a message of {count:,} events; at most {MAX_MESSAGE_EVENTS:,} are read")


def check_version(version: int) -> None:
    """Refuses messages of a schema that is not known here.

    Raises:
      EventDecodeError: It is newer than this library.
    """
    if not 1 <= version <= SCHEMA_VERSION:
        raise EventDecodeError(
            f"the message is of schema version {version}; this library reads 1 to {SCHEMA_VERSION}: update the reader"
        )


def fields_of(
    batch: KvEventBatch,
    column: Callable[[NDArray[np.generic]], Any],
    hashes: Callable[[NDArray[np.uint32]], Any],
) -> dict[str, Any]:
    """Returns the fields of a native message, less `event_types` and `token_ids`.

    Args:
      batch: What the message says.
      column: Puts a column of numbers `[E]` into the codec's form.
      hashes: Puts a column of hashes `uint32[E, 4]` into it.
    """
    return {
        "schema_version": batch.schema_version,
        "worker_id": batch.worker_id,
        "block_size": batch.block_size,
        "dp_rank": batch.dp_rank,
        "event_ids": column(batch.event_ids),
        "timestamps": column(batch.timestamps),
        "block_ids": column(batch.block_ids),
        "tiers": column(batch.tiers),
        "group_idx": column(batch.group_idx),
        "sequence_hashes": hashes(batch.sequence_hashes),
        "parent_hashes": hashes(batch.parent_hashes),
        "token_counts": column((batch.token_offsets[1:] - batch.token_offsets[:-1]).astype(np.uint32)),
        "from_tiers": column(batch.from_tiers),
        "from_block_ids": column(batch.from_block_ids),
        "lora_names": batch.lora_names,
        "to_workers": batch.to_workers,
        "metadata": tuple(dict(row) for row in batch.metadata),
    }


def batch_of(
    message: Any,
    column: Callable[[str, type[np.generic]], NDArray[Any]],
    hashes: Callable[[str], NDArray[np.uint32]],
    **rest: Any,
) -> KvEventBatch:
    """Returns the batch of a native message.

    Args:
      message: Has the message's fields as attributes.
      column: Makes the column of numbers `[E]` of a field's name and the column's dtype.
      hashes: Makes the column of hashes `uint32[E, 4]` of a field's name.
      **rest: The batch's `event_types`, `token_ids`, `lora_names`, `to_workers` and `metadata`.

    Raises:
      EventDecodeError: Its types or tiers are none that there are.
    """
    batch = KvEventBatch(
        worker_id=message.worker_id,
        block_size=message.block_size,
        dp_rank=message.dp_rank,
        event_ids=column("event_ids", np.uint64),
        timestamps=column("timestamps", np.uint64),
        block_ids=column("block_ids", np.uint64),
        tiers=column("tiers", np.uint8),
        group_idx=column("group_idx", np.uint32),
        sequence_hashes=hashes("sequence_hashes"),
        parent_hashes=hashes("parent_hashes"),
        token_offsets=offsets_of(column("token_counts", np.uint32)),
        from_tiers=column("from_tiers", np.uint8),
        from_block_ids=column("from_block_ids", np.uint64),
        schema_version=message.schema_version,
        **rest,
    )
    for name, limit in (("event_types", len(EventType) - 1), ("tiers", len(Tier)), ("from_tiers", len(Tier))):
        codes = getattr(batch, name).tobytes()
        if codes and max(codes) > limit:
            raise EventDecodeError(f"{name} are numbers from 0 to {limit}; one is {max(codes)}")
    return batch
