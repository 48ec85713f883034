"""The disk tier beyond the contract: what survives what, the budget, the lock, and damage of every kind."""

import errno
import logging
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvbm_jax.errors import ConfigError, MissingDependencyError
from kvbm_jax.offload.segments import SegmentBlockStore, folder, inspect
from kvbm_jax.offload.segments import record as segment_record
from kvbm_jax.protocols import Outcome
from tests.stores.segment_writer import BLOCK_BYTES, IDENTITY, block, key, open_store, record

P = BLOCK_BYTES
OTHER = type(IDENTITY)(**{**IDENTITY.__dict__, "model_id": "other"})


def rows_of(*numbers):
    return np.stack([block(n) for n in numbers])


def put(store, *numbers):
    return [row.outcome for row in store.put([record(n) for n in numbers], rows_of(*numbers)).result(60)]


def get(store, *numbers):
    """Outcomes; whatever is OK has the right bytes and record."""
    out = np.full((len(numbers), P), 0xEE, np.uint8)
    rows = store.get([key(n) for n in numbers], out).result(60)
    for n, row, data in zip(numbers, rows, out, strict=True):
        if row.outcome is Outcome.OK:
            assert row.record == record(n)
            np.testing.assert_array_equal(data, block(n))
    return [row.outcome for row in rows]


def delete(store, *numbers):
    return [row.outcome for row in store.delete([key(n) for n in numbers]).result(60)]


def held(store):
    return [int.from_bytes(r.key.sequence_hash, "little") for _, r in store.records()]


def segments(path):
    return sorted(p for p in pathlib.Path(path).iterdir() if p.name.startswith("seg-"))


def on_disk(path):
    return sum(folder.physical_bytes(p) for p in pathlib.Path(path).iterdir() if p.is_dir())


@pytest.fixture
def store(tmp_path):
    opened = open_store(tmp_path)
    yield opened
    opened.close()


# Restart


def test_a_restart_finds_everything_in_order_with_its_numbers(tmp_path):
    with_close = open_store(tmp_path)
    put(with_close, 5, 3)
    put(with_close, 9)
    before = list(with_close.records())
    with_close.close()
    again = open_store(tmp_path)
    assert held(again) == [5, 3, 9]
    assert list(again.records()) == before
    assert get(again, 3, 5, 9) == [Outcome.OK] * 3
    assert put(again, 3, 4) == [Outcome.PRESENT, Outcome.OK]
    assert held(again) == [5, 3, 9, 4]
    again.close()


def test_orbax_itself_restores_a_segment_and_nothing_is_compressed(store, tmp_path):
    import orbax.checkpoint as ocp

    put(store, 1, 2)
    (path,) = segments(tmp_path)
    with ocp.PyTreeCheckpointer() as checkpointer:
        leaves = checkpointer.restore(path)
    np.testing.assert_array_equal(leaves["block_000001"], block(2))
    assert segment_record.decode(leaves["record"].tobytes()).blocks[1].record == record(2)
    files = b"".join(f.read_bytes() for f in path.rglob("*") if f.is_file())
    assert block(1).tobytes() in files
    zeros = np.zeros((1, P), np.uint8)
    store.put([record(3)], zeros).result(60)
    out = np.ones((1, P), np.uint8)
    assert store.get([key(3)], out).result(60)[0].outcome is Outcome.OK
    assert not out.any()


def test_everything_is_synced_before_the_name_and_the_name_before_the_future(tmp_path, monkeypatch):
    log = []
    real_fsync, real_rename = os.fsync, os.rename

    def fsync(descriptor):
        log.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real_fsync(descriptor)

    def rename(source, target):
        log.append(("rename", str(source), str(target)))
        real_rename(source, target)

    store = open_store(tmp_path)
    monkeypatch.setattr(folder.os, "fsync", fsync)
    monkeypatch.setattr(folder.os, "rename", rename)
    put(store, 1, 2)
    (path,) = segments(tmp_path)
    staged = str(tmp_path / f".new-{path.name[4:]}")
    at = log.index(("rename", staged, str(path)))
    tree = [path, *path.rglob("*")]
    assert {staged + str(p)[len(str(path)) :] for p in tree} <= set(log[:at])
    assert str(tmp_path) in log[at:]
    store.close()


