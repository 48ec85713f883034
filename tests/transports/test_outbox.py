import random
import threading

import pytest
from event_batches import View, chain, random_life

from kvbm_jax.errors import BlockStateError, ConfigError
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.transports.outbox import Outbox, Overflow


def outbox(capacity=4, overflow=Overflow.DROP_OLDEST, wake=lambda: None, metrics=None):
    return Outbox("w-1", capacity=capacity, overflow=overflow, wake=wake, metrics=metrics)


def numbers(taken):
    first, batches = taken
    return list(range(first, first + len(batches)))


def test_batches_leave_in_order_and_numbered():
    box = outbox()
    for i in range(3):
        box.put(chain(2, first_event_id=2 * i))
    first, batches = box.take(2)
    assert (first, [int(batch.event_ids[0]) for batch in batches]) == (0, [0, 2])
    assert numbers(box.take(2)) == [2]
    assert box.take(2) == (3, [])
    assert box.stats() == (3, 0, 0, 0)


def test_a_full_queue_drops_its_oldest_and_their_numbers_are_missing():
    metrics = InMemoryMetrics()
    box = outbox(capacity=2, metrics=metrics)
    for i in range(5):
        box.put(chain(3, first_event_id=3 * i, seed=i))
    assert numbers(box.take(9)) == [3, 4]
    assert box.stats() == (2, 3, 0, 0)
    assert metrics.snapshot()["kvbm_events_dropped_total"] == 9
    sequence, snapshot = box.snapshot()
    assert (sequence, sum(map(len, snapshot.batches))) == (5, 15)  # what was dropped has happened all the same


def test_a_publisher_may_choose_to_wait_for_room():
    box = outbox(capacity=2, overflow=Overflow.BLOCK)
    waiting = threading.Event()

    def publish():
        for i in range(50):
            box.put(chain(1, first_event_id=i))
            waiting.set()

    thread = threading.Thread(target=publish)
    thread.start()
    seen = []
    while len(seen) < 50:
        waiting.wait(10)
        seen += numbers(box.take(1))
        assert box.stats().waiting <= 2
    thread.join()
    assert seen == list(range(50))


def test_who_waits_for_room_is_let_go_by_closing():
    box = outbox(capacity=1, overflow=Overflow.BLOCK)
    box.put(chain(1))
    refusals = []

    def publish():
        try:
            box.put(chain(1))
        except BlockStateError as error:
            refusals.append(error)

    thread = threading.Thread(target=publish)
    thread.start()
    box.close()
    thread.join(10)
    assert len(refusals) == 1
    with pytest.raises(BlockStateError, match="publish before close"):
        box.put(chain(1))


def test_the_taker_is_woken_once_there_is_something_again():
    woken = []
    box = outbox(wake=lambda: woken.append(1))
    box.put(chain(1))
    box.put(chain(1))
    assert len(woken) == 1
    box.take(9)
    box.put(chain(1))
    assert len(woken) == 1  # the taker has not been told yet that there is nothing left
    box.take(9)
    assert box.take(9)[1] == []
    box.put(chain(1))
    assert len(woken) == 2


def test_snapshots_are_of_what_has_left_the_queue():
    box, view = outbox(capacity=1000), View()
    for batch, _ in random_life(random.Random(3)):
        box.put(batch)
    for taken in (5, 0, 20):
        for batch in box.take(taken)[1]:
            view.apply(batch)
        found = View()
        sequence, snapshot = box.snapshot()
        found.apply(snapshot)
        assert found.claims == view.claims
        assert snapshot.next_event_id == view.event_ids[-1] + 1
    assert sequence == 25


def test_a_queue_holds_something():
    with pytest.raises(ConfigError, match="max_queue_size = 0: allowed is an integer >= 1"):
        outbox(capacity=0)
