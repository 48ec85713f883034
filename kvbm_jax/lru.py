"""The inactive queue: exact least-recently-released order, without linked lists.

A ring of positions that only grow. A block that becomes inactive is pushed at the tail; one that is hit again is
removed wherever it stands, which leaves a hole; eviction pops the first live entries after the head. What makes the
holes cheap is a tree over the ring: a bit per position, and above it how many are set below each node, with eight
children each. Popping n blocks finds their positions by rank, down the tree, in fixed-size work that does not depend on
how many holes lie between.

      head                                       tail
       v                                          v
  ... | . | a | . | . | b | c | . | d | . | e | f |   .  = hole (hit again, or popped)
           ^ popped first                       ^ pushed last

The ring has room for at least as many pushes as the pool has blocks before its owner must call `compact`, which
closes the holes; a push without room is refused, never lost.

Axes: N blocks, R ring entries (a power of two), M entries of one call.
"""

from dataclasses import dataclass, replace
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvbm_jax import selection
from kvbm_jax.bits import WORD, last_of, select_bit
from kvbm_jax.ordering import fence
from kvbm_jax.padding import CLIP, DROP, FILL

__all__ = [
    "LruQueue",
    "Marks",
    "compact",
    "first_occurrence",
    "init",
    "last_occurrence",
    "live",
    "mark",
    "order",
    "pop",
    "pop_lowest",
    "push",
    "remove",
    "room",
    "settle",
    "tree_of",
]

_FAN: Final = 8  # children of a node
_MOST_ROOTS: Final = 32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LruQueue:
    """Blocks in the order of their release.

    `head`, `tail` and `positions` count pushes modulo 2**32; only differences and low bits are ever used.
    """

    ring: jax.Array  # i32[R]: the block pushed at each position
    tree: tuple[jax.Array, ...]  # u32[8] to u32[32] live entries under each root, 8 times as many below, ..., last
    # u32[R / 32] words of bits, set while an entry is in the queue
    positions: jax.Array  # u32[N]: position of a queued block; scratch for `last_occurrence` otherwise
    head: jax.Array  # u32[]: no live entry lies before it
    tail: jax.Array  # u32[]: position of the next push
    size: jax.Array  # i32[]: live entries


def init(num_blocks: int) -> LruQueue:
    """Returns an empty queue for `num_blocks` blocks."""
    capacity = _FAN * _FAN * WORD
    while capacity < 2 * num_blocks + _FAN * WORD:
        capacity *= 2
    return LruQueue(
        ring=jnp.full((capacity,), num_blocks, jnp.int32),
        tree=_empty_tree(capacity),
        positions=jnp.zeros((num_blocks,), jnp.uint32),
        head=jnp.zeros((), jnp.uint32),
        tail=jnp.zeros((), jnp.uint32),
        size=jnp.zeros((), jnp.int32),
    )


def room(queue: LruQueue) -> jax.Array:
    """Returns how many entries may be pushed before `compact` is due, i32[].

    What lies under the root that the head lies under is never entered from behind, so that it is in queue order.
    """
    capacity = queue.ring.shape[0]
    shift = _shift(queue.tree[0], capacity)
    span = queue.tail - (queue.head >> shift << shift)
    return jnp.int32(capacity) - span.astype(jnp.int32)


def last_occurrence(queue: LruQueue, blocks: jax.Array, mask: jax.Array) -> tuple[LruQueue, jax.Array]:
    """Marks, for each block that occurs under the mask, its last occurrence.

    Uses the `positions` of these blocks as scratch: none of them may be queued.

    Args:
      queue: the queue.
      blocks: i32[M], blocks that are not queued; repeats allowed.
      mask: bool[M].

    Returns:
      The queue with scratched positions, and bool[M].
    """
    return _greatest(queue, blocks, mask, jnp.arange(1, blocks.shape[0] + 1, dtype=jnp.uint32))


def first_occurrence(queue: LruQueue, blocks: jax.Array, mask: jax.Array) -> tuple[LruQueue, jax.Array]:
    """Marks the first occurrence of each block, and is otherwise like `last_occurrence`."""
    return _greatest(queue, blocks, mask, jnp.arange(blocks.shape[0], 0, -1, dtype=jnp.uint32))


