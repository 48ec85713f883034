"""The one owner of a pool and its cache, outside the jitted step.

A server tells the manager what comes in; the manager finds cached prefixes, allocates, registers, evicts, and tells
the world by events. The server runs its own compiled programs on the cache that the manager holds:

    manager.start(tokens)            match the prefix, allocate the rest
    manager.run(prefill, ...)        the server's program; takes the cache donated, returns it
    manager.register(seq, n)         what is computed becomes findable
    manager.reserve([seq], n)        blocks for a compiled decode loop
    manager.run(decode, ...)
    manager.commit(...)              its tokens, its sequences, what its grant has left
    manager.release(seq)             blocks stay cached until they are evicted

Calls are made from one thread. Subscriptions to events may be read from others.
"""

import functools
import time
from collections import abc
from dataclasses import replace
from types import TracebackType
from typing import Concatenate, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from kvbm_jax import cache as kv_cache
from kvbm_jax import grants
from kvbm_jax.bookkeeper import BlockCounts, Bookkeeper, EvictedBlocks
from kvbm_jax.config import EventTransport, KvBlockManagerConfig
from kvbm_jax.errors import BlockStateError, CacheLostError, ConfigError, LayoutError, SequenceTooLongError
from kvbm_jax.events import EventBus, EventPublisher, KvEvent, NullEventSink, Subscription
from kvbm_jax.handles import Block, Sequence
from kvbm_jax.hashing import check_tokens, hash_sequence
from kvbm_jax.metrics import NullMetrics
from kvbm_jax.protocols import BlockKey, BlockRecord, Clock, MetricsSink, Tier
from kvbm_jax.sequences import SequenceBatch
from kvbm_jax.sizing import layout_of
from kvbm_jax.types import Status

__all__ = ["BlockManager"]


