"""Sources in any order: what a subscriber believes is the union of what they claim, tier by tier or merged."""

import hypothesis.strategies as st
import pytest
from event_streams import CONTENT, NAMES, SIZE, Believer, assert_parents_first, batch, chain, event, moves
from hypothesis import given

from kvbm_jax.errors import BlockStateError
from kvbm_jax.events import EventType, Holder, PrefixIndex, RecordingEventSink, WorkerSnapshot
from kvbm_jax.events.consolidator import Consolidation, Consolidator
from kvbm_jax.protocols import Tier

pytestmark = pytest.mark.core


class Ticks:
    """A clock that goes up."""

    def __init__(self):
        self.now = 100

    def time_ns(self):
        self.now += 1
        return self.now

    monotonic_ns = time_ns


def make(mode):
    sink = RecordingEventSink()
    return sink, Consolidator(sink, worker_id="w", mode=mode, clock=Ticks())


def told(sink):
    return [
        (e.event_type.value, NAMES.index(e.sequence_hash) if e.sequence_hash else None, e.tier) for e in sink.events
    ]


def test_host_memory_losing_a_block_does_not_hide_the_copy_on_disk():
    sink, consolidator = make("merged")
    manager = consolidator.source("manager")
    manager.publish(batch(event("created", 0)))
    manager.publish(batch(event("migrated", 0, Tier.G2, from_tier=Tier.G1)))
    manager.publish(batch(event("created", 0, Tier.G3)))
    manager.publish(batch(event("deleted", 0, Tier.G2)))
    assert told(sink) == [("created", 0, Tier.G1)]
    manager.publish(batch(event("deleted", 0, Tier.G3)))
    assert told(sink)[1:] == [("deleted", 0, Tier.G1)]


def test_what_is_merged_is_told_as_of_the_device():
    sink, consolidator = make("merged")
    manager = consolidator.source("manager")
    manager.publish(batch(event("created", 0, Tier.G3), event("created", 1)))
    manager.publish(batch(event("deleted", 0, Tier.G3), event("deleted", 1)))
    assert {tier for _, _, tier in told(sink)} == {Tier.G1}


def test_each_tier_is_told_with_its_own_name():
    sink, consolidator = make("per_tier")
    manager = consolidator.source("manager")
    events = [
        event("created", 0, block_id=4),
        event("migrated", 0, Tier.G2, from_tier=Tier.G1, from_block_id=4, block_id=9),
        event("created", 0, block_id=5),
        event("deleted", 0, Tier.G2, block_id=9),
        event("cleared", tier=Tier.G1, block_id=0),
    ]
    for one in events:
        manager.publish(batch(one))
    again = [(e.event_type, e.tier, e.block_id, e.from_tier, e.from_block_id) for e in sink.events]
    assert again == [(e.event_type, e.tier, e.block_id, e.from_tier, e.from_block_id) for e in events]


def test_a_move_is_told_as_far_as_it_is_true_of_all():
    sink, consolidator = make("per_tier")
    manager, engine = consolidator.source("manager"), consolidator.source("engine")
    manager.publish(batch(event("created", 0)))
    engine.publish(batch(event("created", 0)))
    manager.publish(batch(event("migrated", 0, Tier.G2, from_tier=Tier.G1)))
    assert told(sink) == [("created", 0, Tier.G1), ("created", 0, Tier.G2)]
    engine.publish(batch(event("migrated", 0, Tier.G2, from_tier=Tier.G1)))
    assert told(sink)[2:] == [("deleted", 0, Tier.G1)]
    manager.publish(batch(event("migrated", 1, Tier.G3, from_tier=Tier.G2)))
    assert told(sink)[3:] == [("created", 1, Tier.G3)], "it had not been said to be on G2"


def test_what_an_engine_clears_the_manager_may_still_hold():
    sink, consolidator = make("merged")
    manager, engine = consolidator.source("manager"), consolidator.source("engine")
    engine.publish(batch(event("created", 0), event("created", 1)))
    manager.publish(batch(event("created", 0, Tier.G2)))
    engine.publish(batch(event("cleared", tier=None)))
    assert told(sink)[2:] == [("deleted", 1, Tier.G1)]
    manager.publish(batch(event("cleared", tier=Tier.G2)))
    assert told(sink)[3:] == [("cleared", None, None)]


def test_a_source_that_closes_withdraws_its_claims_and_may_come_again():
    sink, consolidator = make("per_tier")
    manager, engine = consolidator.source("manager"), consolidator.source("engine")
    engine.publish(batch(event("created", 0), event("created", 1)))
    manager.publish(batch(event("created", 0)))
    with pytest.raises(BlockStateError, match="has a source 'engine'"):
        consolidator.source("engine")
    engine.close()
    engine.close()
    assert told(sink)[2:] == [("deleted", 1, Tier.G1)]
    with pytest.raises(BlockStateError, match="source 'engine' is closed"):
        engine.publish(batch(event("created", 1)))
    consolidator.source("engine").publish(batch(event("created", 1)))
    assert told(sink)[3:] == [("created", 1, Tier.G1)]
    consolidator.close()
    assert sink.closed


