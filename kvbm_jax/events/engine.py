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

from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import EventDecodeError, LayoutError
from kvbm_jax.events.codec import MAX_MESSAGE_EVENTS, check_count, total
from kvbm_jax.events.columns import hash_rows, offsets_of
from kvbm_jax.events.runs import Run, runs
from kvbm_jax.events.schema import EventType, KvEventBatch, Shared
from kvbm_jax.protocols import Tier

__all__ = ["MEDIA", "EngineCodec"]

MEDIA = {Tier.G1: "GPU", Tier.G2: "CPU", Tier.G3: "STORAGE", Tier.G4: "EXTERNAL"}
_MEDIUM_OF = (None, *MEDIA.values())  # by a tier's number
_TIERS = {
    **{medium: int(tier) for tier, medium in MEDIA.items()},
    "CPU_PINNED": Tier.G2,
    "CPU_TIER1": Tier.G2,
    "CPU_TIER2": Tier.G3,
    "DISK": Tier.G3,
    "FS": Tier.G3,
    "OBJ": Tier.G4,
}
_NAMELESS = "event {} has no hash, by which engines name blocks"
_CREATED, _DELETED, _CLEARED = EventType.CREATED.code, EventType.DELETED.code, EventType.CLEARED.code
_HASH_BYTES = 16
_NO_HASH = bytes(_HASH_BYTES)
_LOW_64 = 2**64 - 1
_UINT32, _UINT64 = b"\xce", b"\xcf"  # MessagePack's type bytes
_FEW = 8  # hashes, and below tokens, up to which lists are faster than arrays
_FEW_TOKENS = 64
_SHORT = 100  # bytes of an array up to which the same holds for reading
_SHORT_MESSAGE = 512  # bytes

type _Hash = int | bytes
type _Hashes = list[_Hash] | msgspec.Raw  # as they are, or unread
type _Tokens = list[int] | msgspec.Raw
type _Few[T] = Annotated[list[T], msgspec.Meta(max_length=MAX_MESSAGE_EVENTS)]


class _OfGroup(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """By keyword alone, the group is the last field of whatever is derived from this."""

    group_idx: int | msgspec.UnsetType | None = msgspec.UNSET


class _Stored[H: _Hashes, T: _Tokens](_OfGroup, tag_field="type", tag="BlockStored", frozen=True, gc=False):
    block_hashes: H
    parent_block_hash: _Hash | None
    token_ids: T
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None


class _Removed[H: _Hashes](_OfGroup, tag_field="type", tag="BlockRemoved", frozen=True, gc=False):
    block_hashes: H
    medium: str | None = None


class _Cleared(msgspec.Struct, tag_field="type", tag="AllBlocksCleared", frozen=True, gc=False):
    medium: str | msgspec.UnsetType | None = msgspec.UNSET


class _Batch[H: _Hashes, T: _Tokens](msgspec.Struct, array_like=True, frozen=True, gc=False):
    ts: float
    events: _Few[_Stored[H, T] | _Removed[H] | _Cleared]
    dp_rank: int | None = None


class _StoredArray(_Stored[msgspec.Raw, msgspec.Raw], tag="BlockStored", array_like=True, frozen=True, gc=False):
    """The older form."""

    extra_keys: Any = None


class _RemovedArray(_Removed[msgspec.Raw], tag="BlockRemoved", array_like=True, frozen=True, gc=False):
    """The older form."""


class _ClearedArray(_Cleared, tag="AllBlocksCleared", array_like=True, frozen=True, gc=False):
    """The older form."""


class _ArrayBatch(msgspec.Struct, array_like=True, frozen=True, gc=False):
    ts: float
    events: _Few[_StoredArray | _RemovedArray | _ClearedArray]
    dp_rank: int | None = None


type _Told = _Stored[Any, Any] | _Removed[Any] | _Cleared
type _Message = _Batch[Any, Any] | _ArrayBatch

_ENCODER = msgspec.msgpack.Encoder()
_TokenList = list[Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)]]
_DECODER = msgspec.msgpack.Decoder(_Batch[msgspec.Raw, msgspec.Raw])
_SHORT_DECODER = msgspec.msgpack.Decoder(_Batch[list[int | bytes], _TokenList])
_ARRAY_DECODER = msgspec.msgpack.Decoder(_ArrayBatch)
_TOKENS = msgspec.msgpack.Decoder(_TokenList)
_HASHES = msgspec.msgpack.Decoder(_Few[int | bytes])


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
        shared = batch.shared
        if shared is not None and shared.event_type is EventType.CREATED and shared.num_events == 1:
            return _ENCODER.encode(_Batch(shared.timestamp / 1e9, [_one_block(shared)], shared.dp_rank))
        events: list[_Told] = []
        for run in runs(batch):
            _say(events, batch, run)
        timestamp = int(batch.timestamps[0]) if len(batch) else 0
        return _ENCODER.encode(_Batch(timestamp / 1e9, events, batch.dp_rank))

    @total
    def decode(self, data: bytes, /, first_event_id: int = 0) -> tuple[KvEventBatch, ...]:
        """Returns the batches of a payload: one, or as many as its blocks have sizes."""
        message: _Message
        try:
            message = (_SHORT_DECODER if len(data) <= _SHORT_MESSAGE else _DECODER).decode(data)
        except msgspec.ValidationError as error:
            try:
                message = _ARRAY_DECODER.decode(data)
            except msgspec.ValidationError:
                raise error from None  # what is wrong with the newer form says more
        if not 0 <= message.ts < 2**64 / 1e9:
            raise EventDecodeError(f"the time of the message is {message.ts} s; it must be a Unix time")
        dp_rank = message.dp_rank or 0
        if not 0 <= dp_rank < 2**32:
            raise EventDecodeError(f"dp_rank = {dp_rank}: it is a number in [0, 2**32)")
        timestamp = int(message.ts * 1e9)
        if len(message.events) == 1 and isinstance(message.events[0], _Stored):
            batch = _one_stored(message.events[0], self._worker_id, timestamp, dp_rank, first_event_id)
            return () if batch is None else (batch,)
        rows = _Rows(self._worker_id, timestamp, dp_rank, first_event_id)
        for event in message.events:
            rows.add(event)
        return rows.batches()


