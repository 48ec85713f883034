import contextlib
import struct
import threading

import msgspec
import pytest
import zmq
from event_batches import FOREIGN, View, chain
from event_transports import ANY
from event_transports import zmq_publisher as publisher
from event_transports import zmq_subscription as subscribe

from kvbm_jax.errors import ConfigError, TransportError
from kvbm_jax.events import EngineCodec, EventGap, EventType, KvEventBatch, MsgpackCodec
from kvbm_jax.transports.zmq_publisher import ZmqKvEventPublisherConfig
from kvbm_jax.transports.zmq_subscriber import ZmqKvEventSubscriberConfig, subscribe_zmq

END = (b"", b"\xff" * 8, b"")


@pytest.fixture
def context():
    context = zmq.Context()
    yield context
    context.destroy(linger=0)


class Engine:
    """An engine's publisher as others write it: replays what it has kept, knows nothing of snapshots."""

    def __init__(self, kept=100, endpoints=(ANY, ANY)):
        self.context = zmq.Context()
        self.pub, self.router = self.context.socket(zmq.PUB), self.context.socket(zmq.ROUTER)
        self.pub.bind(endpoints[0])
        self.router.bind(endpoints[1])
        self.endpoint, self.replay_endpoint = (
            socket.getsockopt_string(zmq.LAST_ENDPOINT) for socket in (self.pub, self.router)
        )
        self.messages, self.kept, self.requests = [], kept, 0
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=self.serve)
        self.thread.start()

    def publish(self, batch, *, lost=False):
        sequence = struct.pack(">Q", len(self.messages))
        self.messages.append((sequence, EngineCodec().encode(batch)))
        if not lost:
            self.pub.send_multipart([b"", *self.messages[-1]])

    def serve(self):
        while not self.stopped.is_set():
            if self.router.poll(20):
                identity, empty, start = self.router.recv_multipart()
                self.requests += 1
                for sequence, payload in self.messages[-self.kept :]:
                    if sequence >= start:
                        self.router.send_multipart([identity, empty, b"", sequence, payload])
                self.router.send_multipart([identity, empty, *END])

    def close(self):
        self.stopped.set()
        self.thread.join()
        self.context.destroy(linger=0)


def test_messages_lost_on_the_way_are_replayed(context):
    with contextlib.closing(Engine()) as engine, subscribe(engine, codec=None) as subscription:
        view = View()
        for i in range(20):
            engine.publish(chain(2, first_event_id=2 * i, seed=i), lost=i % 3 == 1)
        view.follow(subscription, lambda view: len(view.event_ids) == 40)
    assert view.event_ids == list(range(40))
    assert len(view.claims) == 40
    assert view.gaps == []


def test_messages_lost_at_the_end_are_found_when_it_is_quiet(context):
    with contextlib.closing(Engine()) as engine, subscribe(engine, codec=None, quiet=0.1) as subscription:
        view = View()
        engine.publish(chain(2))
        view.follow(subscription, lambda view: len(view.event_ids) == 2)
        engine.publish(chain(2, seed=1), lost=True)
        view.follow(subscription, lambda view: len(view.event_ids) == 4)
    assert view.gaps == []


def test_what_is_no_longer_kept_is_a_gap(context):
    with contextlib.closing(Engine(kept=2)) as engine, subscribe(engine, codec=None) as subscription:
        view = View()
        engine.publish(chain(2))
        view.follow(subscription, lambda view: len(view.event_ids) == 2)
        for i in range(5):
            engine.publish(chain(2, seed=i), lost=True)
        engine.publish(chain(2, seed=9))
        view.follow(subscription, lambda view: len(view.event_ids) == 6)
    assert view.gaps == [EventGap(4, 0)]


def test_an_engine_without_replay_is_followed_from_where_it_is(context):
    with contextlib.closing(Engine()) as engine:
        engine.publish(chain(1))
        engine.replay_endpoint = None
        with subscribe(engine, codec=None) as subscription:
            view = View()
            item = None
            while item is None:  # until the subscription has reached the engine
                engine.publish(chain(1, seed=1))
                item = subscription.poll(0.05)
            assert isinstance(item, EventGap)
            first = len(engine.messages)
            engine.publish(chain(1, seed=2), lost=True)
            engine.publish(chain(1, seed=3))
            view.follow(subscription, lambda view: view.gaps)
            assert view.gaps == [EventGap(1, 0)]
            assert first > 1


def test_an_engine_that_was_restarted_is_begun_anew():
    engine = Engine()
    with subscribe(engine, codec=None, quiet=0.2) as subscription:
        view = View()
        engine.publish(chain(3))
        view.follow(subscription, lambda view: len(view.claims) == 3)
        engine.close()
        engine = Engine(endpoints=(engine.endpoint, engine.replay_endpoint))
        engine.publish(chain(2, seed=1))
        view.follow(subscription, lambda view: len(view.claims) == 2)
        engine.close()
    assert view.event_ids == list(range(5))  # ids go on: they are this side's own


def ask(context, source, request):
    """What an engine's client does to have messages again."""
    with context.socket(zmq.DEALER) as socket:
        socket.connect(source.replay_endpoint)
        socket.send_multipart([b"", request])
        answer = []
        while not answer or answer[-1] != END:
            assert socket.poll(10_000)
            empty, *frames = socket.recv_multipart()
            assert empty == b""
            answer.append(tuple(frames))
        return answer[:-1]


