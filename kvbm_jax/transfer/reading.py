"""One pull under way: blocks are leased, read in windows, and verified as they land.

Long lists are leased in parts, and every window is handed to the engine as soon as its blocks are leased; while one is
read, the next part is leased or the window before is verified. Slots that a transfer may still write to go back to the
landing when it has ended, not before.

Axes: n blocks of a pull.
"""

import collections
import contextlib
import functools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import xxhash

from kvbm_jax.errors import PeerLostError, TransferError
from kvbm_jax.protocols import Clock, Outcome, StoreFuture, StoreRow, TransferEngine
from kvbm_jax.transfer.dialogue import Found
from kvbm_jax.transfer.landing import Landing
from kvbm_jax.transfer.remote import RemoteWorker

__all__ = ["Reading"]

_OK, _MISS = StoreRow(Outcome.OK), StoreRow(Outcome.MISS)
_LEASED_FIRST, _LEASED_AT_ONCE = 128, 1024  # blocks of the first lease, that reading begins soon, and of the largest
_CALLED_OFF = StoreRow(Outcome.FAILED, reason="the pull was called off")


class _Window(NamedTuple):
    """Blocks that are read with one transfer."""

    places: list[int]  # among those asked for
    slots: list[int]  # where they land
    future: StoreFuture[None]


class Reading:
    """Blocks of one peer on their way.

    Args:
      remote: the peer.
      keys: of the blocks, n of them.
      landing: where they arrive.
      seconds: how long leases are asked for.
      deadline: until when it may take, in monotonic ns.
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
        remote: RemoteWorker,
        keys: Sequence[tuple[bytes, int]],
        landing: Landing,
        *,
        seconds: float,
        deadline: int,
        clock: Clock,
        cancelled: threading.Event,
    ) -> None:
        self._remote = remote
        self._keys = keys
        self._landing = landing
        self._seconds = seconds
        self._lease_end = clock.monotonic_ns() + round(seconds * 1e9)
        self._deadline = deadline
        self._clock = clock
        self._cancelled = cancelled
        self._checksums: list[int] = []
        self._windows: collections.deque[_Window] = collections.deque()
        self.rows = [_MISS] * len(keys)
        self.landed: dict[int, int] = {}
        self.fault = ""
        self.lost: PeerLostError | None = None

    def run(self, engine: TransferEngine, window_bytes: int) -> None:
        """Leases, reads and verifies, until all is there or something is in the way.

        Raises:
          TransferError: The peer grants no lease, or is gone (`PeerLostError`); nothing has landed then.
        """
        leases = []
        try:
            first, part = 0, _LEASED_FIRST
            while first < len(self._keys):
                lease = self._remote.lease(self._keys[first : first + part], self._seconds, self._left())
                leases.append(lease.number)
                self._ask(engine, first, lease.found, window_bytes)
                first, part = first + part, min(2 * part, _LEASED_AT_ONCE)
            while self._windows and self._take(self._windows[0]):
                self._windows.popleft()
        except BaseException:
            self._landing.give_back(self.landed.values())
            raise
        finally:
            for window in self._windows:
                self._leave(window)
            with contextlib.suppress(PeerLostError):  # and its leases with it; who is gone is found at the next lease
                self._remote.release(leases)

    def _ask(self, engine: TransferEngine, first: int, found: Found, window_bytes: int) -> None:
        """Has the engine read what of a lease is held; `first` is the place of the lease's first block."""
        remote = self._remote
        self._checksums += found.checksums
        for place in found.refused.tolist():
            self.rows[first + place] = StoreRow(Outcome.REFUSED, reason="the peer has leased all it may")
        held = np.flatnonzero(found.held)
        slots = self._landing.lend(len(held))
        for place in held[len(slots) :].tolist():
            self.rows[first + place] = StoreRow(Outcome.REFUSED, reason="no more blocks can land now")
        step, asked = max(window_bytes // remote.slots.nbytes, 1), 0
        try:
            while asked < len(slots):
                places, targets = held[asked : asked + step][: len(slots) - asked], slots[asked : asked + step]
                source, target = found.block_ids[places], np.array(targets, np.int32)
                future = engine.read(remote.engine_name, remote.slots, source, self._landing.slots, target)
                self._windows.append(_Window((places + first).tolist(), targets, future))
                asked += step
        finally:
            self._landing.give_back(slots[asked:])

    def _take(self, window: _Window) -> bool:
        """Waits for a window and verifies it; False if no other is to be taken, and this one is to be left."""
        if self._cancelled.is_set():
            return False
        try:
            window.future.result(self._left())
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

    def _left(self) -> float:
        """Seconds until the deadline."""
        return max((self._deadline - self._clock.monotonic_ns()) / 1e9, 0.0)

    def _verify(self, window: _Window) -> None:
        wrong = []
        digest, memory, checksums = xxhash.xxh3_64_intdigest, self._landing.bytes_of, self._checksums
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
