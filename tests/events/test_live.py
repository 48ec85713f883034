import random

import msgspec
import numpy as np
import pytest
from event_batches import View, chain, random_life

from kvbm_jax.events import EventType, KvEvent, KvEventBatch, LiveBlocks, live
from kvbm_jax.protocols import Tier

pytestmark = pytest.mark.core


def claims(snapshot):
    view = View()
    view.apply(snapshot)
    return view.claims


@pytest.mark.parametrize("seed", range(20))
def test_a_snapshot_is_what_the_events_leave(seed, monkeypatch):
    monkeypatch.setattr(live, "_SLACK", 8)
    blocks = LiveBlocks("w-1")
    for batch, standing in random_life(random.Random(seed)):
        blocks.apply(batch)
        assert len(blocks) == len(standing)
        if batch.event_ids[0] % 7 == 0:
            snapshot = blocks.snapshot(5)
            assert claims(snapshot) == standing
            assert (snapshot.next_event_id, snapshot.timestamp) == (batch.event_ids[-1] + 1, 5)


def test_ranks_hold_and_clear_each_for_itself():
    blocks = LiveBlocks("w-1")
    for rank in range(2):
        for event in list(chain(3)):
            blocks.apply(KvEventBatch.from_events([msgspec.structs.replace(event, dp_rank=rank)]))
    gone = KvEvent(EventType.DELETED, 0, "w-1", 0, dp_rank=1, sequence_hash=chain(1)[0].sequence_hash, tier=Tier.G1)
    for event, left in ((gone, [3, 2]), (KvEvent(EventType.CLEARED, 0, "w-1", 0), [0, 2])):
        blocks.apply(KvEventBatch.from_events([event]))
        ranks = [row.dp_rank for batch in blocks.snapshot(0).batches for row in batch]
        assert [ranks.count(rank) for rank in range(2)] == left


def test_rows_keep_what_was_told_of_them():
    rng = random.Random(1)
    events = {}
    blocks = LiveBlocks("w-1")
    for batch, _ in random_life(rng):
        blocks.apply(batch)
        for event in batch:
            events[event.event_id] = event
    for batch in blocks.snapshot(0).batches:
        for event in batch:
            told = events[event.event_id]
            for name in ("block_id", "token_ids", "parent_hash", "lora_name", "metadata", "tier", "group_idx"):
                assert getattr(event, name) == getattr(told, name), name


def test_parents_come_before_children_in_batches_of_bounded_length():
    batch = chain(3000)
    blocks = LiveBlocks("w-1")
    for event in reversed(list(batch)):
        blocks.apply(KvEventBatch.from_events([event]))
    seen = {bytes(16)}
    snapshot = blocks.snapshot(0)
    assert [len(part) for part in snapshot.batches] == [1024, 1024, 952]
    for event in (event for part in snapshot.batches for event in part):
        assert (event.parent_hash or bytes(16)) in seen
        seen.add(event.sequence_hash)


def test_blocks_that_are_each_others_parents_are_told_too():
    rows = [
        KvEvent(EventType.CREATED, i, "w-1", 0, sequence_hash=b, parent_hash=p, tier=Tier.G1, event_id=i)
        for i, (b, p) in enumerate([(b"a" * 16, b"b" * 16), (b"b" * 16, b"a" * 16)])
    ]
    blocks = LiveBlocks("w-1")
    blocks.apply(KvEventBatch.from_events(rows))
    assert len(claims(blocks.snapshot(0))) == 2


def test_memory_is_of_what_lives():
    blocks = LiveBlocks("w-1")
    count = live._SLACK // 64
    for i in range(3 * count):
        batch = chain(64, 1, first_event_id=128 * i, seed=i)
        blocks.apply(batch)
        gone = KvEventBatch.make(
            EventType.DELETED,
            np.arange(64),
            worker_id="w-1",
            block_size=1,
            first_event_id=128 * i + 64,
            timestamp=0,
            sequence_hashes=batch.sequence_hashes,
        )
        blocks.apply(gone)
    assert len(blocks) == 0
    assert blocks._rows <= live._SLACK + 64
