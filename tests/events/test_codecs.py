import json
import tracemalloc

import msgspec
import numpy as np
import pytest
from event_batches import FOREIGN, GOLDEN, H1, H2, H3, NATIVE, chain, rows
from native_codec import NativeCodec

from kvbm_jax.errors import EventDecodeError, LayoutError
from kvbm_jax.events import EventType, KvEvent, KvEventBatch
from kvbm_jax.events.codec import MAX_MESSAGE_BYTES, MAX_MESSAGE_EVENTS
from kvbm_jax.protocols import Tier

pytestmark = pytest.mark.core

ENGINE, DYNAMO = FOREIGN["engine"], FOREIGN["dynamo"]


def wire(block):
    return int.from_bytes(block[:8], "little")


def short(block):
    """What is left of a hash on wires of 64 bits."""
    return block[:8] + bytes(8)


class TestMsgpack(NativeCodec):
    codec = NATIVE["msgpack"]
    fields = staticmethod(msgspec.msgpack.decode)


class TestJson(NativeCodec):
    codec = NATIVE["json"]
    fields = staticmethod(msgspec.json.decode)


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"schema_version": 2}, "of schema version 2; this library reads 1 to 1: update the reader"),
        ({"schema_version": 0}, "of schema version 0"),
        ({"event_types": b"\x04"}, "event_types are numbers from 0 to 3; one is 4"),
        ({"tiers": b"\x05"}, "tiers are numbers from 0 to 4; one is 5"),
        ({"event_ids": b"\0\0\1"}, "event_ids has 3 bytes; 1 events have 8"),
        ({"token_ids": b"\1\0"}, "token_ids has 2 bytes, which is no multiple of 4"),
        ({"token_counts": b"\1\0\0\0"}, "token_offsets must be 2 rising numbers from 0 to 0"),
        ({"lora_names": ["a", "b"]}, "lora_names has 2 entries for 1 events"),
        ({"block_size": -1}, "Expected `int` >= 0"),
        ({"worker_id": 5}, "Expected `str`, got `int`"),
    ],
)
def test_msgpack_that_contradicts_itself_is_refused(fields, match):
    good = {"schema_version": 1, "worker_id": "w", "block_size": 4, "event_types": b"\0"}
    assert len(rows(NATIVE["msgpack"].decode(msgspec.msgpack.encode(good)))) == 1
    with pytest.raises(EventDecodeError, match=match):
        NATIVE["msgpack"].decode(msgspec.msgpack.encode(good | fields))


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"event_types": ["moved"]}, "Invalid enum value 'moved'"),
        ({"event_ids": [2**64]}, "out of bounds|too large|out of range"),
        ({"event_ids": [-1]}, "out of bounds"),
        ({"tiers": [300]}, "out of bounds"),
        ({"block_ids": [1, 2]}, "block_ids must be uint64"),
        ({"sequence_hashes": ["00 " * 10 + "00"]}, "matching regex"),
        ({"sequence_hashes": [H1.hex() + "\n"]}, "matching regex"),
        ({"sequence_hashes": [H1.hex()] * 2}, "sequence_hashes must be uint32"),
    ],
)
def test_json_that_contradicts_itself_is_refused(fields, match):
    good = {"schema_version": 1, "worker_id": "w", "block_size": 4, "event_types": ["created"]}
    assert len(rows(NATIVE["json"].decode(json.dumps(good).encode()))) == 1
    with pytest.raises(EventDecodeError, match=match):
        NATIVE["json"].decode(json.dumps(good | fields).encode())


def test_fields_of_the_future_are_passed_over():
    good = {"schema_version": 1, "worker_id": "w", "block_size": 4, "event_types": ["created"], "colour": "red"}
    assert len(rows(NATIVE["json"].decode(json.dumps(good).encode()))) == 1


@pytest.mark.parametrize("codec", [*NATIVE.values(), *FOREIGN.values()], ids=lambda codec: codec.name)
def test_very_long_messages_are_refused_before_they_are_read(codec):
    with pytest.raises(EventDecodeError, match="a message of 16,777,217 bytes; at most 16,777,216"):
        codec.decode(bytes(MAX_MESSAGE_BYTES + 1))


