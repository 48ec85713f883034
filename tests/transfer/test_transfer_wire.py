"""Connections between workers: who may come, and that no bytes of a stranger do more than end a connection."""

import contextlib
import logging
import os
import socket
import stat
import struct
import subprocess
import threading

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvbm_jax.errors import ConfigError, FrameError, PeerLostError, TransferError
from kvbm_jax.protocols import Slots
from kvbm_jax.transfer.access import SocketConfig, greet, welcome
from kvbm_jax.transfer.frames import Done, Frames, ReadSlots, Refused, WriteSlots, ids_from, packed
from kvbm_jax.transfer.listener import Listener, connect
from kvbm_jax.transfer.streams import stream_of
from kvbm_jax.transfer.tcp import TcpEngine

ANY = msgspec.msgpack.Decoder(Done | Refused)
REQUESTS = msgspec.msgpack.Decoder(ReadSlots | WriteSlots)
TOKEN = b"a token of workers, long enough"


@pytest.fixture(autouse=True)
def runtime(tmp_path, monkeypatch):
    """A runtime folder of the test's own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path / "kvbm_jax"


@pytest.fixture
def ends():
    """Two ends of one connection."""
    here, there = (stream_of(end) for end in socket.socketpair())
    with contextlib.ExitStack() as stack:
        stack.callback(here.cut)
        stack.callback(there.cut)
        yield here, there


@pytest.fixture
def echo():
    """A listener that answers every request with what it is."""

    def serve(frames, peer):
        while True:
            frames.send(Refused(f"{peer} sends {type(frames.receive(REQUESTS)).__name__}"))

    with Listener("test", SocketConfig(), serve) as listener:
        yield listener


def frame(body, magic=b"KVT1", length=None):
    return struct.pack("<4sI", magic, len(body) if length is None else length) + body


def test_messages_come_as_they_were_sent(ends):
    here, there = map(Frames, ends)
    message = ReadSlots(Slots(7, 100, 10, 50, 3), packed(np.array([2, 0], np.int32)), b"done")
    here.send(message)
    found = there.receive(REQUESTS)
    assert found == message
    assert ids_from(found.ids).tolist() == [2, 0]


def test_bytes_behind_a_message_fill_buffers_of_any_size(ends):
    here, there = ends
    data = np.random.default_rng(0).integers(0, 256, 3_000_000, np.uint8)
    thread = threading.Thread(
        target=Frames(here).send, args=(Done(), [memoryview(part) for part in np.split(data, 600)])
    )
    thread.start()
    Frames(there).receive(ANY)
    found = np.zeros_like(data)
    there.receive([memoryview(part) for part in np.split(found, 1_000)])
    thread.join()
    np.testing.assert_array_equal(found, data)


MALFORMED = [
    (frame(b"", magic=b"HTTP"), "begins with b'HTTP'"),
    (frame(b"", length=1 << 25), "33,554,432 bytes; at most 16,777,216"),
    (frame(b"\xc1"), "no message"),
    (frame(b""), "no message"),
    (frame(msgspec.msgpack.encode({"is": "run", "code": "1"})), "no message"),
    (frame(msgspec.msgpack.encode({"is": "read", "slots": 1, "ids": b"", "notice": b""})), "no message"),
    (frame(msgspec.msgpack.encode(Done())), "no message"),
    (frame(b"\x91" * 100_000), "no message"),
    (frame(b"\x81\xa2is\xa1\xff"), "no message"),  # no UTF-8
]


@pytest.mark.parametrize(("sent", "message"), MALFORMED)
def test_what_is_no_frame_is_refused(ends, sent, message):
    here, there = ends
    here.send([memoryview(sent)])
    with pytest.raises(FrameError, match=message):
        Frames(there).receive(REQUESTS)


def test_ids_of_half_a_number_are_refused():
    with pytest.raises(FrameError, match="5 bytes"):
        ids_from(b"12345")


@settings(max_examples=200)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_typed_error_or_a_message(body):
    here, there = (stream_of(end) for end in socket.socketpair())
    try:
        here.send([memoryview(frame(body))])
        with contextlib.suppress(FrameError):
            Frames(there).receive(REQUESTS)
    finally:
        here.cut()
        there.cut()


def test_a_frame_that_breaks_off_is_a_lost_peer(ends):
    here, there = ends
    here.send([memoryview(frame(b"", length=100)), memoryview(b"half")])
    here.cut()
    with pytest.raises(PeerLostError, match="closed"):
        Frames(there).receive(REQUESTS)


def test_a_peer_that_stays_silent_is_lost_in_time(ends):
    _, there = ends
    there.patience(0.05)
    with pytest.raises(PeerLostError, match="waiting for too long"):
        Frames(there).receive(REQUESTS)


def meeting(ends, server_token, client_token):
    """What becomes of both ends of a greeting: an error, or the client's name."""
    found = {}

    def serve():
        try:
            found["server"] = welcome(ends[1], server_token)
        except TransferError as error:
            found["server"] = error
            ends[1].cut()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        found["client"] = greet(ends[0], client_token, "me")
    except TransferError as error:
        found["client"] = error
        ends[0].cut()
    thread.join()
    return found


