"""What runs in the other process of the tests of faults between managers: a worker that shares blocks of `tiered`.

It has no device: its host memory holds what the device would have brought there, and peers see no difference.
"""

import os
import threading

import numpy as np
from tiered import BLOCK_BYTES, LAYERS, SIZE, configuration, contents

from kvbm_jax.hashing import block_keys, hash_sequence
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.protocols import BlockRecord
from kvbm_jax.sizing import layout_of
from kvbm_jax.tiers import identity_of
from kvbm_jax.transfer import PeerServer, SocketConfig, open_engine
from kvbm_jax.transfer.folder_discovery import FolderDiscovery

__all__ = ["SharingPeer", "records_of"]

ROOM = 256


def records_of(tokens):
    """The records of a prompt's whole blocks."""
    keys = block_keys(hash_sequence(tokens, SIZE))
    parents = [None, *(key.sequence_hash for key in keys)]
    return [
        BlockRecord(key, parent, tuple(tokens[SIZE * i : SIZE * (i + 1)]))
        for i, (key, parent) in enumerate(zip(keys, parents, strict=False))
    ]


class SharingPeer:
    """A worker called `peer`.

    Args:
      kind: of engine.
      folder: of discovery.
      model_id: whose blocks it has.
      claimed: whose blocks it says it has.
      sockets: where it listens.
      namespace: a file descriptor's path of the network namespace that it lives in; None for this one.
    """

    def __init__(self, kind, folder, model_id="tiny", claimed=None, sockets=None, namespace=None):
        if namespace is not None:
            with open(namespace) as file:
                os.setns(file.fileno(), os.CLONE_NEWNET)
        sockets = sockets or SocketConfig()
        config = configuration(model_id=model_id)
        layout = layout_of(config)
        self.store = HostBlockStore(BLOCK_BYTES, ROOM, identity=identity_of(config, layout), pinned_blocks=64)
        self.engine = open_engine(kind, "peer", config=sockets)
        self.server = PeerServer("peer", self.store, self.engine, config=sockets)
        self.discovery = FolderDiscovery(folder, ttl=60.0, heartbeat=0.1)
        record = self.server.record
        if claimed is not None:
            theirs = identity_of(configuration(model_id=claimed), layout)
            record = type(record)(record.worker_id, record.address, theirs.fingerprint, record.started_ns)
        self.discovery.announce(record)

    def put(self, tokens):
        """Holds the whole blocks of a prompt, with the contents that `tiered` gives them."""
        records = records_of(tokens)
        data = contents(tokens)[: len(records) * SIZE].reshape(len(records), SIZE, LAYERS, 2, 2)
        blocks = np.ascontiguousarray(data.transpose(0, 2, 3, 1, 4))  # [n, L, C, T, D]: one head
        rows = blocks.view(np.uint8).reshape(len(records), BLOCK_BYTES)
        assert all(row.outcome.value == "ok" for row in self.store.put(records, rows).result(30))

    def spoil(self, tokens, place):
        """Writes other bytes where a block lies, as a fault would."""
        pins = self.store.pin([records_of(tokens)[place].key])
        self.store.slots[pins.block_ids, 7] ^= 1
        self.store.unpin(pins.block_ids)

    def delete(self, tokens):
        """Loses blocks without telling anybody."""
        self.store.delete([record.key for record in records_of(tokens)]).result(30)

    def threads(self):
        return threading.active_count()
