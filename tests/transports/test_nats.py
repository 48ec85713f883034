import asyncio
import random
import stat
import subprocess
import sys
import threading
import time

import nats
import pytest
from event_batches import View, chain, random_life
from event_transports import nats_publisher as publisher
from event_transports import nats_subscription as subscribe
from nats_tokens import Operator, pair

from kvbm_jax.errors import ConfigError, TransportError
from kvbm_jax.events import EngineCodec, EventGap, WorkerSnapshot
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.transports import nats_publisher as nats_publisher_module
from kvbm_jax.transports import nats_server
from kvbm_jax.transports.nats_connection import NatsConnection
from kvbm_jax.transports.nats_publisher import NatsKvEventPublisher, NatsKvEventPublisherConfig
from kvbm_jax.transports.nats_server import NatsServer, SharedNatsServer
from kvbm_jax.transports.nats_subscriber import NatsKvEventSubscriberConfig
from kvbm_jax.transports.nats_wire import MESSAGE_ID, MessageId, NatsStream, Subjects

BOTH = pytest.mark.parametrize("jetstream", [True, False], ids=["jetstream", "core"])


@pytest.mark.parametrize("faults", [1, 3])
def test_a_server_killed_mid_stream_loses_nothing_and_tells_nothing_twice(tmp_path, faults):
    server = NatsServer(tmp_path / "store")
    place = {"connection": NatsConnection.from_url(server.url)}
    token, port = server._token, server.port
    batches = [chain(3, first_event_id=3 * i, seed=i) for i in range(900)]
    with publisher(place, linger=20.0) as source, subscribe(place) as subscription:
        view = View()
        view.follow(subscription, lambda view: view.snapshots)

        def publish():
            for i, batch in enumerate(batches):
                source.publish(batch)
                if i % 10 == 9:
                    threading.Event().wait(0.002)

        thread = threading.Thread(target=publish)
        thread.start()
        for fault in range(faults):
            view.follow(subscription, lambda view, n=600 * (fault + 1): len(view.event_ids) >= n)
            server.kill()
            server.stop()
            server = NatsServer(tmp_path / "store", port=port, token=token)
        view.follow(subscription, lambda view: len(view.event_ids) >= 2700)
        thread.join()
    server.stop()
    assert view.event_ids == list(range(2700))
    assert (view.snapshots, view.gaps) == (1, [])


def test_a_core_subscriber_is_right_again_after_the_server_was_killed(tmp_path):
    server = NatsServer(tmp_path / "store")
    place = {"connection": NatsConnection.from_url(server.url), "jetstream": False}
    life = random_life(random.Random(7))
    with publisher(place) as source, subscribe(place) as subscription:
        view = View()
        for batch, _ in life[:30]:
            source.publish(batch)
        view.follow(subscription, lambda view: view.claims == life[29][1])
        server.kill()
        server.stop()
        for batch, _ in life[30:]:
            source.publish(batch)
        with NatsServer(tmp_path / "store", port=server.port, token=server._token):
            view.follow(subscription, lambda view: view.claims == life[-1][1])
            source.close()
    assert view.gaps == []


def test_a_reader_away_for_ten_thousand_events_catches_up(place):
    with publisher(place) as source:
        with subscribe(place, durable="router") as subscription:
            view = View()
            view.follow(subscription, lambda view: view.snapshots)
            source.publish(chain(10))
            view.follow(subscription, lambda view: len(view.event_ids) == 10)
            assert source.flush(20)
        for i in range(1, 1001):
            source.publish(chain(10, 1, first_event_id=10 * i, seed=i))
        assert source.flush(20)
        with subscribe(place, durable="router") as subscription:
            view.follow(subscription, lambda view: len(view.event_ids) >= 10_010)
    assert view.event_ids == list(range(10_010))
    assert (view.snapshots, view.gaps) == (1, [])


