"""One worker's story from several tellers: what its tiers hold together, told once.

Blocks of one worker are announced by several sources: the manager for the device and the tiers below it; an engine with
a stream of its own (vLLM, SGLang) for the device, where the manager has only what lies below. Each source says what it
alone knows, and their streams are not in step. A `Consolidator` keeps what every source claims, and tells a subscriber
the union:

    manager  → source("manager") ─┐
                                  ├→ union of claims → sink        ids of its own, in one order
    engine   → source("engine")  ─┘         └→ snapshot()          for who joins late

    per tier   created when the first source has the block in a tier, deleted when the last one there has it no more;
               each tier is told for itself. A block that moves down is `migrated`, where both halves are true of the
               union.
    merged     created when the block is first anywhere, deleted when no tier has it any more: what a router should
               believe. All is told as of the device; its block id is the first copy's, and moves are not told.

So a block that host memory evicts stays announced while the disk has it. Data-parallel ranks are apart from each other;
groups and LoRA names belong to the block. Blocks are one if their hashes are; for engines, which hash in their own way,
see `kvbm_jax.events.rename`.
"""

import enum
import threading
import time
from collections.abc import Iterable, Iterator, Sequence

from kvbm_jax.errors import BlockStateError
from kvbm_jax.events.rows import EventRow, RowPublisher, rows_of
from kvbm_jax.events.schema import EventType, KvEventBatch
from kvbm_jax.events.snapshot import WorkerSnapshot
from kvbm_jax.protocols import BlockKey, Clock, EventSink, Tier

__all__ = ["Consolidation", "Consolidator", "EventSource"]


class Consolidation(enum.StrEnum):
    """How much a consolidator's subscribers are told."""

    PER_TIER = "per_tier"
    MERGED = "merged"


class EventSource:
    """Where one source of a consolidator publishes; made by `Consolidator.source`. An event sink."""

    def __init__(self, consolidator: "Consolidator", name: str) -> None:
        self._consolidator = consolidator
        self.name = name

    def publish(self, batch: KvEventBatch, /) -> None:
        """Takes a batch, which must follow the one before in its source's order."""
        self._consolidator._take(self, batch)  # noqa: SLF001 (a consolidator and its sources are one mechanism)

    def replace(self, snapshot: WorkerSnapshot) -> None:
        """Puts a snapshot in the place of all that this source claims, as after a gap; the difference is told."""
        self._consolidator._replace(self, snapshot)

    def close(self) -> None:
        """Withdraws all that this source claims. Idempotent."""
        self._consolidator._leave(self)  # noqa: SLF001


class Consolidator:
    """Tells one worker's blocks to a sink, as the union of what its sources claim.

    Its methods and those of its sources may be called from any thread; what one source publishes must be in order.

    Args:
      sink: Takes what is told: a bus, a transport, another stage. Closed by `close`.
      worker_id: Who tells it, whatever the sources call themselves.
      mode: Whether subscribers are told of tiers.
      clock: For the time of snapshots and of what follows from them.
    """

    def __init__(
        self,
        sink: EventSink[KvEventBatch],
        *,
        worker_id: str,
        mode: Consolidation = Consolidation.PER_TIER,
        clock: Clock = time,
    ) -> None:
        self.worker_id = worker_id
        self.mode = Consolidation(mode)
        self._out = RowPublisher(sink)
        self._clock = clock
        self._sources: dict[str, EventSource] = {}
        self._ranks: dict[int, _Rank] = {}
        self._lock = threading.Lock()

    def source(self, name: str) -> EventSource:
        """Returns where a source publishes; its claims stand until it is closed.

        Raises:
          BlockStateError: A source of that name is open.
        """
        with self._lock:
            if name in self._sources:
                raise BlockStateError(f"the consolidator has a source {name!r}; close it first, or choose another name")
            source = self._sources[name] = EventSource(self, name)
            return source

    def snapshot(self) -> WorkerSnapshot:
        """Returns what has been told and stands, for who joins late."""
        with self._lock:
            now = self._clock.time_ns()
            told = {dp_rank: rank.told(now) for dp_rank, rank in self._ranks.items()}
            return self._out.snapshot(told, worker_id=self.worker_id, timestamp=now)

    def close(self) -> None:
        """Closes the sink, with all claims standing. Idempotent as the sink's `close` is."""
        self._out.close()

    def _take(self, source: EventSource, batch: KvEventBatch) -> None:
        with self._lock:
            self._check_open(source)
            rank = self._rank(batch.dp_rank)
            self._tell(batch.dp_rank, [told for row in rows_of(batch) for told in rank.apply(source, row)])

    def _replace(self, source: EventSource, snapshot: WorkerSnapshot) -> None:
        with self._lock:
            self._check_open(source)
            rows: dict[int, list[EventRow]] = {dp_rank: [] for dp_rank in self._ranks}
            for batch in snapshot.batches:
                rows.setdefault(batch.dp_rank, []).extend(rows_of(batch))
            for dp_rank, held in rows.items():
                self._tell(dp_rank, self._rank(dp_rank).replace(source, held, snapshot.timestamp))

    def _leave(self, source: EventSource) -> None:
        with self._lock:
            if self._sources.get(source.name) is not source:
                return
            del self._sources[source.name]
            now = self._clock.time_ns()
            for dp_rank, rank in self._ranks.items():
                self._tell(dp_rank, rank.leave(source, now))

    def _rank(self, dp_rank: int) -> "_Rank":
        if dp_rank not in self._ranks:
            self._ranks[dp_rank] = _Rank(merged=self.mode is Consolidation.MERGED)
        return self._ranks[dp_rank]

    def _tell(self, dp_rank: int, rows: Iterable[EventRow]) -> None:
        self._out.publish(rows, worker_id=self.worker_id, dp_rank=dp_rank)

    def _check_open(self, source: EventSource) -> None:
        if self._sources.get(source.name) is not source:
            raise BlockStateError(f"the source {source.name!r} is closed; ask the consolidator for another")


