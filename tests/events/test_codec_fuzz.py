"""Decoders are total: whatever the bytes, they give batches or `EventDecodeError`, in bounded memory."""

import random
import resource
import sys

import pytest
from event_batches import FOREIGN, GOLDEN, NATIVE, chain, story

from kvbm_jax.errors import EventDecodeError
from kvbm_jax.transports.protobuf import ProtobufCodec

CODECS = {**NATIVE, **FOREIGN, "protobuf": ProtobufCodec()}
# Lengths and markers that decoders of these formats stumble over.
HOSTILE = (
    b"\xff" * 4,
    b"\xdd\xff\xff\xff\xff",  # MessagePack: an array of four thousand million
    b"\xdf\x7f\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\xcf" + b"\xff" * 8,
    b"\xd3\x80" + bytes(7),
    b"\xc0",
    b"\xcb\x7f\xf8" + bytes(6),  # not a number
    b"\x91" * 64,
    b"[" * 64,
    b'{"' * 16,
    b"1e400",
    b"-1",
    b"18446744073709551616",
    b"9" * 5000,
    b'"\\ud800"',
    b"null",
    b"\xff\xff\xff\xff\x0f",  # Protocol Buffers: a length of 4 GiB
    b"\x0b" * 64,
)


def seeds(codec):
    found = [data for name, data in GOLDEN.items() if name.startswith(codec.name)]
    batch = story() if codec.name not in FOREIGN else chain(2)
    return [*found, codec.encode(batch), codec.encode(chain(12))]


def mutate(rng, data, others):
    """One message with a few things wrong with it."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1 if at < len(data):
                data[at] = rng.randrange(256)
            case 2:
                del data[at : at + rng.randint(1, 16)]
            case 3:
                data[at:at] = rng.choice(HOSTILE)
            case 4:
                data[at : at + 5] = rng.choice(HOSTILE)
            case _:
                other = rng.choice(others)
                start = rng.randrange(len(other))
                data[at : at + rng.randint(0, 9)] = other[start : start + rng.randint(1, 32)]
    return bytes(data)


def attack(codec, count):
    """Decodes mutated messages; returns how many were refused."""
    rng = random.Random(codec.name)
    good = seeds(codec)
    refused = 0
    for _ in range(count):
        data = mutate(rng, rng.choice(good), good)
        try:
            for batch in codec.decode(data):
                assert len(list(batch)) == len(batch)
        except EventDecodeError:
            refused += 1
    return refused


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
def test_mutated_messages_give_events_or_the_one_error(codec):
    refused = attack(codec, 20_000)
    assert 0 < refused < 20_000


@pytest.mark.soak
@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
def test_a_million_mutated_messages(codec):
    attack(codec, 1000)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = attack(codec, 1_000_000)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert 0 < refused < 1_000_000
    assert grown < (200 << 10 if sys.platform == "linux" else 200 << 20)  # KiB on Linux, bytes elsewhere
