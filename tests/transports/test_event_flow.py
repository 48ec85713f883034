"""What a router receives from a manager by its configuration alone, over real sockets and a real server."""

import time

import numpy as np
import pytest
from event_transports import free_ports, nats_subscription, zmq_publisher
from tiered import HOST, SIZE, disk, make, prompt, serve, settle

from kvbm_jax.closing import Closing
from kvbm_jax.errors import ConfigError, TransportError
from kvbm_jax.events import EngineCodec, EventType, KvEvent, KvEventBatch, PrefixIndex
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.protocols import Tier
from kvbm_jax.transports.nats_connection import NatsConnection
from kvbm_jax.transports.zmq_subscriber import ZmqKvEventSubscriberConfig, subscribe_zmq


class Router:
    """Believes a stream, and is asked until it answers as expected."""

    def __init__(self, stream, hash_bytes=16):
        self.stream, self.index = stream, PrefixIndex(hash_bytes=hash_bytes)

    def found(self, tokens):
        found = self.index.find_matches(hash_sequence(tokens, SIZE))
        return {(holder.worker_id, holder.dp_rank): overlap.tiers for holder, overlap in found.items()}

    def until(self, tokens, expected):
        deadline = time.monotonic() + 20
        while self.found(tokens) != expected:
            item = self.stream.poll(max(deadline - time.monotonic(), 0.0))
            assert item is not None, f"{self.found(tokens)} of {tokens}"
            self.index.apply(item)


def over_zmq(port):
    ends = {"endpoint": f"tcp://127.0.0.1:{port}", "replay_endpoint": f"tcp://127.0.0.1:{port + 1}"}
    return Router(subscribe_zmq(ZmqKvEventSubscriberConfig(**ends, worker_id="w")), hash_bytes=8)