def test_the_wire_is_that_of_engines(context):
    with publisher(codec=EngineCodec(), topic="kv@w-1") as source, context.socket(zmq.SUB) as sub:
        sub.setsockopt_string(zmq.SUBSCRIBE, "kv@")
        sub.connect(source.endpoint)
        sent = [chain(2, seed=i) for i in range(2000)]
        while not sub.poll(20):  # until the subscription has reached the publisher
            source.publish(sent[0])
        topic, sequence, payload = sub.recv_multipart()
        assert topic == b"kv@w-1"
        assert len(sequence) == 8
        assert payload == FOREIGN["engine"].encode(sent[0])
        before = sum(source.stats())
        for batch in sent:
            source.publish(batch)
        while struct.unpack(">Q", sequence)[0] < before + 1999:
            assert sub.poll(10_000)
            _, sequence, _ = sub.recv_multipart()
        replayed = ask(context, source, struct.pack(">Q", before))
        assert [struct.unpack(">Q", frames[1])[0] for frames in replayed] == list(range(before, before + 2000))
        assert {frames[0] for frames in replayed} == {b"kv@w-1"}
        assert replayed[7][2] == FOREIGN["engine"].encode(sent[7])
        assert ask(context, source, struct.pack(">Q", before + 2000)) == []


def test_a_snapshot_is_a_clearing_and_then_stored_blocks(context):
    with publisher(codec=EngineCodec()) as source:
        source.publish(chain(3))
        answer = []
        while len(answer) < 2:
            answer = ask(context, source, b"snapshot")
    assert [struct.unpack(">Q", frames[1])[0] for frames in answer] == [1, 1]
    events = [msgspec.msgpack.decode(frames[2])[1] for frames in answer]
    assert [[event["type"] for event in batch] for batch in events] == [["AllBlocksCleared"], ["BlockStored"]]
    assert len(events[1][0]["block_hashes"]) == 3


def test_nonsense_is_passed_over(context):
    with publisher() as source, context.socket(zmq.DEALER) as socket:
        socket.connect(source.replay_endpoint)
        for frames in ([b""], [b"x"], [b"", b"short"], [b"", bytes(8), b"more"], [b"x", bytes(8)]):
            socket.send_multipart(frames)
        assert ask(context, source, bytes(8)) == []
        assert not socket.poll(0)
        with (
            context.socket(zmq.DEALER) as shouting,
            shouting.get_monitor_socket(zmq.EVENT_DISCONNECTED) as watch,
        ):
            shouting.setsockopt(zmq.LINGER, 0)
            shouting.connect(source.replay_endpoint)
            shouting.send_multipart([b"", bytes(1 << 20)])
            assert watch.poll(10_000), "who sends too much is cut off"
            shouting.disable_monitor()
        assert ask(context, source, bytes(8)) == []


def test_payloads_that_are_none_are_gaps(context):
    with contextlib.closing(Engine()) as engine, subscribe(engine, codec=None) as subscription:
        view = View()
        engine.messages.append((struct.pack(">Q", 0), b"\xc1"))
        engine.publish(chain(1))
        view.follow(subscription, lambda view: view.claims)
    assert view.gaps == [EventGap(1, 0)]


def test_an_address_that_is_taken_is_one_clear_error():
    with publisher() as source:
        for fields in ({"endpoint": source.endpoint}, {"replay_endpoint": source.replay_endpoint}):
            with pytest.raises(TransportError, match=r"cannot be published at tcp://127.0.0.1:\d+: .*in use"):
                publisher(**fields)
    with pytest.raises(TransportError, match="cannot be published at nonsense"):
        publisher(endpoint="nonsense")
    with pytest.raises(TransportError, match="cannot be read from nonsense"):
        subscribe_zmq(ZmqKvEventSubscriberConfig(endpoint="nonsense"))


@pytest.mark.parametrize("name", ["buffer_steps", "max_queue_size"])
def test_sizes_are_checked(name):
    with pytest.raises(ConfigError, match=f"{name} = 0: allowed is a number >= 1"):
        ZmqKvEventPublisherConfig(**{name: 0})
    with pytest.raises(ConfigError, match="quiet = 0: allowed is a number > 0"):
        ZmqKvEventSubscriberConfig(quiet=0)


@pytest.mark.parametrize(
    ("codec", "what"),
    [
        (EngineCodec(), {"metadata": []}),  # no hash
        (MsgpackCodec(), {"metadata": [{"key": object()}]}),
        (MsgpackCodec(), {"metadata": [{"key": "\ud800"}]}),
    ],
)
def test_what_a_codec_cannot_say_is_not_sent_and_logged_once(caplog, codec, what):
    words = {"worker_id": "w-1", "block_size": 1, "first_event_id": 0, "timestamp": 0}
    unsaid = KvEventBatch.make(EventType.CREATED, [1], **words, **what)
    with publisher(codec=codec) as source, subscribe(source, codec=codec, quiet=0.1) as subscription:
        for _ in range(3):
            source.publish(unsaid)
        source.publish(chain(2))
        view = View()
        view.follow(subscription, lambda view: len(view.claims) == 2)
    assert caplog.text.count("is not sent") == 1
