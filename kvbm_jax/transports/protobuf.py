"""The native codec in Protocol Buffers, from the published `kv_events.proto` beside this file.

`kv_events.binpb` is that file compiled to a descriptor set, from which the message class is made when the first codec
is; so no generated code ties the library to one version of protobuf.
"""

import functools
import importlib.resources
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import EventDecodeError
from kvbm_jax.events.codec import batch_of, check_count, check_version, fields_of, total
from kvbm_jax.events.columns import from_bytes, from_numbers, to_bytes, to_numbers
from kvbm_jax.events.schema import KvEventBatch
from kvbm_jax.extras import needs

__all__ = ["ProtobufCodec", "proto_source"]


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
        fields = fields_of(batch, to_numbers, to_bytes)
        fields["lora_names"] = [name or "" for name in batch.lora_names]
        fields["to_workers"] = [name or "" for name in batch.to_workers]
        fields["metadata"] = [{"entries": row} for row in fields["metadata"]]
        message = self._message(**fields, event_types=batch.event_types.tolist(), token_ids=batch.token_ids.tolist())
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
        check_count(count := len(found.event_types))

        def column(name: str, dtype: type[np.generic]) -> NDArray[Any]:
            return from_numbers(getattr(found, name), dtype, count)

        def hashes(name: str) -> NDArray[np.uint32]:
            return from_bytes(name, getattr(found, name), np.uint32, count, (4,))

        batch = batch_of(
            found,
            column,
            hashes,
            event_types=column("event_types", np.uint8),
            token_ids=np.array(list(found.token_ids), np.uint32),
            lora_names=tuple(name or None for name in found.lora_names),
            to_workers=tuple(name or None for name in found.to_workers),
            metadata=tuple(dict(row.entries) for row in found.metadata),
        )
        return (batch,)


@functools.cache
def _message_class() -> Any:
    with needs("protobuf", "the protobuf codec"):
        from google.protobuf import descriptor_pb2, descriptor_pool, message_factory  # noqa: PLC0415 (an extra)
    data = (importlib.resources.files(__package__) / "kv_events.binpb").read_bytes()
    pool = descriptor_pool.DescriptorPool()
    for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
        pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("kvbm_jax.v1.KvEventBatch"))
