"""What runs in the other process of the tests of transfers."""

import threading

import numpy as np
import xxhash

from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.protocols import BlockKey, BlockRecord
from kvbm_jax.transfer import PeerServer, Placement, open_engine

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


def identity(model_id="toy", heads=4):
    """Blocks of 2 layers, keys and values, 8 tokens, some heads, 16 float32: 8 KiB a head."""
    layout = KVLayout(2, 1, 8, heads, 16, "float32")
    return CacheIdentity.of(layout, model_id=model_id, hash_algorithm="blake3")


def key(number):
    return BlockKey(number.to_bytes(16, "big"), number % 2)


def content(number, nbytes):
    """The bytes of a block, u8[nbytes]."""
    return np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)


class StorePeer:
    """A worker that serves blocks 0 to count - 1 out of its host store."""

    def __init__(self, kind, count, model_id="toy", longest_lease=60.0, pinned=64, placement=None):
        who = identity(model_id)
        self.placement = placement or Placement.whole(who)
        self.nbytes = self.placement.block_bytes(who)
        self.metrics = InMemoryMetrics()
        self.store = HostBlockStore(self.nbytes, max(count, 1), identity=who, pinned_blocks=pinned)
        self.put(*range(count))
        self.engine = open_engine(kind, "server")
        self.server = PeerServer(
            "server",
            self.store,
            self.engine,
            placement=self.placement,
            longest_lease=longest_lease,
            metrics=self.metrics,
        )

    def record(self):
        return self.server.record

    def put(self, *numbers):
        rows = [content(n, self.nbytes) for n in numbers]
        if rows:
            self.store.put([BlockRecord(key(n), None, ()) for n in numbers], np.stack(rows)).result(30)

    def delete(self, *numbers):
        self.store.delete([key(n) for n in numbers]).result(30)

    def spoil(self, *numbers):
        """Writes other bytes where blocks lie, as a fault would."""
        pins = self.store.pin([key(n) for n in numbers])
        self.store.slots[pins.block_ids, 7] ^= 1
        self.store.unpin(pins.block_ids)

    def measured(self):
        return self.metrics.snapshot()

    def threads(self):
        return threading.active_count()