def test_ends_that_know_the_token_meet(ends):
    assert meeting(ends, TOKEN, TOKEN) == {"server": "me", "client": None}


def test_a_server_without_the_token_learns_nothing(ends):
    found = meeting(ends, b"another token entirely", TOKEN)
    assert "does not know this worker's token" in str(found["client"])
    assert isinstance(found["server"], PeerLostError)


def test_a_client_without_the_token_is_refused(ends):
    """One that does not care what the server knows."""
    from kvbm_jax.transfer import access

    errors = []

    def serve():
        try:
            welcome(ends[1], TOKEN)
        except TransferError as error:
            errors.append(error)

    thread = threading.Thread(target=serve)
    thread.start()
    frames = Frames(ends[0])
    frames.ask(access._Hello(access.PROTOCOL_VERSION, "me", bytes(32)), access._CHALLENGE)
    frames.send(access._Proof(bytes(32)))
    assert frames.receive(ANY) == Refused("the token is another")
    thread.join()
    assert "'me' does not know" in str(errors[0])


def test_another_version_is_refused(ends):
    from kvbm_jax.transfer import access

    Frames(ends[0]).send(access._Hello(99, "me", bytes(32)))
    with pytest.raises(FrameError, match="version 99; known is 1"):
        welcome(ends[1], TOKEN)


def test_the_token_of_a_user_is_made_once_and_for_the_user_alone(runtime):
    first = SocketConfig().token()
    assert SocketConfig().token() == first
    assert len(first) == 64
    (file,) = runtime.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_listening_beyond_loopback_needs_a_token(tmp_path):
    with pytest.raises(ConfigError, match=r"'0\.0\.0\.0' is not loopback: name a token_file"):
        SocketConfig(host="0.0.0.0")
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match="token"):
        SocketConfig(host="0.0.0.0", token_file=file).token()
    file.write_text("short")
    with pytest.raises(ConfigError, match="holds 5 bytes; a token has at least 16"):
        SocketConfig(host="0.0.0.0", token_file=file).token()
    file.write_text("long enough for a token\n")
    assert SocketConfig(host="0.0.0.0", token_file=file).token() == b"long enough for a token"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 65_536}, "port = 65536"),
        ({"patience": 0}, "patience = 0"),
        ({"tls_cert": "x"}, "go together"),
        ({"host": "example.org"}, "not loopback"),
    ],
)
def test_configurations_that_cannot_be(values, message):
    with pytest.raises(ConfigError, match=message):
        SocketConfig(**values)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1", "http://127.0.0.1:1", "nonsense", "tcp://h:99999", "tcp://:5"])
def test_what_is_no_address_is_refused(address):
    with pytest.raises(ConfigError, match="no address of a worker"):
        connect(address, SocketConfig(), "me")


def test_a_listener_serves_whoever_knows_the_token(echo):
    frames = connect(echo.address, SocketConfig(), "me")
    frames.send(WriteSlots(Slots(0, 1, 0, 1, 1), b"", b""))
    assert frames.receive(ANY) == Refused("me sends WriteSlots")
    frames.stream.cut()


def test_strangers_end_their_own_connection_and_nothing_else(echo, caplog, tmp_path):
    host, port = echo.address.removeprefix("tcp://").split(":")
    friend = connect(echo.address, SocketConfig(), "friend")
    with caplog.at_level(logging.WARNING):
        for data in (b"GET / HTTP/1.1\r\n\r\n", frame(b"\xc1"), frame(b"x" * 2000), b""):
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(data)
                stranger.shutdown(socket.SHUT_WR)
                with contextlib.suppress(ConnectionResetError):  # what was not read is told so
                    assert stranger.recv(1) == b""
    assert "a connection was refused" in caplog.text
    other = tmp_path / "other"
    other.write_text("some other token of workers")
    with pytest.raises(TransferError, match="does not know this worker's token"):
        connect(echo.address, SocketConfig(token_file=other), "stranger")
    friend.send(ReadSlots(Slots(0, 1, 0, 1, 1), b"", b""))
    assert friend.receive(ANY) == Refused("friend sends ReadSlots")
    friend.stream.cut()


