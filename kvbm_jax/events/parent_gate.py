"""For consumers that know a block by its parent: Dynamo's trees, and what reads an engine's stream.

Such a consumer refuses a block whose parent it does not know, and forgets the way to a block's children with the block.
A `ParentGate` stands between the events of one worker and a codec of those dialects, and lets through what they can
follow:

    created, parent announced or none    announced, and with it every resident descendant that waited
    created, parent not announced        waits; nothing is told
    the last copy of a block goes        its announced descendants are withdrawn, the deepest first, then the block;
                                         they wait, resident as they are, until it comes back

It tells `created`, `deleted`, and `cleared` of everything, under ids of its own. `migrated` becomes a creation and a
deletion, and clearing one tier the deletions that it means: these dialects have no words for either. It takes no block
away that it has not announced, and announces none twice in a tier. An event costs what it announces or withdraws; only
clearing looks at all blocks. Ranks and groups are apart from each other.
"""

import threading
import time
from collections.abc import Iterable, Iterator

from kvbm_jax.events.rows import EventRow, RowPublisher, rows_of
from kvbm_jax.events.schema import EventType, KvEventBatch
from kvbm_jax.events.snapshot import WorkerSnapshot
from kvbm_jax.protocols import BlockKey, Clock, EventSink, Tier

__all__ = ["ParentGate"]


class ParentGate:
    """An event sink that passes on one worker's events to another, parents first.

    Its methods may be called from any thread.

    Args:
      sink: Takes what is passed on. Closed by `close`.
      worker_id: Who tells it.
      tier: Where every block is said to be, whatever tiers it is in, from its first copy to its last; None for the
        tiers that it is in. Dynamo's indexer has a tree for each tier and wants the parent in the same: it needs one
        tier.
      clock: For the time of snapshots.
    """

    def __init__(
        self, sink: EventSink[KvEventBatch], *, worker_id: str, tier: Tier | None = None, clock: Clock = time
    ) -> None:
        self.worker_id = worker_id
        self._out = RowPublisher(sink)
        self._tier = tier
        self._clock = clock
        self._ranks: dict[int, _Forest] = {}
        self._lock = threading.Lock()

    def publish(self, batch: KvEventBatch, /) -> None:
        """Passes on what of a batch can be followed, and what it makes possible or impossible."""
        with self._lock:
            forest = self._ranks.setdefault(batch.dp_rank, _Forest(self._tier))
            rows = [told for row in rows_of(batch) for told in forest.apply(row)]
            self._out.publish(rows, worker_id=self.worker_id, dp_rank=batch.dp_rank)

    def waiting(self) -> int:
        """Returns how many resident blocks are not announced, for want of a parent that is."""
        with self._lock:
            return sum(forest.waiting() for forest in self._ranks.values())

    def snapshot(self) -> WorkerSnapshot:
        """Returns what is announced, parents first, for who joins late."""
        with self._lock:
            now = self._clock.time_ns()
            announced = {dp_rank: forest.announced(now) for dp_rank, forest in self._ranks.items()}
            return self._out.snapshot(announced, worker_id=self.worker_id, timestamp=now)

    def close(self) -> None:
        """Closes the sink."""
        self._out.close()


class _Node:
    """A resident block."""

    __slots__ = ("announced", "children", "copies", "parent")

    def __init__(self, parent: BlockKey | None) -> None:
        self.parent = parent
        self.announced = False
        self.copies: dict[int, EventRow] = {}  # by tier: how it was created there
        self.children: dict[BlockKey, None] = {}  # resident ones, the oldest first


