"""The one owner of a pool and its cache, outside the jitted step.

A server tells the manager what comes in; the manager finds cached prefixes, allocates, registers, evicts, and tells
the world by events. The server runs its own compiled programs on the cache that the manager holds:

    manager.start(tokens)            match the prefix on the device and in the tiers below, allocate the rest
    manager.run(prefill, ...)        the server's program; takes the cache donated, returns it
    manager.register(seq, n)         what is computed becomes findable
    manager.reserve([seq], n)        blocks for a compiled decode loop
    manager.run(decode, ...)
    manager.commit(...)              its tokens, its sequences, what its grant has left
    manager.release(seq)             blocks stay cached until they are evicted, and are then offered to the tiers below
    manager.close()                  what is cached is brought to the disk tier

Calls may come from any thread and are carried out one at a time (`kvbm_jax.turns`); `command` lets an operator's thread
go before the next call. Subscriptions to events wait for nobody.
"""

import functools
import logging
import time
from collections import Counter, abc
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Concatenate, Self

import jax
import numpy as np
from jax.typing import ArrayLike
from numpy.typing import NDArray

from kvbm_jax.admission import Admission, Prepared
from kvbm_jax.agreement import Agreement, agree_alone
from kvbm_jax.cache import KVCache
from kvbm_jax.calls import Calls
from kvbm_jax.config import KvBlockManagerConfig
from kvbm_jax.device_tier import DeviceTier
from kvbm_jax.errors import ConfigError
from kvbm_jax.event_flow import EventFlow
from kvbm_jax.events import EventPublisher, KvEvent, Subscription
from kvbm_jax.grants import Grant
from kvbm_jax.handles import Block, Hasher, ResizeReport, Sequence
from kvbm_jax.hashing import Multimodal, block_keys, check_tokens
from kvbm_jax.layout import KVLayout
from kvbm_jax.loops import Loops
from kvbm_jax.loose_blocks import LooseBlocks
from kvbm_jax.metrics import GuardedMetrics, NullMetrics
from kvbm_jax.migration import Acts, Arrival, Migration
from kvbm_jax.offload.engine import FlushReport
from kvbm_jax.outcomes import BlockCounts
from kvbm_jax.policies import EvictionPolicy, ScoreFunction, check_priority
from kvbm_jax.progress import Progress
from kvbm_jax.protocols import BlockStore, Clock, MetricsSink, RequestObserver, StoreStats, Tier
from kvbm_jax.reblock import ReblockReport
from kvbm_jax.request_log import RequestLog
from kvbm_jax.residency import Residency
from kvbm_jax.roster import Roster
from kvbm_jax.sequences import SequenceBatch
from kvbm_jax.sizing import layout_of
from kvbm_jax.tenants import TenantBlocks
from kvbm_jax.tiers import open_engine
from kvbm_jax.upkeep import Upkeep

if TYPE_CHECKING:
    from kvbm_jax.controller import Controller
    from kvbm_jax.peers import PeerNetwork

__all__ = ["BlockManager"]

_LOG = logging.getLogger(__name__)


type _Method[**P, R] = abc.Callable[Concatenate["BlockManager", P], R]


