"""Vocabulary shared by every floor: outcomes of verbs, and how padding is written.

Padding. Arrays of block ids have static shapes; an unused entry holds `num_blocks`, one past the last block, which
gathers fill and scatters drop. It is never -1: `x.at[-1]` is the last row, also with `mode="drop"`. The same goes
for slots (`num_blocks * block_size`) and rows of a sequence batch (`max_sequences`).
"""

import enum
from typing import Final

__all__ = ["Status"]


class Status(enum.IntEnum):
    """Outcome of a verb for one row or one block, stored in `int32` arrays.

    Run-time outcomes are values, as in lineax's `RESULTS`: nothing raises inside a compiled program. `message` tells
    what happened and what to do; the host boundary puts it into its errors.
    """

    OK = 0
    OUT_OF_BLOCKS = 1
    UNKNOWN_BLOCK = 2
    NOT_HELD = 3
    NOT_RESIDENT = 4
    ALREADY_REGISTERED = 5
    INDEX_FULL = 6
    QUEUE_FULL = 7
    TABLE_FULL = 8
    INVALID_COUNT = 9
    STALE_GENERATION = 10
    SHARED_TAIL = 11
    WINDOW_PASSED = 12
    QUOTA_EXCEEDED = 13

    @property
    def message(self) -> str:
        """What happened, and the remedy."""
        return _MESSAGES[self]


_MESSAGES: Final = {
    Status.OK: "done",
    Status.OUT_OF_BLOCKS: "more blocks are needed than are free or evictable; release sequences or enlarge the pool",
    Status.UNKNOWN_BLOCK: "a block id lies outside the pool; padding is num_blocks, never -1",
    Status.NOT_HELD: "a block is released or registered by someone who does not hold it (a double release)",
    Status.NOT_RESIDENT: "a block holds no registered content, so it cannot be acquired; match again",
    Status.ALREADY_REGISTERED: "the block is registered under another hash; evict it before it gets a new one",
    Status.INDEX_FULL: "no way is left for this hash in the index; call pool.rehash with another seed and retry",
    Status.QUEUE_FULL: "the inactive queue has no room for what is released; call pool.compact and retry",
    Status.TABLE_FULL: "the sequence outgrows its block table; start it with a wider one",
    Status.INVALID_COUNT: "a count is negative or exceeds the static maximum of the call",
    Status.STALE_GENERATION: "the handle is older than its block's present use; drop it",
    Status.SHARED_TAIL: "the next token would be written into a block that others hold or can find; unshare the row",
    Status.WINDOW_PASSED: "what the shorter sequence would see was freed behind a sliding window; start it anew",
    Status.QUOTA_EXCEEDED: "the tenant would hold more blocks than its quota; let its sequences end or raise it",
}