def told():
    """The events of the golden engine message."""
    shared = {"worker_id": "w-1", "timestamp": 1_700_000_000_500_000_000, "block_size": 4, "dp_rank": 3}
    created = {"event_type": EventType.CREATED, "tier": Tier.G2, "lora_name": "l", **shared}
    return [
        KvEvent(
            block_id=0,
            sequence_hash=short(H1),
            parent_hash=short(H3),
            token_ids=(5, 6, 4_000_000_000, 8),
            **created,
        ),
        KvEvent(
            block_id=0,
            sequence_hash=short(H2),
            parent_hash=short(H1),
            token_ids=(9, 10, 11, 12),
            event_id=1,
            **created,
        ),
        KvEvent(EventType.DELETED, 0, tier=Tier.G1, group_idx=5, sequence_hash=short(H3), event_id=2, **shared),
        KvEvent(EventType.CLEARED, 0, event_id=3, **shared),
    ]


MANY = MAX_MESSAGE_EVENTS + 1
HEAD = {"schema_version": 1, "worker_id": "w", "block_size": 4}


def stored(**fields):
    """A BlockStored of another writer."""
    usual = {"block_hashes": [5], "parent_block_hash": None, "token_ids": [1], "block_size": 1}
    return {"type": "BlockStored", **usual, **fields}


