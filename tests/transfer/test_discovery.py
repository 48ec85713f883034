"""Workers find each other, through a folder and through NATS, and are forgotten when they die."""

import contextlib
import os
import stat
import time
from pathlib import Path

import numpy as np
import pytest
from processes import in_a_process

from kvbm_jax.errors import BlockStateError, ConfigError, FrameError, TransportError
from kvbm_jax.events import EventType, KvEventBatch, PrefixIndex
from kvbm_jax.protocols import BlockKey, Tier, WorkerRecord
from kvbm_jax.transfer import FolderDiscovery, Offer, PeerDirectory
from kvbm_jax.transfer.heard import Heard, record_from, record_to
from kvbm_jax.transports.nats_connection import NatsConnection
from kvbm_jax.transports.nats_discovery import NatsDiscovery, NatsDiscoveryConfig
from kvbm_jax.transports.nats_server import NatsServer

PRINT = bytes(range(16))
TTL, BEAT = 30.0, 0.02


def record(worker_id, started_ns=1, fingerprint=PRINT):
    return WorkerRecord(worker_id, "tcp://127.0.0.1:5000", fingerprint, started_ns)


class Clock:
    """The time, and as much more as a test wants."""

    def __init__(self):
        self.ahead = 0.0

    def monotonic_ns(self):
        return time.monotonic_ns() + round(self.ahead * 1e9)

    def time_ns(self):
        return time.time_ns() + round(self.ahead * 1e9)


def opened(place, clock=time):
    """Discovery at a folder, or at the address of a server."""
    if isinstance(place, Path):
        return FolderDiscovery(place, ttl=TTL, heartbeat=BEAT, clock=clock)
    url, bucket = place
    config = NatsDiscoveryConfig(connection=NatsConnection.from_url(url), bucket=bucket, ttl=TTL, heartbeat=BEAT)
    return NatsDiscovery(config, clock=clock)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with NatsServer(tmp_path_factory.mktemp("nats")) as found:
        yield found


@pytest.fixture(params=["folder", "nats"])
def place(request, tmp_path):
    if request.param == "folder":
        return tmp_path / "workers"
    return request.getfixturevalue("server").url, f"T{abs(hash(request.node.nodeid))}"


@pytest.fixture
def open_one(place):
    """Opens discoveries that are closed at the end."""
    with contextlib.ExitStack() as stack:
        yield lambda clock=time: stack.enter_context(opened(place, clock))


