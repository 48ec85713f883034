"""What holds of every transport beyond the process."""

import asyncio
import random
import threading

import pytest
from event_batches import View, chain, random_life
from event_transports import OverNats, OverZmq

from kvbm_jax.errors import BlockStateError
from kvbm_jax.events import KvEventBatch, WorkerSnapshot


@pytest.fixture(params=["zmq", "jetstream", "core"])
def transport(request):
    if request.param == "zmq":
        return OverZmq()
    return OverNats(request.getfixturevalue("place"), jetstream=request.param == "jetstream")


def test_a_late_subscriber_gets_a_snapshot_and_then_the_stream(transport):
    life = random_life(random.Random(0))
    with transport.publisher() as source:
        for batch, _ in life[:30]:
            source.publish(batch)
        transport.settle(source)
        with transport.subscribe(source) as subscription:
            view = View()
            view.follow(subscription, lambda view: view.snapshots)
            assert view.claims == life[29][1]
            for batch, _ in life[30:]:
                source.publish(batch)
            last = int(life[-1][0].event_ids[-1])
            view.follow(subscription, lambda view: view.event_ids[-1:] == [last])
    assert view.claims == life[-1][1]
    assert view.gaps == []
    assert view.event_ids == list(range(view.event_ids[0], last + 1))


@pytest.mark.parametrize("seed", range(3))
def test_whenever_a_subscriber_joins_nothing_is_missed(transport, seed):
    """Subscribers come while a thread publishes; every one ends with what the worker holds."""
    life = random_life(random.Random(seed), steps=500)
    with transport.publisher() as source:
        thread = threading.Thread(target=lambda: [source.publish(batch) for batch, _ in life])
        thread.start()
        subscriptions = [transport.subscribe(source) for _ in range(3)]
        thread.join()
        for subscription in subscriptions:
            view = View()
            view.follow(subscription, lambda view: view.claims == life[-1][1] and view.snapshots)
            assert view.gaps == []
            assert view.event_ids == sorted(set(view.event_ids))
            subscription.close()


@pytest.mark.parametrize(("seed", "steps", "size"), [(5, 400, 3), (2, 600, 2)])
def test_what_the_queue_dropped_is_healed_by_a_snapshot(transport, seed, steps, size):
    life = random_life(random.Random(seed), steps=steps)
    with (
        transport.publisher(max_queue_size=size) as source,
        transport.subscribe(source) as subscription,
    ):
        for batch, _ in life:
            source.publish(batch)
        view = View()
        view.follow(subscription, lambda view: view.claims == life[-1][1] and not source.stats().waiting)
        assert source.stats().dropped > 0
        assert view.gaps == []


def test_a_worker_that_was_restarted_is_begun_anew(transport):
    first, second = random_life(random.Random(1)), random_life(random.Random(2), steps=5)
    view = View()
    with transport.publisher() as source:
        subscription = transport.subscribe(source)
        for batch, _ in first:
            source.publish(batch)
        view.follow(subscription, lambda view: view.claims == first[-1][1])
    with transport.publisher(after=source) as source, subscription:
        for batch, _ in second:
            source.publish(batch)
        view.follow(subscription, lambda view: view.claims == second[-1][1])
    assert view.gaps == []


def test_a_subscription_is_read_asynchronously(transport):
    async def read(subscription, source):
        first = await anext(subscription)
        source.publish(chain(2, first_event_id=2, seed=2))
        return first, await anext(subscription)

    with transport.publisher() as source:
        source.publish(chain(2))
        transport.settle(source)
        with transport.subscribe(source) as subscription:
            first, second = asyncio.run(asyncio.wait_for(read(subscription, source), 20))
    assert isinstance(first, WorkerSnapshot)
    assert isinstance(second, KvEventBatch)
    assert len(second) == 2


def test_closing_a_subscription_ends_its_iteration(transport):
    with transport.publisher() as source:
        subscription = transport.subscribe(source)
        reader = threading.Thread(target=lambda: list(subscription))
        reader.start()
        subscription.close()
        subscription.close()
        reader.join(10)
        assert not reader.is_alive()
        assert subscription.ended


def test_a_closed_publisher_refuses_and_its_last_events_are_delivered(transport):
    source = transport.publisher()
    with transport.subscribe(source) as subscription:
        view = View()
        view.follow(subscription, lambda view: view.snapshots)
        for i in range(200):
            source.publish(chain(1, first_event_id=i, seed=i))
        source.close()
        source.close()
        view.follow(subscription, lambda view: len(view.claims) == 200)
    with pytest.raises(BlockStateError, match="publish before close"):
        source.publish(chain(1))
