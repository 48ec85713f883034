import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import kvbm_jax
from kvbm_jax.cli import main
from kvbm_jax.cli.report import table
from kvbm_jax.config import KvBlockManagerConfig

PROJECT = Path(kvbm_jax.__file__).parent.parent / "pyproject.toml"


@pytest.fixture(autouse=True)
def no_variables_of_the_developer(monkeypatch):
    for name in ("KVBM_BLOCK_SIZE", "KVBM_BLOKSIZE"):
        monkeypatch.delenv(name, raising=False)


def call(capsys, *argv):
    status = main(argv)
    out, err = capsys.readouterr()
    return status, out, err


def call_json(capsys, *argv):
    status, out, err = call(capsys, *argv, "--json")
    assert err == ""
    return status, json.loads(out.splitlines()[-1])


def usage_error(capsys, *argv):
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "trace.jsonl"
    requests = [[1, 2, 3], [1, 2, 4], [1, 2, 3], list(range(100, 120)), [9]]
    path.write_text("".join(json.dumps({"hash_ids": ids}) + "\n" for ids in requests))
    return path


def test_replay_counts_as_the_rule_says(capsys, trace):
    status, found = call_json(capsys, "replay", str(trace), "--num-blocks", "8")
    assert status == 0
    assert list(found) == [
        "requests",
        "block_refs",
        "hits",
        "hit_rate",
        "evictions",
        "rejected",
        "seconds",
        "us_per_request",
    ]
    assert (found["requests"], found["block_refs"], found["rejected"]) == (5, 30, 1)
    assert found["hits"]["g1"] == 5
    assert found["hit_rate"] == pytest.approx(5 / 30)
    assert found["evictions"] == 0


def test_replay_of_several_traces_with_a_limit(capsys, trace):
    arguments = ("replay", str(trace), str(trace), "--num-blocks", "8", "--limit", "6")
    _, apart = call_json(capsys, *arguments)
    assert (apart["requests"], apart["hits"]["g1"]) == (6, 5)
    _, found = call_json(capsys, *arguments, "--shared-ids")
    assert (found["requests"], found["hits"]["g1"]) == (6, 8)


def test_replay_for_people(capsys, trace):
    status, out, _ = call(capsys, "replay", str(trace), "--num-blocks", "8")
    assert status == 0
    assert "hits g1         5\n" in out
    assert "hit rate        16.7%\n" in out


def test_replay_by_a_policy(capsys, trace):
    _, found = call_json(capsys, "replay", str(trace), "--num-blocks", "8", "--policy", "priority")
    assert list(found)[:3] == ["requests", "block_refs", "hits"]
    assert found["hits"]["g1"] == 5


@pytest.mark.long
def test_replay_compares_policies_over_sizes(capsys, trace, tmp_path):
    picture = tmp_path / "hits.svg"
    arguments = ("replay", str(trace), "--num-blocks", "3,8", "--compare", "lru,tiny_lfu,lru", "--plot", str(picture))
    status, found = call_json(capsys, *arguments)
    assert status == 0
    assert list(found) == ["rows"]
    cases = [(row["policy"], row["num_blocks"]) for row in found["rows"]]
    assert cases == [("lru", 3), ("lru", 8), ("tiny_lfu", 3), ("tiny_lfu", 8)]
    _, single = call_json(capsys, "replay", str(trace), "--num-blocks", "3")
    for key in ("requests", "block_refs", "hits", "hit_rate", "evictions", "rejected"):
        assert found["rows"][0][key] == single[key]
    assert picture.read_text().startswith("<?xml")
    status, out, _ = call(capsys, *arguments[:-2])
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ["policy", "blocks", "hits", "g1", "hit", "rate", "evictions", "rejected", "us/request"]
    assert [line.split()[:3] for line in lines[1::3]] == [["lru", "3", "4"], ["tiny_lfu", "8", "5"]]


