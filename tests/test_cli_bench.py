import contextlib
import errno
import importlib.util
import json
import re
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from kvbm_jax.bench import hash as hash_bench
from kvbm_jax.bench import kernels as kernels_bench
from kvbm_jax.bench import offload
from kvbm_jax.bench import pool as pool_bench
from kvbm_jax.bench import transfer as transfer_bench
from kvbm_jax.bench.timing import Row, Timing
from kvbm_jax.cli import main
from kvbm_jax.errors import BenchError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.offload.segments import SegmentBlockStore

CASES = ["g1->g2", "g2->g1", "g2->g3", "g3->g1", "g3->g1, file cache dropped"]
SMALL = ("--blocks", "5", "--repeats", "2")  # two small staging arrays, the second not full


@pytest.fixture
def tiers(tmp_path, request):
    """Two blocks, and as many slots of host memory as the test asks for."""
    slots = getattr(request, "param", 4)
    layout = replace(offload._LAYOUT, num_blocks=2)
    identity = CacheIdentity.of(layout, model_id="toy", hash_algorithm="blake3")
    contents = np.random.default_rng(0).random((2, layout.block_bytes // 4), np.float32).view(np.uint8)
    host = HostBlockStore(layout.block_bytes, slots, identity=identity)
    disk = SegmentBlockStore(tmp_path, layout.block_bytes, identity=identity, capacity_bytes=1 << 30, clock=time)
    with contextlib.closing(host), contextlib.closing(disk):
        yield offload._Tiers(layout, contents, host, disk)


def test_json_has_a_row_for_every_edge_and_nothing_is_left(capsys, tmp_path):
    assert main(["bench", "offload", *SMALL, "--path", str(tmp_path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out.splitlines()[-1])
    assert list(found) == ["bench", "rows"]
    assert found["bench"] == "offload"
    assert [row["case"] for row in found["rows"]] == CASES
    for row in found["rows"]:
        assert list(row) == ["case", "seconds", "baseline", "baseline_seconds", "ratio"]
        assert row["seconds"] > 0
        assert row["baseline"]
        assert row["ratio"] == row["baseline_seconds"] / row["seconds"]
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def made_up(monkeypatch):
    """Has the command show a measurement that took no time."""
    rows = [Row("a->b", 0.002, "copy in memory", 0.0005), Row("a long case", 1.5, "plain file", 3)]
    monkeypatch.setattr(offload, "measure", lambda timing, num_blocks, folder: rows)


def test_table_for_people(capsys, made_up):
    assert main(["bench", "offload", "--blocks", "1000"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "1,000 blocks of 737,280 bytes, medians of 7",
        "case                   ms   baseline ms   ratio  baseline",
        "a->b                2.000         0.500    0.25  copy in memory",
        "a long case     1,500.000     3,000.000    2.00  plain file",
    ]


# 150 tokens are whole blocks of neither size.
@pytest.mark.parametrize("tokens", ["64", "150"])
def test_json_has_a_row_for_every_hash(capsys, tokens):
    assert main(["bench", "hash", "--tokens", tokens, "--repeats", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out.splitlines()[-1])
    assert list(found) == ["bench", "rows"]
    assert found["bench"] == "hash"
    assert [row["case"] for row in found["rows"]] == [
        "blake3 block 16",
        "blake3 block 64",
        "xxh3_64 block 16",
        "xxh3_64 block 64",
    ]
    for row in found["rows"]:
        assert list(row) == ["case", "seconds", "baseline", "baseline_seconds", "ratio"]
        assert row["seconds"] > 0
        assert row["baseline"]
        assert row["ratio"] == row["baseline_seconds"] / row["seconds"]


def test_table_of_hashes_tells_tokens_a_second(capsys, monkeypatch):
    monkeypatch.setattr(hash_bench, "measure", lambda timing, num_tokens: [Row("a hash", 0.002, "plain loop", 0.001)])
    assert main(["bench", "hash", "--tokens", "5000"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "5,000 tokens, medians of 7",
        "case              ms   baseline ms   ratio       tokens/s  baseline",
        "a hash         2.000         1.000    0.50      2,500,000  plain loop",
    ]


@pytest.mark.parametrize(("plain", "case"), [("_plain_blake3", "blake3"), ("_plain_xxh3", "xxh3_64")])
def test_other_hashes_are_no_baseline(capsys, monkeypatch, plain, case):
    def wrong(tokens, block_size):
        hashes = right(tokens, block_size).copy()
        hashes[1, 3] ^= 1
        return hashes

    right = getattr(hash_bench, plain)
    monkeypatch.setattr(hash_bench, plain, wrong)
    assert main(["bench", "hash", "--tokens", "64"]) == 1
    assert f"error: {case} block 16: 1 of 4 hashes differ from the plain loop's" in capsys.readouterr().err


@pytest.fixture
def small_pool(monkeypatch):
    """One batch, and a pool that is soon full."""
    monkeypatch.setattr(pool_bench, "BATCHES", (64,))
    measure = pool_bench.measure
    monkeypatch.setattr(pool_bench, "measure", lambda timing, num_blocks: measure(timing, num_blocks // 8))


def test_json_has_a_row_for_every_way_to_step(capsys, small_pool):
    assert main(["bench", "pool", "--repeats", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out.splitlines()[-1])
    assert found["bench"] == "pool"
    assert [row["case"] for row in found["rows"]] == ["batch 64, one dispatch", "batch 64, in scan"]
    for row in found["rows"]:
        assert row["baseline"] == "pool in plain Python"
        assert row["ratio"] == row["baseline_seconds"] / row["seconds"]


def test_a_pool_that_evicts_other_blocks_is_no_baseline(capsys, monkeypatch, small_pool):
    release = pool_bench._Plain._release
    monkeypatch.setattr(pool_bench._Plain, "_release", lambda self, blocks: release(self, list(blocks)[1:]))
    assert main(["bench", "pool", "--repeats", "1"]) == 1
    assert re.search(r"one dispatch: [\d,]+ blocks found and [\d,]+ evicted; in plain Python", capsys.readouterr().err)


@pytest.fixture
def one_block_size(monkeypatch):
    monkeypatch.setattr(kernels_bench, "BLOCK_SIZES", (8,))


def test_json_has_a_row_for_every_move(capsys, one_block_size):
    assert main(["bench", "kernels", "--mebibytes", "4", "--repeats", "1", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out.splitlines()[-1])
    assert found["bench"] == "kernels"
    names = ("store_kv", "gather_blocks", "scatter_blocks", "copy_blocks")
    assert [row["case"] for row in found["rows"]] == [f"{name}, blocks of 64 KiB" for name in names]
    for row in found["rows"]:
        assert row["baseline"] == "copy in memory"
        assert row["ratio"] == row["baseline_seconds"] / row["seconds"]


@pytest.mark.parametrize(("name", "what"), [("_ids", "blocks of 8 tokens"), ("_slots", "tokens")])
def test_moves_that_lose_something_are_no_measurement(capsys, monkeypatch, one_block_size, name, what):
    def forgetful(self, layout):
        begin(self, layout)
        setattr(self, name, getattr(self, name).at[1].set(layout.num_slots))

    begin = kernels_bench._Moves.__init__
    monkeypatch.setattr(kernels_bench._Moves, "__init__", forgetful)
    assert main(["bench", "kernels", "--mebibytes", "4", "--repeats", "1"]) == 1
    assert re.search(rf"error: {what} did not come back", capsys.readouterr().err)


@pytest.mark.long
def test_json_has_a_row_for_every_pull_and_the_lookup(capsys, monkeypatch):
    monkeypatch.setattr(transfer_bench, "BLOCK_BYTES", (16 << 10, 1 << 20))
    monkeypatch.setattr(transfer_bench, "_OWNED", 10_000)
    assert main(["bench", "transfer", "--repeats", "1", "--mebibytes", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["bench"] == "transfer"
    cases = [f"pull, {blocks}" for blocks in ("128 blocks of 16 KiB", "2 blocks of 1,024 KiB")]
    engines = ["nixl", "tcp"] if importlib.util.find_spec("nixl_cu12") else ["tcp"]
    pulls = [f"{engine} {case}" for engine in engines for case in cases]
    assert [row["case"] for row in found["rows"]] == [*pulls, "lookup of 2,048 blocks among 10,000"]
    for row in found["rows"]:
        assert row["ratio"] == row["baseline_seconds"] / row["seconds"]


def test_json_may_be_asked_for_before_the_name(capsys, made_up):
    assert main(["bench", "--json", "offload"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["ratio"] == 0.25


def test_progress_is_shown_on_a_terminal_and_wiped(capsys, monkeypatch):
    def measure(timing, num_blocks, folder):
        return [timing.compare("a->b", lambda: 1.0, "nothing", lambda: 1.0)]

    monkeypatch.setattr(offload, "measure", measure)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(["bench", "offload", "--repeats", "1"]) == 0
    assert capsys.readouterr().err == "\r\x1b[Ka->b: 0 of 1\r\x1b[Ka->b: 1 of 1\r\x1b[K"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "BENCH"),
        (("nonsense",), "invalid choice: 'nonsense'"),
        (("offload", "--blocks", "0"), "'0' is no integer >= 1"),
        (("offload", "--blocks", "1e3"), "'1e3' is no integer >= 1"),
        (("offload", "--repeats", "-1"), "--repeats"),
        (("offload", "--path", "no/such/place"), "'no/such/place' is no folder"),
        (("offload", "extra"), "unrecognized arguments: extra"),
        (("hash", "--tokens", "63"), "'63' is no integer >= 64"),
        (("kernels", "--mebibytes", "3"), "'3' is no integer >= 4"),
        (("hash", "--repeats", "0"), "'0' is no integer >= 1"),
        (("pool", "--blocks", "65535"), "'65535' is no integer >= 65536"),
        (("hash", "--blocks", "3"), "unrecognized arguments: --blocks"),
    ],
)
def test_wrong_usage_is_status_2(capsys, argv, message):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *argv])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def refused(capsys):
    assert main(["bench", "offload", *SMALL]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("kvbm-jax: error: ")
    assert err.count("\n") == 1
    return err


def test_without_orbax_one_line_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    assert "pip install 'kvbm-jax[disk]'" in refused(capsys)


def test_a_full_disk_is_one_line(capsys, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(offload._Plain, "_write_to", fail)
    assert "5 blocks of 737,280 bytes: [Errno 28] No space left on device" in refused(capsys)


def test_every_trial_writes_blocks_anew_and_takes_them_out(tiers):
    tiers.verify()
    host, disk = tiers._host, tiers._disk
    for expected in (4, 6):
        tiers.g1_to_g2()
        tiers.g2_to_g3()
        assert (host.stats().puts, host.stats().blocks) == (expected, 2)
        assert (disk.stats().puts, disk.stats().blocks) == (expected, 2)
    tiers.verify()


def test_other_bytes_are_noticed(tiers):
    tiers._contents[1, 5] ^= 1
    with pytest.raises(BenchError, match="1 of 2 blocks came back from g2 with other bytes"):
        tiers.verify()


@pytest.mark.parametrize("tiers", [2], indirect=True)
def test_a_refused_block_is_no_measurement(tiers):
    with pytest.raises(BenchError, match="a block is refused: full: 2 of 2 blocks held"):
        tiers.g1_to_g2()


def test_trials_take_turns_and_the_first_does_not_count():
    order, told = [], []

    def trial(name, *seconds):
        times = iter(seconds)
        return lambda: order.append(name) or next(times)

    row = Timing(3, told.append).compare("case", trial("a", 99, 1, 8, 2), "plain", trial("b", 99, 6, 3, 4))
    assert row == Row("case", 2, "plain", 4)
    assert row.ratio == 2
    assert order == ["a", "b"] * 4
    assert told == [f"case: {i} of 3" for i in range(4)]


def test_help_starts_no_back_end():
    probe = (
        "import sys; from kvbm_jax.cli import main\n"
        "try: main(['bench', 'offload', '--help'])\n"
        "except SystemExit as done: assert not done.code\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "assert not getattr(bridge, '_backends', None)\n"
    )
    argv = [sys.executable, "-W", "error", "-c", probe]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.startswith("usage: kvbm-jax bench offload")


@pytest.mark.long
def test_events_are_timed_beside_bare_loops(capsys):
    assert main(["bench", "events", "--blocks", "640", "--repeats", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bench"] == "events"
    assert [row["case"] for row in found["rows"]] == [
        "zmq 64 blocks a message, 10 messages",
        "zmq 1 blocks a message, 160 messages",
        "jetstream one block a message, 64 messages",
        "decode step, events over zmq",
        "decode step, events to jetstream",
        "decode step, metrics",
        "decode step, nothing, once more",
    ]
    for row in found["rows"]:
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
