"""The router's view: unbroken chains, tiers, ranks and groups, gaps and restarts; beside a model in plain Python."""

import itertools
import time
import tracemalloc

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
from hypothesis import given

from kvbm_jax.errors import ConfigError, EventDecodeError, HashingError
from kvbm_jax.events import (
    EngineCodec,
    EventBus,
    EventGap,
    EventType,
    Holder,
    KvEvent,
    KvEventBatch,
    Overlap,
    PrefixIndex,
    WorkerSnapshot,
)
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.protocols import Tier

pytestmark = pytest.mark.core

SIZE = 4
CHAIN = hash_sequence(range(8 * SIZE), SIZE)
NAMES = [row.astype("<u4").tobytes() for row in CHAIN]


def event(kind, block=None, tier=Tier.G1, *, at=0, event_id=0, worker="a", **more):
    name = None if block is None else NAMES[block]
    return KvEvent(EventType(kind), 0, worker, at, sequence_hash=name, tier=tier, event_id=event_id, **more)


class Feed:
    """Numbers one worker's events and gives them to an index."""

    def __init__(self, index, worker="a", first=0, at=0):
        self.index, self.worker, self.next, self.at = index, worker, first, at

    def __call__(self, kind, blocks=(None,), tier=Tier.G1, **more):
        rows = [event(kind, b, tier, worker=self.worker, event_id=self.next + i, **more) for i, b in enumerate(blocks)]
        self.send([msgspec.structs.replace(row, timestamp=self.at + row.event_id) for row in rows])

    def send(self, rows):
        self.next += len(rows)
        self.index.apply(KvEventBatch.from_events(rows))


def overlaps(index, **options):
    return {(h.worker_id, h.dp_rank): overlap for h, overlap in index.find_matches(CHAIN, **options).items()}


def test_a_broken_chain_counts_up_to_the_break():
    index = PrefixIndex()
    Feed(index, "a")("created", [0, 1, 3])
    Feed(index, "b")("created", [1, 2, 3])
    Feed(index, "c")("created", range(8))
    assert overlaps(index) == {("a", 0): Overlap(2, {Tier.G1: 2}), ("c", 0): Overlap(8, {Tier.G1: 8})}
    assert index.find_matches(NAMES[:3]) == index.find_matches(CHAIN[:3])
    assert index.find_matches(CHAIN[1:2]) == {Holder(w): Overlap(1, {Tier.G1: 1}) for w in "abc"}
    assert index.find_matches(CHAIN[:0]) == index.find_matches([]) == {}


def test_each_block_counts_for_the_fastest_tier_that_has_it():
    index = PrefixIndex()
    feed = Feed(index)
    feed("created", [0, 1, 2, 3])
    feed("created", [1, 2], Tier.G3)
    feed("migrated", [2, 3], Tier.G2, from_tier=Tier.G1)
    assert overlaps(index) == {("a", 0): Overlap(4, {Tier.G1: 2, Tier.G2: 2})}
    feed("deleted", [2], Tier.G2)
    assert overlaps(index) == {("a", 0): Overlap(4, {Tier.G1: 2, Tier.G2: 1, Tier.G3: 1})}
    feed("deleted", [2], Tier.G3)
    assert overlaps(index) == {("a", 0): Overlap(2, {Tier.G1: 2})}


def test_events_are_idempotent_and_unknown_deletes_are_counted():
    index = PrefixIndex()
    feed = Feed(index)
    feed("created", [0, 0, 1])
    feed("created", [0])
    feed("deleted", [1])
    feed("deleted", [1, 5])
    feed("deleted", [0], Tier.G2)
    assert overlaps(index) == {("a", 0): Overlap(1, {Tier.G1: 1})}
    assert index.stats()._replace(events=0) == (1, 1, 1, 0, 3, 0, 0)


def test_ranks_and_groups_stand_apart():
    index = PrefixIndex()
    feed = Feed(index)
    feed("created", [0, 1], dp_rank=0)
    feed("created", [0], dp_rank=3)
    feed("created", [0, 1, 2], group_idx=1)
    assert overlaps(index) == {("a", 0): Overlap(2, {Tier.G1: 2}), ("a", 3): Overlap(1, {Tier.G1: 1})}
    assert overlaps(index, group_idx=1) == {("a", 0): Overlap(3, {Tier.G1: 3})}
    assert overlaps(index, group_idx=2) == {}
    feed("cleared", tier=None, dp_rank=0)
    assert overlaps(index) == {("a", 3): Overlap(1, {Tier.G1: 1})}
    assert overlaps(index, group_idx=1) == {}