def test_leftovers_are_removed(tmp_path, store):
    put(store, 1)
    store.close()
    (path,) = segments(tmp_path)
    shutil.copytree(path, tmp_path / ".trash-000000000007")
    shutil.copytree(path, tmp_path / ".new-000000000008.orbax-checkpoint-tmp")
    again = open_store(tmp_path)
    assert segments(tmp_path) == [path]
    assert {p.name for p in tmp_path.iterdir()} == {path.name}
    assert held(again) == [1]
    again.close()


def test_a_crash_between_compaction_and_the_end_of_the_old_segment(tmp_path, store, monkeypatch):
    put(store, *range(8))
    delete(store, *range(4))

    def no_discard(self, path):
        raise OSError(errno.EIO, "injected")

    monkeypatch.setattr(folder.SegmentFolder, "discard", no_discard)
    assert store._compact()
    assert len(segments(tmp_path)) == 2
    monkeypatch.undo()
    store.close()
    again = open_store(tmp_path)
    assert held(again) == list(range(8))  # deletes are not written down
    assert get(again, *range(8)) == [Outcome.OK] * 8
    again.close()


@pytest.mark.parametrize("seeds", [range(3), pytest.param(range(3, 20), marks=pytest.mark.long)], ids=["3", "17"])
def test_a_killed_writer_loses_nothing_it_was_told_is_safe(tmp_path, seeds):
    for seed in seeds:
        order = random.Random(seed)
        path, log = tmp_path / str(seed), tmp_path / f"{seed}.log"
        writer = pathlib.Path(__file__).with_name("segment_writer.py")
        child = subprocess.Popen([sys.executable, writer, path, log], env={**os.environ, "JAX_PLATFORMS": "cpu"})
        try:
            wanted = 33 * order.randrange(1, 150)
            deadline = time.monotonic() + 60
            pause = threading.Event()
            while not log.exists() or log.stat().st_size < wanted:
                assert child.poll() is None
                assert time.monotonic() < deadline
                pause.wait(0.0005)
            pause.wait(order.random() * 0.02)  # anywhere within a write
        finally:
            child.send_signal(signal.SIGKILL)
            child.wait(30)
        logged = [int.from_bytes(bytes.fromhex(line), "little") for line in log.read_text().split()]
        store = open_store(path)
        # Deletes run behind the puts: those of the last 40 numbers, and every fifth, were never deleted.
        kept = [n for n in logged if n > logged[-1] - 30 or n % 5 == 0]
        assert get(store, *kept) == [Outcome.OK] * len(kept)
        assert set(get(store, *range(logged[-1] + 20))) <= {Outcome.OK, Outcome.MISS}
        assert not [p for p in path.iterdir() if p.name.startswith(".")]
        assert store.stats().unreadable == 0
        assert put(store, 10**6) in ([Outcome.OK], [Outcome.REFUSED])
        store.close()


# Order of calls


def test_a_get_waits_for_the_put_before_it_and_no_other_does(store, monkeypatch):
    put(store, 1)
    begun, go = threading.Event(), threading.Event()
    write = folder.SegmentFolder.write

    def slow(self, *args):
        begun.set()
        assert go.wait(60)
        return write(self, *args)

    monkeypatch.setattr(folder.SegmentFolder, "write", slow)
    putting = store.put([record(2)], rows_of(2))
    assert begun.wait(60)
    out = np.zeros((1, P), np.uint8)
    waiting = store.get([key(2)], out)
    cancelled = store.put([record(3)], rows_of(3))
    behind = [store.put([record(n)], rows_of(n)) for n in (4, 5, 4)]
    gone = store.delete([key(4)])
    assert get(store, 1) == [Outcome.OK]
    assert not waiting.done()
    assert cancelled.cancel()
    assert not putting.cancel()
    go.set()
    assert waiting.result(60)[0].outcome is Outcome.OK
    np.testing.assert_array_equal(out[0], block(2))
    assert [f.result(60)[0].outcome for f in behind] == [Outcome.OK, Outcome.OK, Outcome.PRESENT]
    assert gone.result(60)[0].outcome is Outcome.OK
    assert held(store) == [1, 2, 5]
    assert len(segments(store._folder.root)) == 3  # 4 and 5 were written as one
    assert store.stats().pending == 0


