"""The engine over plain sockets, for where NIXL is not: the same calls, the same promises.

One connection for each peer and direction of asking. Who asks has a thread per peer that carries out its transfers in
order; who is asked has a thread per connection that serves slots straight out of registered memory, and takes them
straight into it. Nothing is copied in between. A peer names slots by number: memory that was not registered, and bytes
outside of slots, are refused.

    read     asker: ReadSlots                      server: Done, the bytes
    write    asker: WriteSlots                     server: Done
             asker: the bytes                      server: Done
"""

import contextlib
import logging
import queue
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.closing import Closing
from kvbm_jax.errors import BlockStateError, FrameError, KvbmError, PeerLostError, TransferError
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.protocols import Clock, MetricsSink, Slots
from kvbm_jax.transfer.access import SocketConfig
from kvbm_jax.transfer.frames import (
    Done,
    Frames,
    Message,
    ReadSlots,
    Refused,
    WriteSlots,
    decoded,
    ids_from,
    packed,
)
from kvbm_jax.transfer.listener import Listener, connect
from kvbm_jax.transfer.slots import check_ids, check_transfer, described

__all__ = ["TcpEngine"]

_LOG = logging.getLogger(__name__)


class _Description(Message, tag="tcp", frozen=True):
    """Where an engine is."""

    name: str
    address: str


_DESCRIPTION = msgspec.msgpack.Decoder(_Description)
_REQUEST = msgspec.msgpack.Decoder(ReadSlots | WriteSlots)
_DONE = msgspec.msgpack.Decoder(Done)
_ANSWER = msgspec.msgpack.Decoder(Done | Refused)


class _Memory(NamedTuple):
    """Registered memory."""

    slots: Slots
    array: NDArray[np.uint8]  # u8[N, P]; keeps it alive
    flat: memoryview  # all bytes from the first slot's first to the last one's last

    def buffers(self, slots: Slots, ids: NDArray[np.int32]) -> list[memoryview]:
        """Returns the bytes of slots, those that lie side by side as one buffer."""
        if not len(ids):
            return []
        starts = ids.astype(np.int64) * slots.stride + slots.offset
        breaks = np.flatnonzero(np.diff(starts) != slots.nbytes) + 1
        firsts = starts[np.concatenate([[0], breaks])].tolist()
        lasts = starts[np.concatenate([breaks - 1, [-1]])].tolist()
        return [self.flat[first : last + slots.nbytes] for first, last in zip(firsts, lasts, strict=True)]


@dataclass
class _Transfer:
    """A batch that was asked for."""

    operation: str  # read or write
    here: list[memoryview]
    request: ReadSlots | WriteSlots
    nbytes: int
    asked: int  # monotonic ns
    future: Future[None] = field(default_factory=Future)