class _Rank:
    """The claims of one data-parallel rank.

    A *place* is what a subscriber can tell apart: a tier, or when merged the one place 0. A place holds a block while
    any source claims it in one of the place's tiers.
    """

    def __init__(self, *, merged: bool) -> None:
        self._merged = merged
        self._claims: dict[EventSource, dict[int, dict[BlockKey, int]]] = {}  # by tier: block ids
        self._told: dict[int, dict[BlockKey, EventRow]] = {}  # by place: the announcement that stands

    def apply(self, source: EventSource, row: EventRow) -> list[EventRow]:
        """Takes one event of a source; returns what a subscriber must be told."""
        match row.event_type:
            case EventType.CREATED:
                return self._add(source, row)
            case EventType.DELETED:
                return self._take(source, row, row.tier)
            case EventType.MIGRATED:
                told = self._add(source, row) + self._take(source, row, row.from_tier)
                whole = [one.event_type for one in told] == [EventType.CREATED, EventType.DELETED]
                return [row] if whole else told
            case EventType.CLEARED:
                return self._clear(source, row)

    def replace(self, source: EventSource, rows: Sequence[EventRow], timestamp: int) -> list[EventRow]:
        """Has a source claim what some creations say, and nothing else; what stays is claimed all the while."""
        told = [one for row in rows for one in self._add(source, row)]
        held = {(row.tier, row.key) for row in rows}
        for tier, shelf in self._claims.get(source, {}).items():
            for key in [key for key in shelf if (tier, key) not in held]:
                told += self._take(source, EventRow(EventType.DELETED, timestamp, 0, tier, key=key), tier)
        return told

    def leave(self, source: EventSource, timestamp: int) -> list[EventRow]:
        """Forgets a source and all that it claims."""
        told = self._clear(source, EventRow(EventType.CLEARED, timestamp, 0, 0))
        self._claims.pop(source, None)
        return told

    def told(self, timestamp: int) -> Iterator[EventRow]:
        """Yields the announcements that stand, parents before children."""
        by_key: dict[BlockKey, list[EventRow]] = {}
        for place in self._told.values():
            for row in place.values():
                by_key.setdefault(row.key, []).append(row._replace(timestamp=timestamp))
        done: set[BlockKey] = set()
        for start in by_key:
            path: list[BlockKey] = []
            at: BlockKey | None = start
            while at is not None and at in by_key and at not in done:
                done.add(at)
                path.append(at)
                at = by_key[at][0].parent
            for key in reversed(path):
                yield from by_key[key]

    def _add(self, source: EventSource, row: EventRow) -> list[EventRow]:
        self._claims.setdefault(source, {}).setdefault(row.tier, {})[row.key] = row.block_id
        place = self._told.setdefault(self._place(row.tier), {})
        if row.key in place:
            return []
        tier = Tier.G1 if self._merged else row.tier
        told = place[row.key] = row._replace(event_type=EventType.CREATED, tier=tier, from_tier=0, from_block_id=0)
        return [told]

    def _take(self, source: EventSource, row: EventRow, tier: int) -> list[EventRow]:
        shelf = self._claims.get(source, {}).get(tier, {})
        if shelf.pop(row.key, None) is None or self._is_held(row.key, self._place(tier)):
            return []
        told = self._told[self._place(tier)].pop(row.key)
        return [told._replace(event_type=EventType.DELETED, timestamp=row.timestamp, content=None)]

    def _clear(self, source: EventSource, row: EventRow) -> list[EventRow]:
        """Takes a tier, or with tier 0 all, from a source; what is empty then for everybody is told in one event."""
        shelves = self._claims.get(source, {})
        told: list[EventRow] = []
        for tier in [row.tier] if row.tier else list(shelves):
            gone = []
            for key in list(shelves.get(tier, ())):
                gone += self._take(source, row._replace(key=key), tier)
            told += gone if self._merged or self._told.get(tier) else [row._replace(tier=tier)]
        if (self._merged or not row.tier) and not any(self._told.values()):
            return [row._replace(tier=0)]
        return told

    def _is_held(self, key: BlockKey, place: int) -> bool:
        return any(
            key in shelf
            for shelves in self._claims.values()
            for tier, shelf in shelves.items()
            if self._place(tier) == place
        )

    def _place(self, tier: int) -> int:
        return 0 if self._merged else tier
