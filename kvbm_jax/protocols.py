"""The seams of the library: what a tier, an event consumer, a metrics back end and a clock must offer.

Everything that touches disks, networks or time is reached through one of these protocols and injected from
above, so that the same code runs against the real thing, an in-memory one, or a simulated one that fails on
purpose. Only shapes of calls stand here, and the small records that cross them: no I/O, no locks, no
defaults. Nothing has to inherit from a protocol; having the methods is enough.

Axis legend: `n` blocks of one call, `P` bytes of one block.
"""

import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "Tier",
    "BlockKey",
    "BlockRecord",
    "Outcome",
    "StoreRow",
    "StoreFuture",
    "StoreStats",
    "BlockStore",
    "OffloadPolicy",
    "Slots",
    "TransferEngine",
    "PeerBlocks",
    "WorkerRecord",
    "Discovery",
    "EventSink",
    "RequestObserver",
    "MetricsSink",
    "Clock",
]


class Tier(enum.IntEnum):
    """Where a block lies; 0 is kept free for "no tier" in arrays of codes."""

    G1 = 1  # device
    G2 = 2  # pinned host memory
    G3 = 3  # disk
    G4 = 4  # remote or object store

    @property
    def label(self) -> str:
        """The tier as metrics and command line write it: `g1` to `g4`."""
        return self.name.lower()


class BlockKey(NamedTuple):
    """Names a block's content in every tier.

    Equal keys hold equal bytes, so a stored block is never changed.
    """

    sequence_hash: bytes  # 16 bytes: the uint32[4] of `kvbm_jax.hashing`, little-endian
    group_idx: int = 0  # group of layers, 0 in a plain model


@dataclass(frozen=True, slots=True)
class BlockRecord:
    """What a store keeps beside a block's bytes, enough to announce the block again after a restart."""

    key: BlockKey
    parent_hash: bytes | None  # 16 bytes, or None for the first block of a sequence
    token_ids: tuple[int, ...]
    lora_name: str | None = None


class Outcome(enum.Enum):
    """What became of one block of a call."""

    OK = "ok"  # put: committed; get: the bytes are in `out`; delete: gone
    PRESENT = "present"  # put: held before, nothing was written
    MISS = "miss"  # get, delete: not held
    REFUSED = "refused"  # put: no room, or too much in flight; nothing was written
    CORRUPT = "corrupt"  # get: checksum or layout does not match; the store has dropped the block
    FAILED = "failed"  # the medium failed or took too long


class StoreRow(NamedTuple):
    """Result for one block of a call."""

    outcome: Outcome
    block_id: int | None = None  # number of the block within its tier, if the store holds it or held it until now
    record: BlockRecord | None = None  # get: what was stored beside the bytes
    reason: str = ""  # why, for a person; empty where the outcome says it all


class StoreFuture[T](Protocol):
    """The result of a call under way; `concurrent.futures.Future` is one."""

    def done(self) -> bool:
        """Returns whether the result is there, or the call cancelled."""
        ...

    def result(self, timeout: float | None = None) -> T:
        """Waits for the result, `timeout` seconds at most, then `TimeoutError`."""
        ...

    def cancel(self) -> bool:
        """Calls the operation off.

        Returns:
          True if it had not begun: nothing of it has happened or will, and its buffers are the caller's
            again.
          False if it is too late: the result comes as if nothing had been asked.
        """
        ...

    def cancelled(self) -> bool:
        """Returns whether `cancel` succeeded."""
        ...

    def add_done_callback(self, fn: Callable[[Any], object], /) -> None:
        """Calls `fn(future)` once it is done, at once if it is, on whatever thread finishes it."""
        ...


@dataclass(frozen=True, slots=True)
class StoreStats:
    """A store's size and its doings since it was opened."""

    blocks: int  # held now
    capacity: int | None  # blocks it can hold, None for no fixed bound
    pending: int  # calls not done yet
    puts: int = 0  # blocks written
    refused: int = 0
    hits: int = 0
    misses: int = 0
    corrupt: int = 0
    failed: int = 0
    deletes: int = 0  # blocks taken out
    foreign: int = 0  # files of another identity, found on opening and left alone
    unreadable: int = 0  # files that could not be read on opening