def eventually(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return True


class Announcer:
    """Another process that announces itself."""

    def __init__(self, place, worker_id):
        self.discovery = opened(place)
        self.discovery.announce(record(worker_id))

    def close(self):
        self.discovery.close()


def test_workers_see_each_other_and_themselves_and_who_leaves_is_gone(open_one):
    one, two = open_one(), open_one()
    names = "a", "b/ü. %~="
    one.announce(record(names[0]))
    two.announce(record(names[1]))
    wanted = {name: record(name) for name in names}
    assert eventually(lambda: one.workers() == two.workers() == wanted)
    late = open_one()
    assert eventually(lambda: late.workers() == wanted)
    two.withdraw()
    two.withdraw()
    assert eventually(lambda: one.workers() == late.workers() == {"a": record("a")})
    one.close()
    one.close()
    assert eventually(lambda: late.workers() == {})
    with pytest.raises(BlockStateError, match="closed"):
        one.announce(record("a"))


def test_a_process_that_is_killed_is_forgotten_and_the_living_are_not(open_one, place):
    clock = Clock()
    reader = open_one(clock)
    with in_a_process(Announcer, place, "dies") as dies, in_a_process(Announcer, place, "lives"):
        assert eventually(lambda: reader.workers().keys() == {"dies", "lives"})
        dies.kill()
        kept = reader.workers().keys()
        assert kept == {"dies", "lives"}
        clock.ahead = TTL + 1
        assert eventually(lambda: "lives" in reader.workers())  # by now the last that the dead one wrote is seen too
        clock.ahead += TTL + 1
        assert eventually(lambda: reader.workers().keys() == {"lives"})


def test_a_worker_that_starts_anew_takes_the_place_of_its_former_life(open_one):
    old, new, reader = open_one(), open_one(), open_one()
    old.announce(record("w", 1))
    assert eventually(lambda: reader.workers() == {"w": record("w", 1)})
    new.announce(record("w", 2))
    assert eventually(lambda: reader.workers() == {"w": record("w", 2)})


def test_what_is_announced_may_change(open_one):
    one, reader = open_one(), open_one()
    one.announce(record("first"))
    assert eventually(lambda: reader.workers().keys() == {"first"})
    one.announce(record("second"))
    assert eventually(lambda: reader.workers().keys() == {"second"})


def test_a_nats_server_that_was_away_is_found_again(tmp_path):
    server = NatsServer(tmp_path / "store")
    token, port = server._token, server.port
    place = server.url, "AGAIN"
    with opened(place) as one, opened(place) as two:
        one.announce(record("one"))
        assert eventually(lambda: two.workers().keys() == {"one"})
        server.kill()
        server.stop()
        two.announce(record("two"))  # while nobody is there
        with NatsServer(tmp_path / "store", port=port, token=token):
            assert eventually(lambda: one.workers().keys() == two.workers().keys() == {"one", "two"})


def test_without_a_nats_server_it_is_said_at_once():
    config = NatsDiscoveryConfig(connection=NatsConnection(url="nats://127.0.0.1:1"))
    with pytest.raises(TransportError, match="no NATS server answers"):
        NatsDiscovery(config)


def test_files_are_the_users_own_and_litter_goes(tmp_path):
    folder = tmp_path / "workers"
    with FolderDiscovery(folder) as discovery:
        discovery.announce(record("w"))
        (file,) = folder.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (folder / "broken.worker").write_text("{")
        (folder / "old.worker").write_bytes(record_to(record("old"), 1))
        os.utime(folder / "old.worker", (1, 1))
        discovery.look()
        assert discovery.workers().keys() == {"w"}
        assert sorted(path.name for path in folder.iterdir()) == ["broken.worker", "w.worker"]


def test_a_file_of_a_worker_that_died_before_is_known_by_its_age(tmp_path):
    folder = tmp_path / "workers"
    folder.mkdir(mode=0o700)
    (folder / "dead.worker").write_bytes(record_to(record("dead"), 1))
    os.utime(folder / "dead.worker", (time.time() - 20,) * 2)
    with FolderDiscovery(folder, ttl=10.0) as discovery:
        assert discovery.workers() == {}
    with FolderDiscovery(folder, ttl=100.0) as discovery:
        assert discovery.workers().keys() == {"dead"}


def test_folders_that_others_may_write_to_are_refused(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="nobody else may write to"):
        FolderDiscovery(tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ConfigError, match=r"exists|Not a directory"):
        FolderDiscovery(file)


@pytest.mark.parametrize(("ttl", "heartbeat"), [(1.0, 1.0), (1.0, 0.0), (0.0, None), (-1.0, None)])
def test_times_that_do_not_fit_are_refused(tmp_path, ttl, heartbeat):
    with pytest.raises(ConfigError, match="0 < heartbeat < ttl"):
        FolderDiscovery(tmp_path, ttl=ttl, heartbeat=heartbeat)
    with pytest.raises(ConfigError, match="0 < heartbeat < ttl"):
        NatsDiscoveryConfig(ttl=ttl, heartbeat=heartbeat)


@pytest.mark.parametrize(
    "data", [b"", b"{}", b'{"\xff": 1}', b"[" * 5000, record_to(record("w", fingerprint=b"short"), 1)]
)
def test_what_is_no_record_is_a_typed_error(data):
    with pytest.raises(FrameError):
        record_from(data)


def test_a_renewal_heard_twice_counts_once():
    clock = Clock()
    heard = Heard(10.0, clock)
    heard.note(record("w", 2), 1)
    clock.ahead = 6.0
    heard.note(record("w", 2), 1)
    heard.note(record("w", 1), 7)  # a former life
    clock.ahead = 11.0
    assert heard.workers() == {}
    heard.note(record("w", 2), 2)
    assert heard.workers() == {"w": record("w", 2)}


class Fixed:
    """Discovery of a list."""

    def __init__(self, *records):
        self.found = {one.worker_id: one for one in records}

    def workers(self):
        return self.found


def hashes(count):
    return np.arange(1, 4 * count + 1, dtype=np.uint32).reshape(count, 4)


def told(index, worker_id, count, tier=Tier.G2, first=0):
    batch = KvEventBatch.make(
        EventType.CREATED,
        np.arange(count, dtype=np.uint64),
        worker_id=worker_id,
        block_size=16,
        first_event_id=first,
        timestamp=1,
        tier=tier,
        sequence_hashes=hashes(count),
    )
    index.apply(batch)


def test_a_directory_names_who_can_serve_the_most():
    index, shut_out = PrefixIndex(), set()
    for worker_id, count in (("me", 8), ("a", 3), ("b", 5), ("away", 7), ("other model", 8)):
        told(index, worker_id, count)
    told(index, "on the device", 8, Tier.G1)
    there = [record("me"), record("a"), record("b"), record("other model", 1, bytes(16)), record("on the device")]
    directory = PeerDirectory("me", PRINT, Fixed(*there), index, shut_out=shut_out.__contains__)
    assert directory.offers(hashes(8)) == [Offer(record("b"), 5), Offer(record("a"), 3)]
    assert directory.offers(hashes(8)[4:]) == [Offer(record("b"), 1)]
    shut_out.add("b")
    assert directory.offers(hashes(8)) == [Offer(record("a"), 3)]
    shut_out.clear()
    directory.missed("b", [BlockKey(hashes(8)[1].tobytes()), BlockKey(hashes(8)[7].tobytes())])
    assert directory.offers(hashes(8)) == [Offer(record("a"), 3), Offer(record("b"), 1)]
    directory.lost("a")
    assert directory.offers(hashes(8)) == [Offer(record("b"), 1)]


def test_an_index_forgets_claims_that_turned_out_wrong():
    index = PrefixIndex()
    told(index, "w", 4)
    told(index, "w", 4, Tier.G3, 4)
    keys = [BlockKey(row.tobytes()) for row in hashes(6)]
    assert index.forget("w", Tier.G2, keys) == 4
    assert index.forget("w", Tier.G2, keys) == 0
    assert index.forget("nobody", Tier.G2, keys) == 0
    (overlap,) = index.find_matches(hashes(4)).values()
    assert overlap.tiers == {Tier.G3: 4}
    assert index.find_matches(hashes(4), tier=Tier.G2) == {}
    assert index.next_event_ids() == {"w": 8}
    assert index.stats().unknown_deletes == 0
