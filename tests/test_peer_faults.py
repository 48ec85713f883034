"""A manager whose peer, a process of its own, dies, hangs, is cut off or lies: contents right, and no more than a miss.

`serve` compares every slot of a sequence with what it should hold, so nothing wrong is served unseen. Partition and
thin lines are those of two network namespaces.
"""

import contextlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import threading
import time

import pytest
from processes import in_a_process
from sharing_peer import SharingPeer, records_of
from tiered import SIZE, make, prompt, serve

from kvbm_jax.events import EventBus, EventPublisher
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.peers import PeerNetwork
from kvbm_jax.protocols import Tier
from kvbm_jax.transfer import SocketConfig
from kvbm_jax.transfer.folder_discovery import FolderDiscovery

PATIENCE = 20.0
TIMEOUT = 0.5  # that a request may wait for peers
SLACK = 5.0  # seconds: of a machine with other things to do
PROMPTS = itertools.count(0, 1000)


@pytest.fixture(params=["tcp", pytest.param("nixl", marks=pytest.mark.long)])
def kind(request):
    if request.param == "nixl" and not importlib.util.find_spec("nixl_cu12"):
        pytest.skip("needs nixl-cu12")
    return request.param


class Side:
    """The manager's side of a test: the manager, and what it is told of its peer."""

    def __init__(self, manager, bus, metrics):
        self.manager = manager
        self.metrics = metrics
        self._publisher = EventPublisher(bus, worker_id="peer", block_size=SIZE, clock=time)

    def told(self, peer, blocks=6):
        """Has the peer hold a new prompt and the manager know of it; returns the prompt."""
        tokens = prompt(next(PROMPTS), blocks)
        peer.put(tokens)
        self.tell(tokens)
        return tokens

    def tell(self, tokens):
        """Has the manager hear that the peer holds a prompt."""
        records = records_of(tokens)
        self._publisher.created(Tier.G2, list(range(len(records))), records)
        deadline = time.monotonic() + PATIENCE
        while self.manager.locate(tokens) != {Tier.G4: len(records) * SIZE}:
            assert time.monotonic() < deadline, "the peer is not found"
            threading.Event().wait(0.01)

    def serve(self, tokens):
        """Serves a prompt; returns its hits and the seconds it took."""
        begun = time.monotonic()
        hits = serve(self.manager, tokens)
        return hits, time.monotonic() - begun

    def failures(self, reason):
        name = f'kvbm_transfer_failures_total{{source="g4",target="g2",reason="{reason}"}}'
        return self.metrics.snapshot().get(name, 0)


@contextlib.contextmanager
def joined(tmp_path, kind, *, sockets=None, timeout=TIMEOUT):
    """A manager whose only peer is looked for in a folder."""
    bus, metrics = EventBus("peer"), InMemoryMetrics()
    network = PeerNetwork(
        discovery=FolderDiscovery(tmp_path / "workers", ttl=60.0, heartbeat=0.05),
        events=[bus.subscribe()],
        engine=kind,
        timeout=timeout,
        sockets=sockets or SocketConfig(),
    )
    options = {"enable_offload": True, "disk_budget": 0, "host_blocks": 32, "model_id": "tiny", "worker_id": "me"}
    with make(network=network, metrics=metrics, **options) as manager:
        yield Side(manager, bus, metrics)


@pytest.fixture
def side(tmp_path, kind):
    with joined(tmp_path, kind) as found:
        yield found


ALL = {Tier.G4: 6 * SIZE}


def test_a_peer_killed_between_two_pulls(side, kind, tmp_path):
    with in_a_process(SharingPeer, kind, tmp_path / "workers") as peer:
        first, second, third = (side.told(peer) for _ in range(3))
        assert side.serve(first)[0] == ALL
        peer.kill()
        hits, seconds = side.serve(second)
        assert hits == {}
        assert seconds < TIMEOUT + SLACK
        hits, _ = side.serve(first)  # what came stays, and stays right
        assert sum(hits.values()) == 6 * SIZE
        assert Tier.G4 not in hits
        assert side.manager.locate(third) == {}  # all that it held is forgotten
        assert side.serve(third)[0] == {}


