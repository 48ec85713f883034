"""Blocks of a small forest, events about them, and what is believed of a stream in plain Python."""

import hypothesis.strategies as st
import numpy as np

from kvbm_jax.events import EventType, KvEvent, KvEventBatch
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.protocols import Tier

SIZE = 2
# Four chains that share beginnings: 0 1 2 3 | 0 1 4 | 0 5 | 6 7, and 8 9 as 0 1 of a LoRA.
PATHS = [
    ("a", None),
    ("ab", None),
    ("abc", None),
    ("abcd", None),
    ("abx", None),
    ("ay", None),
    ("m", None),
    ("mn", None),
]
PATHS += [("a", "tuned"), ("ab", "tuned")]


def _tokens(path):
    return [ord(letter) + number for letter in path for number in range(SIZE)]


def _name(path, lora):
    return hash_sequence(_tokens(path), SIZE, lora_name=lora)[-1].astype("<u4").tobytes() if path else None


NAMES = [_name(path, lora) for path, lora in PATHS]
PARENTS = [_name(path[:-1], lora) for path, lora in PATHS]


def chain(path, lora=None):
    """Hashes of all blocks of a path."""
    return hash_sequence(_tokens(path), SIZE, lora_name=lora)


def event(kind, block=0, tier=Tier.G1, **more):
    """An event about block number `block`; what it says of the block's content is right."""
    kind = EventType(kind)
    content = {}
    if kind in {EventType.CREATED, EventType.MIGRATED}:
        path, lora = PATHS[block]
        content = {
            "parent_hash": PARENTS[block],
            "token_ids": tuple(_tokens(path[-1:])),
            "lora_name": lora,
        }
    if kind is not EventType.CLEARED:
        content["sequence_hash"] = NAMES[block]
    return KvEvent(kind, **({"block_id": block, "worker_id": "w", "timestamp": 1, "tier": tier} | content | more))


def batch(*events):
    return KvEventBatch.from_events(events)


TIERS = st.sampled_from(Tier)


@st.composite
def moves(draw, kinds=tuple(EventType)):
    """One event that a source may tell, sensible or not."""
    kind, block, tier = draw(st.sampled_from(kinds)), draw(st.integers(0, len(PATHS) - 1)), draw(TIERS)
    more = {"dp_rank": draw(st.integers(0, 1)), "block_size": SIZE}
    if kind is EventType.MIGRATED:
        more["from_tier"] = draw(TIERS.filter(lambda other: other != tier))
    if kind is EventType.CLEARED:
        tier = draw(st.one_of(TIERS, st.none()))
    return event(kind, block, tier, **more)


class Believer:
    """Applies events row by row, and checks what any stream of one worker must keep."""

    def __init__(self, next_id=0):
        self.held = {}  # (rank, tier, hash): (parent, tokens, lora)
        self.next_id = next_id

    def apply(self, one):
        assert one.event_id == self.next_id
        self.next_id += 1
        place = (one.dp_rank, one.tier, one.sequence_hash)
        content = (one.parent_hash, one.token_ids, one.lora_name)
        match one.event_type:
            case EventType.CLEARED:
                self.held = {p: c for p, c in self.held.items() if p[0] != one.dp_rank or one.tier not in {None, p[1]}}
            case EventType.DELETED:
                self.held.pop(place, None)
            case EventType.CREATED:
                self.held[place] = content
            case EventType.MIGRATED:
                self.held[place] = content
                self.held.pop((one.dp_rank, one.from_tier, one.sequence_hash), None)

    def apply_all(self, batches):
        for one in batches:
            for row in one:
                self.apply(row)

    def join(self, snapshot):
        """Begins anew from a snapshot."""
        self.held = {}
        for one in snapshot.batches:
            for row in one:
                assert row.event_type is EventType.CREATED
                self.held[row.dp_rank, row.tier, row.sequence_hash] = (row.parent_hash, row.token_ids, row.lora_name)
        self.next_id = snapshot.next_event_id

    @property
    def places(self):
        return set(self.held)


CONTENT = {
    name: (parent, tuple(_tokens(path[-1:])), lora)
    for name, parent, (path, lora) in zip(NAMES, PARENTS, PATHS, strict=True)
}


def assert_parents_first(snapshot):
    """Within (rank, group) a block stands after its parent, if that is there."""
    seen = set()
    present = {(row.dp_rank, row.sequence_hash) for one in snapshot.batches for row in one}
    for one in snapshot.batches:
        for row in one:
            parent = (row.dp_rank, row.parent_hash)
            assert parent in seen or parent not in present
            seen.add((row.dp_rank, row.sequence_hash))


def same_columns(one, other):
    """Whether two batches are equal in all but ids and times."""
    names = ["event_types", "tiers", "block_ids", "sequence_hashes", "parent_hashes", "token_ids", "token_offsets"]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in names)
