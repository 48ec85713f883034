"""What a worker tells the world about its blocks: one event a block, batches of events as columns.

An event says that a block became readable in a tier, or no longer is; together a worker's events let a router
know which worker holds which prefix. `KvEventBatch` is the unit of queues and wires: numpy columns, so that a
step that moves a thousand blocks makes a few arrays and not a thousand objects. `KvEvent` is its row view,
for people and tests. These are records: nothing here is sent, and their encodings for wires stand elsewhere.

    created    a tier holds the block and it can be read
    deleted    the tier no longer does
    migrated   within one worker, down: `deleted` in from_tier and `created` in tier, in one, once the lower copy
               can be read; with to_worker: the source's half of a move between workers, a deletion there
    cleared    a tier, or with tier None the whole worker, is empty; block_id is 0

`block_id` is the number of the block's slot within (worker, tier). `event_id` grows by one from event to
event of a worker, so a consumer that sees a jump knows what it missed.

Axis legend: `E` events of a batch, `K` token ids of all its events together.
"""

import array
import enum
import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from kvbm_jax.errors import LayoutError
from kvbm_jax.events.columns import hash_rows, offsets_of
from kvbm_jax.protocols import Tier

__all__ = ["SCHEMA_VERSION", "EventType", "KvEvent", "KvEventBatch", "Shared"]

SCHEMA_VERSION = 1

_NO_HASH = bytes(16)
_NO_TOKENS = np.zeros(0, np.uint32)
_END_32, _END_64 = 1 << 32, 1 << 64
_UINT32, _UINT64 = np.dtype(np.uint32), np.dtype(np.uint64)


class EventType(enum.StrEnum):
    """What happened; `code` is its number in a batch's column."""

    CREATED = "created"
    DELETED = "deleted"
    MIGRATED = "migrated"
    CLEARED = "cleared"

    @property
    def code(self) -> int:
        """The type's number: 0 to 3, in the order above."""
        return _CODES[self]


_TYPES = tuple(EventType)
_CODES = {event_type: code for code, event_type in enumerate(_TYPES)}


class KvEvent(msgspec.Struct, frozen=True):
    """One event."""

    event_type: EventType
    block_id: int
    worker_id: str
    timestamp: int  # ns since the Unix epoch
    metadata: dict[str, str] = {}
    sequence_hash: bytes | None = None  # 16 bytes; None if cleared
    parent_hash: bytes | None = None  # 16 bytes; None for a sequence's first block
    token_ids: tuple[int, ...] = ()  # the block's own, where created
    block_size: int = 0
    tier: Tier | None = None  # None: all tiers, only if cleared
    group_idx: int = 0
    dp_rank: int = 0
    lora_name: str | None = None
    event_id: int = 0
    from_tier: Tier | None = None  # migrated within a worker: where the block was
    from_block_id: int = 0
    to_worker: str | None = None  # migrated between workers: who has it now
    schema_version: int = SCHEMA_VERSION


