"""Blocks that go from worker to worker.

    worker that has blocks                            worker that wants some
    PeerServer: leases what is asked for    <──────   Puller: asks, verifies, shuts out who is wrong
    engine: its host arena                  ──────>   engine: a landing

`nixl` and `tcp` are the two engines (`kvbm_jax.protocols.TransferEngine`): they move bytes between memory that both
ends have registered, and know nothing of blocks; `engines` opens one by name. `serving` and `leases` are the side that
has blocks; `pull`, `reading`, `remote`, `landing` and `quarantine` the side that wants them; `dialogue` is what they
say to each other, and `placement` makes one's blocks the other's. `access`, `listener`, `streams` and `frames` are what
connections are made of: who may come, how they begin, bytes, messages.

`folder_discovery` finds workers through a shared folder (`kvbm_jax.transports.nats_discovery` through NATS), `heard`
remembers them, and `directory` says which of them has how much of a prompt.
"""

from kvbm_jax.transfer.access import SocketConfig
from kvbm_jax.transfer.directory import Offer, PeerDirectory
from kvbm_jax.transfer.engines import open_engine
from kvbm_jax.transfer.folder_discovery import FolderDiscovery
from kvbm_jax.transfer.placement import Placement
from kvbm_jax.transfer.pull import Pulled, Puller
from kvbm_jax.transfer.quarantine import Quarantine
from kvbm_jax.transfer.serving import PeerServer

__all__ = [
    "FolderDiscovery",
    "Offer",
    "PeerDirectory",
    "PeerServer",
    "Placement",
    "Pulled",
    "Puller",
    "Quarantine",
    "SocketConfig",
    "open_engine",
]
