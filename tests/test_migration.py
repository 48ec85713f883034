"""Sequences that go from worker to worker while they run: contents right, and never in two places."""

import contextlib
import threading

import msgspec
import pytest
from test_peers import PATIENCE
from tiered import SIZE, check, prefill, prompt, serve, settle

from kvbm_jax.errors import (
    BlockStateError,
    ConfigError,
    FrameError,
    IdentityMismatchError,
    PeerLostError,
    TransferError,
)
from kvbm_jax.events import EventType, PrefixIndex
from kvbm_jax.hashing import hash_sequence
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.protocols import Tier
from kvbm_jax.transfer.handover import Arrivals, Migrate, Presented, SequenceState


@contextlib.contextmanager
def accepting(worker, timeout=PATIENCE):
    """Has a worker take over one sequence meanwhile; yields a list that holds it afterwards."""
    found = []
    thread = threading.Thread(target=lambda: found.append(worker.accept(timeout)))
    thread.start()
    try:
        yield found
    finally:
        thread.join()


def begun(worker, tokens, **options):
    seq = worker.start(tokens, **options)
    prefill(worker, seq)
    return seq


def known(worker, other):
    """Waits until a worker has found another."""
    peers = worker._device.residency._engine.peers
    while other not in peers._discovery.workers():
        threading.Event().wait(0.01)


def test_a_sequence_goes_on_elsewhere(workers):
    metrics = [InMemoryMetrics(), InMemoryMetrics()]
    first, second = (workers(metrics=each) for each in metrics)
    known(first, "w1")
    seq = begun(first, prompt(0, 5, 2))
    with accepting(second) as arrived:
        assert first.migrate(seq, "w1", payload=b"temperature") == 5 * SIZE
    [(moved, payload, source)] = arrived
    assert (moved.tokens, payload, source) == (prompt(0, 5, 2), b"temperature", "w0")
    assert moved.hits == {Tier.G1: 0, Tier.G4: 5 * SIZE}
    prefill(second, moved)
    check(second, moved)
    second.extend({moved: [77, 78, 79]})
    prefill(second, moved, first=len(moved.tokens) - 3)
    check(second, moved)
    assert seq.released
    assert first.num_running == 0
    assert first.match(prompt(0, 5)) == 0
    for found, direction in zip(metrics, ("out", "in"), strict=True):
        labels = f'{{direction="{direction}",outcome="ok"}}'
        assert found.snapshot()[f"kvbm_migrations_total{labels}"] == 1


def test_it_brings_all_that_it_is(workers):
    first, second = workers(), workers()
    known(first, "w1")
    options = {"salt": "s", "lora_name": "l", "multimodal": ((1, b"cat"),), "tenant": "t", "priority": 7}
    with accepting(second) as arrived:
        first.migrate(begun(first, prompt(0, 3), **options), "w1")
    [(moved, _, _)] = arrived
    assert {name: getattr(moved, name) for name in options} == options
    assert moved.num_cached == 3 * SIZE


def test_there_and_back_again(workers):
    first, second = workers(), workers()
    known(first, "w1")
    with accepting(second) as arrived:
        first.migrate(begun(first, prompt(0, 3)), "w1")
    moved = arrived[0].seq
    prefill(second, moved)
    known(second, "w0")
    with accepting(first) as returned:
        second.migrate(moved, "w0")
    back = returned[0].seq
    assert back.num_cached == 3 * SIZE
    prefill(first, back)
    check(first, back)


def test_subscribers_see_the_blocks_where_they_went(workers):
    first, second = workers(), workers()
    known(first, "w1")
    index, told = PrefixIndex(), []
    streams = [worker.subscribe_events() for worker in (first, second)]
    seq = begun(first, prompt(0, 4))
    with accepting(second):
        first.migrate(seq, "w1")
    for worker in (first, second):
        settle(worker)
    for stream in streams:
        for batch in stream.drain():
            index.apply(batch)
            told.extend(batch)
    found = index.find_matches(hash_sequence(prompt(0, 4), SIZE))
    assert {holder.worker_id: overlap.blocks for holder, overlap in found.items() if overlap.blocks} == {"w1": 4}
    away = [event for event in told if event.event_type is EventType.MIGRATED and event.to_worker]
    assert {(event.worker_id, event.to_worker, event.tier) for event in away} == {("w0", "w1", Tier.G1)}
    assert len(away) == 4


def test_what_others_hold_stays(workers):
    first, second = workers(max_sequences=2, num_blocks=16), workers()
    known(first, "w1")
    stays = begun(first, prompt(0, 3, 2))
    first.register(stays)
    seq = begun(first, [*prompt(0, 3, 0), 50, 51, 52, 53, 54])
    with accepting(second):
        first.migrate(seq, "w1")
    assert first.match(prompt(0, 3, 0)) == 3 * SIZE
    assert first.match([*prompt(0, 3, 0), 50, 51, 52, 53, 54]) == 3 * SIZE
    check(first, stays)


def stays_whole(worker, seq):
    """The sequence runs on where it was."""
    worker.extend({seq: [91]})
    prefill(worker, seq, first=len(seq.tokens) - 1)
    check(worker, seq)
    seq.release()


def test_one_that_nobody_takes_stays(workers):
    first, second = workers(), workers()
    known(first, "w1")
    seq = begun(first, prompt(0, 3))
    with pytest.raises(TransferError, match=r"nobody has taken it in 0.2 seconds"):
        first.migrate(seq, "w1", timeout=0.2)
    assert second.accept() is None
    stays_whole(first, seq)


