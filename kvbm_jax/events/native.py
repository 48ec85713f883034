"""The native codecs, which carry all of a batch: MessagePack, the default, and JSON.

Both write one object of the same fields; `docs/events.md` has the table. A field that is absent is zero for every
event, or empty. MessagePack holds each column as its bytes, little-endian, so that encoding and decoding are copies of
memory; JSON holds arrays of numbers, and hashes as 32 hexadecimal digits.
"""

from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from kvbm_jax.errors import EventDecodeError
from kvbm_jax.events.codec import check_codes, check_version, total
from kvbm_jax.events.schema import SCHEMA_VERSION, EventType, KvEventBatch, Shared

__all__ = ["JsonCodec", "MsgpackCodec"]

_TYPES = tuple(EventType)
_NO_HASH = bytes(16)

type _Count = Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]
type _Hex = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{32}\Z")]


class _Head(msgspec.Struct, omit_defaults=True, frozen=True, kw_only=True):
    """What both forms have in common."""

    schema_version: int
    worker_id: str
    block_size: _Count
    dp_rank: _Count = 0
    lora_names: tuple[str | None, ...] = ()
    to_workers: tuple[str | None, ...] = ()
    metadata: tuple[dict[str, str], ...] = ()


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
                **_head(batch),
                event_types=batch.event_types.tobytes(),
                event_ids=_bytes(batch.event_ids, "<u8"),
                timestamps=_bytes(batch.timestamps, "<u8"),
                block_ids=_bytes(batch.block_ids, "<u8"),
                tiers=_bytes(batch.tiers, "u1"),
                group_idx=_bytes(batch.group_idx, "<u4"),
                sequence_hashes=_bytes(batch.sequence_hashes, "<u4"),
                parent_hashes=_bytes(batch.parent_hashes, "<u4"),
                token_counts=_bytes(_counts(batch), "<u4"),
                token_ids=batch.token_ids.astype("<u4", copy=False).tobytes(),
                from_tiers=_bytes(batch.from_tiers, "u1"),
                from_block_ids=_bytes(batch.from_block_ids, "<u8"),
            )
        )

    @total
    def decode(self, data: bytes, /, first_event_id: int = 0) -> tuple[KvEventBatch, ...]:
        """Returns the batch of a message."""
        found = _UNPACK.decode(data)
        check_version(found.schema_version)
        count = len(found.event_types)

        def column[T: np.generic](name: str, dtype: type[T], width: int = 1) -> NDArray[T]:
            raw: bytes = getattr(found, name)
            if not raw:
                return np.zeros(count * width, dtype)
            wire = np.dtype(dtype).newbyteorder("<")
            if len(raw) != count * width * wire.itemsize:
                raise EventDecodeError(
                    f"{name} has {len(raw)} bytes; {count} events have {count * width * wire.itemsize}"
                )
            return np.frombuffer(raw, wire).astype(dtype, copy=False)

        if len(found.token_ids) % 4:
            raise EventDecodeError(f"token_ids has {len(found.token_ids)} bytes, which is no multiple of 4")
        batch = KvEventBatch(
            worker_id=found.worker_id,
            block_size=found.block_size,
            dp_rank=found.dp_rank,
            event_types=column("event_types", np.uint8),
            event_ids=column("event_ids", np.uint64),
            timestamps=column("timestamps", np.uint64),
            block_ids=column("block_ids", np.uint64),
            tiers=column("tiers", np.uint8),
            group_idx=column("group_idx", np.uint32),
            sequence_hashes=column("sequence_hashes", np.uint32, 4).reshape(-1, 4),
            parent_hashes=column("parent_hashes", np.uint32, 4).reshape(-1, 4),
            token_offsets=_offsets(column("token_counts", np.uint32)),
            token_ids=np.frombuffer(found.token_ids, "<u4").astype(np.uint32, copy=False),
            from_tiers=column("from_tiers", np.uint8),
            from_block_ids=column("from_block_ids", np.uint64),
            lora_names=found.lora_names,
            to_workers=found.to_workers,
            metadata=found.metadata,
            schema_version=found.schema_version,
        )
        return (check_codes(batch),)


