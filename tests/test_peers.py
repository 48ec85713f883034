"""Managers that find blocks in each other's host memory: contents right, faults no more than misses."""

import threading
import time
import urllib.parse

import pytest
from tiered import SIZE, make, prompt, serve, settle

from kvbm_jax import KvBlockManagerConfig
from kvbm_jax.errors import ConfigError
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.peers import PullCost
from kvbm_jax.protocols import Tier
from kvbm_jax.transfer import SocketConfig

PATIENCE = 20.0


def shared(worker, tokens):
    """Serves a prompt whose blocks are in host memory afterwards."""
    blocks = len(tokens) // SIZE
    serve(worker, tokens)
    assert worker.share(tokens) == blocks * SIZE
    settle(worker)


def pulled(worker, tokens, blocks):
    """Serves a prompt once so many of its blocks are known to be somewhere; returns its hits."""
    deadline = time.monotonic() + PATIENCE
    while sum((found := worker.locate(tokens)).values()) < blocks * SIZE:
        assert time.monotonic() < deadline, f"after {PATIENCE} s {found} is known"
        threading.Event().wait(0.01)
    hits = serve(worker, tokens)
    assert hits == found
    return hits


def test_a_prefix_is_pulled_from_a_peer(workers):
    metrics = InMemoryMetrics()
    first = workers()
    second = workers(metrics=metrics)
    shared(first, prompt(0, 6))
    assert pulled(second, prompt(0, 6), 6) == {Tier.G4: 6 * SIZE}
    assert metrics.snapshot()['kvbm_transfer_blocks_total{source="g4",target="g2"}'] == 6
    # What came is this worker's own now, and is found on its device.
    assert serve(second, prompt(0, 6)) == {Tier.G1: 6 * SIZE}


def test_a_workers_own_tiers_come_first_and_the_peers_go_on(workers):
    first, second = workers(), workers()
    shared(first, prompt(0, 6))
    serve(second, prompt(0, 2))
    assert pulled(second, prompt(0, 6), 6) == {Tier.G1: 2 * SIZE, Tier.G4: 4 * SIZE}


def test_a_prefix_that_is_longer_than_what_may_land_at_a_time_is_pulled_in_parts(workers, monkeypatch):
    monkeypatch.setattr("kvbm_jax.peers._LANDING_BLOCKS", 4)
    first, second = workers(), workers()
    shared(first, prompt(0, 6))
    assert pulled(second, prompt(0, 6), 6) == {Tier.G4: 6 * SIZE}


def test_a_peer_that_is_gone_is_a_miss(workers):
    first, second = workers(), workers(network={"timeout": 2.0})
    shared(first, prompt(0, 3))
    assert pulled(second, prompt(0, 3), 3) == {Tier.G4: 3 * SIZE}
    shared(first, prompt(100, 3))
    first.close(0)
    assert serve(second, prompt(100, 3)) == {}


def test_peers_of_another_model_are_not_asked(workers):
    first, second = workers(), workers(model_id="another")
    third = workers()
    shared(first, prompt(0, 3))
    assert pulled(third, prompt(0, 3), 3) == {Tier.G4: 3 * SIZE}
    assert serve(second, prompt(0, 3)) == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_id": None}, "model_id is unset"),
        ({"host_blocks": 0, "disk_budget": 1 << 20}, "peers read host memory, and there is none"),
    ],
)
def test_what_peers_need_is_said(workers, changes, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        workers(offload_path=tmp_path / "disk", **changes)


def test_a_configuration_joins_the_workers_of_a_nats_server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    values = {"enable_offload": True, "host_blocks": 16, "model_id": "tiny", "events": "nats", "peers": "nats"}
    values |= {"peer_address": "tcp://127.0.0.1:0", "transfer_engine": "tcp", "prefill_tokens_per_second": 1e-3}
    with make(worker_id="one", **values) as first, make(worker_id="two", **values) as second:
        shared(first, prompt(0, 4))
        assert pulled(second, prompt(0, 4), 4) == {Tier.G4: 4 * SIZE}
        shared(second, prompt(50, 2))
        assert pulled(first, prompt(50, 2), 2) == {Tier.G4: 2 * SIZE}


def test_workers_find_each_other_again_after_their_nats_server_was_killed(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    nats_server = pytest.importorskip("kvbm_jax.transports.nats_server")
    server = nats_server.NatsServer(tmp_path / "nats")
    again = {"port": urllib.parse.urlsplit(server.url).port, "token": urllib.parse.urlsplit(server.url).username}
    values = {"enable_offload": True, "host_blocks": 16, "model_id": "tiny", "events": "nats", "peers": "nats"}
    values |= {"events_url": server.url, "transfer_engine": "tcp"}
    with make(worker_id="one", **values) as first, make(worker_id="two", **values) as second:
        shared(first, prompt(0, 4))
        assert pulled(second, prompt(0, 4), 4) == {Tier.G4: 4 * SIZE}
        server.kill()
        server.stop()
        shared(first, prompt(50, 2))  # told to nobody yet
        assert sum(serve(second, prompt(100, 3)).values()) == 0
        assert sum(serve(second, prompt(0, 4)).values()) == 4 * SIZE  # what it has itself
        with nats_server.NatsServer(tmp_path / "nats", **again):
            assert pulled(second, prompt(50, 2), 2) == {Tier.G4: 2 * SIZE}
            shared(second, prompt(200, 3))
            assert pulled(first, prompt(200, 3), 3) == {Tier.G4: 3 * SIZE}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peers": "nats"}, "peers = nats but there is no host tier"),
        ({"peers": "nats", "enable_offload": True, "host_blocks": 4}, "model_id is unset"),
        ({"peers": "nats", "enable_offload": True, "host_blocks": 4, "model_id": "m"}, "set events = nats"),
        ({"peers": "friends"}, "'friends' is no network of peers; choose from none, nats"),
        ({"peer_address": "tcp://127.0.0.1:0"}, "but peers = none"),
    ],
)
def test_configurations_of_peers_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        KvBlockManagerConfig(**changes)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", "no address to listen at"),
        ("tcp://127.0.0.1:99999", "port of"),
        ("tcp://127.0.0.1:1?tokenfile=x", "asks for tokenfile"),
        ("tcp://0.0.0.0:1", "name a token_file"),
    ],
)
def test_addresses_that_are_none(url, message):
    with pytest.raises(ConfigError, match=message):
        SocketConfig.from_url(url)


def test_pulling_is_weighed_against_computing():
    cost = PullCost(block_size=4, tokens_per_second=100.0)  # 40 ms a block
    assert cost.worth(1)
    assert not cost.worth(0)
    cost.learn(10, 0.1)
    assert cost.worth(10)
    for _ in range(10):
        cost.learn(10, 10.0)
    assert not cost.worth(10)
    assert next(i for i in range(1000) if cost.worth(10)) > 50  # what is known fades
    assert PullCost(block_size=4, tokens_per_second=None).worth(1)
