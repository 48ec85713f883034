"""Batches for tests of codecs, and how they are compared."""

import json
import pathlib
import time

import numpy as np

from kvbm_jax.events import EventGap, EventType, KvEvent, KvEventBatch, WorkerSnapshot
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


class View:
    """What a consumer believes of one worker: the claims of its stream, as simple as can be."""

    def __init__(self):
        self.claims = set()
        self.gaps = []
        self.snapshots = 0
        self.event_ids = []

    def apply(self, item):
        if isinstance(item, EventGap):
            self.gaps.append(item)
            return
        if isinstance(item, WorkerSnapshot):
            self.snapshots += 1
            self.claims.clear()
            for batch in item.batches:
                for event in batch:
                    self._apply(event)
            return
        for event in item:
            self.event_ids.append(event.event_id)
            self._apply(event)

    def _apply(self, event):
        claim = (event.tier, event.group_idx, event.sequence_hash)
        origin = claim if event.from_tier is None else (event.from_tier, *claim[1:])
        match event.event_type:
            case EventType.CREATED:
                self.claims.add(claim)
            case EventType.DELETED:
                self.claims.discard(claim)
            case EventType.MIGRATED:
                self.claims.discard(origin)
                if event.to_worker is None:
                    self.claims.add(claim)
            case EventType.CLEARED:
                self.claims = {c for c in self.claims if event.tier is not None and c[0] is not event.tier}

    def follow(self, subscription, done, timeout=20.0):
        """Reads until `done(self)`; fails if that takes too long."""
        deadline = time.monotonic() + timeout
        while not done(self):
            rest = deadline - time.monotonic()
            item = subscription.poll(max(rest, 0.0))
            assert item is not None, f"{len(self.claims)} claims, ids to {self.event_ids[-1:]}, {self.gaps}"
            self.apply(item)


def random_life(rng, worker_id="w-1", steps=60):
    """Batches of a worker whose blocks come, move and go, and the claims that stand after each."""
    hashes = [rng.randbytes(16) for _ in range(12)]
    view, next_id, told = View(), 0, []
    for _ in range(steps):
        rows = []
        for _ in range(rng.randint(1, 4)):
            kind = rng.choices(tuple(EventType), (6, 3, 3, 1))[0]
            tiers = rng.sample(list(Tier), 2)
            cleared = kind is EventType.CLEARED
            rows.append(
                KvEvent(
                    kind,
                    0 if cleared else rng.randrange(99),
                    worker_id,
                    next_id,
                    sequence_hash=None if cleared else rng.choice(hashes),
                    parent_hash=None if cleared or rng.random() < 0.3 else rng.choice(hashes),
                    token_ids=tuple(rng.randrange(2**32) for _ in range(4)) if kind is EventType.CREATED else (),
                    block_size=4,
                    tier=rng.choice([None, Tier.G1, Tier.G2]) if cleared else tiers[0],
                    from_tier=tiers[1] if kind is EventType.MIGRATED else None,
                    to_worker="w-9" if kind is EventType.MIGRATED and rng.random() < 0.2 else None,
                    group_idx=0 if cleared else rng.randrange(2),
                    lora_name=rng.choice([None, "l"]),
                    event_id=next_id,
                    metadata=rng.choice([{}, {"a": "b"}]),
                )
            )
            next_id += 1
        batch = KvEventBatch.from_events(rows)
        view.apply(batch)
        told.append((batch, frozenset(view.claims)))
    return told
