"""An engine's stream under our hashes, decoded from its own messages, beside the manager's."""

import msgspec
import numpy as np
import pytest

from kvbm_jax.events import Consolidator, EngineCodec, Holder, Overlap, PrefixIndex, RecordingEventSink, Renamer
from kvbm_jax.events.schema import EventType, KvEventBatch
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.protocols import Tier

pytestmark = pytest.mark.core

SIZE = 4
TOKENS = list(range(50, 50 + 4 * SIZE))
OURS = hash_sequence(TOKENS, SIZE, salt="s")


class Engine:
    """Says what vLLM would, with hashes of 32 bytes."""

    def __init__(self, sink):
        self.sink = sink

    def tell(self, *events, dp_rank=0):
        for batch in EngineCodec("vllm").decode(msgspec.msgpack.encode([1.0, list(events), dp_rank])):
            self.sink.publish(batch)

    def stored(self, blocks, *, medium="GPU", tokens=True, lora=None, **more):
        first = blocks[0]
        self.tell(
            {
                "type": "BlockStored",
                "block_hashes": [name(b) for b in blocks],
                "parent_block_hash": name(first - 1) if first and tokens else None,
                "token_ids": [t for b in blocks for t in TOKENS[b * SIZE : (b + 1) * SIZE]] if tokens else [],
                "block_size": SIZE,
                "lora_id": None,
                "lora_name": lora,
                "medium": medium,
            },
            **more,
        )

    def removed(self, blocks, medium="GPU"):
        self.tell({"type": "BlockRemoved", "block_hashes": [name(b) for b in blocks], "medium": medium})


def name(block):
    return bytes([block + 1]) * 32


def found(index, hashes=OURS):
    return {holder: overlap.blocks for holder, overlap in index.find_matches(hashes).items()}


@pytest.fixture
def index():
    return PrefixIndex()


class ToIndex(RecordingEventSink):
    def __init__(self, index):
        super().__init__()
        self.index = index

    def publish(self, batch, /):
        super().publish(batch)
        self.index.apply(batch)


def test_an_engines_blocks_are_found_by_our_hashes(index):
    engine = Engine(Renamer(ToIndex(index), salt="s"))
    engine.stored([0, 1])
    engine.stored([2, 3])
    assert found(index) == {Holder("vllm"): 4}
    engine.removed([3])
    assert found(index) == {Holder("vllm"): 3}
    engine.stored([0], dp_rank=2)
    assert found(index) == {Holder("vllm"): 3, Holder("vllm", 2): 1}
    engine.tell({"type": "AllBlocksCleared"})
    assert found(index) == {Holder("vllm", 2): 1}
    engine.stored([1])
    assert found(index) == {Holder("vllm", 2): 1}, "its parent has no name any more"
    assert engine.sink.left_out == 1
    assert index.stats().missed == index.stats().unknown_deletes == 0


def test_loras_have_names_of_their_own(index):
    engine = Engine(Renamer(ToIndex(index)))
    engine.stored([0], lora="tuned")
    assert found(index, hash_sequence(TOKENS, SIZE, lora_name="tuned")) == {Holder("vllm"): 1}
    assert found(index, hash_sequence(TOKENS, SIZE)) == {}


def test_a_copy_told_without_tokens_has_the_name_of_the_first(index):
    sink = ToIndex(index)
    engine = Engine(Renamer(sink, salt="s"))
    engine.stored([0, 1])
    engine.stored([1], medium="CPU", tokens=False)
    assert sink.events[-1].tier is Tier.G2
    assert sink.events[-1].token_ids == tuple(TOKENS[SIZE : 2 * SIZE])
    assert sink.events[-1].parent_hash == sink.events[0].sequence_hash
    engine.removed([1])
    assert index.find_matches(OURS)[Holder("vllm")] == Overlap(2, {Tier.G1: 1, Tier.G2: 1})
    engine.removed([1], "CPU")
    engine.removed([1], "CPU")
    engine.stored([1], medium="CPU", tokens=False)
    assert found(index) == {Holder("vllm"): 1}
    assert engine.sink.left_out == 1


def test_an_engines_copy_and_the_managers_are_one_block(index):
    consolidator = Consolidator(ToIndex(index), worker_id="w", mode="merged")
    engine = Engine(Renamer(consolidator.source("engine"), salt="s"))
    manager = consolidator.source("manager")

    def tell(kind, blocks):
        parents = np.concatenate([np.zeros((1, 4), np.uint32), OURS])
        manager.publish(
            KvEventBatch.make(
                EventType(kind),
                blocks,
                worker_id="m",
                block_size=SIZE,
                first_event_id=0,
                timestamp=1,
                tier=Tier.G2,
                sequence_hashes=OURS[blocks],
                parent_hashes=parents[blocks],
            )
        )

    engine.stored([0, 1, 2])
    tell("created", [0, 1])
    engine.removed([1, 2])
    assert found(index) == {Holder("w"): 2}
    tell("deleted", [1])
    assert found(index) == {Holder("w"): 1}
    assert index.stats().claims == 1
