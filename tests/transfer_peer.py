"""What runs in the other process of the tests of transfers."""

import numpy as np
import xxhash

from kvbm_jax.transfer import open_engine

COUNT, NBYTES, STRIDE = 64, 5000, 8192


def pattern(seed, count=COUNT, nbytes=NBYTES):
    """The bytes of a peer's slots."""
    return np.random.default_rng(seed).integers(0, 256, (count, nbytes), np.uint8)


def arena(count=COUNT, nbytes=NBYTES, stride=STRIDE):
    """Slots with padding between them, u8[count, nbytes]."""
    return np.zeros((count, stride), np.uint8)[:, :nbytes]


def digests(slots):
    return [xxhash.xxh3_64_hexdigest(np.ascontiguousarray(row)) for row in slots]


class EnginePeer:
    """An engine and one arena."""

    def __init__(self, kind, count=COUNT, nbytes=NBYTES, stride=STRIDE):
        self.engine = open_engine(kind, "peer")
        self.memory = arena(count, nbytes, stride)
        self.slots = self.engine.register(self.memory)

    def about(self):
        return self.engine.description(), self.slots

    def fill(self, seed):
        self.memory[:] = pattern(seed, *self.memory.shape)

    def digests(self):
        return digests(self.memory)

    def notices(self):
        return [notice for _, notice in self.engine.notices()]
