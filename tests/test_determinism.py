"""Processes and devices that apply the same plan hold bit-identical pools."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


def run(name, *arguments, count=1, **environment):
    """Runs a child program in `count` processes at once; returns the last line that each printed, decoded."""
    children = [
        subprocess.Popen(
            [sys.executable, "-W", "error", HERE / "determinism" / name, *map(str, arguments), str(number)],
            env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(HERE), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]
    try:
        told = [child.communicate(timeout=240) for child in children]
    finally:
        for child in children:
            child.kill()
    for child, (_, errors) in zip(children, told, strict=True):
        assert child.returncode == 0, errors[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in told]


@pytest.mark.long
@pytest.mark.core
def test_replicas_on_eight_devices_equal_one_device():
    [found] = run("replicas.py", XLA_FLAGS="--xla_force_host_platform_device_count=8")
    assert found["devices"] == 8
    assert found["steps"] == 60
    assert found["evictions"] > 20
    assert found["hits"] > 20
    assert found["replicas_that_differ"] == 0


@pytest.mark.parametrize("policy", ["lru", pytest.param("tiny_lfu", marks=pytest.mark.long)])
def test_two_processes_with_tiers_of_their_own_end_with_equal_pools(policy):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    first, second = run("processes.py", port, policy, count=2)
    # The tiers differed: one process's disk was slow and now and then failed.
    assert second["failures"] > 5
    assert first["failures"] == 0
    assert first["brought"] > second["brought"]
    # What was used of them did not.
    assert first["tier_hits"] == second["tier_hits"] > 5
    assert first["tier_hits"] <= second["brought"]
    assert first["hits"] == second["hits"]
    assert first["evictions"] == second["evictions"] > 20
    assert first["pool"] == second["pool"]
    assert first["sequences"] == second["sequences"]
    assert first["residents"] == second["residents"]
