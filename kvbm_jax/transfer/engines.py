"""Engines by name."""

import logging
import time

from kvbm_jax.errors import ConfigError, MissingDependencyError
from kvbm_jax.protocols import Clock, MetricsSink, TransferEngine
from kvbm_jax.transfer.access import SocketConfig

__all__ = ["open_engine"]

_LOG = logging.getLogger(__name__)


def open_engine(
    kind: str = "auto",
    name: str = "kvbm",
    *,
    config: SocketConfig | None = None,
    metrics: MetricsSink | None = None,
    clock: Clock = time,
) -> TransferEngine:
    """Starts an engine.

    Args:
      kind: `nixl`, `tcp`, or `auto` for NIXL where it is installed and TCP, with a line in the log, where it is not.
      name: of this process among its peers; it is made unique.
      config: of sockets, for TCP.
      metrics: takes measurements.
      clock: for durations.

    Raises:
      ConfigError: There is no such kind.
      MissingDependencyError: NIXL is asked for and not installed.
      TransferError: It does not start.
    """
    if kind not in {"auto", "nixl", "tcp"}:
        raise ConfigError(f"transfer engine {kind!r}: allowed are auto, nixl and tcp")
    if kind != "tcp":
        try:
            from kvbm_jax.transfer.nixl import NixlEngine  # noqa: PLC0415 (an extra)
        except MissingDependencyError as error:
            if kind == "nixl":
                raise
            _LOG.warning("blocks go over TCP: %s", error)
        else:
            return NixlEngine(name, metrics=metrics, clock=clock)
    from kvbm_jax.transfer.tcp import TcpEngine  # noqa: PLC0415 (only where it is used)

    return TcpEngine(name, config=config, metrics=metrics, clock=clock)
