"""A codec as publishers use it: what it cannot say, or is too long to be sent, is left out, counted, and told once."""

import logging
from collections.abc import Sequence

from kvbm_jax.errors import KvbmError, TransportError
from kvbm_jax.events import EventCodec, KvEventBatch
from kvbm_jax.protocols import MetricsSink
from kvbm_jax.transports.first_time import FirstTime

__all__ = ["Encoder"]

_LOG = logging.getLogger(__name__)
_UNSENT = (KvbmError, TypeError, ValueError, OverflowError)  # what a codec says of a batch that it has no words for


class Encoder:
    """Makes the payloads of one publisher; for any of its threads.

    Args:
      codec: says how.
      metrics: counts what is left out.

    Attributes:
      unsent: batches left out so far.
    """

    def __init__(self, codec: EventCodec, metrics: MetricsSink) -> None:
        self._codec = codec
        self._metrics = metrics
        self._complain = FirstTime(_LOG, "a batch of %d events is not sent: %s")
        self.unsent = 0

    def encode(self, batch: KvEventBatch, longest: int | None = None) -> bytes | None:
        """Returns the payload of a batch, of so many bytes at most; None if it cannot be sent, which leaves a gap."""
        try:
            return self._within(longest, self._codec.encode(batch))
        except _UNSENT as error:
            self._complain(len(batch), error)
            self.unsent += 1
            self._metrics.count("kvbm_events_dropped_total", len(batch))
            return None

    def encode_all(self, batches: Sequence[KvEventBatch], longest: int | None = None) -> list[bytes]:
        """Returns the payloads of batches that mean something together, a snapshot's; none if one cannot be sent."""
        try:
            return [self._within(longest, self._codec.encode(batch)) for batch in batches]
        except _UNSENT as error:
            self._complain(sum(map(len, batches)), error)
            return []

    @staticmethod
    def _within(longest: int | None, payload: bytes) -> bytes:
        if longest is not None and len(payload) > longest:
            raise TransportError(f"{len(payload):,} bytes; the server takes {longest:,} (its max_payload)")
        return payload
