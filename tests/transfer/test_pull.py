"""Blocks pulled out of a real peer's memory, over both engines, and everything that may go wrong with it."""

import contextlib
import importlib.util
import threading
import time

import numpy as np
import pytest
from processes import in_a_process
from transfer_peer import StorePeer, content, identity, key

from kvbm_jax.errors import BlockStateError, ConfigError, IdentityMismatchError, LayoutError
from kvbm_jax.layout import LayoutKind
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.protocols import Outcome, WorkerRecord
from kvbm_jax.transfer import PeerServer, Placement, Puller, SocketConfig, open_engine

IDENTITY = identity()
NBYTES = Placement.whole(IDENTITY).block_bytes(IDENTITY)
COUNT = 24
OK, MISS, REFUSED, CORRUPT, FAILED = Outcome.OK, Outcome.MISS, Outcome.REFUSED, Outcome.CORRUPT, Outcome.FAILED
WINDOW = 4 * NBYTES


@pytest.fixture(autouse=True, params=["nixl", "tcp"], scope="module")
def kind(request):
    if request.param == "nixl" and not importlib.util.find_spec("nixl_cu12"):
        pytest.skip("needs nixl-cu12")
    return request.param


@pytest.fixture(scope="module")
def peer(kind):
    with in_a_process(StorePeer, kind, COUNT) as found:
        yield found


@contextlib.contextmanager
def pulling(kind, landing=32, **options):
    with (
        contextlib.closing(open_engine(kind, "puller")) as engine,
        Puller("me", IDENTITY, engine, landing, window_bytes=WINDOW, **options) as puller,
    ):
        yield puller


@pytest.fixture
def lost():
    return []


@pytest.fixture
def metrics():
    return InMemoryMetrics()


@pytest.fixture
def puller(kind, lost, metrics):
    with pulling(kind, lost=lost.append, metrics=metrics) as found:
        yield found


def outcomes(pulled):
    return [row.outcome for row in pulled.rows]


def pull(puller, peer, *numbers, **options):
    """Pulls blocks, checks every byte of those that come, and returns what became of each."""
    with puller.pull(
        peer if isinstance(peer, WorkerRecord) else peer.record(), list(map(key, numbers)), **options
    ) as found:
        blocks = dict(found.blocks())
        assert sorted(blocks) == [i for i, row in enumerate(found.rows) if row.outcome is OK]
        for place, block in blocks.items():
            np.testing.assert_array_equal(block, content(numbers[place], NBYTES))
        return outcomes(found)