def test_a_put_larger_than_a_segment_is_split(tmp_path, store):
    assert put(store, *range(40)) == [Outcome.OK] * 40
    assert len(segments(tmp_path)) == 3
    assert get(store, *range(40)) == [Outcome.OK] * 40


def test_closing_cancels_what_has_not_begun(tmp_path, store, monkeypatch):
    begun, go = threading.Event(), threading.Event()
    write = folder.SegmentFolder.write

    def slow(self, *args):
        begun.set()
        assert go.wait(60)
        return write(self, *args)

    monkeypatch.setattr(folder.SegmentFolder, "write", slow)
    running = store.put([record(1)], rows_of(1))
    assert begun.wait(60)
    behind = store.put([record(2)], rows_of(2))
    closing = threading.Thread(target=store.close)
    closing.start()
    behind_done = threading.Event()
    behind.add_done_callback(lambda _: behind_done.set())
    assert behind_done.wait(60)
    go.set()
    closing.join(60)
    assert behind.cancelled()
    assert running.result(0)[0].outcome is Outcome.OK
    again = open_store(tmp_path)
    assert held(again) == [1]
    again.close()


# Budget


def test_a_segment_goes_with_its_last_block(tmp_path, store):
    put(store, 1, 2)
    put(store, 3)
    first, second = segments(tmp_path)
    delete(store, 1)
    assert segments(tmp_path) == [first, second]
    delete(store, 2)
    assert segments(tmp_path) == [second]
    assert list(tmp_path.iterdir()) == [second]


@pytest.mark.parametrize("victims", ["oldest", "any"])
def test_the_budget_holds_under_churn(tmp_path, store, victims):
    order = random.Random(7)
    model = []
    number = 0
    capacity = store.stats().capacity
    for _ in range(60):
        n = order.randrange(1, 13)
        fresh = list(range(number, number + n))
        number += n
        while len(model) + n > capacity:
            gone = model.pop(0 if victims == "oldest" else order.randrange(len(model)))
            assert delete(store, gone) == [Outcome.OK]
        assert put(store, *fresh) == [Outcome.OK] * n
        model += fresh
        assert on_disk(tmp_path) <= store._capacity_bytes
        assert store.physical_bytes() <= store._capacity_bytes
    assert held(store) == sorted(model)
    assert get(store, *model) == [Outcome.OK] * len(model)
    assert put(store, *range(10**6, 10**6 + capacity))[-1] is Outcome.REFUSED
    store.close()
    again = open_store(tmp_path)
    assert set(model) <= set(held(again))
    assert get(again, *model) == [Outcome.OK] * len(model)
    again.close()


def test_compaction_verifies_what_it_moves(tmp_path, store):
    put(store, *range(10))
    delete(store, 0, 1, 2, 3)
    corrupt_block(segments(tmp_path)[0], 5)
    assert store._compact()
    assert get(store, 4, 5, 6, 7, 8, 9) == [Outcome.OK, Outcome.MISS] + [Outcome.OK] * 4
    assert store.stats().corrupt == 1
    assert len(segments(tmp_path)) == 1


def test_records_longer_than_foreseen_are_refused_by_the_bytes(tmp_path):
    store = open_store(tmp_path, capacity_bytes=1 << 19)
    long = type(record(1))(key(1), None, tuple(range(10**5, 10**5 + 200_000)))
    (row,) = store.put([long], rows_of(1)).result(60)
    assert row.outcome is Outcome.REFUSED
    assert "do not fit" in row.reason
    assert put(store, 2) == [Outcome.OK]
    store.close()


@pytest.mark.parametrize("n", [1, 16])
def test_estimates_are_upper_bounds(store, tmp_path, n):
    put(store, *range(n))
    (path,) = segments(tmp_path)
    record_bytes = len(segment_record.encode(folder.read_record(path)))
    assert folder.physical_bytes(path) <= folder.estimate_bytes(n, P, record_bytes)


