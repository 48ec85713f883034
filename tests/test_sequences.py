"""Sequences and grants against a plain model on top of the pool's oracle, for one group and for several."""

import copy
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from oracle import OraclePool

from kvbm_jax import grants, invariants, lru, pool, sequences
from kvbm_jax.errors import LayoutError
from kvbm_jax.groups import Group
from kvbm_jax.types import Status

pytestmark = pytest.mark.core

B, W, T = 4, 4, 4  # rows, blocks of a table, tokens of a block
R, M = 2, 3  # rows and hashes of a call
MAX_BLOCKS = 2
ONE, TWO = (None,), (None, None)  # the windows of each group
HYBRID = [(None, 6), (5,), (10, None, 2), (1, 9)]  # the second is a state-space group
# Each is programs of its own, which take longer to compile than to run.
WINDOWS = [ONE, TWO, HYBRID[2], *(pytest.param(HYBRID[i], marks=pytest.mark.long) for i in (0, 1, 3))]
BLOCKS = {windows: 3 + sum(7 if w is None else 5 for w in windows) for windows in (ONE, TWO, *HYBRID)}  # of the pool
OK = Status.OK


@functools.cache
def verbs():
    return {
        "start": jax.jit(sequences.start),
        "extend": jax.jit(functools.partial(sequences.extend, max_blocks=MAX_BLOCKS)),
        "register": jax.jit(sequences.register),
        "release": jax.jit(sequences.release),
        "fork": jax.jit(sequences.fork),
        "unshare": jax.jit(sequences.unshare),
        "trim": jax.jit(functools.partial(sequences.trim, max_blocks=MAX_BLOCKS)),
        "rewind": jax.jit(sequences.rewind),
        "slide": jax.jit(functools.partial(sequences.slide, max_blocks=MAX_BLOCKS)),
        "check": jax.jit(invariants.check),
        "check_sequences": jax.jit(invariants.check_sequences),
        "match": jax.jit(pool.match),
        "compact": jax.jit(pool.compact),
        "reserve": jax.jit(functools.partial(grants.reserve, max_blocks=8)),
        "commit": jax.jit(grants.commit),
        "give_back": jax.jit(grants.give_back),
    }


def chain(contents):
    """A number for each prefix of the contents (0 or 1 a block): equal numbers mean equal prefixes."""
    numbers, n = [], 1
    for bit in contents:
        n = 2 * n + bit
        numbers.append(n)
    return numbers


def hash_rows(rows):
    out = np.zeros((R, M, 4), np.uint32)
    for i, row in enumerate(rows):
        for j, number in enumerate(row[:M]):
            out[i, j] = (number, 5, number, 0)
    return jnp.asarray(out)


def column(values, fill):
    return jnp.array([*values, *[fill] * (R - len(values))], jnp.int32)


