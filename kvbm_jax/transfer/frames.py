"""Messages between workers: a frame is eight bytes of head and one msgpack map, nothing that is executed.

    magic "KVT1"   length of the body, u32 little-endian   body

The body is a tagged struct; which are expected is the reader's to say, and so is how long a body may be. Whatever does
not fit is a `FrameError`. Blocks follow a frame as they are, of a length that the frames before have settled.
"""

import struct
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvbm_jax.errors import FrameError, TransferError
from kvbm_jax.protocols import Slots
from kvbm_jax.transfer.streams import Stream

__all__ = [
    "Done",
    "Frames",
    "LONGEST_BODY",
    "Message",
    "ReadSlots",
    "Refused",
    "WriteSlots",
    "ids_from",
    "packed",
]

LONGEST_BODY = 1 << 24
_HEAD = struct.Struct("<4sI")
_MAGIC = b"KVT1"


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="is"):
    """What a body is a message of."""


class Refused(Message, tag="refused", frozen=True):
    """In place of an answer: why there is none."""

    reason: str


class Done(Message, tag="done", frozen=True):
    """It has been done; after `ReadSlots` the bytes follow."""


class ReadSlots(Message, tag="read", frozen=True):
    """Asks for the bytes of slots."""

    slots: Slots
    ids: bytes  # int32[n], little-endian
    notice: bytes


class WriteSlots(Message, tag="write", frozen=True):
    """Asks to take the bytes of slots, which follow."""

    slots: Slots
    ids: bytes
    notice: bytes


MessageT = TypeVar("MessageT", bound=Message)


class Frames:
    """The frames of one connection.

    Args:
      stream: the connection.
      longest: bytes of the longest body that is read.
    """

    def __init__(self, stream: Stream, longest: int = LONGEST_BODY) -> None:
        self.stream = stream
        self._longest = longest
        self._head = bytearray(_HEAD.size)

    def send(self, message: Message, payload: "list[memoryview] | None" = None) -> None:
        """Sends a message, and bytes behind it.

        Raises:
          PeerLostError: The peer is gone.
          TransferError: The message is longer than any may be.
        """
        body = msgspec.msgpack.encode(message)
        if len(body) > LONGEST_BODY:
            raise TransferError(f"a message of {len(body):,} bytes; {LONGEST_BODY:,} is the most: ask for less at once")
        head = _HEAD.pack(_MAGIC, len(body))
        self.stream.send([memoryview(head), memoryview(body), *(payload or ())])

    def receive(self, expected: "msgspec.msgpack.Decoder[MessageT]") -> MessageT:
        """Returns the next message.

        Raises:
          PeerLostError: The peer is gone.
          FrameError: It is no frame, too long, or none of the messages expected.
        """
        self.stream.receive([memoryview(self._head)])
        magic, length = _HEAD.unpack(self._head)
        if magic != _MAGIC:
            raise FrameError(f"a frame begins with {_MAGIC!r}; this one begins with {magic!r}")
        if length > self._longest:
            raise FrameError(f"a body of {length:,} bytes; at most {self._longest:,} are read here")
        body = bytearray(length)
        self.stream.receive([memoryview(body)])
        return decoded(body, expected)

    def ask(self, message: Message, expected: "msgspec.msgpack.Decoder[Any]") -> Any:
        """Sends a message and returns the answer.

        Raises:
          TransferError: The peer refuses.
        """
        self.send(message)
        answer = self.receive(expected)
        if isinstance(answer, Refused):
            raise TransferError(f"the peer refuses: {answer.reason}")
        return answer


def decoded(body: bytes | bytearray, expected: "msgspec.msgpack.Decoder[MessageT]") -> MessageT:
    """Reads a body.

    Raises:
      FrameError: It is none of the messages expected.
    """
    try:
        return expected.decode(body)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise FrameError(f"{len(body):,} bytes are no message that is expected here: {error}") from error


def packed(ids: ArrayLike) -> bytes:
    """Returns ids, i32[n], as messages carry them."""
    return np.asarray(ids, "<i4").tobytes()


def ids_from(data: bytes) -> NDArray[np.int32]:
    """Returns the ids of a message, i32[n].

    Raises:
      FrameError: These are no ids.
    """
    if len(data) % 4:
        raise FrameError(f"{len(data)} bytes are no int32 numbers")
    return np.frombuffer(data, "<i4").astype(np.int32)
