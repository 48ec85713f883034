"""Bytes over one connection, from and into memory that stays where it is, in the clear or through TLS.

Whatever goes wrong on the way, the peer is lost for this connection and `PeerLostError` says why. Both streams send and
receive lists of buffers, many with one call to the system; what was not finished when it fails is anything.
"""

import collections
import contextlib
import itertools
import socket
import ssl
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from kvbm_jax.errors import PeerLostError

__all__ = ["Stream", "stream_of"]

_BATCH = 512  # buffers of one call; Linux takes 1,024
_TIMEVAL = struct.Struct("ll")


class Stream(Protocol):
    """One connection with a peer; one thread sends and receives, any thread may cut it."""

    def patience(self, seconds: float | None) -> None:
        """Sets how long the peer may let a call wait without sending or taking a byte; None for ever."""
        ...

    def send(self, buffers: Sequence[memoryview]) -> None:
        """Sends all of the buffers.

        Raises:
          PeerLostError: The peer is gone, or does not take them.
        """
        ...

    def receive(self, buffers: Sequence[memoryview]) -> None:
        """Fills all of the buffers.

        Raises:
          PeerLostError: The peer is gone, or sends nothing.
        """
        ...

    def cut(self) -> None:
        """Ends the connection: whoever waits in it hears of that at once. Idempotent."""
        ...


def stream_of(connected: socket.socket) -> Stream:
    """Returns a stream over a socket, which is its own from now on."""
    if connected.family in {socket.AF_INET, socket.AF_INET6}:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return _TlsStream(connected) if isinstance(connected, ssl.SSLSocket) else _PlainStream(connected)


class _PlainStream:
    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        connected.settimeout(None)  # the kernel keeps the time: a socket of Python's that does is never filled at once

    def patience(self, seconds: float | None) -> None:
        value = 0.0 if seconds is None else max(seconds, 1e-6)
        whole = int(value)
        packed = _TIMEVAL.pack(whole, round((value - whole) * 1e6))
        with contextlib.suppress(OSError):  # it has been cut, which the next call tells
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, packed)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, packed)

    def send(self, buffers: Sequence[memoryview]) -> None:
        with _lost():
            _through(buffers, self._socket.sendmsg)

    def receive(self, buffers: Sequence[memoryview]) -> None:
        def fill(batch: list[memoryview]) -> int:
            return self._socket.recvmsg_into(batch, 0, socket.MSG_WAITALL)[0]

        with _lost():
            _through(buffers, fill)

    def cut(self) -> None:
        _cut(self._socket)


class _TlsStream:
    def __init__(self, connected: ssl.SSLSocket) -> None:
        self._socket = connected

    def patience(self, seconds: float | None) -> None:
        with contextlib.suppress(OSError):  # as above
            self._socket.settimeout(seconds)

    def send(self, buffers: Sequence[memoryview]) -> None:
        with _lost():
            for buffer in buffers:
                self._socket.sendall(buffer)

    def receive(self, buffers: Sequence[memoryview]) -> None:
        with _lost():
            _through(buffers, lambda batch: self._socket.recv_into(batch[0]))

    def cut(self) -> None:
        _cut(self._socket)


def _through(buffers: Sequence[memoryview], call: Callable[[list[memoryview]], int]) -> None:
    """Has `call` work through the buffers, which says how many bytes it has done of those it is given."""
    left = collections.deque(buffer for buffer in buffers if len(buffer))
    while left:
        done = call(list(itertools.islice(left, _BATCH)))
        if not done:
            raise PeerLostError("the peer has closed the connection")
        while done:
            if done < len(left[0]):
                left[0], done = left[0][done:], 0
            else:
                done -= len(left.popleft())


def _cut(connected: socket.socket) -> None:
    with contextlib.suppress(OSError):  # the peer has gone before
        connected.shutdown(socket.SHUT_RDWR)
    connected.close()


@contextlib.contextmanager
def _lost() -> Iterator[None]:
    try:
        yield
    except (BlockingIOError, TimeoutError) as error:  # what the kernel says when its time is over
        raise PeerLostError("the peer has kept this connection waiting for too long") from error
    except PeerLostError:
        raise
    except (OSError, ValueError) as error:  # a value error: it was cut by another thread
        raise PeerLostError(f"the connection has broken: {error}") from error
