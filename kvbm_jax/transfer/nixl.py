"""The engine over NIXL: one agent, and the thread that alone talks to it.

An agent is created with its back ends (UCX unless others are asked for), memory is registered once, and a list of
descriptors is prepared for each peer and arena the first time it is needed; a transfer then names rows of two such
lists. Transfers are posted in the order of the calls. Over shared memory a post copies all of it before it returns;
over a network several are in flight at once, and are asked after in turn.

NIXL does not take a transfer back. A request that is released, and even a peer that is removed, leaves bytes on their
way, which land when they please. So a transfer that was posted is always waited for, its future is done when nothing
can land any more, and a peer is let go of only when nothing is under way with it.

NIXL's own thread, which answers peers, looks for something to do without a pause if it is started from Python, a whole
core's worth. Here it waits for events, and looks ten times a second beside.

UCX would listen at every address of the machine. Here it is given the loopback device alone, unless the argument or the
variable `UCX_NET_DEVICES` names others. What it listens on asks nobody for credentials: name devices of a network that
you trust.
"""

import contextlib
import importlib
import importlib.util
import logging
import logging.config
import os
import queue
import sys
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvbm_jax.closing import Closing
from kvbm_jax.errors import BlockStateError, KvbmError, PeerLostError, TransferError
from kvbm_jax.extras import needs
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.protocols import Clock, MetricsSink, Slots
from kvbm_jax.transfer.slots import check_transfer, described

__all__ = ["UCX", "NixlEngine", "available_backends", "start_agent"]

UCX: Mapping[str, Mapping[str, str]] = types.MappingProxyType({"UCX": {}})
"""The back end that is asked for unless others are, without parameters."""

_LOG = logging.getLogger(__name__)
_PACKAGES = ("nixl", "nixl_cu12", "nixl_cu13")
_DEVICES, _LOG_FILE = "UCX_NET_DEVICES", "UCX_LOG_FILE"
_HERE = "NIXL_INIT_AGENT"  # NIXL's name for this side of a transfer
_PROGRESS_DELAY = 100_000  # microseconds
_GRACE = 5.0  # seconds that closing waits for transfers under way
_PAUSES = (0.0, 0.00002, 0.0001, 0.0005)  # seconds between two looks at transfers in flight: longer and longer
_ABANDONED: list[Any] = []  # agents and memory that a peer may still write into: kept as long as the process
_environment = threading.Lock()


def _load() -> types.ModuleType:
    """Imports NIXL and leaves logging as it was: importing it closes the handlers of others and sets one on stdout."""
    raises, configure = logging.raiseExceptions, logging.config.dictConfig
    logging.config.dictConfig = lambda config: None
    try:
        return importlib.import_module(next(filter(importlib.util.find_spec, _PACKAGES), _PACKAGES[0]))
    finally:
        logging.config.dictConfig = configure
        logging.raiseExceptions = raises


with needs("nixl", "transfers over NIXL"):
    _nixl = _load()


def available_backends() -> list[str]:
    """Returns the names of the back ends that NIXL could be asked for on this machine.

    Raises:
      TransferError: NIXL does not start.
    """
    try:
        return sorted(start_agent("doctor", {}).get_plugin_list())
    except Exception as error:
        raise TransferError(f"NIXL does not start: {_said(error)}") from error


@dataclass
class _Transfer:
    """A batch that was asked for."""

    operation: str  # READ or WRITE
    peer: str
    here: Slots
    here_ids: NDArray[np.int32]
    there: Slots
    there_ids: NDArray[np.int32]
    notice: bytes
    asked: int  # monotonic ns
    future: Future[None] = field(default_factory=Future)
    handle: Any = None  # NIXL's, from posting to the end


