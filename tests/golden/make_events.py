"""Writes `events.json`: `python tests/golden/make_events.py`. Shares no code with `kvbm_jax`.

Each case is one message, in hexadecimal, as `docs/events.md` has it put together: with the msgspec package and the json
module of the standard library for their formats, and for Protocol Buffers by hand.
"""

import json
import pathlib
import struct

import msgspec

FILE = pathlib.Path(__file__).with_name("events.json")

H1, H2, H3 = (bytes(range(first, first + 16)) for first in (1, 33, 200))
T1, T2 = [5, 6, 4_000_000_000, 8], [9, 10, 11, 12]


def u8(*values):
    return bytes(values)


def u32(*values):
    return struct.pack(f"<{len(values)}I", *values)


def u64(*values):
    return struct.pack(f"<{len(values)}Q", *values)


def wire(block):
    return int.from_bytes(block[:8], "little")


# Two blocks of a sequence arrive in host memory, where block 7 came from the device; then a block goes, then all.
COMMON = {"schema_version": 1, "worker_id": "w-1", "block_size": 4, "dp_rank": 3}
NAMES = {
    "lora_names": ["l", None, None, None],
    "to_workers": [None, None, "w-2", None],
    "metadata": [{"why": "new"}, {}, {}, {}],
}
IDS, TIME, BLOCKS = (2**40, 2**40 + 1, 2**40 + 2, 2**40 + 3), 1_700_000_000_123_456_789, (70, 2**63, 9, 0)

MSGPACK = msgspec.msgpack.encode(
    COMMON
    | NAMES
    | {
        "event_types": u8(0, 2, 1, 3),
        "event_ids": u64(*IDS),
        "timestamps": u64(*[TIME] * 4),
        "block_ids": u64(*BLOCKS),
        "tiers": u8(2, 2, 1, 0),
        "group_idx": u32(0, 0, 5, 0),
        "sequence_hashes": H1 + H2 + H3 + bytes(16),
        "parent_hashes": bytes(16) + H1 + bytes(32),
        "token_counts": u32(4, 4, 0, 0),
        "token_ids": u32(*T1, *T2),
        "from_tiers": u8(0, 1, 0, 0),
        "from_block_ids": u64(0, 7, 0, 0),
    }
)

JSON = json.dumps(
    COMMON
    | NAMES
    | {
        "event_types": ["created", "migrated", "deleted", "cleared"],
        "event_ids": IDS,
        "timestamps": [TIME] * 4,
        "block_ids": BLOCKS,
        "tiers": [2, 2, 1, 0],
        "group_idx": [0, 0, 5, 0],
        "sequence_hashes": [H1.hex(), H2.hex(), H3.hex(), None],
        "parent_hashes": [None, H1.hex(), None, None],
        "token_counts": [4, 4, 0, 0],
        "token_ids": T1 + T2,
        "from_tiers": [0, 1, 0, 0],
        "from_block_ids": [0, 7, 0, 0],
    },
    separators=(",", ":"),
).encode()


def varint(value):
    out = b""
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def scalar(number, value):
    return varint(number << 3) + varint(value)


