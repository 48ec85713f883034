import asyncio
import random
import sys
import threading

import pytest
from event_batches import View, chain, random_life

from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.events import (
    EventBus,
    EventGap,
    EventType,
    KvEventBatch,
    NullEventSink,
    RecordingEventSink,
    WorkerSnapshot,
)
from kvbm_jax.events import bus as bus_module
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.protocols import EventSink

pytestmark = pytest.mark.core


def batch(first_event_id, count=1):
    return KvEventBatch.make(
        EventType.DELETED,
        range(count),
        worker_id="w",
        block_size=4,
        first_event_id=first_event_id,
        timestamp=0,
    )


def ids(items):
    return [item if isinstance(item, EventGap) else int(item.event_ids[0]) for item in items]


def test_every_subscriber_gets_every_batch_in_order():
    bus = EventBus()
    readers = [bus.subscribe() for _ in range(3)]
    for i in range(5):
        bus.publish(batch(i))
    bus.close()
    for reader in readers:
        assert ids(reader) == [0, 1, 2, 3, 4]
        assert reader.ended


def test_a_subscriber_sees_what_comes_after_it():
    bus = EventBus()
    bus.publish(batch(0))
    reader = bus.subscribe()
    bus.publish(batch(1))
    assert ids(reader.drain()) == [1]
    assert reader.drain() == []
    assert reader.poll() is None
    assert not reader.ended


@pytest.mark.parametrize("seed", range(5))
def test_who_joins_late_gets_what_stands_and_then_the_stream(seed, monkeypatch):
    monkeypatch.setattr(bus_module, "_UNFOLDED", 7)
    rng, bus, views = random.Random(seed), EventBus("w-1"), []
    for told, standing in random_life(rng):
        bus.publish(told)
        if rng.random() < 0.2:
            views.append((View(), bus.subscribe(snapshot=True)))
        for view, subscription in views:
            for item in subscription.drain():
                view.apply(item)
            assert view.claims == standing
    assert {view.snapshots for view, _ in views} == {1}
    assert not any(view.gaps for view, _ in views)


def test_joining_late_makes_no_hole_while_others_publish():
    bus, begun = EventBus("w-1"), threading.Event()

    def publish():
        for i in range(3000):
            bus.publish(chain(1, first_event_id=i, seed=i % 50))
            begun.set()

    thread = threading.Thread(target=publish)
    thread.start()
    begun.wait(60)
    views = [(View(), bus.subscribe(snapshot=True, capacity=5000)) for _ in range(8)]
    thread.join()
    bus.close()
    for view, subscription in views:
        first, *rest = subscription
        assert [i for batch in rest for i in batch.event_ids] == list(range(first.next_event_id, 3000))
        for item in (first, *rest):
            view.apply(item)
        assert len(view.claims) == 50


def test_what_was_lost_meanwhile_stands_after_the_snapshot():
    bus = EventBus("w-1")
    subscription = bus.subscribe(capacity=2)
    for i in range(4):
        bus.publish(batch(i))
    subscription.begin_with(WorkerSnapshot("w-1", 0, 0, ()))
    assert [type(item) for item in subscription.drain()] == [WorkerSnapshot, EventGap, KvEventBatch, KvEventBatch]


def test_overflow_drops_the_oldest_and_marks_the_gap_where_it_is():
    metrics = InMemoryMetrics()
    bus = EventBus(metrics=metrics)
    slow, fast = bus.subscribe(capacity=2), bus.subscribe(capacity=10)
    for i in range(5):
        bus.publish(batch(i, count=i + 1))
    assert ids(slow.drain()) == [EventGap(batches=3, events=1 + 2 + 3), 3, 4]
    bus.publish(batch(5))
    assert ids(slow.drain()) == [5]
    assert ids(fast.drain()) == [0, 1, 2, 3, 4, 5]
    assert metrics.snapshot() == {"kvbm_events_published_total": 16, "kvbm_events_dropped_total": 6}


def test_a_gap_after_reading_stands_after_what_was_read():
    bus = EventBus()
    reader = bus.subscribe(capacity=1)
    bus.publish(batch(0))
    assert ids([reader.poll()]) == [0]
    for i in (1, 2, 3):
        bus.publish(batch(i))
    bus.close()
    assert not reader.ended
    assert ids(reader) == [EventGap(2, 2), 3]
    assert reader.ended


def test_poll_waits_for_a_batch_of_another_thread():
    bus = EventBus()
    reader = bus.subscribe()
    thread = threading.Thread(target=lambda: bus.publish(batch(7)))
    thread.start()
    assert ids([reader.poll(timeout=30)]) == [7]
    thread.join()
    assert reader.poll(timeout=0.001) is None