@pytest.mark.parametrize(
    ("codec", "data"),
    [
        (NATIVE["msgpack"], msgspec.msgpack.encode({**HEAD, "event_types": bytes(MANY)})),
        (NATIVE["msgpack"], msgspec.msgpack.encode({**HEAD, "event_types": b"\0", "metadata": [{}] * MANY})),
        (NATIVE["json"], msgspec.json.encode({**HEAD, "event_types": ["created"] * MANY})),
        (ENGINE, msgspec.msgpack.encode([1.0, [stored(block_hashes=[1] * MANY, token_ids=[])]])),
        (ENGINE, msgspec.msgpack.encode([1.0, [stored(block_hashes=[1] * (MANY // 2 + 1), token_ids=[])] * 2])),
        (ENGINE, msgspec.msgpack.encode([1.0, [{"type": "BlockRemoved", "block_hashes": [2**40] * MANY}]])),
        (DYNAMO, msgspec.json.encode({"event_id": 0, "data": {"removed": {"block_hashes": [1] * MANY}}})),
    ],
    ids=["msgpack", "msgpack metadata", "json", "engine", "engine in parts", "engine wide", "dynamo"],
)
def test_short_messages_of_very_many_events_are_refused(codec, data):
    tracemalloc.start()
    try:
        with pytest.raises(EventDecodeError, match=r"at most 1,048,576 are read|length <= 1048576"):
            codec.decode(data)
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


def test_errors_do_not_quote_whole_messages():
    for codec, data in [
        (ENGINE, msgspec.msgpack.encode([1.0, [stored(medium="x" * 1_000_000)]])),
        (NATIVE["json"], msgspec.json.encode({**HEAD, "event_types": ["x" * 1_000_000]})),
    ]:
        with pytest.raises(EventDecodeError) as told:
            codec.decode(data)
        assert len(str(told.value)) < 500


def test_ids_that_would_not_fit_are_refused():
    data = msgspec.msgpack.encode([1.0, [stored()]])
    assert [event.event_id for event in ENGINE.decode(data, 2**64 - 1)[0]] == [2**64 - 1]
    with pytest.raises(EventDecodeError, match="more than 64 bits can count"):
        ENGINE.decode(data, 2**64)


def test_engine_messages_are_the_golden_bytes():
    batch = KvEventBatch.from_events(told())
    assert ENGINE.encode(batch) == GOLDEN["engine"]
    assert rows(ENGINE.decode(GOLDEN["engine"])) == told()


def test_engine_messages_of_many_blocks_are_the_golden_bytes():
    hashes = np.zeros((16, 2), "<u8")
    hashes[:, 0] = 2**63 + np.arange(16, dtype=np.uint64)
    hashes = hashes.view(np.uint32)
    batch = KvEventBatch.make(
        EventType.CREATED,
        np.arange(16),
        worker_id="w-1",
        block_size=8,
        first_event_id=0,
        timestamp=1_700_000_000_500_000_000,
        sequence_hashes=hashes,
        parent_hashes=np.concatenate([np.zeros((1, 4), np.uint32), hashes[:-1]]),
        token_ids=np.arange(128, dtype=np.uint32).reshape(16, 8),
    )
    assert ENGINE.encode(batch) == GOLDEN["engine_wide"]
    (found,) = ENGINE.decode(GOLDEN["engine_wide"])
    np.testing.assert_array_equal(found.sequence_hashes, hashes)
    np.testing.assert_array_equal(found.parent_hashes, batch.parent_hashes)
    assert found.token_ids.tolist() == list(range(128))
    shortest = msgspec.msgpack.encode(msgspec.msgpack.decode(GOLDEN["engine_wide"]))
    assert len(shortest) < len(GOLDEN["engine_wide"])
    assert rows(ENGINE.decode(shortest)) == rows([found])


def test_engine_reads_signed_hashes_and_other_media():
    first, second, removed = rows(ENGINE.decode(GOLDEN["engine_sglang"]))
    assert first.sequence_hash == (2**64 - 2).to_bytes(8, "little") + bytes(8)
    assert first.parent_hash == b"\xff" * 8 + bytes(8)
    assert (first.tier, second.tier, removed.tier) == (Tier.G2, Tier.G2, Tier.G3)
    assert first.dp_rank == 0


def test_engine_reads_hashes_as_bytes():
    first, second, removed = rows(ENGINE.decode(GOLDEN["engine_bytes"]))
    assert (first.sequence_hash, second.sequence_hash, removed.sequence_hash) == (H1, H2, H3)
    assert (first.parent_hash, second.parent_hash) == (b"\x07" + bytes(15), H1)
    assert removed.tier is Tier.G1


def test_engine_reads_the_older_form():
    events = rows(ENGINE.decode(GOLDEN["engine_arrays"]))
    assert [event.event_type.value for event in events] == ["created"] * 3 + ["deleted", "cleared"]
    assert [event.tier for event in events] == [Tier.G1, Tier.G1, Tier.G2, Tier.G2, None]
    assert [event.lora_name for event in events] == [None, None, "2", None, None]
    assert events[1].parent_hash == short(H1)
    assert events[2].token_ids == (9, 10, 11, 12)


def test_engine_is_told_of_moves_as_stored_below_then_removed_above():
    batch = KvEventBatch.from_events(
        [
            KvEvent(
                EventType.MIGRATED,
                1,
                "w-1",
                0,
                tier=Tier.G3,
                from_tier=Tier.G2,
                sequence_hash=H1,
                token_ids=(1, 2),
                block_size=2,
            ),
            KvEvent(EventType.MIGRATED, 1, "w-1", 0, tier=Tier.G1, to_worker="w-2", sequence_hash=H2, block_size=2),
            KvEvent(EventType.CLEARED, 0, "w-1", 0, tier=Tier.G2, block_size=2),
        ]
    )
    _, events, _ = msgspec.msgpack.decode(ENGINE.encode(batch))
    assert [(event["type"], event["medium"]) for event in events] == [
        ("BlockStored", "STORAGE"),
        ("BlockRemoved", "CPU"),
        ("BlockRemoved", "GPU"),
        ("AllBlocksCleared", "CPU"),
    ]
    assert [(event.event_type, event.tier) for event in rows(ENGINE.decode(ENGINE.encode(batch)))] == [
        (EventType.CREATED, Tier.G3),
        (EventType.DELETED, Tier.G2),
        (EventType.DELETED, Tier.G1),
        (EventType.CLEARED, Tier.G2),
    ]


def test_engine_messages_are_cut_where_the_chain_breaks():
    batch = KvEventBatch.from_events([*chain(3), *chain(2, seed=1)])
    _, events, _ = msgspec.msgpack.decode(ENGINE.encode(batch))
    assert [len(event["block_hashes"]) for event in events] == [3, 2]
    assert [event["parent_block_hash"] for event in events] == [None, None]


def test_blocks_of_other_sizes_are_batches_of_their_own():
    stored = {"type": "BlockStored", "parent_block_hash": None, "lora_id": None, "medium": "GPU", "lora_name": None}
    data = msgspec.msgpack.encode(
        [
            0.0,
            [
                {**stored, "block_hashes": [1], "token_ids": [1, 2], "block_size": 2},
                {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU"},
                {**stored, "block_hashes": [2], "token_ids": [1, 2, 3], "block_size": 3},
                {**stored, "block_hashes": [], "token_ids": [], "block_size": 3},
            ],
            None,
        ]
    )
    batches = ENGINE.decode(data)
    assert [(batch.block_size, len(batch)) for batch in batches] == [(2, 2), (3, 1)]


@pytest.mark.parametrize(
    ("event", "match"),
    [
        ({"type": "BlockMoved"}, "Invalid value 'BlockMoved'"),
        ({"type": "BlockRemoved", "block_hashes": [1], "medium": "TAPE"}, "medium 'TAPE' is none of GPU, CPU"),
        ({"type": "BlockRemoved", "block_hashes": [b""], "medium": "GPU"}, "a hash of no bytes"),
        ({"type": "BlockRemoved", "block_hashes": [1.5], "medium": "GPU"}, "Expected `int | bytes`"),
        ({"type": "BlockRemoved", "block_hashes": 5, "medium": "GPU"}, "Expected `array`"),
        ({"token_ids": [1, 2, 3]}, "3 tokens for 1 blocks of 4"),
        ({"token_ids": [1, 2, 3, -1]}, "Expected `int` >= 0"),
        ({"token_ids": [1, 2, 3, 2**32]}, "Expected `int` <= 4294967295"),
        ({"block_size": 0}, "4 tokens for 1 blocks of 0"),
        ({"group_idx": -1}, "out of bounds"),
    ],
)
def test_engine_messages_that_contradict_themselves_are_refused(event, match):
    stored = {
        "type": "BlockStored",
        "block_hashes": [1],
        "parent_block_hash": None,
        "token_ids": [1, 2, 3, 4],
        "block_size": 4,
    }
    event = event if "type" in event else stored | event
    with pytest.raises(EventDecodeError, match=match):
        ENGINE.decode(msgspec.msgpack.encode([0.0, [event], 0]))


@pytest.mark.parametrize(
    ("head", "match"),
    [((float("nan"), [], 0), "time of the message"), ((-1.0, [], 0), "Unix time"), ((0.0, [], -1), "dp_rank = -1")],
)
def test_engine_envelopes_must_make_sense(head, match):
    with pytest.raises(EventDecodeError, match=match):
        ENGINE.decode(msgspec.msgpack.encode(head))
    assert ENGINE.decode(msgspec.msgpack.encode([0.0, []])) == ()


def test_dynamo_lines_are_the_golden_bytes():
    shared = {"worker_id": "w-1", "timestamp": 0, "block_size": 4, "dp_rank": 3}
    batch = KvEventBatch.from_events(
        [
            KvEvent(
                EventType.CREATED,
                1,
                tier=Tier.G1,
                sequence_hash=H1,
                parent_hash=H3,
                token_ids=(1, 2, 3, 4),
                event_id=8,
                **shared,
            ),
            KvEvent(
                EventType.CREATED,
                2,
                tier=Tier.G1,
                sequence_hash=H2,
                parent_hash=H1,
                token_ids=(5, 6, 7, 8),
                event_id=9,
                **shared,
            ),
            KvEvent(EventType.DELETED, 3, tier=Tier.G1, sequence_hash=H3, event_id=10, **shared),
            KvEvent(EventType.CLEARED, 0, event_id=11, **shared),
        ]
    )
    assert DYNAMO.encode(batch) == GOLDEN["dynamo"]
    found = DYNAMO.decode(GOLDEN["dynamo"])
    assert [event.sequence_hash for event in rows(found)] == [short(H1), short(H2), short(H3), None]
    assert [event.parent_hash for event in rows(found)] == [short(H3), short(H1), None, None]
    assert [event.event_id for event in rows(found)] == [8, 9, 10, 11]
    assert b"".join(DYNAMO.encode(batch) for batch in found) == GOLDEN["dynamo"]


def test_dynamo_is_told_nothing_of_moves_within_a_worker():
    event = KvEvent(EventType.MIGRATED, 0, "w", 0, tier=Tier.G2, from_tier=Tier.G1, sequence_hash=H1)
    assert DYNAMO.encode(KvEventBatch.from_events([event])) == b""


@pytest.mark.parametrize("codec", [ENGINE, DYNAMO], ids=lambda codec: codec.name)
def test_blocks_without_a_hash_have_no_name_in_other_languages(codec):
    event = KvEvent(EventType.CREATED, 0, "w", 0, tier=Tier.G1, token_ids=(1,), block_size=1)
    with pytest.raises(LayoutError, match="event 0 has no hash"):
        codec.encode(KvEventBatch.from_events([event]))


def test_what_dynamo_cannot_be_told_is_refused():
    event = KvEvent(EventType.CREATED, 0, "w", 0, tier=Tier.G1, sequence_hash=H1, block_size=1)
    with pytest.raises(LayoutError, match="have no token_ids"):
        DYNAMO.encode(KvEventBatch.from_events([event]))
    with pytest.raises(LayoutError, match="g2 alone is empty"):
        DYNAMO.encode(KvEventBatch.from_events([KvEvent(EventType.CLEARED, 0, "w", 0, tier=Tier.G2)]))
