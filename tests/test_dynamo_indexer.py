"""The real Dynamo on the wire: its indexer, subscribed to our ZeroMQ publisher, answers as `PrefixIndex` does."""

import contextlib
import itertools
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import zmq
from block_moves import Moves, held
from event_transports import free_ports
from tiered import SIZE

from kvbm_jax.events import Consolidator, EventType, KvEvent, KvEventBatch, ParentGate, PrefixIndex, RecordingEventSink
from kvbm_jax.hashing import hash_bytes, hash_sequence
from kvbm_jax.protocols import Tier
from kvbm_jax.transports.zmq_publisher import ZmqKvEventPublisher, ZmqKvEventPublisherConfig

pytest.importorskip("dynamo.indexer")

WORKER = 7


class Lossy:
    """Stands between a publisher and the indexer, and loses messages on request; replays do not pass through it."""

    def __init__(self, endpoint):
        self.context = zmq.Context()
        self.source, self.target = self.context.socket(zmq.SUB), self.context.socket(zmq.XPUB)
        for end in (self.source, self.target):
            end.set(zmq.RCVTIMEO, 30_000)
            end.set_hwm(0)
        self.source.connect(endpoint)
        self.source.subscribe("")
        self.endpoint = f"tcp://127.0.0.1:{self.target.bind_to_random_port('tcp://127.0.0.1')}"
        self.passed = self.lost = 0

    def take(self, milliseconds):
        """The next message, None if there is none in that time."""
        return self.source.recv_multipart() if self.source.poll(milliseconds) else None

    def carry(self, count, losing=()):
        """Passes on that many messages, less those of the given numbers among them."""
        for number in range(count):
            message = self.source.recv_multipart()
            if number in losing:
                self.lost += 1
            else:
                self.target.send_multipart(message)
                self.passed += 1

    def close(self):
        self.context.destroy(linger=0)


class Indexer:
    """`python -m dynamo.indexer` on a free port."""

    def __init__(self):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "dynamo.indexer", "--port", str(port), "--threads", "1"]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.until(lambda: self.ask("/health") is not None)

    def ask(self, path, **body):
        """The answer to a request; None while nobody answers."""
        data = json.dumps(body).encode() if body else None
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read().decode()
        except urllib.error.URLError as error:
            if isinstance(error.reason, ConnectionRefusedError):
                return None
            raise

    def until(self, condition):
        deadline = time.monotonic() + 30
        while not condition():
            assert self.process.poll() is None, "the indexer has ended"
            assert time.monotonic() < deadline

    def blocks(self, tokens):
        """How many leading blocks of a prompt the worker has."""
        found = json.loads(self.ask("/query", token_ids=list(tokens), model_name="tiny"))["instances"]
        tokens_held = found.get(str(WORKER), {}).get("longest_matched", 0)
        assert tokens_held % SIZE == 0
        return tokens_held // SIZE

    def close(self):
        self.process.terminate()
        self.process.wait(30)


def event(kind, tokens=()):
    """An event of the worker about a prompt's only block."""
    named = {"sequence_hash": hash_bytes(hash_sequence(tokens, SIZE)[0]), "tier": Tier.G1} if tokens else {}
    return KvEvent(kind, 0, str(WORKER), 1, token_ids=tuple(tokens), block_size=SIZE, **named)


def test_dynamos_indexer_answers_as_our_index_does_after_a_replayed_gap():
    index, moves = PrefixIndex(), Moves(seed=1, loras=[None])
    config = ZmqKvEventPublisherConfig(
        worker_id=str(WORKER), endpoint="tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*"
    )
    questions = [next(moves.prompts)[0] for _ in range(40)]
    answers = set()
    sent = RecordingEventSink()
    with contextlib.ExitStack() as opened:
        publisher = opened.enter_context(ZmqKvEventPublisher(config))
        lossy = opened.enter_context(contextlib.closing(Lossy(publisher.endpoint)))
        indexer = opened.enter_context(contextlib.closing(Indexer()))
        where = {"endpoint": lossy.endpoint, "replay_endpoint": publisher.replay_endpoint}
        indexer.ask("/register", instance_id=WORKER, model_name="tiny", block_size=SIZE, **where)
        assert lossy.target.recv() == b"\1", "the indexer has subscribed"
        gate = ParentGate(sent, worker_id=str(WORKER), tier=Tier.G1)
        source = Consolidator(gate, worker_id=str(WORKER), mode="merged").source("manager")
        nothing = KvEventBatch.from_events([event(EventType.CLEARED)])
        while lossy.take(10) is None:  # until the publisher knows its subscriber
            publisher.publish(nothing)
        while lossy.take(100) is not None:
            pass
        opened.enter_context(moves.manager)
        for checkpoint in range(1, 6):
            while moves.count < 200 * checkpoint:
                for batch in moves.move():
                    index.apply(batch)
                    source.publish(batch)
            mark = event(EventType.CREATED, range(checkpoint * 1000, checkpoint * 1000 + SIZE))
            sent.publish(KvEventBatch.from_events([mark]))
            for batch in sent.batches:
                publisher.publish(batch)
            count = len(sent.batches)
            lossy.carry(count, losing=set(moves.draw.sample(range(count - 1), count // 5)))
            sent.batches.clear()
            indexer.until(lambda tokens=mark.token_ids: indexer.blocks(tokens) == 1)
            for tokens in questions:
                ours = held(index, tokens)
                assert indexer.blocks(tokens) == ours
                answers.add(ours)
    assert answers >= set(range(6))
    assert min(lossy.lost, lossy.passed) >= 20


def test_dynamos_indexer_follows_a_manager_by_its_configuration_alone():
    port = free_ports()
    config = {"events": "zmq", "events_url": f"tcp://127.0.0.1:{port}", "consolidate": "merged"}
    moves, index = Moves(seed=2, loras=[None], worker_id=str(WORKER), **config), PrefixIndex()
    questions = [next(moves.prompts)[0] for _ in range(40)]
    with moves.manager as manager, contextlib.closing(Indexer()) as indexer:
        where = {"endpoint": f"tcp://127.0.0.1:{port}", "replay_endpoint": f"tcp://127.0.0.1:{port + 1}"}
        indexer.ask("/register", instance_id=WORKER, model_name="tiny", block_size=SIZE, **where)

        unused = itertools.count(1000, SIZE)

        def hears():
            """Whether the indexer has, by now, a block that is told of now."""
            first = next(unused)
            manager.publish_event(mark := event(EventType.CREATED, range(first, first + SIZE)))
            return indexer.blocks(mark.token_ids) == 1

        indexer.until(hears)
        for last in range(1, 4):
            while moves.count < 100 * last:
                for batch in moves.move():
                    index.apply(batch)
            indexer.until(hears)
            assert [indexer.blocks(tokens) for tokens in questions] == [held(index, tokens) for tokens in questions]
    assert index.stats().unknown_deletes == 0