class Engine(Closing):
    """Publishes what vLLM does, under hashes of its own."""

    def __init__(self, **fields):
        self.publisher = zmq_publisher(codec=EngineCodec(), **fields)
        self.url = f"{self.publisher.endpoint}?replay={self.publisher.replay_endpoint}"

    def close(self):
        self.publisher.close()

    def stores(self, tokens, dp_rank=0):
        blocks = np.array(tokens[: len(tokens) // SIZE * SIZE], np.uint32).reshape(-1, SIZE)
        names = np.stack([(blocks * 2654435761).cumsum(0, np.uint32)[:, 0] + 1] * 4, axis=1)
        batch = KvEventBatch.make(
            EventType.CREATED,
            np.arange(len(blocks)),
            worker_id="engine",
            block_size=SIZE,
            first_event_id=0,
            timestamp=1,
            sequence_hashes=names,
            parent_hashes=np.concatenate([np.zeros((1, 4), np.uint32), names[:-1]]),
            token_ids=blocks,
            dp_rank=dp_rank,
        )
        self.publisher.publish(batch)

    def clears(self):
        self.publisher.publish(KvEventBatch.from_events([KvEvent(EventType.CLEARED, 0, "engine", 1)]))


@pytest.mark.parametrize("mode", ["none", "per_tier", "merged"])
def test_a_router_over_zeromq_hears_of_tiers_as_the_configuration_says(mode):
    port = free_ports()
    zmq = {"events": "zmq", "events_url": f"tcp://127.0.0.1:{port}", "worker_id": "w", "consolidate": mode}
    first, second, third = (prompt(100 * i, 7) for i in range(3))  # each fills the device
    with make(host_blocks=7, **HOST, **zmq) as manager, over_zmq(port).stream as stream:
        early = Router(stream, hash_bytes=8)
        serve(manager, first)
        early.until(first, {("w", 0): {Tier.G1: 7}})
        serve(manager, second)
        settle(manager)
        below = {Tier.G1: 7} if mode == "merged" else {Tier.G2: 7}
        early.until(second, {("w", 0): {Tier.G1: 7}})
        early.until(first, {("w", 0): below})
        late = over_zmq(port)
        late.until(first, {("w", 0): below})
        serve(manager, third)
        settle(manager)
        for router in (early, late):
            router.until(third, {("w", 0): {Tier.G1: 7}})
            router.until(first, {})
        late.stream.close()


@pytest.mark.parametrize("mode", ["per_tier", "merged"])
def test_an_engines_blocks_are_told_with_the_managers(mode, place, server):
    ours, theirs = prompt(0, 2), prompt(0, 4)
    engine = Engine()
    nats = {"events": "nats", "events_url": server.url, "worker_id": place["stream"].name}
    local = {Tier.G1: 2}
    with make(consolidate=mode, engine_events=[engine.url], **nats) as manager:
        subscription = nats_subscription({"connection": NatsConnection.from_url(server.url)})
        router, here = Router(subscription), Router(manager.subscribe_events())
        holder = (place["stream"].name, 0)
        serve(manager, ours)
        router.until(ours, {holder: local})
        engine.stores(theirs)
        for view in (router, here):
            view.until(theirs, {holder: {Tier.G1: 4}})
        manager.clear()
        engine.stores(prompt(50, 1))  # what comes after says that the clearing has been heard
        for view in (router, here):
            view.until(prompt(50, 1), {holder: {Tier.G1: 1}})
            assert view.found(theirs) == {holder: {Tier.G1: 4}}, "the engine has them still"
        serve(manager, ours)
        engine.clears()
        for view in (router, here):
            view.until(theirs, {holder: local})
            assert view.found(prompt(50, 1)) == {}
        subscription.close()
    engine.close()


def test_an_engine_that_is_restarted_begins_anew_and_ranks_are_apart():
    port = free_ports()
    ends = {"endpoint": f"tcp://127.0.0.1:{port}", "replay_endpoint": f"tcp://127.0.0.1:{port + 1}"}
    other = Engine()
    addresses = [f"{ends['endpoint']}?replay={ends['replay_endpoint']}", other.url]  # nobody is at the first yet
    with make(consolidate="per_tier", engine_events=addresses) as manager:
        here = Router(manager.subscribe_events())
        other.stores(prompt(0, 1), dp_rank=1)
        here.until(prompt(0, 1), {("0", 1): {Tier.G1: 1}})
        with Engine(**ends) as first:
            first.stores(prompt(0, 3))
            here.until(prompt(0, 3), {("0", 0): {Tier.G1: 3}, ("0", 1): {Tier.G1: 1}})
            late = Router(manager.subscribe_events(snapshot=True))
            late.until(prompt(0, 3), {("0", 0): {Tier.G1: 3}, ("0", 1): {Tier.G1: 1}})
        with Engine(**ends) as second:
            second.stores(prompt(70, 1))
            here.until(prompt(70, 1), {("0", 0): {Tier.G1: 1}})
        assert here.found(prompt(0, 3)) == {("0", 1): {Tier.G1: 1}}
    other.close()


def test_a_router_in_this_process_knows_what_lies_on_disk_from_an_earlier_life(tmp_path):
    with make(**disk(tmp_path)) as manager:
        serve(manager, prompt(0, 2))
    with make(**disk(tmp_path)) as manager:
        router = Router(manager.subscribe_events(snapshot=True))
        router.until(prompt(0, 2), {("0", 0): {Tier.G3: 2}})
        serve(manager, prompt(0, 3))
        router.until(prompt(0, 3), {("0", 0): {Tier.G1: 3}})


def test_addresses_that_are_none_are_refused_before_anything_runs():
    with pytest.raises(ConfigError, match=r"asks for reply; known is replay"):
        make(consolidate="merged", engine_events=["tcp://127.0.0.1:1?reply=tcp://127.0.0.1:2"])
    with pytest.raises(TransportError, match="events cannot be read from carrier://pigeon"):
        make(consolidate="merged", engine_events=["carrier://pigeon"])