def test_what_cannot_be_drawn_is_told_before_the_replay(capsys, monkeypatch, tmp_path):
    arguments = ("replay", str(tmp_path / "absent.jsonl"), "--num-blocks", "8", "--compare", "lru", "--plot")
    for name, reason in (("hits.nonsense", "its name must end in one of"), ("no/hits.png", "there is no folder")):
        status, out, err = call(capsys, *arguments, str(tmp_path / name))
        assert (status, out) == (1, "")
        assert reason in err
    monkeypatch.setitem(sys.modules, "matplotlib.backend_bases", None)
    status, out, err = call(capsys, *arguments, str(tmp_path / "hits.png"))
    assert (status, out) == (1, "")
    assert "kvbm-jax[plot]" in err


def test_a_trace_that_cannot_be_read_is_one_line_and_status_1(capsys, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{}\n")
    for path in (broken, tmp_path / "absent.jsonl"):
        status, out, err = call(capsys, "replay", str(path), "--num-blocks", "8")
        assert (status, out) == (1, "")
        assert err.startswith("kvbm-jax: error: ")
        assert path.name in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "COMMAND"),
        (("nonsense",), "invalid choice: 'nonsense'"),
        (("replay", "t"), "--num-blocks"),
        (("replay", "--num-blocks", "3"), "TRACE"),
        (("replay", "t", "--num-blocks", "0"), "'0' is no integer >= 1"),
        (("replay", "t", "--num-blocks", "1e3"), "'1e3' is no integer >= 1"),
        (("replay", "t", "--num-blocks", "3", "--limit", "-1"), "--limit"),
        (("replay", "t", "--num-blocks", "3,4"), "several sizes are for --compare"),
        (("replay", "t", "--num-blocks", "3,", "--compare", "lru"), "'' is no integer >= 1"),
        (
            ("replay", "t", "--num-blocks", "3", "--policy", "fifo"),
            "'fifo' is no eviction policy; choose from lru",
        ),
        (("replay", "t", "--num-blocks", "3", "--compare", "lru,fifo"), "'fifo' is no eviction policy"),
        (("replay", "t", "--num-blocks", "3", "--compare", "lru", "--policy", "lru"), "not allowed with"),
        (("replay", "t", "--num-blocks", "3", "--plot", "f.png"), "give --compare too"),
        (("config", "--schema", "--file", "f"), "not allowed with"),
        (("doctor", "extra"), "unrecognized arguments: extra"),
    ],
)
def test_wrong_usage_is_status_2(capsys, argv, message):
    assert message in usage_error(capsys, *argv)


def test_config_shows_what_a_manager_would_get(capsys, monkeypatch, tmp_path):
    path = tmp_path / "kvbm.toml"
    path.write_text("num_blocks = 12\n")
    monkeypatch.setenv("KVBM_BLOCK_SIZE", "8")
    status, found = call_json(capsys, "config", "--file", str(path))
    assert status == 0
    assert found == KvBlockManagerConfig(num_blocks=12, block_size=8).as_dict()
    _, out, _ = call(capsys, "config", "--file", str(path))
    assert re.search(r"^num_blocks +12$", out, re.MULTILINE)
    assert re.search(r"^num_layers +\(unset\)$", out, re.MULTILINE)


def test_config_schema(capsys):
    status, found = call_json(capsys, "config", "--schema")
    assert status == 0
    assert found == KvBlockManagerConfig.json_schema()
    _, out, _ = call(capsys, "config", "--schema")
    assert json.loads(out) == found


def test_config_errors_and_warnings_go_to_standard_error(capsys, monkeypatch, tmp_path):
    status, out, err = call(capsys, "config", "--file", str(tmp_path / "absent.toml"))
    assert (status, out) == (1, "")
    assert "absent.toml" in err
    monkeypatch.setenv("KVBM_BLOKSIZE", "8")
    status, out, err = call(capsys, "config", "--json")
    assert status == 0
    assert json.loads(out)["block_size"] == 64
    assert err.startswith("kvbm-jax: warning: unknown environment variable KVBM_BLOKSIZE")
    monkeypatch.setenv("KVBM_BLOCK_SIZE", "0.5")
    status, out, err = call(capsys, "config")
    assert (status, out) == (1, "")
    assert "kvbm-jax: error: block_size = '0.5' (from KVBM_BLOCK_SIZE)" in err