class Model:
    """What `sequences` must do, one row after the other."""

    def __init__(self, windows):
        self.windows, self.groups = windows, len(windows)
        self.pool = OraclePool(BLOCKS[windows])
        self.tables = [[[] for _ in range(B)] for _ in windows]  # None where a window has passed
        self.lengths = [0] * B

    def needed(self, group, length):
        """The places of the first `length` tokens that tokens after them can see."""
        oldest = 0 if self.windows[group] is None else length - self.windows[group] + 1
        return [j for j in range(-(-length // T)) if any(t >= oldest for t in range(j * T, j * T + T))]

    def hit(self, numbers, count):
        """The blocks of the longest prefix that every group can serve, for each group, None where none is needed."""
        resident = [[self.pool.blocks.get((n, g)) for n in numbers[:count]] for g in range(self.groups)]
        length = min(count, len(numbers))
        while any(resident[g][j] is None for g in range(self.groups) for j in self.needed(g, length * T)):
            length -= 1
        needed = [self.needed(g, length * T) for g in range(self.groups)]
        return [[resident[g][j] if j in needed[g] else None for j in range(length)] for g in range(self.groups)]

    def _release(self, tables):
        """Tables are [rows][groups][blocks]."""
        widest = [max(map(len, table), default=0) for table in tables]
        laid = [
            [t[j] for j in range(wide) for t in table if j < len(t) and t[j] is not None]
            for table, wide in zip(tables, widest, strict=True)
        ]
        assert set(self.pool.release(laid)) <= {OK}

    def start(self, rows, numbers, num_hashes, num_tokens):
        needed = [-(-n // T) for n in num_tokens]
        prefixes = [
            self.hit(chained, count if need <= W else 0)
            for chained, count, need in zip(numbers, num_hashes, needed, strict=True)
        ]
        held = [[b for blocks in prefix for b in blocks if b is not None] for prefix in prefixes]
        fresh = [need - len(prefix[0]) if need <= W else 0 for need, prefix in zip(needed, prefixes, strict=True)]
        counts = [self.groups * count for count in fresh]
        # All prefixes are spared while it is decided who fits; then those who do not hold nothing.
        trial = copy.deepcopy(self.pool)
        trial.acquire(held)
        free = len(trial.reset) + len(trial.inactive)
        fits = [total <= free for total in itertools.accumulate(counts)]
        status = [OK if fit else Status.OUT_OF_BLOCKS for fit in fits]
        self.pool.acquire([blocks if fit else [] for blocks, fit in zip(held, fits, strict=True)])
        granted, _, _ = self.pool.allocate([count if fit else 0 for count, fit in zip(counts, fits, strict=True)])
        cached = [0] * len(rows)
        for i, row in enumerate(rows):
            if needed[i] > W:
                status[i] = Status.TABLE_FULL
            elif status[i] == OK:
                cached[i] = T * len(prefixes[i][0])
                for g in range(self.groups):
                    self.tables[g][row] = prefixes[i][g] + granted[i][g * fresh[i] : (g + 1) * fresh[i]]
                self.lengths[row] = num_tokens[i]
        return cached, status

    def extend(self, num_tokens, order=range(B), *, full=False):
        """Rows in the given order, `num_tokens[i]` for the i-th; nothing is left for any of them if `full`."""
        needed = [-(-(self.lengths[b] + n) // T) for b, n in zip(order, num_tokens, strict=True)]
        fresh = [max(need - len(self.tables[0][b]), 0) for b, need in zip(order, needed, strict=True)]
        bad = [
            Status.TABLE_FULL
            if needed[i] > W
            else Status.SHARED_TAIL
            if num_tokens[i] and self.is_shared(b)
            else Status.INVALID_COUNT
            if fresh[i] > MAX_BLOCKS or num_tokens[i] < 0
            else OK
            for i, b in enumerate(order)
        ]
        counts = [0 if fault else self.groups * count for fault, count in zip(bad, fresh, strict=True)]
        if full:
            return [fault or Status.OUT_OF_BLOCKS for fault in bad]
        granted, status, _ = self.pool.allocate(counts)
        for i, b in enumerate(order):
            status[i] = bad[i] or status[i]
            if status[i] == OK:
                for g in range(self.groups):
                    self.tables[g][b] += granted[i][g * fresh[i] : (g + 1) * fresh[i]]
                self.lengths[b] += num_tokens[i]
        return status

    def is_shared(self, row):
        """Whether the block that the row's next token goes into is there, and must not be written."""
        tails = [block for table in self.tables for block in table[row][self.lengths[row] // T :][:1]]
        return any(self.pool.refs[b] > 1 or b in self.pool.keys for b in tails)

    def fork(self, sources, rows):
        counts = [-(-self.lengths[source] // T) for source in sources]
        held = [
            [t[source][j] for j in range(count) for t in self.tables if t[source][j] is not None]
            for source, count in zip(sources, counts, strict=True)
        ]
        assert set(self.pool.acquire(held)) <= {OK}
        for source, row, count in zip(sources, rows, counts, strict=True):
            self.lengths[row] = self.lengths[source]
            for g in range(self.groups):
                self.tables[g][row] = self.tables[g][source][:count]

    def unshare(self, rows):
        shared = [b in rows and self.is_shared(b) for b in range(B)]
        granted, status, _ = self.pool.allocate([self.groups * wanted for wanted in shared])
        copies, left = [], []
        for b in range(B):
            copies.append([])
            if shared[b] and status[b] == OK:
                place = self.lengths[b] // T
                old = [table[b][place] for table in self.tables]
                copies[b] = list(zip(old, granted[b], strict=True))
                left.append([[block] for block in old])
                for g in range(self.groups):
                    self.tables[g][b][place] = granted[b][g]
        self._release(left)
        return copies, status

    def is_seen(self, row, length):
        """Whether all that the token at position `length` sees, and the block it goes into, has not been freed."""
        return all(
            j >= len(self.tables[g][row]) or self.tables[g][row][j] is not None
            for g in range(self.groups)
            for j in [*self.needed(g, length), length // T]
        )

    def trim(self, lengths):
        kept = [-(-n // T) for n in lengths]
        counted = [
            0 <= lengths[b] <= self.lengths[b] and len(self.tables[0][b]) - kept[b] <= MAX_BLOCKS for b in range(B)
        ]
        # A tail that goes back is written anew: it does not matter whether it had been freed.
        seen = [
            counted[b]
            and all(self.tables[g][b][j] is not None for g in range(self.groups) for j in self.needed(g, lengths[b]))
            for b in range(B)
        ]
        status = [Status.INVALID_COUNT if not counted[b] else OK if seen[b] else Status.WINDOW_PASSED for b in range(B)]
        rows = [b for b in range(B) if status[b] == OK]
        self._release([[self.tables[g][b][kept[b] :] for g in range(self.groups)] for b in rows])
        for b in rows:
            self.lengths[b] = lengths[b]
            for g in range(self.groups):
                del self.tables[g][b][kept[b] :]
        return status

    def rewind(self, lengths):
        status = [
            Status.INVALID_COUNT
            if not 0 <= n <= self.lengths[b]
            else OK
            if self.is_seen(b, n)
            else Status.WINDOW_PASSED
            for b, n in enumerate(lengths)
        ]
        self.lengths = [lengths[b] if status[b] == OK else self.lengths[b] for b in range(B)]
        return status

    def slide(self, computed):
        freed = []
        for b, n in enumerate(computed):
            freed.append([])
            for g, table in enumerate(self.tables):
                needed = self.needed(g, n) if 0 <= n <= self.lengths[b] else range(W)
                places = [j for j, block in enumerate(table[b][: n // T]) if block is not None and j not in needed]
                freed[b].append([table[b][j] for j in places[:MAX_BLOCKS]])
                for j in places[:MAX_BLOCKS]:
                    table[b][j] = None
        self._release(freed)
        return [OK if 0 <= n <= self.lengths[b] else Status.INVALID_COUNT for b, n in enumerate(computed)]

    def register(self, rows, numbers, first):
        results = []
        for g in range(self.groups):
            tables = [self.tables[g][row] for row in rows]
            named = [
                [(table[start + j], (n, g)) for j, n in enumerate(chained) if table[start + j] is not None]
                for table, chained, start in zip(tables, numbers, first, strict=True)
            ]
            told = [iter(entries) for entries in self.pool.register(named)]
            results.append([])
            for table, chained, start, entries in zip(tables, numbers, first, told, strict=True):
                places = range(start, start + len(chained))
                results[g].append([(None, False, OK) if table[j] is None else next(entries) for j in places])
                for j, (block, _, _) in zip(places, results[g][-1], strict=True):
                    table[j] = block
        return results

    def release(self, rows):
        self._release([[self.tables[g][row] for g in range(self.groups)] for row in rows])
        for row in rows:
            self.lengths[row] = 0
            for g in range(self.groups):
                self.tables[g][row] = []


class Driver:
    """Batch, pool and model, moved together and compared after each call."""

    def __init__(self, windows):
        self.groups, self.n = len(windows), BLOCKS[windows]
        self.pool = pool.init(self.n)
        self.batch = sequences.init(B, W, block_size=T, pool_blocks=self.n, groups=tuple(map(Group, windows)))
        self.model = Model(windows)
        self.do = verbs()

    def start(self, rows, contents, num_tokens, num_hashes=None):
        numbers = [chain(c)[:M] for c in contents]
        if num_hashes is None:
            num_hashes = [max(min((n - 1) // T, M), 0) for n in num_tokens]
        self.pool, self.batch, result = self.do["start"](
            self.pool,
            self.batch,
            column(rows, B),
            hash_rows(numbers),
            column(num_hashes, 0),
            column(num_tokens, 0),
        )
        cached, status = self.model.start(rows, numbers, num_hashes, num_tokens)
        assert result.num_cached.tolist()[: len(rows)] == cached
        assert result.status.tolist()[: len(rows)] == status
        self.check()
        return cached, status

    def extend(self, num_tokens):
        self.pool, self.batch, result = self.do["extend"](self.pool, self.batch, jnp.array(num_tokens, jnp.int32))
        status = self.model.extend(num_tokens)
        assert result.status.tolist() == status
        self.check()
        return status

    def register(self, rows, contents, first):
        """Registers the complete blocks from `first` on, at most M."""
        counts = [min(max(self.model.lengths[r] // T - f, 0), M) for r, f in zip(rows, first, strict=True)]
        numbers = [chain(c)[f : f + n] for c, f, n in zip(contents, first, counts, strict=True)]
        self.pool, self.batch, result = self.do["register"](
            self.pool, self.batch, column(rows, B), hash_rows(numbers), column(first, 0), column(counts, 0)
        )
        for g, told in enumerate(self.model.register(rows, numbers, first)):
            for i, entries in enumerate(told):
                for j, (block, new, status) in enumerate(entries):
                    assert int(result.block_ids[g, i, j]) == (self.n if block is None else block)
                    assert bool(result.registered[g, i, j]) == new
                    assert int(result.status[g, i, j]) == status
                assert result.block_ids[g, i, len(entries) :].tolist() == [self.n] * (M - len(entries))
        self.check()
        return counts

    def release(self, rows):
        self.pool, self.batch, status = self.do["release"](self.pool, self.batch, column(rows, B))
        self.model.release(rows)
        assert status.tolist() == [OK] * R
        self.check()

    def fork(self, sources, rows):
        self.pool, self.batch, status = self.do["fork"](self.pool, self.batch, column(sources, B), column(rows, B))
        assert status.tolist() == [OK] * R
        self.model.fork(sources, rows)
        self.check()

    def unshare(self, rows):
        mask = jnp.array([b in rows for b in range(B)])
        self.pool, self.batch, result = self.do["unshare"](self.pool, self.batch, mask)
        copies, status = self.model.unshare(rows)
        assert result.status.tolist() == status
        for b in range(B):
            expected = copies[b] or [(self.n, self.n)] * self.groups
            assert list(zip(result.sources[b].tolist(), result.targets[b].tolist(), strict=True)) == expected
        self.check()
        return copies, status

    def roll_back(self, verb, lengths):
        wanted = jnp.array(lengths, jnp.int32)
        if verb == "trim":
            self.pool, self.batch, status = self.do["trim"](self.pool, self.batch, wanted)
        else:
            self.batch, status = self.do["rewind"](self.batch, wanted)
        assert status.tolist() == getattr(self.model, verb)(lengths)
        self.check()
        return status.tolist()

    def slide(self, computed):
        self.pool, self.batch, status = self.do["slide"](self.pool, self.batch, jnp.array(computed, jnp.int32))
        assert status.tolist() == self.model.slide(computed)
        self.check()
        return status.tolist()

    @property
    def tables(self):
        return tables_of(self.batch)

    def check(self):
        assert self.tables == self.model.tables
        assert self.batch.lengths.tolist() == self.model.lengths
        assert not any(map(int, self.do["check_sequences"](self.batch)))
        assert not any(map(int, self.do["check"](self.pool, invariants.holders(self.batch))))
        assert stack(self.pool) == self.model.pool.reset
        assert self.pool.ref_counts.tolist() == self.model.pool.refs
        assert queue_order(self.pool) == list(self.model.pool.inactive)


def tables_of(batch):
    """Blocks of each group and row, None where a window has passed."""
    tables, counts = batch.block_tables.tolist(), batch.num_blocks.tolist()
    return [
        [[b if b != batch.pool_blocks else None for b in row[:n]] for row, n in zip(table, counts, strict=True)]
        for table in tables
    ]


def stack(state):
    return state.reset_stack.tolist()[: int(state.num_reset)]


def queue_order(state):
    queue = jax.tree.map(np.asarray, state.inactive)
    entry = (int(queue.head) + np.arange(int(queue.tail) - int(queue.head))) % len(queue.ring)
    return queue.ring[entry[np.asarray(lru.live(state.inactive))[entry]]].tolist()


def walk(d, rng, steps, *, hybrid=False, preempting=False):
    """Drives batch, pool and model by random steps; returns what was seen."""
    contents, registered, seen = {}, dict.fromkeys(range(B), 0), set()
    preempted = []  # contents and lengths
    for _ in range(steps):
        running = [b for b in range(B) if d.model.tables[0][b]]
        empty = [b for b in range(B) if b not in running]
        move = rng.integers(8 if hybrid else 7)
        if move == 0 and empty:
            rows = rng.permutation(empty)[:R].tolist()
            wanted = [rng.integers(0, 2, W + 1).tolist() for _ in rows]
            tokens = [int(rng.integers(1, W * T + 2)) for _ in rows]
            if preempted:
                wanted[0], tokens[0] = preempted.pop(0)
                seen.add("resumed")
            cached, status = d.start(rows, wanted, tokens)
            seen |= {("start", s) for s in status} | {("cached", c > 0) for c in cached}
            contents |= dict(zip(rows, wanted, strict=True))
            registered |= {row: c // T for row, c in zip(rows, cached, strict=True)}
        elif move == 1:
            tokens = [int(rng.integers(-1, 12)) if b in running and rng.random() < 0.5 else 0 for b in range(B)]
            seen |= {("extend", s) for s in d.extend(tokens)}
        elif move == 2 and running:
            rows = rng.permutation(running)[:R].tolist()
            counts = d.register(rows, [contents[r] for r in rows], [registered[r] for r in rows])
            for row, count in zip(rows, counts, strict=True):
                registered[row] += count
        elif move == 3 and running and rng.random() < 0.6:
            leaving = rng.permutation(running)[:R].tolist()
            if preempting and d.model.lengths[leaving[0]]:
                preempted.append((contents[leaving[0]], d.model.lengths[leaving[0]]))
            d.release(leaving)
        elif move == 4 and running and empty:
            rows = rng.permutation(empty)[:R].tolist()
            sources = rng.choice(running, len(rows)).tolist()
            d.fork(sources, rows)
            for source, row in zip(sources, rows, strict=True):
                # They part ways in the first block that is not whole.
                whole = d.model.lengths[row] // T
                contents[row] = contents[source][:whole] + rng.integers(0, 2, W + 1 - whole).tolist()
                registered[row] = min(registered[source], whole)
        elif move == 5 and running:
            copies, status = d.unshare([b for b in running if rng.random() < 0.7])
            seen |= {("unshare", bool(made), s) for made, s in zip(copies, status, strict=True)}
        elif move == 6 and running:
            # Below what is registered only by trim: rewinding there and writing on would be the caller's mistake.
            verb = "trim" if rng.random() < 0.5 else "rewind"
            lowest = [0 if verb == "trim" else T * registered[b] for b in range(B)]
            lengths = [
                int(rng.integers(min(lowest[b], d.model.lengths[b]), d.model.lengths[b] + 2)) if rng.random() < 0.5
                else d.model.lengths[b]
                for b in range(B)
            ]  # fmt: skip
            seen |= {(verb, s) for s in d.roll_back(verb, lengths)}
            registered = {b: min(registered[b], d.model.lengths[b] // T) for b in range(B)}
        elif move == 7:
            # As far as is registered, as a server would; or anywhere.
            told = [registered[b] * T if b in running and rng.random() < 0.7 else 0 for b in range(B)]
            if rng.random() < 0.3:
                told = [int(rng.integers(-1, length + 2)) for length in d.model.lengths]
            before = int(pool.stats(d.pool).held)
            seen |= {("slide", s) for s in d.slide(told)} | {("freed", int(pool.stats(d.pool).held) < before)}
    return seen


@pytest.mark.parametrize("windows", WINDOWS, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_random_steps_match_the_model(windows, seed):
    hybrid = windows in HYBRID
    seen = walk(Driver(windows), np.random.default_rng([len(windows), seed]), 240, hybrid=hybrid)
    if hybrid:
        assert {("slide", OK), ("slide", Status.INVALID_COUNT), ("freed", True)} <= seen
        assert ("trim", Status.WINDOW_PASSED) in seen
    assert {("start", OK), ("start", Status.OUT_OF_BLOCKS), ("cached", True), ("extend", OK)} <= seen
    assert {("extend", Status.SHARED_TAIL), ("unshare", True, OK)} <= seen
    assert {("trim", OK), ("trim", Status.INVALID_COUNT), ("rewind", OK)} <= seen


@pytest.mark.parametrize("groups", [1, 2])
def test_a_fork_shares_everything_and_copies_what_it_writes(groups):
    d = Driver((None,) * groups)
    d.start([0], [[0, 1]], [6])
    d.fork([0, 0], [1, 2])
    assert d.model.tables[0][0] == d.model.tables[0][1] == d.model.tables[0][2]
    assert d.extend([1, 1, 0, 0]) == [Status.SHARED_TAIL, Status.SHARED_TAIL, OK, OK]
    copies, _ = d.unshare([1])
    assert [len(made) for made in copies] == [0, groups, 0, 0]
    assert d.extend([0, 1, 0, 0]) == [OK] * B
    d.release([2])
    copies, _ = d.unshare([0])  # nobody else holds it any more
    assert not any(copies)
    assert d.extend([3, 0, 0, 0]) == [OK] * B
    d.release([0, 1])


def test_rejected_tokens_roll_back_across_a_block_boundary():
    d = Driver(ONE)
    d.start([0], [[0, 1, 1]], [7])
    assert d.register([0], [[0, 1, 1]], [0]) == [1]
    assert d.extend([3, 0, 0, 0]) == [OK] * B
    before = d.model.tables[0][0][:2]
    assert d.roll_back("trim", [8, 0, 0, 0]) == [OK] * B
    assert d.model.tables[0][0] == before
    assert d.roll_back("trim", [9, 0, 0, -1]) == [Status.INVALID_COUNT, OK, OK, Status.INVALID_COUNT]
    # Into the registered block: it stays findable, and the row goes on in a block of its own.
    assert d.roll_back("trim", [2, 0, 0, 0]) == [OK] * B
    assert d.extend([1, 0, 0, 0])[0] == Status.SHARED_TAIL
    copies, _ = d.unshare([0])
    assert copies[0] == [(before[0], d.model.tables[0][0][0])]
    assert d.extend([1, 0, 0, 0]) == [OK] * B
    assert d.model.pool.keys == {before[0]: (2, 0)}


def test_a_loop_rewinds_and_goes_on_in_the_same_blocks():
    running = sequences.init(1, 4, block_size=4, pool_blocks=16)
    state, reserved = pool.init(16), None
    state, running, _ = sequences.start(
        state, running, jnp.array([0]), jnp.zeros((1, 1, 4), jnp.uint32), jnp.array([0]), jnp.array([6])
    )
    state, reserved = grants.reserve(state, jnp.int32(1), max_blocks=1)
    running, grant, status = grants.extend(running, reserved.grant, jnp.array([5]))
    assert (status.tolist(), running.num_blocks.tolist()) == ([OK], [3])
    running, status = sequences.rewind(running, jnp.array([7]))
    assert (status.tolist(), running.lengths.tolist(), running.num_blocks.tolist()) == ([OK], [7], [3])
    running, grant, status = grants.extend(running, grant, jnp.array([5]))
    assert (status.tolist(), running.lengths.tolist(), int(grant.used)) == ([OK], [12], 1)
    _, _, status = grants.extend(running, grant, jnp.array([-1]))
    assert status.tolist() == [Status.INVALID_COUNT]


def test_a_hit_is_what_every_group_can_serve():
    d = Driver(TWO)
    prompt = [1, 0, 1]
    d.start([0], [prompt], [12])
    d.register([0], [prompt], [0])
    d.release([0])
    # Group 1 loses its last block only: the oldest of the queue is the last group's tail.
    evict = jax.jit(functools.partial(pool.evict, max_count=1))
    d.pool, evicted = evict(d.pool, jnp.int32(1))
    d.model.pool.evict(1)
    assert evicted.groups.tolist() == [1]
    cached, _ = d.start([0], [prompt], [13], num_hashes=[3])
    assert cached == [2 * T]


def test_two_sequences_share_their_prefix_and_keep_it_alive():
    d = Driver(ONE)
    first, second = [1, 1, 0, 0], [1, 1, 1, 0]
    d.start([0], [first], [13])
    d.register([0], [first], [0])
    cached, _ = d.start([1, 2], [second, first], [9, 8])
    assert cached == [2 * T, T]  # the second is capped: it computes its last token
    tables = d.tables[0]
    assert tables[1][:2] == tables[0][:2]
    assert tables[2][0] == tables[0][0] != tables[2][1]
    d.release([0])
    assert [d.model.pool.refs[b] for b in tables[1]] == [1 + 1, 1, 1]
    d.register([2], [first], [1])  # the duplicate gives way to what the second holds
    assert d.tables[0][2] == tables[1][:2]
    d.release([1, 2])
    assert int(pool.stats(d.pool).held) == 0


def test_a_row_that_does_not_fit_gives_back_its_prefix_and_later_rows_get_none():
    d = Driver(ONE)
    prompt = [0, 0, 1, 1]
    d.start([0], [prompt], [12])
    d.register([0], [prompt], [0])
    d.release([0])
    d.start([0], [[1, 1, 1, 1]], [16])
    d.start([1], [[1, 0, 1, 1]], [16])  # 2 left, both of them the prompt's
    assert int(pool.stats(d.pool).inactive) == 2
    cached, status = d.start([2, 3], [prompt, [1]], [16, 1])
    assert (cached, status) == ([0, 0], [Status.OUT_OF_BLOCKS] * 2)
    assert queue_order(d.pool) == [1, 0]
    assert d.tables[0][2:] == [[], []]
    assert d.start([3, 2], [prompt, prompt], [8, 4])[1] == [OK, Status.OUT_OF_BLOCKS]  # a hit needs no free block


def test_tables_that_are_too_narrow_are_told_and_take_nothing():
    d = Driver(ONE)
    assert d.start([0, 1], [[0], [1]], [17, 16])[1] == [Status.TABLE_FULL, OK]
    assert d.extend([0, 1, 9, 4]) == [OK, Status.TABLE_FULL, Status.INVALID_COUNT, OK]
    assert d.batch.lengths.tolist() == [0, 16, 0, 4]


def test_padding_rows_change_nothing():
    d = Driver(TWO)
    assert d.start([], [], []) == ([], [])
    d.register([], [], [])
    d.release([])
    assert stack(d.pool) == stack(pool.init(d.n))


def test_a_row_that_does_not_fit_leaves_no_trace():
    d = Driver(ONE)
    for prompt in ([0, 1], [1, 1]):
        d.start([0], [prompt], [2 * T])
        d.register([0], [prompt], [0])
        d.release([0])
    d.start([1, 2], [[1, 0, 1, 0], [0, 0]], [4 * T, d.n * T - 8 * T], [0, 0])
    order, refs = queue_order(d.pool), d.pool.ref_counts.tolist()
    assert (len(order), stack(d.pool)) == (4, [])
    # Of four cached blocks two are spared, the oldest; three are wanted.
    cached, status = d.start([0, 3], [[0, 0, 0], [0, 1, 1]], [3 * T, 3 * T], [0, 2])
    assert (cached, status) == ([0, 0], [Status.OUT_OF_BLOCKS] * 2)
    assert (queue_order(d.pool), d.pool.ref_counts.tolist()) == (order, refs)
    # The prefix of a row that is refused keeps its place in the queue, and goes when it is due.
    cached, status = d.start([0, 3], [[0], [0, 1, 1, 1]], [T, 4 * T], [0, 2])
    assert (cached, status) == ([0, 0], [OK, Status.OUT_OF_BLOCKS])
    assert queue_order(d.pool) == order[1:]


def test_release_without_room_keeps_the_sequence_until_the_pool_is_compacted():
    d = Driver(ONE)
    d.start([0], [[0, 1, 0]], [12])
    d.register([0], [[0, 1, 0]], [0])
    full = d.pool.inactive
    full = type(full)(**{**vars(full), "tail": jnp.uint32(2046)})  # as after 2,046 pushes that left holes
    state = type(d.pool)(**{**vars(d.pool), "inactive": full})
    state, batch, status = d.do["release"](state, d.batch, column([0], B))
    assert status.tolist() == [Status.QUEUE_FULL] * R
    jax.tree.map(np.testing.assert_array_equal, batch, d.batch)
    state, batch, status = d.do["release"](d.do["compact"](state), batch, column([0], B))
    assert status.tolist() == [OK] * R
    assert batch.lengths.tolist() == [0] * B


def test_slots():
    d = Driver(TWO)
    d.start([0, 2], [[0], [1]], [6, 3])
    rows = jnp.array([0, 0, 0, 2, 0, B, 1, 0], jnp.int32)
    positions = jnp.array([0, 5, 7, 2, 8, 0, 0, W * T], jnp.int32)
    slots = sequences.slots(d.batch, rows, positions)
    padding = d.n * T
    for g in range(2):
        a, b = d.tables[g][0], d.tables[g][2]
        expected = [a[0] * T, a[1] * T + 1, a[1] * T + 3, b[0] * T + 2, padding, padding, padding, padding]
        assert slots[g].tolist() == expected


def test_mistakes_of_size_raise():
    with pytest.raises(LayoutError, match="max_blocks is 0"):
        sequences.init(1, 0, block_size=4, pool_blocks=4)
    d = Driver(ONE)
    with pytest.raises(LayoutError, match="5 hashes a row exceed the table's 4 blocks"):
        jax.eval_shape(
            sequences.start,
            d.pool,
            d.batch,
            column([], B),
            jnp.zeros((R, 5, 4), jnp.uint32),
            column([], 0),
            column([], 0),
        )


# --- grants


@functools.cache
def loop(steps):
    """`steps` times one token for each row that runs, drawn from a grant."""

    def body(carry, tokens):
        batch, grant, status = grants.extend(*carry, tokens)
        return (batch, grant), (status, batch.lengths)

    def run(batch, grant, tokens):
        return jax.lax.scan(body, (batch, grant), jnp.broadcast_to(tokens[None], (steps, B)))

    return jax.jit(run)


@pytest.mark.parametrize("groups", [1, 2])
def test_a_loop_pops_its_grant_in_row_order_and_the_rest_comes_back_as_it_was(groups):
    d = Driver((None,) * groups)
    contents = [[1, 0, 0, 1], [0, 1, 0, 1]]
    d.start([0, 2], contents, [3, 6])
    before = stack(d.pool)
    state, reserved = d.do["reserve"](d.pool, jnp.int32(3 * groups + 1))
    assert int(reserved.status) == OK
    granted = reserved.grant.block_ids.tolist()[: 3 * groups + 1]
    assert granted == before[: -(3 * groups + 2) : -1]
    assert stack(state) == before[: len(before) - len(granted)]

    (batch, grant), (status, _) = loop(5)(d.batch, reserved.grant, jnp.array([1, 0, 1, 0], jnp.int32))
    assert status.tolist() == [[OK] * B] * 5
    assert batch.lengths.tolist() == [8, 0, 11, 0]
    # Row 0 crosses at its 5th token (step 2), row 2 at its 9th (step 3).
    old = d.tables
    tables = batch.block_tables.tolist()
    for g in range(groups):
        assert tables[g][0] == [*old[g][0], granted[g], d.n, d.n]
        assert tables[g][2] == [*old[g][2], granted[groups + g], d.n]
    assert int(grant.used) == 2 * groups

    # commit registers the complete blocks and gives back what is left, so that the stack is what it would have been.
    numbers = [chain(c)[:2] for c in contents]
    state, batch, result = d.do["commit"](
        state, batch, grant, column([0, 2], B), hash_rows(numbers), column([0, 0], 0), column([2, 2], 0)
    )
    assert result.registered[:, :, :2].all()
    assert (result.status == OK).all()
    assert stack(state) == before[: len(before) - 2 * groups]
    holders = np.bincount([b for b in batch.block_tables.reshape(-1).tolist() if b != d.n], minlength=d.n)
    assert not any(map(int, d.do["check"](state, jnp.asarray(holders, jnp.int32))))
    matched = d.do["match"](state, hash_rows(numbers), column([2, 2], 0), group=groups - 1)
    assert matched.block_ids[:, :2].tolist() == [tables[groups - 1][0][:2], tables[groups - 1][2][:2]]


def test_an_empty_grant_refuses_the_first_row_and_all_later_ones():
    d = Driver(ONE)
    d.start([0, 1], [[0], [1]], [4, 3])
    d.start([2], [[1]], [8])
    _, reserved = d.do["reserve"](d.pool, jnp.int32(1))
    (batch, grant), (status, lengths) = loop(3)(d.batch, reserved.grant, jnp.array([1, 1, 1, 0], jnp.int32))
    # Step 1: row 0 takes the one block, row 1 fills its first, row 2 finds the grant empty; then row 1 does.
    assert status.tolist() == [
        [OK, OK, Status.OUT_OF_BLOCKS, Status.OUT_OF_BLOCKS],
        [OK, *[Status.OUT_OF_BLOCKS] * 3],
        [OK, *[Status.OUT_OF_BLOCKS] * 3],
    ]
    assert lengths.tolist() == [[5, 4, 8, 0], [6, 4, 8, 0], [7, 4, 8, 0]]
    assert (int(grant.used), int(grant.count)) == (1, 1)
    assert batch.num_blocks.tolist() == [2, 1, 2, 0]


def test_a_grant_tells_full_tables_and_jumps_beyond_its_bound():
    d = Driver(ONE)
    d.start([0], [[0]], [16])
    _, reserved = d.do["reserve"](d.pool, jnp.int32(4))
    _, (status, lengths) = loop(1)(d.batch, reserved.grant, jnp.array([1, 5, 3, 0], jnp.int32))
    assert status.tolist() == [[Status.TABLE_FULL, Status.INVALID_COUNT, OK, OK]]
    assert lengths.tolist() == [[16, 0, 3, 0]]


def test_reserving_evicts_and_is_all_or_nothing():
    d = Driver(ONE)
    d.start([0], [[0, 1, 1]], [12])
    d.register([0], [[0, 1, 1]], [0])
    d.release([0])
    state, reserved = d.do["reserve"](d.pool, jnp.int32(8))
    assert int(reserved.evicted.num_blocks) == 1
    assert reserved.evicted.hashes.tolist()[0] == [chain([0, 1, 1])[-1], 5, chain([0, 1, 1])[-1], 0]
    _, refused = d.do["reserve"](state, jnp.int32(3))
    assert int(refused.status) == Status.OUT_OF_BLOCKS
    assert (int(refused.grant.count), int(refused.evicted.num_blocks)) == (0, 0)
    _, invalid = d.do["reserve"](state, jnp.int32(9))
    assert int(invalid.status) == Status.INVALID_COUNT
    again = d.do["give_back"](state, reserved.grant)
    assert stack(again) == [reserved.grant.block_ids.tolist()[7], *stack(d.pool)]
    assert not any(map(int, d.do["check"](again)))
