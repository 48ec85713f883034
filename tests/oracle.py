"""The pool in plain Python, as simple as can be: what `kvbm_jax.pool` must do, one row after the other."""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from policy_oracles import LruOracle, PolicyOracle

from kvbm_jax.types import Status

Key = tuple[int, ...]


@dataclass
class OraclePool:
    num_blocks: int
    policy: PolicyOracle = field(default_factory=LruOracle)
    reset: list[int] = field(init=False)
    refs: list[int] = field(init=False)
    keys: dict[int, Key] = field(default_factory=dict)  # block -> key
    blocks: dict[Key, int] = field(default_factory=dict)  # key -> block
    inactive: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        self.reset = list(range(self.num_blocks - 1, -1, -1))
        self.refs = [0] * self.num_blocks

    def match(self, keys: list[Key]) -> list[int]:
        found = []
        for key in keys:
            if key not in self.blocks:
                break
            found.append(self.blocks[key])
        return found

    def acquire(self, rows: list[list[int]]) -> list[Status]:
        # The whole call sees the pool as it was before: an acquisition makes no block less resident.
        statuses = []
        for row in rows:
            if any(not 0 <= b < self.num_blocks for b in row):
                statuses.append(Status.UNKNOWN_BLOCK)
            elif any(self.refs[b] == 0 and b not in self.keys for b in row):
                statuses.append(Status.NOT_RESIDENT)
            else:
                statuses.append(Status.OK)
                for b in row:
                    self._hold(b)
        return statuses

    def allocate(self, counts: list[int]) -> tuple[list[list[int]], list[Status], list[tuple[int, Key]]]:
        granted, statuses, evicted, full = [], [], [], False
        order = iter(self.policy.order(self))
        for count in counts:
            full = full or count > len(self.reset) + len(self.inactive)
            if full:
                granted.append([])
                statuses.append(Status.OUT_OF_BLOCKS)
                continue
            row = []
            for _ in range(count):
                if self.reset:
                    block = self.reset.pop()
                else:
                    block, key = self._evict(order)
                    evicted.append((block, key))
                self.refs[block] = 1
                row.append(block)
            granted.append(row)
            statuses.append(Status.OK)
        return granted, statuses, evicted

    def register(self, rows: list[list[tuple[int, Key]]]) -> list[list[tuple[int, bool, Status]]]:
        results = []
        named: set[int] = set()
        held_before = {b for b in range(self.num_blocks) if self.refs[b] > 0}
        keys_before = dict(self.keys)
        for row in rows:
            result = []
            for block, key in row:
                if not 0 <= block < self.num_blocks:
                    result.append((block, False, Status.UNKNOWN_BLOCK))
                elif block not in held_before:
                    result.append((block, False, Status.NOT_HELD))
                elif block in keys_before:
                    fits = keys_before[block] == key
                    result.append((block, False, Status.OK if fits else Status.ALREADY_REGISTERED))
                elif block in named:
                    fits = self.keys.get(block) == key
                    result.append((block, False, Status.OK if fits else Status.ALREADY_REGISTERED))
                elif key in self.blocks:
                    named.add(block)
                    canonical = self.blocks[key]
                    self._hold(canonical)
                    self._drop(block)
                    result.append((canonical, False, Status.OK))
                else:
                    named.add(block)
                    self.blocks[key] = block
                    self.keys[block] = key
                    result.append((block, True, Status.OK))
            results.append(result)
        return results

    def release(self, rows: list[list[int]]) -> list[Status]:
        named: dict[int, int] = {}
        for row in rows:
            for b in row:
                named[b] = named.get(b, 0) + 1
        statuses = []
        for row in rows:
            if any(not 0 <= b < self.num_blocks for b in row):
                statuses.append(Status.UNKNOWN_BLOCK)
            elif any(named[b] > self.refs[b] for b in row):
                statuses.append(Status.NOT_HELD)
            else:
                statuses.append(Status.OK)
        # A block ends its hold where it is named last, whatever was wrong with the call.
        order = [b for row in rows for b in reversed(row) if 0 <= b < self.num_blocks and self.refs[b] > 0]
        for b in set(order):
            self.refs[b] = max(self.refs[b] - order.count(b), 0)
        for i, b in enumerate(order):
            if self.refs[b] == 0 and b not in order[i + 1 :]:
                self._park(b)
        return statuses

    def evict(self, count: int) -> list[tuple[int, Key]]:
        order = iter(self.policy.order(self))
        evicted = [self._evict(order) for _ in range(min(count, len(self.inactive)))]
        self.reset.extend(block for block, _ in evicted)
        return evicted

    def resize(self, num_blocks: int) -> tuple[dict[int, int], list[tuple[int, Key]]] | None:
        """Returns the blocks that moved and what was evicted, None if more are held than fit."""
        held = sum(count > 0 for count in self.refs)
        if held > num_blocks:
            return None
        evicted = self.evict(max(held + len(self.inactive) - num_blocks, 0))
        added = range(num_blocks - 1, self.num_blocks - 1, -1)
        self.reset = [block for block in [*added, *self.reset] if block < num_blocks]
        kept = [block for block in range(self.num_blocks) if self.refs[block] or block in self.keys]
        moved = {block: self.reset.pop() for block in kept if block >= num_blocks}
        refs = [0] * num_blocks
        for block, count in enumerate(self.refs):
            if count:
                refs[moved.get(block, block)] = count
        self.num_blocks, self.refs = num_blocks, refs
        self.keys = {moved.get(block, block): key for block, key in self.keys.items()}
        self.blocks = {key: block for block, key in self.keys.items()}
        self.inactive = OrderedDict((moved.get(block, block), None) for block in self.inactive)
        self.policy.resized({block: moved.get(block, block) for block in kept}, num_blocks)
        return moved, evicted

    def _hold(self, block: int) -> None:
        self.refs[block] += 1
        self.inactive.pop(block, None)

    def _drop(self, block: int) -> None:
        self.refs[block] -= 1
        if self.refs[block] == 0:
            self._park(block)

    def _park(self, block: int) -> None:
        if block in self.keys:
            self.inactive[block] = None
        else:
            self.reset.append(block)
            self.policy.gone(block)

    def _evict(self, order: Iterator[int]) -> tuple[int, Key]:
        block = next(order)
        del self.inactive[block]
        self.policy.gone(block)
        key = self.keys.pop(block)
        del self.blocks[key]
        return block, key
