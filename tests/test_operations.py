"""Many random operations over all verbs inside one compiled loop; every law holds after each of them.

Axes: N blocks, B rows, W blocks of a table, T tokens of a block, M hashes, S slots for blocks held outside of tables.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kvbm_jax import grants, invariants, pool, sequences
from kvbm_jax.groups import Group
from kvbm_jax.step import StepPlan, step
from kvbm_jax.types import Status

pytestmark = pytest.mark.core

N, B, W, T, M, S = 40, 6, 6, 4, 5, 3
GROUPS = (Group(), Group(window=6))
CONTENTS = 7  # different prompts; they share their first block
BEFORE_WRAP = np.uint32(2**32 - 700)


class World(NamedTuple):
    """A pool, its sequences, and all that a server would know of them."""

    state: pool.PoolState
    running: sequences.SequenceBatch
    contents: jax.Array  # i32[B]: what the prompt of each row is
    slots: jax.Array  # i32[S, 2]: blocks held outside of tables, padded with N


class Draw(NamedTuple):
    """Random numbers for one operation."""

    rows: jax.Array  # i32[B]: a permutation of the rows
    numbers: jax.Array  # i32[B], each at least 0
    mask: jax.Array  # bool[B]
    slot: jax.Array  # i32[]


type Operation = Callable[[World, Draw], tuple[World, jax.Array]]


def hashes_of(contents: jax.Array) -> jax.Array:
    """u32[R, M, 4] for contents i32[R]."""
    place = jnp.broadcast_to(jnp.arange(M), (*contents.shape, M))
    own = jnp.where(place == 0, 0, contents[:, None])
    zeros = jnp.zeros_like(place)
    return jnp.stack([place + 1, own, zeros + 3, zeros], axis=-1).astype(jnp.uint32)


def may_match(num_tokens: jax.Array) -> jax.Array:
    return jnp.minimum(jnp.maximum(num_tokens - 1, 0) // T, M)


def start(world: World, draw: Draw) -> tuple[World, jax.Array]:
    two, tokens, contents = draw.rows[:2], draw.numbers[:2] % (W * T + 2), draw.numbers[2:4] % CONTENTS
    rows = jnp.where(world.running.num_blocks[two] == 0, two, B)
    tokens = jnp.where(rows < B, tokens, 0)
    state, running, result = sequences.start(
        world.state, world.running, rows, hashes_of(contents), may_match(tokens), tokens
    )
    known = world.contents.at[rows].set(contents, mode="drop")
    return World(state, running, known, world.slots), result.status


def extend(world: World, draw: Draw) -> tuple[World, jax.Array]:
    tokens = jnp.where((world.running.num_blocks > 0) & draw.mask, draw.numbers % (T + 2), 0)
    state, running, result = sequences.extend(world.state, world.running, tokens, max_blocks=2)
    return world._replace(state=state, running=running), result.status


def register(world: World, draw: Draw) -> tuple[World, jax.Array]:
    rows = draw.rows[:2]
    first = jnp.max(world.running.first[:, rows], axis=0)
    whole = jnp.minimum(world.running.lengths[rows] // T, M)
    place = jnp.minimum(first[:, None] + jnp.arange(M)[None], M - 1)
    hashes = jnp.take_along_axis(hashes_of(world.contents[rows]), place[:, :, None], axis=1)
    counts = jnp.maximum(whole - first, 0)
    state, running, result = sequences.register(world.state, world.running, rows, hashes, first, counts)
    return world._replace(state=state, running=running), result.status.reshape(-1)


def fork(world: World, draw: Draw) -> tuple[World, jax.Array]:
    source, to = draw.rows[:1], draw.rows[1:2]
    rows = jnp.where(world.running.num_blocks[to] == 0, to, B)
    state, running, status = sequences.fork(world.state, world.running, source, rows)
    known = world.contents.at[rows].set(world.contents[source], mode="drop")
    return World(state, running, known, world.slots), status


def unshare(world: World, draw: Draw) -> tuple[World, jax.Array]:
    state, running, result = sequences.unshare(world.state, world.running, draw.mask)
    return world._replace(state=state, running=running), result.status


def trim(world: World, draw: Draw) -> tuple[World, jax.Array]:
    shorter = draw.numbers % (world.running.lengths + 1)
    lengths = jnp.where(draw.mask, shorter, world.running.lengths)
    state, running, status = sequences.trim(world.state, world.running, lengths, max_blocks=W)
    return world._replace(state=state, running=running), status


def rewind(world: World, draw: Draw) -> tuple[World, jax.Array]:
    lengths = jnp.where(draw.mask, draw.numbers % (world.running.lengths + 1), world.running.lengths)
    running, status = sequences.rewind(world.running, lengths)
    return world._replace(running=running), status


def slide(world: World, draw: Draw) -> tuple[World, jax.Array]:
    computed = jnp.where(draw.mask, world.running.lengths, 0)
    state, running, status = sequences.slide(world.state, world.running, computed, max_blocks=2)
    return world._replace(state=state, running=running), status


def release(world: World, draw: Draw) -> tuple[World, jax.Array]:
    state, running, status = sequences.release(world.state, world.running, draw.rows[:2])
    return world._replace(state=state, running=running), status


def decode(world: World, draw: Draw) -> tuple[World, jax.Array]:
    """Reserve, extend in a loop of two, commit."""
    state, reserved = grants.reserve(world.state, draw.numbers[0] % 5, max_blocks=4)
    active = (world.running.num_blocks > 0) & draw.mask
    running, grant, _ = grants.extend(world.running, reserved.grant, jnp.where(active, 1, 0))
    running, grant, status = grants.extend(running, grant, jnp.where(active, T, 0))
    nobody = jnp.full((1,), B, jnp.int32)
    none = jnp.zeros((1,), jnp.int32)
    state, running, _ = grants.commit(state, running, grant, nobody, hashes_of(none), none, none)
    return world._replace(state=state, running=running), status


def fused(world: World, draw: Draw) -> tuple[World, jax.Array]:
    ending, growing = draw.rows[:2], draw.rows[2:5]
    complete = draw.rows[4:]
    place = draw.numbers[4:] % M
    first = jnp.max(world.running.first[:, complete], axis=0)
    done = (place < world.running.lengths[complete] // T) & (place >= first)
    tokens, contents = draw.numbers[:2] % (W * T), draw.numbers[2:4] % CONTENTS
    hashes = hashes_of(world.contents[complete])
    plan = StepPlan(
        ending,
        ending,
        hashes_of(contents),
        may_match(tokens),
        tokens,
        growing,
        jnp.where(world.running.num_blocks[growing] > 0, draw.numbers[:3] % (T + 1), 0),
        jnp.where(done, complete, B),
        place,
        jnp.take_along_axis(hashes, place[:, None, None], axis=1)[:, 0],
    )
    state, running, result = step(world.state, world.running, plan, max_blocks=2)
    began = result.start_status == Status.OK
    known = world.contents.at[jnp.where(began, ending, B)].set(contents, mode="drop")
    return World(state, running, known, world.slots), result.grow_status


def take(world: World, draw: Draw) -> tuple[World, jax.Array]:
    """Allocates into a slot that is empty."""
    empty = jnp.all(world.slots[draw.slot] == N)
    count = jnp.where(empty, draw.numbers[:1] % 3, 0)
    state, result = pool.allocate(world.state, count, max_blocks=2)
    slots = world.slots.at[jnp.where(empty, draw.slot, S)].set(result.block_ids[0], mode="drop")
    return world._replace(state=state, slots=slots), result.status


def find(world: World, draw: Draw) -> tuple[World, jax.Array]:
    """Acquires what two hashes find, into a slot that is empty."""
    empty = jnp.all(world.slots[draw.slot] == N)
    hashes = hashes_of(draw.numbers[:1] % CONTENTS)[:, 1:3]
    found = pool.scan(world.state, hashes, jnp.array([2]), group=draw.numbers[1] % len(GROUPS))
    found = jnp.where(empty, found, N)
    state, status = pool.acquire(world.state, found)
    slots = world.slots.at[jnp.where(empty, draw.slot, S)].set(found[0], mode="drop")
    return world._replace(state=state, slots=slots), status


def name(world: World, draw: Draw) -> tuple[World, jax.Array]:
    """Registers the blocks of a slot."""
    hashes = hashes_of(draw.numbers[:1] % CONTENTS)[:, 2:4]
    state, result = pool.register(world.state, world.slots[draw.slot][None], hashes)
    slots = world.slots.at[draw.slot].set(result.block_ids[0])
    return world._replace(state=state, slots=slots), result.status[0]


def drop(world: World, draw: Draw) -> tuple[World, jax.Array]:
    state, status = pool.release(world.state, world.slots[draw.slot][None])
    slots = world.slots.at[jnp.where(status[0] == Status.OK, draw.slot, S)].set(N, mode="drop")
    return world._replace(state=state, slots=slots), status


def evict(world: World, draw: Draw) -> tuple[World, jax.Array]:
    state, _ = pool.evict(world.state, draw.numbers[0] % 4, max_count=3)
    return world._replace(state=state), jnp.zeros((1,), jnp.int32)


def clear(world: World, draw: Draw) -> tuple[World, jax.Array]:
    del draw
    return world._replace(state=pool.clear(world.state)[0]), jnp.zeros((1,), jnp.int32)


def compact(world: World, draw: Draw) -> tuple[World, jax.Array]:
    del draw
    return world._replace(state=pool.compact(world.state)), jnp.zeros((1,), jnp.int32)


def rehash(world: World, draw: Draw) -> tuple[World, jax.Array]:
    state, left = pool.rehash(world.state, draw.numbers[0].astype(jnp.uint32))
    kept = jax.tree.map(lambda new, old: jnp.where(left == 0, new, old), state, world.state)
    return world._replace(state=kept), left[None]


# How often each is done, of 400.
OPERATIONS: dict[Operation, int] = {
    start: 70, extend: 50, register: 60, fork: 25, unshare: 25, trim: 20, rewind: 5, slide: 25, release: 35, decode: 20,
    fused: 20, take: 10, find: 10, name: 10, drop: 10, evict: 2, clear: 1, compact: 1, rehash: 1,
}  # fmt: skip


class Tally(NamedTuple):
    """What a run came to."""

    broken: jax.Array  # i32[]: laws broken, over all operations
    done: jax.Array  # i32[operations]
    statuses: jax.Array  # i32[operations, statuses]: how often rows got each


def begin() -> World:
    """An empty world whose stamps and generations are about to wrap."""
    state = pool.init(N)
    queue = replace(state.inactive, head=jnp.asarray(BEFORE_WRAP), tail=jnp.asarray(BEFORE_WRAP))
    return World(
        replace(state, inactive=queue, generations=jnp.full((N,), BEFORE_WRAP)),
        sequences.init(B, W, block_size=T, pool_blocks=N, groups=GROUPS),
        jnp.zeros((B,), jnp.int32),
        jnp.full((S, 2), N, jnp.int32),
    )


def laws_broken(world: World) -> jax.Array:
    holders = invariants.holders(world.running).at[world.slots.reshape(-1)].add(1, mode="drop")
    laws = (*invariants.check(world.state, holders), *invariants.check_sequences(world.running))
    return jnp.sum(jnp.stack(laws))


@functools.partial(jax.jit, static_argnames="count")
def run(world: World, key: jax.Array, count: int) -> tuple[World, Tally]:
    """Carries out that many operations."""
    weights = jnp.asarray(list(OPERATIONS.values()))
    chosen = jnp.repeat(jnp.arange(len(OPERATIONS)), weights, total_repeat_length=sum(OPERATIONS.values()))

    def counted(operation: Operation) -> Callable[[World, Draw], tuple[World, jax.Array]]:
        def call(world: World, draw: Draw) -> tuple[World, jax.Array]:
            world, status = operation(world, draw)
            return world, jnp.zeros((len(Status),), jnp.int32).at[status].add(1)

        return call

    def once(carry: tuple[World, Tally], key: jax.Array) -> tuple[tuple[World, Tally], None]:
        world, tally = carry
        bits = jax.random.bits(key, (3 * B + 2,), jnp.uint32)
        draw = Draw(
            jnp.argsort(bits[:B]).astype(jnp.int32),
            (bits[B : 2 * B] >> 1).astype(jnp.int32),
            bits[2 * B : 3 * B] % 2 == 0,
            (bits[-1] % S).astype(jnp.int32),
        )
        which = chosen[bits[-2] % len(chosen)]
        world, statuses = jax.lax.switch(which, [counted(operation) for operation in OPERATIONS], world, draw)
        told = Tally(
            tally.broken + laws_broken(world),
            tally.done.at[which].add(1),
            tally.statuses.at[which].add(statuses),
        )
        return (world, told), None

    zero = Tally(
        jnp.int32(0),
        jnp.zeros((len(OPERATIONS),), jnp.int32),
        jnp.zeros((len(OPERATIONS), len(Status)), jnp.int32),
    )
    (world, tally), _ = jax.lax.scan(once, (world, zero), jax.random.split(key, count))
    return world, tally


def check(count: int, seed: int) -> None:
    world, tally = run(begin(), jax.random.key(seed), count)
    assert int(tally.broken) == 0
    assert np.all(np.asarray(tally.done) > 0)
    statuses = dict(zip((op.__name__ for op in OPERATIONS), np.asarray(tally.statuses), strict=True))
    for told in statuses.values():
        assert told[Status.OK] > 0
    refused = {
        "start": (Status.OUT_OF_BLOCKS, Status.TABLE_FULL),
        "extend": (Status.OUT_OF_BLOCKS, Status.TABLE_FULL, Status.SHARED_TAIL),
        "trim": (Status.WINDOW_PASSED,),
    }
    for name_of, codes in refused.items():
        for code in codes:
            assert statuses[name_of][code] > 0
    assert int(world.state.inactive.tail) < BEFORE_WRAP  # the stamps have wrapped


@pytest.mark.long
def test_no_law_is_broken():
    check(10_000, 0)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", [1, 2, *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(3, 11))])
def test_no_law_is_broken_by_a_million_operations(seed):
    check(100_000, seed)