class BlockManager:
    """Owns the pool (on JAX's CPU device) and the cache (on the default device).

    Args:
      config: sizes and choices; `num_layers`, `num_kv_heads`, `head_dim` and `num_blocks` must be set.
      max_sequences: how many sequences may run at once.
      max_sequence_tokens: bound of the length of one; None = the whole pool.
      metrics: where measurements go; None = nowhere.
      clock: time for events and durations; None = the system's.

    Raises:
      ConfigError: if a size is unset, the transport or the tiers asked for are absent, or there is no CPU device.
      LayoutError: if a size is out of range.
    """

    def __init__(
        self,
        config: KvBlockManagerConfig,
        *,
        max_sequences: int = 8,
        max_sequence_tokens: int | None = None,
        metrics: MetricsSink | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.config = config
        self.layout = layout_of(config)
        limit = self.layout.num_slots if max_sequence_tokens is None else max_sequence_tokens
        if limit < 1 or max_sequences < 1:
            raise ConfigError(
                f"max_sequences is {max_sequences} and max_sequence_tokens {limit}; both must be at least 1"
            )
        self._max_tokens = min(limit, self.layout.num_slots)
        self._max_blocks = min(-(-limit // config.block_size), self.layout.num_blocks)
        self._max_sequences = max_sequences
        self._metrics: MetricsSink = NullMetrics() if metrics is None else metrics
        self._clock: Clock = time if clock is None else clock
        self._bus = EventBus(metrics=self._metrics)
        silent = config.events is EventTransport.NONE
        self._publisher = EventPublisher(
            NullEventSink() if silent else self._bus,
            worker_id=config.worker_id,
            block_size=config.block_size,
            clock=self._clock,
        )
        self._running: dict[int, Sequence] = {}
        self._grants: dict[int, tuple[tuple[Sequence, ...], NDArray[np.int32]]] = {}
        self._tickets = 0
        self._begin()

    def _begin(self) -> None:
        self._cache = kv_cache.init(self.layout)
        self._book = Bookkeeper(
            num_blocks=self.layout.num_blocks,
            block_size=self.layout.block_size,
            max_sequences=self._max_sequences,
            max_blocks=self._max_blocks,
        )
        self._update_gauges()

    # Sequences.

    def start(
        self, tokens: abc.Sequence[int] | NDArray[np.integer], *, salt: str = "", lora_name: str | None = None
    ) -> Sequence:
        """Begins a sequence: finds its cached prefix, holds it, and allocates blocks for the rest of the prompt.

        At least the last token is left to compute, also when all of the prompt is cached. Tokens from
        `seq.num_cached` on have slots, which the caller's prefill must fill before `register`.

        Args:
          tokens: the prompt, at least one token.
          salt: prefixes are shared within equal salts only.
          lora_name: adapter that the cache is computed with.

        Raises:
          HashingError: if a token is no integer in [0, 2**32).
          SequenceTooLongError: if the prompt is empty or longer than a sequence may be.
          OutOfBlocksError: if the prompt needs more blocks than are free or evictable.
          BlockStateError: if `max_sequences` are running.
        """
        count, size = len(tokens), self.layout.block_size
        if not 1 <= count <= self._max_tokens:
            raise SequenceTooLongError(
                f"a prompt of {count} tokens; between 1 and {self._max_tokens} fit a sequence "
                f"({self._max_blocks} blocks of {size}): shorten it, or raise num_blocks or max_sequence_tokens"
            )
        free_rows = set(range(self._max_sequences)) - self._running.keys()
        if not free_rows:
            raise BlockStateError(
                f"{self._max_sequences} sequences are running, as many as max_sequences; release one first"
            )
        words = check_tokens(tokens)
        hashes = self._hash(words, salt, lora_name, None)
        row, begun = min(free_rows), self._clock.monotonic_ns()
        reusable = (count - 1) // size
        started = self._book.start(row, hashes, reusable, count)
        self._observe_allocation(begun, started.evicted)
        self._metrics.count("kvbm_prefix_query_tokens_total", count)
        self._metrics.count("kvbm_prefix_hit_tokens_total", started.num_cached)
        seq = Sequence(
            row=row,
            tokens=words.tolist(),
            num_cached=started.num_cached,
            salt=salt,
            lora_name=lora_name,
            hashes=hashes,
            on_release=self.release,
            num_registered=started.num_cached // size,
        )
        self._running[row] = seq
        return seq

    def match(
        self, tokens: abc.Sequence[int] | NDArray[np.integer], *, salt: str = "", lora_name: str | None = None
    ) -> int:
        """Returns how many leading tokens, in whole blocks, are cached now; nothing is held."""
        return self._book.match(self._hash(tokens, salt, lora_name, None)) * self.layout.block_size

    def extend(self, tokens: abc.Mapping[Sequence, abc.Sequence[int]]) -> None:
        """Appends tokens to running sequences and gives them slots, for steps that the host drives one by one.

        Raises:
          HashingError: if a token is no integer in [0, 2**32); nothing is extended then.
          OutOfBlocksError: if blocks are lacking; other sequences may have been extended.
          SequenceTooLongError: if a sequence would outgrow its table.
          BlockStateError: if a sequence is not running.
        """
        counts = np.zeros((self._max_sequences,), np.int32)
        added = {seq: check_tokens(new).tolist() for seq, new in tokens.items()}
        for seq, new in added.items():
            self._check_running(seq)
            counts[seq.row] = len(new)
        begun = self._clock.monotonic_ns()
        most = -(-int(counts.max(initial=0)) // self.layout.block_size) + 1
        statuses, evicted = self._book.extend(counts, most)
        self._observe_allocation(begun, evicted)
        for seq, new in added.items():
            if statuses[seq.row] == Status.OK:
                seq.tokens.extend(new)
        for status in statuses:
            self._book.require(status, blocks=most)

    def register(self, seq: Sequence, num_computed: int | None = None) -> int:
        """Makes the blocks of a sequence findable that are whole and computed.

        Args:
          seq: a running sequence.
          num_computed: how many of its tokens have their keys and values in the cache; None = all with a slot.

        Returns:
          How many blocks others could not find before.

        Raises:
          BlockStateError: if the sequence is not running, or has fewer slots.
        """
        count = self._register(seq, num_computed)
        self._update_gauges()
        return count

    def _register(self, seq: Sequence, num_computed: int | None = None) -> int:
        self._check_running(seq)
        size, slots = self.layout.block_size, self._book.length(seq.row)
        computed = slots if num_computed is None else num_computed
        if not 0 <= computed <= slots:
            raise BlockStateError(f"{computed} tokens cannot be computed in a sequence that has {slots} slots")
        first, last = seq.num_registered, computed // size
        if last <= first:
            return 0
        self._rehash_tail(seq, last)
        done = self._book.register(seq.row, seq.hashes[first:last], first)
        seq.num_registered = last
        index = first + np.flatnonzero(done.new)
        if len(index):
            self._publisher.created(Tier.G1, done.block_ids[done.new], [_record(seq, int(i), size) for i in index])
        return len(index)

    def release(self, seq: Sequence) -> None:
        """Ends a sequence; what it registered stays cached until it is evicted.

        Raises:
          BlockStateError: if it is not running (a double release).
        """
        self._check_running(seq)
        self._book.release(seq.row)
        del self._running[seq.row]
        seq.released = True
        self._update_gauges()

    # Compiled programs.

    @property
    def max_sequences(self) -> int:
        """How many sequences may run at once: rows of `sequences`."""
        return self._max_sequences

    def warm_up(self) -> None:
        """Compiles the manager's own programs, so that the first requests do not wait for them."""
        self._book.warm_up()

    @property
    def cache(self) -> kv_cache.KVCache:
        """The cache as it is now. Programs that donate it go through `run`."""
        return self._cache

    @property
    def sequences(self) -> SequenceBatch:
        """Tables and lengths of the running sequences, on the device of the cache; a value, not a view."""
        return self._beside_cache(self._book.sequences)

    def run[**P, R](
        self,
        step: abc.Callable[Concatenate[kv_cache.KVCache, P], tuple[kv_cache.KVCache, R]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> R:
        """Runs the caller's program on the cache, which it may take donated.

        Args:
          step: takes the cache first, returns the new cache first.
          *args: passed on.
          **kwargs: passed on.

        Returns:
          What the program returned beside the cache.

        Raises:
          CacheLostError: if it failed after donation had destroyed the cache. The cache is empty then, no sequence
            runs any more, and an event says so.
        """
        cache = self._cache
        try:
            self._cache, result = step(cache, *args, **kwargs)
        except BaseException as error:
            if not any(array.is_deleted() for array in cache.arrays):
                raise
            self._lose()
            if not isinstance(error, Exception):
                raise
            raise CacheLostError(
                f"the step failed after its cache had been donated ({error}); the cache is empty again: "
                "start all sequences anew"
            ) from error
        return result

    def reserve(self, growth: abc.Mapping[Sequence, int], *, max_blocks: int | None = None) -> grants.Grant:
        """Sets aside the blocks that sequences need to grow.

        The grant goes into a compiled loop beside `sequences`, where `kvbm_jax.grants.extend` draws on it; both come
        back through `commit`.

        Args:
          growth: how many tokens each sequence may gain.
          max_blocks: pads the grant to this many blocks, so that a compiled loop sees one shape; None = few sizes.

        Raises:
          OutOfBlocksError: if there are not as many.
          SequenceTooLongError: if a sequence would outgrow its table.
          ConfigError: if the blocks exceed `max_blocks`.
          BlockStateError: if a sequence is not running.
        """
        count, size = 0, self.layout.block_size
        for seq, num_tokens in growth.items():
            self._check_running(seq)
            length = self._book.length(seq.row)
            needed = -(-(length + num_tokens) // size)
            if needed > self._max_blocks:
                raise SequenceTooLongError(
                    f"{num_tokens} tokens more than {length} need {needed} blocks; a sequence has at most "
                    f"{self._max_blocks}: ask for fewer tokens, or raise num_blocks or max_sequence_tokens"
                )
            count += needed - -(-length // size)
        if max_blocks is not None and count > max_blocks:
            raise ConfigError(f"max_blocks is {max_blocks}, but the growth asked for needs {count} blocks")
        begun = self._clock.monotonic_ns()
        grant, evicted = self._book.reserve(count, max_blocks)
        self._observe_allocation(begun, evicted)
        self._tickets += 1
        block_ids = np.asarray(grant.block_ids)[:count].copy()
        self._grants[self._tickets] = (tuple(growth), block_ids)
        return self._beside_cache(replace(grant, ticket=jnp.int32(self._tickets)))

    def commit(
        self,
        grant: grants.Grant,
        running: SequenceBatch,
        tokens: abc.Mapping[Sequence, abc.Sequence[int]],
    ) -> None:
        """Takes over what a compiled loop did: its sequences, its tokens, and what its grant has left.

        Completed blocks are registered. The last token of a sequence may have no slot yet, as after a decode loop
        that has just sampled it.

        Only the sequences that the grant was reserved for are taken over: others may have begun or ended meanwhile.

        Args:
          grant: the grant as the loop returned it.
          running: the sequences as the loop returned them.
          tokens: what each sequence was fed by the loop, and at most one token beyond, sampled but not fed.

        Raises:
          BlockStateError: if the grant is spent, a sequence is not running or none of the grant's, or its tokens do not
            match its slots; nothing is taken over then.
          HashingError: if a token is no integer in [0, 2**32); nothing is taken over then.
        """
        lengths = np.asarray(running.lengths)
        owners, block_ids = self._outstanding(grant)
        added = {seq: check_tokens(new).tolist() for seq, new in tokens.items()}
        for seq in added:
            self._check_running(seq)
            if seq not in owners:
                raise BlockStateError(f"the grant was not reserved for the sequence of row {seq.row}")
        live = [seq for seq in owners if self._running.get(seq.row) is seq]
        for seq in live:
            new = added.get(seq, [])
            if not 0 <= len(seq.tokens) + len(new) - lengths[seq.row] <= 1:
                raise BlockStateError(
                    f"row {seq.row} has {lengths[seq.row]} slots for {len(seq.tokens)} tokens and {len(new)} new ones; "
                    "name every token that the loop fed"
                )
        self._spend(grant)
        self._book.adopt([seq.row for seq in live], running, block_ids)
        for seq, new in added.items():
            seq.tokens.extend(new)
        for seq in added:
            self._register(seq)
        self._update_gauges()

    def give_back(self, grant: grants.Grant) -> None:
        """Takes a grant back whose loop did not run, or failed.

        Raises:
          BlockStateError: if the grant is spent.
        """
        _, block_ids = self._outstanding(grant)
        self._spend(grant)
        self._book.adopt([], self._book.sequences, block_ids)
        self._update_gauges()

    # Blocks outside sequences.

    def allocate_blocks(self, count: int) -> list[Block]:
        """Grants blocks that belong to no sequence.

        Raises:
          OutOfBlocksError: if there are not as many free or evictable; none is granted then.
          ConfigError: if `count` is negative.
        """
        if count < 0:
            raise ConfigError(f"count is {count}; it must be at least 0")
        begun = self._clock.monotonic_ns()
        block_ids, generations, evicted = self._book.allocate(count)
        self._observe_allocation(begun, evicted)
        return [
            Block(int(block), int(generation), self._book, self._free_if_current)
            for block, generation in zip(block_ids, generations, strict=True)
        ]

    def free_blocks(self, blocks: abc.Sequence[Block]) -> None:
        """Gives blocks back.

        Raises:
          BlockStateError: if one was freed before or is named twice; none is freed then.
        """
        self._book.free(*self._columns(blocks))
        self._update_gauges()

    def store_kv(self, block: Block, layer: int, data: ArrayLike) -> None:
        """Writes one layer of a block: [C, T, H, D], keys then values.

        Raises:
          BlockStateError: if the handle is stale.
          LayoutError: if shape or layer do not fit.
        """
        self._book.check(*self._columns([block]))
        values = jnp.asarray(data)
        shape = self._block_shape()
        if values.shape != shape:
            raise LayoutError(f"data has shape {list(values.shape)}; a block's layer is [C, T, H, D] = {list(shape)}")
        slots = block.block_id * self.layout.block_size + jnp.arange(self.layout.block_size, dtype=jnp.int32)
        self.run(_store_layer, values, slots, layer=layer)

    def load_kv(self, block: Block, layer: int) -> jax.Array:
        """Reads one layer of a block: [C, T, H, D], keys then values.

        Raises:
          BlockStateError: if the handle is stale.
          LayoutError: if the layer does not exist.
        """
        self._book.check(*self._columns([block]))
        array, first = kv_cache.layer_view(self._cache, layer)
        return array[first + block.block_id]

    # Events, numbers, the end.

    def publish_event(self, event: KvEvent) -> None:
        """Publishes an event of the caller's beside the manager's own; returns at once.

        The manager numbers it: `event_id` is replaced by the next of this worker.
        """
        self._publisher.publish(event)

    def subscribe_events(self) -> Subscription:
        """Returns a subscription to all events from now on, to be iterated in any thread, or asynchronously."""
        return self._bus.subscribe()

    def stats(self) -> BlockCounts:
        """Returns the numbers of reset, inactive (cached) and held blocks."""
        return self._book.stats()

    def clear(self) -> int:
        """Forgets every cached block that no sequence holds, and returns how many."""
        evicted = self._book.evict()
        self._tell_evicted(evicted)
        self._update_gauges()
        return len(evicted.block_ids)

    def close(self) -> None:
        """Ends the events; idempotent."""
        self._bus.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lose(self) -> None:
        for seq in self._running.values():
            seq.released = True
        self._running.clear()
        self._grants.clear()
        self._begin()
        self._publisher.cleared(Tier.G1)

    def _beside_cache[T](self, tree: T) -> T:
        """Copies a pytree to the device of the cache: the caller may donate it."""
        placed: T = jax.device_put(tree, self._cache.arrays[0].sharding, may_alias=False)
        return placed

    def _columns(self, blocks: abc.Sequence[Block]) -> tuple[NDArray[np.int32], NDArray[np.uint32]]:
        """Ids and generations of handles, which must be of this manager and of its present cache."""
        for block in blocks:
            if block.owner is not self._book:
                raise BlockStateError(f"block {block.block_id} is of another manager, or was lost with the cache")
        block_ids = np.array([block.block_id for block in blocks], np.int32)
        return block_ids, np.array([block.generation for block in blocks], np.uint32)

    def _outstanding(self, grant: grants.Grant) -> tuple[tuple[Sequence, ...], NDArray[np.int32]]:
        """The sequences and blocks of a grant that is under way."""
        found = self._grants.get(int(grant.ticket))
        if found is None:
            raise BlockStateError("the grant is spent: it was committed or given back before, or lost with the cache")
        return found

    def _spend(self, grant: grants.Grant) -> None:
        del self._grants[int(grant.ticket)]

    def _free_if_current(self, block: Block) -> None:
        if block.owner is self._book and self._book.is_current(*self._columns([block])):
            self.free_blocks([block])

    def _hash(
        self,
        tokens: abc.Sequence[int] | NDArray[np.integer],
        salt: str,
        lora_name: str | None,
        parent: NDArray[np.uint32] | None,
    ) -> NDArray[np.uint32]:
        return hash_sequence(
            tokens,
            self.layout.block_size,
            algorithm=self.config.hash_algorithm,
            salt=salt,
            lora_name=lora_name,
            parent=parent,
        )

    def _rehash_tail(self, seq: Sequence, count: int) -> None:
        """Brings the hashes of a sequence up to `count` blocks."""
        known = len(seq.hashes)
        if known < count:
            size = self.layout.block_size
            parent = seq.hashes[-1] if known else None
            tail = self._hash(seq.tokens[known * size : count * size], seq.salt, seq.lora_name, parent)
            seq.hashes = np.concatenate([seq.hashes, tail])

    def _check_running(self, seq: Sequence) -> None:
        if self._running.get(seq.row) is not seq:
            raise BlockStateError(f"the sequence of row {seq.row} is not running; it was released or lost")

    def _observe_allocation(self, begun: int, evicted: EvictedBlocks) -> None:
        self._metrics.observe("kvbm_allocation_latency_seconds", (self._clock.monotonic_ns() - begun) / 1e9)
        self._tell_evicted(evicted)
        self._update_gauges()

    def _tell_evicted(self, evicted: EvictedBlocks) -> None:
        if len(evicted.block_ids):
            self._metrics.count("kvbm_eviction_count_total", len(evicted.block_ids))
            keys = [BlockKey(_bytes(words)) for words in evicted.hashes]
            self._publisher.deleted(Tier.G1, evicted.block_ids, keys)

    def _update_gauges(self) -> None:
        counts = self._book.stats()
        self._metrics.gauge("kvbm_blocks_allocated", counts.held, tier=Tier.G1.label)
        self._metrics.gauge("kvbm_blocks_free", counts.reset + counts.inactive, tier=Tier.G1.label)

    def _block_shape(self) -> tuple[int, ...]:
        layout = self.layout
        return (layout.components, layout.block_size, layout.num_kv_heads, layout.head_dim)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="layer")
def _store_layer(
    cache: kv_cache.KVCache, data: jax.Array, slots: jax.Array, *, layer: int
) -> tuple[kv_cache.KVCache, None]:
    """Writes [C, T, H, D] to the slots of one block; donates the cache."""
    return kv_cache.store_kv(cache, layer, data[0], data[1], slots), None


def _record(seq: Sequence, index: int, size: int) -> BlockRecord:
    """What is known about the whole block `index` of a sequence."""
    return BlockRecord(
        key=BlockKey(_bytes(seq.hashes[index])),
        parent_hash=_bytes(seq.hashes[index - 1]) if index else None,
        token_ids=tuple(seq.tokens[index * size : (index + 1) * size]),
        lora_name=seq.lora_name,
    )


def _bytes(words: NDArray[np.uint32]) -> bytes:
    """The 16 bytes of a hash u32[4]."""
    return words.astype("<u4").tobytes()
