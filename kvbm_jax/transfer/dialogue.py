"""What a worker that pulls says to one that serves, and what it hears.

    Describe                          About: whose blocks, where they lie, how the engine is reached
    Lookup: hashes, groups, time      Leased: which of them are held and where, under which lease
    Release: leases                   (nothing)
    Migrate: a sequence               see `kvbm_jax.transfer.handover`

Arrays travel as bytes, little-endian, one element for each block asked for.
"""

from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import FrameError
from kvbm_jax.layout import LayoutKind
from kvbm_jax.offload.host import Pins
from kvbm_jax.protocols import Slots
from kvbm_jax.transfer.frames import Message, Refused, ids_from, packed
from kvbm_jax.transfer.handover import Migrate

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
    block_ids: bytes  # int32[n]: the slot of each block, the number of slots for a block that is not leased
    checksums: bytes  # uint64[n]: XXH3-64 of the bytes of each that is
    refused: bytes  # int32[r]: places of blocks that are held, and not to be had now

    @classmethod
    def of(cls, lease: int, pins: Pins) -> "Leased":
        """Makes the message."""
        checksums = np.array(pins.checksums, "<u8").tobytes()
        return cls(lease, packed(pins.block_ids), checksums, packed(pins.refused))


class Release(Message, tag="release", frozen=True):
    """Gives leases back; is not answered."""

    leases: list[int]


class Found(NamedTuple):
    """A `Leased` as arrays, of n blocks asked for."""

    held: NDArray[np.bool_]  # bool[n]
    refused: NDArray[np.int32]  # int32[r], places
    block_ids: NDArray[np.int32]  # int32[n], slots of those held
    checksums: list[int]  # n

    @classmethod
    def read(cls, message: Leased, count: int, num_slots: int) -> "Found":
        """Reads a message over `count` blocks of a peer with so many slots.

        Raises:
          FrameError: It is of other blocks, or names other slots.
        """
        block_ids, refused = ids_from(message.block_ids), ids_from(message.refused)
        if len(block_ids) != count or len(message.checksums) != 8 * count:
            raise FrameError(f"a lease of {count:,} blocks has {len(block_ids):,} slots")
        for what, ids, most in (("slots", block_ids, num_slots), ("places", refused, count - 1)):
            if len(ids) and not (ids.min() >= 0 and ids.max() <= most):
                raise FrameError(f"{what} {ids.min()} to {ids.max()} are leased; {most} is the last")
        checksums: list[int] = np.frombuffer(message.checksums, "<u8").tolist()
        return cls(block_ids < num_slots, refused, block_ids, checksums)


request_decoder = msgspec.msgpack.Decoder(Describe | Lookup | Release | Migrate)
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