def _greatest(queue: LruQueue, blocks: jax.Array, mask: jax.Array, order: jax.Array) -> tuple[LruQueue, jax.Array]:
    """Marks the masked occurrence of each block that has the greatest number of distinct positive u32[M]."""
    index = jnp.where(mask, blocks, queue.positions.shape[0])
    positions = queue.positions.at[index].set(0, **DROP).at[index].max(order, **DROP)
    found = mask & (positions.at[index].get(**FILL, fill_value=0) == order)
    positions, found = fence((positions, found))
    return replace(queue, positions=positions), found


def push(queue: LruQueue, blocks: jax.Array, mask: jax.Array) -> LruQueue:
    """Appends the masked blocks in their order.

    Args:
      queue: the queue; `room(queue)` must be at least the number of masked blocks.
      blocks: i32[M], distinct and not queued where masked.
      mask: bool[M].

    Returns:
      The queue with the blocks at its tail.
    """
    none = jnp.zeros((0,), jnp.int32)
    marks = Marks(mask, jnp.zeros((0,), jnp.bool_), jnp.zeros((0,), jnp.uint32))
    return settle(queue, marks, blocks, mask, jnp.cumsum(mask, dtype=jnp.int32), none, marks.once)


def remove(queue: LruQueue, blocks: jax.Array, mask: jax.Array) -> LruQueue:
    """Takes blocks out of the queue, wherever they stand.

    Args:
      queue: the queue.
      blocks: i32[M], queued where masked; repeats allowed.
      mask: bool[M].

    Returns:
      The queue without them.
    """
    capacity = queue.ring.shape[0]
    queue, marks = mark(queue, jnp.zeros((0,), jnp.int32), blocks, mask)
    entry = jnp.where(marks.once, (marks.positions & jnp.uint32(capacity - 1)).astype(jnp.int32), capacity)
    return replace(
        queue,
        tree=_flip(queue.tree, entry, -1, capacity=capacity),
        size=queue.size - jnp.sum(marks.once, dtype=jnp.int32),
    )


class Marks(NamedTuple):
    """What `mark` finds out about blocks for `settle`."""

    last: jax.Array  # bool[K]: the last occurrence of a block that is left
    once: jax.Array  # bool[L]: one occurrence of each idle block that is taken
    positions: jax.Array  # u32[L]: where the idle ones stand


def mark(queue: LruQueue, left: jax.Array, taken: jax.Array, idle: jax.Array) -> tuple[LruQueue, Marks]:
    """Begins to append some blocks and to take out others; `settle` ends it, and nothing may come between them.

    Args:
      queue: the queue.
      left: i32[K] blocks that are not queued, padded with N; repeats allowed.
      taken: i32[L] blocks; repeats allowed.
      idle: bool[L], which of them are queued.
    """
    count = left.shape[0]
    position = queue.positions.at[taken].get(**FILL, fill_value=0)
    # The positions are read before they turn into scratch; without the barrier XLA copies the whole array.
    positions, position = fence((queue.positions, position))
    known = left < queue.positions.shape[0]
    queue, once = last_occurrence(
        replace(queue, positions=positions), jnp.concatenate([left, taken]), jnp.concatenate([known, idle])
    )
    return queue, Marks(once[:count], once[count:], position)


