"""The other process of `bench.transfer`: a worker that serves blocks, and the same memory over a plain socket.

    python -m kvbm_jax.bench.transfer_peer ENGINE BLOCK_BYTES COUNT

Prints one line of JSON, `Serving`, and serves until its standard input ends.
"""

import socket
import sys
import threading

import msgspec
import numpy as np

from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload.host import HostBlockStore
from kvbm_jax.protocols import BlockKey, BlockRecord, Slots, WorkerRecord
from kvbm_jax.transfer import PeerServer, open_engine

__all__ = ["Serving", "content", "identity_of", "key"]


class Serving(msgspec.Struct):
    """Where everything is."""

    record: WorkerRecord
    description: bytes  # of the engine
    slots: Slots
    port: int  # of the plain socket: for each byte that it gets, it sends the whole arena


def identity_of(block_bytes: int) -> CacheIdentity:
    """Returns an identity whose blocks have so many bytes."""
    return CacheIdentity.of(
        KVLayout(1, 1, 1, 1, block_bytes, "uint8", components=1), model_id="bench", hash_algorithm="blake3"
    )


def key(number: int) -> BlockKey:
    """Returns the key of a block."""
    return BlockKey(number.to_bytes(16, "little"))


def content(block_bytes: int, count: int) -> "np.ndarray[tuple[int, int], np.dtype[np.uint8]]":
    """Returns the bytes of all blocks, u8[count, block_bytes]."""
    words = np.random.default_rng(0).integers(0, 1 << 63, count * block_bytes // 8, np.uint64)
    return words.view(np.uint8).reshape(count, block_bytes)


def main(kind: str, block_bytes: int, count: int) -> None:
    """Serves until standard input ends."""
    store = HostBlockStore(block_bytes, count, identity=identity_of(block_bytes), pinned_blocks=count)
    store.put([BlockRecord(key(i), None, ()) for i in range(count)], content(block_bytes, count)).result()
    engine = open_engine(kind, "server")
    plain = socket.create_server(("127.0.0.1", 0))
    with PeerServer("server", store, engine) as server:
        threading.Thread(target=_send, args=(plain, store.slots), daemon=True).start()
        slots = engine.register(store.slots)
        port = plain.getsockname()[1]
        sys.stdout.buffer.write(msgspec.json.encode(Serving(server.record, engine.description(), slots, port)) + b"\n")
        sys.stdout.buffer.flush()
        sys.stdin.read()
    engine.close()
    store.close()


def _send(plain: socket.socket, arena: "np.ndarray[tuple[int, ...], np.dtype[np.uint8]]") -> None:
    """Sends the arena for each byte that comes; its slots have no padding between them."""
    connection, _ = plain.accept()
    memory = memoryview(arena[: len(arena) // 2].reshape(-1))
    while connection.recv(1):
        connection.sendall(memory)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
