"""What holds of every transfer engine, between two real processes."""

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from processes import in_a_process
from transfer_peer import COUNT, NBYTES, EnginePeer, arena, digests, pattern

from kvbm_jax.errors import BlockStateError, ConfigError, FrameError, LayoutError, PeerLostError, TransferError
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.protocols import Slots
from kvbm_jax.transfer import open_engine
from kvbm_jax.transfer.engines import backends_from

KINDS = ["nixl", "tcp"]
WAIT = 30
LARGE = (16, 1 << 19, 1 << 19)  # an arena of 8 MiB


@pytest.fixture(autouse=True, params=KINDS, scope="module")
def kind(request):
    if request.param == "nixl" and not importlib.util.find_spec("nixl_cu12"):
        pytest.skip("needs nixl-cu12")
    return request.param


@pytest.fixture(scope="module")
def peer(kind):
    with in_a_process(EnginePeer, kind) as found:
        yield found


@pytest.fixture
def metrics():
    return InMemoryMetrics()


@pytest.fixture
def engine(kind, metrics):
    with contextlib.closing(open_engine(kind, "here", metrics=metrics)) as found:
        yield found


class Far:
    """A peer as the engine sees it."""

    def __init__(self, engine, peer):
        description, self.slots = peer.about()
        self.name = engine.connect(description)


def ids(*numbers):
    return np.array(numbers, np.int32)


def test_a_read_fills_the_slots_named_and_nothing_else(engine, peer):
    peer.fill(1)
    far, memory = Far(engine, peer), arena()
    here = engine.register(memory)
    source, target = ids(3, 4, 5, 60, 0), ids(9, 1, 2, 63, 30)
    assert engine.read(far.name, far.slots, source, here, target).result(WAIT) is None
    expected = np.zeros_like(memory)
    expected[target] = pattern(1)[source]
    np.testing.assert_array_equal(memory, expected)
    assert not memory.base[:, NBYTES:].any()


def test_a_write_fills_the_peers_slots(engine, peer):
    peer.fill(2)
    far, memory = Far(engine, peer), arena()
    memory[:] = pattern(3)
    here = engine.register(memory)
    engine.write(far.name, here, ids(0, 1, 2), far.slots, ids(5, 6, 40)).result(WAIT)
    expected = pattern(2)
    expected[[5, 6, 40]] = memory[:3]
    assert peer.digests() == digests(expected)


def test_a_part_of_each_slot_can_be_moved(engine, peer):
    peer.fill(4)
    far, memory = Far(engine, peer), arena()
    here = engine.register(memory)
    engine.read(far.name, far.slots.part(100, 50), ids(7, 8), here.part(4900, 50), ids(0, 2)).result(WAIT)
    expected = np.zeros_like(memory)
    expected[[0, 2], 4900:4950] = pattern(4)[[7, 8], 100:150]
    np.testing.assert_array_equal(memory, expected)


@pytest.mark.parametrize("verb", ["read", "write"])
def test_the_peer_has_a_notice_when_all_is_done(engine, peer, verb):
    far, here = Far(engine, peer), engine.register(arena())
    slots = (far.slots, here) if verb == "read" else (here, far.slots)
    peer.notices()
    getattr(engine, verb)(far.name, slots[0], ids(0), slots[1], ids(1), b"over").result(WAIT)
    getattr(engine, verb)(far.name, slots[0], ids(0), slots[1], ids(1)).result(WAIT)
    told = []
    while not told:
        told = peer.notices()
    assert told == [b"over"]


