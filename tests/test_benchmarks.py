import itertools
import json

import numpy as np
import pytest

from benchmarks import gpu, moving, workers
from benchmarks.cases import FULL, all_cases, distinct
from benchmarks.measuring import Clock, Row, format_row, tell, told
from kvbm_jax.kernels.configs import CopyConfig


@pytest.fixture(autouse=True)
def keep_the_environment(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def run(out, *argv):
    """The exit status of a dry run, and what it wrote."""
    status = gpu.main(["--allow-cpu", "--out", str(out), *argv])
    (file,) = out.glob("*.json")
    return status, json.loads(file.read_text()), file.with_suffix(".md").read_text()


def test_a_part_is_run_in_a_process_of_its_own_and_kept(tmp_path, capsys, gpu_is_here):
    if gpu_is_here:
        pytest.skip("there is a GPU")
    out, extra = tmp_path / "out", tmp_path / "extra.json"
    status, result, table = run(out, "--parts", "edges", "--json", str(extra))
    assert status == 0
    assert json.loads(extra.read_text()) == result
    (part,) = result["parts"]
    assert part["status"] == "passed"
    assert part["checks"] == [{"name": "blocks come back as they went down", "passed": True}]
    assert [row["case"].split(",")[0] for row in part["rows"]] == ["offload", "onboard"]
    for row in part["rows"]:
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
        assert f"| {row['case']} |" in table
    status, again, _ = run(out, "--parts", "edges", "--resume")
    assert (status, again["parts"]) == (0, result["parts"])
    assert "edges: passed" in capsys.readouterr().out


@pytest.mark.long
def test_a_dry_run_goes_through_every_part(tmp_path, gpu_is_here):
    if gpu_is_here:
        pytest.skip("there is a GPU")
    status, result, _ = run(tmp_path / "out", "--tune")
    assert status == 0
    parts = {part["part"]: part for part in result["parts"]}
    assert list(parts) == list(gpu.PARTS)
    assert {part: parts[part]["status"] for part in parts if part != "tests"} == dict.fromkeys(
        set(gpu.PARTS) - {"tests"}, "passed"
    )
    operations = {case.operation for case in all_cases(FULL)}
    assert {check["name"].split(",")[0] for check in parts["truth"]["checks"]} == operations
    assert {row["case"].split(",")[0] for row in parts["moves"]["rows"]} == operations - {"advance"}
    for part in ("bookkeeping", "no-buffers"):
        told = [row["case"] for row in parts[part]["rows"]]
        assert {case.split(", ")[3] for case in told} == {"in a scan", "one dispatch"}


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys, gpu_is_here):
    if gpu_is_here:
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_is_one_line(capsys):
    assert gpu.main(["--allow-cpu", "--parts", "edges,egdes"]) == 1
    assert "no part egdes; there is tests, truth," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "kind", "passed"),
    [
        ("", "note", None),
        ("import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n", "check", True),
        ("import pytest\n@pytest.mark.gpu\ndef test_a(): assert False\n", "check", False),
    ],
)
def test_gpu_tests_run_in_a_process_of_their_own(tmp_path, monkeypatch, capsys, source, kind, passed):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(source)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    gpu.run_tests(Clock(60), tiny=False)
    (found,) = told(capsys.readouterr().out)
    assert found["kind"] == kind
    assert found.get("passed") is passed


ROW = Row("a", 0, 2.0, "b", 1.0)


def test_what_a_part_tells_is_read_even_if_it_is_cut_off(capsys):
    tell("check", name="x", passed=True)
    tell("left out", what="y")
    out = capsys.readouterr().out
    assert [one["kind"] for one in told("noise\n" + out + '=== {"kind": "ro')] == ["check", "left out"]


