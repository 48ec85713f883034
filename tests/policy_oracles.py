"""Eviction policies in plain Python: what `kvbm_jax.policies` must do, one block after the other.

A policy is asked for the order in which the inactive blocks of an `OraclePool` go when a call begins, and is told of
registrations, hits, and blocks that are reset.
"""

import heapq
import math
import struct
from collections.abc import Callable, Iterable, Iterator

import numpy as np

__all__ = ["LineageOracle", "LruOracle", "PolicyOracle", "PriorityOracle", "ScoredOracle", "TinyLfuOracle"]


class PolicyOracle:
    """Least recently released first."""

    def registered(self, pool, told: list[tuple[int, int | None, int, int]]) -> None:
        """`told`: block, the block before it or None, its place, its priority."""

    def hit(self, pool, blocks: list[int]) -> None: ...

    def gone(self, block: int) -> None: ...

    def order(self, pool) -> Iterable[int]:
        return list(pool.inactive)


LruOracle = PolicyOracle


class PriorityOracle(PolicyOracle):
    def __init__(self) -> None:
        self.priorities: dict[int, int] = {}

    def registered(self, pool, told):
        for block, _, _, priority in told:
            self.priorities[block] = priority

    def order(self, pool):
        return sorted(pool.inactive, key=self.priorities.__getitem__)  # stable: equals stay in queue order


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

    def order(self, pool) -> Iterator[int]:
        """Takes the least recently released leaf, over and over; what held blocks descend from goes last."""
        protected: set[int] = set()
        for block in self.parents:
            if pool.refs[block] > 0:
                while (block := self.parents.get(block)) is not None and block not in protected:
                    protected.add(block)
        left = [block for block in pool.inactive if block not in protected]
        released = {block: number for number, block in enumerate(pool.inactive)}
        parents = dict(self.parents)
        waiting = {block: len(children) for block, children in self.children.items()}
        leaves = [(released[block], block) for block in left if not waiting.get(block)]
        heapq.heapify(leaves)
        while leaves:
            _, block = heapq.heappop(leaves)
            parent = parents.get(block)
            if parent is not None:
                waiting[parent] -= 1
                if not waiting[parent] and parent in released and parent not in protected:
                    heapq.heappush(leaves, (released[parent], parent))
            yield block
        yield from sorted((b for b in released if b in protected), key=lambda b: -self.depths[b])


class TinyLfuOracle(PolicyOracle):
    """Four rows of counters up to 15, all halved when the sample is complete; numpy only looks many up at once."""

    def __init__(self, num_blocks: int) -> None:
        self.width = max(16, 2 ** math.ceil(math.log2(4 * num_blocks)))
        self.period = 10 * num_blocks
        self.samples = 0
        self.counters = np.zeros((4, self.width), np.uint8)
        self.columns = np.zeros((num_blocks, 4), np.int64)  # of the key that each block holds

    def registered(self, pool, told):
        for block, *_ in told:
            self.columns[block] = self._columns(pool.keys[block])
        self._count([block for block, *_ in told])

    def hit(self, pool, blocks):
        self._count(blocks)

    def order(self, pool):
        blocks = np.fromiter(pool.inactive, np.int64)
        least = self.estimates(self.columns[blocks])
        return blocks[np.argsort(least, kind="stable")].tolist()

    def estimates(self, columns: np.ndarray) -> np.ndarray:
        return self.counters[np.arange(4), columns].min(axis=-1)

    def _count(self, blocks: list[int]) -> None:
        for block in blocks:
            for row, column in enumerate(self.columns[block]):
                self.counters[row, column] = min(self.counters[row, column] + 1, 15)
            self.samples += 1
        if self.samples >= self.period:
            self.counters //= 2
            self.samples //= 2

    def _columns(self, key) -> list[int]:
        first, second = _mix(key, 0x9E3779B9), _mix(key, 0x85EBCA6B) | 1
        return [(first + row * second) % 2**32 % self.width for row in range(4)]


def _mix(key, seed: int) -> int:
    for word in (*key, *[0] * (5 - len(key))):
        seed = (seed + word) * 0x9E3779B1 % 2**32
        seed ^= seed >> 15
        seed = seed * 0x85EBCA77 % 2**32
        seed ^= seed >> 13
    return seed


class ScoredOracle(PolicyOracle):
    """`score(uses, age, depth, priority)` on Python numbers, rounded to float32."""

    def __init__(self, score: Callable[[float, float, float, float], float]) -> None:
        self.score = score
        self.blocks: dict[int, list[int]] = {}  # uses, last use, depth, priority
        self.clock = 0

    def registered(self, pool, told):
        self.clock += 1
        for block, _, depth, priority in told:
            self.blocks[block] = [1, self.clock, depth, priority]

    def hit(self, pool, blocks):
        self.clock += 1
        for block in blocks:
            self.blocks[block][0] += 1
            self.blocks[block][1] = self.clock

    def order(self, pool):
        def key(block):
            uses, last_use, depth, priority = self.blocks[block]
            value = struct.unpack("f", struct.pack("f", self.score(uses, self.clock - last_use, depth, priority)))[0]
            return (0, 0.0) if math.isnan(value) else (1, value)

        return sorted(pool.inactive, key=key)
