"""Live sequences that go on in another worker, between two tokens.

    source        register and share what is whole; offer the rest as a message; give it all up once it is taken
    destination   begin the sequence: its blocks are pulled from the source's host memory, the tail is computed anew

What is between the last whole block and the last token is not moved: the destination computes it, as it does for any
prompt. So a migration can lose time, but no token, and no wrong keys and values can come of it. For who goes on when
something fails, see `kvbm_jax.transfer.handover`.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from kvbm_jax import logs
from kvbm_jax.errors import BlockStateError, ConfigError, InDoubtError, KvbmError, PeerLostError, TransferError
from kvbm_jax.handles import Hasher, Sequence
from kvbm_jax.hashing import block_keys
from kvbm_jax.protocols import Clock, MetricsSink, PeerBlocks

if TYPE_CHECKING:
    from kvbm_jax.peers import Peers
    from kvbm_jax.transfer.handover import HandOver, Presented, SequenceState

__all__ = ["Arrival", "Migration"]

_LOG = logging.getLogger(__name__)
_OUTCOMES = {
    InDoubtError: "in_doubt",
    PeerLostError: "lost",
    TransferError: "refused",
}  # the first that fits; others have failed


class Arrival(NamedTuple):
    """A sequence that has come from another worker, and runs here now."""

    seq: Sequence  # compute its tokens from `seq.num_cached` on
    payload: bytes  # what the source's application gave with it
    from_worker: str


class Acts(NamedTuple):
    """What a manager does for a migration, each in its turn."""

    start: Callable[..., Sequence]  # `BlockManager.start`
    share: Callable[[Sequence], None]  # registers what is whole, and has it copied to host memory
    settle: Callable[[], None]  # waits for that
    release: Callable[[Sequence], None]
    give_up: Callable[[Sequence, int, str], int]  # releases, and forgets what nobody else holds of its first tokens


class Migration:
    """Hands sequences over and takes them.

    Args:
      peers: the other workers; None for none.
      acts: what the manager does.
      hasher: names blocks.
      metrics: takes measurements.
      clock: for durations.
    """

    def __init__(
        self, peers: PeerBlocks | None, acts: Acts, hasher: Hasher, *, metrics: MetricsSink, clock: Clock
    ) -> None:
        self._peers = peers
        self._acts = acts
        self._hasher = hasher
        self._metrics = metrics
        self._clock = clock

    def send(self, seq: Sequence, to_worker: str, payload: bytes, timeout: float) -> int:
        """Hands a sequence over. See `BlockManager.migrate`."""
        peers = self._require_peers()
        if not seq.reuse:
            raise BlockStateError("a sequence that was started with reuse=False leaves no blocks to be pulled")
        with self._counted("out"):
            self._acts.share(seq)
            state, count = _state_of(seq, payload), len(seq.tokens)
            self._acts.settle()
            with peers.hand_over(to_worker, state, timeout) as offer:
                cached = offer.accepted()
                if seq.released or len(seq.tokens) != count:
                    raise BlockStateError("the sequence has gone on or ended while it was handed over; it stays here")
                self._commit(offer, seq, to_worker)
            blocks = self._acts.give_up(seq, cached, to_worker)
        _LOG.info(
            "a sequence went to another worker",
            extra=logs.fields(to_worker=to_worker, tokens=count, cached=cached, given_up=blocks),
        )
        return cached

    def receive(self, timeout: float) -> Arrival | None:
        """Takes a sequence over. See `BlockManager.accept`."""
        peers = self._require_peers()
        deadline = self._clock.monotonic_ns() + round(timeout * 1e9)
        while (left := (deadline - self._clock.monotonic_ns()) / 1e9) >= 0 or not timeout:
            presented = peers.arrival(max(left, 0))
            if presented is None:
                return None
            try:
                with self._counted("in"):
                    return self._begin(peers, presented)
            except KvbmError as error:
                _LOG.warning(
                    "a sequence was not taken over: %s",
                    error,
                    extra=logs.fields(from_worker=presented.request.worker_id),
                )
        return None

    def _commit(self, offer: "HandOver", seq: Sequence, to_worker: str) -> None:
        """Gives a sequence away. Whatever breaks in, it goes on here only if the other says that it will not."""
        try:
            refusal = offer.commit()
        except BaseException as error:
            if not seq.released:
                self._acts.release(seq)
            if not isinstance(error, TransferError):  # an interrupt, say
                raise
            raise InDoubtError(
                f"{to_worker} did not confirm: it may go on with the sequence, which is released here; `resume` it if "
                f"{to_worker} has ended ({error})"
            ) from error
        if refusal is not None:
            raise TransferError(f"{to_worker} has let go of the sequence: {refusal}")

    def _begin(self, peers: "Peers", presented: "Presented") -> Arrival:
        request = presented.request
        state = request.state
        try:
            tokens = state.tokens()
            hashes = self._hasher(tokens, state.salt, state.lora_name, state.multimodal)
            with peers.promised(request.worker_id, block_keys(hashes)):
                seq = self._acts.start(
                    tokens,
                    salt=state.salt,
                    tenant=state.tenant,
                    lora_name=state.lora_name,
                    multimodal=state.multimodal,
                    priority=state.priority,
                )
        except BaseException as error:
            presented.refuse(str(error))
            raise
        if not presented.accept(seq.num_cached):
            self._acts.release(seq)
            raise PeerLostError(f"{request.worker_id} has kept the sequence, or is gone")
        _LOG.info(
            "a sequence came from another worker",
            extra=logs.fields(from_worker=request.worker_id, tokens=len(seq.tokens), cached=seq.num_cached),
        )
        return Arrival(seq, state.payload, request.worker_id)

    def _require_peers(self) -> "Peers":
        from kvbm_jax.peers import Peers  # noqa: PLC0415 (as below)

        if not isinstance(self._peers, Peers):
            raise ConfigError("this worker has no peers; set `peers` of the configuration, or give a PeerNetwork")
        return self._peers

    @contextlib.contextmanager
    def _counted(self, direction: str) -> Iterator[None]:
        begun, outcome = self._clock.monotonic_ns(), "ok"
        try:
            yield
        except BaseException as error:
            outcome = next((name for kind, name in _OUTCOMES.items() if isinstance(error, kind)), "failed")
            raise
        finally:
            self._metrics.count("kvbm_migrations_total", direction=direction, outcome=outcome)
            self._metrics.observe(
                "kvbm_migration_seconds", (self._clock.monotonic_ns() - begun) / 1e9, direction=direction
            )


def _state_of(seq: Sequence, payload: bytes) -> "SequenceState":
    from kvbm_jax.transfer.handover import SequenceState  # noqa: PLC0415 (sockets, which a worker alone has no use for)

    return SequenceState(
        np.array(seq.tokens, "<u4").tobytes(),
        seq.salt,
        seq.tenant,
        seq.lora_name,
        tuple(seq.multimodal),
        seq.priority,
        bytes(payload),
    )