def test_loras_do_not_match_each_other():
    index, prompt = PrefixIndex(), list(range(2 * SIZE))
    names = {lora: hash_sequence(prompt, SIZE, lora_name=lora) for lora in (None, "x", "y")}
    for number, lora in enumerate([None, "x"]):
        rows = names[lora]
        index.apply(
            KvEventBatch.make(
                EventType.CREATED,
                [0, 1],
                worker_id=str(lora),
                block_size=SIZE,
                first_event_id=0,
                timestamp=number,
                sequence_hashes=rows,
                lora_names=[lora, lora],
            )
        )
    assert {lora: [h.worker_id for h in index.find_matches(rows)] for lora, rows in names.items()} == {
        None: ["None"],
        "x": ["x"],
        "y": [],
    }


def test_a_move_between_workers_is_a_deletion_at_the_source():
    index = PrefixIndex()
    source, target = Feed(index, "a"), Feed(index, "b")
    source("created", [0, 1])
    source("created", [1], Tier.G2)
    target("created", [0, 1])
    source("migrated", [0], Tier.G1, to_worker="b")
    source("migrated", [1], Tier.G2, from_tier=Tier.G1, to_worker="b")
    assert overlaps(index) == {("b", 0): Overlap(2, {Tier.G1: 2})}
    assert index.find_matches(CHAIN[1:2])[Holder("a")] == Overlap(1, {Tier.G2: 1})


def test_clearing_one_tier_leaves_the_others():
    index = PrefixIndex()
    feed = Feed(index)
    feed("created", [0, 1, 2])
    feed("created", [0, 1], Tier.G2)
    feed("cleared", tier=Tier.G1)
    assert overlaps(index) == {("a", 0): Overlap(2, {Tier.G2: 2})}
    feed("cleared", tier=Tier.G1)
    feed("cleared", tier=None)
    assert index.stats()[:3] == (0, 0, 1)


def test_rows_without_a_block_or_a_tier_change_nothing():
    index = PrefixIndex()
    rows = [
        event("created", 0),
        event("created", None, event_id=1),
        event("created", 1, None, event_id=2),
        event("migrated", 1, Tier.G2, event_id=3),  # from nowhere: as if created
    ]
    batch = KvEventBatch.from_events(rows)
    batch.tiers[0] = 9  # from a decoder that knows a tier more
    index.apply(batch)
    assert index.find_matches(CHAIN) == {}
    assert index.find_matches(CHAIN[1:]) == {Holder("a"): Overlap(1, {Tier.G2: 1})}
    assert index.find_matches([bytes(16)]) == {}
    assert index.stats()[3:6] == (1, 0, 3)


def test_a_removed_worker_is_gone_and_its_place_is_used_again():
    index = PrefixIndex()
    Feed(index, "a")("created", [0, 1])
    Feed(index, "b")("created", [0])
    assert index.remove_worker("a") == 2
    assert index.remove_worker("a") == index.remove_worker("b", 1) == 0
    assert overlaps(index) == {("b", 0): Overlap(1, {Tier.G1: 1})}
    Feed(index, "c")("created", [0, 1, 2])
    assert overlaps(index) == {("b", 0): Overlap(1, {Tier.G1: 1}), ("c", 0): Overlap(3, {Tier.G1: 3})}
    assert index.next_event_ids() == {"b": 1, "c": 3}
    assert index.remove_worker("b", 0) == 1
    assert index.stats()[:3] == (3, 3, 1)


def test_a_gap_is_seen_and_a_snapshot_closes_it():
    index = PrefixIndex()
    feed = Feed(index)
    feed("created", [0, 1, 2])
    assert index.incomplete() == ()
    old = WorkerSnapshot("a", 3, 2, (KvEventBatch.from_events([event("created", 0)]),))
    feed.next += 5  # lost: 0 is gone, and so on
    feed("created", [4])
    assert index.incomplete() == ("a",)
    assert index.stats().missed == 5
    index.apply(old)
    assert index.incomplete() == ("a",), "it is from before the gap"
    snapshot = KvEventBatch.from_events([event("created", b, event_id=9) for b in (0, 4)])
    index.apply(WorkerSnapshot("a", 10, 12, (snapshot,)))
    assert index.incomplete() == ()
    assert overlaps(index) == {("a", 0): Overlap(1, {Tier.G1: 1})}
    feed("created", [7])  # in the snapshot already, by its id
    feed("created", [1])
    assert overlaps(index) == {("a", 0): Overlap(2, {Tier.G1: 2})}
    assert index.stats().passed_over == 1


def test_who_joins_late_is_incomplete_until_a_snapshot_comes():
    index = PrefixIndex()
    feed = Feed(index, first=40)
    feed("created", [1])
    assert index.incomplete() == ("a",)
    index.apply(WorkerSnapshot("a", 41, 41, (KvEventBatch.from_events([event("created", 0, event_id=40)]),)))
    assert index.incomplete() == ()
    assert overlaps(index)["a", 0].blocks == 1