class NixlEngine(Closing):
    """Transfers over NIXL.

    Args:
      name: of this process among its peers; it is made unique.
      backends: of NIXL, and the parameters of each; the first that can serve a transfer does.
      devices: network devices for UCX, comma-separated, `all` for all; None for what `UCX_NET_DEVICES` says, or else
        loopback.
      metrics: takes measurements.
      clock: for durations.

    Raises:
      TransferError: NIXL or one of its back ends does not start.
    """

    def __init__(
        self,
        name: str = "kvbm",
        *,
        backends: Mapping[str, Mapping[str, str]] = UCX,
        devices: str | None = None,
        metrics: MetricsSink | None = None,
        clock: Clock = time,
    ) -> None:
        self._metrics = metrics or NullMetrics()
        self._clock = clock
        self._agent = start_agent(name, backends, devices)
        self._memory: dict[int, tuple[NDArray[np.uint8], Any]] = {}  # by address: and what NIXL knows it by
        self._tasks: queue.SimpleQueue[_Transfer | Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        # What follows belongs to the thread.
        self._lists: dict[tuple[str, Slots], Any] = {}
        self._flying: list[_Transfer] = []
        self._leaving: set[str] = set()  # peers to let go of when nothing is under way with them
        self._deadline: float | None = None  # of closing
        self._thread = threading.Thread(target=self._run, name="kvbm-nixl", daemon=True)
        self._thread.start()

    @property
    def name(self) -> str:
        """`nixl`."""
        return "nixl"

    def register(self, slots: NDArray[np.uint8]) -> Slots:
        """Registers host memory u8[N, P] with every back end that takes such."""
        address = slots.ctypes.data
        found = described(slots, address)
        length = (found.count - 1) * found.stride + found.nbytes

        def register() -> Slots:
            if address not in self._memory:
                known = self._agent.register_memory([(address, length, 0, "")], "DRAM")
                self._memory[address] = slots, known
            return found

        return self._call(register)

    def description(self) -> bytes:
        """Returns the agent's metadata."""
        return self._call(lambda: bytes(self._agent.get_agent_metadata()))

    def connect(self, description: bytes) -> str:
        """Loads a peer's metadata."""

        def connect() -> str:
            found = self._agent.add_remote_agent(description)
            peer = found.decode() if isinstance(found, bytes) else str(found)
            self._leaving.discard(peer)
            return peer

        return self._call(connect)

    def forget(self, peer: str) -> None:
        """Removes a peer once nothing is under way with it."""
        with contextlib.suppress(BlockStateError):  # closed: all peers are forgotten
            self._put(lambda: self._leaving.add(peer))

    def read(
        self,
        peer: str,
        source: Slots,
        source_ids: NDArray[np.int32],
        target: Slots,
        target_ids: NDArray[np.int32],
        notice: bytes = b"",
    ) -> Future[None]:
        """Reads slots of a peer."""
        check_transfer(source, source_ids, target, target_ids)
        return self._submit("READ", peer, (target, target_ids), (source, source_ids), notice)

    def write(
        self,
        peer: str,
        source: Slots,
        source_ids: NDArray[np.int32],
        target: Slots,
        target_ids: NDArray[np.int32],
        notice: bytes = b"",
    ) -> Future[None]:
        """Writes slots of a peer."""
        check_transfer(source, source_ids, target, target_ids)
        return self._submit("WRITE", peer, (source, source_ids), (target, target_ids), notice)

    def notices(self) -> list[tuple[str, bytes]]:
        """Asks the agent for what has come."""
        told = self._call(self._agent.get_new_notifs)
        return [(peer, bytes(notice)) for peer, notices in told.items() for notice in notices]

    def close(self) -> None:
        """Waits up to 5 seconds for what is under way; memory that may still be written to is kept for ever then."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._tasks.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _submit(
        self,
        operation: str,
        peer: str,
        here: tuple[Slots, NDArray[np.int32]],
        there: tuple[Slots, NDArray[np.int32]],
        notice: bytes,
    ) -> Future[None]:
        transfer = _Transfer(operation, peer, *here, *there, notice, self._clock.monotonic_ns())
        if len(transfer.here_ids):
            self._put(transfer)
        else:
            transfer.future.set_result(None)
        return transfer.future

    def _call[T](self, function: Callable[[], T]) -> T:
        """Has the thread call a function, and waits for what it returns."""
        answer: Future[T] = Future()

        def call() -> None:
            try:
                answer.set_result(function())
            except Exception as error:  # noqa: BLE001 (the caller is told)
                answer.set_exception(_translated(error, "NIXL refuses"))

        self._put(call)
        return answer.result()

    def _put(self, task: "_Transfer | Callable[[], None]") -> None:
        with self._lock:
            if self._closed:
                raise BlockStateError("the transfer engine is closed")
            self._tasks.put(task)

    # What follows runs on the thread.

    def _run(self) -> None:
        looks = 0
        while self._flying or self._deadline is None:
            task = self._next(_PAUSES[min(looks // 50, len(_PAUSES) - 1)] if self._flying else None)
            match task:
                case None:
                    looks += 1
                case _Transfer():
                    self._post(task)
                    looks = 0
                case _:
                    task()
            self._flying = [transfer for transfer in self._flying if not self._has_landed(transfer)]
            for peer in [p for p in self._leaving if all(t.peer != p for t in self._flying)]:
                self._remove(peer)
            if self._deadline is not None and time.monotonic() > self._deadline:
                break
        self._end()

    def _next(self, pause: float | None) -> "_Transfer | Callable[[], None] | None":
        """Returns the next task; None if there is none within `pause` seconds, or it is the last."""
        try:
            task = (
                self._tasks.get()
                if pause is None
                else self._tasks.get(timeout=pause)
                if pause
                else self._tasks.get_nowait()
            )
        except queue.Empty:
            return None
        if task is None:
            self._deadline = time.monotonic() + _GRACE
        return task

    def _post(self, transfer: _Transfer) -> None:
        if not transfer.future.set_running_or_notify_cancel():
            return
        if transfer.peer in self._leaving:
            self._finish(transfer, PeerLostError(f"peer {transfer.peer} has been forgotten"))
            return
        try:
            transfer.handle = self._agent.make_prepped_xfer(
                transfer.operation,
                self._list(_HERE, transfer.here),
                transfer.here_ids,
                self._list(transfer.peer, transfer.there),
                transfer.there_ids,
                transfer.notice,
            )
            state = self._agent.transfer(transfer.handle)
        except Exception as error:  # noqa: BLE001 (NIXL raises classes of its own; the caller is told)
            self._finish(transfer, error)
            return
        self._look(transfer, state)
        if not transfer.future.done():
            self._flying.append(transfer)

    def _has_landed(self, transfer: _Transfer) -> bool:
        if not transfer.future.done():
            try:
                self._look(transfer, self._agent.check_xfer_state(transfer.handle))
            except Exception as error:  # noqa: BLE001 (as above)
                self._finish(transfer, error)
        return transfer.future.done()

    def _look(self, transfer: _Transfer, state: str) -> None:
        if state == "DONE":
            self._finish(transfer, None)
        elif state != "PROC":
            self._finish(transfer, TransferError(f"NIXL says {state}"))

    def _finish(self, transfer: _Transfer, error: Exception | None) -> None:
        if transfer.handle is not None:
            with contextlib.suppress(RuntimeError):  # NIXL frees it with the agent then
                transfer.handle.release()
        labels = {"engine": self.name, "operation": transfer.operation.lower()}
        seconds = (self._clock.monotonic_ns() - transfer.asked) / 1e9
        self._metrics.count("kvbm_engine_requests_total", **labels)
        self._metrics.observe("kvbm_engine_seconds", seconds, **labels)
        if error is None:
            self._metrics.count("kvbm_engine_bytes_total", len(transfer.here_ids) * transfer.here.nbytes, **labels)
            transfer.future.set_result(None)
            return
        told = _translated(error, f"{transfer.operation.lower()} of {len(transfer.here_ids):,} slots")
        self._metrics.count("kvbm_engine_failures_total", reason=type(told).__name__, **labels)
        transfer.future.set_exception(told)

    def _list(self, agent: str, slots: Slots) -> Any:
        """Returns a prepared list of the descriptors of all slots, the same whenever it is asked for."""
        found = self._lists.get((agent, slots))
        if found is None:
            table = np.zeros((slots.count, 3), np.uint64)  # address, length, device
            table[:, 0] = (
                slots.region + slots.offset + np.arange(slots.count, dtype=np.uint64) * np.uint64(slots.stride)
            )
            table[:, 1] = slots.nbytes
            found = self._lists[agent, slots] = self._agent.prep_xfer_dlist(agent, table, "DRAM")
        return found

    def _remove(self, peer: str) -> None:
        self._leaving.discard(peer)
        for key in [key for key in self._lists if key[0] == peer]:
            self._release(self._lists.pop(key))
        with _logged(f"letting go of {peer}"):
            self._agent.remove_remote_agent(peer)

    def _release(self, prepared: Any) -> None:
        with _logged("releasing a list of descriptors"):
            prepared.release()

    def _end(self) -> None:
        with contextlib.suppress(queue.Empty):  # all that was asked for is answered then
            while True:
                task = self._tasks.get_nowait()
                if isinstance(task, _Transfer):
                    task.future.cancel()
        if self._flying:
            _LOG.warning("%d transfers are still under way; their memory is never freed", len(self._flying))
            _ABANDONED.append((self._agent, self._memory, self._lists, self._flying))
            for transfer in self._flying:
                transfer.future.set_exception(PeerLostError("the engine was closed, and this transfer did not end"))
            return
        for prepared in self._lists.values():
            self._release(prepared)
        self._lists.clear()
        for _, known in self._memory.values():
            with _logged("deregistering memory"):
                self._agent.deregister_memory(known)
        self._memory.clear()
        del self._agent


def start_agent(name: str, backends: Mapping[str, Mapping[str, str]] = UCX, devices: str | None = None) -> Any:
    """Starts an agent of NIXL with its back ends; arguments as of `NixlEngine`.

    Raises:
      TransferError: It does not start.
    """
    name = f"{name}-{uuid.uuid4().hex}"
    try:
        agent = _nixl.nixl_agent(name, _nixl.nixl_agent_config(backends=[]))
        bindings = sys.modules[type(agent.agent).__module__]
        config = bindings.nixlAgentConfig()
        config.useProgThread, config.pthrDelay = True, _PROGRESS_DELAY
        agent.agent = bindings.nixlAgent(name, config)
        with _ucx_environment(devices):
            for backend, parameters in backends.items():
                agent.create_backend(backend, dict(parameters))
    except Exception as error:
        raise TransferError(f"NIXL does not start with {', '.join(backends)}: {_said(error)}") from error
    return agent


@contextlib.contextmanager
def _ucx_environment(devices: str | None) -> Iterator[None]:
    """Tells UCX its devices, and not to log on standard output: it reads its environment as a back end is created."""
    told = {_DEVICES: devices or os.environ.get(_DEVICES) or "lo", _LOG_FILE: os.environ.get(_LOG_FILE) or "stderr"}
    with _environment:
        before = {variable: os.environ.get(variable) for variable in told}
        os.environ.update(told)
        try:
            yield
        finally:
            for variable, value in before.items():
                if value is None:
                    del os.environ[variable]
                else:
                    os.environ[variable] = value


def _translated(error: Exception, what: str) -> KvbmError:
    """Returns NIXL's error as one of ours; NIXL's names are its messages."""
    if isinstance(error, KvbmError):
        return error
    kind = PeerLostError if "DISCONNECT" in str(error) else TransferError
    found = kind(f"{what}: {_said(error)}")
    found.__cause__ = error
    return found


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


@contextlib.contextmanager
def _logged(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 (NIXL raises classes of its own, and nobody waits for this)
        _LOG.info("NIXL: %s: %s", what, _said(error))