class Shared(msgspec.Struct, frozen=True, gc=False):
    """A batch whose events have in common all that they can; what `KvEventBatch.of_shared` makes one of."""

    event_type: EventType
    first_event_id: int  # ids count up from here
    timestamp: int
    tier: int  # 0 for all tiers
    group_idx: int
    from_tier: int  # 0 for none
    worker_id: str
    block_size: int
    dp_rank: int
    block_ids: NDArray[np.uint64] | None  # [E]; None for zeros
    sequence_hashes: NDArray[np.uint32] | bytes | None  # [E, 4] or 16 bytes each; None for none
    parent_hashes: NDArray[np.uint32] | bytes | None  # [E, 4] or 16 bytes each; None for none
    tokens_each: int
    token_ids: NDArray[np.uint32] | list[int]  # [E * tokens_each]
    lora_name: str | None
    num_events: int  # E


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KvEventBatch:
    """Events of one worker, in order, as columns. Use `make` or `from_events` to build one.

    A batch whose events have all in common that they can is that (`shared`), and makes its columns when they are asked
    for.
    """

    worker_id: str
    block_size: int
    dp_rank: int = 0
    event_types: NDArray[np.uint8]  # [E]: EventType.code
    event_ids: NDArray[np.uint64]  # [E]
    timestamps: NDArray[np.uint64]  # [E]: ns since the Unix epoch
    block_ids: NDArray[np.uint64]  # [E]
    tiers: NDArray[np.uint8]  # [E]: Tier, 0 for all tiers
    group_idx: NDArray[np.uint32]  # [E]
    sequence_hashes: NDArray[np.uint32]  # [E, 4]: zeros for none
    parent_hashes: NDArray[np.uint32]  # [E, 4]: zeros for none
    token_offsets: NDArray[np.int64]  # [E + 1]: event i has token_ids[offsets[i]:offsets[i + 1]]
    token_ids: NDArray[np.uint32]  # [K]
    from_tiers: NDArray[np.uint8]  # [E]: Tier, 0 for none
    from_block_ids: NDArray[np.uint64]  # [E]
    lora_names: tuple[str | None, ...] = ()  # of length E, or empty if no event has one
    to_workers: tuple[str | None, ...] = ()  # of length E, or empty if no event has one
    metadata: tuple[Mapping[str, str], ...] = ()  # of length E, or empty if no event has any
    schema_version: int = SCHEMA_VERSION
    shared: Shared | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        count = len(self.event_types)
        for name, (dtype, tail) in _COLUMNS.items():
            column = getattr(self, name)
            if column.dtype != dtype or column.shape != (count, *tail):
                raise LayoutError(
                    f"{name} must be {np.dtype(dtype)}{[count, *tail]} in a batch of {count} events; it is "
                    f"{column.dtype}{list(column.shape)}"
                )
        for name in ("lora_names", "to_workers", "metadata"):
            if len(getattr(self, name)) not in {0, count}:
                raise LayoutError(f"{name} has {len(getattr(self, name))} entries for {count} events")
        ends = self.token_offsets
        rising = len(ends) == count + 1 and bool((ends[1:] >= ends[:-1]).all())
        if not rising or ends[0] != 0 or ends[-1] != len(self.token_ids):
            raise LayoutError(
                f"token_offsets must be {count + 1} rising numbers from 0 to {len(self.token_ids)}, the tokens "
                f"of the batch; they are {len(ends)}, from {ends[:1].tolist()} to {ends[-1:].tolist()}"
            )

    @classmethod
    def make(
        cls,
        event_type: EventType | Sequence[EventType],
        block_ids: ArrayLike,
        *,
        worker_id: str,
        block_size: int,
        first_event_id: int,
        timestamp: int,
        tier: Tier | None = Tier.G1,
        sequence_hashes: NDArray[np.uint32] | None = None,
        parent_hashes: NDArray[np.uint32] | None = None,
        token_ids: NDArray[np.uint32] | Sequence[ArrayLike] | None = None,
        group_idx: int | ArrayLike = 0,
        dp_rank: int = 0,
        from_tier: Tier | None = None,
        from_block_ids: ArrayLike = 0,
        lora_names: Sequence[str | None] = (),
        to_workers: Sequence[str | None] = (),
        metadata: Sequence[Mapping[str, str]] = (),
    ) -> Self:
        """Builds a batch of one worker and one tier; what is one for all events is given once.

        Args:
          event_type: Of all events, or one per event.
          block_ids: Slot numbers within the tier, `[E]`; `[0]` for a `cleared`.
          worker_id: Who says so.
          block_size: Tokens per block.
          first_event_id: The ids count up from here.
          timestamp: Of all events, ns since the Unix epoch.
          tier: Of all events; None means all tiers, for a `cleared`.
          sequence_hashes: `uint32[E, 4]`, or None if only cleared.
          parent_hashes: `uint32[E, 4]`, zeros for a sequence's first block; None for none.
          token_ids: Tokens of each block, `uint32[E, block_size]` or a sequence of `E` rows; None for none.
          group_idx: Of all events, or `[E]`.
          dp_rank: Of all events.
          from_tier: Where all blocks were, for a `migrated`.
          from_block_ids: Slot numbers there, `[E]`.
          lora_names: One per event, or empty.
          to_workers: One per event, or empty.
          metadata: One per event, or empty.
        """
        if isinstance(block_ids, np.ndarray) and block_ids.dtype == _UINT64:
            blocks = block_ids
        else:
            blocks = _column("block_ids", block_ids, np.uint64, None)
        if blocks.ndim != 1:
            raise LayoutError(f"block_ids must be one-dimensional; they have shape {list(blocks.shape)}")
        count = len(blocks)
        tokens_each, tokens = _equal_rows(token_ids, count)
        if isinstance(group_idx, list) and group_idx and group_idx.count(group_idx[0]) == count:
            group_idx = group_idx[0]
        one_name = not lora_names or lora_names.count(lora_names[0]) == len(lora_names) == count
        if (
            tokens_each >= 0
            and one_name
            and type(group_idx) is type(timestamp) is type(first_event_id) is int
            and isinstance(event_type, EventType)
            and 0 <= group_idx < _END_32
            and 0 <= timestamp < _END_64
            and 0 <= first_event_id <= _END_64 - count
            and from_tier is None
            and not (to_workers or metadata)
        ):
            _check_hashes("sequence_hashes", sequence_hashes, count)
            _check_hashes("parent_hashes", parent_hashes, count)
            return cls.of_shared(
                Shared(
                    event_type,
                    first_event_id,
                    timestamp,
                    0 if tier is None else tier,
                    group_idx,
                    0,
                    worker_id,
                    block_size,
                    dp_rank,
                    blocks,
                    sequence_hashes,
                    parent_hashes,
                    tokens_each,
                    tokens,
                    lora_names[0] if lora_names else None,
                    count,
                )
            )
        codes = event_type.code if isinstance(event_type, EventType) else [kind.code for kind in event_type]
        offsets, tokens = _ragged(token_ids, count)
        return cls(
            worker_id=worker_id,
            block_size=block_size,
            dp_rank=dp_rank,
            event_types=_column("event_types", codes, np.uint8, count),
            event_ids=np.arange(first_event_id, first_event_id + count, dtype=np.uint64),
            timestamps=_column("timestamps", timestamp, np.uint64, count),
            block_ids=blocks,
            tiers=np.full(count, tier or 0, np.uint8),
            group_idx=_column("group_idx", group_idx, np.uint32, count),
            sequence_hashes=_hashes(sequence_hashes, count),
            parent_hashes=_hashes(parent_hashes, count),
            token_offsets=offsets,
            token_ids=tokens,
            from_tiers=np.full(count, from_tier or 0, np.uint8),
            from_block_ids=_column("from_block_ids", from_block_ids, np.uint64, count),
            lora_names=tuple(lora_names),
            to_workers=tuple(to_workers),
            metadata=tuple(metadata),
        )

    @classmethod
    def of_shared(cls, shared: Shared) -> Self:
        """Builds a batch at the least cost and looks at nothing: shapes and ranges are the caller's word."""
        batch = object.__new__(cls)
        object.__setattr__(batch, "shared", shared)
        return batch

    def __getattr__(self, name: str) -> Any:
        """Makes a field of what is shared; called only where it has not been made."""
        make = _SHARED_FIELDS.get(name)
        if make is None or self.shared is None:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        value = make(self.shared, self.shared.num_events)
        object.__setattr__(self, name, value)
        return value

    @classmethod
    def from_events(cls, events: Iterable[KvEvent]) -> Self:
        """Builds a batch from rows, which must be of one worker, rank and block size, and at least one."""
        rows = list(events)
        shared = {(row.worker_id, row.dp_rank, row.block_size, row.schema_version) for row in rows}
        if len(shared) != 1:
            raise LayoutError(
                f"a batch has events of one (worker_id, dp_rank, block_size, schema_version); these "
                f"{len(rows)} have {sorted(shared)}"
            )
        ((worker_id, dp_rank, block_size, schema_version),) = shared
        offsets, tokens = _ragged([row.token_ids for row in rows], len(rows))
        loras, targets = ([getattr(row, n) for row in rows] for n in ("lora_name", "to_worker"))

        def column[T: np.generic](name: str, dtype: type[T], values: Iterable[int | None]) -> NDArray[T]:
            try:
                return np.array([operator.index(value or 0) for value in values], dtype)
            except OverflowError as error:
                raise LayoutError(f"{name} does not fit {np.dtype(dtype)}: {error}") from error

        return cls(
            worker_id=worker_id,
            block_size=block_size,
            dp_rank=dp_rank,
            event_types=np.array([row.event_type.code for row in rows], np.uint8),
            event_ids=column("event_ids", np.uint64, (row.event_id for row in rows)),
            timestamps=column("timestamps", np.uint64, (row.timestamp for row in rows)),
            block_ids=column("block_ids", np.uint64, (row.block_id for row in rows)),
            tiers=column("tiers", np.uint8, (row.tier for row in rows)),
            group_idx=column("group_idx", np.uint32, (row.group_idx for row in rows)),
            sequence_hashes=_hash_rows([row.sequence_hash for row in rows]),
            parent_hashes=_hash_rows([row.parent_hash for row in rows]),
            token_offsets=offsets,
            token_ids=tokens,
            from_tiers=column("from_tiers", np.uint8, (row.from_tier for row in rows)),
            from_block_ids=column("from_block_ids", np.uint64, (row.from_block_id for row in rows)),
            lora_names=tuple(loras) if any(name is not None for name in loras) else (),
            to_workers=tuple(targets) if any(name is not None for name in targets) else (),
            metadata=tuple(row.metadata for row in rows) if any(row.metadata for row in rows) else (),
            schema_version=schema_version,
        )

    def __len__(self) -> int:
        return len(self.block_ids) if self.shared is None else self.shared.num_events

    def __getitem__(self, index: int) -> KvEvent:
        i = range(len(self))[index]
        tier, from_tier = int(self.tiers[i]), int(self.from_tiers[i])
        return KvEvent(
            event_type=_TYPES[self.event_types[i]],
            block_id=int(self.block_ids[i]),
            worker_id=self.worker_id,
            timestamp=int(self.timestamps[i]),
            metadata=dict(self.metadata[i]) if self.metadata else {},
            sequence_hash=_hash_or_none(self.sequence_hashes[i]),
            parent_hash=_hash_or_none(self.parent_hashes[i]),
            token_ids=tuple(self.token_ids[self.token_offsets[i] : self.token_offsets[i + 1]].tolist()),
            block_size=self.block_size,
            tier=Tier(tier) if tier else None,
            group_idx=int(self.group_idx[i]),
            dp_rank=self.dp_rank,
            lora_name=self.lora_names[i] if self.lora_names else None,
            event_id=int(self.event_ids[i]),
            from_tier=Tier(from_tier) if from_tier else None,
            from_block_id=int(self.from_block_ids[i]),
            to_worker=self.to_workers[i] if self.to_workers else None,
            schema_version=self.schema_version,
        )

    def __iter__(self) -> Iterator[KvEvent]:
        return (self[i] for i in range(len(self)))