class JsonCodec:
    """Batches as JSON: all fields, columns as arrays of numbers. Integers reach 2**64 - 1."""

    name = "json"
    native = True

    def encode(self, batch: KvEventBatch, /) -> bytes:
        """Returns the message of a batch."""
        return _WRITE.encode(
            _Plain(
                **_head(batch),
                event_types=[_TYPES[code] for code in batch.event_types.tolist()],
                event_ids=_numbers(batch.event_ids),
                timestamps=_numbers(batch.timestamps),
                block_ids=_numbers(batch.block_ids),
                tiers=_numbers(batch.tiers),
                group_idx=_numbers(batch.group_idx),
                sequence_hashes=_hex(batch.sequence_hashes),
                parent_hashes=_hex(batch.parent_hashes),
                token_counts=_numbers(_counts(batch)),
                token_ids=batch.token_ids.tolist(),
                from_tiers=_numbers(batch.from_tiers),
                from_block_ids=_numbers(batch.from_block_ids),
            )
        )

    @total
    def decode(self, data: bytes, /, first_event_id: int = 0) -> tuple[KvEventBatch, ...]:
        """Returns the batch of a message."""
        found = _READ.decode(data)
        check_version(found.schema_version)
        count = len(found.event_types)

        def column[T: np.generic](name: str, dtype: type[T]) -> NDArray[T]:
            return np.array(getattr(found, name) or [0] * count, dtype)

        def hashes(values: list[str | None]) -> NDArray[np.uint32]:
            joined = b"".join(bytes.fromhex(value) if value else _NO_HASH for value in values) or _NO_HASH * count
            return np.frombuffer(joined, "<u4").astype(np.uint32, copy=False).reshape(-1, 4)

        batch = KvEventBatch(
            worker_id=found.worker_id,
            block_size=found.block_size,
            dp_rank=found.dp_rank,
            event_types=np.array([kind.code for kind in found.event_types], np.uint8),
            event_ids=column("event_ids", np.uint64),
            timestamps=column("timestamps", np.uint64),
            block_ids=column("block_ids", np.uint64),
            tiers=column("tiers", np.uint8),
            group_idx=column("group_idx", np.uint32),
            sequence_hashes=hashes(found.sequence_hashes),
            parent_hashes=hashes(found.parent_hashes),
            token_offsets=_offsets(column("token_counts", np.uint32)),
            token_ids=np.array(found.token_ids, np.uint32),
            from_tiers=column("from_tiers", np.uint8),
            from_block_ids=column("from_block_ids", np.uint64),
            lora_names=found.lora_names,
            to_workers=found.to_workers,
            metadata=found.metadata,
            schema_version=found.schema_version,
        )
        return (check_codes(batch),)


def _head(batch: KvEventBatch) -> dict[str, Any]:
    return {
        "schema_version": batch.schema_version,
        "worker_id": batch.worker_id,
        "block_size": batch.block_size,
        "dp_rank": batch.dp_rank,
        "lora_names": batch.lora_names,
        "to_workers": batch.to_workers,
        "metadata": tuple(dict(row) for row in batch.metadata) if batch.metadata else (),
    }


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
        event_ids=repeated(first, 8) if count == 1 else _bytes(np.arange(first, first + count, dtype=np.uint64), "<u8"),
        timestamps=repeated(shared.timestamp, 8),
        block_ids=b"" if block_ids is None else _bytes(block_ids, "<u8"),
        tiers=repeated(shared.tier, 1),
        group_idx=repeated(shared.group_idx, 4),
        sequence_hashes=_bytes(batch.sequence_hashes, "<u4"),
        parent_hashes=_bytes(batch.parent_hashes, "<u4"),
        token_counts=repeated(shared.tokens_each, 4),
        token_ids=batch.token_ids.astype("<u4", copy=False).tobytes(),
        from_tiers=repeated(shared.from_tier, 1),
    )


def _bytes(column: NDArray[np.generic], dtype: DTypeLike) -> bytes:
    """The bytes of a column, or none if all are zero."""
    raw = column.astype(dtype, copy=False).tobytes()
    return raw if raw.strip(b"\0") else b""


def _numbers(column: NDArray[np.generic]) -> list[int]:
    """The numbers of a column, or none if all are zero."""
    numbers: list[int] = column.tolist() if column.any() else []
    return numbers


def _hex(hashes: NDArray[np.uint32]) -> list[str | None]:
    """Hashes u32[E, 4] in hexadecimal, None where there is none; or nothing if there is none at all."""
    if not hashes.any():
        return []
    digits = hashes.astype("<u4", copy=False).tobytes().hex()
    parts = (digits[i : i + 32] for i in range(0, len(digits), 32))
    return [part if part.strip("0") else None for part in parts]


def _counts(batch: KvEventBatch) -> NDArray[np.uint32]:
    return (batch.token_offsets[1:] - batch.token_offsets[:-1]).astype(np.uint32)


def _offsets(counts: NDArray[np.uint32]) -> NDArray[np.int64]:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets
