"""Prefill in one process and decode in another, as the example does it."""

import subprocess
import sys
from pathlib import Path

import pytest

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