def test_sizes_are_checked(tmp_path):
    with pytest.raises(ConfigError, match=r"capacity_bytes = 1,000 cannot hold one block of 20,000 bytes"):
        open_store(tmp_path, capacity_bytes=1000)
    with pytest.raises(ConfigError, match=r"capacity_blocks = 9999 but capacity_bytes = 4,194,304 has room for"):
        open_store(tmp_path, capacity_blocks=9999)
    with pytest.raises(ConfigError, match="capacity_blocks = -1"):
        open_store(tmp_path, capacity_blocks=-1)
    with pytest.raises(ConfigError, match="max_segment_blocks = 0"):
        open_store(tmp_path, max_segment_blocks=0)
    open_store(tmp_path).close()  # nothing keeps the lock


# Folder


def test_one_store_at_a_time(tmp_path, store):
    with pytest.raises(ConfigError, match="in use by another store"):
        open_store(tmp_path)
    probe = "import sys; from tests.stores.segment_writer import open_store; open_store(sys.argv[1])"
    root = pathlib.Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", probe, tmp_path], capture_output=True, text=True, cwd=root, check=False
    )
    assert done.returncode == 1
    assert "in use by another store" in done.stderr
    store.close()
    open_store(tmp_path).close()


def test_segments_of_another_identity_are_left_alone_and_told_once(tmp_path, store, caplog):
    put(store, 1)
    put(store, 2)
    store.close()
    with caplog.at_level(logging.WARNING):
        other = open_store(tmp_path, identity=OTHER)
    (line,) = caplog.messages
    assert IDENTITY.fingerprint.hex() in line
    assert OTHER.fingerprint.hex() in line
    assert "model_id: 'other' != 'none'" in line
    assert other.stats().foreign == 2
    assert held(other) == []
    assert other.stats().capacity < store.stats().capacity
    assert put(other, 1) == [Outcome.OK]
    other.close()
    mine = open_store(tmp_path)
    assert held(mine) == [1, 2]
    assert mine.stats().foreign == 1
    mine.close()


def test_blocks_of_another_size_are_foreign(tmp_path, store, caplog):
    put(store, 1)
    store.close()
    other = SegmentBlockStore(tmp_path, 10, identity=IDENTITY, capacity_bytes=1 << 22, clock=time)
    assert other.stats().foreign == 1
    assert "blocks of another size" in caplog.text
    other.close()


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="offload folder"):
        open_store(tmp_path / "file" / "below")


def test_without_orbax_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    with pytest.raises(MissingDependencyError, match=r"kvbm-jax\[disk\]"):
        open_store(tmp_path)


# Damage


def corrupt_block(segment, number):
    """Flips one bit of a block's bytes on the disk."""
    for file in segment.rglob("*"):
        if file.is_file() and (at := file.read_bytes().find(block(number).tobytes()[100:200])) >= 0:
            flip(file, at)
            return
    pytest.fail("the block's bytes are in no file")


def flip(file, offset):
    data = bytearray(file.read_bytes())
    data[offset] ^= 0x10
    file.write_bytes(data)


def test_a_corrupt_block_is_dropped_and_may_be_put_again(tmp_path, store):
    put(store, 1, 2)
    corrupt_block(segments(tmp_path)[0], 1)
    assert get(store, 1, 2) == [Outcome.CORRUPT, Outcome.OK]
    assert get(store, 1) == [Outcome.MISS]
    assert store.stats().corrupt == 1
    assert put(store, 1) == [Outcome.OK]
    assert get(store, 1, 2) == [Outcome.OK, Outcome.OK]


def test_a_byte_flipped_anywhere_never_gives_wrong_bytes(tmp_path):
    original = tmp_path / "original"
    store = open_store(original)
    put(store, 0, 1, 2)
    store.close()
    order = random.Random(11)
    files = sorted(f.relative_to(original) for f in original.rglob("*") if f.is_file())
    seen = set()
    for file in files:
        size = (original / file).stat().st_size
        for offset in {0, size - 1, *(order.randrange(size) for _ in range(4))}:
            copy = tmp_path / "copy"
            shutil.copytree(original, copy)
            damaged_while_open = open_store(copy)
            flip(copy / file, offset)
            outcomes = get(damaged_while_open, 0, 1, 2)
            stats = damaged_while_open.stats()
            assert (stats.hits, stats.corrupt, stats.failed) == tuple(
                outcomes.count(o) for o in (Outcome.OK, Outcome.CORRUPT, Outcome.FAILED)
            )
            damaged_while_open.close()
            reopened = open_store(copy)
            seen.update(outcomes, get(reopened, 0, 1, 2))
            seen.add("unreadable" if reopened.stats().unreadable else "readable")
            assert set(put(reopened, 0, 1, 2)) <= {Outcome.OK, Outcome.PRESENT}
            assert get(reopened, 0, 1, 2) == [Outcome.OK] * 3
            reopened.close()
            shutil.rmtree(copy)
    assert seen == {Outcome.OK, Outcome.CORRUPT, Outcome.FAILED, Outcome.MISS, "readable", "unreadable"}


