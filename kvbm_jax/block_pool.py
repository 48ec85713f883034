"""The host's owner of a pool and its sequences: calls the pure verbs, and turns their statuses into errors.

State lives on JAX's CPU device, so results are on the host at once; only tables and slots travel to the accelerator.
The pool is donated from call to call and never leaves this object. Between calls it does what verbs leave
to their owner: compacts the inactive queue before it runs out of room, and rehashes the index should it refuse a
key. It knows block ids and hashes, but neither tokens nor cache contents; the manager adds those.

Results are turned into numpy before they are indexed: an indexed JAX array would compile a program per shape. What
leaves this module is copied, since a living view of donated state would turn the next donation into a copy of it.
"""

from collections import abc
from typing import Any, cast

import jax
import numpy as np
from numpy.typing import NDArray

from kvbm_jax import eviction, grants, pool, programs, sequences
from kvbm_jax.errors import BlockStateError, ConfigError, OutOfBlocksError, SequenceTooLongError
from kvbm_jax.outcomes import BlockCounts, EvictedBlocks, Registered, Started, Stepped, Unshared
from kvbm_jax.policies import EvictionPolicy, ScoreFunction, as_policy
from kvbm_jax.programs import pad, round_up, round_up_twofold
from kvbm_jax.quota_policy import Charged
from kvbm_jax.resize_plan import Resized, plan_resize
from kvbm_jax.tenancy import Prompt, Tenancy
from kvbm_jax.tenants import TenantBlocks, TenantQuotas
from kvbm_jax.types import Status

__all__ = ["BlockPool"]


