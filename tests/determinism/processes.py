"""One of two processes that serve the same requests, each with tiers of its own: the second's disk is slow, and fails.

What a process finds in its tiers it brings up; how much of it both use, process 0 decides.
"""

import hashlib
import json
import sys
import time
from concurrent.futures import Future

import jax
import numpy as np
import synthetic
import tiered

from kvbm_jax.agreement import agree_by_process_zero
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.offload import MemoryBlockStore
from kvbm_jax.protocols import Outcome, Tier

REQUESTS, BLOCKS = 150, 24


class Disk(MemoryBlockStore):
    """A store that takes a time of its own for each get, and fails now and then."""

    def __init__(self, *args, process, **options):
        super().__init__(*args, **options)
        self._rng = np.random.default_rng(process)
        self._rate = 0.3 * process
        self.failures = 0

    def get(self, keys, out):
        time.sleep(self._rng.random() * 0.004)  # the disk's slowness itself; nothing waits by it
        future = super().get(keys, out)
        if self._rng.random() >= self._rate:
            return future
        self.failures += 1
        *rows, last = future.result()
        short: Future = Future()
        short.set_result((*rows, last._replace(outcome=Outcome.FAILED)))
        return short


class Agreement:
    """Counts what goes in and what comes out."""

    def __init__(self):
        self.brought = self.used = 0

    def __call__(self, brought, /):
        used = agree_by_process_zero(brought)
        self.brought += len(brought)
        self.used += used
        return used


def digest(tree):
    state = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        state.update(np.asarray(leaf).tobytes())
    return state.hexdigest()


def tokens_of(ids):
    return [token for number in ids for token in range(number * tiered.SIZE, (number + 1) * tiered.SIZE)] + [0]


def main(port, policy, process):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    agreement = Agreement()
    host = MemoryBlockStore(tiered.BLOCK_BYTES, capacity=6, tier=Tier.G2)
    disk = Disk(tiered.BLOCK_BYTES, capacity=80, tier=Tier.G3, process=process)
    skew = np.random.default_rng(100 + process)
    metrics, hits = InMemoryMetrics(), 0
    options = {"metrics": metrics, "stores": [host, disk], "agreement": agreement, "eviction_policy": policy}
    with tiered.make(BLOCKS, max_sequences=2, **options) as manager:
        before = None
        for ids in synthetic.conversations(5, requests=REQUESTS, longest=9, users=6, id_bits=32):
            time.sleep(skew.random() * 0.003 * process)  # what is tested: one process runs late; nothing waits by it
            seq = manager.start(tokens_of(ids[:9]))
            tiered.prefill(manager, seq)
            tiered.check(manager, seq)
            manager.register(seq)
            hits += seq.num_cached // tiered.SIZE
            if before is not None:
                manager.release(before)
            before = seq
        pool = manager._device.pool
        told = {
            "pool": digest((pool._pool, pool._memory)),
            "sequences": digest(pool.sequences),
            "residents": [r.record.key.sequence_hash.hex() for r in manager._device.residency.residents],
            "hits": hits,
            "evictions": metrics.snapshot()["kvbm_eviction_count_total"],
            "brought": agreement.brought,
            "tier_hits": agreement.used,
            "failures": disk.failures,
        }
        manager.release(before)
    print(json.dumps(told), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
