import dataclasses
import time

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm_jax.errors import LayoutError
from kvbm_jax.events import (
    SCHEMA_VERSION,
    EventPublisher,
    EventType,
    KvEvent,
    KvEventBatch,
    RecordingEventSink,
    parts,
)
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.protocols import BlockKey, BlockRecord, Clock, Tier

pytestmark = pytest.mark.core

ROWS = np.arange(1, 17, dtype=np.uint32).reshape(4, 4)
WORKER = {"worker_id": "w", "block_size": 4, "first_event_id": 10, "timestamp": 99}


def created(count=3):
    tokens = np.arange(4 * count, dtype=np.uint32).reshape(count, 4)
    hashes = hash_sequence(tokens.ravel(), 4)
    parents = np.concatenate([np.zeros((1, 4), np.uint32), hashes[:-1]])
    return KvEventBatch.make(
        EventType.CREATED,
        np.arange(5, 5 + count, dtype=np.int32),
        sequence_hashes=hashes,
        parent_hashes=parents,
        token_ids=tokens,
        **WORKER,
    )


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 60), st.integers(0, 3))
def test_parts_of_a_batch_are_its_rows_within_bounds(count, most_events, most_tokens, odd):
    whole = created(count)
    if odd:  # of which no two rows need be alike
        rows = list(whole)
        rows[0] = msgspec.structs.replace(rows[0], token_ids=(1,) * odd, lora_name="l", metadata={"a": "b"})
        rows[-1] = msgspec.structs.replace(rows[-1], event_type=EventType.DELETED, token_ids=(), to_worker="v")
        whole = KvEventBatch.from_events(rows)
    found = list(parts(whole, most_events=most_events, most_tokens=most_tokens))
    assert [row for part in found for row in part] == list(whole)
    for part in found:
        assert 1 <= len(part) <= most_events
        assert len(part) == 1 or len(part.token_ids) <= most_tokens
    assert (whole.shared is None) == any(part.shared is None for part in found)


@given(st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=3), min_size=1, max_size=4), st.booleans(), st.booleans())
def test_what_all_events_have_alike_is_found_in_lists_too(tokens, one_group, one_name):
    count = len(tokens)
    lists = {
        "token_ids": [tuple(row) for row in tokens],
        "group_idx": [7] * count if one_group else list(range(count)),
        "lora_names": ["l"] * count if one_name else [str(i) for i in range(count)],
    }
    batch = KvEventBatch.make(EventType.CREATED, list(range(count)), sequence_hashes=ROWS[:count], **lists, **WORKER)
    assert [row.token_ids for row in batch] == lists["token_ids"]
    assert [row.group_idx for row in batch] == lists["group_idx"]
    assert [row.lora_name for row in batch] == lists["lora_names"]
    columns = [[len(row) for row in tokens], lists["group_idx"], lists["lora_names"]]
    assert (batch.shared is not None) == all(column.count(column[0]) == count for column in columns)


@pytest.mark.parametrize("tokens", [[(1.5,)], [(-1,)], [(2**32,)], [("a",)], [(1,), (2,)]])
def test_tokens_that_are_none_are_refused_however_they_come(tokens):
    with pytest.raises(LayoutError, match="token_ids"):
        KvEventBatch.make(EventType.CREATED, [0], token_ids=tokens, **WORKER)


def test_what_a_manager_tells_is_what_its_events_share():
    sink = RecordingEventSink()
    publisher = EventPublisher(sink, worker_id="w", block_size=4, clock=time)
    records = [
        BlockRecord(BlockKey(bytes([i + 1] * 16)), bytes([i] * 16) if i else None, (1, 2, 3, i)) for i in range(3)
    ]
    publisher.created(Tier.G1, np.arange(3, dtype=np.int32), records)
    publisher.deleted(Tier.G1, [4], [records[0].key])
    publisher.cleared(None)
    assert all(batch.shared is not None for batch in sink.batches)
    told = [(e.event_type.value, e.block_id, e.sequence_hash, e.parent_hash, e.token_ids, e.tier) for e in sink.events]
    assert told == [
        *(("created", i, r.key.sequence_hash, r.parent_hash, r.token_ids, Tier.G1) for i, r in enumerate(records)),
        ("deleted", 4, records[0].key.sequence_hash, None, (), Tier.G1),
        ("cleared", 0, None, None, (), None),
    ]


def test_a_batch_within_bounds_is_its_only_part():
    whole = created()
    assert list(parts(whole, most_events=3, most_tokens=12)) == [whole]
    assert whole.shared is not None


def test_rows_of_a_created_batch():
    batch = created()
    assert len(batch) == 3
    first, second, last = batch
    hashes = [row.astype("<u4").tobytes() for row in hash_sequence(range(12), 4)]
    assert first == KvEvent(
        EventType.CREATED,
        5,
        "w",
        99,
        sequence_hash=hashes[0],
        token_ids=(0, 1, 2, 3),
        block_size=4,
        tier=Tier.G1,
        event_id=10,
    )
    assert (second.parent_hash, second.event_id, second.token_ids) == (hashes[0], 11, (4, 5, 6, 7))
    assert last == batch[2] == batch[-1]
    assert first.schema_version == SCHEMA_VERSION
    with pytest.raises(IndexError):
        batch[3]


