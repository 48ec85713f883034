"""What consumers that go by parents are told: nothing they could not follow, and everything as soon as they can."""

import itertools

import hypothesis.strategies as st
import pytest
from event_streams import CONTENT, NAMES, PARENTS, SIZE, Believer, assert_parents_first, batch, event, moves
from hypothesis import given

from kvbm_jax.events import EventType, RecordingEventSink
from kvbm_jax.events.parent_gate import ParentGate
from kvbm_jax.protocols import Tier

pytestmark = pytest.mark.core

# Numbers of event_streams.PATHS: 0 - 1 - 2 - 3 is a chain, 4 another child of 1, 5 another of 0, 6 - 7 apart.


def make(tier=None):
    sink = RecordingEventSink()
    return sink, ParentGate(sink, worker_id="w", tier=tier)


def told(sink):
    said = [(e.event_type.value, NAMES.index(e.sequence_hash) if e.sequence_hash else None) for e in sink.events]
    sink.batches.clear()
    return said


def feed(gate, *events):
    for one in events:
        gate.publish(batch(one))


def test_children_wait_for_their_parent():
    sink, gate = make()
    feed(gate, event("created", 3), event("created", 1), event("created", 2), event("created", 4))
    assert told(sink) == []
    assert gate.waiting() == 4
    feed(gate, event("created", 0))
    assert told(sink) == [("created", b) for b in (0, 1, 2, 4, 3)]
    assert gate.waiting() == 0
    feed(gate, event("created", 5))
    assert told(sink) == [("created", 5)]


def test_a_parent_that_goes_takes_its_descendants_along_and_brings_them_back():
    sink, gate = make()
    feed(gate, *(event("created", b) for b in range(6)))
    told(sink)
    feed(gate, event("deleted", 1))
    assert told(sink) == [("deleted", b) for b in (3, 4, 2, 1)]
    assert gate.waiting() == 3
    feed(gate, event("deleted", 2))  # while it waits: nobody has to be told
    assert told(sink) == []
    feed(gate, event("created", 1))
    assert told(sink) == [("created", 1), ("created", 4)]
    feed(gate, event("created", 2))
    assert told(sink) == [("created", 2), ("created", 3)]


def test_a_parent_that_only_moves_keeps_its_descendants():
    sink, gate = make()
    feed(gate, event("created", 0), event("created", 1))
    told(sink)
    feed(gate, event("migrated", 0, Tier.G2, from_tier=Tier.G1))
    moved = [(e.event_type.value, e.tier) for e in sink.events]
    assert moved == [("created", Tier.G2), ("deleted", Tier.G1)]
    told(sink)
    feed(gate, event("created", 0, Tier.G3), event("deleted", 0, Tier.G2), event("created", 0, Tier.G3))
    assert told(sink) == [("created", 0), ("deleted", 0)]
    feed(gate, event("deleted", 0, Tier.G3))
    assert told(sink) == [("deleted", 1), ("deleted", 0)]


def test_all_copies_of_a_block_are_told_and_withdrawn():
    sink, gate = make()
    feed(gate, event("created", 1), event("created", 1, Tier.G3), event("created", 0))
    assert [(e.sequence_hash, e.tier) for e in sink.events] == [
        (NAMES[0], Tier.G1),
        (NAMES[1], Tier.G1),
        (NAMES[1], Tier.G3),
    ]
    told(sink)
    feed(gate, event("deleted", 0))
    assert told(sink) == [("deleted", 1), ("deleted", 1), ("deleted", 0)]


def test_a_block_may_be_told_as_of_one_tier_from_its_first_copy_to_its_last():
    sink, gate = make(Tier.G1)
    feed(gate, event("created", 1, Tier.G3), event("created", 0, Tier.G2), event("created", 0, Tier.G1))
    assert [(e.sequence_hash, e.tier) for e in sink.events] == [(NAMES[0], Tier.G1), (NAMES[1], Tier.G1)]
    told(sink)
    feed(gate, event("migrated", 0, Tier.G3, from_tier=Tier.G2), event("deleted", 0, Tier.G1))
    assert told(sink) == []
    feed(gate, event("deleted", 0, Tier.G3))
    assert {e.tier for e in sink.events} == {Tier.G1}
    assert told(sink) == [("deleted", 1), ("deleted", 0)]


def test_what_was_never_announced_is_not_taken_back():
    sink, gate = make()
    feed(gate, event("deleted", 0), event("created", 1), event("deleted", 1), event("deleted", 1), event("created", 0))
    feed(gate, event("deleted", 0, Tier.G2))
    assert told(sink) == [("created", 0)]