def test_doctor(capsys):
    status, found = call_json(capsys, "doctor")
    assert status == 0
    assert found["ok"]
    assert found["problems"] == []
    assert found["kvbm_jax"] == kvbm_jax.__version__
    assert found["packages"]["jax"]
    assert {"flax", "orbax", "nixl", "nats", "zmq", "prometheus"} <= set(found["packages"])
    assert found["devices"][0]["platform"] == "cpu"
    assert found["transfer_engines"]["tcp"] == []
    assert found["packages"]["nixl"] is None or "UCX" in found["transfer_engines"]["nixl"]
    _, out, _ = call(capsys, "doctor")
    assert "all fine" in out


def test_doctor_knows_every_extra(capsys, monkeypatch):
    monkeypatch.setattr("kvbm_jax.cli.doctor._version", lambda distributions: None)
    _, out, _ = call(capsys, "doctor")
    extras = set(tomllib.loads(PROJECT.read_text())["project"]["optional-dependencies"])
    # The rest are wheels of jax for a device, which doctor tells by its devices, and all of these at once.
    assert set(re.findall(r"kvbm-jax\[(\w+)\]", out)) == extras - {"cuda12", "cuda13", "all"}


def test_doctor_names_absent_packages_with_their_extra(capsys, monkeypatch):
    monkeypatch.setattr("kvbm_jax.cli.doctor._version", lambda distributions: None)
    status, out, _ = call(capsys, "doctor")
    assert status == 0
    assert "absent; comes with kvbm-jax[zmq]" in out


def test_doctor_reports_a_machine_without_devices(capsys, monkeypatch):
    def refuse(*_):
        raise RuntimeError("Unable to initialize backend 'cuda'")

    monkeypatch.setattr("jax.devices", refuse)
    status, found = call_json(capsys, "doctor")
    assert status == 1
    assert not found["ok"]
    assert "Unable to initialize backend" in found["problems"][0]


def test_doctor_reports_a_hidden_cpu(capsys, monkeypatch):
    import jax

    cpu = jax.devices()

    def devices(platform=None):
        if platform == "cpu":
            raise RuntimeError("Unknown backend cpu")
        return cpu

    monkeypatch.setattr("jax.devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    status, found = call_json(capsys, "doctor")
    assert status == 1
    assert "set JAX_PLATFORMS=cuda,cpu" in found["problems"][0]


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"kvbm-jax {kvbm_jax.__version__}\n"


@pytest.mark.parametrize("command", [(), ("replay",), ("config",), ("doctor",)])
def test_help_starts_no_back_end(command):
    probe = (
        "import sys; from kvbm_jax.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as done: assert not done.code\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "assert not getattr(bridge, '_backends', None)\n"
    )
    argv = [sys.executable, "-W", "error", "-c", probe, *command, "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: kvbm-jax")


def test_the_installed_script_runs():
    script = Path(sys.executable).with_name("kvbm-jax")
    if not script.exists():
        pytest.skip("kvbm-jax is not installed beside this Python")
    done = subprocess.run([script, "config", "--json"], capture_output=True, text=True, check=True, timeout=120)
    assert json.loads(done.stdout.splitlines()[-1])["block_size"] == 64


@pytest.mark.parametrize("arguments", [["dashboard"], ["--help"]], ids=str)
def test_who_has_read_enough_is_no_error(arguments):
    command = [sys.executable, "-c", "import sys; from kvbm_jax.cli import main; sys.exit(main())", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == (b"", 0)


def test_a_table_of_nothing_is_empty():
    assert table([]) == ""
