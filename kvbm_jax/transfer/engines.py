"""Engines by name."""

import logging
import time
import urllib.parse
from collections.abc import Mapping

from kvbm_jax.errors import ConfigError, MissingDependencyError
from kvbm_jax.protocols import Clock, MetricsSink, TransferEngine
from kvbm_jax.transfer.access import SocketConfig

__all__ = ["backends_from", "open_engine"]

_LOG = logging.getLogger(__name__)


def backends_from(text: str) -> dict[str, dict[str, str]]:
    """Reads names of NIXL's back ends and their parameters: `UCX?num_workers=2&engine_config=..., GDS_MT`.

    Raises:
      ConfigError: It names none, one twice, or a parameter has no value.
    """
    found: dict[str, dict[str, str]] = {}
    for part in text.split(","):
        name, _, query = part.strip().partition("?")
        try:
            pairs = urllib.parse.parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        except ValueError as error:
            raise ConfigError(f"{part.strip()!r}: parameters of a back end are name=value, with & between") from error
        if not name or name in found:
            raise ConfigError(f"{text!r} are no back ends, each named once, such as UCX?num_workers=2, GDS_MT")
        found[name] = dict(pairs)
    return found


def open_engine(
    kind: str = "auto",
    name: str = "kvbm",
    *,
    config: SocketConfig | None = None,
    backends: Mapping[str, Mapping[str, str]] | None = None,
    metrics: MetricsSink | None = None,
    clock: Clock = time,
) -> TransferEngine:
    """Starts an engine.

    Args:
      kind: `nixl`, `tcp`, or `auto` for NIXL where it is installed and TCP, with a line in the log, where it is not.
      name: of this process among its peers; it is made unique.
      config: of sockets, for TCP.
      backends: of NIXL, and the parameters of each; None for UCX, and for TCP.
      metrics: takes measurements.
      clock: for durations.

    Raises:
      ConfigError: There is no such kind, or it has no back ends.
      MissingDependencyError: NIXL is asked for and not installed.
      TransferError: It does not start.
    """
    if kind not in {"auto", "nixl", "tcp"}:
        raise ConfigError(f"transfer engine {kind!r}: allowed are auto, nixl and tcp")
    if kind == "tcp" and backends:
        raise ConfigError(f"back ends {', '.join(backends)}: TCP has none; they are NIXL's")
    if kind != "tcp":
        try:
            from kvbm_jax.transfer.nixl import UCX, NixlEngine  # noqa: PLC0415 (an extra)
        except MissingDependencyError as error:
            if kind == "nixl":
                raise
            _LOG.warning("blocks go over TCP: %s", error)
        else:
            return NixlEngine(name, backends=backends or UCX, metrics=metrics, clock=clock)
    from kvbm_jax.transfer.tcp import TcpEngine  # noqa: PLC0415 (only where it is used)

    return TcpEngine(name, config=config, metrics=metrics, clock=clock)