def test_clearing_a_tier_is_said_block_by_block_unless_nothing_is_left():
    sink, gate = make()
    feed(gate, event("created", 0), event("created", 1, Tier.G2), event("created", 2))
    told(sink)
    feed(gate, event("cleared", tier=Tier.G1))
    assert told(sink) == [("deleted", 2), ("deleted", 1), ("deleted", 0)]
    feed(gate, event("cleared", tier=Tier.G2))
    assert [(e.event_type.value, e.tier) for e in sink.events] == [("cleared", None)]
    assert gate.waiting() == 0


def test_groups_and_ranks_have_parents_of_their_own():
    sink, gate = make()
    feed(gate, event("created", 0, group_idx=1), event("created", 1), event("created", 0, dp_rank=2))
    assert [(e.group_idx, e.dp_rank) for e in sink.events] == [(1, 0), (0, 2)]
    feed(gate, event("created", 1, group_idx=1))
    assert told(sink)[2:] == [("created", 1)]


def test_parents_that_go_in_a_circle_wait_for_ever():
    sink, gate = make()
    one, other = event("created", 0, parent_hash=NAMES[1]), event("created", 1)
    feed(gate, one, other, event("created", 6, parent_hash=NAMES[6]))
    assert (told(sink), gate.waiting()) == ([], 3)
    feed(gate, event("deleted", 6), event("deleted", 1), event("deleted", 0), event("created", 0), event("created", 6))
    assert told(sink) == [("created", 0), ("created", 6)]


def test_a_long_chain_costs_no_depth():
    sink, gate = make()
    names = [number.to_bytes(16, "little") for number in range(1, 5001)]
    rows = [
        event("created", 0, sequence_hash=name, parent_hash=parent)
        for name, parent in zip(names, [None, *names], strict=False)
    ]
    gate.publish(batch(*reversed(rows)))
    assert [e.sequence_hash for e in sink.events] == names
    gate.publish(batch(event("deleted", 0, sequence_hash=names[0])))
    assert [e.sequence_hash for e in sink.events[5000:]] == names[::-1]


class Peer(Believer):
    """Refuses what Dynamo's tree refuses."""

    def apply(self, one):
        name = (one.dp_rank, one.sequence_hash)
        named = {(rank, held) for rank, _, held in self.held}
        assert one.event_type in {EventType.CREATED, EventType.DELETED} or one.tier is None
        if one.event_type is EventType.CREATED:
            assert one.parent_hash is None or (one.dp_rank, one.parent_hash) in named
            assert (one.dp_rank, one.tier, one.sequence_hash) not in self.held
        if one.event_type is EventType.DELETED:
            assert (one.dp_rank, one.tier, one.sequence_hash) in self.held
            last = sum(rank == one.dp_rank and held == one.sequence_hash for rank, _, held in self.held) == 1
            children = [place for place, content in self.held.items() if (place[0], content[0]) == name]
            assert not (last and children)
        super().apply(one)


STREAM = st.lists(st.lists(moves(), min_size=1, max_size=4), max_size=40)


@given(STREAM, st.integers(0, 40), st.sampled_from([None, Tier.G1]))
def test_a_peer_can_follow_and_misses_no_chain(stream, joins_at, tier):
    sink, gate = make(tier)
    resident, peer, late, read = Believer(), Peer(), Peer(), 0
    for number, rows in enumerate(stream):
        if number == joins_at:
            snapshot = gate.snapshot()
            assert_parents_first(snapshot)
            late.join(snapshot)
        for one in rows:
            gate.publish(batch(one))
            resident.next_id = one.event_id
            resident.apply(one)
        for passed in sink.batches[read:]:
            peer.apply_all([passed])
            if number >= joins_at:
                late.apply_all([passed])
        read = len(sink.batches)
    names = {(rank, name) for rank, _, name in resident.places}

    def reachable(rank, name):
        while name is not None:
            if (rank, name) not in names:
                return False
            name = PARENTS[NAMES.index(name)]
        return True

    expected = {(r, tier or held, name) for r, held, name in resident.places if reachable(r, name)}
    assert peer.places == expected
    if joins_at < len(stream):
        assert late.places == expected
    assert peer.held == {place: CONTENT[place[2]] for place in expected}
    assert gate.waiting() == len(names) - len({(rank, name) for rank, _, name in expected})
    for one in itertools.chain(*sink.batches):
        assert one.block_size == SIZE