_COLUMNS: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {
    "event_types": (np.uint8, ()),
    "event_ids": (np.uint64, ()),
    "timestamps": (np.uint64, ()),
    "block_ids": (np.uint64, ()),
    "tiers": (np.uint8, ()),
    "group_idx": (np.uint32, ()),
    "sequence_hashes": (np.uint32, (4,)),
    "parent_hashes": (np.uint32, (4,)),
    "from_tiers": (np.uint8, ()),
    "from_block_ids": (np.uint64, ()),
}


_SHARED_FIELDS: dict[str, Callable[[Shared, int], Any]] = {
    "worker_id": lambda shared, _: shared.worker_id,
    "block_size": lambda shared, _: shared.block_size,
    "dp_rank": lambda shared, _: shared.dp_rank,
    "event_types": lambda shared, count: np.full(count, shared.event_type.code, np.uint8),
    "event_ids": lambda shared, count: np.arange(shared.first_event_id, shared.first_event_id + count, dtype=np.uint64),
    "timestamps": lambda shared, count: np.full(count, shared.timestamp, np.uint64),
    "block_ids": lambda shared, count: np.zeros(count, np.uint64) if shared.block_ids is None else shared.block_ids,
    "tiers": lambda shared, count: np.full(count, shared.tier, np.uint8),
    "group_idx": lambda shared, count: np.full(count, shared.group_idx, np.uint32),
    "sequence_hashes": lambda shared, count: _hashes(shared.sequence_hashes, count),
    "parent_hashes": lambda shared, count: _hashes(shared.parent_hashes, count),
    "token_offsets": lambda shared, count: np.arange(count + 1, dtype=np.int64) * shared.tokens_each,
    "token_ids": lambda shared, _: np.asarray(shared.token_ids, np.uint32),
    "from_tiers": lambda shared, count: np.full(count, shared.from_tier, np.uint8),
    "from_block_ids": lambda _, count: np.zeros(count, np.uint64),
    "lora_names": lambda shared, count: () if shared.lora_name is None else (shared.lora_name,) * count,
    "to_workers": lambda _shared, _: (),
    "metadata": lambda _shared, _: (),
    "schema_version": lambda _shared, _: SCHEMA_VERSION,
}