def settle(
    queue: LruQueue,
    marks: Marks,
    left: jax.Array,
    pushed: jax.Array,
    rank: jax.Array,
    taken: jax.Array,
    gone: jax.Array,
) -> LruQueue:
    """Appends and takes out blocks that were marked.

    Args:
      queue: as `mark` returned it; `room(queue)` must suffice for what is appended.
      marks: likewise.
      left: i32[K] as marked.
      pushed: bool[K], of `marks.last`, which to append, in this order.
      rank: i32[K], how many are appended up to and with each.
      taken: i32[L] as marked.
      gone: bool[L], of `marks.once`, which to take out; the others stay where they are.
    """
    num_blocks, capacity = queue.positions.shape[0], queue.ring.shape[0]
    total = last_of(rank)
    target = queue.tail + (rank - 1).astype(jnp.uint32)
    mask = jnp.uint32(capacity - 1)
    entry = jnp.where(pushed, (target & mask).astype(jnp.int32), capacity)
    hole = jnp.where(gone, (marks.positions & mask).astype(jnp.int32), capacity)
    sign = np.repeat(np.array([1, -1], np.int32), (entry.size, hole.size))
    # The marks have overwritten the positions of those that stay.
    placed = jnp.concatenate([jnp.where(pushed, left, num_blocks), jnp.where(marks.once & ~gone, taken, num_blocks)])
    return replace(
        queue,
        tree=_flip(queue.tree, jnp.concatenate([entry, hole]), sign, capacity=capacity),
        ring=queue.ring.at[entry].set(left, **DROP),
        positions=queue.positions.at[placed].set(jnp.concatenate([target, marks.positions]), **DROP),
        tail=queue.tail + total.astype(jnp.uint32),
        size=queue.size + total - jnp.sum(gone, dtype=jnp.int32),
    )