def test_truncated_and_missing_files(tmp_path):
    original = tmp_path / "original"
    store = open_store(original)
    put(store, 0, 1)
    store.close()
    for file in sorted(f.relative_to(original) for f in original.rglob("*") if f.is_file()):
        for keep in (None, 0, 0.5):
            copy = tmp_path / "copy"
            shutil.copytree(original, copy)
            opened = open_store(copy)
            if keep is None:
                (copy / file).unlink()
            else:
                os.truncate(copy / file, int((copy / file).stat().st_size * keep))
            assert set(get(opened, 0, 1)) <= {Outcome.OK, Outcome.CORRUPT, Outcome.FAILED}
            opened.close()
            again = open_store(copy)
            get(again, 0, 1)
            again.close()
            shutil.rmtree(copy)


def test_an_unreadable_segment_is_set_aside_and_found_again_when_it_heals(tmp_path, store, caplog):
    put(store, 1)
    put(store, 2)
    store.close()
    first, second = segments(tmp_path)
    manifest = first / "manifest.ocdbt"
    good = manifest.read_bytes()
    manifest.write_bytes(b"nonsense")
    again = open_store(tmp_path)
    assert held(again) == [2]
    assert again.stats().unreadable == 1
    assert "set aside" in caplog.text
    aside = tmp_path / first.name.replace("seg", "aside")
    assert sorted(tmp_path.iterdir()) == [aside, second]
    assert [r.status for r in inspect(tmp_path)] == ["unreadable", "ok"]
    again.close()
    (aside / "manifest.ocdbt").write_bytes(good)
    healed = open_store(tmp_path)
    assert held(healed) == [1, 2]
    assert segments(tmp_path) == [first, second]
    healed.close()


