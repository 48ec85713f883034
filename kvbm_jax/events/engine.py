"""The language of inference engines: the payload of vLLM's and SGLang's KV events.

    payload        msgpack [seconds, [event, ...], dp_rank]
    event          {"type": "BlockStored", "block_hashes": [...], "parent_block_hash", "token_ids": [...], "block_size",
                    "lora_id", "medium", "lora_name", "group_idx"?}
                   {"type": "BlockRemoved", "block_hashes": [...], "medium", "group_idx"?}
                   {"type": "AllBlocksCleared"}; with "medium", which is ours, of that tier alone
    older form     the same as arrays that begin with the type, in that order: read, not written
    hashes         written as integers of 64 bits; read as integers, negative ones too, or bytes
    media          written GPU, CPU, STORAGE and EXTERNAL for the tiers from device to object store

What it has no word for is lost: block ids, event ids, metadata and half of each hash. A move down is a BlockStored
below and then a BlockRemoved above. Hashes of 64 bits are read as the first 8 bytes of a hash, longer ones to 16.

Integers in bulk are written in their widest form, each behind its type byte, so that arrays become messages, and such
messages arrays, by copies of memory. Other writers' shortest forms are read as well.
"""

import math
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import EventDecodeError, LayoutError
from kvbm_jax.events.codec import total
from kvbm_jax.events.runs import Run, runs
from kvbm_jax.events.schema import EventType, KvEventBatch
from kvbm_jax.protocols import Tier

__all__ = ["MEDIA", "EngineCodec"]

MEDIA = {Tier.G1: "GPU", Tier.G2: "CPU", Tier.G3: "STORAGE", Tier.G4: "EXTERNAL"}
_TIERS = {
    **{medium: tier for tier, medium in MEDIA.items()},
    "CPU_PINNED": Tier.G2,
    "CPU_TIER1": Tier.G2,
    "CPU_TIER2": Tier.G3,
    "DISK": Tier.G3,
    "FS": Tier.G3,
    "OBJ": Tier.G4,
}
_CREATED, _DELETED, _CLEARED = EventType.CREATED.code, EventType.DELETED.code, EventType.CLEARED.code
_HASH_BYTES = 16
_LOW_64 = 2**64 - 1
_UINT32, _UINT64 = b"\xce", b"\xcf"  # MessagePack's type bytes
_FEW = 8  # events up to which lists are faster than arrays

type _Hash = int | bytes


class _Stored(msgspec.Struct, tag_field="type", tag="BlockStored", frozen=True, gc=False):
    block_hashes: msgspec.Raw
    parent_block_hash: _Hash | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    group_idx: int | msgspec.UnsetType | None = msgspec.UNSET


class _Removed(msgspec.Struct, tag_field="type", tag="BlockRemoved", frozen=True, gc=False):
    block_hashes: msgspec.Raw
    medium: str | None = None
    group_idx: int | msgspec.UnsetType | None = msgspec.UNSET


class _Cleared(msgspec.Struct, tag_field="type", tag="AllBlocksCleared", frozen=True, gc=False):
    medium: str | msgspec.UnsetType | None = msgspec.UNSET


class _Batch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    ts: float
    events: list[_Stored | _Removed | _Cleared]
    dp_rank: int | None = None


class _StoredArray(msgspec.Struct, tag="BlockStored", array_like=True, frozen=True, gc=False):
    block_hashes: msgspec.Raw
    parent_block_hash: _Hash | None
    token_ids: msgspec.Raw
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: Any = None
    group_idx: int | None = None


class _RemovedArray(msgspec.Struct, tag="BlockRemoved", array_like=True, frozen=True, gc=False):
    block_hashes: msgspec.Raw
    medium: str | None = None
    group_idx: int | None = None


class _ClearedArray(msgspec.Struct, tag="AllBlocksCleared", array_like=True, frozen=True, gc=False):
    medium: str | None = None


class _ArrayBatch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    ts: float
    events: list[_StoredArray | _RemovedArray | _ClearedArray]
    dp_rank: int | None = None


type _Told = _Stored | _Removed | _Cleared
type _Message = _Batch | _ArrayBatch

_ENCODER = msgspec.msgpack.Encoder()
_DECODER = msgspec.msgpack.Decoder(_Batch)
_ARRAY_DECODER = msgspec.msgpack.Decoder(_ArrayBatch)
_INTEGERS = msgspec.msgpack.Decoder(list[int])
_HASHES = msgspec.msgpack.Decoder(list[int | bytes])


