"""Who may use a manager: threads one at a time, commands next in line."""

import threading

import pytest

from kvbm_jax.errors import BusyError
from kvbm_jax.turns import Turns

pytestmark = pytest.mark.core


def start(act):
    thread = threading.Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_threads_act_one_at_a_time():
    turns, inside, most, calls = Turns(), [], [], []

    def act():
        inside.append(1)
        most.append(len(inside))
        calls.append(1)
        inside.pop()

    def loop():
        for i in range(500):
            (turns.take if i % 3 else turns.command)(act)

    threads = [start(loop) for _ in range(4)]
    for thread in threads:
        thread.join(60)
    assert len(calls) == 2000
    assert max(most) == 1


def test_a_command_goes_before_a_loop_of_calls():
    turns, calls, stop = Turns(), [], threading.Event()

    def serve():
        while not stop.is_set():
            turns.take(lambda: calls.append(1))

    server = start(serve)
    waited = []
    for _ in range(200):
        before = len(calls)
        turns.command(lambda before=before: waited.append(len(calls) - before))
    stop.set()
    server.join(60)
    # Of the calls that were made between asking and acting only those count that could not be kept out: the one under
    # way, one past the door, and those made before the asking thread had begun to wait.
    assert len(waited) == 200
    assert sorted(waited)[100] <= 2


def test_a_command_that_stands_in_the_door_lets_no_call_pass():
    turns, order = Turns(), []
    seated, leave, asked = threading.Event(), threading.Event(), threading.Event()

    def first():
        order.append("first")
        seated.set()
        leave.wait(60)

    def command():
        asked.set()
        turns.command(lambda: order.append("command"))

    threads = [start(lambda: turns.take(first))]
    assert seated.wait(60)
    threads.append(start(command))
    assert asked.wait(60)
    while not turns._door.locked():
        pass
    threads.append(start(lambda: turns.take(lambda: order.append("second"))))
    leave.set()
    for thread in threads:
        thread.join(60)
    assert order == ["first", "command", "second"]


def test_who_has_the_turn_takes_it_again():
    turns = Turns()
    assert turns.take(lambda: turns.take(lambda: turns.command(lambda: turns.take(lambda: "in")))) == "in"
    assert turns.command(lambda: turns.take(lambda: turns.command(lambda: "in"))) == "in"


def test_a_command_that_does_not_come_to_its_turn_does_nothing():
    turns, seated, leave = Turns(), threading.Event(), threading.Event()
    done = []

    def hold():
        seated.set()
        leave.wait(60)

    thread = start(lambda: turns.take(hold))
    assert seated.wait(60)
    with pytest.raises(BusyError, match=r"in one call for 0\.01 seconds; nothing was done"):
        turns.command(lambda: done.append(1), 0.01)
    leave.set()
    thread.join(60)
    assert not done
    assert turns.command(lambda: turns.take(lambda: "free again"), 60) == "free again"


@pytest.mark.parametrize("way", ["take", "command"])
def test_the_turn_is_given_back_after_an_error(way):
    turns = Turns()

    def fail():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        getattr(turns, way)(fail)
    other = []
    start(lambda: turns.take(lambda: other.append(1))).join(60)
    assert other == [1]
