"""Connections between workers: accepted and authenticated on one end, made on the other."""

import contextlib
import logging
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable

from kvbm_jax.closing import Closing
from kvbm_jax.errors import ConfigError, FrameError, PeerLostError, TransferError
from kvbm_jax.transfer.access import SocketConfig, greet, welcome
from kvbm_jax.transfer.frames import Frames
from kvbm_jax.transfer.streams import Stream, stream_of

__all__ = ["Listener", "connect"]

_LOG = logging.getLogger(__name__)
_MOST_CONNECTIONS = 256
_GREETING = 5.0  # seconds for showing who one is


class Listener(Closing):
    """Accepts peers, and serves each on a thread of its own until it goes.

    Args:
      name: of the threads.
      config: where, and who may come.
      serve: is called with a peer's frames and the name it goes by; what it raises ends the connection.

    Raises:
      TransferError: The address cannot be had.
      ConfigError: The token or TLS files cannot be used.
    """

    def __init__(self, name: str, config: SocketConfig, serve: Callable[[Frames, str], None]) -> None:
        self._name = name
        self._config = config
        self._serve = serve
        self._token = config.token()
        self._tls = config.server_tls()
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            self._socket = socket.create_server((config.host, config.port), family=family, backlog=128)
        except OSError as error:
            raise TransferError(f"{config.host}:{config.port} cannot be listened at: {error}") from error
        self._port: int = self._socket.getsockname()[1]
        self._open: dict[Stream, threading.Thread] = {}
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, name=name, daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """As peers are told."""
        host = self._config.advertise or self._config.host
        return f"tcp://[{host}]:{self._port}" if ":" in host else f"tcp://{host}:{self._port}"

    def close(self) -> None:
        """Stops listening, and cuts every connection."""
        self._closed.set()
        with contextlib.suppress(OSError):  # it has been shut down before
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        with self._lock:
            open_now = dict(self._open)
        for stream in open_now:
            stream.cut()
        for thread in [self._thread, *open_now.values()]:
            if thread is not threading.current_thread():
                thread.join()

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                accepted, _ = self._socket.accept()
            except OSError as error:
                if not self._closed.is_set():
                    _LOG.warning("no connection can be accepted: %s", error)
                    self._closed.wait(0.1)  # too many files are open, for example
                continue
            with self._lock:
                if self._closed.is_set() or len(self._open) >= _MOST_CONNECTIONS:
                    accepted.close()
                    continue
            thread = threading.Thread(target=self._meet, args=(accepted,), name=f"{self._name}-peer", daemon=True)
            thread.start()

    def _meet(self, accepted: socket.socket) -> None:
        accepted.settimeout(_GREETING)
        try:
            if self._tls is not None:
                accepted = self._tls.wrap_socket(accepted, server_side=True)
        except OSError as error:
            _LOG.info("a connection was no TLS: %s", error)
            accepted.close()
            return
        stream = stream_of(accepted)
        with self._lock:
            self._open[stream] = threading.current_thread()
        try:
            if self._closed.is_set():
                return
            stream.patience(_GREETING)
            peer = welcome(stream, self._token)
            stream.patience(None)
            self._serve(Frames(stream), peer)
        except PeerLostError as error:
            _LOG.debug("a peer has gone: %s", error)
        except (TransferError, FrameError) as error:
            _LOG.warning("a connection was refused: %s", error)
        except Exception:  # noqa: BLE001 (a peer ends no more than its own connection)
            _LOG.exception("serving a peer has failed")
        finally:
            stream.cut()
            with self._lock:
                del self._open[stream]


def connect(address: str, config: SocketConfig, name: str) -> Frames:
    """Connects to a peer's listener under a name.

    Raises:
      PeerLostError: Nobody answers there.
      TransferError: It refuses the token, or the connection is not what TLS wants.
      ConfigError: It is no address, or the token or TLS files cannot be used.
    """
    host, port = _parsed(address)
    token, tls = config.token(), config.client_tls()
    try:
        connected = socket.create_connection((host, port), timeout=min(_GREETING, config.patience))
    except OSError as error:
        raise PeerLostError(f"nobody answers at {address}: {error}") from error
    try:
        if tls is not None:
            connected = tls.wrap_socket(connected, server_hostname=host)
    except OSError as error:
        connected.close()
        kind = TransferError if isinstance(error, ssl.SSLError) else PeerLostError
        raise kind(f"no TLS with {address}: {error}") from error
    stream = stream_of(connected)
    try:
        stream.patience(min(_GREETING, config.patience))
        greet(stream, token, name)
        stream.patience(config.patience)
    except BaseException:
        stream.cut()
        raise
    return Frames(stream)


def _parsed(address: str) -> tuple[str, int]:
    try:
        parts = urllib.parse.urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{address!r} is no address of a worker: {error}") from error
    if parts.scheme != "tcp" or not parts.hostname or port is None:
        raise ConfigError(f"{address!r} is no address of a worker, such as tcp://127.0.0.1:5000")
    return parts.hostname, port
