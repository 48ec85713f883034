"""Eviction policies: which cached block goes first, as pure functions over a pytree of the policy's own.

A policy is a NamedTuple of functions, as in optax. Its memory (what `init` returns) is carried beside the pool:

    policy = policies.tiny_lfu()
    memory = policy.init(num_blocks)

    state, running, began = sequences.start(state, running, ..., scores=policies.bind(policy, memory))
    memory = policies.note_hits(policy, memory, state, running, rows, began.num_cached)
    ...
    state, running, done = sequences.register(state, running, ...)
    memory = policies.note_registered(policy, memory, state, running, ...)

Every verb that may evict takes `scores`; it calls them when it evicts, so that they see the pool as it is then. What
one call registers or hits counts from the next call on. Policies decide which inactive block goes; that reset blocks
are granted before any is evicted, and that held blocks stay, is the pool's rule.

A memory belongs to one pool. It needs no word of evictions: it goes by the pool's generations, or is written anew when
a block is registered. A pool of another size (`kvbm_jax.resize`) takes its memory along by `resized`.

Axes: N blocks, M blocks after a resize, F blocks of one call, G groups, R rows of one call, P completed blocks, W
blocks of a table, T tokens of a block.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp

from kvbm_jax import index as block_index
from kvbm_jax import lru as queue
from kvbm_jax import pool, selection, sequences, sketch
from kvbm_jax.errors import ConfigError, LayoutError
from kvbm_jax.ordering import fence
from kvbm_jax.padding import DROP, FILL

__all__ = [
    "NAMES",
    "BlockView",
    "EvictionPolicy",
    "Lineage",
    "Registered",
    "Resized",
    "ScoreFunction",
    "Usage",
    "as_policy",
    "bind",
    "check_priority",
    "lineage",
    "lru",
    "named",
    "note_hits",
    "note_registered",
    "priority",
    "scored",
    "tiny_lfu",
]

NAMES: Final = ("lru", "lineage", "priority", "tiny_lfu")
"""What `named` knows."""

_HELD: Final = 0xFFFFFFFF  # where a held block stands: behind every place in the queue


class Registered(NamedTuple):
    """Blocks that have become findable."""

    block_ids: jax.Array  # i32[F], distinct, padded with N
    parents: jax.Array  # i32[F]: the block before each in its sequence, N if it is the first
    depths: jax.Array  # i32[F]: place of each in its sequence, 0 for the first
    priorities: jax.Array  # u32[F]: the caller's; only policies that use them ask for a meaning


class Resized(NamedTuple):
    """A pool that has taken another size."""

    before: pool.PoolState  # of N blocks, as it was before anything was evicted for it
    after: pool.PoolState  # of M blocks
    new_ids: jax.Array  # i32[N]: what each block is called now, M where it is gone
    sources: jax.Array  # i32[M]: what each block was called before, N where it holds nothing


class EvictionPolicy(NamedTuple):
    """What decides which inactive block is evicted first. Memories are pytrees of arrays, and functions are pure."""

    init: Callable[[int], Any]
    """The memory for a pool of so many blocks."""
    registered: Callable[[Any, pool.PoolState, Registered], Any]
    """The memory after blocks were registered; the pool holds them already."""
    hit: Callable[[Any, pool.PoolState, jax.Array], Any]
    """The memory after the blocks i32[F], padded with N, were found and acquired; repeats count."""
    scores: Callable[[Any, pool.PoolState], jax.Array] | None
    """Scores as `pool.Scores` returns them, lowest first; None for the queue's own order, which needs no memory."""
    resized: Callable[[Any, Resized], Any] | None = None
    """The memory after the pool has taken another size; None to begin anew."""


def bind(policy: EvictionPolicy, memory: Any) -> pool.Scores | None:
    """Returns what verbs take as `scores`."""
    scores = policy.scores
    return None if scores is None else lambda state: scores(memory, state)


