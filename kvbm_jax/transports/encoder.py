"""A codec as publishers use it: what it cannot say, or is too long to be sent, is left out, counted, and told once."""

import logging
from collections.abc import Iterable

from kvbm_jax.errors import KvbmError, TransportError
from kvbm_jax.events import EventCodec, KvEventBatch
from kvbm_jax.protocols import MetricsSink
from kvbm_jax.transports.first_time import FirstTime

__all__ = ["Encoder"]

_LOG = logging.getLogger(__name__)


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
        payload = self._encode(batch, longest)
        if payload is None:
            self.unsent += 1
            self._metrics.count("kvbm_events_dropped_total", len(batch))
        return payload

    def encode_all(self, batches: Iterable[KvEventBatch], longest: int | None = None) -> list[bytes]:
        """Returns the payloads of batches that mean something together, a snapshot's; none if one cannot be sent."""
        payloads = []
        for batch in batches:
            payload = self._encode(batch, longest)
            if payload is None:
                return []
            payloads.append(payload)
        return payloads

    def _encode(self, batch: KvEventBatch, longest: int | None) -> bytes | None:
        try:
            payload = self._codec.encode(batch)
            if longest is not None and len(payload) > longest:
                raise TransportError(f"{len(payload):,} bytes; the server takes {longest:,} (its max_payload)")
        except (KvbmError, UnicodeError, OverflowError) as error:
            self._complain(len(batch), error)
            return None
        return payload
