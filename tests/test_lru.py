"""The inactive queue against an ordered dict, around every place where something wraps."""

import functools
from collections import OrderedDict
from dataclasses import replace

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from kvbm_jax import lru

pytestmark = pytest.mark.core

WRAP = 2**32


@functools.cache
def verbs(max_count):
    return {
        "push": jax.jit(lru.push, donate_argnums=0),
        "remove": jax.jit(lru.remove, donate_argnums=0),
        "pop": jax.jit(functools.partial(lru.pop, max_count=max_count), donate_argnums=0),
        "compact": jax.jit(lru.compact, donate_argnums=0),
        "last_occurrence": jax.jit(lru.last_occurrence),
    }


class Driver:
    """A queue and its model, moved together; calls are `width` entries wide."""

    def __init__(self, num_blocks, width, start=0):
        self.n, self.width = num_blocks, width
        # Head and tail are arrays of their own: they are donated together.
        self.queue = replace(lru.init(num_blocks), head=jnp.uint32(start % WRAP), tail=jnp.uint32(start % WRAP) + 0)
        self.capacity = self.queue.ring.shape[0]
        self.under_root = self.capacity // self.queue.tree[0].size
        self.model = OrderedDict()
        self.do = verbs(width)

    def _padded(self, blocks):
        ids = np.full((self.width,), self.n, np.int32)
        ids[: len(blocks)] = blocks
        return jnp.asarray(ids), jnp.asarray(np.arange(self.width) < len(blocks))

    def push(self, blocks):
        for chunk in (blocks[i : i + self.width] for i in range(0, len(blocks), self.width)):
            self.queue = self.do["push"](self.queue, *self._padded(chunk))
            self.model.update(dict.fromkeys(map(int, chunk)))

    def remove(self, blocks):
        for chunk in (blocks[i : i + self.width] for i in range(0, len(blocks), self.width)):
            self.queue = self.do["remove"](self.queue, *self._padded(chunk))
            for block in chunk:
                self.model.pop(int(block), None)

    def pop(self, count):
        self.queue, blocks = self.do["pop"](self.queue, jnp.int32(count))
        expected = [self.model.popitem(last=False)[0] for _ in range(count)]
        assert blocks.tolist() == expected + [self.n] * (self.width - count)

    def compact(self):
        self.queue = self.do["compact"](self.queue)

    @property
    def room(self):
        return int(lru.room(self.queue))

    def check(self):
        """Reads the order off the bits, one position after the other, and compares it with the model's."""
        queue = jax.tree.map(np.asarray, self.queue)
        head, tail = int(queue.head), int(queue.tail)
        span = (tail - head) % WRAP
        entries = (head + np.arange(span)) % self.capacity
        bits = np.asarray(lru.live(self.queue))
        live = bits[entries]
        assert queue.ring[entries][live].tolist() == list(self.model)
        assert bits.sum() == live.sum() == queue.size == len(self.model)
        jax.tree.map(np.testing.assert_array_equal, queue.tree, lru.tree_of(jnp.asarray(bits)))
        positions = ((head + np.arange(span)) % WRAP)[live]
        np.testing.assert_array_equal(queue.positions[list(self.model)], positions)
        # The head's group is never entered from behind.
        assert self.room == self.capacity - (tail - head // self.under_root * self.under_root) % WRAP >= 0


@pytest.mark.parametrize("start", [0, WRAP - 3, WRAP - 256, WRAP - 1500])
def test_random_moves_match_an_ordered_dict(start):
    rng = np.random.default_rng(start)
    driver = Driver(num_blocks=40, width=8, start=start)
    compactions = 0
    for _ in range(400):
        queued = list(driver.model)
        free = [b for b in range(driver.n) if b not in driver.model]
        if driver.room < driver.width:
            driver.compact()
            compactions += 1
        move = rng.integers(3)
        if move == 0 and free:
            driver.push(rng.permutation(free)[: rng.integers(1, driver.width + 1)])
        elif move == 1 and queued:
            driver.remove(rng.choice(queued, rng.integers(1, driver.width + 1)))  # repeats allowed
        elif move == 2:
            driver.pop(int(rng.integers(min(4, len(queued)) + 1)))
        driver.check()
    driver.compact()
    driver.check()


@pytest.mark.parametrize("start", [0, WRAP - 1000])
def test_the_ring_goes_round_many_times_without_compaction_while_the_head_moves(start):
    driver = Driver(num_blocks=5, width=8, start=start)
    for turn in range(5 * driver.capacity // driver.n):
        driver.push(np.roll(np.arange(driver.n), turn))
        driver.pop(driver.n)
        assert driver.room > driver.capacity - driver.under_root - driver.n
    driver.push([2, 4])
    driver.check()


@pytest.mark.parametrize("start", [0, 700, WRAP - 700])
def test_room_is_exact_while_one_block_holds_the_head(start):
    driver = Driver(num_blocks=5, width=8, start=start)
    driver.push([3])
    pushes = 0
    while driver.room >= 2:
        before = driver.room
        driver.push([1, 4])
        driver.remove([1, 4])
        pushes += 2
        assert driver.room == before - 2
    driver.push([0] * driver.room)  # to the last entry
    assert driver.room == 0
    assert pushes >= driver.capacity - driver.under_root - 2
    driver.check()
    driver.compact()
    assert driver.room >= driver.n
    driver.check()
    driver.pop(len(driver.model))


def test_popping_gives_room_root_by_root():
    driver = Driver(num_blocks=40, width=8)
    driver.push(np.arange(40))
    driver.pop(8)
    assert driver.room == driver.capacity - 40
    while int(driver.queue.head) < driver.under_root:
        driver.pop(8)
        driver.push(list(set(range(40)) - set(driver.model)))
    assert driver.room == driver.capacity - (int(driver.queue.tail) - driver.under_root)


@pytest.mark.parametrize("num_blocks", [1, 512, 513, 1536])  # 512 and 1536 fill a power of two exactly
def test_compaction_leaves_room_for_every_block_again(num_blocks):
    driver = Driver(num_blocks, width=512, start=WRAP - 777)
    rng = np.random.default_rng(num_blocks)
    driver.push(rng.permutation(num_blocks))
    for _ in range(7):
        driver.compact()
        assert driver.room == driver.capacity - num_blocks >= num_blocks
        driver.check()
        again = rng.permutation(num_blocks)[: num_blocks // 2 + 1]
        driver.remove(again)
        driver.push(again)
        driver.check()
    driver.compact()
    everything = rng.permutation(num_blocks)
    driver.remove(everything)
    driver.push(everything)
    driver.check()


@pytest.mark.parametrize("start", [100, WRAP - 1500])
@pytest.mark.parametrize("keep", [0.01, 0.3])
def test_pop_finds_its_blocks_over_holes_under_several_roots(start, keep):
    driver = Driver(num_blocks=6000, width=512, start=start)
    rng = np.random.default_rng(3)
    driver.push(rng.permutation(6000))
    driver.remove([b for b in driver.model if rng.random() > keep])
    driver.check()
    roots = {int(driver.queue.positions[b]) // driver.under_root for b in driver.model}
    assert len(roots) >= 3
    while driver.model:
        driver.pop(min(int(rng.integers(1, 512)), len(driver.model)))
        driver.check()
    driver.pop(0)


def test_compaction_keeps_the_order_and_closes_the_holes():
    driver = Driver(num_blocks=3000, width=512, start=511)
    rng = np.random.default_rng(4)
    driver.push(rng.permutation(3000))
    driver.remove(list(driver.model)[100:2900:2])
    order = list(driver.model)
    driver.compact()
    driver.check()
    assert list(driver.model) == order
    assert int(driver.queue.head) % driver.under_root == 0
    assert int(driver.queue.tail) - int(driver.queue.head) == len(order)
    driver.pop(512)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=8, max_size=8))
def test_last_occurrence(entries):
    blocks, mask = (list(column) for column in zip(*entries, strict=True))
    queue = lru.init(6)
    scratched, last = verbs(8)["last_occurrence"](queue, jnp.array(blocks, jnp.int32), jnp.array(mask))
    expected = [
        on and not any(on and b == block for b, on in entries[i + 1 :]) for i, (block, on) in enumerate(entries)
    ]
    assert last.tolist() == expected
    jax.tree.map(np.testing.assert_array_equal, replace(scratched, positions=queue.positions), queue)
