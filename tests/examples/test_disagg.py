"""Prefill in one process and decode in another, as the example does it."""

import argparse
import contextlib
import subprocess
import sys
import threading
from pathlib import Path

import disagg
import pytest

from kvbm_jax.transports.nats_server import NatsServer

EXAMPLE = Path(__file__).parents[2] / "examples" / "disagg.py"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_long_prompts_are_computed_in_another_process_and_answers_are_equal():
    command = [sys.executable, str(EXAMPLE), "--max-tokens", "5"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    short, long, again, other = done.stdout.splitlines()[1:]
    assert "decode" in short
    assert "nowhere" in short
    for row in (long, other):
        assert "prefill, decode" in row
        assert "g4 5" in row  # some 500 tokens and more, of 600
    assert "prefill" not in again
    assert "g1 6" in again
    assert all("equal" in row for row in (short, long, again, other))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_answers_are_equal_whenever_the_prefilling_process_is_killed(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    args = argparse.Namespace(max_tokens=4, transfer_engine="tcp")
    handbook = (EXAMPLE.parent / "data" / "handbook.txt").read_text()
    prompts = [tokenizer.encode(handbook[first : first + 1200]) for first in range(0, 4800, 1200)]
    with contextlib.ExitStack() as opened:
        server = opened.enter_context(NatsServer(tmp_path / "nats"))
        workers = [disagg.Worker(name, args, server.url) for name in ("decode", "first", "second")]
        for worker in workers:
            opened.callback(worker.close)
        for worker in workers:
            worker.read()
        decode, first, second = workers

        def same(tokens, awaited=0):
            """Decodes with what peers have and alone; returns what was found."""
            *_, answer = decode.ask(do="decode", tokens=tokens, **{"await": awaited})
            *_, alone = decode.ask(do="alone", tokens=tokens)
            assert answer["tokens"] == alone["tokens"]
            return answer["hits"]

        def prefill(worker, tokens):
            (told,) = worker.ask(do="prefill", tokens=tokens)
            return min(told["shared"], (len(tokens) - 1) // 16 * 16)

        pulled, lost, cut, known = prompts
        assert same(pulled, prefill(first, pulled)).get("g4", 0) > 0
        prefill(first, lost)
        first._process.kill()  # before the pull
        same(lost)
        assert same(pulled).get("g1", 0) > 0  # after it
        for tokens in (known, cut):
            prefill(second, tokens)
        assert same(known, len(known) // 16 * 16 - 16).get("g4", 0) > 0
        killer = threading.Timer(0.02, second._process.kill)  # while the decoding process finds and pulls
        killer.start()
        same(cut)
        killer.join()