def _in_turn[**P, R](method: _Method[P, R]) -> _Method[P, R]:
    """Has a method wait until no other thread is in one."""

    @functools.wraps(method)
    def in_turn(self: "BlockManager", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._calls.take(functools.partial(method, self, *args, **kwargs))

    return in_turn


def _whole[**P, R](method: _Method[P, R]) -> _Method[P, R]:
    """Has an interrupt (Ctrl-C, say) within a method leave the device's pool empty, not broken; refuses after `close`.

    Donated state is gone before its successor is assigned; what comes in between cannot be undone.
    """

    @functools.wraps(method)
    def whole(self: "BlockManager", /, *args: P.args, **kwargs: P.kwargs) -> R:
        return self._calls.whole(functools.partial(method, self, *args, **kwargs), self._lose)

    return whole


def _open_controller(manager: "BlockManager", url: str, token_file: Path | None) -> "Controller":
    from kvbm_jax.controller import Controller, read_token  # noqa: PLC0415 (it stands on this module)

    token = None if token_file is None else read_token(token_file)
    return Controller(manager, None if url == "auto" else url, token=token)


class BlockManager:
    """Owns the pool (on JAX's CPU device), the cache (on the default device) and the tiers below it.

    Args:
      config: sizes and choices; `num_layers`, `num_kv_heads` and `head_dim` must be set, and on a CPU `num_blocks`.
      max_sequences: how many sequences may run at once.
      max_sequence_tokens: bound of the length of one; None = the whole pool.
      step_bytes: device memory that the server's programs need while they run (`kvbm_jax.sizing.step_bytes`): where
        `num_blocks` is unset, the cache leaves as much.
      metrics: where measurements go; None = nowhere. What it raises is logged, and changes nothing.
      observer: is told of requests, `kvbm_jax.monitoring.tracing.RequestTracer` for example; None for nobody.
      clock: time for events and durations; None = the system's.
      stores: the tiers below the device, the fastest first, closed with the manager; None = those of `config`.
      eviction_policy: which cached block of the device goes first: the name of a policy, a policy of
        `kvbm_jax.policies`, or a function from a `policies.BlockView` to scores, of which the lowest goes first; None =
        what `config` names.
      agreement: decides how much of what the tiers brought up is used, where several processes run one plan; see
        `kvbm_jax.agreement`.
      peers: other workers, whose host memory is read and who read this one's; closed with the manager;
        None = whom `config` names.

    Raises:
      ConfigError: if a size is unset, the transport asked for is not there, a tier or a policy cannot be had, or there
        is no CPU device.
      LayoutError: if a size is out of range.
      MissingDependencyError: if the package of a tier or of the transport is not installed.
      TransportError: if the transport reaches nobody, or its address is taken.
    """

    def __init__(
        self,
        config: KvBlockManagerConfig,
        *,
        max_sequences: int = 8,
        max_sequence_tokens: int | None = None,
        step_bytes: int = 0,
        metrics: MetricsSink | None = None,
        observer: RequestObserver[Sequence] | None = None,
        clock: Clock | None = None,
        stores: abc.Sequence[BlockStore] | None = None,
        eviction_policy: str | EvictionPolicy | ScoreFunction | None = None,
        agreement: Agreement = agree_alone,
        peers: "PeerNetwork | None" = None,
    ) -> None:
        self.config = config
        self._calls = Calls()
        layout = layout_of(config, step_bytes=step_bytes)
        limit = layout.num_slots if max_sequence_tokens is None else max_sequence_tokens
        if limit < 1 or max_sequences < 1:
            raise ConfigError(
                f"max_sequences is {max_sequences} and max_sequence_tokens {limit}; both must be at least 1"
            )
        self._metrics: MetricsSink = NullMetrics() if metrics is None else GuardedMetrics(metrics)
        self._clock: Clock = time if clock is None else clock
        self._events = EventFlow(config, metrics=self._metrics, clock=self._clock)
        self._publisher = EventPublisher(
            self._events.sink,
            worker_id=config.worker_id,
            block_size=config.block_size,
            clock=self._clock,
        )
        self._hasher = Hasher(config.block_size, config.hash_algorithm)
        engine = None
        try:
            engine = open_engine(
                config,
                layout,
                stores,
                publisher=self._publisher,
                metrics=self._metrics,
                clock=self._clock,
                network=peers,
            )
            self._device = DeviceTier(
                layout,
                max_sequences=max_sequences,
                max_sequence_tokens=max_sequence_tokens,
                eviction_policy=config.eviction_policy if eviction_policy is None else eviction_policy,
                quotas=config.quotas,
                residency=Residency(self._publisher, self._metrics, engine),
                metrics=self._metrics,
                clock=self._clock,
            )
        except BaseException:
            if engine is not None:
                engine.close(0)
            self._events.close()
            raise
        self._requests = RequestLog(self._metrics, observer)
        self._roster = Roster(max_sequences, self._requests.left)
        self._progress = Progress(self._device, self._roster)
        self._admission = Admission(self._device, self._roster, self._progress, agreement)
        self._migration = Migration(
            None if engine is None else engine.peers,
            Acts(self.start, self._share_all, self._device.residency.settle, self.release, self._give_up),
            self._hasher,
            metrics=self._metrics,
            clock=self._clock,
        )
        self._loops = Loops(self._device, self._roster, self._progress)
        self._loose = LooseBlocks(self._device)
        self._upkeep = Upkeep(self._device)
        self._controller: Controller | None = None
        if config.controller is not None:
            try:
                self._controller = _open_controller(self, config.controller, config.controller_token_file)
            except BaseException:
                self.close(0, flush=False)
                raise

    @property
    def layout(self) -> KVLayout:
        """Sizes and arrangement of the cache as it is now."""
        return self._device.layout

    # Sequences.

    def start(
        self,
        tokens: abc.Sequence[int] | NDArray[np.integer],
        *,
        salt: str = "",
        tenant: str | None = None,
        lora_name: str | None = None,
        multimodal: Multimodal = (),
        priority: int = 0,
        reuse: bool = True,
    ) -> Sequence:
        """Begins a sequence: finds its cached prefix, holds it, and allocates blocks for the rest of the prompt.

        What the device does not hold is looked for in the tiers below, and brought up before this returns. At least
        the last token is left to compute, also when all of the prompt is cached. Tokens from `seq.num_cached` on have
        slots, which the caller's prefill must fill before `register`.

        Args:
          tokens: the prompt, at least one token.
          salt: prefixes are shared within equal salts only.
          tenant: whose quota its blocks count for, see `quotas` of the configuration; None = the salt.
          lora_name: adapter that the cache is computed with.
          multimodal: images and the like: (position of a placeholder token, hash of the content) pairs.
          priority: of the blocks that it registers, from 0 to 2**32 - 1: those of lower priority are evicted first
            under the policy `priority`, and policies of one's own may look at it.
          reuse: False for a sequence that neither finds cached blocks nor leaves any.

        Raises:
          HashingError: if a token is no integer in [0, 2**32), or an input cannot be hashed.
          SequenceTooLongError: if the prompt is empty or longer than a sequence may be.
          QuotaExceededError: if the tenant would hold more blocks than its quota; an OutOfBlocksError too.
          OutOfBlocksError: if the prompt needs more blocks than are free or evictable.
          ConfigError: if the priority is out of range.
          BlockStateError: if `max_sequences` are running.
        """
        words = check_tokens(tokens) if len(tokens) else np.zeros((0,), np.uint32)
        seq = Sequence(
            row=-1,
            tokens=words.tolist(),
            num_cached=0,
            salt=salt,
            tenant=salt if tenant is None else tenant,
            lora_name=lora_name,
            hashes=self._hasher(words, salt, lora_name, multimodal),
            multimodal=tuple(multimodal),
            hasher=self._hasher,
            on_release=self.release,
            priority=check_priority(priority),
            reuse=reuse,
            released=True,
        )
        self.resume(seq)
        return seq

    @_in_turn
    def resume(self, seq: Sequence) -> None:
        """Begins a released sequence again, with all its tokens; what is cached of them is found as by `start`.

        Preempting is `register`, then `release`.

        Raises:
          SequenceTooLongError: if it has no tokens, or more than a sequence may have.
          QuotaExceededError: if a tenant would hold more blocks than its quota.
          OutOfBlocksError: if it needs more blocks than are free or evictable.
          BlockStateError: if it is running, or `max_sequences` are.
        """
        self._calls.require_open()
        if seq.hasher != self._hasher:  # it ran before `reblock`
            seq.rehash(self._hasher)
        with self._requests.admission(seq):
            self._admit(self._admission.prepare(seq))

    @_whole
    def _admit(self, prepared: Prepared) -> None:
        self._admission.admit(prepared)

    @_whole
    def fork(self, seq: Sequence) -> Sequence:
        """Begins a copy of a running sequence, for parallel samples and beams: both share all blocks.

        The block that both would write next is copied when one of them grows (`extend`, `reserve`).

        Raises:
          BlockStateError: if it is not running, or `max_sequences` are.
        """
        copy = self._progress.fork(seq)
        self._requests.forked(copy)
        return copy

    @_whole
    def trim(self, seq: Sequence, num_tokens: int) -> None:
        """Rolls a sequence back to its first `num_tokens` tokens, as when drafted ones are rejected.

        Raises:
          BlockStateError: if it is not running, or has not as many tokens with a slot.
        """
        self._progress.trim(seq, num_tokens)

    @_in_turn
    def match(
        self,
        tokens: abc.Sequence[int] | NDArray[np.integer],
        *,
        salt: str = "",
        lora_name: str | None = None,
        multimodal: Multimodal = (),
    ) -> int:
        """Returns how many leading tokens, in whole blocks, the device holds now; nothing is held for the caller."""
        return self._device.pool.match(self._hasher(tokens, salt, lora_name, multimodal)) * self.layout.block_size

    @_in_turn
    def locate(
        self,
        tokens: abc.Sequence[int] | NDArray[np.integer],
        *,
        salt: str = "",
        lora_name: str | None = None,
        multimodal: Multimodal = (),
    ) -> dict[Tier, int]:
        """Returns how many leading tokens, in whole blocks, `start` would find in each tier, peers (G4) included.

        Nothing is held for the caller, and no peer is asked: what they have is known from their events.
        """
        hashes, size = self._hasher(tokens, salt, lora_name, multimodal), self.layout.block_size
        resident = self._device.pool.match(hashes)
        counts = Counter(self._device.residency.locate(hashes[resident:]))
        return {tier: blocks * size for tier, blocks in ({Tier.G1: resident} | counts).items() if blocks}

    @_whole
    def share(
        self,
        tokens: abc.Sequence[int] | NDArray[np.integer],
        *,
        salt: str = "",
        lora_name: str | None = None,
        multimodal: Multimodal = (),
    ) -> int:
        """Copies the blocks of a prompt that the device holds to host memory, where peers can read them.

        Returns at once, with how many leading tokens these are; `created` events of tier G2 tell what can be read.
        """
        hashes = self._hasher(tokens, salt, lora_name, multimodal)
        resident = self._device.pool.match(hashes)
        self._device.share(hashes[:resident])
        return resident * self.layout.block_size

    # Other workers.

    def migrate(self, seq: Sequence, to_worker: str, *, payload: bytes = b"", timeout: float = 30.0) -> int:
        """Hands a running sequence over to another worker, which goes on with it: to drain this one, say.

        All its tokens with a slot must be computed. Its whole blocks are pulled by the other worker; what follows them
        is computed there. It ends here then, and what nobody else holds of it is forgotten here, with `migrated`
        events. Other sequences may go on meanwhile, this one must not. Whatever is raised, it still runs here; only
        after `InDoubtError`, or an interrupt, it may be released, for it may have gone on there.

        Args:
          seq: the sequence.
          to_worker: `worker_id` of a peer whose application calls `accept`.
          payload: what that is given with it: the state of a sampler, who waits for the answer.
          timeout: seconds that it has to take the sequence and pull its blocks.

        Returns:
          How many tokens need no computation there.

        Raises:
          ConfigError: if there are no peers.
          BlockStateError: if the sequence is not running, went on meanwhile, or leaves no blocks (`reuse=False`).
          IdentityMismatchError: if the other's cache is of another model or layout.
          TransferError: if there is no such peer, or it refuses: nobody takes the sequence, it has no room for it.
          PeerLostError: if the other is gone, or does not answer in time.
          InDoubtError: if the sequence was given to the other, which did not confirm; it is released here. `resume` it
            once the other has ended.
        """
        return self._migration.send(seq, to_worker, payload, timeout)

    def accept(self, timeout: float = 0.0) -> Arrival | None:
        """Takes over a sequence that another worker hands over with `migrate`, and begins it.

        One that cannot begin here, for want of blocks say, stays where it is, and the wait goes on.

        Args:
          timeout: seconds to wait for one.

        Returns:
          The sequence, which runs and has its blocks, with its payload; None if none came.

        Raises:
          ConfigError: if there are no peers.
        """
        return self._migration.receive(timeout)

    @_whole
    def _share_all(self, seq: Sequence) -> None:
        self._progress.register(seq)
        self._device.share(seq.hashes[: seq.num_registered])

    @_whole
    def _give_up(self, seq: Sequence, num_tokens: int, to_worker: str) -> int:
        hashes = seq.hashes[: min(seq.num_registered, num_tokens // self.layout.block_size)]
        self._progress.release(seq)
        return self._device.hand_over(block_keys(hashes), to_worker)

    @_whole
    def extend(self, tokens: abc.Mapping[Sequence, abc.Sequence[int]]) -> None:
        """Appends tokens to running sequences and gives them slots, for steps that the host drives one by one.

        Raises:
          HashingError: if a token is no integer in [0, 2**32); nothing is extended then.
          QuotaExceededError: if a tenant would hold more blocks than its quota; the others go on all the same.
          OutOfBlocksError: if blocks are lacking; other sequences may have been extended.
          SequenceTooLongError: if a sequence would outgrow its table.
          BlockStateError: if a sequence is not running.
        """
        self._progress.extend(tokens)

    @_whole
    def step(
        self, tokens: abc.Mapping[Sequence, abc.Sequence[int]], *, ending: abc.Sequence[Sequence] = ()
    ) -> dict[Sequence, int]:
        """Does the bookkeeping of a server's step for the whole batch, as one compiled call (`kvbm_jax.step`).

        Everything that has a slot is taken to be computed: whole blocks become findable. Then sequences of `ending` are
        released, and the others get slots for their `tokens`, as by `register`, `release` and `extend`.

        Args:
          tokens: new tokens of running sequences, in the order of their claim to blocks.
          ending: running sequences that have ended, none of them in `tokens`.

        Returns:
          How many blocks of each sequence in `tokens` others could not find before.

        Raises:
          HashingError: if a token is no integer in [0, 2**32); nothing is done then.
          SequenceTooLongError: if a sequence would outgrow its table; nothing is done then.
          QuotaExceededError: if a tenant would hold more blocks than its quota; the others go on all the same.
          OutOfBlocksError: if blocks are lacking; those named before the first that lacks them have been extended.
          BlockStateError: if a sequence is not running, or named twice; nothing is done then.
        """
        return self._progress.step(tokens, ending)

    @_whole
    def register(self, seq: Sequence, num_computed: int | None = None, *, priority: int | None = None) -> int:
        """Makes the blocks of a sequence findable that are whole and computed.

        Args:
          seq: a running sequence.
          num_computed: how many of its tokens have their keys and values in the cache; None = all with a slot.
          priority: of the blocks that this call makes findable, as for a system prompt; None = the sequence's.

        Returns:
          How many blocks others could not find before.

        Raises:
          BlockStateError: if the sequence is not running, or has fewer slots.
          ConfigError: if the priority is out of range.
        """
        count = self._progress.register(seq, num_computed, priority)
        self._device.update_gauges()
        return count

    @_in_turn
    def release(self, seq: Sequence) -> None:
        """Ends a sequence; what it registered stays cached until it is evicted.

        Raises:
          BlockStateError: if it is not running (a double release).
        """
        if self._calls.ended:
            self._roster.require(seq)
            self._roster.leave(seq)
        else:
            self._release(seq)

    @_whole
    def _release(self, seq: Sequence) -> None:
        self._progress.release(seq)

    # Compiled programs.

    @property
    def max_sequences(self) -> int:
        """How many sequences may run at once: rows of `sequences`."""
        return self._roster.max_sequences

    @property
    def num_running(self) -> int:
        """How many sequences run."""
        return len(self._roster)

    @_in_turn
    def warm_up(self) -> None:
        """Compiles the manager's own programs, so that the first requests do not wait for them."""
        self._device.warm_up()

    @property
    def cache(self) -> KVCache:
        """The cache as it is now. Programs that donate it go through `run`."""
        return self._device.cache.value

    @property
    @_in_turn
    def sequences(self) -> SequenceBatch:
        """Tables and lengths of the running sequences, on the device of the cache; a value, not a view."""
        return self._device.cache.beside(self._device.pool.sequences)

    def run[**P, R](
        self,
        step: abc.Callable[Concatenate[KVCache, P], tuple[KVCache, R]],
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
          LayoutError: if the program does not return the cache first.
          CacheLostError: if it failed after donation had destroyed the cache. The cache is empty then, no sequence
            runs any more, and an event says so.
        """

        def act() -> R:
            try:
                return self._device.cache.run(step, *args, **kwargs)
            except BaseException:
                if self._device.cache.is_lost:
                    self._lose()
                raise

        return self._calls.take(act)

    @_whole
    def reserve(self, growth: abc.Mapping[Sequence, int], *, max_blocks: int | None = None) -> Grant:
        """Sets aside the blocks that sequences need to grow.

        The grant goes into a compiled loop beside `sequences`, where `kvbm_jax.grants.extend` draws on it; both come
        back through `commit`.

        Args:
          growth: how many tokens each sequence may gain.
          max_blocks: pads the grant to this many blocks, so that a compiled loop sees one shape; None = few sizes.

        Raises:
          QuotaExceededError: if a tenant would hold more blocks than its quota.
          OutOfBlocksError: if there are not as many.
          SequenceTooLongError: if a sequence would outgrow its table.
          ConfigError: if the blocks exceed `max_blocks`, or a growth is negative.
          BlockStateError: if a sequence is not running.
        """
        return self._loops.reserve(growth, max_blocks)

    @_whole
    def commit(
        self,
        grant: Grant,
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
        self._loops.commit(grant, running, tokens)

    @_whole
    def give_back(self, grant: Grant) -> None:
        """Takes a grant back whose loop did not run, or failed.

        Raises:
          BlockStateError: if the grant is spent.
        """
        self._loops.give_back(grant)

    # Blocks outside sequences.

    @_whole
    def allocate_blocks(self, count: int, *, scrub: bool = False) -> list[Block]:
        """Grants blocks that belong to no sequence.

        Args:
          count: how many.
          scrub: zero them first; otherwise they hold what their last user left.

        Raises:
          OutOfBlocksError: if there are not as many free or evictable; none is granted then.
          ConfigError: if `count` is negative.
        """
        return self._loose.allocate(count, scrub=scrub, on_free=self._free_if_current)

    @_whole
    def free_blocks(self, blocks: abc.Sequence[Block]) -> None:
        """Gives blocks back.

        Raises:
          BlockStateError: if one was freed before or is named twice; none is freed then.
        """
        self._loose.free(blocks)

    @_in_turn
    def scrub(self) -> int:
        """Zeroes every block that holds nothing, and returns how many: what tenants that are gone have left.

        With `clear` before it, only what running sequences hold stays.
        """
        return self._loose.scrub()

    @_in_turn
    def store_kv(self, block: Block, layer: int, data: ArrayLike) -> None:
        """Writes one layer of a block: [C, T, H, D], keys then values.

        Raises:
          BlockStateError: if the handle is stale.
          LayoutError: if shape or layer do not fit.
        """
        self._loose.store(block, layer, data)

    @_in_turn
    def load_kv(self, block: Block, layer: int) -> jax.Array:
        """Reads one layer of a block: [C, T, H, D], keys then values; float32 if the cache is quantised.

        Raises:
          BlockStateError: if the handle is stale.
          LayoutError: if the layer does not exist.
        """
        return self._loose.load(block, layer)

    # Operation, events, numbers, the end.

    def command[R](self, act: abc.Callable[[Upkeep], R], seconds: float | None = None) -> R:
        """Carries out what an operator asks, between the calls of other threads and before those that wait.

        Args:
          act: is given the verbs for it; may call the manager as well.
          seconds: how long to wait for the call under way; None for as long as it takes.

        Raises:
          BusyError: if that took longer; nothing has been done then.
          BlockStateError: if the manager is closed.
          What `act` raises.
        """
        return self._calls.command(lambda: act(self._upkeep), self._lose, seconds)

    def publish_event(self, event: KvEvent) -> None:
        """Publishes an event of the caller's beside the manager's own; returns at once.

        The manager numbers it: `event_id` is replaced by the next of this worker. Where events are consolidated, or
        told in the engines' language, one that names no block goes no further.
        """
        self._publisher.publish(event)

    def subscribe_events(self, *, snapshot: bool = False) -> Subscription:
        """Returns a subscription to all events from now on, to be iterated in any thread, or asynchronously.

        What is told is what `consolidate` of the configuration says; the same goes to the transport that it names.

        Args:
          snapshot: begin with a `WorkerSnapshot` of what there is now, what the disk tier brought from an earlier life
            included; the stream follows it without a hole.
        """
        return self._events.subscribe(snapshot=snapshot)

    @_in_turn
    def stats(self) -> BlockCounts:
        """Returns the numbers of reset, inactive (cached) and held blocks."""
        return self._device.pool.stats()

    @_in_turn
    def tenant_stats(self) -> dict[str, TenantBlocks]:
        """Returns what each tenant has on the device that has a quota, `*` for all others together."""
        return self._device.pool.tenant_blocks()

    @_in_turn
    def tier_stats(self) -> dict[Tier, StoreStats]:
        """Returns sizes and counters of the tiers below the device."""
        return self._device.residency.stats()

    @_whole
    def clear(self) -> int:
        """Forgets every cached block that no sequence holds, in all tiers, and returns how many were on the device."""
        return self._device.clear()

    # Other sizes.

    @_whole
    def resize(self, num_blocks: int) -> ResizeReport:
        """Grows or shrinks the device's pool and cache between steps, with all that runs on them.

        Sequences go on, and what is cached stays found as far as it fits: reset blocks go first, then cached ones in
        the order of their eviction, which are offered to the tiers below. Blocks keep their ids unless those lie beyond
        the new size; each that moves is told as `deleted` and `created`. Take `sequences` anew afterwards; for handles
        of `allocate_blocks` see `ResizeReport.follow`: the former handle of a block that moved is stale.

        Compiled programs see other shapes and are compiled again. Both caches are in memory for a while.

        Raises:
          OutOfBlocksError: if more blocks are held than fit.
          ConfigError: if the device has no room for the new cache beside the present one.
          LayoutError: if `num_blocks` is out of range.
          BlockStateError: if a grant is under way.
          In each case nothing has changed.
        """
        self._loops.require_none()
        done = self._device.resize(num_blocks)
        moved = {old: new for (old, _), (new, _) in done.handles.items()}
        return ResizeReport(num_blocks, len(done.evicted.block_ids), moved, done.handles)

    @_whole
    def reblock(self, block_size: int) -> ReblockReport:
        """Cuts the device's cache into blocks of another size between steps, with all that runs on it.

        The cache keeps its slots, but for what is left over of a last block. Sequences keep their tokens, their lengths
        and what is computed of them. Cached prefixes are hashed anew from their tokens and stay found as far as whole
        new blocks exist: see `kvbm_jax.reblock` for which, and in which order they are evicted. Subscribers are told
        that the device is empty, and then what it holds.

        Raises:
          ConfigError: if there are tiers below, which hold blocks of one size, or no room for the new cache.
          OutOfBlocksError: if the running sequences do not fit.
          LayoutError: if `block_size` is out of range.
          BlockStateError: if a grant is under way, blocks of `allocate_blocks` are held, or any are pinned.
          In each case nothing has changed.
        """
        self._loops.require_none()
        self._upkeep.require_none()
        hasher = replace(self._hasher, block_size=block_size)
        plan = self._device.reblock(list(self._roster), hasher)
        self._hasher = hasher
        for seq in self._roster:
            seq.rehash(hasher)
            seq.num_registered = plan.num_registered[seq.row]
            seq.may_share_tail = True
        return plan.report

    def flush(self, deadline: float | None = None) -> FlushReport:
        """Copies what is cached, on the device and in host memory, to the disk tier; nothing is evicted by it.

        Other threads may go on: the turn is taken for short parts, and given back while bytes are under way.

        Args:
          deadline: seconds to wait; None for as long as it takes. What is under way then goes on.

        Returns:
          How many blocks were written, failed, and are not there yet; zeros if there is no disk tier.
        """
        return self._calls.in_parts(self._device.flush(deadline))

    def close(self, deadline: float | None = 60.0, *, flush: bool = True) -> None:
        """Flushes, and ends tiers and events; idempotent.

        Args:
          deadline: seconds that flushing may take, and then what is under way; None for as long as it takes. A store in
            the middle of a call is waited for.
          flush: False to leave the disk tier as it is.
        """
        if self._calls.ended:
            return
        try:
            report = self.flush(deadline) if flush else FlushReport(0, 0, 0)
            if report.failed or report.pending:
                _LOG.warning("closing: %d blocks were not brought to disk", report.failed + report.pending)
        finally:
            self._calls.end(functools.partial(self._end, deadline))
            if self._controller is not None:
                self._controller.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(flush=kind is None)

    def _end(self, deadline: float | None) -> None:
        try:
            self._device.residency.close(deadline)
        finally:
            self._events.close()

    def _lose(self) -> None:
        """Forgets what the device holds; the tiers below keep theirs."""
        for seq in self._roster:
            self._roster.leave(seq)
        self._loops.clear()
        self._device.renew()

    def _free_if_current(self, block: Block) -> None:
        if self._loose.is_current(block):
            self.free_blocks([block])
