"""The native codecs, which carry all of a batch: MessagePack, the default, and JSON.

Both write one object of the same fields; `docs/events.md` has the table. A field that is absent is zero for every
event, or empty. MessagePack holds each column as its bytes, little-endian, so that encoding and decoding are copies of
memory; JSON holds arrays of numbers, and hashes as 32 hexadecimal digits.
"""

from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import EventDecodeError
from kvbm_jax.events.codec import MAX_MESSAGE_EVENTS, batch_of, check_count, check_version, fields_of, total
from kvbm_jax.events.columns import from_bytes, from_numbers, hash_rows, to_bytes, to_numbers
from kvbm_jax.events.schema import SCHEMA_VERSION, EventType, KvEventBatch, Shared

__all__ = ["JsonCodec", "MsgpackCodec"]

_TYPES = tuple(EventType)
_NO_HASH = bytes(16)

type _Count = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
type _OfEvents[T] = Annotated[tuple[T, ...], msgspec.Meta(max_length=MAX_MESSAGE_EVENTS)]
type _Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class _Head(msgspec.Struct, omit_defaults=True, frozen=True, kw_only=True):
    """What both forms have in common."""

    schema_version: int
    worker_id: str
    block_size: _Count
    dp_rank: _Count = 0
    lora_names: _OfEvents[str | None] = ()
    to_workers: _OfEvents[str | None] = ()
    metadata: _OfEvents[dict[str, str]] = ()


class _Packed(_Head, omit_defaults=True, frozen=True, kw_only=True):
    """The message of `MsgpackCodec`."""

    event_types: bytes
    event_ids: bytes = b""
    timestamps: bytes = b""
    block_ids: bytes = b""
    tiers: bytes = b""
    group_idx: bytes = b""
    sequence_hashes: bytes = b""
    parent_hashes: bytes = b""
    token_counts: bytes = b""
    token_ids: bytes = b""
    from_tiers: bytes = b""
    from_block_ids: bytes = b""


class _Plain(_Head, omit_defaults=True, frozen=True, kw_only=True):
    """The message of `JsonCodec`."""

    event_types: list[EventType]
    event_ids: list[int] = []
    timestamps: list[int] = []
    block_ids: list[int] = []
    tiers: list[int] = []
    group_idx: list[int] = []
    sequence_hashes: list[_Hex | None] = []
    parent_hashes: list[_Hex | None] = []
    token_counts: list[int] = []
    token_ids: list[int] = []
    from_tiers: list[int] = []
    from_block_ids: list[int] = []


_PACK = msgspec.msgpack.Encoder()
_UNPACK = msgspec.msgpack.Decoder(_Packed)
_WRITE = msgspec.json.Encoder()
_READ = msgspec.json.Decoder(_Plain)


class MsgpackCodec:
    """Batches as MessagePack: all fields, columns as bytes."""

    name = "msgpack"
    native = True

    def encode(self, batch: KvEventBatch, /) -> bytes:
        """Returns the message of a batch."""
        if batch.shared is not None:
            return _PACK.encode(_packed(batch, batch.shared))
        return _PACK.encode(
            _Packed(
                **fields_of(batch, to_bytes, to_bytes),
                event_types=batch.event_types.tobytes(),
                token_ids=batch.token_ids.astype("<u4", copy=False).tobytes(),
            )
        )

    @total
    def decode(self, data: bytes, /, first_event_id: int = 0) -> tuple[KvEventBatch, ...]:
        """Returns the batch of a message."""
        found = _UNPACK.decode(data)
        check_version(found.schema_version)
        check_count(count := len(found.event_types))

        def column(name: str, dtype: type[np.generic]) -> NDArray[Any]:
            return from_bytes(name, getattr(found, name), dtype, count)

        def hashes(name: str) -> NDArray[np.uint32]:
            return from_bytes(name, getattr(found, name), np.uint32, count, (4,))

        if len(found.token_ids) % 4:
            raise EventDecodeError(f"token_ids has {len(found.token_ids)} bytes, which is no multiple of 4")
        batch = batch_of(
            found,
            column,
            hashes,
            event_types=column("event_types", np.uint8),
            token_ids=np.frombuffer(found.token_ids, "<u4").astype(np.uint32, copy=False),
            lora_names=found.lora_names,
            to_workers=found.to_workers,
            metadata=found.metadata,
        )
        return (batch,)


class JsonCodec:
    """Batches as JSON: all fields, columns as arrays of numbers. Integers reach 2**64 - 1."""

    name = "json"
    native = True

    def encode(self, batch: KvEventBatch, /) -> bytes:
        """Returns the message of a batch."""
        return _WRITE.encode(
            _Plain(
                **fields_of(batch, to_numbers, _hex),
                event_types=[_TYPES[code] for code in batch.event_types.tolist()],
                token_ids=batch.token_ids.tolist(),
            )
        )

    @total
    def decode(self, data: bytes, /, first_event_id: int = 0) -> tuple[KvEventBatch, ...]:
        """Returns the batch of a message."""
        found = _READ.decode(data)
        check_version(found.schema_version)
        check_count(count := len(found.event_types))

        def column(name: str, dtype: type[np.generic]) -> NDArray[Any]:
            return from_numbers(getattr(found, name), dtype, count)

        def hashes(name: str) -> NDArray[np.uint32]:
            values: list[str | None] = getattr(found, name) or [None] * count
            return hash_rows(b"".join([bytes.fromhex(value) if value else _NO_HASH for value in values]))

        batch = batch_of(
            found,
            column,
            hashes,
            event_types=np.array([kind.code for kind in found.event_types], np.uint8),
            token_ids=np.array(found.token_ids, np.uint32),
            lora_names=found.lora_names,
            to_workers=found.to_workers,
            metadata=found.metadata,
        )
        return (batch,)


def _packed(batch: KvEventBatch, shared: Shared) -> _Packed:
    """The message of a batch whose events have all in common that they can, without making its columns."""
    count = shared.num_events

    def repeated(value: int, width: int) -> bytes:
        return value.to_bytes(width, "little") * count if value else b""

    first, block_ids = shared.first_event_id, shared.block_ids
    return _Packed(
        schema_version=SCHEMA_VERSION,
        worker_id=shared.worker_id,
        block_size=shared.block_size,
        dp_rank=shared.dp_rank,
        lora_names=() if shared.lora_name is None else (shared.lora_name,) * count,
        event_types=bytes((shared.event_type.code,)) * count,
        event_ids=repeated(first, 8) if count == 1 else to_bytes(np.arange(first, first + count, dtype=np.uint64)),
        timestamps=repeated(shared.timestamp, 8),
        block_ids=b"" if block_ids is None else to_bytes(block_ids),
        tiers=repeated(shared.tier, 1),
        group_idx=repeated(shared.group_idx, 4),
        sequence_hashes=to_bytes(batch.sequence_hashes),
        parent_hashes=to_bytes(batch.parent_hashes),
        token_counts=repeated(shared.tokens_each, 4),
        token_ids=batch.token_ids.astype("<u4", copy=False).tobytes(),
        from_tiers=repeated(shared.from_tier, 1),
    )


def _hex(hashes: NDArray[np.uint32]) -> list[str | None]:
    """Hashes u32[E, 4] in hexadecimal, None where there is none; or nothing if there is none at all."""
    if not hashes.any():
        return []
    digits = hashes.astype("<u4", copy=False).tobytes().hex()
    parts = (digits[i : i + 32] for i in range(0, len(digits), 32))
    return [part if part.strip("0") else None for part in parts]