def test_what_was_set_aside_goes_when_room_is_needed(tmp_path, store):
    put(store, *range(16))
    store.close()
    (segments(tmp_path)[0] / "manifest.ocdbt").unlink()
    again = open_store(tmp_path, capacity_bytes=700_000)
    assert [p.name[:5] for p in tmp_path.iterdir()] == ["aside"]
    put(again, *range(8))
    assert on_disk(tmp_path) <= 700_000
    again.close()


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("where", ["_save", "_fsync"])
def test_a_failed_write_leaves_nothing_and_the_next_one_works(tmp_path, store, monkeypatch, code, where):
    put(store, 1)
    real = getattr(folder, where)

    def fail(*args):
        real(*args)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(folder, where, fail)
    full = code == errno.ENOSPC
    assert put(store, 2, 1) == [Outcome.REFUSED if full else Outcome.FAILED, Outcome.PRESENT]
    assert (store.stats().refused, store.stats().failed) == (full, not full)
    assert len(list(tmp_path.iterdir())) == 1
    monkeypatch.undo()
    assert get(store, 1, 2) == [Outcome.OK, Outcome.MISS]
    assert put(store, 2) == [Outcome.OK]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB of its own."""
    mount = tmp_path / "disk"
    mount.mkdir()
    done = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], capture_output=True, text=True, check=False
        )
        if shutil.which("mount")
        else None
    )
    if done is None or done.returncode:
        pytest.skip("mounting a file system is not permitted here")
    yield mount
    subprocess.run(["umount", "-l", mount], check=True)


# Orbax's threads raise what they also hand on to the caller, and leave writes behind that outlive their event loop.
orbax_fails = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@orbax_fails
def test_a_full_disk(small_disk):
    store = open_store(small_disk)
    outcomes = []
    for first in range(0, 80, 8):
        outcomes += put(store, *range(first, first + 8))
    good = [n for n, outcome in enumerate(outcomes) if outcome is Outcome.OK]
    assert 8 <= len(good) < 60
    assert set(outcomes) == {Outcome.OK, Outcome.REFUSED}
    assert get(store, *good) == [Outcome.OK] * len(good)
    delete(store, *good[:8])
    assert put(store, 200) == [Outcome.OK]
    assert get(store, *good[8:], 200) == [Outcome.OK] * (len(good) - 7)
    store.close()


@orbax_fails
def test_a_disk_that_cannot_be_written(small_disk):
    store = open_store(small_disk)
    put(store, 1, 2)
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    store = open_store(small_disk)
    assert get(store, 1) == [Outcome.OK]
    assert put(store, 3) == [Outcome.FAILED]
    assert delete(store, 1, 2) == [Outcome.OK, Outcome.OK]
    assert get(store, 1) == [Outcome.MISS]
    store.close()


# Against a dict


class SegmentMachine(RuleBasedStateMachine):
    """Puts, gets, deletes and reopenings; a deleted block may be back after a reopening, with the right bytes."""

    numbers = st.lists(st.integers(0, 12), min_size=1, max_size=6)

    def __init__(self):
        super().__init__()
        self.path = pathlib.Path(os.environ["PYTEST_SEGMENTS"]) / str(time.monotonic_ns())
        self.store = open_store(self.path, capacity_bytes=800_000, max_segment_blocks=4)
        self.model, self.deleted = set(), set()

    @rule(numbers=numbers)
    def put(self, numbers):
        for n, outcome in zip(numbers, put(self.store, *numbers), strict=True):
            full = len(self.model) >= self.store.stats().capacity
            expected = Outcome.PRESENT if n in self.model else Outcome.REFUSED if full else Outcome.OK
            assert outcome is expected
            if not full:
                self.model.add(n)
                self.deleted.discard(n)

    @rule(numbers=numbers)
    def get(self, numbers):
        expected = [Outcome.OK if n in self.model else Outcome.MISS for n in numbers]
        assert get(self.store, *numbers) == expected

    @rule(numbers=numbers)
    def delete(self, numbers):
        for n, outcome in zip(numbers, delete(self.store, *numbers), strict=True):
            assert outcome is (Outcome.OK if n in self.model else Outcome.MISS)
            if n in self.model:
                self.model.remove(n)
                self.deleted.add(n)

    @rule()
    def reopen(self):
        self.store.close()
        self.store = open_store(self.path, capacity_bytes=800_000, max_segment_blocks=4)
        found = set(held(self.store))
        assert self.model <= found <= self.model | self.deleted
        self.model = found

    @invariant()
    def the_budget_holds(self):
        assert set(held(self.store)) == self.model
        assert on_disk(self.path) <= 800_000

    def teardown(self):
        self.store.close()
        shutil.rmtree(self.path)


def test_a_segment_store_is_a_bounded_dict_that_survives(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_SEGMENTS", str(tmp_path))
    settings = hypothesis.settings(max_examples=12, stateful_step_count=20)
    hypothesis.stateful.run_state_machine_as_test(SegmentMachine, settings=settings)


def test_a_reader_that_dies_fails_its_call_and_lets_go(store, monkeypatch):
    put(store, 1, 2)

    def dies(wanted):
        raise MemoryError("no room to read")

    monkeypatch.setattr("kvbm_jax.offload.segments.folder.read_rows", dies)
    rows = store.get([key(1), key(3)], np.empty((2, BLOCK_BYTES), np.uint8)).result(30)
    assert [row.outcome for row in rows] == [Outcome.FAILED, Outcome.MISS]
    assert "no room to read" in rows[0].reason
    monkeypatch.undo()
    put(store, 1)  # the segment is not pinned for ever: it can be written anew
    assert get(store, 1) == [Outcome.OK]


def test_the_folder_is_free_after_closing_though_a_fork_lives(tmp_path):
    """A forked process inherits the descriptor; closing lets go of the lock all the same."""
    store = open_store(tmp_path / "folder")
    descriptor = os.dup(store._folder._lock)  # as a fork does
    store.close()
    open_store(tmp_path / "folder").close()
    os.close(descriptor)
