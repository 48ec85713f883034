"""The inactive queue: exact least-recently-released order, without linked lists.

A ring of positions that only grow. A block that becomes inactive is pushed at the tail; one that is hit again is
removed wherever it stands, which leaves a hole; eviction pops the first live entries after the head. What makes the
holes cheap is a bit per position and a count per group of 1,024 positions: popping n blocks finds their positions by
rank, in fixed-size work that does not depend on how many holes lie between.

      head                                       tail
       v                                          v
  ... | . | a | . | . | b | c | . | d | . | e | f |   .  = hole (hit again, or popped)
           ^ popped first                       ^ pushed last

The ring has room for at least as many pushes as the pool has blocks before its owner must call `compact`, which
closes the holes; a push without room is refused, never lost.

Axes: N blocks, R ring entries (a power of two), G groups of 1,024 entries, M entries of one call.
"""

from dataclasses import dataclass, replace
from typing import Final

import jax
import jax.numpy as jnp

from kvbm_jax import selection
from kvbm_jax.ordering import fence

__all__ = [
    "LruQueue",
    "compact",
    "init",
    "last_occurrence",
    "move",
    "order",
    "pop",
    "pop_lowest",
    "push",
    "remove",
    "room",
]

_WORD: Final = 32
_GROUP: Final = 1024
_WORDS_PER_GROUP: Final = _GROUP // _WORD


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LruQueue:
    """Blocks in the order of their release.

    `head`, `tail` and `positions` count pushes modulo 2**32; only differences and low bits are ever used.
    """

    ring: jax.Array  # i32[R]: the block pushed at each position
    live: jax.Array  # u32[G, 32]: one bit per position, set while its entry is in the queue
    counts: jax.Array  # i32[G]: live entries of each group
    positions: jax.Array  # u32[N]: position of a queued block; scratch for `last_occurrence` otherwise
    head: jax.Array  # u32[]: no live entry lies before it
    tail: jax.Array  # u32[]: position of the next push
    size: jax.Array  # i32[]: live entries


