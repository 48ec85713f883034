"""The native codec in Protocol Buffers, from the published `kv_events.proto` beside this file.

`kv_events.binpb` is that file compiled to a descriptor set, from which the message class is made when the first codec
is; so no generated code ties the library to one version of protobuf.
"""

import functools
import importlib.resources
from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import EventDecodeError, MissingDependencyError
from kvbm_jax.events.codec import check_codes, check_version, total
from kvbm_jax.events.schema import KvEventBatch

__all__ = ["ProtobufCodec", "proto_source"]

_HASH_BYTES = 16


def proto_source() -> str:
    """Returns the text of the `.proto` file, for programs in other languages."""
    return (importlib.resources.files(__package__) / "kv_events.proto").read_text()


class ProtobufCodec:
    """Batches as `kvbm_jax.v1.KvEventBatch` messages.

    Raises:
      MissingDependencyError: protobuf is not installed.
    """

    name = "protobuf"
    native = True

    def __init__(self) -> None:
        self._message = _message_class()

    def encode(self, batch: KvEventBatch, /) -> bytes:
        """Returns the message of a batch."""
        counts = batch.token_offsets[1:] - batch.token_offsets[:-1]
        message = self._message(
            schema_version=batch.schema_version,
            worker_id=batch.worker_id,
            block_size=batch.block_size,
            dp_rank=batch.dp_rank,
            event_types=batch.event_types.tolist(),
            event_ids=_numbers(batch.event_ids),
            timestamps=_numbers(batch.timestamps),
            block_ids=_numbers(batch.block_ids),
            tiers=_numbers(batch.tiers),
            group_idx=_numbers(batch.group_idx),
            sequence_hashes=_hash_bytes(batch.sequence_hashes),
            parent_hashes=_hash_bytes(batch.parent_hashes),
            token_counts=_numbers(counts),
            token_ids=batch.token_ids.tolist(),
            from_tiers=_numbers(batch.from_tiers),
            from_block_ids=_numbers(batch.from_block_ids),
            lora_names=[name or "" for name in batch.lora_names],
            to_workers=[name or "" for name in batch.to_workers],
            metadata=[{"entries": dict(row)} for row in batch.metadata],
        )
        data: bytes = message.SerializeToString(deterministic=True)
        return data

    @total
    def decode(self, data: bytes, /, first_event_id: int = 0) -> tuple[KvEventBatch, ...]:
        """Returns the batch of a message."""
        from google.protobuf.message import DecodeError  # noqa: PLC0415 (an extra)

        try:
            found = self._message.FromString(data)
        except DecodeError as error:
            raise EventDecodeError(f"{len(data):,} bytes are no protobuf message of events: {error}") from error
        check_version(found.schema_version)
        count = len(found.event_types)
        batch = KvEventBatch(
            worker_id=found.worker_id,
            block_size=found.block_size,
            dp_rank=found.dp_rank,
            event_types=_column(found.event_types, np.uint8, count),
            event_ids=_column(found.event_ids, np.uint64, count),
            timestamps=_column(found.timestamps, np.uint64, count),
            block_ids=_column(found.block_ids, np.uint64, count),
            tiers=_column(found.tiers, np.uint8, count),
            group_idx=_column(found.group_idx, np.uint32, count),
            sequence_hashes=_hashes("sequence_hashes", found.sequence_hashes, count),
            parent_hashes=_hashes("parent_hashes", found.parent_hashes, count),
            token_offsets=_offsets(_column(found.token_counts, np.uint32, count)),
            token_ids=np.array(list(found.token_ids), np.uint32),
            from_tiers=_column(found.from_tiers, np.uint8, count),
            from_block_ids=_column(found.from_block_ids, np.uint64, count),
            lora_names=tuple(name or None for name in found.lora_names),
            to_workers=tuple(name or None for name in found.to_workers),
            metadata=tuple(dict(row.entries) for row in found.metadata),
            schema_version=found.schema_version,
        )
        return (check_codes(batch),)


@functools.cache
def _message_class() -> Any:
    try:
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise MissingDependencyError("the protobuf codec needs protobuf: pip install kvbm-jax[protobuf]") from error
    data = (importlib.resources.files(__package__) / "kv_events.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("kvbm_jax.v1.KvEventBatch"))


def _numbers(column: NDArray[Any]) -> list[int]:
    """The numbers of a column, or none if all are zero."""
    numbers: list[int] = column.tolist() if column.any() else []
    return numbers


def _column[T: np.generic](values: Iterable[int], dtype: type[T], count: int) -> NDArray[T]:
    return np.array(
        list(values) or [0] * count, dtype
    )  # a list: NumPy would take the container and wrap what is too big


def _offsets(counts: NDArray[np.uint32]) -> NDArray[np.int64]:
    offsets = np.zeros(len(counts) + 1, np.int64)
    np.cumsum(counts, out=offsets[1:])
    return offsets


def _hash_bytes(hashes: NDArray[np.uint32]) -> bytes:
    return hashes.astype("<u4", copy=False).tobytes() if hashes.any() else b""


def _hashes(name: str, data: bytes, count: int) -> NDArray[np.uint32]:
    """Hashes u32[E, 4] of their bytes."""
    if data and len(data) != count * _HASH_BYTES:
        raise EventDecodeError(f"{name} has {len(data)} bytes; {count} events have {count * _HASH_BYTES}")
    return np.frombuffer(data or bytes(count * _HASH_BYTES), "<u4").astype(np.uint32, copy=False).reshape(-1, 4)