def note_hits(
    policy: EvictionPolicy,
    memory: Any,
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    rows: jax.Array,
    num_cached: jax.Array,
) -> Any:
    """Tells a policy of the prefixes that `sequences.start` or `step` found.

    Args:
      policy: the policy.
      memory: its memory.
      state: the pool after the call.
      running: the batch after it.
      rows: i32[R] rows that began, B for padding.
      num_cached: i32[R] tokens that were found for each.

    Returns:
      The memory.
    """
    if policy.scores is None:
        return memory
    width = running.block_tables.shape[2]
    tables = running.block_tables.at[:, rows].get(**FILL, fill_value=running.pool_blocks)
    found = jnp.arange(width, dtype=jnp.int32)[None, :] < (num_cached // running.block_size)[:, None]
    return policy.hit(memory, state, jnp.where(found[None], tables, running.pool_blocks).reshape(-1))


def note_registered(
    policy: EvictionPolicy,
    memory: Any,
    state: pool.PoolState,
    running: sequences.SequenceBatch,
    rows: jax.Array,
    places: jax.Array,
    registered: jax.Array,
    priorities: jax.Array | None = None,
) -> Any:
    """Tells a policy of the blocks that `sequences.register` or `step` made findable.

    Args:
      policy: the policy.
      memory: its memory.
      state: the pool after the call.
      running: the batch after it.
      rows: i32[P] row of each completed block, B for padding.
      places: i32[P] its index in the row's table.
      registered: bool[G, P], as the call reported it.
      priorities: u32[P], 0 if None.

    Returns:
      The memory.
    """
    if policy.scores is None:
        return memory
    none = running.pool_blocks
    blocks = running.block_tables.at[:, rows, places].get(**FILL, fill_value=none)
    before = jnp.where(places > 0, places - 1, running.block_tables.shape[2])
    parents = running.block_tables.at[:, rows, before].get(**FILL, fill_value=none)
    if priorities is None:
        priorities = jnp.zeros(places.shape, jnp.uint32)
    told = Registered(
        jnp.where(registered, blocks, none).reshape(-1),
        parents.reshape(-1),
        jnp.broadcast_to(places, blocks.shape).reshape(-1),
        jnp.broadcast_to(priorities, blocks.shape).reshape(-1),
    )
    return policy.registered(memory, state, told)


def lru() -> EvictionPolicy:
    """The least recently released block goes first: the pool's own order, which vLLM's is too.

    Costs nothing beyond the pool's queue, whose work does not grow with N. No memory.
    """
    return EvictionPolicy(
        init=lambda num_blocks: (),
        registered=lambda memory, state, told: memory,
        hit=lambda memory, state, blocks: memory,
        scores=None,
    )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Lineage:
    """What block each block follows; 16 bytes a block. A link counts while both ends are what they were."""

    parents: jax.Array  # i32[N]
    parent_generations: jax.Array  # u32[N]: generation of the parent when the link was made
    generations: jax.Array  # u32[N]: the block's own, then
    depths: jax.Array  # i32[N]


def lineage(*, max_depth: int | None = None) -> EvictionPolicy:
    """Only leaves go, blocks that no resident block follows; of these the least recently released first.

    A block outlives its cached descendants whatever the order of releases: a prefix match could not reach them without
    it. (Radix-tree caches evict so: Zheng et al., "SGLang", NeurIPS 2024, section 3.) Sequences that are released
    whole, last block first, die from their tails under `lru` too; the two differ where blocks are released one by one,
    as from under a sliding window.

    A call that evicts many takes them as if one by one, a parent becoming a leaf when its last child has gone. Blocks
    that held ones descend from go last, the deepest first, for want of any other.

    Costs, at each eviction, log2(max_depth) rounds of one gather and one scatter over N (pointer doubling), and 96
    passes over N.

    Args:
      max_depth: static bound of the blocks in a chain, N if None.
    """

    def init(num_blocks: int) -> Lineage:
        # Each array is one of its own, so that the memory can be donated.
        return Lineage(
            jnp.full((num_blocks,), num_blocks, jnp.int32),
            jnp.zeros((num_blocks,), jnp.uint32),
            jnp.zeros((num_blocks,), jnp.uint32),
            jnp.zeros((num_blocks,), jnp.int32),
        )

    def registered(memory: Lineage, state: pool.PoolState, told: Registered) -> Lineage:
        memory, blocks = _after(memory, state), told.block_ids
        return Lineage(
            memory.parents.at[blocks].set(told.parents, **DROP),
            memory.parent_generations.at[blocks].set(_generations(state, told.parents), **DROP),
            memory.generations.at[blocks].set(_generations(state, blocks), **DROP),
            memory.depths.at[blocks].set(told.depths, **DROP),
        )

    def scores(memory: Lineage, state: pool.PoolState) -> jax.Array:
        size = state.num_blocks
        known = memory.generations == state.generations
        linked = known & block_index.is_registered(state.index, jnp.arange(size))
        linked &= block_index.is_registered(state.index, memory.parents)
        linked &= _generations(state, memory.parents) == memory.parent_generations
        ancestors = jnp.where(linked, memory.parents, size)
        stands = jnp.where(pool.is_inactive(state), queue.order(state.inactive), 0)
        last = jnp.where(state.ref_counts > 0, jnp.uint32(_HELD), stands)

        def double(_: int, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            """Takes descendants twice as far away into account."""
            last, ancestors = carry
            return last.at[ancestors].max(last, **DROP), ancestors.at[ancestors].get(**FILL, fill_value=size)

        rounds = (min(max_depth or size, size) - 1).bit_length()
        last, _ = jax.lax.fori_loop(0, rounds, double, (last, ancestors))
        # Blocks that wait for the same descendant are its ancestors: a chain, of which the deepest goes first.
        depths = jnp.where(known, memory.depths, 0).astype(jnp.uint32)
        return jnp.stack([last, ~depths])

    def resized(memory: Lineage, told: Resized) -> Lineage:
        size = told.after.num_blocks
        known = memory.generations == told.before.generations
        linked = known & (_generations(told.before, memory.parents) == memory.parent_generations)
        parents = told.new_ids.at[memory.parents].get(**FILL, fill_value=size)
        parents = _moved(jnp.where(linked, parents, size), told, fill=size)
        now = told.after.generations
        return Lineage(
            parents,
            _generations(told.after, parents),
            jnp.where(_moved(known, told), now, now - 1),
            _moved(memory.depths, told),
        )

    return EvictionPolicy(init, registered, lambda memory, state, blocks: memory, scores, resized)


def priority() -> EvictionPolicy:
    """The lowest priority goes first, among equals the least recently released.

    The caller gives a priority when a block is registered; it holds until the block is evicted. The memory is u32[N].
    (TensorRT-LLM's retention priorities work so.)

    Costs 64 passes over N at each eviction.
    """

    def registered(memory: jax.Array, state: pool.PoolState, told: Registered) -> jax.Array:
        return _after(memory, state).at[told.block_ids].set(told.priorities.astype(jnp.uint32), **DROP)

    return EvictionPolicy(
        init=lambda num_blocks: jnp.zeros((num_blocks,), jnp.uint32),
        registered=registered,
        hit=lambda memory, state, blocks: memory,
        scores=lambda memory, state: memory,
        resized=_moved,
    )


def check_priority(priority: int) -> int:
    """Returns a priority as it is.

    Raises:
      ConfigError: unless it is an integer in [0, 2**32).
    """
    if not isinstance(priority, int) or not 0 <= priority < 2**32:
        raise ConfigError(f"priority is {priority!r}; it must be an integer from 0 to {2**32 - 1:,}")
    return priority


def tiny_lfu() -> EvictionPolicy:
    """The block whose key was seen least often lately goes first, among equals the least recently released.

    Frequencies are those of TinyLFU's sketch (Einziger, Friedman, Manes, 2017; see `kvbm_jax.sketch`): they count
    registrations and hits, outlive evictions, and are halved after every 10 N. Only the sketch is taken from there, not
    the filter before admission: a block that has been computed is always cached.

    Costs, at each eviction, 4 gathers over N and 64 passes over it; at each hit or registration, work in proportion to
    the blocks named and one pass over 16 N bytes or more.
    """

    def seen(memory: sketch.FrequencySketch, state: pool.PoolState, blocks: jax.Array) -> sketch.FrequencySketch:
        keys = state.index.keys.at[blocks].get(**FILL, fill_value=0)
        return sketch.add(_after(memory, state), keys, blocks < state.num_blocks)

    return EvictionPolicy(
        init=sketch.init,
        registered=lambda memory, state, told: seen(memory, state, told.block_ids),
        hit=seen,
        scores=lambda memory, state: sketch.estimate(memory, state.index.keys),
        resized=lambda memory, told: sketch.resize(memory, told.after.num_blocks),
    )


@functools.cache
def named(name: str) -> EvictionPolicy:
    """Returns the policy of a name in `NAMES`, each time the same one, so that what is jitted with it compiles once.

    Raises:
      ConfigError: if there is none.
    """
    constructors = {"lru": lru, "lineage": lineage, "priority": priority, "tiny_lfu": tiny_lfu}
    if name not in constructors:
        raise ConfigError(f"there is no eviction policy {name!r}; choose from {', '.join(NAMES)}")
    return constructors[name]()


class BlockView(NamedTuple):
    """What a score function sees of blocks."""

    uses: jax.Array  # f32[N]: registration and hits so far, 1 for a block that was never hit
    age: jax.Array  # f32[N]: how often the policy was told of any registration or hit since the block's last use
    depth: jax.Array  # f32[N]: place in its sequence, 0 for the first
    priority: jax.Array  # f32[N]: the caller's, given at registration


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Usage:
    """What `scored` remembers; 16 bytes a block."""

    uses: jax.Array  # u32[N]
    last_use: jax.Array  # u32[N]: the clock then
    depths: jax.Array  # i32[N]
    priorities: jax.Array  # u32[N]
    clock: jax.Array  # u32[]: calls so far that named a block, modulo 2**32


type ScoreFunction = Callable[[BlockView], jax.Array]
"""A pure function from a view of all blocks to numbers [N]."""


def scored(score: ScoreFunction) -> EvictionPolicy:
    """The block of the lowest score goes first, by a function of one's own; among equals the least recently released.

        policies.scored(lambda block: block.uses / (1 + block.age))

    Scores are compared as float32 or, if the function returns integers, as 32-bit integers. The two zeros are equal; a
    NaN is lower than everything else.

    Costs the function, and 64 passes over N, at each eviction.

    Args:
      score: from a view of all blocks to numbers [N].
    """

    def init(num_blocks: int) -> Usage:
        return Usage(
            jnp.zeros((num_blocks,), jnp.uint32),
            jnp.zeros((num_blocks,), jnp.uint32),
            jnp.zeros((num_blocks,), jnp.int32),
            jnp.zeros((num_blocks,), jnp.uint32),
            jnp.uint32(0),
        )

    def registered(memory: Usage, state: pool.PoolState, told: Registered) -> Usage:
        memory, blocks = _after(memory, state), told.block_ids
        clock = memory.clock + jnp.any(blocks < state.num_blocks).astype(jnp.uint32)
        return Usage(
            memory.uses.at[blocks].set(1, **DROP),
            memory.last_use.at[blocks].set(clock, **DROP),
            memory.depths.at[blocks].set(told.depths, **DROP),
            memory.priorities.at[blocks].set(told.priorities, **DROP),
            clock,
        )

    def hit(memory: Usage, state: pool.PoolState, blocks: jax.Array) -> Usage:
        memory = _after(memory, state)
        clock = memory.clock + jnp.any(blocks < state.num_blocks).astype(jnp.uint32)
        return Usage(
            memory.uses.at[blocks].add(1, **DROP),
            memory.last_use.at[blocks].set(clock, **DROP),
            memory.depths,
            memory.priorities,
            clock,
        )

    def scores(memory: Usage, state: pool.PoolState) -> jax.Array:
        parts = (memory.uses, memory.clock - memory.last_use, memory.depths, memory.priorities)
        values = score(BlockView(*(part.astype(jnp.float32) for part in parts)))
        if values.shape != memory.uses.shape:
            raise LayoutError(
                f"scores are {list(values.shape)} for {state.num_blocks} blocks; return one for each block"
            )
        return selection.ordered(values)

    def resized(memory: Usage, told: Resized) -> Usage:
        return Usage(
            _moved(memory.uses, told),
            _moved(memory.last_use, told),
            _moved(memory.depths, told),
            _moved(memory.priorities, told),
            memory.clock,
        )

    return EvictionPolicy(init, registered, hit, scores, resized)


_scored_once = functools.cache(scored)


def as_policy(choice: EvictionPolicy | ScoreFunction) -> EvictionPolicy:
    """Returns a policy as it is, and for a function its `scored` one.

    That is the same each time for the same function, and is kept, as is what is compiled with it: define a function
    once, not for each pool.

    Raises:
      ConfigError: if it is neither.
    """
    if isinstance(choice, EvictionPolicy):
        return choice
    if not callable(choice):
        raise ConfigError(f"{choice!r} is no eviction policy; give an EvictionPolicy, or a function of a BlockView")
    return _scored_once(choice)


def _after[T](memory: T, state: pool.PoolState) -> T:
    """Orders the writes to a memory after the evictions that read it; XLA would copy the buffers that both touch."""
    return fence((memory, state.ref_counts))[0]


def _moved(values: jax.Array, told: Resized, fill: int = 0) -> jax.Array:
    """What is known of blocks [N], under the ids that they have now, [M]; `fill` where there is no block."""
    return values.at[told.sources].get(**FILL, fill_value=fill)


def _generations(state: pool.PoolState, blocks: jax.Array) -> jax.Array:
    return state.generations.at[blocks].get(**FILL, fill_value=0)
