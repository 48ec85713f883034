"""A worker that is drained in the middle of its answers, as the example does it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "migrate.py"


@pytest.mark.long
@pytest.mark.timeout(900)
def test_answers_go_on_in_another_process_and_are_equal():
    done = subprocess.run([sys.executable, str(EXAMPLE)], capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    head, *rows = done.stdout.splitlines()
    assert head == "2 answers went on in another process; 0 run here"
    assert len(rows) == 2
    for row in rows:
        assert "17 + 31 of answer" in row
        assert re.search(r"found there: (g1 \d+, )?g4 \d+;", row)  # both begin alike: the first has brought that
        assert "equal: " in row
