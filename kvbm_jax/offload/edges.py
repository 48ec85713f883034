"""Counts and logs what crosses the edges between tiers, and what fails to."""

import collections
import logging
from collections.abc import Sequence

from kvbm_jax import logs
from kvbm_jax.protocols import BlockKey, Clock, MetricsSink, Outcome, Tier

__all__ = ["EdgeMetrics"]

_LOG = logging.getLogger(__name__)
_EXPECTED = {Outcome.MISS.value, Outcome.REFUSED.value}  # gone meanwhile, or no room: no fault


class EdgeMetrics:
    """The metrics of transfers, by edge.

    Args:
      sink: takes the measurements.
      clock: for durations.
      block_bytes: of one block, P.
    """

    def __init__(self, sink: MetricsSink, clock: Clock, block_bytes: int) -> None:
        self._sink = sink
        self._clock = clock
        self._block_bytes = block_bytes

    def begin(self) -> int:
        """Returns the time, in nanoseconds, to be handed to `transferred`."""
        return self._clock.monotonic_ns()

    def transferred(self, source: Tier, target: Tier, blocks: int, begun: int) -> None:
        """Counts one batch of copies that has ended."""
        edge, seconds = {"source": source.label, "target": target.label}, (self._clock.monotonic_ns() - begun) / 1e9
        self._sink.count("kvbm_transfer_blocks_total", blocks, **edge)
        self._sink.count("kvbm_transfer_bytes_total", blocks * self._block_bytes, **edge)
        self._sink.observe("kvbm_transfer_seconds", seconds, **edge)
        if blocks and _LOG.isEnabledFor(logging.DEBUG):
            _LOG.debug("blocks moved", extra=logs.fields(**edge, blocks=blocks, seconds=seconds))

    def failed(self, source: Tier, target: Tier, failures: Sequence[tuple[BlockKey, str]]) -> None:
        """Counts blocks that did not arrive, each with its reason."""
        edge = {"source": source.label, "target": target.label}
        reasons = collections.Counter(reason for _, reason in failures)
        for reason, count in reasons.items():
            self._sink.count("kvbm_transfer_failures_total", count, **edge, reason=reason)
        level = logging.DEBUG if reasons.keys() <= _EXPECTED else logging.WARNING
        if failures and _LOG.isEnabledFor(level):
            hashes = logs.named([key for key, _ in failures])
            _LOG.log(level, "blocks did not arrive", extra=logs.fields(**edge, reasons=dict(reasons), hashes=hashes))