class BlockStore(Protocol):
    """One tier below the device: a map from `BlockKey` to the bytes of one block.

    A store is a shelf, not a policy: it never evicts of itself, and what does not fit is REFUSED. Whoever
    owns it chooses victims and deletes them. Blocks travel as rows of `uint8[n, P]` in the layout
    `fully_contiguous`.

    Every call handles a batch and returns at once with a future whose result has one `StoreRow` per key, in
    order; a key may occur twice. What goes wrong at run time is an `Outcome`, per block; only misuse raises,
    from the call itself: wrong shapes `LayoutError`, a closed store `BlockStateError`. Until a future is done
    the buffers passed belong to the store.

    Puts and deletes that name the same key take effect, and resolve, in the order of the calls. Calls may come
    from any thread. A put is atomic per block: its bytes can be read from the moment its future resolves OK or
    PRESENT, as long as nobody deletes it; before that a get may miss, and never sees a part. Persistent stores
    resolve a put when it would survive a power cut.
    """

    @property
    def tier(self) -> Tier:
        """Where this store stands."""
        ...

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, `P`."""
        ...

    def put(self, records: Sequence[BlockRecord], blocks: NDArray[np.uint8]) -> StoreFuture[tuple[StoreRow, ...]]:
        """Stores blocks. Outcomes: OK, PRESENT, REFUSED, FAILED.

        Args:
          records: The key of each block and what is kept beside it, `n` of them.
          blocks: The bytes, `uint8[n, P]`; read only, and only until the future is done.
        """
        ...

    def get(self, keys: Sequence[BlockKey], out: NDArray[np.uint8]) -> StoreFuture[tuple[StoreRow, ...]]:
        """Reads blocks into `out`. Outcomes: OK, MISS, CORRUPT, FAILED.

        Args:
          keys: The blocks asked for, `n` of them.
          out: Where row `i` gets the bytes of `keys[i]`, `uint8[n, P]`, writeable. Rows of other outcomes
            than OK hold anything afterwards.
        """
        ...

    def delete(self, keys: Sequence[BlockKey]) -> StoreFuture[tuple[StoreRow, ...]]:
        """Takes blocks out. Outcomes: OK, MISS, FAILED. Their bytes are not read by gets called later."""
        ...

    def contains(self, keys: Sequence[BlockKey]) -> tuple[bool, ...]:
        """Returns at once, from the store's own index, which blocks it holds. A get may still miss."""
        ...

    def records(self) -> Iterator[tuple[int, BlockRecord]]:
        """Yields (block_id, record) of every block held when called, in no promised order."""
        ...

    def stats(self) -> StoreStats:
        """Returns the store's size and counters."""
        ...

    def close(self) -> None:
        """Waits for what has begun, cancels what has not, and lets go of memory and files. Idempotent."""
        ...


class OffloadPolicy(Protocol):
    """Chooses which of the blocks that the device gives up go to the tiers below; the others are gone."""

    def select(self, records: Sequence[BlockRecord]) -> Sequence[bool]:
        """Tells for each block, in order of eviction, whether it is offered. The serving thread calls it."""
        ...


@dataclass(frozen=True, slots=True)
class Slots:
    """Equal pieces of registered memory, counted from 0: what both ends of a transfer speak of.

    Slot `i` begins `i * stride` bytes into the memory; what moves are `nbytes` bytes from `offset` within it.
    """

    region: int  # names the memory to the engine that registered it
    stride: int  # bytes from one slot to the next
    offset: int  # bytes into each slot
    nbytes: int  # bytes of a slot that move
    count: int  # slots

    def part(self, offset: int, nbytes: int) -> "Slots":
        """Returns the same slots, of each of which only `nbytes` bytes from `offset` on move."""
        return Slots(self.region, self.stride, self.offset + offset, nbytes, self.count)


class TransferEngine(Protocol):
    """Moves bytes between registered memory of this process and of others, without either's Python in between.

    Both ends register memory as slots; a description travels to the peer by whatever way has authenticated it,
    and after `connect` slots are read and written by number, many at once. Calls may come from any thread and
    return at once with a future. Until it is done the slots named belong to the transfer, *also after a
    time-out*: the bytes may still be on their way. It raises `PeerLostError` if the peer went away, and
    `TransferError` for all else; an engine that is closed raises `BlockStateError`.
    """

    @property
    def name(self) -> str:
        """What kind it is, `nixl` for example: both ends must be of one kind."""
        ...

    def register(self, slots: NDArray[np.uint8]) -> Slots:
        """Makes memory known; it stays where it is, and alive, until `close`.

        Args:
          slots: `uint8[N, P]`, rows contiguous and equally far apart.
        """
        ...

    def description(self) -> bytes:
        """Returns what a peer needs for `connect`, of all that is registered by now; opaque."""
        ...

    def connect(self, description: bytes) -> str:
        """Makes a peer known by its description, and returns what it is called from now on."""
        ...

    def forget(self, peer: str) -> None:
        """Lets go of a peer; transfers under way with it fail or finish. Not an error if it is unknown."""
        ...

    def read(
        self,
        peer: str,
        source: Slots,
        source_ids: NDArray[np.int32],
        target: Slots,
        target_ids: NDArray[np.int32],
        notice: bytes = b"",
    ) -> StoreFuture[None]:
        """Copies slots of a peer here, as one batch.

        Args:
          peer: As `connect` called it.
          source: The peer's slots.
          source_ids: Which of them, `int32[n]`.
          target: Slots of this process, of as many bytes.
          target_ids: Where each goes, `int32[n]`.
          notice: If not empty, the peer finds it in its `notices` once all has been read.
        """
        ...

    def write(
        self,
        peer: str,
        source: Slots,
        source_ids: NDArray[np.int32],
        target: Slots,
        target_ids: NDArray[np.int32],
        notice: bytes = b"",
    ) -> StoreFuture[None]:
        """Copies slots of this process into a peer's, as one batch; the peer has all of it when it has the notice."""
        ...

    def notices(self) -> list[tuple[str, bytes]]:
        """Returns what peers have said since the last call, each with the name of the peer's engine."""
        ...

    def close(self) -> None:
        """Waits for what is under way, for a while, and lets go of memory and peers. Idempotent."""
        ...


