"""Handing a sequence over to another worker, so that one of both goes on with it, and never two.

    source                                    destination
    Migrate: what the sequence is      ->     an application takes it, and pulls its blocks from the source
                                       <-     Accepted: how much of it is cached there; or Refused
    Commit                             ->     it goes on there
                                       <-     Done

Until `Commit` is sent, the sequence is the source's, whatever fails: the destination lets go of what it began. A
destination that has said `Accepted` and hears no `Commit` lets go, too. If the answer to `Commit` does not come, the
source cannot know whether it went on there, and must not go on by itself.

The conversation has a connection of its own, accepted by the worker's `PeerServer`.
"""

import queue
import threading
import time
from enum import Enum, auto

import msgspec
import numpy as np

from kvbm_jax.closing import Closing
from kvbm_jax.errors import FrameError, TransferError
from kvbm_jax.protocols import WorkerRecord
from kvbm_jax.transfer.access import SocketConfig
from kvbm_jax.transfer.frames import Done, Frames, Message, Refused
from kvbm_jax.transfer.listener import connect

__all__ = ["Arrivals", "HandOver", "Migrate", "Presented", "SequenceState"]

_LONGEST_WAIT = 600.0
_MOST_WAITING = 64
_GRACE = 10.0  # seconds within which answers come that nobody thinks about


class SequenceState(Message, tag="sequence", frozen=True):
    """All that makes a sequence but its blocks."""

    token_ids: bytes  # uint32[n], little-endian
    salt: str
    tenant: str
    lora_name: str | None
    multimodal: tuple[tuple[int, bytes], ...]  # position in the tokens, hash of the input there
    priority: int
    payload: bytes  # the application's own

    def tokens(self) -> list[int]:
        """Returns the tokens.

        Raises:
          FrameError: There are none, or bytes that are no tokens.
        """
        if not self.token_ids or len(self.token_ids) % 4:
            raise FrameError(f"{len(self.token_ids)} bytes of tokens; each has 4, and a sequence at least one")
        found: list[int] = np.frombuffer(self.token_ids, "<u4").tolist()
        return found


class Migrate(Message, tag="migrate", frozen=True):
    """Asks a worker to go on with a sequence."""

    worker_id: str  # of the source, where its blocks can be read until the end of this
    fingerprint: bytes  # of the identity of its cache
    state: SequenceState
    seconds: float  # how long the destination's application has


class Accepted(Message, tag="accepted", frozen=True):
    """The sequence has begun there."""

    num_cached: int  # of its tokens that need not be computed


class Commit(Message, tag="commit", frozen=True):
    """The sequence is the destination's."""


_ACCEPTED = msgspec.msgpack.Decoder(Accepted | Refused)
_COMMIT = msgspec.msgpack.Decoder(Commit)
_DONE = msgspec.msgpack.Decoder(Done | Refused)

type _Answer = Accepted | Refused


class HandOver(Closing):
    """The source's end of one conversation. Closing it before `commit` takes the sequence back.

    Args:
      record: the destination.
      request: what it is asked.
      config: what is shown and asked of it.
      name: what this worker is called there.

    Raises:
      PeerLostError: Nobody answers.
      TransferError: It refuses the connection.
    """

    def __init__(self, record: WorkerRecord, request: Migrate, config: SocketConfig, name: str) -> None:
        self._frames = connect(record.address, config, name)
        try:
            self._frames.stream.patience(request.seconds + _GRACE)
            self._frames.send(request)
        except BaseException:
            self._frames.stream.cut()
            raise

    def accepted(self) -> int:
        """Waits for the answer; returns how many tokens are cached there.

        Raises:
          PeerLostError: The destination is gone, or has not answered in time.
          TransferError: It refuses.
        """
        answer: _Answer = self._frames.receive(_ACCEPTED)
        if isinstance(answer, Refused):
            raise TransferError(f"the peer refuses: {answer.reason}")
        return answer.num_cached

    def commit(self) -> str | None:
        """Gives the sequence away; returns None, or why the destination has let go of it already.

        Raises:
          TransferError: The destination was gone before it could confirm, or said what makes no sense: it may have
            gone on, as after anything else that is raised in the middle of this.
        """
        self._frames.stream.patience(_GRACE)
        self._frames.send(Commit())
        answer = self._frames.receive(_DONE)
        return answer.reason if isinstance(answer, Refused) else None

    def close(self) -> None:
        """Ends the conversation."""
        self._frames.stream.cut()


