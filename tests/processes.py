"""Other processes that tests talk to: each a fork of a server that has imported what they need, so they start at once.

A process serves an object: what is called on the `Peer` here is called on the object there, and its answer or its error
comes back.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

_PRELOADED = ["transfer_peer", "kvbm_jax.transfer.tcp", "kvbm_jax.transfer.nixl"]  # the last if it is installed


class Peer:
    """An object in another process."""

    def __init__(self, process, connection):
        self.process = process
        self._connection = connection
        self._lock = threading.Lock()

    def __getattr__(self, name):
        return lambda *arguments: self._call(name, *arguments)

    def _call(self, name, *arguments):
        with self._lock:
            self._connection.send((name, arguments))
            answer, error = self._connection.recv()
        if error is not None:
            pytest.fail(f"{name} in the other process: {error}")
        return answer

    def kill(self):
        """Ends the process as a fault would."""
        self.process.kill()
        self.process.join()

    def stop(self):
        """Has it hang, until `resume`."""
        os.kill(self.process.pid, signal.SIGSTOP)
        stat = Path(f"/proc/{self.process.pid}/stat")
        while stat.read_text().rpartition(") ")[2][0] != "T":
            os.sched_yield()

    def resume(self):
        """Has it go on."""
        os.kill(self.process.pid, signal.SIGCONT)


def _serve(connection, make, arguments, environment):
    os.environ.clear()
    os.environ.update(environment)  # of the test, not of the first one that started a process
    served = make(*arguments)
    connection.send((None, None))
    while True:
        name, given = connection.recv()
        try:
            connection.send((getattr(served, name)(*given), None))
        except Exception as error:  # noqa: BLE001 (the test is told)
            connection.send((None, f"{type(error).__name__}: {error}"))


@contextlib.contextmanager
def in_a_process(make, *arguments):
    """Has `make(*arguments)` called in a process of its own, which ends with the block."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, make, arguments, dict(os.environ)), daemon=True)
    process.start()
    there.close()
    try:
        here.recv()
        yield Peer(process, here)
    finally:
        process.kill()
        process.join()
        process.close()
        here.close()