def test_what_a_durable_reader_had_not_taken_comes_again_and_in_order(place):
    with publisher(place) as source:
        with subscribe(place, durable="router") as subscription:
            view = View()
            view.follow(subscription, lambda view: view.snapshots)
            for i in range(20):
                source.publish(chain(1, first_event_id=i, seed=i))
            view.follow(subscription, lambda view: len(view.event_ids) == 3)
        source.publish(chain(1, first_event_id=20, seed=20))
        with subscribe(place, durable="router") as subscription:
            again = View()
            again.follow(subscription, lambda view: view.event_ids[-1:] == [20])
    assert again.event_ids == list(range(again.event_ids[0], 21))
    assert again.event_ids[0] <= 3


def test_a_durable_reader_whose_place_is_gone_gets_a_snapshot(place):
    place["stream"] = NatsStream(name=place["stream"].name, max_msgs=5)
    with publisher(place) as source:
        with subscribe(place, durable="router") as subscription:
            view = View()
            view.follow(subscription, lambda view: view.snapshots)
        for i in range(20):
            source.publish(chain(2, first_event_id=2 * i, seed=i))
        assert source.flush(20)
        with subscribe(place, durable="router") as subscription:
            view.follow(subscription, lambda view: len(view.claims) == 40)
    assert (view.snapshots, view.gaps) == (2, [])


def test_who_had_nothing_to_say_for_long_is_no_broken_connection(place, monkeypatch, caplog):
    monkeypatch.setattr(nats_publisher_module, "_PATIENCE", 1.0)
    with publisher(place) as source:
        for i in range(2):
            source.publish(chain(1, first_event_id=i, seed=i))
            assert source.flush(20)
            threading.Event().wait(1.1)  # longer than an answer may take
    assert caplog.messages == []


@BOTH
def test_a_prompt_of_any_length_is_told_in_messages_that_a_server_takes(place, jetstream):
    long = chain(8192, block_size=16)  # a message of 1.1 MB
    with publisher(place, jetstream=jetstream) as source, subscribe(place, jetstream=jetstream) as subscription:
        view = View()
        view.follow(subscription, lambda view: view.snapshots)
        source.publish(long)
        view.follow(subscription, lambda view: len(view.event_ids) == 8192)
        with subscribe(place, jetstream=jetstream) as late:
            later = View()
            later.follow(late, lambda view: len(view.claims) == 8192)
    assert (view.event_ids, view.gaps, view.snapshots) == (list(range(8192)), [], 1)
    assert source.stats().unsent == 0


def test_what_a_server_finds_too_long_is_counted_and_leaves_a_gap(tmp_path, caplog):
    metrics = InMemoryMetrics()
    with NatsServer(tmp_path / "store", settings=["max_payload: 4096"]) as server:
        place = {"connection": NatsConnection.from_url(server.url)}
        config = NatsKvEventPublisherConfig(worker_id="w-1", **place)
        with NatsKvEventPublisher(config, metrics=metrics) as source, subscribe(place, patience=0.5) as subscription:
            view = View()
            view.follow(subscription, lambda view: view.snapshots)
            source.publish(chain(100))
            source.publish(chain(2, first_event_id=100, seed=1))
            view.follow(subscription, lambda view: view.event_ids == [100, 101])
            assert source.flush(20)
            stats = source.stats()
    assert view.gaps == [EventGap(1, 0)]
    assert (stats.taken, stats.unsent) == (2, 1)
    assert metrics.snapshot()["kvbm_events_dropped_total"] == 100
    assert "of 100 events is not sent" in caplog.text
    assert "the server takes 4,096 (its max_payload)" in caplog.text


def test_a_stream_is_replayed_from_a_sequence(place):
    with publisher(place) as source:
        for i in range(20):
            source.publish(chain(1, first_event_id=i, seed=i))
        assert source.flush(20)
    with subscribe(place, start_sequence=6) as subscription:
        view = View()
        view.follow(subscription, lambda view: view.event_ids[-1:] == [19])
    assert view.event_ids == list(range(5, 20))


