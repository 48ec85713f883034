"""What is told of a request's life, from its start to its release: counters, log lines, and an observer's calls."""

import contextlib
import logging
from collections.abc import Callable, Iterator

from kvbm_jax import logs
from kvbm_jax.handles import Sequence
from kvbm_jax.protocols import MetricsSink, RequestObserver

__all__ = ["RequestLog"]

_LOG = logging.getLogger(__name__)


class RequestLog:
    """Tells of the requests of one manager.

    Args:
      metrics: counts the tokens that were looked for and found.
      observer: is told of each request; None for nobody. What it raises is logged, and changes nothing.
    """

    def __init__(self, metrics: MetricsSink, observer: RequestObserver[Sequence] | None) -> None:
        self._metrics = metrics
        self._observer = observer
        self._running: set[Sequence] = set()

    @contextlib.contextmanager
    def admission(self, seq: Sequence) -> Iterator[None]:
        """Tells that a sequence is to begin, and then that it has, or why it has not."""
        observer = self._observer
        if observer is not None:
            _guarded(lambda: observer.began(seq))
        try:
            yield
        except BaseException as error:
            failure = error
            if observer is not None:
                _guarded(lambda: observer.ended(seq, failure))
            raise
        self._metrics.count("kvbm_prefix_query_tokens_total", len(seq.tokens))
        for tier, found in seq.hits.items():
            self._metrics.count("kvbm_prefix_hit_tokens_total", found, tier=tier.label)
        if _LOG.isEnabledFor(logging.DEBUG):
            hits = {tier.label: tokens for tier, tokens in seq.hits.items() if tokens}
            _LOG.debug("a sequence begins", extra=logs.fields(row=seq.row, tokens=len(seq.tokens), found=hits))
        self._admitted(seq)

    def forked(self, seq: Sequence) -> None:
        """Tells that a copy of a running sequence has begun."""
        observer = self._observer
        if observer is not None:
            _guarded(lambda: observer.began(seq))
            self._admitted(seq)

    def left(self, seq: Sequence) -> None:
        """Tells that a sequence has ended, if it had begun."""
        observer = self._observer
        if observer is not None and seq in self._running:
            self._running.discard(seq)
            _guarded(lambda: observer.ended(seq, None))

    def _admitted(self, seq: Sequence) -> None:
        observer = self._observer
        if observer is not None:
            self._running.add(seq)
            _guarded(lambda: observer.admitted(seq))


def _guarded(tell: Callable[[], object]) -> None:
    try:
        tell()
    except Exception:  # noqa: BLE001 (an observer may raise anything)
        _LOG.exception("an observer of requests failed")