class EngineCodec:
    """Batches as payloads of vLLM's and SGLang's event messages.

    Args:
      worker_id: Who the blocks of decoded messages belong to, which the messages do not say.
    """

    name = "engine"
    native = False

    def __init__(self, worker_id: str = "") -> None:
        self._worker_id = worker_id

    def encode(self, batch: KvEventBatch, /) -> bytes:
        """Returns the payload of a batch.

        Raises:
          LayoutError: An event that names a block has no hash.
        """
        events: list[_Told] = []
        hashes = np.ascontiguousarray(batch.sequence_hashes, "<u4").view("<u8")[:, 0]
        for run in runs(batch):
            _say(events, batch, run, hashes[run.start : run.stop])
        seconds = int(batch.timestamps[0]) / 1e9 if len(batch) else 0.0
        return _ENCODER.encode(_Batch(seconds, events, batch.dp_rank))

    @total
    def decode(self, data: bytes, /) -> tuple[KvEventBatch, ...]:
        """Returns the batches of a payload: one, or as many as its blocks have sizes."""
        message: _Message
        try:
            message = _DECODER.decode(data)
        except msgspec.ValidationError as error:
            try:
                message = _ARRAY_DECODER.decode(data)
            except msgspec.ValidationError:
                raise error from None  # what is wrong with the newer form says more
        if not (math.isfinite(message.ts) and 0 <= message.ts < 2**64 / 1e9):
            raise EventDecodeError(f"the time of the message is {message.ts} s; it must be a Unix time")
        dp_rank = message.dp_rank or 0
        if not 0 <= dp_rank < 2**32:
            raise EventDecodeError(f"dp_rank = {dp_rank}: it is a number in [0, 2**32)")
        rows = _Rows(self._worker_id, int(message.ts * 1e9), dp_rank)
        for event in message.events:
            rows.add(event)
        return rows.batches()


def _say(events: list[_Told], batch: KvEventBatch, run: Run, hashes: NDArray[np.uint64]) -> None:
    """Appends the events of a run whose blocks have hashes u64[n]."""
    group = run.group_idx or msgspec.UNSET
    medium = None if run.tier is None else MEDIA[run.tier]
    if run.event_type is EventType.CLEARED:
        events.append(_Cleared() if medium is None else _Cleared(medium))
        return
    if not hashes.all():
        raise LayoutError(f"event {run.start + int(hashes.argmin())} has no hash, by which engines name blocks")
    listed = _integers(hashes, _UINT64)
    if run.stores:
        tokens = batch.token_ids[batch.token_offsets[run.start] : batch.token_offsets[run.stop]]
        parent = int.from_bytes(batch.parent_hashes[run.start, :2].astype("<u4").tobytes(), "little")
        events.append(
            _Stored(
                listed,
                parent or None,
                _integers(tokens, _UINT32),
                batch.block_size,
                None,
                medium,
                run.lora_name,
                group,
            )
        )
    if run.event_type is not EventType.CREATED:
        gone = run.tier if run.from_tier is None else run.from_tier
        events.append(_Removed(listed, None if gone is None else MEDIA[gone], group))


def _integers(values: NDArray[np.unsignedinteger], type_byte: bytes) -> Any:
    """An array as what the encoder takes for a list of integers."""
    count = len(values)
    if count <= _FEW:
        return values.tolist()
    head = b"\xdc" + count.to_bytes(2, "big") if count < 2**16 else b"\xdd" + count.to_bytes(4, "big")
    wide = np.empty(count, _WIDE[type_byte])
    wide["type"] = type_byte[0]
    wide["value"] = values
    return msgspec.Raw(head + wide.tobytes())


_WIDE = {
    _UINT32: np.dtype([("type", "u1"), ("value", ">u4")]),
    _UINT64: np.dtype([("type", "u1"), ("value", ">u8")]),
}


def _read_wide(raw: msgspec.Raw, type_byte: bytes) -> NDArray[Any] | None:
    """The values of an array whose elements are all in the widest form, or None if they are not."""
    data = memoryview(raw)
    first = data[0]
    start = 1 if first & 0xF0 == 0x90 else {0xDC: 3, 0xDD: 5}.get(first, len(data))
    dtype = _WIDE[type_byte]
    if len(data) == start or (len(data) - start) % dtype.itemsize:
        return None
    wide = np.frombuffer(data, dtype, offset=start)
    # An element that begins with this byte ends where the next is looked at, so these are the elements.
    return wide["value"] if (wide["type"] == type_byte[0]).all() else None


def _read_tokens(raw: msgspec.Raw) -> NDArray[np.uint32]:
    wide = _read_wide(raw, _UINT32)
    return np.array(_INTEGERS.decode(raw) if wide is None else wide, np.uint32)


def _read_hashes(raw: msgspec.Raw) -> NDArray[np.uint32]:
    """Hashes u32[n, 4] of the integers or bytes of an event."""
    wide = _read_wide(raw, _UINT64)
    if wide is None:
        values = _HASHES.decode(raw)
        return np.frombuffer(b"".join([_hash_bytes(value) for value in values]), "<u4").reshape(-1, 4)
    words = np.zeros((len(wide), 2), "<u8")
    words[:, 0] = wide
    return words.view("<u4")


def _hash_bytes(value: _Hash) -> bytes:
    if isinstance(value, int):
        return (value & _LOW_64).to_bytes(_HASH_BYTES, "little")
    if not value:
        raise EventDecodeError("a hash of no bytes")
    return value[:_HASH_BYTES].ljust(_HASH_BYTES, b"\0")