def test_closing_a_listener_cuts_its_peers(echo):
    frames = connect(echo.address, SocketConfig(), "me")
    echo.close()
    with pytest.raises(PeerLostError):
        frames.receive(ANY)
    frames.stream.cut()
    with pytest.raises(PeerLostError, match="nobody answers"):
        connect(echo.address, SocketConfig(), "me")


def test_an_address_that_is_taken_is_said(echo):
    port = int(echo.address.rpartition(":")[2])
    with pytest.raises(TransferError, match=f"127.0.0.1:{port} cannot be listened at"):
        Listener("test", SocketConfig(port=port), lambda *_: None)


@pytest.fixture
def certificate(tmp_path):
    """A certificate for this machine, and its key."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -addext subjectAltName=IP:127.0.0.1"
    command = [*make.split(), "-subj", "/CN=kvbm", "-days", "2", "-keyout", key, "-out", cert]
    subprocess.run(command, check=True, capture_output=True)
    return {"tls_cert": cert, "tls_key": key, "tls_ca": cert}


def test_blocks_go_through_tls(certificate):
    config = SocketConfig(**certificate)
    data = np.random.default_rng(0).integers(0, 256, (8, 300_000), np.uint8)
    with TcpEngine("a", config=config) as a, TcpEngine("b", config=config) as b:
        source, copy, back = a.register(data), np.zeros_like(data), np.zeros_like(data)
        target, returned = b.register(copy), a.register(back)
        order = np.array([3, 4, 0], np.int32)
        peer = b.connect(a.description())
        b.read(peer, source, order, target, order).result(30)
        np.testing.assert_array_equal(copy[order], data[order])
        b.write(peer, target, order, returned, order).result(30)
        np.testing.assert_array_equal(back[order], data[order])


def test_tls_and_no_tls_do_not_meet(certificate, echo):
    with pytest.raises(TransferError):
        connect(echo.address, SocketConfig(**certificate), "me")
    with (
        Listener("test", SocketConfig(**certificate), lambda *_: None) as listener,
        pytest.raises(TransferError),
    ):
        connect(listener.address, SocketConfig(), "me")


def test_files_that_are_no_certificates_are_said(tmp_path):
    file = tmp_path / "cert"
    file.write_text("no certificate")
    with pytest.raises(ConfigError, match="TLS files of workers"):
        Listener("test", SocketConfig(tls_cert=file, tls_key=file), lambda *_: None)


def test_a_peer_reaches_registered_slots_alone():
    memory = np.zeros((4, 100), np.uint8)
    readonly = np.zeros((4, 100), np.uint8)
    readonly.flags.writeable = False
    with TcpEngine("a") as engine, TcpEngine("b") as other:
        slots, fixed = engine.register(memory), engine.register(readonly)
        here = other.register(np.zeros((4, 100), np.uint8))
        peer, one = other.connect(engine.description()), np.array([0], np.int32)
        odd = [
            Slots(slots.region, 50, 0, 50, 4),
            Slots(slots.region, 100, 0, 50, 9),
            Slots(99, 100, 0, 50, 4),
        ]
        for wrong in odd:
            with pytest.raises(TransferError, match="no memory is registered"):
                other.read(peer, wrong, one, here.part(0, 50), one).result(30)
        with pytest.raises(TransferError, match="read only"):
            other.write(peer, here, one, fixed, one).result(30)
        with pytest.raises(TransferError, match="read only"):
            engine.read("b", here, one, fixed, one)
        other.read(peer, slots, one, here, one).result(30)
        assert engine.register(memory) == slots  # registered once


def test_the_threads_and_files_of_an_engine_go_with_it():
    before, files = set(threading.enumerate()), len(os.listdir("/proc/self/fd"))
    with TcpEngine("a") as engine, TcpEngine("b") as other:
        other.connect(engine.description())
        assert other.connect(engine.description())  # the same connection again
    assert set(threading.enumerate()) == before
    assert len(os.listdir("/proc/self/fd")) == files
