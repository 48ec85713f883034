"""What a segment says of itself: its identity, and of each block everything but the bytes.

The record is one leaf of the segment's checkpoint, and all that is read to rebuild the index. It is not trusted because
the file system handed it over: it carries a checksum of its own.

    "KVBMSEG1" | XXH3_64 of the body, 8 bytes LE | body: MessagePack of `SegmentRecord`

Block number i of the record is the leaf `block_name(i)`. This module knows bytes, no files.
"""

from typing import Self

import msgspec
import xxhash

from kvbm_jax.errors import ConfigError, UnreadableSegmentError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.protocols import BlockKey, BlockRecord

__all__ = ["RECORD_NAME", "SegmentRecord", "StoredBlock", "block_name", "decode", "encode"]

RECORD_NAME = "record"
_MAGIC = b"KVBMSEG1"
_CHECKSUM_BYTES = 8
_BODY = len(_MAGIC) + _CHECKSUM_BYTES


class StoredBlock(msgspec.Struct, frozen=True, array_like=True):
    """One block of a segment."""

    sequence_hash: bytes
    group_idx: int
    parent_hash: bytes | None
    token_ids: tuple[int, ...]
    lora_name: str | None
    block_id: int  # counts puts of the store, so it tells the order of blocks across segments
    checksum: int  # XXH3_64 of the bytes

    @classmethod
    def of(cls, record: BlockRecord, *, block_id: int, checksum: int) -> Self:
        """Returns what is stored of a block."""
        key = record.key
        return cls(
            key.sequence_hash, key.group_idx, record.parent_hash, record.token_ids, record.lora_name, block_id, checksum
        )

    @property
    def key(self) -> BlockKey:
        """The block's key."""
        return BlockKey(self.sequence_hash, self.group_idx)

    @property
    def record(self) -> BlockRecord:
        """What was put beside the block's bytes."""
        return BlockRecord(self.key, self.parent_hash, self.token_ids, self.lora_name)


class SegmentRecord(msgspec.Struct, frozen=True):
    """A segment without its blocks' bytes."""

    sequence: int  # segments of a folder are numbered in the order of their writing
    created_ns: int  # since the Unix epoch
    identity: str  # canonical JSON of the `CacheIdentity`
    block_bytes: int
    blocks: tuple[StoredBlock, ...]

    def cache_identity(self) -> CacheIdentity:
        """Returns whose blocks these are.

        Raises:
          UnreadableSegmentError: The identity is none that this library knows.
        """
        try:
            return CacheIdentity.from_json(self.identity)
        except ConfigError as error:
            raise UnreadableSegmentError(str(error)) from error


def block_name(row: int) -> str:
    """Returns the name of the leaf that holds a block's bytes."""
    return f"block_{row:06d}"


def encode(record: SegmentRecord) -> bytes:
    """Returns the bytes of a record."""
    body = msgspec.msgpack.encode(record)
    return _MAGIC + xxhash.xxh3_64_intdigest(body).to_bytes(_CHECKSUM_BYTES, "little") + body


def decode(data: bytes) -> SegmentRecord:
    """Reads a record back.

    Raises:
      UnreadableSegmentError: The bytes are no record, or not the ones that were written.
    """
    if not data.startswith(_MAGIC):
        raise UnreadableSegmentError(f"the record begins with {data[: len(_MAGIC)]!r}, not {_MAGIC!r}")
    stored = int.from_bytes(data[len(_MAGIC) : _BODY], "little")
    found = xxhash.xxh3_64_intdigest(data[_BODY:])
    if found != stored:
        raise UnreadableSegmentError(f"the record's checksum is {found:016x}, stored with it is {stored:016x}")
    try:
        return msgspec.msgpack.decode(data[_BODY:], type=SegmentRecord)
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise UnreadableSegmentError(f"the record: {error}") from error