class _Stage(Enum):
    WAITING = auto()  # nobody has taken it
    TAKEN = auto()
    ACCEPTED = auto()
    COMMITTED = auto()
    OVER = auto()  # it stays at the source


class Presented:
    """A sequence that a source would hand over, as the destination's application sees it."""

    def __init__(self, request: Migrate) -> None:
        self.request = request
        self._stage = _Stage.WAITING
        self._answer: _Answer | None = None
        self._changed = threading.Condition()

    def accept(self, num_cached: int) -> bool:
        """Says that it has begun here, and waits; returns whether it goes on here. If not, let go of it."""
        with self._changed:
            if self._stage is _Stage.TAKEN:
                self._answer = Accepted(num_cached)
                self._move(_Stage.ACCEPTED)
            self._changed.wait_for(lambda: self._stage is not _Stage.ACCEPTED, 2 * _GRACE)
            if self._stage is _Stage.ACCEPTED:
                self._move(_Stage.OVER)
            return self._stage is _Stage.COMMITTED

    def refuse(self, reason: str) -> None:
        """Says that it cannot begin here."""
        with self._changed:
            if self._stage in {_Stage.WAITING, _Stage.TAKEN}:
                self._answer = Refused(reason)
                self._move(_Stage.OVER)

    def take(self) -> bool:
        """Begins to bring it here; False if its source does not wait any more."""
        with self._changed:
            if self._stage is _Stage.WAITING:
                self._move(_Stage.TAKEN)
                return True
            return False

    def serve(self, frames: Frames) -> None:
        """Tells the source what becomes of it."""
        try:
            frames.send(self._decided(self.request.seconds))
            with self._changed:
                accepted = self._stage is _Stage.ACCEPTED
            if accepted:
                frames.stream.patience(_GRACE)
                frames.receive(_COMMIT)
                frames.send(Done() if self._commit() else Refused("it was not waited for any longer"))
        finally:
            with self._changed:
                if self._stage is not _Stage.COMMITTED:
                    self._move(_Stage.OVER)

    def _decided(self, seconds: float) -> _Answer:
        with self._changed:
            self._changed.wait_for(lambda: self._answer is not None, seconds)
            if self._answer is None:
                self._move(_Stage.OVER)
                return Refused(f"nobody has taken it in {seconds:g} seconds")
            return self._answer

    def _commit(self) -> bool:
        with self._changed:
            if self._stage is _Stage.ACCEPTED:
                self._move(_Stage.COMMITTED)
            return self._stage is _Stage.COMMITTED

    def _move(self, stage: _Stage) -> None:
        self._stage = stage
        self._changed.notify_all()


class Arrivals(Closing):
    """The sequences that wait to be taken over here.

    Args:
      fingerprint: of the identity of this worker's cache: only sequences of the same model are taken.
    """

    def __init__(self, fingerprint: bytes) -> None:
        self._fingerprint = fingerprint
        self._waiting: queue.Queue[Presented] = queue.Queue(_MOST_WAITING)
        self._closed = False
        self._lock = threading.Lock()

    def serve(self, frames: Frames, request: Migrate) -> None:
        """Presents a sequence to the application, and tells its source what becomes of it.

        Raises:
          FrameError: The request makes no sense.
        """
        if not 0 < request.seconds <= _LONGEST_WAIT:
            raise FrameError(f"a wait of {request.seconds} seconds; up to {_LONGEST_WAIT:g} are allowed")
        request.state.tokens()
        presented = Presented(request)
        if refusal := self._refusal(presented):
            presented.refuse(refusal)
        presented.serve(frames)

    def take(self, seconds: float) -> Presented | None:
        """Waits for a sequence, and takes it; None if none comes."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = self._waiting.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                return None
            if found.take():
                return found

    def close(self) -> None:
        """Refuses all that wait, and all that come."""
        with self._lock:
            self._closed = True
            while not self._waiting.empty():
                self._waiting.get_nowait().refuse("this worker is closing")

    def _refusal(self, presented: Presented) -> str | None:
        """Has a sequence wait, or returns why it may not."""
        theirs = presented.request.fingerprint
        if theirs != self._fingerprint:
            return (
                f"the sequence is of another cache: its fingerprint is {theirs.hex()}, here {self._fingerprint.hex()}"
            )
        with self._lock:
            if self._closed:
                return "this worker is closing"
            if self._waiting.full():
                return f"{_MOST_WAITING} sequences are waiting here already"
            self._waiting.put_nowait(presented)
            return None
