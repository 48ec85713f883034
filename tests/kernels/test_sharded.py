"""A cache whose heads are shared out among devices stays so: nothing of it crosses from one to another."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.core

HERE = pathlib.Path(__file__).parent


def run(which):
    """What `sharded.py` tells, in a process that has 8 devices."""
    root = HERE.parent.parent
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(root),
    }
    argv = [sys.executable, str(HERE / "sharded.py"), which]
    done = subprocess.run(argv, cwd=root, env=environment, capture_output=True, text=True, timeout=800, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def check(found):
    assert {name: told for name, told in found.items() if told["collectives"]} == {}
    assert [name for name, told in found.items() if not told["equal"]] == []
    assert [name for name, told in found.items() if not told["shared"]] == []
    ways = {name.partition(":")[0] for name in found}
    assert ways == {"jit", "explicit", "shard_map, True", "shard_map, False", "kernel", "kernel, explicit"}


@pytest.mark.long
def test_heads_stay_on_their_devices():
    check(run("some"))


@pytest.mark.long
@pytest.mark.timeout(900)
def test_heads_stay_on_their_devices_in_every_layout():
    check(run("every"))
