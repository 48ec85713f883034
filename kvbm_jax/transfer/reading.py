"""One pull under way: windows of blocks are read, and verified as they land.

All windows are handed to the engine at once; while one is read, the one before is verified. Slots that a transfer may
still write to go back to the landing when it has ended, not before.

Axes: n blocks of a pull.
"""

import collections
import functools
import threading
from typing import NamedTuple

import numpy as np
import xxhash

from kvbm_jax.errors import PeerLostError, TransferError
from kvbm_jax.protocols import Clock, Outcome, StoreFuture, StoreRow, TransferEngine
from kvbm_jax.transfer.landing import Landing
from kvbm_jax.transfer.remote import Lease, RemoteWorker

__all__ = ["Reading"]

_OK, _MISS = StoreRow(Outcome.OK), StoreRow(Outcome.MISS)
_CALLED_OFF = StoreRow(Outcome.FAILED, reason="the pull was called off")


class _Window(NamedTuple):
    """Blocks that are read with one transfer."""

    places: list[int]  # among those asked for
    slots: list[int]  # where they land
    future: StoreFuture[None]


class Reading:
    """Blocks of one lease on their way.

    Args:
      lease: on n blocks of a peer.
      landing: where they arrive.
      deadline: until when, in monotonic ns.
      lease_end: until when the lease holds at least, in monotonic ns.
      clock: for both.
      cancelled: once it is set, nothing more is read.

    Attributes:
      rows: What became of each block.
      landed: Where the verified ones lie: their slots, by place among those asked for.
      fault: What the peer did wrong, in words; empty if nothing.
      lost: What is known of the peer's end; None if it is there.
    """

    def __init__(
        self,
        lease: Lease,
        landing: Landing,
        *,
        deadline: int,
        lease_end: int,
        clock: Clock,
        cancelled: threading.Event,
    ) -> None:
        self._found = lease.found
        self._landing = landing
        self._deadline = deadline
        self._lease_end = lease_end
        self._clock = clock
        self._cancelled = cancelled
        self.rows = [_MISS] * len(lease.found.held)
        for place in lease.found.refused.tolist():
            self.rows[place] = StoreRow(Outcome.REFUSED, reason="the peer has leased all it may")
        self.landed: dict[int, int] = {}
        self.fault = ""
        self.lost: PeerLostError | None = None

    def run(self, engine: TransferEngine, remote: RemoteWorker, window_bytes: int) -> None:
        """Reads what is held, window after window, until all is there or something is in the way."""
        places = np.flatnonzero(self._found.held).tolist()
        slots = self._landing.lend(len(places))
        places, homeless = places[: len(slots)], places[len(slots) :]
        for place in homeless:
            self.rows[place] = StoreRow(Outcome.REFUSED, reason=f"only {len(slots):,} blocks can land now")
        step = max(window_bytes // remote.slots.nbytes, 1)
        windows: collections.deque[_Window] = collections.deque()
        asked = 0
        try:
            while asked < len(slots):
                last = asked + step
                windows.append(self._ask(engine, remote, places[asked:last], slots[asked:last]))
                asked = last
            while windows and self._take(windows[0]):
                windows.popleft()
        finally:
            self._landing.give_back(slots[asked:])
            for window in windows:
                self._leave(window)

    def _ask(self, engine: TransferEngine, remote: RemoteWorker, places: list[int], slots: list[int]) -> _Window:
        source = self._found.block_ids[places]
        target = np.array(slots, np.int32)
        return _Window(
            places, slots, engine.read(remote.engine_name, remote.slots, source, self._landing.slots, target)
        )

    def _take(self, window: _Window) -> bool:
        """Waits for a window and verifies it; False if no other is to be taken, and this one is to be left."""
        if self._cancelled.is_set():
            return False
        left = (self._deadline - self._clock.monotonic_ns()) / 1e9
        try:
            window.future.result(max(left, 0.0))
        except PeerLostError as error:
            self.lost = error
            return False
        except TransferError as error:
            self.fault = str(error)
            return False
        except TimeoutError:
            self.fault = "time is over, and the bytes have not come"
            return False
        self._verify(window)
        return True

    def _verify(self, window: _Window) -> None:
        wrong = []
        digest, memory, checksums = xxhash.xxh3_64_intdigest, self._landing.bytes_of, self._found.checksums
        for place, slot in zip(window.places, window.slots, strict=True):
            if digest(memory(slot)) == checksums[place]:
                self.landed[place] = slot
                self.rows[place] = _OK
            else:
                wrong.append((place, slot))
        if not wrong:
            return
        self._landing.give_back([slot for _, slot in wrong])
        if self._clock.monotonic_ns() > self._lease_end:
            row = StoreRow(Outcome.FAILED, reason="the lease was over before the bytes had come")
        else:
            row = StoreRow(Outcome.CORRUPT, reason="the bytes do not have the checksum that the peer told")
            self.fault = row.reason
        for place, _ in wrong:
            self.rows[place] = row

    def _leave(self, window: _Window) -> None:
        """Has a window's slots given back once nothing can land there any more."""
        reason = str(self.lost or self.fault)
        row = StoreRow(Outcome.FAILED, reason=reason) if reason else _CALLED_OFF
        for place in window.places:
            self.rows[place] = row
        window.future.cancel()
        window.future.add_done_callback(functools.partial(_give_back, self._landing, window.slots))


def _give_back(landing: Landing, slots: list[int], _: object) -> None:
    landing.give_back(slots)
