"""Which block lies in which segment, and how much of each segment is alive. Bookkeeping only: no files, no locks.

A segment is **live** while a block of the index lies in it, **pinned** while a read of it is under way, and may be
deleted when it is neither. Deleting a block changes no file: its bytes stay until their segment goes or is compacted.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvbm_jax.offload.segments.record import StoredBlock
from kvbm_jax.protocols import BlockKey

__all__ = ["Entry", "Segment", "SegmentIndex"]


@dataclass(eq=False)
class Segment:
    """A committed segment."""

    path: Path
    sequence: int
    physical: int  # bytes on the disk
    live: int = 0  # blocks of the index that lie here
    pins: int = 0  # reads under way
    is_damaged: bool = False  # a read of it failed

    @property
    def is_garbage(self) -> bool:
        """Whether nobody needs it any more."""
        return self.live == 0 and self.pins == 0


@dataclass(eq=False)
class Entry:
    """A block that is held."""

    block: StoredBlock
    segment: Segment
    row: int


class SegmentIndex:
    """The blocks held and the segments that hold them."""

    def __init__(self) -> None:
        self._entries: dict[BlockKey, Entry] = {}
        self._segments: dict[Path, Segment] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: BlockKey) -> Entry | None:
        """Returns a block's entry."""
        return self._entries.get(key)

    def oldest_first(self) -> list[Entry]:
        """Returns the entries in the order in which their blocks were put."""
        return sorted(self._entries.values(), key=lambda entry: entry.block.block_id)

    @property
    def physical(self) -> int:
        """Bytes of all segments on the disk."""
        return sum(segment.physical for segment in self._segments.values())

    def add(self, segment: Segment, blocks: Iterable[tuple[int, StoredBlock]]) -> None:
        """Adds a segment and (row, block) pairs that lie in it; a block that lay elsewhere lies here from now on."""
        self._segments[segment.path] = segment
        for row, block in blocks:
            self.remove(block.key)
            self._entries[block.key] = Entry(block, segment, row)
            segment.live += 1

    def remove(self, key: BlockKey) -> Entry | None:
        """Takes a block out and returns what its entry was."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.segment.live -= 1
        return entry

    def garbage(self) -> list[Segment]:
        """Returns the segments that may be deleted, and forgets them."""
        found = [segment for segment in self._segments.values() if segment.is_garbage]
        for segment in found:
            del self._segments[segment.path]
        return found

    def waits_for_readers(self) -> bool:
        """Returns whether a segment is kept by reads alone."""
        return any(segment.live == 0 and segment.pins for segment in self._segments.values())

    def sparsest_first(self) -> list[Segment]:
        """Returns the live segments, those with the least alive for their size first, older before younger."""
        live = [segment for segment in self._segments.values() if segment.live]
        return sorted(live, key=lambda segment: (segment.live / segment.physical, segment.sequence))

    def entries_of(self, segments: Sequence[Segment]) -> Iterator[Entry]:
        """Yields what lives in some segments, the oldest put first."""
        chosen = set(segments)
        return (entry for entry in self.oldest_first() if entry.segment in chosen)