def _one_block(shared: Shared) -> _Stored[Any, Any]:
    """The event of a batch of one block, the shortest way."""
    block = _first_64(shared.sequence_hashes)
    if not block:
        raise LayoutError(_NAMELESS.format(0))
    return _Stored(
        [block],
        _first_64(shared.parent_hashes) or None,
        _integers(shared.token_ids),
        shared.block_size,
        None,
        _MEDIUM_OF[shared.tier],
        shared.lora_name,
        group_idx=shared.group_idx or msgspec.UNSET,
    )


def _say(events: list[_Told], batch: KvEventBatch, run: Run) -> None:
    """Appends the events of a run."""
    group = run.group_idx or msgspec.UNSET
    medium = None if run.tier is None else MEDIA[run.tier]
    if run.event_type is EventType.CLEARED:
        events.append(_Cleared() if medium is None else _Cleared(medium))
        return
    hashes = np.ascontiguousarray(batch.sequence_hashes[run.start : run.stop], "<u4").view("<u8")[:, 0]
    if np.count_nonzero(hashes) < len(hashes):
        raise LayoutError(_NAMELESS.format(run.start + int(hashes.argmin())))
    listed: Any = hashes.tolist() if len(hashes) <= _FEW else _wide(hashes, _UINT64)
    if run.stores:
        if batch.shared is not None:
            each = batch.shared.tokens_each
            tokens = batch.token_ids[run.start * each : run.stop * each]
        else:
            tokens = batch.token_ids[batch.token_offsets[run.start] : batch.token_offsets[run.stop]]
        parent = _first_64(batch.parent_hashes[run.start]) or None
        events.append(
            _Stored(listed, parent, _integers(tokens), batch.block_size, None, medium, run.lora_name, group_idx=group)
        )
    if run.event_type is not EventType.CREATED:
        gone = run.tier if run.from_tier is None else run.from_tier
        events.append(_Removed(listed, None if gone is None else MEDIA[gone], group_idx=group))