def _column[T: np.generic](name: str, values: ArrayLike, dtype: type[T], count: int | None) -> NDArray[T]:
    """Converts to a column of `count` entries, a scalar to all of them; refuses what would wrap."""
    array = np.asarray(values)
    if array.size == 0:
        array = array.astype(dtype)
    limit = np.iinfo(dtype).max  # type: ignore[type-var]
    if array.dtype.kind not in "iu":
        raise LayoutError(f"{name} must be integers in [0, {limit}]; they are {array.dtype}")
    if array.size and not 0 <= int(array.min()) <= int(array.max()) <= limit:
        raise LayoutError(f"{name} must be in [0, {limit}]; they reach from {array.min()} to {array.max()}")
    if array.ndim and count is not None and array.shape != (count,):
        raise LayoutError(f"{name} has shape {list(array.shape)} for {count} events")
    shape = array.shape if count is None else (count,)
    return np.array(np.broadcast_to(array, shape), dtype)


def _hashes(values: NDArray[np.uint32] | bytes | None, count: int) -> NDArray[np.uint32]:
    if isinstance(values, bytes):
        return hash_rows(values)
    return np.zeros((count, 4), np.uint32) if values is None else np.asarray(values)


def _hash_rows(hashes: Sequence[bytes | None]) -> NDArray[np.uint32]:
    for value in hashes:
        if value is not None and len(value) != len(_NO_HASH):
            raise LayoutError(f"a hash has 16 bytes; {value.hex()} has {len(value)}")
    return hash_rows(b"".join([value or _NO_HASH for value in hashes]))


