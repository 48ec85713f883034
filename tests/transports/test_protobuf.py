import importlib.resources
import subprocess
import sys

import pytest
from google.protobuf import descriptor_pb2
from native_codec import NativeCodec

from kvbm_jax.errors import EventDecodeError
from kvbm_jax.transports.protobuf import ProtobufCodec, proto_source

CODEC = ProtobufCodec()


class TestProtobuf(NativeCodec):
    codec = CODEC


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"\xff", "no protobuf message of events"),
        (b"", "of schema version 0"),
        (b"\x08\x02", "of schema version 2; this library reads 1 to 1: update the reader"),
        (b"\x08\x01\x2a\x01\x04", "event_types are numbers from 0 to 3; one is 4"),
        (b"\x08\x01\x2a\x01\x00\x4a\x01\x05", "tiers are numbers from 0 to 4; one is 5"),
        (b"\x08\x01\x2a\x01\x00\x4a\x02\x80\x02", "out of bounds"),
        (b"\x08\x01\x2a\x01\x00\x5a\x01\x00", "sequence_hashes has 1 bytes; 1 events have 16"),
        (b"\x08\x01\x2a\x01\x00\x6a\x01\x05", "token_offsets must be 2 rising numbers from 0 to 0"),
    ],
)
def test_messages_that_contradict_themselves_are_refused(data, match):
    with pytest.raises(EventDecodeError, match=match):
        CODEC.decode(data)


def test_the_published_file_is_what_the_codec_uses(tmp_path):
    (tmp_path / "kv_events.proto").write_text(proto_source())
    compiled = tmp_path / "compiled"
    protoc = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(tmp_path), f"--descriptor_set_out={compiled}"]
    subprocess.run([*protoc, "kv_events.proto"], check=True)
    shipped = (importlib.resources.files("kvbm_jax.transports") / "kv_events.binpb").read_bytes()
    parse = descriptor_pb2.FileDescriptorSet.FromString
    assert parse(compiled.read_bytes()) == parse(shipped)