def _first_64(hashes: NDArray[np.uint32] | bytes | None) -> int:
    """The first 64 bits of the first of some hashes; 0 for none."""
    if hashes is None:
        return 0
    if isinstance(hashes, bytes):
        return int.from_bytes(hashes[:8], "little")
    return hashes.item(0) | hashes.item(1) << 32


def _integers(tokens: NDArray[np.uint32] | list[int]) -> Any:
    """Tokens as what the encoder takes for a list of integers."""
    if isinstance(tokens, list):
        return tokens
    return tokens.tolist() if len(tokens) <= _FEW_TOKENS else _wide(tokens, _UINT32)


def _wide(values: NDArray[np.unsignedinteger], type_byte: bytes) -> msgspec.Raw:
    """An array of integers, each in its widest form."""
    count = len(values)
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


def _read_tokens(raw: _Tokens) -> NDArray[np.uint32] | list[int]:
    """Tokens of an event: a list if they are few."""
    if isinstance(raw, list):
        return raw
    if len(memoryview(raw)) > _SHORT and (wide := _read_wide(raw, _UINT32)) is not None:
        return wide.astype(np.uint32)
    values = _TOKENS.decode(raw)
    return values if len(values) <= _FEW_TOKENS else np.array(values, np.uint32)


def _read_hashes(raw: _Hashes) -> bytes:
    """Hashes of the integers or bytes of an event, 16 bytes each."""
    if isinstance(raw, list):
        return _hash_bytes(raw[0]) if len(raw) == 1 else b"".join(map(_hash_bytes, raw))
    if len(memoryview(raw)) > _SHORT and (wide := _read_wide(raw, _UINT64)) is not None:
        words = np.zeros((len(wide), 2), "<u8")
        words[:, 0] = wide
        return words.tobytes()
    return b"".join([_hash_bytes(value) for value in _HASHES.decode(raw)])


def _hash_bytes(value: _Hash) -> bytes:
    if isinstance(value, int):
        return (value & _LOW_64).to_bytes(_HASH_BYTES, "little")
    if not value:
        raise EventDecodeError("a hash of no bytes")
    return value[:_HASH_BYTES].ljust(_HASH_BYTES, b"\0")


def _tier(medium: str | msgspec.UnsetType | None) -> int:
    """A medium's tier; what names none is the device."""
    if medium in _TIERS:
        return _TIERS[medium]
    if not isinstance(medium, str):
        return 1
    if medium.upper() not in _TIERS:
        raise EventDecodeError(f"medium {medium!r:.50} is none of {', '.join(_TIERS)}")
    return _TIERS[medium.upper()]


def _read_stored(event: _Stored[Any, Any]) -> tuple[int, bytes, bytes, int, NDArray[np.uint32] | list[int]]:
    """Returns what a BlockStored says: how many blocks, hashes, parents, tokens of each, and all tokens."""
    hashes, tokens = _read_hashes(event.block_hashes), _read_tokens(event.token_ids)
    size, count = event.block_size, len(hashes) // _HASH_BYTES
    if not 0 < size < 2**32 or (tokens_given := len(tokens)) not in {0, count * size}:
        raise EventDecodeError(f"{len(tokens)} tokens for {count} blocks of {size}")
    parent = _NO_HASH if event.parent_block_hash is None else _hash_bytes(event.parent_block_hash)
    parents = parent if count == 1 else (parent + hashes)[: len(hashes)]
    return count, hashes, parents, size if tokens_given else 0, tokens


def _lora_name(event: _Stored[Any, Any]) -> str | None:
    return event.lora_name or (None if event.lora_id is None else str(event.lora_id))


def _one_stored(
    event: _Stored[Any, Any], worker_id: str, timestamp: int, dp_rank: int, first_event_id: int
) -> KvEventBatch | None:
    """The batch of a message of one BlockStored, the most usual; None if it stores nothing."""
    count, hashes, parents, each, tokens = _read_stored(event)
    group_idx = event.group_idx if isinstance(event.group_idx, int) else 0
    if not 0 <= group_idx < 2**32:
        raise EventDecodeError(f"group_idx = {group_idx}: out of bounds of 32 bits")
    if not count:
        return None
    check_count(count)
    if not 0 <= first_event_id <= 2**64 - count:
        raise EventDecodeError(f"ids of {count} events from {first_event_id} on are more than 64 bits can count")
    return KvEventBatch.of_shared(
        Shared(
            EventType.CREATED,
            first_event_id,
            timestamp,
            _tier(event.medium),
            group_idx,
            0,
            worker_id,
            event.block_size,
            dp_rank,
            None,
            hashes,
            parents,
            each,
            tokens,
            _lora_name(event),
            count,
        )
    )