@pytest.mark.parametrize(
    ("found", "options", "status", "note"),
    [
        ([], {}, "skipped", ""),
        ([{"kind": "note", "text": "why"}], {}, "skipped", "why"),
        ([{"kind": "check", "name": "x", "passed": True}], {}, "passed", ""),
        ([{"kind": "check", "name": "x", "passed": False}], {}, "failed", "x"),
        ([{"kind": "check", "name": "x", "passed": True}], {"failure": "not done"}, "failed", "not done"),
        ([{"kind": "check", "name": "x", "passed": True}, {"kind": "left out", "what": "y"}], {}, "out of time", ""),
        ([], {"left_out": ["all of it"]}, "out of time", ""),
    ],
)
def test_the_outcome_of_a_part(found, options, status, note):
    result = gpu.outcome("p", found, **options)
    assert (result["status"], result["note"]) == (status, note)


def test_rows_are_judged_by_their_target():
    assert ROW.met is None
    low, high = (Row("a", 0, 2.0, "b", 1.0, target) for target in (0.5, 0.6))
    assert (low.ratio, low.met, high.met) == (0.5, True, False)
    assert format_row(high).endswith("| 0.50 | 0.6, MISSED |")
    assert gpu.row_of({"met": False, "ratio": 1, **vars(high)}) == high


def test_a_clock_that_has_run_out_notes_what_is_left_out():
    clock = Clock(0)
    assert not clock.allows("x")
    assert clock.left_out == ["x"]
    assert Clock(100).allows("x")


def test_one_element_that_differs_is_seen():
    same = (np.zeros(1000, np.int8), np.ones((4, 5), np.float32))
    other = (same[0], np.where(np.arange(20).reshape(4, 5) == 7, 2, same[1]))
    assert moving._difference(same, same) == 0
    assert moving._difference(same, other) == pytest.approx(1 / 20)


def test_targets_are_for_large_moves_of_long_rows_by_a_kernel():
    large = {case.name: moving._target(case) for case in moving._timed_cases(tiny=False) if case.must_move >= 512 << 20}
    assert large["store_kv, gqa"] == large["gather_blocks, gqa, layer_separate to fully_contiguous"] == 0.9
    assert large["copy_blocks, gqa, layer_separate, any"] is None
    assert all(moving._target(case) is None for case in all_cases(FULL) if case.operation == "store_kv")


def test_the_parts_together_end_in_time():
    assert sum(part.seconds for part in gpu.PARTS.values() if part.by_default) < gpu.TOTAL_SECONDS < 480


def test_every_config_that_is_tried_fits():
    tried = moving.grid()
    assert len(tried) == len(set(tried)) > 5
    assert all(isinstance(config, CopyConfig) for config in tried)


def test_numbers_in_no_order_are_distinct():
    for limit, count in ((4096 * 64, 65_536), (8, 8), (5, 2)):
        numbers = distinct(3, limit, count).tolist()
        assert len(set(numbers)) == count
        assert max(numbers) == numbers[count // 2] == limit


@pytest.mark.long
@pytest.mark.timeout(900)
def test_workers_that_share_find_more_and_nothing_wrong(tmp_path, capsys):
    pytest.importorskip("nats")
    rng = np.random.default_rng(0)
    talks, fresh, lines = [[] for _ in range(24)], itertools.count(), []
    for talk in rng.integers(0, len(talks), 400):
        talks[talk] = (talks[talk] if len(talks[talk]) < 12 else []) + [next(fresh), next(fresh)]
        lines.append(json.dumps({"hash_ids": talks[talk]}))
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(lines))
    workers.main([str(trace), "--device-blocks", "24", "--host-blocks", "60", "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    one, apart, sharing, overlap = told["rows"]
    assert told["met"]["right"]
    assert [row["wrong"] + row["rejected"] for row in told["rows"]] == [0] * 4
    assert apart["hits"].get("g4", 0) == one["hits"].get("g4", 0) == 0
    assert sharing["hits"]["g4"] > 0
    assert apart["hit_rate"] + 0.05 < sharing["hit_rate"] <= one["hit_rate"]
    assert overlap["busiest"] < 0.6
