"""A manager whose blocks have contents that tell right from wrong, a model of who holds what, and stores that fail.

The contents of a token's slot are a function of all tokens up to it: a block in the wrong place, or of another prefix,
does not pass for the right one.
"""

import functools
import threading
from collections import OrderedDict
from concurrent.futures import Future

import jax
import numpy as np
import xxhash
from shelves import Shelves

from kvbm_jax import BlockManager, KvBlockManagerConfig
from kvbm_jax import cache as kv_cache
from kvbm_jax.agreement import agree_alone
from kvbm_jax.protocols import Outcome, StoreRow, Tier

SIZE = 4
LAYERS = 2
WIDTH = 256  # tokens of the longest prompt
BLOCK_BYTES = LAYERS * 2 * SIZE * 1 * 2 * 4
HOST = {"enable_offload": True, "disk_budget": 0}


def disk(path, **changes):
    """Configuration of a disk tier."""
    return {"enable_offload": True, "disk_budget": 64 << 20, "offload_path": path, "model_id": "tiny"} | changes


def prompt(first, blocks, tail=1):
    """Tokens that count up from `first`: whole blocks, and `tail` more."""
    return list(range(first, first + blocks * SIZE + tail))


def configuration(num_blocks=8, **config):
    """Of a manager whose blocks `contents` fills."""
    values = {"block_size": SIZE, "num_blocks": num_blocks, "num_layers": LAYERS, "num_kv_heads": 1, "head_dim": 2}
    return KvBlockManagerConfig(**(values | {"dtype": "float32"} | config))


def make(
    num_blocks=8,
    max_sequences=1,
    metrics=None,
    observer=None,
    stores=None,
    agreement=agree_alone,
    network=None,
    **config,
):
    return BlockManager(
        configuration(num_blocks, **config),
        max_sequences=max_sequences,
        max_sequence_tokens=WIDTH,
        metrics=metrics,
        observer=observer,
        stores=stores,
        agreement=agreement,
        peers=network,
    )


def contents(tokens):
    """What the slots of tokens hold, f32[S, LAYERS, 4]: keys, then values."""
    state, rows = xxhash.xxh64(), []
    for token in tokens:
        state.update(int(token).to_bytes(8, "little"))
        rows.append([state.intdigest() % 2**20 + number for number in range(LAYERS * 4)])
    return np.array(rows, np.float32).reshape(-1, LAYERS, 4)


@functools.partial(jax.jit, donate_argnums=0)
def _store(cache, data, slots):
    for layer in range(LAYERS):
        keys, values = data[:, None, layer, :2], data[:, None, layer, 2:]
        cache = kv_cache.store_kv(cache, layer, keys, values, slots)
    return cache, None


