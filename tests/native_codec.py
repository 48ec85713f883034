"""What holds of every codec that carries all of a batch; a test module makes a subclass for each codec that it has."""

import dataclasses

import hypothesis.strategies as st
import numpy as np
from event_batches import GOLDEN, chain, rows, story
from hypothesis import given

from kvbm_jax.events import EventType, KvEvent, KvEventBatch
from kvbm_jax.protocols import Tier

__all__ = ["HASHES", "TEXT", "NativeCodec", "empty"]

HASHES = st.binary(min_size=16, max_size=16).filter(any)
U64 = st.integers(0, 2**64 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5)
EVENTS = st.builds(
    KvEvent,
    event_type=st.sampled_from(EventType),
    block_id=U64,
    worker_id=st.just("w"),
    timestamp=U64,
    metadata=st.dictionaries(TEXT, TEXT, max_size=2),
    sequence_hash=st.none() | HASHES,
    parent_hash=st.none() | HASHES,
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple),
    block_size=st.just(4),
    tier=st.none() | st.sampled_from(Tier),
    group_idx=st.integers(0, 2**32 - 1),
    lora_name=st.none() | TEXT,
    event_id=U64,
    from_tier=st.none() | st.sampled_from(Tier),
    from_block_id=U64,
    to_worker=st.none() | TEXT,
)


def empty():
    return KvEventBatch.make([], [], worker_id="w", block_size=4, first_event_id=0, timestamp=0)


class NativeCodec:
    """The suite."""

    codec = None

    @staticmethod
    def fields(data):
        """The fields of a message with their bytes, where their order is free; else the message."""
        return data

    def test_messages_are_the_golden_bytes(self):
        golden, made = GOLDEN[self.codec.name], self.codec.encode(story())
        assert (self.fields(made), len(made)) == (self.fields(golden), len(golden))
        (batch,) = self.codec.decode(golden)
        assert rows([batch]) == rows([story()])
        assert (batch.worker_id, batch.block_size, batch.dp_rank) == ("w-1", 4, 3)

    def test_everything_is_kept(self):
        @given(events=st.lists(EVENTS, min_size=1, max_size=5))
        def check(events):
            batch = KvEventBatch.from_events(events)
            assert rows(self.codec.decode(self.codec.encode(batch))) == events

        check()

    def test_columns_are_as_they_were(self):
        batch = chain(70)
        (found,) = self.codec.decode(self.codec.encode(batch))
        for field in (field for field in dataclasses.fields(batch) if field.init):
            np.testing.assert_array_equal(getattr(found, field.name), getattr(batch, field.name), err_msg=field.name)

    def test_a_batch_without_events_is_a_message_too(self):
        (found,) = self.codec.decode(self.codec.encode(empty()))
        assert len(found) == 0