def test_a_peer_killed_before_the_first_pull(side, kind, tmp_path):
    with in_a_process(SharingPeer, kind, tmp_path / "workers") as peer:
        tokens = side.told(peer)
        peer.kill()
        assert side.serve(tokens)[0] == {}
        assert side.manager.locate(prompt(0, 1)) == {}


def test_a_peer_that_hangs_costs_the_time_out_and_a_miss(side, kind, tmp_path):
    with in_a_process(SharingPeer, kind, tmp_path / "workers") as peer:
        first, second = side.told(peer), side.told(peer)
        assert side.serve(first)[0] == ALL
        peer.stop()
        hits, seconds = side.serve(second)
        assert hits == {}
        assert TIMEOUT * 0.9 < seconds < TIMEOUT + SLACK
        assert side.manager.locate(second) == {Tier.G1: 6 * SIZE}
        peer.resume()
        assert side.serve(side.told(peer))[0] == ALL  # it is one again that is asked


def test_wrong_bytes_are_misses_and_the_third_time_the_peer_is_shut_out(side, kind, tmp_path):
    with in_a_process(SharingPeer, kind, tmp_path / "workers") as peer:
        for strike in range(3):
            tokens = side.told(peer)
            peer.spoil(tokens, 2)
            assert side.serve(tokens)[0] == {Tier.G4: 2 * SIZE}  # what comes before them is right
            assert side.failures("corrupt") == strike + 1
        tokens = prompt(next(PROMPTS), 6)
        peer.put(tokens)
        publish = side._publisher.created
        publish(Tier.G2, list(range(6)), records_of(tokens))
        assert side.serve(tokens)[0] == {}


def test_what_a_peer_has_lost_is_a_miss_once(side, kind, tmp_path):
    with in_a_process(SharingPeer, kind, tmp_path / "workers") as peer:
        tokens = side.told(peer)
        peer.delete(tokens)
        assert side.serve(tokens)[0] == {}
        assert side.failures("miss") == 6
        side.manager.clear()
        assert side.manager.locate(tokens) == {}


def test_a_peer_of_another_model_under_our_name_is_refused_with_both_fingerprints(side, kind, tmp_path, caplog):
    with in_a_process(SharingPeer, kind, tmp_path / "workers", "another", "tiny") as peer:
        tokens = side.told(peer)
        assert side.serve(tokens)[0] == {}
        (said,) = [line.getMessage() for line in caplog.records if "are not used" in line.getMessage()]
        assert "have the fingerprint" in said
        assert "this worker's" in said
        assert "model_id: 'another' != 'tiny'" in said


# Two network namespaces. What this machine's kernel cannot do is skipped, and said.


def _ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def line():
    """A line between this namespace and another: its path, the addresses of both ends, and what can be done to it."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("tc"):
        pytest.skip("needs root, ip and tc for network namespaces")
    name, near, far = f"kvbm{os.getpid()}", f"kvn{os.getpid()}", f"kvf{os.getpid()}"
    try:
        _ip("netns", "add", name)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
    try:
        try:
            _ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no pairs of devices here: {error.stderr.strip()}")
        _ip("addr", "add", "10.203.77.1/30", "dev", near)
        _ip("link", "set", near, "up")
        for words in (["addr", "add", "10.203.77.2/30", "dev", far], ["link", "set", far, "up"]):
            _ip("-n", name, *words)
        _ip("-n", name, "link", "set", "lo", "up")
        yield Line(name, far)
    finally:
        for words in (["link", "del", near], ["netns", "del", name]):  # a device outlives its namespace for a while
            subprocess.run(["ip", *words], check=False, capture_output=True)


class Line:
    """The way to the peer's namespace."""

    address = "10.203.77.2"

    def __init__(self, namespace, device):
        self.namespace = f"/run/netns/{namespace}"
        self._name, self._device = namespace, device

    def cut(self):
        """From now on nothing that the peer sends arrives, and nobody is told."""
        _ip("-n", self._name, "route", "add", "blackhole", "10.203.77.1/32")

    def mend(self):
        _ip("-n", self._name, "route", "del", "blackhole", "10.203.77.1/32")

    def thin(self, *shape):
        """Bytes from the peer pass at a rate, or wait; what has no room is lost, and sent again by TCP."""
        try:
            words = ["tc", "qdisc", "replace", "dev", self._device, "root", *shape]
            subprocess.run(["ip", "netns", "exec", self._name, *words], check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"tc cannot {shape[0]} here: {error.stderr.strip()}")


