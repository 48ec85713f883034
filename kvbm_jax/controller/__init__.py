"""A running manager's controls, for an operator in another process: HTTP with JSON over a socket of this machine.

    server      Controller(manager): listens, and carries commands out between the manager's calls
    commands    what can be asked, and what is answered
    client      ControlClient: asks; `kvbm-jax status`, `reset` and the like are made of it
    address     where a controller listens: unix:///path, or http://host:port

    GET  /v1/status     (or POST, with "wait")       sizes, blocks by state and tier, sequences
    POST /v1/reset      {"all": true} | {"tier": "g2"} | {"hashes": [...]}
    POST /v1/evict      {"blocks": 10} | {"hashes": [...]}
    POST /v1/pin        {"hashes": [...]}
    POST /v1/unpin      {"all": true} | {"hashes": [...]}
    POST /v1/flush      {"seconds": 60}
    POST /v1/snapshot   {"tier": "g1"}               the blocks of a tier, or of all
    POST /v1/log_level  {"level": "debug", "logger": "kvbm_jax"}

Commands wait `"wait"` seconds (30) for the manager's call under way. Hashes are 32 hexadecimal digits. What fails is
answered `{"error": {"type": "ConfigError", "message": "..."}}`; the type names a class of `kvbm_jax.errors`.

Who may ask: over a Unix socket, this user alone. Over HTTP, who has the bearer token; without one it must be loopback,
and what a browser sends across sites is refused. There is no TLS: put a proxy in front for that.
"""

from kvbm_jax.controller.address import read_token
from kvbm_jax.controller.client import ControlClient, running_workers
from kvbm_jax.controller.server import Controller

__all__ = ["Controller", "ControlClient", "read_token", "running_workers"]
