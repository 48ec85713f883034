"""How a NATS server is reached: address, credentials, TLS; and the thread that stays connected to it.

A connection that breaks is given up, with all that the client had not sent, and made anew: what has to be sent again is
then this library's to say, and its order.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import ssl
import threading
import urllib.parse
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from kvbm_jax.addresses import public
from kvbm_jax.errors import ConfigError, TransportError
from kvbm_jax.extras import needs

with needs("nats", "events over NATS"):
    import nats.errors
    from nats.aio.client import Client

__all__ = ["NatsConnection", "NatsThread"]

_LOG = logging.getLogger(__name__)
_FILES = ("nkey", "creds", "tls_ca", "tls_cert", "tls_key")
_PAUSE, _LONGEST_PAUSE = 0.05, 2.0
_LOST = (nats.errors.Error, OSError, TimeoutError)


@dataclass(frozen=True, kw_only=True)
class NatsConnection:
    """A server's address and what it asks of its clients.

    As one address (`from_url`): `nats://user:password@host:port`, `nats://token@host`, `tls://host?tls_ca=FILE`, and
    `nkey`, `creds`, `tls_ca`, `tls_cert`, `tls_key` in the query, each the path of a file.
    """

    url: str = "nats://127.0.0.1:4222"
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    token: str | None = field(default=None, repr=False)
    nkey: Path | None = None  # file of a seed
    creds: Path | None = None  # file of a JWT and its seed
    tls_ca: Path | None = None  # certificates that servers are checked by; None: the system's
    tls_cert: Path | None = None  # the client's own
    tls_key: Path | None = None
    timeout: float = 5.0  # seconds for connecting

    def __post_init__(self) -> None:
        for name in _FILES:
            path = getattr(self, name)
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"{name} = {str(path)!r}: there is no such file")
        if self.tls_key is not None and self.tls_cert is None:
            raise ConfigError("tls_key without tls_cert: a client's key needs its certificate")
        ways = [name for name in ("user", "token", "nkey", "creds") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ConfigError(f"{' and '.join(ways)} are given; a client has one way to say who it is")

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Reads an address.

        Raises:
          ConfigError: It is none, or names a file that is not there.
        """
        parts = urllib.parse.urlsplit(url)
        try:
            port = parts.port or 4222
        except ValueError as error:
            raise ConfigError(f"the port of {public(url)!r} is none: {error}") from error
        if parts.scheme not in {"nats", "tls"} or not parts.hostname:
            raise ConfigError(f"{public(url)!r} is no address of a NATS server, such as nats://host:4222")
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        if unknown := sorted(query.keys() - set(_FILES)):
            raise ConfigError(f"{public(url)!r} asks for {', '.join(unknown)}; known are {', '.join(_FILES)}")
        host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
        user, password = (urllib.parse.unquote(text) if text else None for text in (parts.username, parts.password))
        token = user if user and password is None else None
        return cls(
            url=f"{parts.scheme}://{host}:{port}",
            user=None if token else user,
            password=password,
            token=token,
            **{name: Path(value) for name, value in query.items()},  # type: ignore[arg-type]
        )

    async def connect(self, lost: Callable[[], object]) -> Client:
        """Connects; `lost` is called once the connection is no more.

        Raises:
          TransportError: Nobody is there, or the credentials are refused.
        """
        complaints: deque[Exception] = deque(maxlen=4)

        async def complain(error: Exception) -> None:
            complaints.append(error)
            if "ermissions" in str(error):  # it goes on, and what it may not do does not happen
                _LOG.warning("the NATS server at %s: %s", self.url, _one_line(error))

        async def closed() -> None:
            lost()

        options: dict[str, Any] = {
            "user": self.user,
            "password": self.password,
            "token": self.token,
            "nkeys_seed": None if self.nkey is None else str(self.nkey),
            "user_credentials": None if self.creds is None else str(self.creds),
        }
        if self.url.startswith("tls://") or self.tls_ca is not None or self.tls_cert is not None:
            options["tls"] = self._tls()
        client = Client()
        try:
            async with asyncio.timeout(self.timeout):
                await client.connect(
                    self.url,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    reconnect_time_wait=0,
                    error_cb=complain,
                    closed_cb=closed,
                    **{name: value for name, value in options.items() if value is not None},
                )
        except Exception as error:  # what is wrong with a file of keys comes as anything
            await _close(client)
            if not isinstance(error, _LOST) and (self.creds or self.nkey):
                raise TransportError(
                    f"{self.creds or self.nkey} holds no key of a NATS user: {_one_line(error)}"
                ) from error
            said = " ".join(str(reason) for reason in (error, *complaints))
            if "uthorization" in said or "uthentication" in said:
                raise TransportError(
                    f"the NATS server at {self.url} refuses the credentials ({self._way()}): {_one_line(error)}"
                ) from None
            raise TransportError(f"no NATS server answers at {self.url}: {_one_line(error)}") from error
        return client

    def _way(self) -> str:
        ways = {
            "user": f"user {self.user!r}",
            "token": "a token",
            "nkey": f"nkey {self.nkey}",
            "creds": f"{self.creds}",
        }
        return next((text for name, text in ways.items() if getattr(self, name) is not None), "none were given")

    def _tls(self) -> ssl.SSLContext:
        try:
            context = ssl.create_default_context(cafile=self.tls_ca)
            if self.tls_cert is not None:
                context.load_cert_chain(self.tls_cert, self.tls_key)
        except (OSError, ssl.SSLError) as error:
            raise TransportError(f"the TLS files for {self.url} cannot be used: {error}") from error
        return context


