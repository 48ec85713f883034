"""A part of each kind, as another package would bring it: each as small as it can be."""

import mmap
from concurrent.futures import Future

import numpy as np

from kvbm_jax import policies
from kvbm_jax.protocols import Outcome, StoreRow, StoreStats, Tier

SINKS, ALLOCATORS = [], []


def newest_first():
    """Evicts what was registered last."""
    return policies.scored(lambda block: block.age)


class CountedAllocator:
    """Memory of the system's, counted."""

    def __init__(self):
        self.held = 0
        ALLOCATORS.append(self)

    def allocate(self, nbytes):
        self.held += nbytes
        return np.frombuffer(mmap.mmap(-1, nbytes), np.uint8)

    def release(self, memory):
        self.held -= memory.nbytes


class Lacking:
    """No allocator."""


class HeadsOnly:
    """Offers the first block of each sequence, and none that follows."""

    def select(self, records):
        return [record.parent_hash is None for record in records]


class Failing:
    """Breaks when it is asked."""

    def select(self, records):
        raise OSError("no such table")


def unmade():
    raise OSError("no such file")


class ListSink:
    """Keeps events in a list."""

    def __init__(self, worker_id, url, metrics):
        self.worker_id, self.url, self.batches, self.closed = worker_id, url, [], False
        SINKS.append(self)

    def publish(self, batch):
        self.batches.append(batch)

    def close(self):
        self.closed = True


def open_shelf(config, identity, block_bytes):
    """A disk tier that is a dictionary."""
    return Shelf(block_bytes, identity, config.disk_bytes // block_bytes)


def done(rows):
    future = Future()
    future.set_result(tuple(rows))
    return future


class Shelf:
    """Blocks in a dictionary, as tier G3."""

    tier = Tier.G3

    def __init__(self, block_bytes, identity, capacity):
        self.block_bytes, self.identity, self.capacity = block_bytes, identity, capacity
        self.held, self.next_id = {}, 0

    def put(self, records, blocks):
        rows = []
        for record, block in zip(records, blocks, strict=True):
            known = record.key in self.held
            if not known:
                self.held[record.key] = self.next_id, record, np.array(block)
                self.next_id += 1
            rows.append(StoreRow(Outcome.PRESENT if known else Outcome.OK, self.held[record.key][0]))
        return done(rows)

    def get(self, keys, out):
        rows = []
        for key, row in zip(keys, out, strict=True):
            if key in self.held:
                block_id, record, row[:] = self.held[key]
                rows.append(StoreRow(Outcome.OK, block_id, record))
            else:
                rows.append(StoreRow(Outcome.MISS))
        return done(rows)

    def delete(self, keys):
        found = [self.held.pop(key, None) for key in keys]
        return done(StoreRow(Outcome.MISS) if block is None else StoreRow(Outcome.OK, block[0]) for block in found)

    def contains(self, keys):
        return tuple(key in self.held for key in keys)

    def records(self):
        return iter([(block_id, record) for block_id, record, _ in self.held.values()])

    def stats(self):
        return StoreStats(blocks=len(self.held), capacity=self.capacity, pending=0)

    def close(self):
        pass