def test_events_of_a_worker_that_is_gone_are_a_gap(place):
    with subscribe(place) as subscription:
        source = publisher(place, max_queue_size=1)
        for i in range(200):
            source.publish(chain(1, first_event_id=i, seed=i))
        view = View()
        view.follow(subscription, lambda view: view.event_ids or view.snapshots)
        source.close()
    with subscribe(place, start_sequence=1) as subscription:
        view = View()
        view.follow(subscription, lambda view: view.event_ids[-1:] == [199])
    lost = source.stats().dropped
    assert lost == sum(gap.batches for gap in view.gaps) + view.event_ids[0]


@BOTH
def test_a_subscriber_may_come_before_the_first_worker(place, jetstream):
    life = random_life(random.Random(1))
    with subscribe(place, jetstream=jetstream) as subscription, publisher(place, jetstream=jetstream) as source:
        view = View()
        for batch, _ in life:
            source.publish(batch)
        view.follow(subscription, lambda view: view.claims == life[-1][1])
    assert view.gaps == []


def test_workers_have_a_subject_each_whatever_they_are_called(place):
    names = ["w.1", "w*", "w>", "w:1:2", "wörker", "w/2"]
    views = {}
    with subscribe(place) as subscription:
        for i, name in enumerate(names):
            with publisher(place, worker_id=name) as source:
                source.publish(chain(i + 1, worker_id=name, seed=i))
        while len(views) < len(names):
            item = subscription.poll(10)
            assert item is not None
            if not isinstance(item, WorkerSnapshot):
                views[item.worker_id] = len(item)
    assert views == {name: i + 1 for i, name in enumerate(names)}


def test_the_messages_are_as_documented(server, place):
    async def read():
        client = await nats.connect(server.url)
        subscription = await client.subscribe(f"{place['subjects'].prefix}.events.*")
        await client.flush()
        with await asyncio.to_thread(publisher, place, worker_id="w.1") as source:
            source.publish(chain(2))
            message = await subscription.next_msg(10)
        await client.close()
        return message

    message = asyncio.run(read())
    assert message.subject == f"{place['subjects'].prefix}.events.w%2E1"
    found = MessageId.of(message)
    assert (found.worker_id, found.sequence) == ("w.1", 0)
    assert message.headers[MESSAGE_ID] == str(found)


def test_messages_that_are_none_are_passed_over(server, place):
    async def write():
        client = await nats.connect(server.url)
        subject = place["subjects"].events("w-1")
        await client.publish(subject, b"no id")
        for text in ("", "w-1", "w-1:x:0", "w-1:1:-1", f"w-1:1:{'9' * 30}"):
            await client.publish(subject, b"wrong id", headers={MESSAGE_ID: text or " "})
        await client.publish(subject, b"\xc1", headers={MESSAGE_ID: "w-1:1:0"})
        await client.close()

    with subscribe(place) as subscription:
        asyncio.run(write())
        view = View()
        view.follow(subscription, lambda view: view.gaps)
        assert view.gaps == [EventGap(1, 0)]
        with publisher(place) as source:
            source.publish(chain(2))
            view.follow(subscription, lambda view: len(view.claims) == 2)


def test_a_publisher_without_server_closes_in_time(tmp_path):
    server = NatsServer(tmp_path)
    source = publisher({"connection": NatsConnection.from_url(server.url)}, linger=0.2)
    server.stop()
    source.publish(chain(1))
    begun = time.monotonic()
    source.close()
    assert 0.1 < time.monotonic() - begun < 10


def test_credentials_of_every_kind(tmp_path):
    seed, public = pair()
    (tmp_path / "right.nk").write_bytes(seed)
    (tmp_path / "wrong.nk").write_bytes(pair()[0])
    users = f'authorization: {{ users: [{{user: "u", password: "p:@/"}}, {{nkey: "{public}"}}] }}'
    (tmp_path / "no.creds").write_text("nothing of the kind")
    with NatsServer(tmp_path / "store", token="", settings=[users]) as server:
        host = f"127.0.0.1:{server.port}"
        for url in (f"nats://u:p%3A%40%2F@{host}", f"nats://{host}?nkey={tmp_path}/right.nk"):
            publisher({"connection": NatsConnection.from_url(url)}).close()
        for url, way in (
            (f"nats://u:wrong@{host}", "user 'u'"),
            (f"nats://sesame@{host}", "a token"),
            (f"nats://{host}", "none were given"),
            (f"nats://{host}?nkey={tmp_path}/wrong.nk", "nkey .*wrong.nk"),
        ):
            for use in (publisher, subscribe):
                with pytest.raises(TransportError, match=rf"refuses the credentials \({way}\)") as caught:
                    use({"connection": NatsConnection.from_url(url)})
                assert "wrong@" not in str(caught.value)
        for kind in ("creds", "nkey"):
            with pytest.raises(TransportError, match=r"no\.creds holds no key of a NATS user"):
                publisher({"connection": NatsConnection.from_url(f"nats://{host}?{kind}={tmp_path}/no.creds")})