class NatsThread:
    """A thread with an event loop that keeps one session with a server going, over connections that come and go.

    Args:
      name: the thread's.
      resolve: says where the server is, before each attempt; may take its time.
      session: what is done with a connection, until it returns or the connection is lost; calls `ready`.
      wake: is called, on the loop, when a connection is lost or the session is asked to end.
      unfinished: says whether a session is wanted still after it was asked to end.
      ended: is called when all is over.
    """

    def __init__(
        self,
        name: str,
        resolve: Callable[[], NatsConnection],
        session: Callable[[Client], Awaitable[None]],
        *,
        wake: Callable[[], object] = lambda: None,
        unfinished: Callable[[], bool] = lambda: False,
        ended: Callable[[], object] = lambda: None,
    ) -> None:
        self._resolve = resolve
        self._session = session
        self._wake = wake
        self._unfinished = unfinished
        self._ended = ended
        self._task: asyncio.Task[None] | None = None
        self._pause, self._told = _PAUSE, False  # before the next attempt; whether this outage is in the log
        self._first: concurrent.futures.Future[None] = concurrent.futures.Future()
        self.loop = asyncio.new_event_loop()
        self.stopping = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts, and returns once the first session is ready.

        Raises:
          TransportError: There is none to be had.
        """
        self._thread.start()
        try:
            self._first.result()
        except BaseException:
            self.stop()
            raise

    def ready(self) -> None:
        """Says that the session has begun well."""
        self._pause, self._told = _PAUSE, False
        if not self._first.done():
            self._first.set_result(None)

    def call(self, function: Callable[[], object]) -> None:
        """Has a function called on the loop."""
        with contextlib.suppress(RuntimeError):  # the loop has been closed
            self.loop.call_soon_threadsafe(function)

    def stop(self, *, at_once: bool = False) -> None:
        """Asks the session to end, or has it cancelled, and waits for the thread. Idempotent."""

        def stop() -> None:
            self.stopping.set()
            self._wake()
            if at_once and self._task is not None:
                self._task.cancel()

        self.call(stop)
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        try:
            # Stopping cancels a session that is not wanted any more.
            with contextlib.suppress(asyncio.CancelledError), asyncio.Runner(loop_factory=lambda: self.loop) as runner:
                runner.run(self._stay())
        except Exception as error:  # noqa: BLE001 (whoever waits for the first session must hear of it)
            if self._first.done():
                _LOG.exception("the NATS thread has ended")
            else:
                self._first.set_exception(error)
        finally:
            self._ended()

    async def _stay(self) -> None:
        self._task = asyncio.current_task()
        while not self.stopping.is_set() or self._unfinished():
            try:
                connection = await asyncio.to_thread(self._resolve)
                client = await connection.connect(self._wake)
                try:
                    await self._session(client)
                except asyncio.CancelledError:
                    if self._task is not None and self._task.cancelling():
                        raise
                    raise nats.errors.ConnectionClosedError from None  # how the client tells who waits for a message
                except Exception as error:
                    if client.is_connected:
                        raise
                    raise nats.errors.ConnectionClosedError from error  # the client says it in many ways
                finally:
                    await _close(client)
            except (TransportError, *_LOST) as error:
                if not self._first.done():
                    raise self._refusal(error) from error
                if not self._told:
                    self._told = True
                    _LOG.warning("the NATS connection was lost, and is tried again and again: %s", _one_line(error))
            await self._rest(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    @staticmethod
    def _refusal(error: Exception) -> TransportError:
        return error if isinstance(error, TransportError) else TransportError(f"NATS: {_one_line(error)}")

    async def _rest(self, seconds: float) -> None:
        if self.stopping.is_set():
            await asyncio.sleep(_PAUSE if self._unfinished() else 0)
            return
        with contextlib.suppress(TimeoutError):  # what is waited for may not come
            await asyncio.wait_for(self.stopping.wait(), seconds)


async def _close(client: Client) -> None:
    """Closes a client in whatever state: never begun, half way through TLS, cut off."""
    try:
        async with asyncio.timeout(1.0):
            await client.close()
    except Exception as error:  # noqa: BLE001 (in which it may raise anything; it is let go all the same)
        _LOG.info("a NATS client did not close in order: %s", _one_line(error))


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