@contextlib.contextmanager
def apart(tmp_path, line, *, timeout=TIMEOUT):
    """A manager here and its peer in the other namespace."""
    token = tmp_path / "token"
    token.write_text("a token that both ends know")
    there = SocketConfig(host="10.203.77.2", token_file=token)
    with (
        in_a_process(SharingPeer, "tcp", tmp_path / "workers", "tiny", None, there, line.namespace) as peer,
        joined(tmp_path, "tcp", sockets=SocketConfig(token_file=token), timeout=timeout) as side,
    ):
        yield side, peer


def test_a_partition_costs_a_time_out_and_a_miss(tmp_path, line):
    with apart(tmp_path, line) as (side, peer):
        first, second, third = (side.told(peer) for _ in range(3))
        assert side.serve(first)[0] == ALL
        line.cut()
        hits, seconds = side.serve(second)
        assert hits == {}
        assert TIMEOUT * 0.9 < seconds < TIMEOUT + SLACK
        hits, seconds = side.serve(third)  # it counts as gone: nobody waits a second time
        assert hits == {}
        assert seconds < TIMEOUT
        side.tell(tokens := prompt(next(PROMPTS), 6))  # it is heard of again, and still not reached
        hits, seconds = side.serve(tokens)
        assert hits == {}
        assert seconds < TIMEOUT + SLACK
        line.mend()
        assert side.serve(side.told(peer))[0] == ALL


@pytest.mark.long
def test_a_partition_before_the_first_word_costs_a_time_out_and_a_miss(tmp_path, line):
    with apart(tmp_path, line) as (side, peer):
        tokens = side.told(peer)
        line.cut()
        hits, seconds = side.serve(tokens)
        assert hits == {}
        assert seconds < TIMEOUT + SLACK


@pytest.mark.long
@pytest.mark.parametrize(
    "shape",
    [
        ("netem", "delay", "40ms", "10ms"),
        ("netem", "delay", "5ms", "loss", "5%"),
        ("tbf", "rate", "200kbit", "burst", "1600", "latency", "400ms"),
        ("tbf", "rate", "400kbit", "burst", "1600", "limit", "3000"),  # and what does not fit is lost
    ],
    ids=["delayed", "lossy", "thin", "thin and lossy"],
)
def test_delay_and_loss_change_no_byte(tmp_path, line, shape):
    with apart(tmp_path, line, timeout=PATIENCE) as (side, peer):
        line.thin(*shape)
        for _ in range(3):
            assert side.serve(side.told(peer))[0] == ALL


@pytest.mark.long
def test_a_peer_that_vanishes_in_the_middle_of_a_transfer(tmp_path, line):
    with apart(tmp_path, line, timeout=2.0) as (side, peer):
        assert side.serve(side.told(peer))[0] == ALL
        tokens = side.told(peer, 7)
        line.thin("tbf", "rate", "8kbit", "burst", "600", "latency", "5s")  # the lease passes, the blocks do not fit

        def vanish():
            line.cut()
            peer.process.kill()

        killer = threading.Timer(0.5, vanish)
        killer.start()
        hits, seconds = side.serve(tokens)
        killer.join()
        assert hits == {}
        assert seconds < 2.0 + SLACK
        assert side.manager.locate(tokens)[Tier.G1] == 7 * SIZE