class BlockPool:
    """Owns one `PoolState` and one `SequenceBatch` of `max_sequences` rows; its methods are called from one thread.

    Args:
      num_blocks: blocks of the pool.
      block_size: tokens of a block.
      max_sequences: rows.
      max_blocks: blocks of a table.
      quotas: limits of tenants, see `kvbm_jax.quotas`; None for none.
      eviction_policy: which cached block is evicted first: the name of a policy (`kvbm_jax.eviction`), a policy
        (`kvbm_jax.policies`), or a function from a `policies.BlockView` to scores, of which the lowest goes first.

    Raises:
      ConfigError: if JAX offers no CPU device to keep the state on, or there is no such policy.
      LayoutError: if a size is out of range.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_sequences: int,
        max_blocks: int,
        eviction_policy: str | EvictionPolicy | ScoreFunction = "lru",
        quotas: TenantQuotas | None = None,
    ) -> None:
        policy = eviction.find(eviction_policy) if isinstance(eviction_policy, str) else as_policy(eviction_policy)
        self._tenancy = Tenancy(quotas, policy, max_sequences) if quotas else None
        policy = policy if self._tenancy is None else self._tenancy.policy
        self._verbs = programs.of_policy(policy)
        self._device = programs.cpu_device()
        with jax.default_device(self._device):
            state = pool.init(num_blocks)
            running = sequences.init(max_sequences, max_blocks, block_size=block_size, pool_blocks=num_blocks)
        self._pool: pool.PoolState
        self.sequences: sequences.SequenceBatch
        self._memory: Any  # the policy's
        self.install(state, running)
        self._generation = np.uint32(0)  # that no block of an earlier, larger size has exceeded

    @property
    def max_sequences(self) -> int:
        """Rows of the batch."""
        return self.sequences.block_tables.shape[1]

    @property
    def max_blocks(self) -> int:
        """Blocks of a table."""
        return self.sequences.block_tables.shape[2]

    @property
    def longest(self) -> int:
        """Blocks of the row that has the most."""
        return int(np.max(np.asarray(self.sequences.num_blocks)))

    def stats(self) -> BlockCounts:
        """Returns the numbers of blocks by state."""
        return BlockCounts(*(int(n) for n in programs.stats(self._pool)))

    def match(self, hashes: NDArray[np.uint32]) -> int:
        """Returns how many leading hashes, u32[M, 4], are resident."""
        padded, count = self._pad_hashes(hashes)
        return int(np.asarray(programs.match(self._pool, padded[None], count[None]).num_blocks)[0])

    def start(
        self, row: int, hashes: NDArray[np.uint32], num_hashes: int, num_tokens: int, tenant: str = ""
    ) -> Started:
        """Gives a sequence of `num_tokens` its blocks; the first `num_hashes` hashes may be found cached.

        Raises:
          QuotaExceededError: if its tenant would hold too many; nothing is held then.
          OutOfBlocksError: if blocks are lacking; nothing is held then.
          SequenceTooLongError: if it does not fit a table.
        """
        padded, _ = self._pad_hashes(hashes[:num_hashes])
        result = self._start(Prompt(row, tenant, padded, num_hashes, num_tokens))
        self.require(np.asarray(result.status)[0], blocks=-(-num_tokens // self.sequences.block_size))
        return Started(int(np.asarray(result.num_cached)[0]), EvictedBlocks.of(result.evicted))

    def _start(self, prompt: Prompt) -> sequences.StartResult:
        if self._tenancy is not None:
            self._memory = self._tenancy.ask_to_start(self._memory, self._pool, self.sequences, prompt)
        result: sequences.StartResult
        self._memory, self._pool, self.sequences, result = self._verbs.start(
            self._memory,
            self._pool,
            self.sequences,
            np.array([prompt.row], np.int32),
            prompt.hashes[None],
            np.array([prompt.num_hashes], np.int32),
            np.array([prompt.num_tokens], np.int32),
        )
        self._settle()
        return result

    def extend(self, num_tokens: NDArray[np.int32], max_blocks: int) -> tuple[NDArray[np.int32], EvictedBlocks]:
        """Makes room for the next tokens of each row, i32[B], up to `max_blocks` new blocks; returns i32[B] status."""
        bound = round_up_twofold(max_blocks)
        refused = self._ask_to_grow(enumerate(num_tokens))
        if refused:
            num_tokens = num_tokens.copy()
            num_tokens[refused] = 0
        self._pool, self.sequences, result = self._verbs.extend(
            self._memory, self._pool, self.sequences, num_tokens, max_blocks=bound
        )
        self._settle()
        status = np.array(result.status)
        if refused:
            status[refused] = Status.QUOTA_EXCEEDED
        return status, EvictedBlocks.of(result.evicted)

    def fork(self, source: int, row: int) -> None:
        """Begins a copy of the sequence of row `source`, in the empty row `row`; all blocks are shared."""
        self._pool, self.sequences, status = programs.fork(
            self._pool, self.sequences, np.array([source], np.int32), np.array([row], np.int32)
        )
        if self._tenancy is not None:
            self._memory = self._tenancy.follow(self._memory, source, row)
        self.require(np.asarray(status)[0], blocks=self.max_blocks)

    def unshare(self, rows: list[int]) -> Unshared:
        """Gives rows a tail of their own where the next token would go into a block that is shared.

        Raises:
          QuotaExceededError: if a tenant would hold too many; no row has its own then.
          OutOfBlocksError: if blocks are lacking; some rows may have theirs.
        """
        if self._tenancy is not None:
            self._require_admitted(self._tenancy.tails(self._pool, self.sequences, rows))
        self._make_room(len(rows))
        mask = np.zeros((self.max_sequences,), np.bool_)
        mask[rows] = True
        self._pool, self.sequences, result = self._verbs.unshare(self._memory, self._pool, self.sequences, mask)
        self._settle()
        copied = Unshared(
            np.asarray(result.sources)[:, 0].copy(),
            np.asarray(result.targets)[:, 0].copy(),
            EvictedBlocks.of(result.evicted),
        )
        for row in rows:
            self.require(np.asarray(result.status)[row], blocks=len(rows))
        return copied

    def trim(self, row: int, length: int) -> None:
        """Rolls the sequence of a row back to `length` tokens, and gives surplus blocks back."""
        lengths = np.array(self.sequences.lengths)
        surplus = self.num_blocks(row) - -(-length // self.sequences.block_size)
        self._make_room(surplus)
        lengths[row] = length
        bound = round_up_twofold(surplus)
        self._pool, self.sequences, status = programs.trim(self._pool, self.sequences, lengths, max_blocks=bound)
        self._settle()
        self.require(np.asarray(status)[row], blocks=surplus)

    def reserve(
        self, growth: abc.Mapping[int, int], max_blocks: int | None = None
    ) -> tuple[grants.Grant, EvictedBlocks]:
        """Sets blocks aside for rows in a compiled loop, padded to `max_blocks`, or to one of a few sizes.

        Raises:
          QuotaExceededError: if a tenant would hold too many; none is set aside then.
          OutOfBlocksError: if there are not as many.
        """
        count = sum(growth.values())
        self._require_admitted(growth)
        bound = round_up(count) if max_blocks is None else max_blocks
        self._pool, result = self._verbs.reserve(self._memory, self._pool, np.int32(count), max_blocks=bound)
        self._charge(np.asarray(result.grant.block_ids)[:count], growth)
        self.require(result.status, blocks=count)
        return result.grant, EvictedBlocks.of(result.evicted)

    def adopt(self, rows: list[int], running: sequences.SequenceBatch, block_ids: NDArray[np.int32]) -> None:
        """Takes rows over from a compiled loop.

        Args:
          rows: rows that the loop was to extend and that still run; what it says of other rows is ignored.
          running: the sequences as the loop returned them.
          block_ids: i32[n], all blocks of the loop's grant; those that no row of `rows` took are reset.
        """
        mask = np.zeros((self.max_sequences,), np.bool_)
        mask[rows] = True
        self.sequences = programs.adopt_rows(self.sequences, jax.device_put(running, self._device), mask)
        taken = np.isin(block_ids, np.asarray(self.sequences.block_tables)[:, mask])
        left = block_ids[~taken]
        self._settle()
        self._pool, status = programs.free(self._pool, self._pad_blocks(left))
        self.require(np.asarray(status)[0], blocks=len(left))

    def register(self, row: int, hashes: NDArray[np.uint32], first: int, priority: int = 0) -> Registered:
        """Registers the blocks of a row from index `first` on under hashes u32[M, 4].

        Policies that ask for a priority are told that of new ones.
        """
        padded, _ = self._pad_hashes(hashes)
        new = np.zeros((len(hashes),), np.bool_)
        for _ in range(programs.SEEDS):
            result = self._register(row, padded, first, len(hashes), priority)
            new |= np.asarray(result.registered)[0, 0, : len(hashes)]
            status = np.asarray(result.status)[0, 0, : len(hashes)]
            if not np.any(status == Status.INDEX_FULL):
                break
            self._rehash()
        for code in status:
            self.require(code, blocks=len(hashes))
        return Registered(np.asarray(result.block_ids)[0, 0, : len(hashes)].copy(), new)

    def _register(
        self, row: int, padded: NDArray[np.uint32], first: int, count: int, priority: int = 0
    ) -> sequences.RegisterResult:
        result: sequences.RegisterResult
        self._memory, self._pool, self.sequences, result = self._verbs.register(
            self._memory,
            self._pool,
            self.sequences,
            np.array([row], np.int32),
            padded[None],
            np.array([first], np.int32),
            np.array([count], np.int32),
            self._verbs.priorities([priority], 1),
        )
        self._settle()
        return result

    def release(self, row: int) -> None:
        """Ends the sequence of a row."""
        self._make_room(self.num_blocks(row))
        self._pool, self.sequences, status = programs.release(self._pool, self.sequences, np.array([row], np.int32))
        self._settle()
        self.require(np.asarray(status)[0], blocks=self.max_blocks)

    def step(
        self,
        ending: list[int],
        growing: dict[int, int],
        complete: list[tuple[int, int]],
        hashes: NDArray[np.uint32],
        max_blocks: int,
        priorities: abc.Sequence[int] = (),
    ) -> Stepped:
        """Ends sequences, makes room for the next tokens of others, and registers completed blocks, in one call.

        Args:
          ending: rows.
          growing: new tokens of each row.
          complete: row and index in its table of P blocks.
          hashes: u32[P, 4], theirs.
          max_blocks: bound of the new blocks of a row.
          priorities: of the P blocks, 0 for those that are not named.

        Raises:
          BlockStateError: if a completed block is refused.
        """
        self._make_room(int(np.sum(np.asarray(self.sequences.num_blocks)[ending])))
        refused = self._ask_to_grow(growing.items(), ending)
        if refused:
            growing = growing | dict.fromkeys(refused, 0)
        plan = programs.step_plan(ending, growing, complete, hashes, nobody=self.max_sequences)
        told = self._verbs.priorities(priorities, len(plan.complete_rows))
        bound = round_up_twofold(max_blocks)
        self._memory, self._pool, self.sequences, result = self._verbs.step(
            self._memory, self._pool, self.sequences, plan, told, max_blocks=bound
        )
        self._settle()
        grown = np.array(result.grow_status)[: len(growing)]
        if refused:
            grown[np.isin(list(growing), refused)] = Status.QUOTA_EXCEEDED
        named = len(complete)
        status = np.asarray(result.register_status)[0, :named]
        done = status != Status.INDEX_FULL
        for code in status[done]:
            self.require(code, blocks=len(complete))
        return Stepped(
            grown,
            np.asarray(self.sequences.block_tables)[0, plan.complete_rows[:named], plan.complete_places[:named]],
            np.array(result.registered)[0, :named],
            done,
            EvictedBlocks.of(result.evicted),
        )

    def table(self, row: int) -> NDArray[np.int32]:
        """Returns the blocks of a row, i32[blocks]."""
        return np.asarray(self.sequences.block_tables)[0, row, : self.num_blocks(row)].copy()

    def num_blocks(self, row: int) -> int:
        """Returns how many blocks a row has."""
        return int(np.asarray(self.sequences.num_blocks)[row])

    def lacking(self, growth: abc.Mapping[int, int]) -> list[int]:
        """Returns how many blocks each row lacks to grow by so many tokens.

        Raises:
          ConfigError: if a growth is negative.
          SequenceTooLongError: if a row would outgrow its table.
        """
        lengths, counts = np.asarray(self.sequences.lengths), np.asarray(self.sequences.num_blocks)
        lacking = []
        for row, num_tokens in growth.items():
            if num_tokens < 0:
                raise ConfigError(f"a sequence cannot grow by {num_tokens} tokens; name 0 or more")
            needed = -(-(int(lengths[row]) + num_tokens) // self.sequences.block_size)
            if needed > self.max_blocks:
                raise SequenceTooLongError(
                    f"{num_tokens} tokens more than {lengths[row]} need {needed} blocks; a sequence has at most "
                    f"{self.max_blocks}: ask for fewer tokens, or raise num_blocks or max_sequence_tokens"
                )
            lacking.append(max(needed - int(counts[row]), 0))
        return lacking

    def length(self, row: int) -> int:
        """Returns the tokens of a row that have a slot."""
        return int(np.asarray(self.sequences.lengths)[row])

    def allocate(self, count: int) -> tuple[NDArray[np.int32], NDArray[np.uint32], EvictedBlocks]:
        """Grants blocks that belong to no sequence: their ids and generations.

        Raises:
          OutOfBlocksError: if there are not as many.
        """
        self._pool, result = self._verbs.allocate(
            self._memory, self._pool, np.array([count], np.int32), max_blocks=round_up(count)
        )
        self.require(np.asarray(result.status)[0], blocks=count)
        block_ids = np.asarray(result.block_ids)[0, :count].copy()
        self._charge(block_ids, {})
        return block_ids, np.asarray(self._pool.generations)[block_ids], EvictedBlocks.of(result.evicted)

    def is_current(self, block_ids: NDArray[np.int32], generations: NDArray[np.uint32]) -> bool:
        """Tells whether every handle is current and held."""
        return bool(np.all(self._check(block_ids, generations) == Status.OK))

    def check(self, block_ids: NDArray[np.int32], generations: NDArray[np.uint32]) -> None:
        """Raises `BlockStateError` unless every handle is current and held."""
        status = self._check(block_ids, generations)
        for block, code in zip(block_ids, status, strict=True):
            if code != Status.OK:
                raise BlockStateError(f"block {block}: {Status(code).message}")

    def free(self, block_ids: NDArray[np.int32], generations: NDArray[np.uint32]) -> None:
        """Gives blocks back that `allocate` granted.

        Raises:
          BlockStateError: if a handle is stale or named twice; nothing is freed then.
        """
        self.check(block_ids, generations)
        repeated = len(block_ids) - len(np.unique(block_ids))
        if repeated:
            raise BlockStateError(f"{repeated} of {len(block_ids)} blocks are named twice; free each block once")
        self._pool, status = programs.free(self._pool, self._pad_blocks(block_ids))
        self.require(np.asarray(status)[0], blocks=len(block_ids))

    def reset_blocks(self) -> NDArray[np.int32]:
        """Returns the blocks that hold nothing, i32[n]."""
        return np.asarray(self._pool.reset_stack)[: self.stats().reset].copy()

    def evict(self, count: int | None = None) -> EvictedBlocks:
        """Resets `count` inactive blocks, or as many as there are, those that the policy evicts first; None for all."""
        wanted = self.stats().inactive if count is None else min(count, self._pool.num_blocks)
        self._pool, result = self._verbs.evict(
            self._memory, self._pool, np.int32(wanted), max_count=round_up(max(wanted, 1))
        )
        return EvictedBlocks.of(result)

    def evict_named(self, block_ids: NDArray[np.int32]) -> EvictedBlocks:
        """Resets those of the blocks i32[n] that are inactive, the least recently released first."""
        self._pool, result = programs.evict_named(self._pool, self._pad_blocks(block_ids)[0])
        return EvictedBlocks.of(result)

    def acquire(self, block_ids: NDArray[np.int32]) -> None:
        """Adds a holder to each of the registered blocks i32[n].

        Raises:
          BlockStateError: if one is not resident; none is held then.
        """
        self._pool, status = programs.acquire(self._pool, self._pad_blocks(block_ids))
        self.require(np.asarray(status)[0], blocks=len(block_ids))

    def let_go(self, block_ids: NDArray[np.int32]) -> None:
        """Takes a holder from each of the blocks i32[n] that `acquire` added."""
        self._make_room(len(block_ids))
        self._pool, status = programs.free(self._pool, self._pad_blocks(block_ids))
        self.require(np.asarray(status)[0], blocks=len(block_ids))

    def inactive_blocks(self) -> NDArray[np.int32]:
        """Returns the cached blocks that nobody holds, i32[n], the least recently released first."""
        count = self.stats().inactive
        listed = programs.inactive_blocks(self._pool, max_count=min(round_up(count), self._pool.num_blocks))
        return np.asarray(listed)[:count].copy()

    def resize(self, num_blocks: int, max_blocks: int | None = None) -> Resized:
        """Grows or shrinks the pool; see `plan_resize`, which this carries out at once."""
        plan = self.plan_resize(num_blocks, max_blocks)
        self.carry_out(plan)
        return plan

    def plan_resize(self, num_blocks: int, max_blocks: int | None = None) -> Resized:
        """Makes a pool of another size beside this one, which does not change; see `resize_plan.plan_resize`.

        Args:
          num_blocks: of the new pool.
          max_blocks: blocks of a table in it; None for as many as now.

        Raises:
          OutOfBlocksError: if more blocks are held than fit.
          SequenceTooLongError: if a sequence has more blocks than a table then.
          LayoutError: if `num_blocks` is out of range.
        """
        planned = plan_resize(
            self._verbs,
            self._memory,
            self._pool,
            self.sequences,
            num_blocks,
            max_blocks=max_blocks,
            seed=self._seed,
            generation=self._generation,
        )
        if planned.status is Status.OUT_OF_BLOCKS:
            held, before = self.stats().held, self._pool.num_blocks
            raise OutOfBlocksError(
                f"{held} of {before} blocks are held, more than num_blocks = {num_blocks}; release sequences or "
                "blocks first, or shrink to no less"
            )
        self.require(planned.status, blocks=self.longest)
        return planned

    def carry_out(self, plan: Resized) -> None:
        """Takes over what `plan_resize` has made; nothing else may have been called since."""
        self._take(plan.memory, plan.state, plan.running)
        self._generation = plan.generation

    def install(self, state: pool.PoolState, running: sequences.SequenceBatch) -> None:
        """Takes over a pool and the sequences that go with it, made elsewhere; the policy begins anew."""
        with jax.default_device(self._device):
            memory = self._verbs.policy.init(state.num_blocks)
        self._take(memory, state, running)

    @property
    def account(self) -> Charged | None:
        """What is charged to tenants; None without quotas."""
        return None if self._tenancy is None else cast("Charged", self._memory)

    def inherit(self, account: Charged | None, sources: NDArray[np.int32]) -> None:
        """Takes over the tenants of another pool of the same quotas: of its rows, and of i32[N] blocks of it."""
        if self._tenancy is not None and account is not None:
            self._memory = self._tenancy.inherit(self._memory, account, sources)
            self._settle()

    def _take(self, memory: Any, state: pool.PoolState, running: sequences.SequenceBatch) -> None:
        # Committed to the device from the start: a program compiled for uncommitted state would be compiled twice.
        self._memory, self._pool, self.sequences = jax.device_put((memory, state, running), self._device)
        self._room = int(pool.release_room(state))
        self._seed = int(state.index.seed)

    def tenant_blocks(self) -> dict[str, TenantBlocks]:
        """Returns what each tenant has that has a limit."""
        return {} if self._tenancy is None else self._tenancy.blocks(self._memory, self._pool)

    def require_room(self, blocks: int, tenant: str = "") -> None:
        """Raises `OutOfBlocksError` if there are surely not as many blocks to be had."""
        if self._tenancy is not None:
            self._tenancy.require_room(self._memory, self._pool, tenant, blocks)
        counts = self.stats()
        if blocks > counts.reset + counts.inactive:
            self.require(np.int32(Status.OUT_OF_BLOCKS), blocks=blocks)

    def require(self, status: jax.Array | np.generic | int, *, blocks: int, row: int = -1) -> None:
        """Raises the error that a status stands for, if any; `blocks` is what was asked, by `row`, for the message."""
        code = Status(int(status))
        if code is Status.OK:
            return
        if code is Status.QUOTA_EXCEEDED and self._tenancy is not None:
            raise self._tenancy.refusal(self._memory, self._pool, row, blocks)
        counts = self.stats()
        if code is Status.OUT_OF_BLOCKS:
            raise OutOfBlocksError(
                f"{blocks} blocks are needed, those found cached included; of {self._pool.num_blocks}, {counts.reset} "
                f"are free, {counts.inactive} cached and not in use, {counts.held} held; {code.message}"
            )
        if code is Status.TABLE_FULL:
            raise SequenceTooLongError(
                f"a sequence of {blocks} blocks does not fit a table of {self.max_blocks} blocks "
                f"({self.max_blocks * self.sequences.block_size} tokens); {code.message}"
            )
        raise BlockStateError(f"{code.name}: {code.message}")

    def warm_up(self) -> None:
        """Compiles the programs of sequences for every padded size, by running them to no effect."""
        memory = jax.tree.map(np.array, self._memory)  # a policy might count calls, those that tell it nothing too
        sizes = {self._pad_hashes(np.zeros((count, 4), np.uint32))[0].shape[0] for count in range(self.max_blocks + 1)}
        nobody = self.max_sequences
        for size in sorted(sizes):
            padded = np.zeros((size, 4), np.uint32)
            self.match(padded)
            self._start(Prompt(nobody, "", padded, 0, 0))
            self._register(nobody, padded, 0, 0)
        self._pool, self.sequences, _ = programs.release(self._pool, self.sequences, np.array([nobody], np.int32))
        self.step([], {}, [], np.zeros((0, 4), np.uint32), 0)
        self._memory = jax.device_put(memory, self._device)

    def _ask_to_grow(self, growth: abc.Iterable[tuple[int, int]], ending: abc.Sequence[int] = ()) -> list[int]:
        """Asks for blocks for new tokens of rows; returns the rows whose tenants may not have them."""
        if self._tenancy is None:
            return []
        grown = dict(growth)
        self._memory, refused = self._tenancy.ask_to_grow(self._memory, self._pool, self.sequences, grown, ending)
        return refused

    def _require_admitted(self, wanted: abc.Mapping[int, int]) -> None:
        """Raises `QuotaExceededError` if a row's tenant may not have so many blocks."""
        if self._tenancy is not None:
            self._memory = self._tenancy.require(self._memory, self._pool, self.sequences, wanted)

    def _charge(self, block_ids: NDArray[np.int32], growth: abc.Mapping[int, int]) -> None:
        """Charges blocks that no table holds to the tenants of rows, so many for each in this order, or to nobody."""
        if self._tenancy is not None:
            self._memory = self._tenancy.charge(self._memory, block_ids, growth)

    def _settle(self) -> None:
        """Charges what the tables hold."""
        if self._tenancy is not None:
            self._memory = self._tenancy.settle(self._memory, self.sequences)

    def _rehash(self) -> None:
        def attempt(seed: np.uint32) -> tuple[pool.PoolState, bool]:
            rebuilt, left = programs.rehash(self._pool, seed)
            return rebuilt, int(left) == 0

        self._pool = programs.try_seeds(attempt, first=self._seed + 1)
        self._seed = int(self._pool.index.seed)

    def _check(self, block_ids: NDArray[np.int32], generations: NDArray[np.uint32]) -> NDArray[np.int32]:
        padded = self._pad_blocks(block_ids)[0]
        wanted = np.zeros(padded.shape, np.uint32)
        wanted[: len(generations)] = generations
        return np.asarray(programs.check_generations(self._pool, padded, wanted))[: len(block_ids)]

    def _make_room(self, pushes: int) -> None:
        if pushes > self._room:
            self._pool = programs.compact(self._pool)
            self._room = int(pool.release_room(self._pool))
        self._room -= pushes

    def _pad_blocks(self, block_ids: NDArray[np.int32]) -> NDArray[np.int32]:
        return pad(block_ids, self._pool.num_blocks)[None]

    def _pad_hashes(self, hashes: NDArray[np.uint32]) -> tuple[NDArray[np.uint32], NDArray[np.int32]]:
        count = min(len(hashes), self.max_blocks)
        padded = np.zeros((min(round_up(count), self.max_blocks), 4), np.uint32)
        padded[:count] = hashes[:count]
        return padded, np.array(count, np.int32)
