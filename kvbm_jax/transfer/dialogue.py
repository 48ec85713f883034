"""What a worker that pulls says to one that serves, and what it hears.

    Describe                          About: whose blocks, where they lie, how the engine is reached
    Lookup: hashes, groups, time      Leased: which of them are held and where, under which lease
    Release: the lease                (nothing)

Arrays travel as bytes, little-endian, one element for each block asked for.
"""

from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import FrameError
from kvbm_jax.layout import LayoutKind
from kvbm_jax.protocols import Outcome, Slots
from kvbm_jax.transfer.frames import Message, Refused

__all__ = [
    "About",
    "Describe",
    "Found",
    "Leased",
    "Lookup",
    "Release",
    "about_decoder",
    "keys_of",
    "leased_decoder",
    "request_decoder",
]

HASH_BYTES = 16
_CODES = (Outcome.OK, Outcome.MISS, Outcome.REFUSED)


class Describe(Message, tag="describe", frozen=True):
    """Asks who serves here."""


class About(Message, tag="about", frozen=True):
    """Who serves here."""

    worker_id: str
    identity: str  # `CacheIdentity.canonical_json`
    num_heads: int  # of the placement, as the next two
    first_head: int
    kind: LayoutKind
    slots: Slots
    engine: str  # its kind
    description: bytes  # of the engine


class Lookup(Message, tag="lookup", frozen=True):
    """Asks for a lease on blocks."""

    hashes: bytes  # 16 each
    groups: bytes  # uint32[n]
    seconds: float


class Leased(Message, tag="leased", frozen=True):
    """What is held, and pinned for as long as was asked."""

    lease: int
    outcomes: bytes  # uint8[n]: 0 held, 1 not held, 2 held, but not to be had now
    block_ids: bytes  # int32[n]: the slot of each that is held
    checksums: bytes  # uint64[n]: XXH3-64 of its bytes

    @classmethod
    def of(cls, lease: int, outcomes: list[Outcome], block_ids: list[int], checksums: list[int]) -> "Leased":
        """Makes the message."""
        codes = bytes(map(_CODES.index, outcomes))
        slots = np.array(block_ids, "<i4").tobytes()
        return cls(lease, codes, slots, np.array(checksums, "<u8").tobytes())


class Release(Message, tag="release", frozen=True):
    """Gives a lease back; is not answered."""

    lease: int


class Found(NamedTuple):
    """A `Leased` as arrays, of n blocks asked for."""

    held: NDArray[np.bool_]  # bool[n]
    refused: NDArray[np.bool_]  # bool[n]
    block_ids: NDArray[np.int32]  # int32[n]
    checksums: list[int]  # n

    @classmethod
    def read(cls, message: Leased, count: int) -> "Found":
        """Reads a message over `count` blocks.

        Raises:
          FrameError: It is of other blocks.
        """
        sizes = len(message.outcomes), len(message.block_ids) // 4, len(message.checksums) // 8
        if sizes != (count, count, count) or len(message.block_ids) % 4 or len(message.checksums) % 8:
            raise FrameError(f"a lease of {count:,} blocks has {sizes[0]:,} outcomes, {sizes[1]:,} slots")
        codes = np.frombuffer(message.outcomes, np.uint8)
        if count and codes.max() >= len(_CODES):
            raise FrameError(f"outcome {codes.max()} is unknown; known are 0 to {len(_CODES) - 1}")
        return cls(
            codes == _CODES.index(Outcome.OK),
            codes == _CODES.index(Outcome.REFUSED),
            np.frombuffer(message.block_ids, "<i4").astype(np.int32),
            np.frombuffer(message.checksums, "<u8").tolist(),
        )


request_decoder = msgspec.msgpack.Decoder(Describe | Lookup | Release)
about_decoder = msgspec.msgpack.Decoder(About | Refused)
leased_decoder = msgspec.msgpack.Decoder(Leased | Refused)


def keys_of(lookup: Lookup) -> list[tuple[bytes, int]]:
    """Returns the keys of a lookup.

    Raises:
      FrameError: There is not a group for each hash.
    """
    hashes, groups = lookup.hashes, lookup.groups
    if len(hashes) % HASH_BYTES or len(groups) * HASH_BYTES != 4 * len(hashes):
        raise FrameError(
            f"{len(hashes):,} bytes of hashes and {len(groups):,} of groups; they are 16 and 4 for a block"
        )
    starts = range(0, len(hashes), HASH_BYTES)
    numbers = np.frombuffer(groups, "<u4").tolist()
    return [(hashes[start : start + HASH_BYTES], number) for start, number in zip(starts, numbers, strict=True)]