def test_iteration_in_a_thread_ends_when_the_bus_is_closed():
    bus = EventBus()
    reader, seen = bus.subscribe(), []
    thread = threading.Thread(target=lambda: seen.extend(ids(reader)))
    thread.start()
    for i in range(100):
        bus.publish(batch(i))
    bus.close()
    thread.join(30)
    assert seen == list(range(100))


def test_publishers_of_many_threads_reach_all_readers_in_one_order():
    bus = EventBus()
    readers = [bus.subscribe() for _ in range(3)]
    publishers = [
        threading.Thread(target=lambda start=start: [bus.publish(batch(start + i)) for i in range(200)])
        for start in (0, 1000, 2000, 3000)
    ]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in publishers:
            thread.start()
        for thread in publishers:
            thread.join(30)
    finally:
        sys.setswitchinterval(interval)
    bus.close()
    first, *others = (ids(reader) for reader in readers)
    assert len(first) == 800
    assert all(other == first for other in others)
    for start in (0, 1000, 2000, 3000):
        assert [i for i in first if start <= i < start + 1000] == list(range(start, start + 200))


def test_async_iteration():
    async def scenario():
        bus = EventBus()
        reader, seen = bus.subscribe(), []

        async def read():
            seen.extend([item async for item in reader])

        task = asyncio.create_task(read())
        await asyncio.sleep(0)  # lets the reader run to where it waits
        bus.publish(batch(0))
        await asyncio.to_thread(bus.publish, batch(1))
        await asyncio.to_thread(bus.close)
        await asyncio.wait_for(task, 30)
        return ids(seen)

    assert asyncio.run(scenario()) == [0, 1]


def test_async_readers_share_a_subscription_and_none_is_left_behind():
    async def scenario():
        bus = EventBus()
        reader, seen = bus.subscribe(), []

        async def read():
            seen.extend([item async for item in reader])

        tasks = [asyncio.create_task(read()) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[0].cancel()
        await asyncio.sleep(0)
        for i in range(20):
            bus.publish(batch(i))
        bus.close()
        await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 30)
        return sorted(ids(seen))

    assert asyncio.run(scenario()) == list(range(20))


def test_publishing_outlives_the_loop_of_an_async_reader():
    bus = EventBus()
    reader = bus.subscribe()

    async def wait_in_vain():
        await asyncio.wait_for(anext(reader), 0.001)

    with pytest.raises(TimeoutError):
        asyncio.run(wait_in_vain())
    bus.publish(batch(0))
    assert ids(reader.drain()) == [0]


def test_a_reader_whose_loop_died_while_it_waited_does_not_hurt_the_publisher():
    bus = EventBus()
    reader = bus.subscribe()
    loop = asyncio.new_event_loop()
    task = loop.create_task(anext(reader))
    loop.call_soon(loop.stop)
    loop.run_forever()
    loop.close()
    bus.publish(batch(0))
    assert ids(reader.drain()) == [0]
    task._log_destroy_pending = False  # it can never finish now, which is the point


def test_closing_a_subscription_ends_it_at_once_and_leaves_the_others():
    bus = EventBus()
    with bus.subscribe() as reader:
        other = bus.subscribe()
        bus.publish(batch(0))
    assert reader.ended
    assert list(reader) == []
    bus.publish(batch(1))
    assert reader.drain() == []
    assert ids(other.drain()) == [0, 1]
    reader.close()


def test_closing_wakes_a_waiting_reader():
    bus = EventBus()
    reader, seen = bus.subscribe(), []
    thread = threading.Thread(target=lambda: seen.extend(reader))
    thread.start()
    reader.close()
    thread.join(30)
    assert not thread.is_alive()
    assert seen == []


def test_a_closed_bus_refuses_and_closing_twice_is_fine():
    bus = EventBus()
    bus.close()
    bus.close()
    with pytest.raises(BlockStateError, match="closed"):
        bus.publish(batch(0))
    with pytest.raises(BlockStateError, match="closed"):
        bus.subscribe()


def test_capacity_must_be_positive():
    with pytest.raises(ConfigError, match="capacity = 0"):
        EventBus().subscribe(capacity=0)


def test_no_thread_is_started():
    before = threading.active_count()
    bus = EventBus()
    bus.subscribe()
    bus.publish(batch(0))
    assert threading.active_count() == before


def test_the_trivial_sinks():
    null, recording = NullEventSink(), RecordingEventSink()
    for sink in (null, recording):
        typed: EventSink[KvEventBatch] = sink
        typed.publish(batch(3, count=2))
        typed.close()
    assert [event.event_id for event in recording.events] == [3, 4]
    assert len(recording.batches) == 1
    assert recording.closed