def test_one_without_room_there_stays_and_the_next_is_taken(workers):
    first, second = workers(max_sequences=2, num_blocks=16), workers()
    known(first, "w1")
    large, small = begun(first, prompt(0, 9)), begun(first, prompt(100, 2))
    with accepting(second) as arrived:
        with pytest.raises(TransferError, match="the peer refuses: "):
            first.migrate(large, "w1")
        assert first.migrate(small, "w1") == 2 * SIZE
    assert arrived[0].seq.tokens == prompt(100, 2)
    stays_whole(first, large)


def test_one_without_blocks_to_pull_is_computed_there(workers):
    first, second = workers(), workers()
    known(first, "w1")
    with accepting(second) as arrived:
        assert first.migrate(begun(first, prompt(0, 0, 3)), "w1") == 0
    prefill(second, arrived[0].seq)
    check(second, arrived[0].seq)


def test_a_destination_that_is_gone(workers):
    first, second = workers(), workers()
    known(first, "w1")
    seq = begun(first, prompt(0, 3))
    with pytest.raises(TransferError, match="'w9' is no peer of 'w0'; there is w1"):
        first.migrate(seq, "w9")
    with pytest.raises(TransferError, match="'w0' is no peer of 'w0'"):
        first.migrate(seq, "w0")
    record = first._device.residency._engine.peers._discovery.workers()["w1"]
    second.close(0)
    discovery = first._device.residency._engine.peers._discovery
    workers_then, discovery.workers = discovery.workers, lambda: {"w1": record}
    try:
        with pytest.raises(PeerLostError):
            first.migrate(seq, "w1", timeout=2)
    finally:
        discovery.workers = workers_then
    stays_whole(first, seq)


def test_a_destination_of_another_model(workers):
    first, _ = workers(), workers(model_id="another")
    known(first, "w1")
    seq = begun(first, prompt(0, 3))
    with pytest.raises(IdentityMismatchError, match="fingerprint"):
        first.migrate(seq, "w1")
    stays_whole(first, seq)


def test_what_cannot_be_handed_over(workers):
    first, _ = workers(), workers()
    known(first, "w1")
    with begun(first, prompt(0, 2), reuse=False) as seq, pytest.raises(BlockStateError, match="reuse=False"):
        first.migrate(seq, "w1")
    with begun(first, prompt(0, 2)) as seq:
        pass
    with pytest.raises(BlockStateError, match="not running"):
        first.migrate(seq, "w1")


def test_workers_without_peers():
    from tiered import make

    with make() as worker:
        with pytest.raises(ConfigError, match="no peers"):
            worker.accept()
        with worker.start(prompt(0, 1)) as seq, pytest.raises(ConfigError, match="no peers"):
            worker.migrate(seq, "w1")


STATE = SequenceState(b"\1\0\0\0", "", "", None, (), 0, b"")


class Ends:
    """Frames whose other end says what it is told to."""

    def __init__(self, *answers):
        self.sent, self._answers = [], list(answers)
        self.stream = self

    def patience(self, seconds):
        pass

    def send(self, message):
        self.sent.append(type(message).__name__)

    def receive(self, decoder):
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer()


def presented(seconds=5.0):
    found = Presented(Migrate("w", bytes(16), STATE, seconds))
    assert found.take()
    return found


def test_a_source_that_is_lost_before_it_commits_keeps_the_sequence():
    found, frames = presented(), Ends(PeerLostError("gone"))

    def serve_it():
        with pytest.raises(PeerLostError):
            found.serve(frames)

    thread = threading.Thread(target=serve_it)
    thread.start()
    assert not found.accept(4)
    thread.join()
    assert frames.sent == ["Accepted"]


def test_a_commit_that_comes_when_nobody_waits_any_more_is_refused():
    found = presented()

    def wait_no_longer():
        with found._changed:
            found._move(type(found._stage).OVER)

    frames = Ends(wait_no_longer)
    thread = threading.Thread(target=found.serve, args=(frames,))
    thread.start()
    assert not found.accept(4)
    thread.join()
    assert frames.sent == ["Accepted", "Refused"]


def test_requests_that_make_no_sense_are_refused():
    arrivals = Arrivals(bytes(16))
    for seconds in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(FrameError, match="a wait of"):
            arrivals.serve(Ends(), Migrate("w", bytes(16), STATE, seconds))
    for tokens in (b"", b"123"):
        with pytest.raises(FrameError, match="bytes of tokens"):
            arrivals.serve(Ends(), Migrate("w", bytes(16), msgspec.structs.replace(STATE, token_ids=tokens), 1.0))
    arrivals.close()
    frames = Ends()
    arrivals.serve(frames, Migrate("w", bytes(16), STATE, 1.0))
    assert frames.sent == ["Refused"]


def test_a_worker_that_closes_refuses_what_waits(workers):
    first, second = workers(), workers()
    known(first, "w1")
    seq = begun(first, prompt(0, 3))
    failed = []

    def hand_over():
        try:
            first.migrate(seq, "w1")
        except TransferError as error:
            failed.append(error)

    thread = threading.Thread(target=hand_over)
    thread.start()
    waiting = second._device.residency._engine.peers._arrivals._waiting
    while waiting.empty():
        threading.Event().wait(0.005)
    second.close(0)
    thread.join()
    assert failed
    stays_whole(first, seq)
    assert serve(first, prompt(0, 3)) == {Tier.G1: 3 * SIZE}