def _tier(medium: str | msgspec.UnsetType | None) -> int:
    """A medium's tier; what names none is the device."""
    if not isinstance(medium, str):
        return Tier.G1
    if medium.upper() not in _TIERS:
        raise EventDecodeError(f"medium {medium!r} is none of {', '.join(_TIERS)}")
    return _TIERS[medium.upper()]


class _Rows:
    """Gathers the events of one message as columns."""

    def __init__(self, worker_id: str, timestamp: int, dp_rank: int) -> None:
        self._worker_id = worker_id
        self._timestamp = timestamp
        self._dp_rank = dp_rank
        self._done: list[KvEventBatch] = []
        self._begin()

    def _begin(self) -> None:
        self._block_size = 0
        self._rows: list[tuple[int, int, int, int, int, str | None]] = []  # count, type, tier, group, tokens each, LoRA
        self._hashes: list[NDArray[np.uint32]] = []
        self._parents: list[NDArray[np.uint32]] = []
        self._tokens: list[NDArray[np.uint32]] = []

    def add(self, event: _Stored | _Removed | _Cleared | _StoredArray | _RemovedArray | _ClearedArray) -> None:
        """Adds an event."""
        match event:
            case _Stored() | _StoredArray():
                self._add_stored(event)
            case _Removed() | _RemovedArray():
                hashes = _read_hashes(event.block_hashes)
                self._add(_DELETED, _tier(event.medium), event.group_idx, hashes, np.zeros_like(hashes))
            case _Cleared() | _ClearedArray():
                tier = _tier(event.medium) if isinstance(event.medium, str) else 0
                self._add(_CLEARED, tier, None, _NONE, _NONE)

    def _add_stored(self, event: _Stored | _StoredArray) -> None:
        hashes, tokens = _read_hashes(event.block_hashes), _read_tokens(event.token_ids)
        size, count = event.block_size, len(hashes)
        if not 0 < size < 2**32 or len(tokens) not in {0, count * size}:
            raise EventDecodeError(f"{len(tokens)} tokens for {count} blocks of {size}")
        if self._block_size not in {0, size}:
            self._end()
        self._block_size = size
        parents = np.zeros_like(hashes)
        parents[1:] = hashes[:-1]
        if event.parent_block_hash is not None and count:
            parents[0] = np.frombuffer(_hash_bytes(event.parent_block_hash), "<u4")
        lora = event.lora_name or (None if event.lora_id is None else str(event.lora_id))
        self._tokens.append(tokens)
        self._add(_CREATED, _tier(event.medium), event.group_idx, hashes, parents, size if len(tokens) else 0, lora)

    def _add(
        self,
        code: int,
        tier: int,
        group: int | msgspec.UnsetType | None,
        hashes: NDArray[np.uint32],
        parents: NDArray[np.uint32],
        tokens_each: int = 0,
        lora: str | None = None,
    ) -> None:
        group_idx = group if isinstance(group, int) else 0
        self._rows.append((len(hashes), code, tier, group_idx, tokens_each, lora))
        self._hashes.append(hashes)
        self._parents.append(parents)

    def _end(self) -> None:
        """Makes a batch of what was added since the last."""
        counts = [row[0] for row in self._rows]
        total_count = sum(counts)

        def column[T: np.generic](which: int, dtype: type[T]) -> NDArray[T]:
            return np.repeat(np.array([row[which] for row in self._rows], dtype), counts)

        offsets = np.zeros(total_count + 1, np.int64)
        np.cumsum(column(4, np.int64), out=offsets[1:])
        named = any(row[5] for row in self._rows)
        self._done.append(
            KvEventBatch(
                worker_id=self._worker_id,
                block_size=self._block_size,
                dp_rank=self._dp_rank,
                event_types=column(1, np.uint8),
                event_ids=np.zeros(total_count, np.uint64),
                timestamps=np.full(total_count, self._timestamp, np.uint64),
                block_ids=np.zeros(total_count, np.uint64),
                tiers=column(2, np.uint8),
                group_idx=column(3, np.uint32),
                sequence_hashes=np.concatenate(self._hashes).astype(np.uint32, copy=False),
                parent_hashes=np.concatenate(self._parents).astype(np.uint32, copy=False),
                token_offsets=offsets,
                token_ids=np.concatenate(self._tokens) if self._tokens else np.zeros(0, np.uint32),
                from_tiers=np.zeros(total_count, np.uint8),
                from_block_ids=np.zeros(total_count, np.uint64),
                lora_names=tuple(row[5] for row in self._rows for _ in range(row[0])) if named else (),
            )
        )
        self._begin()

    def batches(self) -> tuple[KvEventBatch, ...]:
        """Returns all batches."""
        if self._rows:
            self._end()
        return tuple(self._done)


_NONE = np.zeros((1, 4), np.uint32)  # a cleared tier is one event, of no block