def test_mixed_types_ragged_tokens_and_optional_columns():
    batch = KvEventBatch.make(
        [EventType.MIGRATED, EventType.MIGRATED],
        [7, 8],
        tier=Tier.G2,
        from_tier=Tier.G1,
        from_block_ids=[1, 2],
        token_ids=[[1, 2, 3], []],
        group_idx=[0, 1],
        lora_names=[None, "a"],
        to_workers=["other", None],
        metadata=[{"k": "v"}, {}],
        dp_rank=3,
        **WORKER,
    )
    first, second = batch
    assert (first.from_tier, first.from_block_id, first.tier, first.block_id) == (Tier.G1, 1, Tier.G2, 7)
    assert (first.token_ids, second.token_ids) == ((1, 2, 3), ())
    assert (first.lora_name, second.lora_name) == (None, "a")
    assert (first.to_worker, second.to_worker) == ("other", None)
    assert (first.metadata, second.metadata) == ({"k": "v"}, {})
    assert (first.group_idx, second.group_idx, first.dp_rank) == (0, 1, 3)
    assert first.sequence_hash is first.parent_hash is None


def test_cleared_of_one_tier_and_of_all():
    for tier in (None, Tier.G3):
        (event,) = KvEventBatch.make(EventType.CLEARED, [0], tier=tier, **WORKER)
        assert (event.event_type, event.tier, event.block_id) == (EventType.CLEARED, tier, 0)


hashes_of = st.none() | st.binary(min_size=16, max_size=16).filter(any)
tiers_of = st.none() | st.sampled_from(Tier)
events_of = st.builds(
    KvEvent,
    st.sampled_from(EventType),
    st.integers(0, 2**64 - 1),
    st.just("w"),
    st.integers(0, 2**64 - 1),
    metadata=st.dictionaries(st.text(max_size=3), st.text(max_size=3), max_size=2),
    sequence_hash=hashes_of,
    parent_hash=hashes_of,
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple),
    block_size=st.just(4),
    tier=tiers_of,
    group_idx=st.integers(0, 2**32 - 1),
    lora_name=st.none() | st.text(max_size=3),
    event_id=st.integers(0, 2**64 - 1),
    from_tier=tiers_of,
    from_block_id=st.integers(0, 2**64 - 1),
    to_worker=st.none() | st.text(max_size=3),
)


@given(events=st.lists(events_of, min_size=1, max_size=5))
def test_rows_survive_the_columns(events):
    assert list(KvEventBatch.from_events(events)) == events


def test_an_empty_batch_is_one_too():
    batch = KvEventBatch.make(EventType.DELETED, [], **WORKER)
    assert list(batch) == []


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_ids": [-1, 0]}, r"block_ids must be in \[0, 18446744073709551615\]; they reach from -1"),
        ({"block_ids": [0.5, 1]}, "block_ids must be integers"),
        ({"block_ids": 3}, "one-dimensional"),
        ({"sequence_hashes": np.zeros((3, 4), np.uint32)}, r"sequence_hashes must be uint32\[2, 4\]"),
        ({"sequence_hashes": np.zeros((2, 4), np.int64)}, r"it is int64\[2, 4\]"),
        ({"token_ids": [[1]]}, "token_ids has 1 rows for 2 events"),
        ({"token_ids": [[1], [-1]]}, "token_ids must be in"),
        ({"group_idx": [1, 2, 3]}, r"group_idx has shape \[3\] for 2 events"),
        ({"lora_names": ["a"]}, "lora_names has 1 entries for 2 events"),
        ({"event_type": [EventType.CREATED]}, r"event_types has shape \[1\] for 2 events"),
    ],
)
def test_columns_that_do_not_fit(kwargs, message):
    arguments = {"event_type": EventType.CREATED, "block_ids": [0, 1]} | WORKER | kwargs
    with pytest.raises(LayoutError, match=message):
        KvEventBatch.make(**arguments)


def test_offsets_must_rise_and_end_at_the_tokens():
    batch = created()
    columns = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch) if field.init}
    for wrong in ([0, 4, 8, 11], [0, 8, 4, 12], [1, 4, 8, 12], [0, 12]):
        with pytest.raises(LayoutError, match="token_offsets must be 4 rising numbers from 0 to 12"):
            KvEventBatch(**(columns | {"token_offsets": np.array(wrong)}))


@pytest.mark.parametrize(
    "events",
    [
        [],
        [KvEvent(EventType.DELETED, 0, "a", 0), KvEvent(EventType.DELETED, 0, "b", 0)],
        [KvEvent(EventType.DELETED, 0, "a", 0), KvEvent(EventType.DELETED, 0, "a", 0, block_size=4)],
    ],
)
def test_rows_of_one_batch_share_worker_and_block_size(events):
    with pytest.raises(LayoutError, match="a batch has events of one"):
        KvEventBatch.from_events(events)


def test_rows_with_a_short_hash_are_refused():
    with pytest.raises(LayoutError, match="a hash has 16 bytes; 6162 has 2"):
        KvEventBatch.from_events([KvEvent(EventType.DELETED, 0, "a", 0, sequence_hash=b"ab")])


def test_rows_with_numbers_that_do_not_fit_are_refused():
    with pytest.raises(LayoutError, match="block_ids does not fit uint64"):
        KvEventBatch.from_events([KvEvent(EventType.DELETED, -1, "a", 0)])


def test_the_time_module_is_a_clock():
    clock: Clock = time
    assert clock.time_ns() > 1_700_000_000_000_000_000
    assert clock.monotonic_ns() <= clock.monotonic_ns()
