"""Eviction policies in plain Python: what `kvbm_jax.policies` must do, one block after the other.

A policy is asked for the order in which the inactive blocks of an `OraclePool` go when a call begins, and is told of
registrations, hits, and blocks that are reset.
"""

import math
from collections.abc import Callable, Iterable, Iterator

import numpy as np

__all__ = ["LineageOracle", "LruOracle", "PolicyOracle", "PriorityOracle", "ScoredOracle", "TinyLfuOracle"]


class PolicyOracle:
    """Least recently released first."""

    def registered(self, pool, told: list[tuple[int, int | None, int, int]]) -> None:
        """`told`: block, the block before it or None, its place, its priority."""

    def hit(self, pool, blocks: list[int]) -> None: ...

    def gone(self, block: int) -> None: ...

    def resized(self, names: dict[int, int], num_blocks: int) -> None:
        """The pool has another size; `names`: what each block that is held or cached is called now."""

    def order(self, pool) -> Iterable[int]:
        return list(pool.inactive)


LruOracle = PolicyOracle


def renamed(values: np.ndarray, names: dict[int, int], num_blocks: int) -> np.ndarray:
    """Moves what is known of blocks [N, ...] to their new names."""
    moved = np.zeros((num_blocks, *values.shape[1:]), values.dtype)
    for old, new in names.items():
        moved[new] = values[old]
    return moved


def in_order(pool, *words: np.ndarray) -> Iterator[int]:
    """Inactive blocks by arrays [N], the first the most significant; equals stay in queue order (a stable sort)."""
    blocks = np.fromiter(pool.inactive, np.int64)
    yield from blocks[np.lexsort([word[blocks] for word in reversed(words)])].tolist()


class PriorityOracle(PolicyOracle):
    def __init__(self, num_blocks: int) -> None:
        self.priorities = np.zeros(num_blocks, np.uint32)

    def registered(self, pool, told):
        for block, _, _, priority in told:
            self.priorities[block] = priority

    def resized(self, names, num_blocks):
        self.priorities = renamed(self.priorities, names, num_blocks)

    def order(self, pool):
        return in_order(pool, self.priorities)


class LineageOracle(PolicyOracle):
    def __init__(self) -> None:
        self.parents: dict[int, int] = {}
        self.children: dict[int, set[int]] = {}
        self.depths: dict[int, int] = {}

    def registered(self, pool, told):
        for block, parent, depth, _ in told:
            self.depths[block] = depth
            if parent is not None:
                self.parents[block] = parent
                self.children.setdefault(parent, set()).add(block)

    def gone(self, block):
        parent = self.parents.pop(block, None)
        if parent is not None:
            self.children[parent].discard(block)
        for child in self.children.pop(block, set()):
            del self.parents[child]

    def resized(self, names, num_blocks):
        self.parents = {names[block]: names[parent] for block, parent in self.parents.items()}
        self.children = {names[block]: {names[c] for c in children} for block, children in self.children.items()}
        self.depths = {names[block]: depth for block, depth in self.depths.items() if block in names}

    def order(self, pool) -> Iterator[int]:
        """Takes the least recently released leaf, over and over; what held blocks descend from goes last."""
        protected: set[int] = set()
        for block, holders in enumerate(pool.refs):
            while holders and (block := self.parents.get(block)) is not None and block not in protected:
                protected.add(block)
        inactive = list(pool.inactive)
        passed = set()  # that were no leaves when their turn came: older than any that is still to come
        for block in inactive:
            leaf = None if block in protected else block
            while leaf is not None and not self.children.get(leaf):
                parent = self.parents.get(leaf)
                yield leaf  # the pool evicts it, and tells
                leaf = parent if parent in passed else None
            if leaf is not None:
                passed.add(leaf)
        yield from sorted((b for b in inactive if b in protected), key=lambda b: -self.depths[b])


class TinyLfuOracle(PolicyOracle):
    """Four rows of counters up to 15, all halved when the sample is complete; numpy only looks many up at once."""

    def __init__(self, num_blocks: int) -> None:
        self.samples = 0
        self.hashes = np.zeros((num_blocks, 4), np.int64)  # of the key that each block holds
        self._size(num_blocks)
        self.counters = np.zeros((4, self.width), np.uint8)

    def _size(self, num_blocks: int) -> None:
        self.width = max(16, 2 ** math.ceil(math.log2(4 * num_blocks)))
        self.period = 10 * num_blocks

    def registered(self, pool, told):
        for block, *_ in told:
            self.hashes[block] = self._hashes(pool.keys[block])
        self._count([block for block, *_ in told])

    def hit(self, pool, blocks):
        self._count(blocks)

    def order(self, pool):
        return in_order(pool, self.counters[np.arange(4), self.hashes % self.width].min(axis=-1))

    def resized(self, names, num_blocks):
        """A key's counter is where its hash points to in the new row; where several meet, the greatest stays."""
        before = self.counters
        self._size(num_blocks)
        self.counters = np.zeros((4, self.width), np.uint8)
        for column in range(max(self.width, before.shape[1])):
            old, new = before[:, column % before.shape[1]], self.counters[:, column % self.width]
            np.maximum(old, new, out=new)
        self.hashes = renamed(self.hashes, names, num_blocks)

    def _count(self, blocks: list[int]) -> None:
        for block in blocks:
            for row, column in enumerate(self.hashes[block] % self.width):
                self.counters[row, column] = min(self.counters[row, column] + 1, 15)
            self.samples += 1
        if self.samples >= self.period:
            self.counters //= 2
            self.samples //= 2

    def _hashes(self, key) -> list[int]:
        first, second = _mix(key, 0x9E3779B9), _mix(key, 0x85EBCA6B) | 1
        return [(first + row * second) % 2**32 for row in range(4)]


def _mix(key, seed: int) -> int:
    for word in (*key, *[0] * (5 - len(key))):
        seed = (seed + word) * 0x9E3779B1 % 2**32
        seed ^= seed >> 15
        seed = seed * 0x85EBCA77 % 2**32
        seed ^= seed >> 13
    return seed


class ScoredOracle(PolicyOracle):
    """`score(uses, age, depth, priority)` on float32 arrays [N]; a NaN is below everything else."""

    def __init__(self, num_blocks: int, score: Callable[..., np.ndarray]) -> None:
        self.score = score
        self.uses, self.last_use, self.depths, self.priorities = np.zeros((4, num_blocks), np.float32)
        self.clock = 0

    def registered(self, pool, told):
        self.clock += bool(told)
        for block, _, depth, priority in told:
            self.uses[block], self.last_use[block] = 1, self.clock
            self.depths[block], self.priorities[block] = depth, priority

    def hit(self, pool, blocks):
        self.clock += bool(blocks)
        for block in blocks:
            self.uses[block] += 1
            self.last_use[block] = self.clock

    def resized(self, names, num_blocks):
        parts = (self.uses, self.last_use, self.depths, self.priorities)
        self.uses, self.last_use, self.depths, self.priorities = (renamed(part, names, num_blocks) for part in parts)

    def order(self, pool):
        values = self.score(self.uses, np.float32(self.clock) - self.last_use, self.depths, self.priorities)
        return in_order(pool, ~np.isnan(values), values)
