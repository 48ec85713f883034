"""Sequences that are handed over between processes, one of which dies: at most one goes on, with right contents."""

import threading
from pathlib import Path

import pytest
from processes import in_a_process
from test_migration import accepting, begun, known, stays_whole
from test_peers import PATIENCE
from tiered import SIZE, check, make, prefill, prompt

from kvbm_jax.errors import InDoubtError, PeerLostError, TransferError
from kvbm_jax.metrics import InMemoryMetrics
from kvbm_jax.peers import PeerNetwork
from kvbm_jax.transfer.folder_discovery import FolderDiscovery
from kvbm_jax.transfer.handover import HandOver

TOKENS = prompt(0, 5, 2)


def worker_of(folder, name, **options):
    network = PeerNetwork(
        discovery=FolderDiscovery(Path(folder) / "workers", ttl=3.0, heartbeat=0.05), engine="tcp", timeout=3.0
    )
    values = {"enable_offload": True, "disk_budget": 0, "host_blocks": 32, "model_id": "tiny"}
    return make(network=network, worker_id=name, **(values | options))


class Other:
    """A worker in another process."""

    def __init__(self, folder):
        self._worker = worker_of(folder, "other")
        self._arrived = []
        self._reached = threading.Event()

    def accept(self):
        """Takes over one sequence, in the background."""
        take = lambda: self._arrived.append(self._worker.accept(PATIENCE))  # noqa: E731 (a thread's)
        threading.Thread(target=take, daemon=True).start()

    def go_on(self, more):
        """Computes what came and more tokens, and compares; returns the tokens and what came with them."""
        while not self._arrived:
            threading.Event().wait(0.005)
        [(seq, payload, source)] = self._arrived
        prefill(self._worker, seq)
        self._worker.extend({seq: more})
        prefill(self._worker, seq, first=len(seq.tokens) - len(more))
        check(self._worker, seq)
        return seq.tokens, payload, source

    def begin(self):
        self._seq = begun(self._worker, TOKENS)

    def migrate(self, stops_before=None):
        """Hands it over, in the background; never gets beyond a method of the conversation, if one is named."""
        known(self._worker, "here")
        if stops_before is not None:
            setattr(HandOver, stops_before, lambda offer: (self._reached.set(), threading.Event().wait()))
        threading.Thread(target=self._worker.migrate, args=(self._seq, "here"), daemon=True).start()

    def wait_until_reached(self):
        return self._reached.wait(PATIENCE)

    def wait_until_gone(self):
        while not self._seq.released:
            threading.Event().wait(0.005)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with worker_of(tmp_path, "here", metrics=InMemoryMetrics()) as worker:
        yield worker


@pytest.fixture
def other(here, tmp_path):
    with in_a_process(Other, str(tmp_path)) as peer:
        known(here, "other")
        yield peer


def outcomes(worker):
    return {name: value for name, value in worker._metrics._sink.snapshot().items() if "migrations_total" in name}


def at(monkeypatch, method, act):
    """Has something happen right before a step of the conversation."""
    real = getattr(HandOver, method)
    monkeypatch.setattr(HandOver, method, lambda offer: (act(offer), real(offer))[1])


def test_it_goes_on_in_another_process(here, other):
    seq = begun(here, TOKENS)
    other.accept()
    assert here.migrate(seq, "other", payload=b"state") == 5 * SIZE
    assert other.go_on([7, 8, 9]) == ([*TOKENS, 7, 8, 9], b"state", "here")
    # When its process dies after that, all that is lost is time: the tokens are here, and are computed anew.
    other.kill()
    here.resume(seq)
    prefill(here, seq)
    stays_whole(here, seq)


@pytest.mark.parametrize("moment", ["before", "while it waits"])
def test_a_destination_that_dies_before_it_has_accepted(here, other, monkeypatch, moment):
    seq = begun(here, TOKENS)
    if moment == "before":
        other.kill()
    else:
        at(monkeypatch, "accepted", lambda offer: other.kill())
    with pytest.raises(PeerLostError) as raised:
        here.migrate(seq, "other")
    assert not isinstance(raised.value, InDoubtError)
    assert outcomes(here) == {'kvbm_migrations_total{direction="out",outcome="lost"}': 1}
    stays_whole(here, seq)


def test_a_destination_that_dies_when_it_has_accepted_leaves_the_source_in_doubt(here, other, monkeypatch):
    seq = begun(here, TOKENS)
    other.accept()
    at(monkeypatch, "commit", lambda offer: other.kill())
    with pytest.raises(InDoubtError, match="it may go on with the sequence, which is released here"):
        here.migrate(seq, "other")
    assert seq.released
    assert outcomes(here) == {'kvbm_migrations_total{direction="out",outcome="in_doubt"}': 1}
    here.resume(seq)  # it is known to be dead
    assert seq.num_cached == 5 * SIZE
    prefill(here, seq)
    stays_whole(here, seq)


def test_when_the_confirmation_is_lost_the_destination_alone_goes_on(here, other, monkeypatch):
    seq = begun(here, TOKENS)
    other.accept()
    receive = None

    def lose_the_answer(offer):
        nonlocal receive
        frames, receive = offer._frames, offer._frames.receive

        def cut(decoder):
            receive(decoder)  # the other has said that it goes on
            raise PeerLostError("the connection has broken")

        frames.receive = cut

    at(monkeypatch, "commit", lose_the_answer)
    with pytest.raises(InDoubtError):
        here.migrate(seq, "other")
    assert seq.released
    assert other.go_on([7])[0] == [*TOKENS, 7]


def test_blocks_that_did_not_come_are_kept_at_the_source(here, tmp_path, monkeypatch):
    with worker_of(tmp_path, "near") as near:
        known(here, "near")
        seq = begun(here, TOKENS)
        monkeypatch.setattr(type(near._device.residency._engine.peers), "read", lambda peers, keys, out: 0)
        with accepting(near) as arrived:
            assert here.migrate(seq, "near") == 0
        assert here.match(TOKENS) == 5 * SIZE
        prefill(near, arrived[0].seq)
        check(near, arrived[0].seq)


@pytest.mark.parametrize("error", [KeyboardInterrupt, TransferError])
def test_whatever_breaks_into_the_commit_the_source_does_not_go_on(here, other, monkeypatch, error):
    seq = begun(here, TOKENS)
    other.accept()
    commit = HandOver.commit

    def interrupted(offer):
        commit(offer)
        raise error("now")

    monkeypatch.setattr(HandOver, "commit", interrupted)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else InDoubtError):
        here.migrate(seq, "other")
    assert seq.released
    assert here.num_running == 0
    assert other.go_on([7])[0] == [*TOKENS, 7]


@pytest.mark.parametrize("step", ["accepted", "commit"])
def test_a_source_that_dies_before_it_commits_takes_the_sequence_with_it(here, other, step):
    other.begin()
    if step == "accepted":
        other.migrate(step)
        assert other.wait_until_reached()
        other.kill()
        assert here.accept(1.0) is None
    else:
        with accepting(here, 3.0) as arrived:
            other.migrate(step)
            assert other.wait_until_reached()
            other.kill()
        assert arrived == [None]
    assert here.num_running == 0
    assert here.stats().held == 0


def test_a_source_that_dies_when_it_has_committed_is_not_missed(here, other):
    other.begin()
    with accepting(here) as arrived:
        other.migrate()
    other.wait_until_gone()
    other.kill()
    seq = arrived[0].seq
    assert seq.num_cached == 5 * SIZE
    prefill(here, seq)
    stays_whole(here, seq)