def slots_of(manager, seq):
    count, size = len(seq.tokens), manager.layout.block_size
    table = np.asarray(manager.sequences.block_tables)[0, seq.row]
    positions = np.arange(count)
    return table[positions // size] * size + positions % size


def prefill(manager, seq, first=None):
    """Writes what was not found, or what comes after the first tokens."""
    data = np.zeros((WIDTH, LAYERS, 4), np.float32)
    slots = np.full((WIDTH,), manager.layout.num_slots, np.int32)
    new = slice(seq.num_cached if first is None else first, len(seq.tokens))
    data[new], slots[new] = contents(seq.tokens)[new], slots_of(manager, seq)[new]
    manager.run(_store, data, slots)


def check(manager, seq):
    """Compares the slots of a sequence with what they should hold."""
    slots, size = slots_of(manager, seq), manager.layout.block_size
    array = np.stack([np.asarray(a) for a in manager.cache.arrays], 1)  # [N, L, C, T, H, D]
    found = array[slots // size, :, :, slots % size].reshape(len(slots), LAYERS, 4)
    np.testing.assert_array_equal(found, contents(seq.tokens))


def serve(manager, tokens, **options):
    """One request from start to release; returns its hits by tier, in tokens."""
    with manager.start(tokens, **options) as seq:
        prefill(manager, seq)
        check(manager, seq)
        manager.register(seq)
        assert sum(seq.hits.values()) == seq.num_cached
        return {tier: count for tier, count in seq.hits.items() if count}


def settle(manager, seconds=60):
    """Waits for the moves under way."""
    mover = manager._device.residency._engine._mover
    mover.settle()
    assert mover.wait_idle(seconds)
    mover.settle()


class TierModel:
    """Which tier holds what after sequential requests of whole blocks and one token more; the rule in plain Python."""

    def __init__(self, num_blocks, capacities):
        self.num_blocks = num_blocks
        self.below = Shelves(capacities)
        self.held = {Tier.G1: OrderedDict(), **self.below.held}
        self.evictions = 0

    def serve(self, ids):
        """Returns the hits by tier, in blocks."""
        device = self.held[Tier.G1]
        resident = 0
        while resident < len(ids) and ids[resident] in device:
            resident += 1
        hits = dict.fromkeys(self.held, 0) | {Tier.G1: resident}
        for tier in self.below.find(ids[resident:]):
            hits[tier] += 1
        held = set(ids[:resident])
        needed = len(ids) + 1 - resident
        assert needed + resident <= self.num_blocks
        while self.num_blocks - len(device) < needed:
            victim = next(key for key in device if key not in held)
            del device[victim]
            self.evictions += 1
            self.below.offer(victim)
        device.update(dict.fromkeys(ids))
        for key in reversed(ids):
            device.move_to_end(key)
        return hits


class View:
    """What a subscriber believes, from events alone."""

    def __init__(self):
        self.held = {tier: set() for tier in Tier}

    def apply(self, event):
        key = event.sequence_hash
        kind = event.event_type.value
        if kind == "cleared":
            for tier in Tier if event.tier is None else [event.tier]:
                self.held[tier].clear()
        elif kind == "deleted":
            self.held[event.tier].discard(key)
        else:
            self.held[event.tier].add(key)
            if kind == "migrated":
                self.held[event.from_tier].discard(key)


def believed(events, view):
    """What a subscriber believes after the events so far, by tier; empty tiers are left out."""
    for batch in events.drain():
        for event in batch:
            view.apply(event)
    return {tier: held for tier, held in view.held.items() if held}


def assert_in_agreement(manager, stores, events, view):
    """Policy, stores and what a subscriber believes are the same."""
    settle(manager)
    manager._device.residency._engine._forget_lost()
    settle(manager)
    held = believed(events, view)
    for store in stores:
        stored = {record.key.sequence_hash for _, record in store.records()}
        known = {key.sequence_hash for key in manager._device.residency._engine._tiers.oldest_first(store.tier)}
        assert stored == known == held.get(store.tier, set())


class Faulty:
    """A store that fails on request."""

    def __init__(self, store):
        self._store = store
        self.fail_puts = self.fail_gets = self.raise_once = self.raise_late_once = self.forget_records = False
        self.room = None
        self.gate = threading.Event()
        self.gate.set()

    def __getattr__(self, name):
        return getattr(self._store, name)

    def put(self, records, blocks):
        if self.fail_puts:
            return self._failed(len(records))
        if self.room is not None and self._store.stats().blocks + len(records) > self.room:
            return self._failed(len(records), Outcome.REFUSED)
        future = self._store.put(records, blocks)
        if self.gate.is_set():
            return future
        late = Future()

        def wait():
            self.gate.wait(60)
            late.set_result(future.result())

        threading.Thread(target=wait, daemon=True).start()
        return late

    def get(self, keys, out):
        if self.raise_once:
            self.raise_once = False
            raise OSError("the medium is gone")
        future = self._failed(len(keys)) if self.fail_gets else self._store.get(keys, out)
        if self.raise_late_once:
            self.raise_late_once = False
            future = Future()
            future.set_exception(OSError("the medium is gone"))
        if self.forget_records:
            rows = tuple(row._replace(record=None) for row in future.result())
            future = Future()
            future.set_result(rows)
        return future

    def _failed(self, count, outcome=Outcome.FAILED):
        future = Future()
        future.set_result((StoreRow(outcome, reason="no"),) * count)
        return future
