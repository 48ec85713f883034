"""From blocks of one size to blocks of another: which there are then, and where each of their tokens lies now.

Blocks are hashed in chains, so that those of another size are found by walking each cached chain from its first block
on and hashing its tokens anew:

    old, 4 tokens   [ a b c d ][ e f g h ][ i j k l ]         registered: 12 tokens
    new, 6 tokens   [ a b c d e f ][ g h i j k l ]            two whole blocks

Tokens after the last whole new block of a chain are cached no more. A block whose parent has been evicted before it is
not found by anybody and is left out. Where chains part within a new block, each gets its own copy.

Running sequences keep all their tokens: what they had registered, as far as it makes whole new blocks, is the cached
blocks, and the rest lies in blocks of their own, shared by those that shared every slot of it.

Order of eviction: a new block is as recent as the most recent of the old blocks that its last token came from; of those
that end in one old block the last goes first. For chains released whole that is the order that releasing them in new
blocks would have made. What does not fit, as copies may not, is dropped from the least recent on.

This module plans and makes the pool; `DeviceTier.reblock` carries out. Work is in proportion to the tokens cached.

Axes: N blocks of T tokens before, M blocks of U tokens after.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import numpy as np
from numpy.typing import NDArray

from kvbm_jax.errors import LayoutError, OutOfBlocksError
from kvbm_jax.handles import Hasher
from kvbm_jax.handles import Sequence as RunningSequence
from kvbm_jax.hashing import Multimodal, block_keys, hash_bytes
from kvbm_jax.index import KEY_WORDS
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload.engine import Resident
from kvbm_jax.pool import PoolState
from kvbm_jax.programs import cpu_device, try_seeds
from kvbm_jax.protocols import BlockKey, BlockRecord
from kvbm_jax.resize import PoolParts, assemble
from kvbm_jax.sequences import SequenceBatch

__all__ = ["ReblockPlan", "ReblockReport", "Running", "build_pool", "plan_reblock"]


class Running(NamedTuple):
    """A running sequence and where its tokens lie."""

    seq: RunningSequence
    table: NDArray[np.int32]  # [blocks]
    length: int  # tokens that have a slot


class ReblockReport(NamedTuple):
    """What `BlockManager.reblock` did."""

    block_size: int
    num_blocks: int
    num_registered: int  # blocks that are findable now
    num_dropped: int  # further ones that would be, had they fitted


@dataclass(frozen=True)
class ReblockPlan:
    """A cache in blocks of another size."""

    slots: NDArray[np.int32]  # [M, U]: where each token lies now; N * T for none
    tables: Mapping[int, Sequence[int]]  # row -> its blocks
    lengths: Mapping[int, int]  # row -> its tokens
    num_registered: Mapping[int, int]  # row -> how many of them others find
    residents: Sequence[Resident]  # the registered blocks, parents before children
    inactive: Sequence[int]  # those that no row holds, in the order of their eviction
    report: ReblockReport


class _Cached(NamedTuple):
    """A registered block to be."""

    resident: Resident  # all but its block id
    slots: tuple[int, ...]
    rank: int  # the higher the more recent
    depth: int  # its index in its chain


def plan_reblock(
    layout: KVLayout,
    hasher: Hasher,
    *,
    residents: Iterable[Resident],
    inactive: NDArray[np.int32],
    running: Sequence[Running],
) -> ReblockPlan:
    """Plans blocks of the size of `hasher` for a cache of blocks of another.

    Args:
      layout: of the cache as it is.
      hasher: names the new blocks.
      residents: every registered block.
      inactive: i32[n], those of them that nobody holds, in the order of their eviction.
      running: the sequences that hold the others.

    Raises:
      LayoutError: if the cache has no room for one block of the new size.
      OutOfBlocksError: if the running sequences do not fit.
    """
    size = hasher.block_size
    if not 1 <= size <= layout.num_slots:
        raise LayoutError(f"block_size is {size}; this cache has room for a block of 1 to {layout.num_slots} tokens")
    num_blocks = layout.num_slots // size
    ranks = {int(block): rank for rank, block in enumerate(inactive)}
    cached = _cached(residents, ranks, layout.block_size, hasher)

    places: dict[BlockKey | tuple[int, ...], int] = {}  # by key if registered, else by its slots
    tables: dict[int, list[int]] = {}
    num_registered: dict[int, int] = {}
    for one in running:
        names = _names(one, layout.block_size, hasher)
        tables[one.seq.row] = [places.setdefault(name, len(places)) for name in names]
        num_registered[one.seq.row] = sum(isinstance(name, BlockKey) for name in names)
    held = len(places)
    if held > num_blocks:
        raise OutOfBlocksError(
            f"the running sequences need {held} blocks of {size} tokens; the cache has room for {num_blocks}: release "
            "some first"
        )
    idle = sorted((key for key in cached if key not in places), key=lambda key: (cached[key].rank, -cached[key].depth))
    idle, dropped = idle[max(len(idle) - (num_blocks - held), 0) :], max(len(idle) - (num_blocks - held), 0)
    places |= {key: held + i for i, key in enumerate(idle)}

    slots = np.full((num_blocks, size), layout.num_slots, np.int32)
    registered: list[tuple[int, Resident]] = []
    for name, place in places.items():
        if isinstance(name, BlockKey):
            slots[place] = cached[name].slots
            registered.append((cached[name].depth, cached[name].resident._replace(block_id=place)))
        else:
            slots[place, : len(name)] = name
    found = [resident for _, resident in sorted(registered, key=lambda pair: pair[0])]
    return ReblockPlan(
        slots,
        tables,
        {one.seq.row: one.length for one in running},
        num_registered,
        found,
        [places[key] for key in idle],
        ReblockReport(size, num_blocks, len(found), dropped),
    )


def build_pool(plan: ReblockPlan, batch: SequenceBatch) -> tuple[PoolState, SequenceBatch]:
    """Makes the pool of a plan, and the sequences that run on it.

    Args:
      plan: of M blocks.
      batch: empty, and wide enough.
    """
    num_blocks = plan.report.num_blocks
    columns = np.full(batch.block_tables.shape, num_blocks, np.int32)
    tokens, counts = np.zeros((2, columns.shape[1]), np.int32)
    for row, table in plan.tables.items():
        columns[0, row, : len(table)] = table
        tokens[row], counts[row] = plan.lengths[row], len(table)
    holders = np.bincount(columns.ravel(), minlength=num_blocks + 1)[:num_blocks].astype(np.int32)
    findable, keys = np.zeros((num_blocks,), np.bool_), np.zeros((num_blocks, KEY_WORDS), np.uint32)
    for block in plan.residents:
        findable[block.block_id] = True
        keys[block.block_id, :4] = np.frombuffer(block.record.key.sequence_hash, "<u4")
    order, stack = np.full((2, num_blocks), num_blocks, np.int32)
    order[: len(plan.inactive)] = plan.inactive
    free = np.flatnonzero((holders == 0) & ~findable)[::-1]
    stack[: len(free)] = free
    generations = np.zeros((num_blocks,), np.uint32)
    parts = jax.device_put(
        (holders, generations, stack, np.int32(len(free)), keys, findable, order, columns, tokens, counts), cpu_device()
    )

    def attempt(seed: np.uint32) -> tuple[PoolState, bool]:
        state, left = _assemble(PoolParts(*parts[:7]), seed)
        return state, int(left) == 0

    state = try_seeds(attempt, first=0)
    return state, replace(batch, block_tables=parts[7], lengths=parts[8], num_blocks=parts[9])


def _cached(
    residents: Iterable[Resident], ranks: Mapping[int, int], size: int, hasher: Hasher
) -> dict[BlockKey, _Cached]:
    """Every whole new block of the chains that are cached from their first block on."""
    children: dict[bytes | None, list[Resident]] = defaultdict(list)
    for block in residents:
        children[block.record.parent_hash].append(block)
    found: dict[BlockKey, _Cached] = {}
    # The chain down to the block at hand: tokens, their slots, their inputs, and the hashes of its new blocks.
    tokens: list[int] = []
    slots: list[int] = []
    inputs: list[tuple[int, bytes]] = []
    hashes: list[NDArray[np.uint32]] = []
    ahead = [(block, 0) for block in children[None]]
    while ahead:
        block, first = ahead.pop()
        del tokens[first:], slots[first:], hashes[first // hasher.block_size :]
        inputs = [(at, content) for at, content in inputs if at < first]
        tokens += block.record.token_ids
        slots += range(block.block_id * size, (block.block_id + 1) * size)
        inputs += [(first + offset, content) for offset, content in block.multimodal]
        rank = ranks.get(block.block_id, len(ranks))  # what is held is the most recent
        for depth in range(len(hashes), len(tokens) // hasher.block_size):
            span = slice(depth * hasher.block_size, (depth + 1) * hasher.block_size)
            here = _within(inputs, span)
            parent = hashes[-1] if hashes else None
            hashes.append(hasher(tokens[span], block.salt, block.record.lora_name, here, parent)[0])
            record = BlockRecord(
                BlockKey(hash_bytes(hashes[-1])),
                None if parent is None else hash_bytes(parent),
                tuple(tokens[span]),
                block.record.lora_name,
            )
            known = found.get(record.key)
            if known is None or known.rank < rank:
                found[record.key] = _Cached(Resident(-1, record, block.salt, here), tuple(slots[span]), rank, depth)
        ahead += [(child, len(tokens)) for child in children[block.record.key.sequence_hash]]
    return found


def _names(one: Running, size: int, hasher: Hasher) -> list[BlockKey | tuple[int, ...]]:
    """The new blocks of a running sequence: keys of those that are registered, then the slots of its own ones."""
    seq = one.seq
    whole = seq.num_registered * size // hasher.block_size
    end = whole * hasher.block_size
    inputs = _within(seq.multimodal, slice(0, end))
    hashes = hasher(seq.tokens[:end], seq.salt, seq.lora_name, inputs)
    position = np.arange(end, one.length)
    slots = (one.table[position // size] * size + position % size).tolist()
    own = [tuple(slots[first : first + hasher.block_size]) for first in range(0, len(slots), hasher.block_size)]
    return [*block_keys(hashes), *own]


def _within(inputs: Multimodal, span: slice) -> tuple[tuple[int, bytes], ...]:
    """The inputs at positions within a span, which they are then counted from."""
    return tuple((at - span.start, content) for at, content in inputs if span.start <= at < span.stop)


_assemble = jax.jit(assemble)
