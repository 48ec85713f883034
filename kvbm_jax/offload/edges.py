"""Counts what crosses the edges between tiers, and what fails to."""

from kvbm_jax.protocols import Clock, MetricsSink, Tier

__all__ = ["EdgeMetrics"]


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
        edge = {"source": source.label, "target": target.label}
        self._sink.count("kvbm_transfer_blocks_total", blocks, **edge)
        self._sink.count("kvbm_transfer_bytes_total", blocks * self._block_bytes, **edge)
        self._sink.observe("kvbm_transfer_seconds", (self._clock.monotonic_ns() - begun) / 1e9, **edge)

    def failed(self, source: Tier, target: Tier, reason: str) -> None:
        """Counts a block that did not arrive."""
        self._sink.count("kvbm_transfer_failures_total", source=source.label, target=target.label, reason=reason)
