"""The asking end."""

import contextlib
import http.client
import json
import socket
import urllib.parse
from pathlib import Path
from typing import Any

from kvbm_jax import errors
from kvbm_jax.controller.address import SUFFIX, Address, default_socket, parse_address
from kvbm_jax.errors import KvbmError, TransportError
from kvbm_jax.runtime_folder import runtime_folder

__all__ = ["ControlClient", "running_workers"]

_MARGIN_SECONDS = 10.0  # beside what a command may wait for


class ControlClient:
    """Commands the manager whose controller listens somewhere; safe for several threads.

    Args:
      url: where; None for the one worker of this user that runs, or the one that `worker_id` names.
      worker_id: which worker of this user, if `url` is None.
      token: what the controller wants to be shown.

    Raises:
      ConfigError: if the address is none.
      TransportError: if it is left open who is meant, and there is not just one.
    """

    def __init__(self, url: str | None = None, *, worker_id: str | None = None, token: str | None = None) -> None:
        self.address = parse_address(url) if url is not None else Address(_socket_of(worker_id))
        self._token = token

    def ask(self, command: str, **fields: Any) -> dict[str, Any]:
        """Has a command carried out; `kvbm_jax.controller` lists them and their fields.

        Raises:
          TransportError: if nobody answers, or not as a controller does.
          KvbmError: what the controller says, as the class that it names.
        """
        patience = float(fields.get("wait", 30)) + float(fields.get("seconds", 60)) + _MARGIN_SECONDS
        headers = {"Content-Type": "application/json"}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        with contextlib.closing(_connect(self.address, patience)) as connection:
            try:
                connection.request("POST", f"/v1/{command}", json.dumps(fields), headers)
                response = connection.getresponse()
                answer = json.loads(response.read())
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise TransportError(f"no controller answers at {self.address.url}: {error}") from error
        if response.status == http.HTTPStatus.OK and isinstance(answer, dict):
            return answer
        raise _error_of(answer)


def running_workers() -> list[str]:
    """Returns the workers of this user whose controllers listen in the runtime folder."""
    return [urllib.parse.unquote(path.stem) for path in sorted(runtime_folder().glob(f"*{SUFFIX}")) if _listens(path)]


def _socket_of(worker_id: str | None) -> Path:
    if worker_id is None:
        running = running_workers()
        if not running:
            raise TransportError(
                f"no manager with a controller runs: none listens in {runtime_folder()}; start one with controller = "
                "auto, or name its address (--url)"
            )
        if len(running) > 1:
            raise TransportError(f"{len(running)} workers run: {', '.join(running)}; name one (--worker)")
        worker_id = running[0]
    return default_socket(worker_id)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
    return True


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


def _connect(address: Address, timeout: float) -> http.client.HTTPConnection:
    if address.path is not None:
        return _UnixConnection(address.path, timeout)
    return http.client.HTTPConnection(address.host, address.port, timeout=timeout)


def _error_of(answer: object) -> KvbmError:
    try:
        told = answer["error"]  # type: ignore[index] # what is no such answer is caught
        kind, message = str(told["type"]), str(told["message"])
    except (TypeError, KeyError):
        return TransportError(f"not a controller's answer: {answer!r:.200}")
    found = getattr(errors, kind, None) if kind in errors.__all__ else None
    return found(message) if isinstance(found, type) and issubclass(found, KvbmError) else KvbmError(message)
