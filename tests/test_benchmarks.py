import json

import pytest

from benchmarks import gpu


@pytest.fixture(autouse=True)
def keep_the_environment(monkeypatch):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def test_a_dry_run_writes_every_case_beside_its_copy(tmp_path, capsys):
    extra = tmp_path / "extra.json"
    assert gpu.main(["--allow-cpu", "--skip-tests", "--out", str(tmp_path / "out"), "--json", str(extra)]) == 0
    (written,) = (tmp_path / "out").glob("*.json")
    result = json.loads(written.read_text())
    assert json.loads(extra.read_text()) == result
    assert result["tests"]["status"] == "skipped"
    assert [row["case"].split(",")[0] for row in result["rows"]] == ["store_kv", "gather_blocks", "scatter_blocks"]
    for row in result["rows"]:
        assert row["bytes"] > 0
        assert row["ratio"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
        assert f"| {row['case']} |" in written.with_suffix(".md").read_text()
    assert "store_kv" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, capsys, gpu_is_here):
    if gpu_is_here:
        pytest.skip("there is a GPU")
    assert gpu.main(["--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("", "none"),
        ("import pytest\n@pytest.mark.gpu\ndef test_a(): pass\n", "passed"),
        ("import pytest\n@pytest.mark.gpu\ndef test_a(): assert False\n", "failed"),
    ],
)
def test_gpu_tests_run_in_a_process_of_their_own(tmp_path, monkeypatch, source, status):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(source)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    found = gpu.run_tests()
    assert found["status"] == status
    assert found["summary"]