def test_a_snapshot_of_a_source_tells_the_difference_and_no_more():
    sink, consolidator = make("per_tier")
    engine = consolidator.source("engine")
    engine.publish(batch(event("created", 0), event("created", 1), event("created", 0, Tier.G2)))
    engine.publish(batch(event("created", 6, dp_rank=1)))
    engine.replace(WorkerSnapshot("e", 0, 9, (batch(event("created", 0), event("created", 5)),)))
    assert told(sink)[4:] == [
        ("created", 5, Tier.G1),
        ("deleted", 1, Tier.G1),
        ("deleted", 0, Tier.G2),
        ("deleted", 6, Tier.G1),
    ]


def test_blocks_of_other_sizes_are_told_in_batches_of_their_own():
    sink, consolidator = make("merged")
    manager = consolidator.source("manager")
    manager.publish(batch(event("created", 0, block_size=SIZE)))
    manager.publish(batch(event("created", 6, block_size=7)))
    manager.publish(batch(event("deleted", 6, block_size=0), event("deleted", 0, block_size=0)))
    assert [(b.block_size, len(b)) for b in sink.batches] == [(SIZE, 1), (7, 1), (7, 1), (SIZE, 1)]
    assert [e.event_id for e in sink.events] == [0, 1, 2, 3]


def test_metadata_and_lora_come_through():
    sink, consolidator = make("merged")
    consolidator.source("manager").publish(batch(event("created", 0, metadata={"a": "b"}), event("created", 8)))
    [first, second] = sink.events
    assert (first.metadata, second.metadata) == ({"a": "b"}, {})
    assert (first.lora_name, second.lora_name) == (None, "tuned")


def test_a_move_to_another_worker_is_a_deletion():
    sink, consolidator = make("per_tier")
    manager = consolidator.source("manager")
    manager.publish(batch(event("created", 0), event("created", 1)))
    manager.publish(batch(event("migrated", 0, to_worker="other")))
    manager.publish(batch(event("migrated", 1, Tier.G2, from_tier=Tier.G1, to_worker="other")))
    assert told(sink)[2:] == [("deleted", 0, Tier.G1), ("deleted", 1, Tier.G1)]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from("mef"), st.lists(moves(), min_size=1, max_size=6)),
        st.tuples(st.sampled_from("mef"), st.just("close")),
        st.tuples(st.just(""), st.just("join")),
    ),
    max_size=30,
)


@given(STEPS, st.sampled_from(Consolidation))
def test_a_subscriber_believes_the_union_whatever_the_order(steps, mode):
    sink, consolidator = make(mode)
    sources, claims = {}, {}
    subscriber, joiners = Believer(), []
    read = 0
    index = PrefixIndex()
    for name, step in steps:
        if step == "join":
            snapshot = consolidator.snapshot()
            assert_parents_first(snapshot)
            joiners.append(Believer())
            joiners[-1].join(snapshot)
            index.apply(snapshot)
        elif step == "close":
            if name in sources:
                sources.pop(name).close()
                del claims[name]
        else:
            if name not in sources:
                sources[name], claims[name] = consolidator.source(name), Believer()
            for one in step:
                sources[name].publish(batch(one))
                claims[name].next_id = one.event_id
                claims[name].apply(one)
        for rows in sink.batches[read:]:
            assert (rows.worker_id, rows.block_size in {0, SIZE}) == ("w", True)
            index.apply(rows)
            for follower in [subscriber, *joiners]:
                follower.apply_all([rows])
        read = len(sink.batches)
        union = {place for source in claims.values() for place in source.held}
        for follower in [subscriber, *joiners]:
            if mode is Consolidation.PER_TIER:
                assert follower.places == union
            else:
                assert {(rank, name) for rank, _, name in follower.places} == {(rank, n) for rank, _, n in union}
                assert len(follower.places) == len({(rank, n) for rank, _, n in union})
            assert follower.held == {place: CONTENT[place[2]] for place in follower.places}
    assert index.stats().missed == index.stats().unknown_deletes == 0
    for rank in (0, 1):
        blocks = {name for r, _, name in subscriber.places if r == rank}
        found = {h.dp_rank: o.blocks for h, o in index.find_matches(chain("abcd")).items()}
        ours = [name in blocks for name in (NAMES[0], NAMES[1], NAMES[2], NAMES[3])]
        assert found.get(rank, 0) == [*ours, False].index(False)
    assert all(e.event_type is not EventType.MIGRATED for e in sink.events) or mode is Consolidation.PER_TIER


def test_ranks_with_streams_of_their_own_are_one_worker_behind_a_consolidator():
    sink, consolidator = make("per_tier")
    index = PrefixIndex()
    ranks = [consolidator.source(f"rank {rank}") for rank in range(2)]
    for number, block in enumerate([0, 1, 2]):  # each rank counts its own events
        for rank, source in enumerate(ranks):
            source.publish(batch(event("created", block, dp_rank=rank, event_id=number, timestamp=10 * number + rank)))
    ranks[1].close()
    for told_batch in sink.batches:
        index.apply(told_batch)
    assert {h: o.blocks for h, o in index.find_matches(chain("abcd")).items()} == {Holder("w"): 3}
    assert index.incomplete() == ()