def pop(queue: LruQueue, count: jax.Array, *, max_count: int) -> tuple[LruQueue, jax.Array]:
    """Takes the `count` least recently released blocks.

    Args:
      queue: the queue; `count` must not exceed its size.
      count: i32[].
      max_count: static bound of `count`; sets the cost, which grows with the logarithm of the pool.

    Returns:
      The queue, and i32[max_count] blocks in queue order, padded with N.
    """
    num_blocks, capacity = queue.positions.shape[0], queue.ring.shape[0]
    roots, *inner, words = queue.tree
    head = (queue.head & jnp.uint32(capacity - 1)).astype(jnp.int32)
    rank = jnp.arange(max_count, dtype=jnp.int32)
    taken = rank < count
    # The roots are a ring too, in which the head's comes first.
    shift = _shift(roots, capacity)
    first = head >> shift
    order = (first + jnp.arange(roots.size, dtype=jnp.int32)) % roots.size
    child, rank = _descend(fence(roots[order])[None, :], rank)
    # A node and a rank under it are one number: where the entry would stand, were there no holes.
    place = fence(((first + child) % roots.size << shift) + rank)
    for level in (*inner, words):
        node, rank = place >> shift, place & ((1 << shift) - 1)
        children = fence(level.reshape(-1, _FAN)[node])
        shift = _shift(level, capacity)
        child, rank = _descend(jax.lax.population_count(children) if level is words else children, rank)
        place = fence((node * _FAN + child << shift) + rank)
    entry = (place & -WORD) + select_bit(fence(words[place // WORD]), place % WORD)
    entry = fence(jnp.where(taken, entry, capacity))
    blocks = queue.ring.at[entry].get(**FILL, fill_value=num_blocks)
    last = entry.at[jnp.maximum(count - 1, 0)].get(**CLIP)
    advance = ((last - head) % capacity + 1).astype(jnp.uint32)
    tree, entry = fence((queue.tree, entry))
    return (
        replace(
            queue,
            tree=_flip(tree, entry, -1, capacity=capacity),
            head=jnp.where(count > 0, queue.head + advance, queue.head),
            size=queue.size - count.astype(jnp.int32),
        ),
        blocks,
    )


def pop_lowest(
    queue: LruQueue, queued: jax.Array, scores: jax.Array, count: jax.Array, *, max_count: int
) -> tuple[LruQueue, jax.Array]:
    """Takes the `count` blocks of the lowest scores, among equals the least recently released.

    Costs 32 (W + 1) passes over the blocks, and a sort of what is taken.

    Args:
      queue: the queue; `count` must not exceed its size.
      queued: bool[N], the blocks that are in it.
      scores: u32[W, N], words of each block's score, the most significant first.
      count: i32[].
      max_count: static bound of `count`.

    Returns:
      The queue, and i32[max_count] blocks, the lowest first, padded with N.
    """
    blocks = selection.lowest([*scores, order(queue)], queued, count, max_count=max_count)
    return remove(queue, blocks, blocks < queue.positions.shape[0]), blocks


def order(queue: LruQueue) -> jax.Array:
    """Returns where each queued block stands, u32[N]: less was released earlier; other blocks have any value."""
    return queue.positions - queue.head


def live(queue: LruQueue) -> jax.Array:
    """Tells which entries of the ring are in the queue, bool[R]."""
    bits = queue.tree[-1][:, None] >> jnp.arange(WORD, dtype=jnp.uint32)[None, :] & 1
    return bits.reshape(-1) == 1


def tree_of(entries: jax.Array) -> tuple[jax.Array, ...]:
    """Returns the tree over bool[R], the entries that are in the queue."""
    capacity = entries.size
    place = jnp.arange(capacity, dtype=jnp.int32)
    return _flip(_empty_tree(capacity), jnp.where(entries, place, capacity), 1, capacity=capacity)


def compact(queue: LruQueue) -> LruQueue:
    """Closes the holes, so that there is room for at least N pushes again.

    Costs work in proportion to the ring: a call of its own, made between steps.
    """
    num_blocks, capacity = queue.positions.shape[0], queue.ring.shape[0]
    offset = jnp.arange(capacity, dtype=jnp.uint32)
    entry = ((queue.head + offset) & jnp.uint32(capacity - 1)).astype(jnp.int32)
    shift = _shift(queue.tree[0], capacity)
    # There may be entries before the head under its root; they are dead, and so are those past the tail.
    alive = live(queue)[entry]
    rank = jnp.cumsum(alive, dtype=jnp.int32) - 1
    blocks = queue.ring[entry]
    start = queue.head + jnp.uint32((1 << shift) - 1) >> shift << shift
    position = start + rank.astype(jnp.uint32)
    target = jnp.where(alive, (position & jnp.uint32(capacity - 1)).astype(jnp.int32), capacity)
    return replace(
        queue,
        ring=jnp.full_like(queue.ring, num_blocks).at[target].set(blocks, **DROP),
        tree=_flip(_empty_tree(capacity), target, 1, capacity=capacity),
        positions=queue.positions.at[jnp.where(alive, blocks, num_blocks)].set(position, **DROP),
        head=start,
        tail=start + queue.size.astype(jnp.uint32),
    )


def _flip(
    tree: tuple[jax.Array, ...], entry: jax.Array, sign: NDArray[np.int32] | int, *, capacity: int
) -> tuple[jax.Array, ...]:
    """Sets (`sign` 1) or clears (-1) the bits of distinct ring entries i32[M], padded with R."""
    *counts, words = tree
    entry = fence(entry)
    signs = jnp.asarray(sign).astype(jnp.uint32)
    bit = jnp.uint32(1) << (entry % WORD).astype(jnp.uint32)
    return (
        *(level.at[entry >> _shift(level, capacity)].add(signs, **DROP) for level in counts),
        words.at[entry // WORD].add(bit * signs, **DROP),
    )


def _empty_tree(capacity: int) -> tuple[jax.Array, ...]:
    sizes = [capacity // WORD]
    while sizes[0] > _MOST_ROOTS:
        sizes.insert(0, sizes[0] // _FAN)
    return tuple(jnp.zeros((size,), jnp.uint32) for size in sizes)


def _shift(level: jax.Array, capacity: int) -> int:
    """log2 of how many entries lie under a node of that level."""
    return (capacity // level.size).bit_length() - 1


def _descend(counts: jax.Array, rank: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Finds the child under which the entry of each rank i32[M] lies, and its rank there; counts are u32[M or 1, K]."""
    child, before, end = jnp.zeros_like(rank), jnp.zeros_like(rank), jnp.zeros_like(rank)
    for i in range(counts.shape[1] - 1):  # unrolled: XLA's loops over a short axis are slow
        end = end + counts[:, i].astype(jnp.int32)
        passed = end <= rank
        child = child + passed
        before = jnp.where(passed, end, before)
    return child, rank - before