def test_a_file_of_credentials_is_shown_to_a_server_that_trusts_its_operator(tmp_path, caplog):
    operator = Operator()
    files = {
        "right": operator.credentials(),
        "foreign": Operator().credentials(),
        "expired": operator.credentials({"exp": 1}),
        "mute": operator.credentials(pub={"deny": ["kvbm.events.>"]}),
    }
    for name, text in files.items():
        (tmp_path / f"{name}.creds").write_text(text)
    with NatsServer(tmp_path / "store", token="", settings=operator.settings) as server:
        place = {
            name: {
                "connection": NatsConnection.from_url(f"nats://127.0.0.1:{server.port}?creds={tmp_path}/{name}.creds")
            }
            for name in files
        }
        with publisher(place["right"]) as source, subscribe(place["right"]) as subscription:
            source.publish(chain(2))
            View().follow(subscription, lambda view: len(view.claims) == 2)
        for name in ("foreign", "expired"):
            with pytest.raises(TransportError, match=rf"refuses the credentials \(.*{name}\.creds\)"):
                publisher(place[name])
        assert caplog.messages == []
        with publisher(place["mute"], linger=0.2) as source:
            source.publish(chain(2))
            deadline = time.monotonic() + 20
            while not caplog.messages and time.monotonic() < deadline:
                threading.Event().wait(0.01)
        assert 'permissions violation for publish to "kvbm.events.w-1"' in caplog.messages[0].lower()


def certificate(folder, name, subject):
    key, cert = folder / f"{name}.key", folder / f"{name}.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -addext subjectAltName=IP:127.0.0.1"
    subprocess.run(
        [*make.split(), "-keyout", key, "-out", cert, "-subj", f"/CN={subject}"], check=True, capture_output=True
    )
    return key, cert


def test_tls_and_certificates_of_clients(tmp_path):
    key, cert = certificate(tmp_path, "server", "127.0.0.1")
    client_key, client_cert = certificate(tmp_path, "client", "client")
    tls = f'tls: {{ cert_file: "{cert}", key_file: "{key}", ca_file: "{client_cert}", verify: true }}'
    with NatsServer(tmp_path / "store", token="", settings=[tls]) as server:
        url = f"tls://127.0.0.1:{server.port}?tls_ca={cert}"
        own = f"&tls_cert={client_cert}&tls_key={client_key}"
        publisher({"connection": NatsConnection.from_url(url + own)}).close()
        for wrong in (url, f"tls://127.0.0.1:{server.port}?tls_ca={client_cert}{own}"):
            with pytest.raises(TransportError, match="no NATS server answers at tls://"):
                publisher({"connection": NatsConnection.from_url(wrong)})


@pytest.mark.parametrize(
    ("url", "match"),
    [
        ("http://h", "no address of a NATS server"),
        ("nats://", "no address of a NATS server"),
        ("nats://u:secret@h:x", r"the port of 'nats://\.\.\.@h:x' is none"),
        ("nats://h?colour=red", "asks for colour; known are nkey, creds"),
        ("nats://h?creds=/nowhere", "creds = '/nowhere': there is no such file"),
        (f"nats://u:p@h?nkey={__file__}", "user and nkey are given"),
        (f"tls://h?tls_key={__file__}", "tls_key without tls_cert"),
    ],
)
def test_addresses_that_are_none(url, match):
    with pytest.raises(ConfigError, match=match) as caught:
        NatsConnection.from_url(url)
    assert "secret" not in str(caught.value)


