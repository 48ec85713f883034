"""Calls of stores whose outcome is never an exception: what a store raises, or cancels, is a failure of its blocks."""

import logging
from collections.abc import Callable
from concurrent.futures import Future

from kvbm_jax.protocols import Outcome, StoreFuture, StoreRow

__all__ = ["Rows", "attempt", "rows_of"]

_LOG = logging.getLogger(__name__)

type Rows = tuple[StoreRow, ...]


def attempt(call: Callable[[], StoreFuture[Rows]]) -> StoreFuture[Rows]:
    """Makes a call and returns its future; one that raises becomes a future that does."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001 (a store may break in any way)
        broken: Future[Rows] = Future()
        broken.set_exception(error)
        return broken


def rows_of(future: StoreFuture[Rows], count: int) -> Rows:
    """Waits for a call over `count` blocks and returns a row for each."""
    try:
        rows = future.result()
    except Exception as error:  # noqa: BLE001 (a store may break in any way, and cancels on closing)
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        _LOG.warning("a store failed on %d blocks: %s", count, reason)
        return (StoreRow(Outcome.FAILED, reason=reason),) * count
    if len(rows) != count:
        _LOG.warning("a store returned %d rows for %d blocks", len(rows), count)
        return (StoreRow(Outcome.FAILED, reason=f"{len(rows)} rows for {count} blocks"),) * count
    return rows