def test_many_transfers_at_once_from_many_threads(engine, peer):
    peer.fill(5)
    far, memory = Far(engine, peer), arena()
    here = engine.register(memory)
    wanted = pattern(5)

    def read(first):
        for slot in range(first, COUNT, 4):
            engine.read(far.name, far.slots, ids(slot), here, ids(slot)).result(WAIT)

    threads = [threading.Thread(target=read, args=(first,)) for first in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(memory, wanted)


def test_threads_that_connect_side_by_side_do_not_cut_each_other_off(engine, peer):
    peer.fill(6)
    memory = arena()
    here = engine.register(memory)
    description, slots = peer.about()
    together = threading.Barrier(8)
    failed = []

    def connect_and_read(first):
        try:
            together.wait()
            name = engine.connect(description)
            for slot in range(first, COUNT, 8):
                engine.read(name, slots, ids(slot), here, ids(slot)).result(WAIT)
        except TransferError as error:
            failed.append(error)

    for _ in range(5):
        threads = [threading.Thread(target=connect_and_read, args=(first,)) for first in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        engine.forget(engine.connect(description))
    assert not failed
    np.testing.assert_array_equal(memory, pattern(6))


def test_nothing_to_move_is_done_at_once(engine, peer):
    far, here = Far(engine, peer), engine.register(arena())
    assert engine.read(far.name, far.slots, ids(), here, ids()).done()


def test_what_has_moved_is_counted(engine, peer, kind, metrics):
    far, here = Far(engine, peer), engine.register(arena())
    engine.read(far.name, far.slots, ids(1, 2), here, ids(1, 2)).result(WAIT)
    found = metrics.snapshot()
    labels = f'{{engine="{kind}",operation="read"}}'
    assert found[f"kvbm_engine_requests_total{labels}"] == 1
    assert found[f"kvbm_engine_bytes_total{labels}"] == 2 * NBYTES
    assert found[f"kvbm_engine_seconds{labels}"].count == 1


def test_ends_that_do_not_fit_are_refused(engine, peer):
    far, here = Far(engine, peer), engine.register(arena())
    with pytest.raises(TransferError, match="2 slots of 5,000 bytes do not fit 1 of 5,000"):
        engine.read(far.name, far.slots, ids(1, 2), here, ids(1))
    with pytest.raises(TransferError, match="do not fit 1 of 10"):
        engine.read(far.name, far.slots, ids(1), here.part(0, 10), ids(1))
    with pytest.raises(TransferError, match="slots 64 to 64 are not all among 64"):
        engine.read(far.name, far.slots, ids(64), here, ids(1))
    with pytest.raises(TransferError, match="slots -1 to 0"):
        engine.read(far.name, far.slots, ids(0, -1), here, ids(0, 1))
    with pytest.raises(TransferError, match="do not lie within a slot of 8,192"):
        engine.read(far.name, far.slots.part(8000, 400), ids(1), here.part(0, 400), ids(1))


def test_memory_that_the_peer_has_not_registered_is_refused(engine, peer, kind):
    far, here = Far(engine, peer), engine.register(arena())
    elsewhere = Slots(far.slots.region + (1 << 40), far.slots.stride, 0, NBYTES, COUNT)
    for verb in ("read", "write"):
        ends = (elsewhere, ids(0), here, ids(0)) if verb == "read" else (here, ids(0), elsewhere, ids(0))
        with pytest.raises(TransferError) as caught:
            getattr(engine, verb)(far.name, *ends).result(WAIT)
        assert not isinstance(caught.value, PeerLostError)
    engine.read(far.name, far.slots, ids(0), here, ids(0)).result(WAIT)  # the connection has not suffered


@pytest.mark.parametrize(
    "memory",
    [
        np.zeros((2, 4), np.float32),
        np.zeros(8, np.uint8),
        np.zeros((0, 4), np.uint8),
        np.zeros((4, 8), np.uint8)[:, ::2],
        np.zeros((8, 4), np.uint8).T,
    ],
)
def test_what_is_no_row_of_slots_is_refused(engine, memory):
    with pytest.raises(LayoutError, match="slots"):
        engine.register(memory)


def test_a_description_of_something_else_is_refused(engine):
    with pytest.raises((FrameError, TransferError)):
        engine.connect(b"no description")


def test_a_peer_that_was_forgotten_or_never_known_is_lost(engine, peer):
    far, here = Far(engine, peer), engine.register(arena())
    engine.read(far.name, far.slots, ids(0), here, ids(0)).result(WAIT)
    engine.forget(far.name)
    engine.forget("nobody")
    for name in (far.name, "nobody"):
        with pytest.raises(TransferError):
            engine.read(name, far.slots, ids(0), here, ids(0)).result(WAIT)
    again = Far(engine, peer)
    engine.read(again.name, again.slots, ids(0), here, ids(0)).result(WAIT)


def test_closing_ends_everything(kind, peer):
    before = set(threading.enumerate())
    engine = open_engine(kind, "here")
    far, here = Far(engine, peer), engine.register(arena())
    engine.read(far.name, far.slots, ids(0), here, ids(0)).result(WAIT)
    engine.close()
    engine.close()
    assert set(threading.enumerate()) <= before
    with pytest.raises(BlockStateError, match="closed"):
        engine.read(far.name, far.slots, ids(0), here, ids(0))
    with pytest.raises(BlockStateError, match="closed"):
        engine.register(arena())


@pytest.fixture
def own_peer(kind):
    """A peer of one test, with 8 MiB."""
    with in_a_process(EnginePeer, kind, *LARGE) as found:
        yield found


def test_a_peer_killed_before(engine, own_peer):
    far, here = Far(engine, own_peer), engine.register(arena(*LARGE))
    own_peer.kill()
    with pytest.raises(PeerLostError):
        engine.read(far.name, far.slots, ids(0), here, ids(0)).result(WAIT)


def test_a_peer_killed_during_and_after(engine, own_peer, kind, metrics):
    own_peer.fill(6)
    far, memory = Far(engine, own_peer), arena(*LARGE)
    here = engine.register(memory)
    everything = np.arange(LARGE[0], dtype=np.int32)
    engine.read(far.name, far.slots, everything, here, everything).result(WAIT)
    np.testing.assert_array_equal(memory, pattern(6, *LARGE[:2]))
    reads = [engine.read(far.name, far.slots, everything, here, everything) for _ in range(100)]
    reads[1].result(WAIT)
    own_peer.kill()
    errors = [read.exception(WAIT) for read in reads]
    assert errors[1] is None
    assert isinstance(errors[-1], PeerLostError)
    lost = sum(isinstance(error, PeerLostError) for error in errors)
    assert errors == [None] * (100 - lost) + errors[100 - lost :]
    labels = f'{{engine="{kind}",operation="read",reason="PeerLostError"}}'
    assert metrics.snapshot()[f"kvbm_engine_failures_total{labels}"] == lost
    with pytest.raises(PeerLostError):
        engine.read(far.name, far.slots, ids(0), here, ids(0)).result(WAIT)


def test_a_transfer_that_waits_can_be_called_off_and_one_under_way_keeps_its_memory(kind, monkeypatch):
    # Over shared memory the bytes of a stopped process can be read all the same.
    monkeypatch.setenv("UCX_TLS", "tcp")
    with in_a_process(EnginePeer, kind, *LARGE) as peer, contextlib.closing(open_engine(kind)) as engine:
        peer.fill(7)
        far, memory = Far(engine, peer), arena(*LARGE)
        here = engine.register(memory)
        everything = np.arange(LARGE[0], dtype=np.int32)
        engine.read(far.name, far.slots, ids(0), here, ids(0)).result(WAIT)
        peer.stop()
        under_way = engine.read(far.name, far.slots, everything, here, everything)
        with pytest.raises(TimeoutError):
            under_way.result(0.2)
        assert not under_way.done()
        assert not under_way.cancel()
        peer.resume()
        under_way.result(WAIT)
        np.testing.assert_array_equal(memory, pattern(7, *LARGE[:2]))


def test_nobody_beyond_this_machine_can_connect(peer):
    pid = peer.process.pid
    inodes = {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()}
    heard = []
    for table, loopback in (("tcp", "0100007F"), ("tcp6", "0" * 24 + "01000000")):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == "0A" and f"socket:[{rest[5]}]" in inodes:
                heard.append(local)
                assert local.startswith(loopback)
    assert heard


def test_engines_have_names(kind):
    with contextlib.closing(open_engine(kind)) as engine:
        assert engine.name == kind
    with pytest.raises(ConfigError, match="allowed are auto, nixl and tcp"):
        open_engine("rdma")


def test_back_ends_and_their_parameters_are_read():
    assert backends_from("UCX") == {"UCX": {}}
    found = backends_from("UCX?num_workers=2&num_threads=1, GDS_MT")
    assert found == {"UCX": {"num_workers": "2", "num_threads": "1"}, "GDS_MT": {}}
    for text in ("", "UCX,UCX", "UCX?num_workers", "?a=b"):
        with pytest.raises(ConfigError, match="back end"):
            backends_from(text)


def test_back_ends_by_name(kind):
    if kind == "tcp":
        with pytest.raises(ConfigError, match="TCP has none"):
            open_engine("tcp", backends={"UCX": {}})
        return
    with contextlib.closing(open_engine("nixl", backends={"POSIX": {}, "UCX": {"num_workers": "2"}})) as engine:
        assert set(engine._agent.backends) == {"POSIX", "UCX"}
        assert engine._agent.backend_options["UCX"]["num_workers"] == "2"
    with pytest.raises(TransferError, match="NIXL does not start with NONESUCH"):
        open_engine("nixl", backends={"NONESUCH": {}})


def test_without_nixl_blocks_go_over_tcp_and_it_is_said(monkeypatch, caplog):
    monkeypatch.delitem(sys.modules, "kvbm_jax.transfer.nixl", raising=False)
    for package in ("nixl", "nixl_cu12", "nixl_cu13"):
        monkeypatch.setitem(sys.modules, package, None)
    with caplog.at_level(logging.WARNING), contextlib.closing(open_engine("auto")) as engine:
        assert engine.name == "tcp"
    assert "blocks go over TCP" in caplog.text


QUIET = """
import logging, sys
handler = logging.FileHandler(sys.argv[1], mode="w")
logging.getLogger().addHandler(handler)
from kvbm_jax.transfer.nixl import NixlEngine, available_backends
assert "UCX" in available_backends()
NixlEngine().close()
logging.warning("still heard")
assert logging.raiseExceptions
"""


def test_importing_nixl_leaves_logging_and_output_alone(kind, tmp_path):
    if kind != "nixl":
        return
    log = tmp_path / "log"
    done = subprocess.run([sys.executable, "-c", QUIET, log], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ""
    assert log.read_text() == "still heard\n"
