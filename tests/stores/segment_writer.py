"""The child of the kill tests: puts blocks forever, and logs each key whose put has resolved, synced to the disk.

A log line is the key in hex; the parent kills this process at a length of the log of its choosing.
"""

import os
import sys
import time

import numpy as np

from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload.segments import SegmentBlockStore
from kvbm_jax.protocols import BlockKey, BlockRecord, Outcome

BLOCK_BYTES = 20_000
IDENTITY = CacheIdentity.of(KVLayout(1, 4, 4, 1, 6, "uint8"), model_id="none", hash_algorithm="blake3")
CAPACITY_BYTES = 4 << 20
DELETE_BEHIND = 40  # puts after which a block is deleted again: keeps compaction and deletion at work


def key(number):
    return BlockKey(number.to_bytes(16, "little"))


def record(number):
    return BlockRecord(key(number), None if number == 0 else key(number - 1).sequence_hash, (number, 7))


def block(number, nbytes=BLOCK_BYTES):
    return np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)


def open_store(folder, **changes):
    arguments = {"identity": IDENTITY, "capacity_bytes": CAPACITY_BYTES, "clock": time, "max_segment_blocks": 16}
    return SegmentBlockStore(folder, BLOCK_BYTES, **(arguments | changes))


def main(folder, log_path):
    store = open_store(folder)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    number = max((int.from_bytes(r.key.sequence_hash, "little") + 1 for _, r in store.records()), default=0)
    while True:
        batch = range(number, number + 1 + number % 3)
        number = batch.stop
        future = store.put([record(n) for n in batch], np.stack([block(n) for n in batch]))
        old = [n for n in batch if n % 5]  # every fifth stays, so segments grow sparse
        store.delete([key(n - DELETE_BEHIND) for n in old if n >= DELETE_BEHIND])
        for n, row in zip(batch, future.result(60), strict=True):
            if row.outcome is Outcome.OK:
                os.write(log, f"{key(n).sequence_hash.hex()}\n".encode())
        os.fsync(log)


if __name__ == "__main__":
    main(*sys.argv[1:])
