"""Batches for tests of codecs, and how they are compared."""

import json
import pathlib

import numpy as np

from kvbm_jax.events import EventType, KvEvent, KvEventBatch
from kvbm_jax.events.dynamo import DynamoCodec
from kvbm_jax.events.engine import EngineCodec
from kvbm_jax.events.native import JsonCodec, MsgpackCodec
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.protocols import Tier

H1, H2, H3 = (bytes(range(first, first + 16)) for first in (1, 33, 200))
GOLDEN = {
    name: bytes.fromhex(digits)
    for name, digits in json.loads((pathlib.Path(__file__).with_name("golden") / "events.json").read_text()).items()
}
NATIVE = {"msgpack": MsgpackCodec(), "json": JsonCodec()}
FOREIGN = {"engine": EngineCodec("w-1"), "dynamo": DynamoCodec("w-1")}


def rows(batches):
    """All events of batches, one by one."""
    return [event for batch in batches for event in batch]


def story():
    """The batch of the golden messages of native codecs."""
    shared = {"worker_id": "w-1", "timestamp": 1_700_000_000_123_456_789, "block_size": 4, "dp_rank": 3}
    return KvEventBatch.from_events(
        [
            KvEvent(
                EventType.CREATED,
                70,
                event_id=2**40,
                tier=Tier.G2,
                sequence_hash=H1,
                token_ids=(5, 6, 4_000_000_000, 8),
                lora_name="l",
                metadata={"why": "new"},
                **shared,
            ),
            KvEvent(
                EventType.MIGRATED,
                2**63,
                event_id=2**40 + 1,
                tier=Tier.G2,
                from_tier=Tier.G1,
                from_block_id=7,
                sequence_hash=H2,
                parent_hash=H1,
                token_ids=(9, 10, 11, 12),
                **shared,
            ),
            KvEvent(
                EventType.DELETED,
                9,
                event_id=2**40 + 2,
                tier=Tier.G1,
                group_idx=5,
                sequence_hash=H3,
                to_worker="w-2",
                **shared,
            ),
            KvEvent(EventType.CLEARED, 0, event_id=2**40 + 3, **shared),
        ]
    )


def chain(count, block_size=4, first_event_id=0, worker_id="w-1", tier=Tier.G1, seed=0):
    """`count` blocks of one sequence that arrive in a tier."""
    tokens = np.random.default_rng(seed).integers(0, 128_000, (count, block_size)).astype(np.uint32)
    hashes = hash_sequence(tokens.ravel(), block_size)
    return KvEventBatch.make(
        EventType.CREATED,
        np.arange(count),
        worker_id=worker_id,
        block_size=block_size,
        first_event_id=first_event_id,
        timestamp=1_700_000_000_500_000_000,
        tier=tier,
        sequence_hashes=hashes,
        parent_hashes=np.concatenate([np.zeros((1, 4), np.uint32), hashes[:-1]]),
        token_ids=tokens,
    )