def _hash_or_none(row: NDArray[np.uint32]) -> bytes | None:
    value = row.astype("<u4").tobytes()
    return None if value == _NO_HASH else value


def _check_hashes(name: str, hashes: NDArray[np.uint32] | None, count: int) -> None:
    if hashes is None:
        return
    if hashes.dtype != _UINT32 or hashes.shape != (count, 4):
        raise LayoutError(
            f"{name} must be uint32[{count}, 4] in a batch of {count} events; it is {hashes.dtype}{list(hashes.shape)}"
        )


def _equal_rows(rows: Any, count: int) -> tuple[int, NDArray[np.uint32]]:
    """Tokens that each of `count` rows has, and all of them; -1 if rows are not equally long, or not of tokens."""
    if rows is None:
        return 0, _NO_TOKENS
    if isinstance(rows, np.ndarray):
        alike = rows.ndim == 2 and rows.dtype == _UINT32 and len(rows) == count
        return (rows.shape[1], rows.reshape(-1)) if alike else (-1, _NO_TOKENS)
    lengths = set(map(len, rows))
    if len(rows) != count or len(lengths) != 1:
        return -1, _NO_TOKENS
    try:
        tokens = array.array("I", itertools.chain.from_iterable(rows))
    except (TypeError, OverflowError):  # the general way says what is wrong
        return -1, _NO_TOKENS
    return lengths.pop(), np.array(tokens, np.uint32)


def _ragged(rows: Any, count: int) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Offsets and values of `count` rows of tokens; None stands for rows without any."""
    if rows is None:
        return np.zeros(count + 1, np.int64), np.zeros(0, np.uint32)
    if len(rows) != count:
        raise LayoutError(f"token_ids has {len(rows)} rows for {count} events")
    if isinstance(rows, np.ndarray) and rows.ndim == 2:
        width = rows.shape[1]
        return np.arange(count + 1, dtype=np.int64) * width, _column("token_ids", rows.ravel(), np.uint32, None)
    return offsets_of([len(row) for row in rows]), _column(
        "token_ids", [token for row in rows for token in row], np.uint32, None
    )
