"""The listening end: a thread that accepts, and one for each connection, which answers one request and ends."""

import contextlib
import fcntl
import hmac
import json
import logging
import os
import socket
import socketserver
import stat
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any, ClassVar

from kvbm_jax.closing import Closing
from kvbm_jax.controller.address import Address, check_token, default_socket, parse_address
from kvbm_jax.controller.commands import COMMANDS, Answer, Listing, carry_out
from kvbm_jax.errors import BlockStateError, BusyError, ConfigError, KvbmError, TransportError
from kvbm_jax.manager import BlockManager

__all__ = ["Controller"]

_LOG = logging.getLogger(__name__)
_PREFIX = "/v1/"
_LONGEST_BODY = 4 << 20
_MOST_DIGITS = 10  # of a length that is looked at as a number
_LONGEST_DRAIN = 64 << 20
_MOST_CONNECTIONS = 32
_LOCK_FLAGS = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
_POLL_SECONDS = 0.1  # how often the accepting thread looks whether it is to end


class Controller(Closing):
    """Lets an operator command a manager from other processes, until it is closed.

    Args:
      manager: carries commands out between its calls.
      url: where to listen: `unix:///path`, or `http://host:port`, port 0 for a free one. None: a Unix socket in this
        user's runtime folder, where `kvbm-jax status` looks.
      token: what callers must show as bearer; None for none.

    Raises:
      ConfigError: if the address is none, or can be reached from other machines and there is no token.
      TransportError: if the address is taken, or cannot be had.
    """

    def __init__(self, manager: BlockManager, url: str | None = None, *, token: str | None = None) -> None:
        address = Address(default_socket(manager.config.worker_id)) if url is None else parse_address(url)
        if token is not None:
            check_token(token)
        elif not address.is_local:
            raise ConfigError(
                f"{address.url} can be reached from other machines: give the controller a token, or an address of "
                "this machine such as http://127.0.0.1:0"
            )
        with contextlib.ExitStack() as opened:
            if address.path is not None:
                opened.enter_context(_owned(address.path))
            try:
                self._server = _Server(address, manager, token)
            except OSError as error:
                raise TransportError(f"the controller cannot listen at {address.url}: {error.strerror}") from error
            opened.callback(self._server.server_close)
            self._owned = opened.pop_all()
        self.url = address.url if address.path else address._replace(port=self._server.server_address[1]).url
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(_POLL_SECONDS,), name="kvbm-controller", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stops listening, and waits for the commands under way. Idempotent."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
            self._server.hang_up()
        self._owned.close()


@contextlib.contextmanager
def _owned(path: Path) -> Any:
    """Has this process alone listen at a path; what a process that is gone has left there is removed."""
    try:
        lock = os.open(path.with_name(path.name + ".lock"), _LOCK_FLAGS, 0o600)
    except OSError as error:
        raise TransportError(f"the controller cannot listen at unix://{path}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TransportError(
                f"another controller listens at unix://{path}: give this manager a worker_id or an address of its own"
            ) from error
        _clear(path)
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(lock)


def _clear(path: Path) -> None:
    """Removes the socket of a process that is gone; nothing else."""
    why = "another program listens there"
    try:
        if stat.S_ISSOCK(path.lstat().st_mode):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                probe.settimeout(_POLL_SECONDS)
                probe.connect(str(path))
        else:
            why = "what stands there is no socket"
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        path.unlink(missing_ok=True)
        return
    except OSError as error:
        why = str(error.strerror or error)
    raise TransportError(f"the controller cannot listen at unix://{path}: {why}; name another path")


class _Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """Sockets and threads."""

    allow_reuse_address = True
    request_queue_size = _MOST_CONNECTIONS

    def __init__(self, address: Address, manager: BlockManager, token: str | None) -> None:
        self.manager = manager
        self.token = token
        self.is_unix = address.path is not None
        self._connections: dict[Any, None] = {}  # the oldest first
        self._asked: set[Any] = set()  # of these, whose request has been read
        self._changing = threading.Lock()
        where: Any
        if self.is_unix:
            self.address_family, where = socket.AF_UNIX, str(address.path)
        else:
            self.address_family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
            where = (address.host, address.port)
        super().__init__(where, _Handler)

    def server_bind(self) -> None:
        super().server_bind()
        if self.is_unix:
            os.chmod(self.server_address, 0o600)  # type: ignore[arg-type] # before anybody can connect

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Makes room: of too many connections, the oldest that has not asked yet ends."""
        with self._changing:
            if len(self._connections) < _MOST_CONNECTIONS:
                return True
            for connection in self._connections:
                if connection not in self._asked:
                    del self._connections[connection]
                    _hang_up(connection, socket.SHUT_RDWR)
                    return True
        return False

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._changing:
            self._connections[request] = None
        super().process_request(request, client_address)

    def has_asked(self, request: Any) -> None:
        """Notes that a connection's request has been read: it is carried out, whoever else comes."""
        with self._changing:
            self._asked.add(request)

    def shutdown_request(self, request: Any) -> None:
        with self._changing:
            self._connections.pop(request, None)
            self._asked.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        """Has connections end that have not asked yet."""
        with self._changing:
            for connection in self._connections:
                _hang_up(connection, socket.SHUT_RD)

    def handle_error(self, request: Any, client_address: Any) -> None:
        _LOG.exception("a connection to the controller failed")


