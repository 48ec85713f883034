"""Discovery through a JetStream key-value bucket: a key for each worker, renewed while it lives.

    bucket KVBM_WORKERS    key WORKER, the id with everything but letters and digits as =XX; value a record, as JSON

The bucket forgets a key that is not renewed, and tells nobody; so readers, who follow it from its beginning, forget in
the same time by their own clock. Without a connection nothing is renewed and nothing heard: the workers known are gone
after their time, and are there again soon after the connection is.
"""

import asyncio
import contextlib
import logging
import time
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field

from kvbm_jax.closing import Closing
from kvbm_jax.errors import BlockStateError, FrameError, TransportError
from kvbm_jax.extras import needs
from kvbm_jax.protocols import Clock, WorkerRecord
from kvbm_jax.transfer.heard import Heard, check_times, record_from, record_to
from kvbm_jax.transports.nats_connection import NatsConnection, NatsThread

with needs("nats", "discovery over NATS"):
    import nats.errors
    import nats.js.errors
    from nats.aio.client import Client
    from nats.js.api import KeyValueConfig, StorageType
    from nats.js.kv import KeyValue

__all__ = ["NatsDiscovery", "NatsDiscoveryConfig"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class NatsDiscoveryConfig:
    """Where workers announce themselves, and for how long that counts.

    Raises:
      ConfigError: The times do not fit.
    """

    connection: NatsConnection = field(default_factory=NatsConnection)
    bucket: str = "KVBM_WORKERS"  # whoever comes first makes it, with its own time to live
    ttl: float = 9.0  # seconds after its last renewal that a worker counts as gone
    heartbeat: float | None = None  # seconds between two renewals; None for a third of `ttl`

    def __post_init__(self) -> None:
        check_times(self.ttl, self.heartbeat)


class NatsDiscovery(Closing):
    """Workers that share a bucket.

    Args:
      config: where, and for how long.
      resolve: says where the server is, before each attempt to connect; None for the configuration's.
      clock: for the time that workers count as there.

    Raises:
      TransportError: Nobody is there, the credentials are refused, or there is no JetStream.
    """

    def __init__(
        self,
        config: NatsDiscoveryConfig | None = None,
        *,
        resolve: Callable[[], NatsConnection] | None = None,
        clock: Clock = time,
    ) -> None:
        self._config = config = config or NatsDiscoveryConfig()
        self._heartbeat = check_times(config.ttl, config.heartbeat)
        self._heard = Heard(config.ttl, clock)
        self._closed = False
        # What follows belongs to the thread's loop.
        self._record: WorkerRecord | None = None
        self._leaving: list[str] = []  # keys to be deleted
        self._beat = 0
        self._wake = asyncio.Event()
        self._thread = NatsThread(
            "kvbm-nats-discovery",
            resolve or (lambda: config.connection),
            self._session,
            wake=self._wake.set,
            unfinished=lambda: False,
        )
        self._thread.start()

    def announce(self, record: WorkerRecord) -> None:
        """Puts the worker's key, and keeps renewing it.

        Raises:
          BlockStateError: It is closed.
        """
        if self._closed:
            raise BlockStateError("discovery is closed")
        self._thread.call(lambda: self._change(record))

    def withdraw(self) -> None:
        """Deletes the worker's key."""
        self._thread.call(lambda: self._change(None))

    def workers(self) -> dict[str, WorkerRecord]:
        """Returns who has been heard of."""
        return self._heard.workers()

    def close(self) -> None:
        """Withdraws, and ends the connection."""
        if not self._closed:
            self._closed = True
            self.withdraw()
            self._thread.stop()

    # What follows runs on the loop.

    def _change(self, record: WorkerRecord | None) -> None:
        before, self._record = self._record, record
        if before is not None and (record is None or record.worker_id != before.worker_id):
            self._leaving.append(before.worker_id)
            self._heard.forget(before.worker_id)
        self._wake.set()

    async def _session(self, client: Client) -> None:
        bucket = await self._open(client)
        watcher = await bucket.watchall()
        following = asyncio.create_task(self._follow(watcher))
        try:
            self._thread.ready()
            while not client.is_closed:
                self._wake.clear()
                await self._write(bucket)
                if self._thread.stopping.is_set():
                    return
                with contextlib.suppress(TimeoutError):  # it is time to renew
                    await asyncio.wait_for(self._wake.wait(), self._heartbeat)
                if following.done():
                    following.result()
            raise nats.errors.ConnectionClosedError
        finally:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError, nats.errors.Error):  # told by the session, if by anybody
                await following

    async def _open(self, client: Client) -> KeyValue:
        js, config = client.jetstream(), self._config
        try:
            try:
                return await js.key_value(config.bucket)
            except nats.js.errors.NotFoundError:
                made = KeyValueConfig(bucket=config.bucket, ttl=config.ttl, history=1, storage=StorageType.MEMORY)
                return await js.create_key_value(config=made)
        except (nats.js.errors.ServiceUnavailableError, nats.errors.NoRespondersError) as error:
            raise TransportError("the NATS server has no JetStream; start it with -js") from error
        except nats.js.errors.APIError as error:
            raise TransportError(f"the bucket {config.bucket} cannot be had: {error.description}") from error

    async def _write(self, bucket: KeyValue) -> None:
        while self._leaving:
            await bucket.delete(_key(self._leaving[0]))
            self._leaving.pop(0)
        if self._record is not None:
            self._beat += 1
            await bucket.put(_key(self._record.worker_id), record_to(self._record, self._beat))

    async def _follow(self, watcher: KeyValue.KeyWatcher) -> None:
        async for entry in watcher:
            if entry is None:  # what was there at the beginning has been told
                continue
            if entry.operation is not None and entry.operation != "PUT":
                self._heard.forget(_worker_id(entry.key))
                continue
            try:
                self._heard.note(*record_from(entry.value or b""))
            except FrameError as error:
                _LOG.warning("key %s of the bucket %s: %s", entry.key, self._config.bucket, error)


def _key(worker_id: str) -> str:
    quoted = urllib.parse.quote(worker_id, safe="")
    for sign in "._-~":
        quoted = quoted.replace(sign, f"%{ord(sign):02X}")
    return quoted.replace("%", "=")


def _worker_id(key: str) -> str:
    return urllib.parse.unquote(key.replace("=", "%"))
