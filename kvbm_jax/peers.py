"""Blocks of other workers as a tier of this one: what peers hold in host memory is found, pulled, and served to them.

    events of the others ──> PrefixIndex ─┐
                          Discovery ──────┴> PeerDirectory ──> Puller ──> rows for the device
    host store of this worker <── PeerServer <── pulls of the others

Which peer has what is told by their events, so a lookup asks nobody. What was promised and does not come is a miss: the
rest of the prompt is computed. Pulling is weighed against computing: by what earlier pulls have taken.

Axes: n blocks of a call, P bytes of a block.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvbm_jax import extensions
from kvbm_jax.closing import Closing
from kvbm_jax.config import KvBlockManagerConfig
from kvbm_jax.errors import ConfigError, IdentityMismatchError, LayoutError, TransferError
from kvbm_jax.events import PrefixIndex, Subscription
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.protocols import BlockKey, Clock, Discovery, MetricsSink, Outcome, WorkerRecord
from kvbm_jax.transfer import PeerServer, Puller, SocketConfig, open_engine
from kvbm_jax.transfer.directory import Offer, PeerDirectory
from kvbm_jax.transfer.engines import backends_from
from kvbm_jax.transfer.handover import Arrivals, HandOver, Migrate, Presented, SequenceState

__all__ = ["PeerNetwork", "Peers", "PullCost", "open_network"]

_LOG = logging.getLogger(__name__)
_WEIGHT = 0.3  # of the latest pull in the running mean of its kind
_FADING = 0.98
_LANDING_BLOCKS = 64


@dataclass(frozen=True, kw_only=True)
class PeerNetwork:
    """How a worker takes part; discovery and events are closed with the manager that it is given to."""

    discovery: Discovery  # who is there
    events: Sequence[Subscription] = ()  # what the others tell
    engine: str = "auto"  # what moves bytes: nixl, tcp, or the better one that is there
    backends: Mapping[str, Mapping[str, str]] | None = None  # of NIXL, and their parameters; None for UCX
    sockets: SocketConfig = field(default_factory=SocketConfig)
    timeout: float = 10.0  # seconds that a request may wait for peers
    tokens_per_second: float | None = None  # what this worker computes of a prompt; None: pulling is always worth it


def open_network(config: KvBlockManagerConfig) -> PeerNetwork | None:
    """Returns the network that a configuration asks for; None for none.

    Raises:
      ConfigError: there is no such network, or an address is none.
      KvbmError: what the network says against it: its package is missing, nobody is there, ...
    """
    if config.peers == "none":
        return None
    sockets = SocketConfig() if config.peer_address is None else SocketConfig.from_url(config.peer_address)

    def use(offered: Callable[[str, str | None], object]) -> object:
        return offered(config.worker_id, config.events_url)

    network = extensions.load(extensions.PEER_NETWORKS, config.peers, use)
    if not isinstance(network, PeerNetwork):
        raise ConfigError(f"peers = {config.peers}: the package made a {type(network).__name__}, not a PeerNetwork")
    return replace(
        network,
        engine=config.transfer_engine,
        backends=None if config.transfer_backends is None else backends_from(config.transfer_backends),
        sockets=sockets,
        tokens_per_second=config.prefill_tokens_per_second,
    )


class _Came(NamedTuple):
    """What a pull has brought of a prefix."""

    blocks: int
    more: bool  # whether the peer may be asked for what comes after them


class PullCost:
    """How long a block takes to pull, learnt from the pulls that were made, against how long it takes to compute.

    Args:
      block_size: tokens of a block.
      tokens_per_second: what is computed in the meantime; None for nothing.
    """

    def __init__(self, block_size: int, tokens_per_second: float | None) -> None:
        self._seconds_to_compute = 0.0 if tokens_per_second is None else block_size / tokens_per_second
        self._always = tokens_per_second is None
        self._seconds_a_block: float | None = None

    def worth(self, blocks: int) -> bool:
        """Tells whether pulling so many blocks is faster than computing them.

        The first pull is always tried. With each that is not made what is known of earlier ones fades, so that a
        network which has become faster is found out.
        """
        if not blocks or self._always or self._seconds_a_block is None:
            return blocks > 0
        if self._seconds_a_block < self._seconds_to_compute:
            return True
        self._seconds_a_block *= _FADING
        return False

    def learn(self, blocks: int, seconds: float) -> None:
        """Takes the time of a pull that brought so many blocks."""
        if blocks:
            each = seconds / blocks
            before = each if self._seconds_a_block is None else self._seconds_a_block
            self._seconds_a_block = before + _WEIGHT * (each - before)


class Peers(Closing):
    """One worker's peers.

    Args:
      network: how it takes part.
      worker_id: what it is called.
      store: its host memory, which peers read; it can pin slots.
      block_size: tokens of a block.
      metrics: takes measurements.
      clock: for durations.

    Raises:
      ConfigError: the store can pin nothing, or the network is not configured as it must be.
      MissingDependencyError: the engine's package is not installed.
      TransferError: an engine does not start, or an address cannot be had.
    """

    def __init__(
        self,
        network: PeerNetwork,
        *,
        worker_id: str,
        store: HostBlockStore,
        block_size: int,
        metrics: MetricsSink,
        clock: Clock,
    ) -> None:
        self._clock = clock
        self._timeout = network.timeout
        self._cost = PullCost(block_size, network.tokens_per_second)
        self._worker_id = worker_id
        self._fingerprint = store.identity.fingerprint
        self._discovery = network.discovery
        self._sockets = network.sockets
        self._promised: tuple[str, frozenset[BlockKey]] | None = None
        self._arrivals = Arrivals(self._fingerprint)
        index = PrefixIndex()
        with contextlib.ExitStack() as opened:
            opened.callback(network.discovery.close)
            for stream in network.events:
                opened.callback(stream.close)
            engine = open_engine(
                network.engine,
                worker_id,
                config=network.sockets,
                backends=network.backends,
                metrics=metrics,
                clock=clock,
            )
            opened.callback(engine.close)
            server = opened.enter_context(
                PeerServer(
                    worker_id,
                    store,
                    engine,
                    config=network.sockets,
                    arrivals=self._arrivals,
                    metrics=metrics,
                    clock=clock,
                )
            )
            self._puller = opened.enter_context(
                Puller(
                    worker_id,
                    store.identity,
                    engine,
                    _LANDING_BLOCKS,
                    config=network.sockets,
                    timeout=network.timeout,
                    lost=lambda peer: self._directory.lost(peer),  # noqa: PLW0108 (there is none yet)
                    metrics=metrics,
                    clock=clock,
                )
            )
            self._directory = PeerDirectory(
                worker_id,
                store.identity.fingerprint,
                network.discovery,
                index,
                shut_out=self._puller.quarantine.holds,
            )
            for stream in network.events:
                opened.enter_context(_Listener(stream, index, worker_id))
            opened.callback(self._arrivals.close)
            network.discovery.announce(server.record)
            self._opened = opened.pop_all()

    def offered(self, keys: Sequence[BlockKey]) -> int:
        """Returns how many leading blocks of `keys` a peer holds and are worth pulling; asks nobody."""
        offers = self._offers(keys) if keys else []
        blocks = offers[0].blocks if offers else 0
        return blocks if self._cost.worth(blocks) else 0

    def read(self, keys: Sequence[BlockKey], out: NDArray[np.uint8]) -> int:
        """Pulls the longest prefix of n blocks that peers have into rows u8[n, P].

        Returns:
          How many came, verified, within the network's time-out, which is for all of them.
        """
        came, end = 0, self._clock.monotonic_ns() + round(self._timeout * 1e9)
        for offer in self._offers(keys):
            while came < offer.blocks:  # no more at a time than can land
                left = (end - self._clock.monotonic_ns()) / 1e9
                if left <= 0:
                    return came
                wanted = keys[came : min(offer.blocks, came + _LANDING_BLOCKS)]
                good = self._pull(offer.record, wanted, out[came:], left)
                came += good.blocks
                if not good.more:
                    break
        return came

    @contextlib.contextmanager
    def promised(self, worker_id: str, keys: Sequence[BlockKey]) -> Iterator[None]:
        """Within it a peer is known to hold blocks that its events may not have told of yet; for the reading thread."""
        self._promised = worker_id, frozenset(keys)
        try:
            yield
        finally:
            self._promised = None

    def hand_over(self, worker_id: str, state: SequenceState, seconds: float) -> HandOver:
        """Offers a sequence, whose blocks are in this worker's host memory, to a peer that has so long to take it.

        Raises:
          TransferError: nobody of that name is there, it is this worker, or it cannot be reached.
          IdentityMismatchError: its cache is of another model or layout.
        """
        workers = self._discovery.workers()
        record = workers.get(worker_id)
        if record is None or worker_id == self._worker_id:
            others = ", ".join(sorted(workers.keys() - {self._worker_id})) or "nobody"
            raise TransferError(f"{worker_id!r} is no peer of {self._worker_id!r}; there is {others}")
        if record.fingerprint != self._fingerprint:
            raise IdentityMismatchError(
                f"the cache of {worker_id!r} has the fingerprint {record.fingerprint.hex()}, this worker's "
                f"{self._fingerprint.hex()}"
            )
        request = Migrate(self._worker_id, self._fingerprint, state, seconds)
        return HandOver(record, request, self._sockets, self._worker_id)

    def arrival(self, seconds: float) -> Presented | None:
        """Waits for a sequence that a peer hands over; None if none comes."""
        return self._arrivals.take(seconds)

    def close(self) -> None:
        """Is found no more, serves and pulls no more. Idempotent."""
        self._opened.close()

    def _pull(self, record: WorkerRecord, keys: Sequence[BlockKey], out: NDArray[np.uint8], seconds: float) -> _Came:
        """Pulls the longest prefix of n blocks that a peer has and can lend now into the first rows of `out`."""
        begun = self._clock.monotonic_ns()
        try:
            pulled = self._puller.pull(record, keys, timeout=seconds)
        except (IdentityMismatchError, LayoutError) as error:
            _LOG.warning("blocks of %s are not used: %s", record.worker_id, error)
            self._directory.lost(record.worker_id)
            return _Came(0, more=False)
        with pulled:
            outcomes = [row.outcome for row in pulled.rows]
            good = next((i for i, outcome in enumerate(outcomes) if outcome is not Outcome.OK), len(keys))
            for place, block in pulled.blocks():
                if place < good:
                    out[place] = block
        self._cost.learn(good, (self._clock.monotonic_ns() - begun) / 1e9)
        missed = [key for key, outcome in zip(keys, outcomes, strict=True) if outcome is Outcome.MISS]
        self._directory.missed(record.worker_id, missed)
        return _Came(good, more=good > 0 and (good == len(keys) or outcomes[good] is Outcome.REFUSED))

    def _offers(self, keys: Sequence[BlockKey]) -> list[Offer]:
        """Who can serve how much of `keys`, the most first."""
        offers = self._directory.offers([key.sequence_hash for key in keys])
        if self._promised is None:
            return offers
        worker_id, promised = self._promised
        count = next((i for i, key in enumerate(keys) if key not in promised), len(keys))
        record = self._discovery.workers().get(worker_id)
        if record is None or not count or any(o.record == record and o.blocks >= count for o in offers):
            return offers
        others = [offer for offer in offers if offer.record != record]
        return sorted([Offer(record, count), *others], key=lambda offer: -offer.blocks)


class _Listener(Closing):
    """A thread that keeps the index up to date with a stream of events."""

    def __init__(self, stream: Subscription, index: PrefixIndex, worker_id: str) -> None:
        self._stream, self._index, self._worker_id = stream, index, worker_id
        self._thread = threading.Thread(target=self._follow, name="kvbm-peer-events", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Leaves the stream. Idempotent."""
        self._stream.close()
        self._thread.join()

    def _follow(self) -> None:
        for item in self._stream:
            self._index.apply(item)