def init(num_blocks: int) -> LruQueue:
    """Returns an empty queue for `num_blocks` blocks."""
    capacity = 2 * _GROUP
    while capacity < 2 * num_blocks + _GROUP:
        capacity *= 2
    return LruQueue(
        ring=jnp.full((capacity,), num_blocks, jnp.int32),
        live=jnp.zeros((capacity // _GROUP, _WORDS_PER_GROUP), jnp.uint32),
        counts=jnp.zeros((capacity // _GROUP,), jnp.int32),
        positions=jnp.zeros((num_blocks,), jnp.uint32),
        head=jnp.zeros((), jnp.uint32),
        tail=jnp.zeros((), jnp.uint32),
        size=jnp.zeros((), jnp.int32),
    )


def room(queue: LruQueue) -> jax.Array:
    """Returns how many entries may be pushed before `compact` is due, i32[].

    The group that the head lies in is never entered from behind, so that a group's bits are in queue order.
    """
    capacity = queue.ring.shape[0]
    span = queue.tail - (queue.head & jnp.uint32(0xFFFFFFFF ^ (_GROUP - 1)))
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
    num_blocks = queue.positions.shape[0]
    index = jnp.where(mask, blocks, num_blocks)
    order = jnp.arange(1, blocks.shape[0] + 1, dtype=jnp.uint32)
    positions = queue.positions.at[index].set(0, mode="drop").at[index].max(order, mode="drop")
    last = mask & (positions.at[index].get(mode="fill", fill_value=0) == order)
    positions, last = fence((positions, last))
    return replace(queue, positions=positions), last


def push(queue: LruQueue, blocks: jax.Array, mask: jax.Array) -> LruQueue:
    """Appends the masked blocks in their order.

    Args:
      queue: the queue; `room(queue)` must be at least the number of masked blocks.
      blocks: i32[M], distinct and not queued where masked.
      mask: bool[M].

    Returns:
      The queue with the blocks at its tail.
    """
    num_blocks, capacity = queue.positions.shape[0], queue.ring.shape[0]
    rank = jnp.cumsum(mask, dtype=jnp.int32)
    position = queue.tail + (rank - 1).astype(jnp.uint32)
    entry = jnp.where(mask, (position & jnp.uint32(capacity - 1)).astype(jnp.int32), capacity)
    pushed = rank[-1]
    return replace(
        _flip(queue, entry, 1),
        ring=queue.ring.at[entry].set(blocks, mode="drop"),
        positions=queue.positions.at[jnp.where(mask, blocks, num_blocks)].set(position, mode="drop"),
        tail=queue.tail + pushed.astype(jnp.uint32),
        size=queue.size + pushed,
    )


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
    position = queue.positions.at[blocks].get(mode="fill", fill_value=0)
    # The positions are read before they turn into scratch; without the barrier XLA copies the whole array.
    positions, position = fence((queue.positions, position))
    queue, once = last_occurrence(replace(queue, positions=positions), blocks, mask)
    entry = jnp.where(once, (position & jnp.uint32(capacity - 1)).astype(jnp.int32), capacity)
    return replace(_flip(queue, entry, -1), size=queue.size - jnp.sum(once, dtype=jnp.int32))


def move(
    queue: LruQueue, left: jax.Array, free: jax.Array, wanted: jax.Array, taken: jax.Array, idle: jax.Array
) -> tuple[LruQueue, jax.Array]:
    """Takes blocks out like `remove` and appends others like `push`, in one go.

    Args:
      queue: the queue; `room(queue)` must suffice for what is appended.
      left: i32[K] blocks, repeats allowed.
      free: bool[K], which of them nobody holds any more; not queued.
      wanted: bool[K], which of those are appended, each where it is named last.
      taken: i32[L] blocks, repeats allowed.
      idle: bool[L], which of them are queued and taken out; none of them is free.

    Returns:
      The queue, and bool[K], the last occurrence of each free block, appended or not.
    """
    num_blocks, capacity = queue.positions.shape[0], queue.ring.shape[0]
    count = left.shape[0]
    position = queue.positions.at[taken].get(mode="fill", fill_value=0)
    positions, position = fence((queue.positions, position))
    queue, once = last_occurrence(
        replace(queue, positions=positions), jnp.concatenate([left, taken]), jnp.concatenate([free, idle])
    )
    last, gone = once[:count], once[count:]
    pushed = last & wanted
    rank = jnp.cumsum(pushed, dtype=jnp.int32)
    total = jnp.sum(pushed, dtype=jnp.int32)
    target = queue.tail + (rank - 1).astype(jnp.uint32)
    mask = jnp.uint32(capacity - 1)
    entry = jnp.where(pushed, (target & mask).astype(jnp.int32), capacity)
    hole = jnp.where(gone, (position & mask).astype(jnp.int32), capacity)
    sign = jnp.where(jnp.arange(once.shape[0]) < count, 1, -1)
    return (
        replace(
            _flip(queue, jnp.concatenate([entry, hole]), sign),
            ring=queue.ring.at[entry].set(left, mode="drop"),
            positions=queue.positions.at[jnp.where(pushed, left, num_blocks)].set(target, mode="drop"),
            tail=queue.tail + total.astype(jnp.uint32),
            size=queue.size + total - jnp.sum(gone, dtype=jnp.int32),
        ),
        last,
    )


def pop(queue: LruQueue, count: jax.Array, *, max_count: int) -> tuple[LruQueue, jax.Array]:
    """Takes the `count` least recently released blocks.

    Args:
      queue: the queue; `count` must not exceed its size.
      count: i32[].
      max_count: static bound of `count`; sets the cost, which does not grow with the pool beyond the sum over the
        group counts (N / 512 integers).

    Returns:
      The queue, and i32[max_count] blocks in queue order, padded with N.
    """
    num_blocks, capacity = queue.positions.shape[0], queue.ring.shape[0]
    num_groups = queue.counts.shape[0]
    head = (queue.head & jnp.uint32(capacity - 1)).astype(jnp.int32)
    groups = (head // _GROUP + jnp.arange(num_groups, dtype=jnp.int32)) % num_groups
    counts = queue.counts[groups]
    ends = jnp.cumsum(counts, dtype=jnp.int32)

    rank = jnp.arange(max_count, dtype=jnp.int32)
    taken = rank < count
    # How many groups end at or before each rank: a histogram and its sum, since the ranks are consecutive.
    nth = jnp.cumsum(jnp.zeros((max_count,), jnp.int32).at[ends].add(1, mode="drop"), dtype=jnp.int32)
    group = fence(groups.at[nth].get(mode="clip"))
    rank = rank - (ends - counts).at[nth].get(mode="clip")
    words = queue.live[group]
    # Sums of at most 1,024 are exact in float32.
    upper = jnp.triu(jnp.ones((_WORDS_PER_GROUP, _WORDS_PER_GROUP), jnp.float32))
    bits_set = jax.lax.population_count(words).astype(jnp.float32)
    word_ends = jnp.matmul(bits_set, upper, precision=jax.lax.Precision.HIGHEST).astype(jnp.int32)
    word = jnp.sum(word_ends <= rank[:, None], axis=1, dtype=jnp.int32)
    before = jnp.take_along_axis(word_ends, jnp.maximum(word - 1, 0)[:, None], axis=1, mode="clip")[:, 0]
    rank = rank - jnp.where(word > 0, before, 0)
    bits = jnp.take_along_axis(words, word[:, None], axis=1, mode="clip")[:, 0]
    entry = group * _GROUP + word * _WORD + _select_bit(bits, rank)
    entry = fence(jnp.where(taken, entry, capacity))
    blocks = queue.ring.at[entry].get(mode="fill", fill_value=num_blocks)
    last = entry.at[jnp.maximum(count - 1, 0)].get(mode="clip")
    advance = ((last - head) % capacity + 1).astype(jnp.uint32)
    live_ring = fence((queue.live, queue.counts, words))
    queue = _flip(replace(queue, live=live_ring[0], counts=live_ring[1]), entry, -1)
    return (
        replace(
            queue,
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


def compact(queue: LruQueue) -> LruQueue:
    """Closes the holes, so that there is room for at least N pushes again.

    Costs work in proportion to the ring: a call of its own, made between steps.
    """
    num_blocks, capacity = queue.positions.shape[0], queue.ring.shape[0]
    offset = jnp.arange(capacity, dtype=jnp.uint32)
    entry = ((queue.head + offset) & jnp.uint32(capacity - 1)).astype(jnp.int32)
    live = (queue.live.reshape(-1)[entry // _WORD] >> (entry % _WORD).astype(jnp.uint32)) & 1
    # The head's group may hold entries before the head; they are dead, and so are those past the tail.
    alive = live == 1
    rank = jnp.cumsum(alive, dtype=jnp.int32) - 1
    blocks = queue.ring[entry]
    start = queue.head + jnp.uint32(_GROUP - 1) & jnp.uint32(0xFFFFFFFF ^ (_GROUP - 1))
    position = start + rank.astype(jnp.uint32)
    target = jnp.where(alive, (position & jnp.uint32(capacity - 1)).astype(jnp.int32), capacity)
    empty = replace(
        queue,
        ring=jnp.full_like(queue.ring, num_blocks).at[target].set(blocks, mode="drop"),
        live=jnp.zeros_like(queue.live),
        counts=jnp.zeros_like(queue.counts),
        positions=queue.positions.at[jnp.where(alive, blocks, num_blocks)].set(position, mode="drop"),
        head=start,
        tail=start + queue.size.astype(jnp.uint32),
    )
    return _flip(empty, target, 1)


def _flip(queue: LruQueue, entry: jax.Array, sign: jax.Array | int) -> LruQueue:
    """Sets (`sign` 1) or clears (-1) the bits of distinct ring entries i32[M], padded with R."""
    entry = fence(entry)
    bit = jnp.uint32(1) << (entry % _WORD).astype(jnp.uint32)
    change = bit * jnp.asarray(sign).astype(jnp.uint32)
    return replace(
        queue,
        live=queue.live.reshape(-1).at[entry // _WORD].add(change, mode="drop").reshape(queue.live.shape),
        counts=queue.counts.at[entry // _GROUP].add(sign, mode="drop"),
    )


def _select_bit(word: jax.Array, rank: jax.Array) -> jax.Array:
    """Returns the place, i32[M], of the bit of u32[M] words that has `rank` set bits below it."""
    place = jnp.zeros_like(rank)
    for width in (16, 8, 4, 2, 1):
        low = word & jnp.uint32((1 << width) - 1)
        below = jax.lax.population_count(low).astype(jnp.int32)
        upper = rank >= below
        word = jnp.where(upper, word >> width, low)
        rank = jnp.where(upper, rank - below, rank)
        place = place + jnp.where(upper, width, 0)
    return place