class _Rows:
    """Gathers the events of one message as columns."""

    def __init__(self, worker_id: str, timestamp: int, dp_rank: int, first_event_id: int) -> None:
        self._worker_id = worker_id
        self._next_event_id = first_event_id
        self._timestamp = timestamp
        self._dp_rank = dp_rank
        self._done: list[KvEventBatch] = []
        self._num_events = 0
        self._begin()

    def _begin(self) -> None:
        self._block_size = 0
        self._rows: list[tuple[int, int, int, int, int, str | None]] = []  # count, type, tier, group, tokens each, LoRA
        self._hashes: list[bytes] = []
        self._parents: list[bytes] = []
        self._tokens: list[NDArray[np.uint32]] = []

    def add(self, event: _Told) -> None:
        """Adds an event."""
        match event:
            case _Stored():
                self._add_stored(event)
            case _Removed():
                hashes = _read_hashes(event.block_hashes)
                self._add(_DELETED, _tier(event.medium), event.group_idx, hashes, bytes(len(hashes)))
            case _Cleared():
                tier = _tier(event.medium) if isinstance(event.medium, str) else 0
                self._add(_CLEARED, tier, None, _NO_HASH, _NO_HASH)  # one event, of no block

    def _add_stored(self, event: _Stored[Any, Any]) -> None:
        _, hashes, parents, each, tokens = _read_stored(event)
        if self._block_size not in {0, event.block_size}:
            self._end()
        self._block_size = event.block_size
        self._tokens.append(np.asarray(tokens, np.uint32))
        self._add(_CREATED, _tier(event.medium), event.group_idx, hashes, parents, each, _lora_name(event))

    def _add(
        self,
        code: int,
        tier: int,
        group: int | msgspec.UnsetType | None,
        hashes: bytes,
        parents: bytes,
        tokens_each: int = 0,
        lora: str | None = None,
    ) -> None:
        group_idx = group if isinstance(group, int) else 0
        count = len(hashes) // _HASH_BYTES
        self._num_events += count
        check_count(self._num_events)
        self._rows.append((count, code, tier, group_idx, tokens_each, lora))
        self._hashes.append(hashes)
        self._parents.append(parents)

    def _end(self) -> None:
        """Makes a batch of what was added since the last."""
        counts = [row[0] for row in self._rows]
        total_count = sum(counts)

        def column[T: np.generic](which: int, dtype: type[T]) -> NDArray[T]:
            return np.repeat(np.array([row[which] for row in self._rows], dtype), counts)

        named = any(row[5] for row in self._rows)
        self._done.append(
            KvEventBatch(
                worker_id=self._worker_id,
                block_size=self._block_size,
                dp_rank=self._dp_rank,
                event_types=column(1, np.uint8),
                event_ids=np.arange(self._next_event_id, self._next_event_id + total_count, dtype=np.uint64),
                timestamps=np.full(total_count, self._timestamp, np.uint64),
                block_ids=np.zeros(total_count, np.uint64),
                tiers=column(2, np.uint8),
                group_idx=column(3, np.uint32),
                sequence_hashes=hash_rows(b"".join(self._hashes)),
                parent_hashes=hash_rows(b"".join(self._parents)),
                token_offsets=offsets_of(column(4, np.int64)),
                token_ids=np.concatenate(self._tokens) if self._tokens else np.zeros(0, np.uint32),
                from_tiers=np.zeros(total_count, np.uint8),
                from_block_ids=np.zeros(total_count, np.uint64),
                lora_names=tuple(row[5] for row in self._rows for _ in range(row[0])) if named else (),
            )
        )
        self._next_event_id += total_count
        self._begin()

    def batches(self) -> tuple[KvEventBatch, ...]:
        """Returns all batches."""
        if self._rows:
            self._end()
        return tuple(self._done)