class TcpEngine(Closing):
    """Transfers over TCP.

    Args:
      name: of this process among its peers; it is made unique.
      config: where peers may ask, and what both ends show.
      metrics: takes measurements.
      clock: for durations.

    Raises:
      TransferError: The address cannot be had.
      ConfigError: The token or TLS files cannot be used.
    """

    def __init__(
        self,
        name: str = "kvbm",
        *,
        config: SocketConfig | None = None,
        metrics: MetricsSink | None = None,
        clock: Clock = time,
    ) -> None:
        self._own_name = f"{name}-{uuid.uuid4().hex}"
        self._config = config or SocketConfig()
        self._metrics = metrics or NullMetrics()
        self._clock = clock
        self._memory: dict[int, _Memory] = {}
        self._links: dict[str, _Link] = {}
        self._notices: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._closed = False
        self._listener = Listener("kvbm-tcp", self._config, self._serve)

    @property
    def name(self) -> str:
        """`tcp`."""
        return "tcp"

    def register(self, slots: NDArray[np.uint8]) -> Slots:
        """Makes host memory u8[N, P] known under a number."""
        address = slots.ctypes.data
        with self._lock:
            self._check_open()
            for memory in self._memory.values():
                if memory.array.ctypes.data == address and memory.array.shape == slots.shape:
                    return memory.slots
            found = described(slots, len(self._memory))
            length = (found.count - 1) * found.stride + found.nbytes
            flat = np.lib.stride_tricks.as_strided(slots, (length,), (1,))
            self._memory[found.region] = _Memory(found, slots, memoryview(flat))
        return found

    def description(self) -> bytes:
        """Returns name and address."""
        return msgspec.msgpack.encode(_Description(self._own_name, self._listener.address))

    def connect(self, description: bytes) -> str:
        """Connects to a peer, unless there is a connection already."""
        found = decoded(description, _DESCRIPTION)
        with self._lock:
            self._check_open()
            link = self._links.get(found.name)
            if link is not None and link.is_up:
                return found.name
        link = _Link(connect(found.address, self._config, self._own_name), self._end)
        with self._lock:
            # Threads may have connected side by side: the first stays, for others ask over it already.
            former = self._links.get(found.name)
            needed = not self._closed and (former is None or not former.is_up)
            if needed:
                self._links[found.name] = link
        spare = former if needed else link
        if spare is not None:
            spare.close()
        with self._lock:
            self._check_open()
        return found.name

    def forget(self, peer: str) -> None:
        """Cuts the connection with a peer; what is under way with it fails at once."""
        with self._lock:
            link = self._links.pop(peer, None)
        if link is not None:
            link.close()

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
        request = ReadSlots(source, packed(source_ids), notice)
        return self._submit("read", peer, request, target, target_ids)

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
        request = WriteSlots(target, packed(target_ids), notice)
        return self._submit("write", peer, request, source, source_ids)

    def notices(self) -> list[tuple[str, bytes]]:
        """Returns what has come with the transfers of peers."""
        found = []
        with contextlib.suppress(queue.Empty):  # that was all
            while True:
                found.append(self._notices.get_nowait())
        return found

    def close(self) -> None:
        """Cuts all connections: what is under way fails."""
        with self._lock:
            self._closed = True
            links = list(self._links.values())
            self._links.clear()
        for link in links:
            link.close()
        self._listener.close()

    def _check_open(self) -> None:
        if self._closed:
            raise BlockStateError("the transfer engine is closed")

    def _submit(
        self, operation: str, peer: str, request: ReadSlots | WriteSlots, slots: Slots, ids: NDArray[np.int32]
    ) -> Future[None]:
        with self._lock:
            self._check_open()
            memory = self._known(slots, ids, written=operation == "read")
            transfer = _Transfer(
                operation, memory.buffers(slots, ids), request, len(ids) * slots.nbytes, self._clock.monotonic_ns()
            )
            link = self._links.get(peer)
            if not transfer.nbytes:
                transfer.future.set_result(None)
            elif link is None or not link.put(transfer):
                self._end(transfer, PeerLostError(f"there is no connection with {peer}"))
        return transfer.future

    def _known(self, slots: Slots, ids: NDArray[np.int32], *, written: bool) -> _Memory:
        """Returns the memory of slots, after checking that all of them lie within it."""
        memory = self._memory.get(slots.region)
        if (
            memory is None
            or (slots.stride, slots.count) != (memory.slots.stride, memory.slots.count)
            or slots.offset + slots.nbytes > memory.slots.nbytes
        ):
            raise TransferError(f"no memory is registered as {slots}")
        if written and not memory.array.flags.writeable:
            raise TransferError(f"the memory registered as {slots} is read only")
        check_ids(slots, ids)
        return memory

    def _end(self, transfer: _Transfer, error: KvbmError | None) -> None:
        labels = {"engine": self.name, "operation": transfer.operation}
        self._metrics.count("kvbm_engine_requests_total", **labels)
        self._metrics.observe("kvbm_engine_seconds", (self._clock.monotonic_ns() - transfer.asked) / 1e9, **labels)
        if error is None:
            self._metrics.count("kvbm_engine_bytes_total", transfer.nbytes, **labels)
            transfer.future.set_result(None)
        else:
            self._metrics.count("kvbm_engine_failures_total", reason=type(error).__name__, **labels)
            transfer.future.set_exception(error)

    def _serve(self, frames: Frames, peer: str) -> None:
        """Serves one connection until it ends."""
        while True:
            frames.stream.patience(None)
            request = frames.receive(_REQUEST)
            frames.stream.patience(self._config.patience)
            ids = ids_from(request.ids)
            writes = isinstance(request, WriteSlots)
            try:
                with self._lock:
                    memory = self._known(request.slots, ids, written=writes)
            except TransferError as error:
                frames.send(Refused(str(error)))
                continue
            buffers = memory.buffers(request.slots, ids)
            frames.send(Done(), None if writes else buffers)
            if writes:
                frames.stream.receive(buffers)
            if request.notice:
                self._notices.put((peer, request.notice))
            if writes:
                frames.send(Done())


class _Link:
    """A connection on which this process asks, and the thread that does."""

    def __init__(self, frames: Frames, end: Callable[[_Transfer, KvbmError | None], None]) -> None:
        self._frames = frames
        self._end = end
        self._tasks: queue.SimpleQueue[_Transfer | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self.is_up = True
        self._thread = threading.Thread(target=self._run, name="kvbm-tcp-link", daemon=True)
        self._thread.start()

    def put(self, transfer: _Transfer) -> bool:
        """Queues a transfer; False if the connection is down."""
        with self._lock:
            if self.is_up:
                self._tasks.put(transfer)
            return self.is_up

    def close(self) -> None:
        """Cuts the connection, and waits for the transfers to have failed."""
        self._take_down()
        self._frames.stream.cut()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _take_down(self) -> None:
        with self._lock:
            if self.is_up:
                self.is_up = False
                self._tasks.put(None)

    def _run(self) -> None:
        broken: KvbmError | None = None
        while (transfer := self._tasks.get()) is not None:
            if not transfer.future.set_running_or_notify_cancel():
                continue
            try:
                broken = broken or self._carry_out(transfer)
            except KvbmError as error:
                broken = error
            if broken is not None:
                self._take_down()
                if not transfer.future.done():
                    self._end(transfer, broken)
        self._frames.stream.cut()

    def _carry_out(self, transfer: _Transfer) -> KvbmError | None:
        """Returns what has broken the connection, or None after ending the transfer."""
        stream = self._frames.stream
        try:
            self._frames.ask(transfer.request, _ANSWER)
        except PeerLostError as error:
            return error
        except TransferError as error:
            self._end(transfer, error)
            return error if isinstance(error, FrameError) else None
        if isinstance(transfer.request, ReadSlots):
            stream.receive(transfer.here)
        else:
            stream.send(transfer.here)
            self._frames.receive(_DONE)
        self._end(transfer, None)
        return None
