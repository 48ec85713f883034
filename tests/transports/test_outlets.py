"""Managers that publish beyond their process, as their configuration says."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest
from event_batches import View
from event_transports import free_ports

from kvbm_jax import BlockManager, KvBlockManagerConfig
from kvbm_jax.cli import main
from kvbm_jax.errors import ConfigError, TransportError
from kvbm_jax.events import EventBus, open_outlet
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.runtime_folder import runtime_folder
from kvbm_jax.transports.factories import zmq_sink
from kvbm_jax.transports.nats_server import SharedNatsServer
from kvbm_jax.transports.nats_subscriber import NatsKvEventSubscriberConfig, subscribe_nats
from kvbm_jax.transports.zmq_subscriber import ZmqKvEventSubscriberConfig, subscribe_zmq


def manager(**fields):
    sizes = {"block_size": 4, "num_blocks": 16, "num_layers": 1, "num_kv_heads": 1, "head_dim": 2, "dtype": "float32"}
    return BlockManager(KvBlockManagerConfig(**sizes, worker_id="w-1", **fields))


def work(owner):
    """Has a manager register two blocks."""
    seq = owner.start(np.arange(9))
    owner.register(seq)
    owner.release(seq)


@pytest.fixture
def own_folders(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_manager_publishes_over_zeromq():
    port = free_ports()
    with manager(events="zmq", events_url=f"tcp://127.0.0.1:{port}") as owner:
        local = owner.subscribe_events()
        work(owner)
        config = ZmqKvEventSubscriberConfig(
            endpoint=f"tcp://127.0.0.1:{port}", replay_endpoint=f"tcp://127.0.0.1:{port + 1}", worker_id="w-1"
        )
        with subscribe_zmq(config) as subscription:
            view, here = View(), View()
            view.follow(subscription, lambda view: len(view.claims) == 2)
            here.follow(local, lambda view: len(view.claims) == 2)
        with pytest.raises(TransportError, match="cannot be published at"):
            manager(events="zmq", events_url=f"tcp://127.0.0.1:{port}")


def test_a_manager_starts_a_nats_server_where_no_address_is_given(own_folders):
    with manager(events="nats") as owner:
        work(owner)
        other = SharedNatsServer()  # as another worker of this host finds it
        with subscribe_nats(NatsKvEventSubscriberConfig(connection=other.connection())) as subscription:
            view = View()
            view.follow(subscription, lambda view: len(view.claims) == 2)
        other.close()
    assert not (runtime_folder() / "nats.json").exists()


def test_a_folder_planted_by_another_keeps_no_address(own_folders, tmp_path):
    (tmp_path / "run" / "kvbm_jax").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="must be a folder of user"):
        manager(events="nats")


def test_a_manager_that_cannot_publish_is_one_clear_error():
    with pytest.raises(TransportError, match=r"no NATS server answers at nats://127\.0\.0\.1:1:"):
        manager(events="nats", events_url="nats://127.0.0.1:1")
    with pytest.raises(ConfigError, match="no address of a NATS server"):
        manager(events="nats", events_url="tcp://127.0.0.1:1")


def test_replays_are_served_beside_an_address():
    with pytest.raises(ConfigError, match="allowed is an address such as tcp://"):
        zmq_sink("w-1", "tcp://127.0.0.1", NullMetrics())


PACKAGE = """
class Sink:
    def __init__(self, *asked):
        self.asked, self.batches, self.closed = asked, [], False
    def publish(self, batch):
        self.batches.append(batch)
    def close(self):
        self.closed = True
"""


def test_other_packages_bring_transports(tmp_path, monkeypatch):
    (tmp_path / "carrier.py").write_text(PACKAGE)
    info = tmp_path / "carrier-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[kvbm_jax.event_transports]\npigeon = carrier:Sink\n")
    monkeypatch.syspath_prepend(tmp_path)
    bus = EventBus()
    sink = open_outlet("pigeon", bus, worker_id="w", url="loft", metrics=NullMetrics())
    sink.close()
    assert sink._sinks[1].asked[:2] == ("w", "loft")
    assert sink._sinks[1].closed
    with pytest.raises(ConfigError, match="'raven' is no event transport; choose from inproc, nats, zmq, none, pigeon"):
        open_outlet("raven", bus, worker_id="w", url=None, metrics=NullMetrics())


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_events_of_a_host_are_followed_on_the_command_line(own_folders, capsys):
    assert main(["events", "tail", "--json"]) == 1
    assert "no worker of this host runs a NATS server" in capsys.readouterr().err
    with manager(events="nats") as owner:
        work(owner)
        follower = threading.Thread(target=main, args=(["events", "tail", "--json", "--events", "2"],))
        follower.start()
        while follower.is_alive():  # until it has seen two events after its snapshot
            owner.clear()
            work(owner)
            follower.join(0.05)
    *items, summary = lines(capsys)
    assert [item["item"] for item in items] == ["snapshot", "event", "event"]
    assert {item["worker_id"] for item in items} == {"w-1"}
    assert {item["event_type"] for item in items[1:]} <= {"created", "deleted", "cleared"}
    assert summary == {"events": 2, "snapshots": 1, "gaps": 0}


def test_following_ends_when_nobody_reads_what_is_printed():
    port = free_ports()
    with manager(events="zmq", events_url=f"tcp://127.0.0.1:{port}") as owner:
        work(owner)
        command = [sys.executable, "-c", "import sys; from kvbm_jax.cli import main; sys.exit(main())"]
        command += ["events", "tail", "--url", f"tcp://127.0.0.1:{port}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout.readline().strip().endswith(b"holds 2 blocks before event 0")
            process.stdout.close()
            while process.poll() is None:
                owner.clear()
                work(owner)
            assert (process.stderr.read(), process.returncode) == (b"", 0)


def test_a_publisher_over_zeromq_is_followed_on_the_command_line(capsys):
    port = free_ports()
    with manager(events="zmq", events_url=f"tcp://127.0.0.1:{port}") as owner:
        work(owner)
        arguments = ["events", "tail", "--url", f"tcp://127.0.0.1:{port}", "--worker-id", "w-1", "--seconds", "1"]
        assert main(arguments) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.strip() == "w-1: holds 2 blocks before event 0"
    assert last == "0 events, 1 snapshots, 0 gaps"