def _hang_up(connection: Any, how: int) -> None:
    with contextlib.suppress(OSError):  # the peer has gone
        connection.shutdown(how)


class _Refusal(Exception):  # noqa: N818 (an answer, told to the caller as such)
    """An answer other than a success, that no command gave."""

    def __init__(self, status: HTTPStatus, message: str, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class _Handler(BaseHTTPRequestHandler):
    """Reads one request, has it carried out, answers."""

    server: _Server
    timeout = 10  # seconds for each read and write
    server_version = "kvbm_jax"
    sys_version = ""
    _STATUS: ClassVar[dict[type[KvbmError], HTTPStatus]] = {
        ConfigError: HTTPStatus.BAD_REQUEST,
        BlockStateError: HTTPStatus.CONFLICT,
        BusyError: HTTPStatus.SERVICE_UNAVAILABLE,
    }

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        answer: Answer
        try:
            status, answer = HTTPStatus.OK, self._carry_out()
        except _Refusal as error:
            self._send(error.status, _told("TransportError", error), error.headers)
            self._drain()
            return
        except KvbmError as error:
            status = self._STATUS.get(type(error), HTTPStatus.INTERNAL_SERVER_ERROR)
            answer = _told(type(error).__name__, error)
        except Exception as error:  # noqa: BLE001 (a store or a sink may raise anything: the operator is told)
            _LOG.exception("a command failed: %r", self.path)
            status, answer = HTTPStatus.INTERNAL_SERVER_ERROR, _told("KvbmError", f"{type(error).__name__}: {error}")
        self._send(status, answer, {})

    def _carry_out(self) -> Answer:
        self._check_caller()
        name = self.path.removeprefix(_PREFIX)
        if name not in COMMANDS or not self.path.startswith(_PREFIX):
            raise _Refusal(HTTPStatus.NOT_FOUND, f"{self.path}: there are {', '.join(_PREFIX + n for n in COMMANDS)}")
        if self.command == "GET" and not COMMANDS[name].is_safe:
            raise _Refusal(HTTPStatus.METHOD_NOT_ALLOWED, f"{self.path} is asked by POST", Allow="POST")
        body = self._read() if self.command == "POST" else b""
        self.server.has_asked(self.connection)
        return carry_out(name, self.server.manager, body)

    def _check_caller(self) -> None:
        token = self.server.token
        if token is not None:
            shown = self.headers.get("Authorization", "").encode()
            if not hmac.compare_digest(shown, f"Bearer {token}".encode()):
                raise _Refusal(
                    HTTPStatus.UNAUTHORIZED,
                    "the controller's bearer token is missing or wrong",
                    WWW_Authenticate="Bearer",
                )
        elif not self.server.is_unix:
            host = self.headers.get("Host", "")
            try:
                here = parse_address(
                    f"http://{host}" if ":" in host.rpartition("]")[2] else f"http://{host}:80"
                ).is_local
            except ConfigError:
                here = False
            if not here:  # a page of another site, by a name of its own for this machine
                raise _Refusal(HTTPStatus.FORBIDDEN, f"Host {host!r} is not this machine; give the controller a token")

    def _read(self) -> bytes:
        kind = self.headers.get_content_type()
        if kind != "application/json" or "Content-Type" not in self.headers:  # browsers ask before they send such
            raise _Refusal(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "send Content-Type: application/json")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            raise _Refusal(HTTPStatus.LENGTH_REQUIRED, "send a Content-Length")
        digits = length.lstrip("0") or "0"
        if len(digits) > _MOST_DIGITS or (size := int(digits)) > _LONGEST_BODY:
            raise _Refusal(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"{digits:.20} bytes; at most {_LONGEST_BODY:,} are read"
            )
        try:
            body = self.rfile.read(size)
        except OSError as error:
            raise _Refusal(HTTPStatus.REQUEST_TIMEOUT, f"the rest of {size} bytes did not come: {error}") from error
        if len(body) < size:
            raise _Refusal(HTTPStatus.BAD_REQUEST, f"{len(body)} bytes of {size} came")
        return body

    def _drain(self) -> None:
        """Passes over what has not been read: a connection that is closed before would lose the answer."""
        left = _LONGEST_DRAIN
        with contextlib.suppress(OSError):  # who asks is slow, or gone
            self.connection.shutdown(socket.SHUT_WR)
            while left > 0 and (passed := len(self.connection.recv(1 << 16))):
                left -= passed

    def _send(self, status: HTTPStatus, answer: Answer, headers: dict[str, str]) -> None:
        pieces = answer.pieces() if isinstance(answer, Listing) else [json.dumps(answer)]
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            if isinstance(pieces, list):  # else the end of the connection is the end of the answer
                self.send_header("Content-Length", str(len(pieces[0])))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            for piece in pieces:
                self.wfile.write(piece.encode())
        except OSError as error:
            _LOG.info("who asked %r is gone: %s", self.path, error)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers what is no HTTP that is spoken here, as all else is answered."""
        status = HTTPStatus(code)
        self._send(status, _told("TransportError", message or status.phrase), {})

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (http.server's name)
        _LOG.debug("controller: %r", format % args)


def _told(kind: str, what: object) -> dict[str, Any]:
    return {"error": {"type": kind, "message": str(what)}}