def eventually(condition):
    """Waits for another process or thread to get there."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
    return True


def test_blocks_come_with_the_bytes_they_were_put_with(puller, peer, metrics):
    numbers = [5, 3, 23, 0, 11, 12, 13, 14, 15, 3]
    assert pull(puller, peer, *numbers) == [OK] * 10
    found = metrics.snapshot()
    assert found['kvbm_transfer_blocks_total{source="g4",target="g2"}'] == 10
    assert found['kvbm_transfer_bytes_total{source="g4",target="g2"}'] == 10 * NBYTES


def test_what_the_peer_does_not_hold_is_a_miss(puller, peer, metrics):
    assert pull(puller, peer, 100, 1, 101, 2) == [MISS, OK, MISS, OK]
    assert metrics.snapshot()['kvbm_transfer_failures_total{source="g4",target="g2",reason="miss"}'] == 2
    assert pull(puller, peer, 100) == [MISS]
    assert pull(puller, peer) == []


def test_leases_and_landing_slots_are_given_back(puller, peer):
    for _ in range(5):
        assert pull(puller, peer, *range(COUNT)) == [OK] * COUNT
    assert puller.free_slots() == 32
    assert eventually(lambda: peer.measured()["kvbm_leased_blocks"] == 0)


def test_a_connection_that_was_made_in_a_hurry_is_not_hurried_for_ever(puller, peer):
    assert pull(puller, peer, 0, timeout=2.0) == [OK]
    [remote] = puller._remotes.values()
    stream, told = remote._frames.stream, []
    stream.patience = lambda seconds: told.append(seconds) or type(stream).patience(stream, seconds)
    assert pull(puller, peer, 1, timeout=60.0) == [OK]
    assert told == [SocketConfig().patience]


def test_pulls_from_many_threads(puller, peer):
    found = []

    def some(first):
        found.extend(pull(puller, peer, *range(first, first + 8)) for _ in range(5))

    threads = [threading.Thread(target=some, args=(8 * i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[OK] * 8] * 15
    assert puller.free_slots() == 32


def test_what_was_pulled_is_lent(kind, peer):
    with pulling(kind, landing=6) as puller:
        record = peer.record()
        first = puller.pull(record, [key(n) for n in range(4)])
        with puller.pull(record, [key(n) for n in range(4, 8)]) as second:
            assert outcomes(second) == [OK, OK, REFUSED, REFUSED]
            assert "no more blocks can land now" in second.rows[2].reason
        first.close()
        first.close()
        assert puller.free_slots() == 6
        with pytest.raises(BlockStateError, match="given back"):
            next(first.blocks())


def test_wrong_bytes_are_a_counted_miss_and_three_times_shut_the_peer_out(kind, metrics):
    with in_a_process(StorePeer, kind, 8) as peer, pulling(kind, metrics=metrics) as puller:
        peer.spoil(2)
        for _ in range(2):
            assert pull(puller, peer, 1, 2, 3) == [OK, CORRUPT, OK]
        peer.delete(2)
        assert pull(puller, peer, 1, 2, 3) == [OK, MISS, OK]  # all well in between
        peer.put(2)
        peer.spoil(2)
        for _ in range(3):
            assert pull(puller, peer, 1, 2, 3) == [OK, CORRUPT, OK]
        assert pull(puller, peer, 1) == [REFUSED]
        found = metrics.snapshot()
        assert found['kvbm_transfer_failures_total{source="g4",target="g2",reason="corrupt"}'] == 5
        assert found["kvbm_peer_quarantines_total"] == 1
        assert puller.quarantine.holds("server")
        assert puller.free_slots() == 32


def test_blocks_of_another_model_are_refused_by_fingerprint(kind, lost):
    with in_a_process(StorePeer, kind, 2, "other") as peer, pulling(kind, lost=lost.append) as puller:
        theirs, ours = identity("other").fingerprint.hex(), IDENTITY.fingerprint.hex()
        with pytest.raises(IdentityMismatchError, match=f"{theirs}, this worker's {ours}: model_id: 'other' != 'toy'"):
            pull(puller, peer, 1)
        assert lost == []


def test_a_peer_killed_before_and_after(kind, lost):
    with in_a_process(StorePeer, kind, 8) as peer, pulling(kind, lost=lost.append) as puller:
        record = peer.record()
        assert pull(puller, record, 1, 2) == [OK, OK]
        peer.kill()
        assert pull(puller, record, 1, 2) == [FAILED, FAILED]
        assert lost == ["server"]
        assert pull(puller, record, 1, 2) == [FAILED, FAILED]
        assert puller.free_slots() == 32


def test_a_peer_killed_during_a_pull(kind, lost):
    with in_a_process(StorePeer, kind, COUNT) as peer, pulling(kind, lost=lost.append) as puller:
        record, numbers = peer.record(), list(range(COUNT))
        killer = threading.Timer(0.3, peer.process.kill)
        assert pull(puller, record, *numbers) == [OK] * COUNT
        killer.start()
        found = [OK]
        while not lost:  # whatever part of a pull it dies in, what comes is right and what does not is told
            found = pull(puller, record, *numbers)
            assert set(found) <= {OK, FAILED}
        killer.join()
        assert lost == ["server"]
        assert eventually(lambda: puller.free_slots() == 32)


def test_a_worker_that_starts_anew_is_found_anew(kind, lost):
    with pulling(kind, lost=lost.append) as puller:
        for _ in range(2):
            with in_a_process(StorePeer, kind, 2) as peer:
                assert pull(puller, peer, 1) == [OK]
    assert lost == []


def test_an_address_where_another_worker_serves_is_refused(puller, peer, lost):
    record = peer.record()
    other = WorkerRecord("somebody else", record.address, record.fingerprint, record.started_ns)
    assert pull(puller, other, 1) == [FAILED]
    assert lost == []


def test_a_hung_peer_costs_no_more_than_the_time_given(kind, lost, monkeypatch):
    monkeypatch.setenv("UCX_TLS", "tcp")
    with in_a_process(StorePeer, kind, 8) as peer, pulling(kind, lost=lost.append) as puller:
        record = peer.record()
        assert pull(puller, record, 1) == [OK]
        slow = puller._remotes["server"]
        lease = slow.lease

        def lease_and_hang(*given):
            found = lease(*given)
            peer.stop()
            return found

        slow.lease = lease_and_hang
        assert pull(puller, record, 1, 2, timeout=0.3) == [FAILED, FAILED]
        peer.resume()
        assert eventually(lambda: puller.free_slots() == 32)
        assert pull(puller, record, 1) == [OK]
        assert lost == []


def test_a_pull_that_is_called_off_frees_everything(puller, peer):
    called_off = threading.Event()
    called_off.set()
    assert pull(puller, peer, *range(COUNT), cancelled=called_off) == [FAILED] * COUNT
    assert eventually(lambda: puller.free_slots() == 32)
    assert eventually(lambda: peer.measured()["kvbm_leased_blocks"] == 0)
    assert pull(puller, peer, 1) == [OK]


def test_a_lease_protects_what_is_read(kind):
    """Blocks that go while they are leased keep their bytes; the lease of a reader that died goes with it."""
    with in_a_process(StorePeer, kind, 8) as peer:
        with in_a_process(Holder, kind, peer.record()) as reader:
            assert reader.lease(*range(8)) == 8
            peer.delete(*range(8))
            peer.put(*range(8, 16))
            assert reader.read(*range(8)) == [content(n, NBYTES).tobytes() for n in range(8)]
            assert peer.measured()["kvbm_leased_blocks"] == 8
            reader.kill()
        assert eventually(lambda: peer.measured()["kvbm_leased_blocks"] == 0)
        with pulling(kind) as puller:
            assert pull(puller, peer, *range(8, 16)) == [OK] * 8


def test_a_lease_that_is_over_leaves_no_claim(kind, metrics):
    with in_a_process(StorePeer, kind, 4, "toy", 0.05) as peer, in_a_process(Holder, kind, peer.record()) as reader:
        reader.lease(0, 1)
        assert eventually(lambda: peer.measured()["kvbm_leased_blocks"] == 0)
        assert peer.measured()["kvbm_leases_expired_total"] == 1
        peer.delete(0, 1)
        peer.put(6, 7)
        assert reader.read(0, 1) != [content(n, NBYTES).tobytes() for n in (0, 1)]


def test_no_more_is_leased_than_the_store_may_pin(kind):
    with in_a_process(StorePeer, kind, 8, "toy", 60.0, 3) as peer, pulling(kind) as puller:
        assert pull(puller, peer, *range(5)) == [OK] * 3 + [REFUSED] * 2


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (LayoutKind.UNIVERSAL, Placement(2, 1)),
        (LayoutKind.FULLY_CONTIGUOUS, Placement(1, 3, LayoutKind.UNIVERSAL)),
    ],
)
def test_other_arrangements_and_fewer_heads(kind, theirs, ours):
    placement = Placement(4, 0, theirs)
    with in_a_process(StorePeer, kind, 3, "toy", 60.0, 8, placement) as peer, pulling(kind, placement=ours) as puller:
        with puller.pull(peer.record(), [key(n) for n in (2, 9, 0)]) as found:
            assert outcomes(found) == [OK, MISS, OK]
            blocks = dict(found.blocks())
        for place, number in ((0, 2), (2, 0)):
            shape = {"L": 2, "C": 2, "T": 8, "D": 64, "H": 4}
            before = "HLCTD" if theirs is LayoutKind.UNIVERSAL else "LCTHD"
            after = "HLCTD" if ours.kind is LayoutKind.UNIVERSAL else "LCTHD"
            block = content(number, NBYTES).reshape([shape[axis] for axis in before])
            wanted = np.einsum(f"{before}->{after}", block)
            wanted = wanted.take(range(ours.first_head, ours.first_head + ours.num_heads), after.index("H"))
            np.testing.assert_array_equal(blocks[place], wanted.ravel())


def test_heads_that_the_peer_does_not_have_are_refused(kind):
    with (
        in_a_process(StorePeer, kind, 1, "toy", 60.0, 8, Placement(2, 1)) as peer,
        pulling(kind, placement=Placement(2, 2)) as puller,
        pytest.raises(LayoutError, match="'server' has Placement"),
    ):
        pull(puller, peer, 0)


def test_a_closed_puller_says_so(kind, peer):
    with pulling(kind) as puller:
        assert pull(puller, peer, 1) == [OK]
        puller.close()
        with pytest.raises(BlockStateError, match="closed"):
            pull(puller, peer, 1)


def test_what_cannot_be_served_is_refused_at_once(kind):
    store = HostBlockStore(NBYTES, 2, identity=IDENTITY)
    with contextlib.closing(store), contextlib.closing(open_engine(kind)) as engine:
        with pytest.raises(ConfigError, match="pinned_blocks = 0"):
            PeerServer("w", store, engine)
        with pytest.raises(ConfigError, match="blocks of the store have"):
            PeerServer("w", store, engine, placement=Placement(1))


class Holder:
    """A reader that leases first and reads later."""

    def __init__(self, kind, record):
        self.engine = open_engine(kind, "holder")
        self.puller = Puller("holder", IDENTITY, self.engine, 16)
        self.remote = self.puller._remote(record, 10.0)

    def lease(self, *numbers):
        self.leased = self.remote.lease([key(n) for n in numbers], 60.0, 10.0).found
        return int(self.leased.held.sum())

    def read(self, *numbers):
        landing = self.puller._landing(NBYTES)
        slots = landing.lend(len(numbers))
        target = np.array(slots, np.int32)
        self.engine.read(
            self.remote.engine_name, self.remote.slots, self.leased.block_ids, landing.slots, target
        ).result(30)
        return [landing.block(slot).tobytes() for slot in slots]