class _Forest:
    """The resident blocks of one data-parallel rank, by their parents; told as of one tier, or of those they are in."""

    def __init__(self, tier: Tier | None) -> None:
        self._tier = tier
        self._nodes: dict[BlockKey, _Node] = {}
        self._orphans: dict[BlockKey, dict[BlockKey, None]] = {}  # children of blocks that are not resident

    def apply(self, row: EventRow) -> Iterator[EventRow]:
        """Takes one event; yields what is passed on."""
        match row.event_type:
            case EventType.CREATED:
                yield from self._create(row)
            case EventType.MIGRATED:
                yield from self._create(row._replace(event_type=EventType.CREATED, from_tier=0, from_block_id=0))
                yield from self._delete(row.key, row.from_tier, row.timestamp)
            case EventType.DELETED:
                yield from self._delete(row.key, row.tier, row.timestamp)
            case EventType.CLEARED:
                yield from self._clear(row)

    def announced(self, timestamp: int) -> Iterator[EventRow]:
        """Yields the creations that have been passed on and stand, parents before children."""
        roots = [key for key, node in self._nodes.items() if node.parent is None]
        for key in self._descend(roots):
            for row in self._told(self._nodes[key]):
                yield row._replace(timestamp=timestamp)

    def waiting(self) -> int:
        return sum(not node.announced for node in self._nodes.values())

    def _create(self, row: EventRow) -> Iterator[EventRow]:
        node = self._nodes.get(row.key)
        if node is None:
            node = self._plant(row)
        if row.tier in node.copies:
            return
        node.copies[row.tier] = row
        if node.announced:
            if self._tier is None:
                yield row
        elif node.parent is None or self._is_announced(node.parent):
            for key in self._descend([row.key]):
                self._nodes[key].announced = True
                for copy in self._told(self._nodes[key]):
                    yield copy._replace(timestamp=row.timestamp)

    def _delete(self, key: BlockKey, tier: int, timestamp: int) -> Iterator[EventRow]:
        node = self._nodes.get(key)
        if node is None or tier not in node.copies:
            return
        last = len(node.copies) == 1
        if last and node.announced:
            for child in reversed(list(self._descend(node.children))):
                yield from self._withdraw(self._nodes[child], timestamp)
        if node.announced and (last or self._tier is None):
            yield _deletion(node.copies[tier], timestamp, self._tier)
        del node.copies[tier]
        if last:
            self._fell(key, node)

    def _withdraw(self, node: _Node, timestamp: int) -> Iterator[EventRow]:
        if node.announced:
            node.announced = False
            for copy in self._told(node):
                yield _deletion(copy, timestamp)

    def _clear(self, row: EventRow) -> Iterator[EventRow]:
        here = [key for key, node in self._nodes.items() if row.tier in node.copies]
        rest = any(len(node.copies) > 1 for node in self._nodes.values()) or len(here) < len(self._nodes)
        if row.tier == 0 or not rest:
            self._nodes.clear()
            self._orphans.clear()
            yield row._replace(tier=0)
        else:
            for key in here:
                yield from self._delete(key, row.tier, row.timestamp)

    def _plant(self, row: EventRow) -> _Node:
        node = self._nodes[row.key] = _Node(row.parent)
        node.children = self._orphans.pop(row.key, {})
        if node.parent is not None:
            self._siblings(node.parent)[row.key] = None
        return node

    def _fell(self, key: BlockKey, node: _Node) -> None:
        del self._nodes[key]
        if node.children:
            self._orphans[key] = node.children
        if node.parent is not None:
            siblings = self._siblings(node.parent)
            del siblings[key]
            if not siblings:
                self._orphans.pop(node.parent, None)

    def _siblings(self, parent: BlockKey) -> dict[BlockKey, None]:
        """The resident children of a block, whether it is resident or not."""
        node = self._nodes.get(parent)
        return self._orphans.setdefault(parent, {}) if node is None else node.children

    def _told(self, node: _Node) -> list[EventRow]:
        """The creations that a consumer is told of a block."""
        copies = list(node.copies.values())
        return copies if self._tier is None else [copies[0]._replace(tier=self._tier)]

    def _is_announced(self, key: BlockKey) -> bool:
        node = self._nodes.get(key)
        return node is not None and node.announced

    def _descend(self, keys: Iterable[BlockKey]) -> Iterator[BlockKey]:
        """Yields blocks and all their resident descendants, parents before children."""
        rows = list(keys)
        while rows:
            yield from rows
            rows = [child for key in rows for child in self._nodes[key].children]


def _deletion(copy: EventRow, timestamp: int, tier: Tier | None = None) -> EventRow:
    return copy._replace(event_type=EventType.DELETED, timestamp=timestamp, tier=tier or copy.tier, content=None)