def test_a_gap_that_names_nobody_makes_all_incomplete():
    index = PrefixIndex()
    bus = EventBus()
    subscription = bus.subscribe(capacity=1)
    Feed(index, "b")("created", [0])
    bus.publish(KvEventBatch.from_events([event("created", 0)]))
    bus.publish(KvEventBatch.from_events([event("created", 1, event_id=1)]))
    for item in subscription.drain():
        index.apply(item)
    assert index.incomplete() == ("b", "a")
    index.apply(EventGap(1, 1))
    assert index.incomplete() == ("b", "a")


def test_what_comes_again_is_passed_over_and_does_not_turn_back_time():
    index = PrefixIndex()
    feed = Feed(index)
    feed("created", [0])
    rows = [event("deleted", 0, event_id=1, at=1), event("created", 1, event_id=2, at=2)]
    index.apply(KvEventBatch.from_events(rows))
    index.apply(KvEventBatch.from_events([event("created", 0)]))
    index.apply(KvEventBatch.from_events([*rows, event("created", 2, event_id=3, at=3)]))
    assert index.find_matches(CHAIN) == {}
    assert index.find_matches(CHAIN[1:])[Holder("a")].blocks == 2
    assert index.stats().passed_over == 3


def test_a_worker_that_starts_again_is_known_anew():
    index = PrefixIndex()
    Feed(index)("created", range(8))
    Feed(index, at=100)("created", [0], Tier.G3)  # found on disk
    assert overlaps(index) == {("a", 0): Overlap(1, {Tier.G3: 1})}
    assert index.incomplete() == ()
    Feed(index, first=1, at=200)("created", [1], Tier.G3)
    assert index.incomplete() == (), "the same life goes on"
    Feed(index, first=1, at=300)("created", [1], Tier.G3)
    assert index.incomplete() == ("a",), "its first event was missed"


def test_hashes_of_another_shape_are_refused():
    index = PrefixIndex()
    for wrong in (CHAIN[0], CHAIN.astype(np.int64), [b"short"], ["0" * 16]):
        with pytest.raises(HashingError, match="hashes must be"):
            index.find_matches(wrong)


def test_a_dump_carries_everything():
    index = PrefixIndex()
    feed = Feed(index)
    feed("created", [0, 1, 2])
    feed("created", [1], Tier.G4)
    feed("created", [5], group_idx=7, dp_rank=2)
    Feed(index, "b", first=9)("created", [0], Tier.G2)
    again = PrefixIndex.load(index.dump())
    assert overlaps(again) == overlaps(index)
    assert again.find_matches(CHAIN[5:], group_idx=7) == {Holder("a", 2): Overlap(1, {Tier.G1: 1})}
    assert again.incomplete() == ("b",)
    assert again.stats()[:3] == index.stats()[:3]
    feed.index = again
    feed("deleted", [2])
    assert again.stats().missed == again.stats().unknown_deletes == 0


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "no dump"),
        (b"\xff\x00", "no dump"),
        (
            msgspec.msgpack.encode({"version": 1, "hash_bytes": 16, "streams": {"?": []}}).replace(b"?", b"\xff"),
            "no dump",
        ),
        (b"\x82\xa7version\x01\xa1x" + b"\x91" * 100_000, "no dump"),
        (msgspec.msgpack.encode({"version": 2}), "has version 2; this library reads 1"),
        (msgspec.msgpack.encode({"version": 1}), "no dump"),
        (
            msgspec.msgpack.encode(
                {"version": 1, "hash_bytes": 16, "streams": {}, "holders": [["a", 0, {0: (b"x", b"\1")}]]}
            ),
            "1 bytes of",
        ),
        (
            msgspec.msgpack.encode(
                {"version": 1, "hash_bytes": 16, "streams": {}, "holders": [["a", 0, {0: (bytes(16), b"\0")}]]}
            ),
            "tier",
        ),
    ],
)
def test_what_is_no_dump_is_refused(data, why):
    with pytest.raises(EventDecodeError, match=why):
        PrefixIndex.load(data)


def test_streams_in_engines_language_match_by_half_of_each_hash():
    native, engine = (PrefixIndex(hash_bytes=width) for width in (16, 8))
    batch = KvEventBatch.from_events([event("created", b, block_size=SIZE, event_id=b) for b in range(3)])
    [told] = EngineCodec("b").decode(EngineCodec().encode(batch))
    told.event_ids[:] = range(3)
    for index in (native, engine):
        index.apply(batch)
        index.apply(told)
    assert [h.worker_id for h in native.find_matches(CHAIN)] == ["a"], "the engines' half is another block"
    again = PrefixIndex.load(engine.dump())
    for index in (engine, again):
        assert {h.worker_id: o.blocks for h, o in index.find_matches(CHAIN).items()} == {"a": 3, "b": 3}
        assert index.find_matches(NAMES) == index.find_matches(CHAIN)
        assert index.stats().blocks == 3
    with pytest.raises(ConfigError, match="hash_bytes = 4: allowed are 8 and 16"):
        PrefixIndex(hash_bytes=4)


