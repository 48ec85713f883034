"""A codec as publishers use it: what it cannot say, or is too long to be sent, is left out, and told once."""

import logging

from kvbm_jax.errors import KvbmError, TransportError
from kvbm_jax.events import EventCodec, KvEventBatch

__all__ = ["Encoder"]

_LOG = logging.getLogger(__name__)


class Encoder:
    """Makes the payloads of one publisher; for any of its threads."""

    def __init__(self, codec: EventCodec) -> None:
        self._codec = codec
        self._complained = False

    def encode(self, batch: KvEventBatch, longest: int | None = None) -> bytes | None:
        """Returns the payload of a batch, of so many bytes at most; None if it cannot be sent, which leaves a gap."""
        try:
            payload = self._codec.encode(batch)
            if longest is not None and len(payload) > longest:
                raise TransportError(f"{len(payload):,} bytes; the server takes {longest:,}")
        except (KvbmError, UnicodeError, OverflowError) as error:
            if not self._complained:
                self._complained = True
                _LOG.warning("a batch of %d events is not sent (later ones are not told): %s", len(batch), error)
            return None
        return payload