def test_a_connection_shows_no_secret():
    for url in ("nats://u:sesame@h", "nats://sesame@h"):
        connection = NatsConnection.from_url(url)
        assert "sesame" not in f"{connection} {NatsKvEventPublisherConfig(connection=connection)}"


def test_nobody_there_is_one_clear_error():
    with pytest.raises(TransportError, match=r"no NATS server answers at nats://127\.0\.0\.1:1"):
        publisher({"connection": NatsConnection(url="nats://127.0.0.1:1", timeout=1.0)})


def test_a_server_without_jetstream_is_one_clear_error(tmp_path):
    with NatsServer(tmp_path, settings=["jetstream: false"]) as server:
        place = {"connection": NatsConnection.from_url(server.url)}
        for use in (publisher, subscribe):
            with pytest.raises(TransportError, match="has no JetStream"):
                use(place)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NatsKvEventPublisherConfig(max_queue_size=0), "max_queue_size = 0"),
        (lambda: NatsKvEventPublisherConfig(codec=EngineCodec()), "NATS carries native messages"),
        (lambda: NatsKvEventSubscriberConfig(codec=EngineCodec()), "NATS carries native messages"),
        (lambda: NatsKvEventSubscriberConfig(jetstream=False, durable="a"), "are JetStream's"),
        (lambda: NatsKvEventSubscriberConfig(durable="a.b"), r"durable = 'a\.b'"),
        (lambda: NatsKvEventSubscriberConfig(start_sequence=0), "start_sequence = 0"),
        (lambda: Subjects("a.*"), r"prefix = 'a\.\*'"),
    ],
)
def test_configurations_are_checked(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


def test_workers_of_one_host_share_a_server(tmp_path):
    first, second = (SharedNatsServer(tmp_path, tmp_path / "store") for _ in range(2))
    connection = first.connection()
    assert second.connection() == first.connection() == connection
    assert stat.S_IMODE((tmp_path / "nats.json").stat().st_mode) == 0o600
    with publisher({"connection": connection}) as source:
        source.publish(chain(3))
    first.close()
    first.close()
    with pytest.raises(TransportError, match="share in the NATS server is closed"):
        first.connection()
    other = second.connection()  # the owner is gone: this one is the owner now, of the same stream
    assert other != connection
    with subscribe({"connection": other}, start_sequence=1) as subscription:
        view = View()
        view.follow(subscription, lambda view: len(view.claims) == 3)
    second.close()
    assert not (tmp_path / "nats.json").exists()


OWNER = """
import os, sys
from pathlib import Path
from kvbm_jax.transports.nats_server import SharedNatsServer
SharedNatsServer(Path(sys.argv[1]), Path(sys.argv[1]) / "store").connection()
print("up", flush=True)
os.kill(os.getpid(), 9)
"""


def test_the_server_of_an_owner_that_was_killed_is_taken_over(tmp_path):
    killed = subprocess.run([sys.executable, "-c", OWNER, tmp_path], capture_output=True, check=False)
    assert killed.stdout == b"up\n"
    shared = SharedNatsServer(tmp_path, tmp_path / "store")
    with publisher({"connection": shared.connection()}) as source:
        source.publish(chain(3))
    pid = shared._adopted
    assert pid is not None
    shared.close()
    deadline = time.monotonic() + 20
    while nats_server._alive(pid):
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def test_a_publisher_follows_the_shared_server_to_its_next_owner(tmp_path):
    first, second = (SharedNatsServer(tmp_path, tmp_path / "store") for _ in range(2))
    first.connection()
    source = NatsKvEventPublisher(NatsKvEventPublisherConfig(worker_id="w-1"), resolve=second.connection)
    source.publish(chain(2))
    assert source.flush(20)
    first.close()
    source.publish(chain(2, first_event_id=2, seed=1))
    assert source.flush(20)
    with subscribe({"connection": second.connection()}, start_sequence=1) as subscription:
        view = View()
        view.follow(subscription, lambda view: len(view.event_ids) == 4)
    assert view.event_ids == list(range(4))
    source.close()
    second.close()