class PeerBlocks(Protocol):
    """Blocks that other workers hold, as a tier that is only read. One thread calls it."""

    def offered(self, keys: Sequence[BlockKey]) -> int:
        """Returns how many leading blocks of `keys` can be had and are worth it; at once, asking nobody."""
        ...

    def read(self, keys: Sequence[BlockKey], out: NDArray[np.uint8]) -> int:
        """Reads the longest prefix of `keys` that can be had into rows `uint8[n, P]`.

        Returns:
          How many came, verified; the rows after them hold anything.
        """
        ...

    def close(self) -> None:
        """Lets go of the others. Idempotent."""
        ...


@dataclass(frozen=True, slots=True)
class WorkerRecord:
    """How a worker is found: nothing in it is secret, and nothing in it is believed before it has been shown."""

    worker_id: str
    address: str  # where it serves its blocks, such as tcp://127.0.0.1:5000
    fingerprint: bytes  # of the identity of its cache, 16 bytes
    started_ns: int  # when it began, Unix ns: tells one life of a worker from the next


class Discovery(Protocol):
    """Who is there. What each holds is told by its events, not here."""

    def announce(self, record: WorkerRecord) -> None:
        """Makes a worker known, and keeps it so until `withdraw` or `close`; a process that dies is soon forgotten."""
        ...

    def withdraw(self) -> None:
        """Takes back what `announce` said. Not an error if nothing was announced."""
        ...

    def workers(self) -> dict[str, WorkerRecord]:
        """Returns who is there, by `worker_id`, itself included; at once, from this process's own memory."""
        ...

    def close(self) -> None:
        """Withdraws, and stops looking. Idempotent."""
        ...


class EventSink[BatchT](Protocol):
    """Takes batches of events: the in-process bus, a transport, a test's list."""

    def publish(self, batch: BatchT, /) -> None:
        """Takes a batch and returns at once: a sink that cannot keep up drops and counts, it never waits."""
        ...

    def close(self) -> None:
        """Ends the stream: what was published is delivered, then consumers see the end. Idempotent."""
        ...


class RequestObserver[SequenceT](Protocol):
    """Is told of requests, by the thread that calls the manager; cheap, and never waits."""

    def began(self, seq: SequenceT, /) -> None:
        """A sequence is to begin: nothing has been looked for yet."""
        ...

    def admitted(self, seq: SequenceT, /) -> None:
        """It has its blocks."""
        ...

    def ended(self, seq: SequenceT, error: BaseException | None, /) -> None:
        """It was released, or lost with the cache; or, with an error, it could not begin."""
        ...


class MetricsSink(Protocol):
    """Takes measurements under the names that `kvbm_jax.metrics` declares; cheap, and never waits."""

    def count(self, name: str, amount: float = 1, /, **labels: str) -> None:
        """Adds to a counter."""
        ...

    def gauge(self, name: str, value: float, /, **labels: str) -> None:
        """Sets a gauge."""
        ...

    def observe(self, name: str, value: float, /, **labels: str) -> None:
        """Adds one value to a histogram."""
        ...


class Clock(Protocol):
    """The time. The standard library's `time` module is one; simulations bring their own."""

    def time_ns(self) -> int:
        """Returns nanoseconds since the Unix epoch, for the timestamps of events."""
        ...

    def monotonic_ns(self) -> int:
        """Returns nanoseconds that never go back, for durations and deadlines."""
        ...