class Model:
    """The same in plain Python: who has what where."""

    def __init__(self):
        self.held = set()  # (worker, rank, group, block, tier)

    def apply(self, e):
        me = (e.worker_id, e.dp_rank)
        if e.event_type is EventType.CLEARED:
            self.held = {c for c in self.held if c[:2] != me or e.tier not in {None, c[4]}}
            return
        claim = (*me, e.group_idx, e.sequence_hash)
        if e.event_type is EventType.DELETED:
            self.held.discard((*claim, e.tier))
        else:
            self.held.add((*claim, e.tier))
            if e.event_type is EventType.MIGRATED:
                self.held.discard((*claim, e.from_tier))

    def find(self, group, names):
        found = {}
        for me in {claim[:2] for claim in self.held}:
            fastest = [min((c[4] for c in self.held if c[:4] == (*me, group, name)), default=None) for name in names]
            chain = list(itertools.takewhile(bool, fastest))
            if chain:
                found[Holder(*me)] = Overlap(len(chain), {tier: chain.count(tier) for tier in sorted(set(chain))})
        return found


TIERS = st.sampled_from(Tier)
ROWS = st.lists(
    st.tuples(
        st.sampled_from(EventType),
        st.sampled_from(range(len(NAMES))),
        TIERS,
        TIERS,
        st.sampled_from([0, 1]),
        st.booleans(),
    ),
    min_size=1,
    max_size=30,
)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from([0, 1]), ROWS), max_size=12), st.booleans())
def test_it_believes_what_the_model_believes(batches, through_dump):
    index, model, ids = PrefixIndex(), Model(), dict.fromkeys("abc", 0)
    for worker, rank, rows in batches:
        events = []
        for kind, block, tier, origin, group, everything in rows:
            if kind is EventType.MIGRATED and origin == tier:
                continue
            more = {"from_tier": origin} if kind is EventType.MIGRATED else {}
            named = None if kind is EventType.CLEARED else block
            where = None if kind is EventType.CLEARED and everything else tier
            number = ids[worker] = ids[worker] + 1
            events.append(
                event(kind, named, where, worker=worker, event_id=number - 1, dp_rank=rank, group_idx=group, **more)
            )
        if events:
            index.apply(KvEventBatch.from_events(events))
        for one in events:
            model.apply(one)
    if through_dump:
        index = PrefixIndex.load(index.dump())
    for group, first in itertools.product([0, 1, 2], [0, 3]):
        assert index.find_matches(NAMES[first:], group_idx=group) == model.find(group, NAMES[first:])
    stats = index.stats()
    assert stats.claims == len({claim[:4] for claim in model.held})
    assert stats.blocks == len({claim[2:4] for claim in model.held})
    assert stats.missed == 0


def crowd(blocks, workers):
    """An index of `workers` that own that many blocks together, and the hashes."""
    index, rows = PrefixIndex(), np.random.default_rng(0).integers(0, 2**32, (blocks, 4), dtype=np.uint32)
    for worker, part in enumerate(np.split(rows, workers)):
        index.apply(
            KvEventBatch.make(
                EventType.CREATED,
                np.arange(len(part)),
                worker_id=str(worker),
                block_size=SIZE,
                first_event_id=0,
                timestamp=0,
                sequence_hashes=part,
            )
        )
    return index, rows


def test_256_blocks_are_found_among_a_million_in_100_microseconds():
    index, rows = crowd(1_000_000, 8)
    prompts = np.split(rows[: 256 * 400], 400)
    seconds = []
    for prompt in prompts:
        start = time.perf_counter()
        found = index.find_matches(prompt)
        seconds.append(time.perf_counter() - start)
        assert [overlap.blocks for overlap in found.values()] == [256]
    # The fastest tenth: the others may have waited for a busy machine.
    assert np.quantile(seconds, 0.1) < 100e-6


def test_a_block_takes_no_more_memory_than_is_said():
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        index, rows = crowd(100_000, 4)
        each = (tracemalloc.get_traced_memory()[0] - before - rows.nbytes) / 100_000
    finally:
        tracemalloc.stop()
    assert index.stats().claims == 100_000
    assert 100 < each < 200
    print(f"{each:.0f} bytes a block")