def blob(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data


def packed(number, values):
    return blob(number, b"".join(varint(value) for value in values))


PROTOBUF = b"".join(
    [
        scalar(1, 1),
        blob(2, b"w-1"),
        scalar(3, 4),
        scalar(4, 3),
        packed(5, (0, 2, 1, 3)),
        blob(6, u64(*IDS)),
        blob(7, u64(*[TIME] * 4)),
        packed(8, BLOCKS),
        packed(9, (2, 2, 1, 0)),
        packed(10, (0, 0, 5, 0)),
        blob(11, H1 + H2 + H3 + bytes(16)),
        blob(12, bytes(16) + H1 + bytes(32)),
        packed(13, (4, 4, 0, 0)),
        packed(14, T1 + T2),
        packed(15, (0, 1, 0, 0)),
        packed(16, (0, 7, 0, 0)),
        *(blob(17, name) for name in (b"l", b"", b"", b"")),
        *(blob(18, name) for name in (b"", b"", b"w-2", b"")),
        *(blob(19, entry) for entry in (blob(1, blob(1, b"why") + blob(2, b"new")), b"", b"", b"")),
    ]
)

STORED = {
    "type": "BlockStored",
    "block_hashes": [wire(H1), wire(H2)],
    "parent_block_hash": wire(H3),
    "token_ids": T1 + T2,
    "block_size": 4,
    "lora_id": None,
    "medium": "CPU",
    "lora_name": "l",
}
REMOVED = {"type": "BlockRemoved", "block_hashes": [wire(H3)], "medium": "GPU", "group_idx": 5}
ENGINE = msgspec.msgpack.encode([1_700_000_000.5, [STORED, REMOVED, {"type": "AllBlocksCleared"}], 3])
# Sixteen blocks in one event, whose integers our writer puts in their widest form.
MANY = [2**63 + i for i in range(16)]
WIDE = b"".join(
    [
        bytes.fromhex("93cb") + struct.pack(">d", 1_700_000_000.5) + b"\x91\x88",
        *(msgspec.msgpack.encode(part) for part in ("type", "BlockStored", "block_hashes")),
        b"\xdc\x00\x10" + b"".join(struct.pack(">BQ", 0xCF, value) for value in MANY),
        *(msgspec.msgpack.encode(part) for part in ("parent_block_hash", None, "token_ids")),
        b"\xdc\x00\x80" + b"".join(struct.pack(">BI", 0xCE, value) for value in range(128)),
        *(
            msgspec.msgpack.encode(part)
            for part in ("block_size", 8, "lora_id", None, "medium", "GPU", "lora_name", None)
        ),
        b"\x00",
    ]
)
# What others write: SGLang's media and signed hashes, vLLM's bytes, and arrays as engines wrote them until 2025.
SGLANG = msgspec.msgpack.encode(
    [
        1_700_000_000.5,
        [
            {**STORED, "block_hashes": [-2, wire(H2)], "parent_block_hash": -1, "medium": "CPU_PINNED"},
            {"type": "BlockRemoved", "block_hashes": [-3], "medium": "DISK"},
        ],
    ]
)
VLLM_BYTES = msgspec.msgpack.encode(
    [
        1_700_000_000.5,
        [
            {
                **STORED,
                "block_hashes": [H1 + b"beyond sixteen", H2],
                "parent_block_hash": b"\x07",
                "extra_keys": None,
                "kv_cache_spec_kind": "full",
            },
            {"type": "BlockRemoved", "block_hashes": [H3], "medium": None},
        ],
        3,
    ]
)
ARRAYS = msgspec.msgpack.encode(
    [
        1_700_000_000.5,
        [
            ["BlockStored", [wire(H1), wire(H2)], wire(H3), T1 + T2, 4, None],
            ["BlockStored", [wire(H3)], None, T2, 4, 2, "CPU"],
            ["BlockRemoved", [wire(H3)], "CPU"],
            ["AllBlocksCleared"],
        ],
        3,
    ]
)

DYNAMO = b"".join(
    json.dumps(line, separators=(",", ":")).encode() + b"\n"
    for line in (
        {
            "event_id": 8,
            "data": {
                "stored": {
                    "parent_hash": wire(H3),
                    "blocks": [  # of the tokens 1 to 4 and 5 to 8: Dynamo's own published hashes
                        {"block_hash": wire(H1), "tokens_hash": 14643705804678351452},
                        {"block_hash": wire(H2), "tokens_hash": 16777012769546811212},
                    ],
                }
            },
            "dp_rank": 3,
        },
        {"event_id": 10, "data": {"removed": {"block_hashes": [wire(H3)]}}, "dp_rank": 3},
        {"event_id": 11, "data": "cleared", "dp_rank": 3},
    )
)

if __name__ == "__main__":
    cases = {
        "msgpack": MSGPACK,
        "json": JSON,
        "protobuf": PROTOBUF,
        "engine": ENGINE,
        "engine_wide": WIDE,
        "engine_sglang": SGLANG,
        "engine_bytes": VLLM_BYTES,
        "engine_arrays": ARRAYS,
        "dynamo": DYNAMO,
    }
    text = json.dumps({name: data.hex() for name, data in cases.items()}, indent=1)
    FILE.write_text(text + "\n")
