"""Writes `hashes.json`: `python tests/golden/make_hashes.py`.

The BLAKE3 values come from the few lines below, which share no code with `kvbm_jax.hashing` nor with the
blake3 package: they follow the published specification, for inputs of one chunk (up to 1,024 bytes). The XXH3
values come from the xxhash package, applied literally; the first case holds Dynamo's own published numbers.
"""

import json
import pathlib
import struct

import xxhash

IV = (0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A, 0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19)
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
COLUMNS = ((0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15))
DIAGONALS = ((0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14))
CHUNK_START, CHUNK_END, ROOT, KEYED = 1, 2, 8, 16
FILE = pathlib.Path(__file__).with_name("hashes.json")


def rotate(value, bits):
    return ((value >> bits) | (value << (32 - bits))) & 0xFFFFFFFF


def compress(chaining, message, length, flags):
    v = [*chaining, *IV[:4], 0, 0, length, flags]
    for _ in range(7):
        for i, (a, b, c, d) in enumerate(COLUMNS + DIAGONALS):
            for word, turn_d, turn_b in ((message[2 * i], 16, 12), (message[2 * i + 1], 8, 7)):
                v[a] = (v[a] + v[b] + word) & 0xFFFFFFFF
                v[d] = rotate(v[d] ^ v[a], turn_d)
                v[c] = (v[c] + v[d]) & 0xFFFFFFFF
                v[b] = rotate(v[b] ^ v[c], turn_b)
        message = [message[i] for i in PERMUTATION]
    return [v[i] ^ v[i + 8] for i in range(8)]


def blake3_one_chunk(data, key=None):
    assert len(data) <= 1024
    mode = 0 if key is None else KEYED
    chaining = IV if key is None else struct.unpack("<8I", key)
    blocks = [data[i : i + 64] for i in range(0, len(data), 64)] or [b""]
    for i, block in enumerate(blocks):
        flags = mode | (CHUNK_START if i == 0 else 0) | (CHUNK_END | ROOT if i == len(blocks) - 1 else 0)
        words = struct.unpack("<16I", block.ljust(64, b"\0"))
        chaining = compress(chaining, words, len(block), flags)
    return struct.pack("<8I", *chaining)


def pack(value):
    """MessagePack of what an `extra` can hold, in the shortest encodings."""
    if value is None:
        return b"\xc0"
    if isinstance(value, int):
        return bytes([value]) if value < 128 else b"\xcc" + bytes([value])
    if isinstance(value, str):
        data = value.encode()
        return (bytes([0xA0 | len(data)]) if len(data) < 32 else b"\xd9" + bytes([len(data)])) + data
    if isinstance(value, bytes):
        return b"\xc4" + bytes([len(value)]) + value
    assert len(value) < 16
    return bytes([0x90 | len(value)]) + b"".join(pack(item) for item in value)


def little(tokens):
    return struct.pack(f"<{len(tokens)}I", *tokens)


def blake3_case(tokens, block_size, salt="", lora_name=None, multimodal=()):
    key = blake3_one_chunk(b"kvbm_jax/v1/" + salt.encode())
    parent, hashes = bytes(16), []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        found = sorted([p - start, h] for p, h in multimodal if start <= p < start + block_size)
        extra = pack([lora_name, found]) if lora_name or found else b""
        parent = blake3_one_chunk(parent + little(tokens[start : start + block_size]) + extra, key)[:16]
        hashes.append(parent.hex())
    return hashes


def xxh3_case(tokens, block_size, salt="", lora_name=None):
    seed = 1337
    seed += xxhash.xxh3_64_intdigest(lora_name.encode(), 0) if lora_name else 0
    seed += xxhash.xxh3_64_intdigest(salt.encode(), 1) if salt else 0
    seed %= 2**64
    blocks, hashes = [], []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        blocks.append(xxhash.xxh3_64_intdigest(little(tokens[start : start + block_size]), seed))
        pair = struct.pack("<QQ", hashes[-1], blocks[-1]) if hashes else None
        hashes.append(xxhash.xxh3_64_intdigest(pair, seed) if pair else blocks[-1])
    return blocks, [struct.pack("<QQ", h, 0).hex() for h in hashes]


def cases():
    ramp, large = list(range(1, 9)), [2**32 - 1 - i * i for i in range(133)]
    plain = [
        {"tokens": ramp, "block_size": 4},
        {"tokens": ramp, "block_size": 3},
        {"tokens": [0], "block_size": 1},
        {"tokens": large, "block_size": 64},
        {"tokens": ramp, "block_size": 4, "salt": "tenant é"},
        {"tokens": ramp, "block_size": 4, "lora_name": "adapter/1"},
        {"tokens": ramp, "block_size": 4, "lora_name": "x" * 40, "salt": "s"},
    ]
    with_images = [
        {"tokens": ramp, "block_size": 4, "multimodal": [[5, "00ff"]]},
        {"tokens": ramp, "block_size": 4, "multimodal": [[3, "bb"], [3, "aa"], [0, "cc"]], "lora_name": "a"},
        {"tokens": large, "block_size": 132, "multimodal": [[131, "ab" * 32]], "salt": "s"},
    ]
    for case in plain + with_images:
        images = [(p, bytes.fromhex(h)) for p, h in case.get("multimodal", ())]
        yield "blake3", case, {"hashes": blake3_case(**(case | {"multimodal": images}))}
    for case in plain:
        blocks, hashes = xxh3_case(**case)
        yield "xxh3_64", case, {"hashes": hashes, "block_hashes": blocks}


def build():
    return [{"algorithm": algorithm, **case, **expected} for algorithm, case, expected in cases()]


if __name__ == "__main__":
    lines = ",\n".join(json.dumps(case) for case in build())
    FILE.write_text(f"[\n{lines}\n]\n")
