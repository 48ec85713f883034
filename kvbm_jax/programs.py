"""The compiled verbs that the host's owner of a pool calls, and the few sizes that their arguments are padded to.

A program is compiled for each shape it sees: arguments of any length are padded to one of few sizes. State lives
on JAX's CPU device, and is donated by what returns it anew.
"""

import functools
from collections import abc
from dataclasses import replace
from typing import Any, Concatenate, Final

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvbm_jax import grants, policies, pool, resize, sequences
from kvbm_jax import step as step_verb
from kvbm_jax.errors import ConfigError, KvbmError
from kvbm_jax.padding import DROP
from kvbm_jax.policies import EvictionPolicy
from kvbm_jax.pool import PoolState
from kvbm_jax.sequences import SequenceBatch

__all__ = [
    "SEEDS",
    "PolicyPrograms",
    "acquire",
    "adopt_rows",
    "check_generations",
    "compact",
    "cpu_device",
    "evict_named",
    "fork",
    "free",
    "inactive_blocks",
    "match",
    "of_policy",
    "pad",
    "rehash",
    "release",
    "round_up",
    "round_up_twofold",
    "stats",
    "step_plan",
    "trim",
    "try_seeds",
]

SEEDS: Final = 8
"""How many seeds of an index are tried before it is given up; that the first does not do is rare by itself."""

_STEP: Final = 8  # the least padded size of what a step names


def cpu_device() -> jax.Device:
    """Returns JAX's CPU device, where bookkeeping lives.

    Raises:
      ConfigError: if JAX_PLATFORMS hides it.
    """
    try:
        return jax.local_devices(backend="cpu")[0]
    except (RuntimeError, AssertionError) as error:  # an assertion of JAX's own where a platform has no plugin
        raise ConfigError(
            f"the pool's bookkeeping lives on JAX's CPU device, which is hidden ({error}); "
            "set JAX_PLATFORMS=cuda,cpu, or unset it"
        ) from error


def try_seeds[T](attempt: abc.Callable[[np.uint32], tuple[T, bool]], first: int) -> T:
    """Builds a hash index with one seed after the other.

    Args:
      attempt: returns what it made, and whether all keys found a place.
      first: the first seed.

    Raises:
      KvbmError: if there was no such seed; that is not by chance.
    """
    for seed in range(first, first + SEEDS):
        made, fits = attempt(np.uint32(seed))
        if fits:
            return made
    raise KvbmError(f"the block index takes no more keys after {SEEDS} seeds; please report this")


def round_up(count: int, least: int = 32) -> int:
    """Returns the padded size of a call, one of few so that few programs are compiled."""
    size = least
    while size < count:
        size *= 8
    return size


def round_up_twofold(count: int) -> int:
    """Returns a static bound that costs at every call what it exceeds the count by: a power of two, 1 at least."""
    return 1 << max(count - 1, 0).bit_length()


def pad(values: abc.Sequence[int] | NDArray[np.int32], fill: int, least: int = 32) -> NDArray[np.int32]:
    """Returns i32[F]: the values, and `fill` up to the padded size."""
    out = np.full((round_up(len(values), least),), fill, np.int32)
    out[: len(values)] = values
    return out


def step_plan(
    ending: abc.Sequence[int],
    growing: abc.Mapping[int, int],
    complete: abc.Sequence[tuple[int, int]],
    hashes: NDArray[np.uint32],
    *,
    nobody: int,
) -> step_verb.StepPlan:
    """Returns the padded plan of a step in which no row starts: a prefix may have to come up from the tiers first.

    Args:
      ending: rows.
      growing: new tokens of each row.
      complete: row and index in its table of P blocks.
      hashes: u32[P, 4], theirs.
      nobody: rows of the batch, which pads rows.
    """
    rows, places = np.array(complete, np.int32).reshape(-1, 2).T
    padded = np.zeros((round_up(len(complete), _STEP), 4), np.uint32)
    padded[: len(hashes)] = hashes
    fields: dict[str, Any] = {
        "ending": pad(ending, nobody, _STEP),
        "starting": np.full((1,), nobody, np.int32),
        "hashes": np.zeros((1, 1, 4), np.uint32),
        "num_hashes": np.zeros((1,), np.int32),
        "num_tokens": np.zeros((1,), np.int32),
        "growing": pad(list(growing), nobody, _STEP),
        "new_tokens": pad(list(growing.values()), 0, _STEP),
        "complete_rows": pad(rows, nobody, _STEP),
        "complete_places": pad(places, 0, _STEP),
        "complete_hashes": padded,
    }
    return step_verb.StepPlan(**fields)


def _adopt_rows(old: sequences.SequenceBatch, new: sequences.SequenceBatch, mask: jax.Array) -> sequences.SequenceBatch:
    """Takes the rows under bool[B] from `new`, the others from `old`."""
    return replace(
        old,
        block_tables=jnp.where(mask[None, :, None], new.block_tables, old.block_tables),
        lengths=jnp.where(mask, new.lengths, old.lengths),
        num_blocks=jnp.where(mask, new.num_blocks, old.num_blocks),
    )


def _evict_named(state: PoolState, block_ids: jax.Array) -> tuple[PoolState, pool.Evicted]:
    """Resets those of the blocks i32[F], padded with N, that are inactive."""
    named = jnp.zeros((state.num_blocks,), jnp.bool_).at[block_ids].set(True, **DROP)
    count = jnp.sum(named & pool.is_inactive(state), dtype=jnp.int32)
    return pool.evict(
        state, count, max_count=block_ids.shape[0], scores=lambda _: jnp.where(named, 0, 1).astype(jnp.uint32)
    )


class PolicyPrograms:
    """The compiled verbs that evict by a policy, or tell it what happened; take its memory first and the pool next.

    Those that tell it donate both and return the memory first; those that only evict donate the pool. A policy without
    scores is asked and told nothing, and takes no priorities (None): its programs are those of the bare verbs.
    """

    def __init__(self, policy: EvictionPolicy) -> None:
        def start(
            memory: Any, state: PoolState, running: SequenceBatch, rows: jax.Array, *prompts: jax.Array
        ) -> tuple[Any, PoolState, SequenceBatch, sequences.StartResult]:
            scores = policies.bind(policy, memory)
            state, running, began = sequences.start(state, running, rows, *prompts, scores=scores)
            return policies.note_hits(policy, memory, state, running, rows, began.num_cached), state, running, began

        def register(
            memory: Any,
            state: PoolState,
            running: SequenceBatch,
            rows: jax.Array,
            hashes: jax.Array,
            first: jax.Array,
            counts: jax.Array,
            priorities: jax.Array | None,
        ) -> tuple[Any, PoolState, SequenceBatch, sequences.RegisterResult]:
            state, running, done = sequences.register(state, running, rows, hashes, first, counts)
            if policy.scores is None:
                return memory, state, running, done
            width = hashes.shape[1]
            places = first[:, None] + jnp.arange(width, dtype=jnp.int32)[None, :]
            memory = policies.note_registered(
                policy,
                memory,
                state,
                running,
                jnp.repeat(rows, width),
                places.reshape(-1),
                done.registered.reshape(done.registered.shape[0], -1),
                None if priorities is None else jnp.repeat(priorities, width),
            )
            return memory, state, running, done

        def step(
            memory: Any,
            state: PoolState,
            running: SequenceBatch,
            plan: step_verb.StepPlan,
            priorities: jax.Array | None,
            *,
            max_blocks: int,
        ) -> tuple[Any, PoolState, SequenceBatch, step_verb.StepResult]:
            scores = policies.bind(policy, memory)
            state, running, result = step_verb.step(state, running, plan, max_blocks=max_blocks, scores=scores)
            memory = policies.note_hits(policy, memory, state, running, plan.starting, result.num_cached)
            named = plan.complete_rows, plan.complete_places, result.registered
            return (
                policies.note_registered(policy, memory, state, running, *named, priorities),
                state,
                running,
                result,
            )

        def resize_pool(
            memory: Any,
            state: PoolState,
            running: SequenceBatch,
            num_blocks: int,
            *,
            max_blocks: int | None,
            seed: jax.Array,
            generation: jax.Array,
        ) -> tuple[Any, PoolState, SequenceBatch, resize.ResizeResult]:
            resized, renamed, result = resize.resize(
                state,
                running,
                num_blocks,
                max_blocks=max_blocks,
                seed=seed,
                generation=generation,
                scores=policies.bind(policy, memory),
            )
            if policy.resized is None:
                memory = policy.init(num_blocks)
            else:
                memory = policy.resized(memory, policies.Resized(state, resized, result.new_ids, result.sources))
            return memory, resized, renamed, result

        def by_policy[**P, R](verb: abc.Callable[P, R]) -> abc.Callable[Concatenate[Any, P], R]:
            def evicting(memory: Any, /, *args: P.args, **kwargs: P.kwargs) -> R:
                kwargs["scores"] = policies.bind(policy, memory)
                return verb(*args, **kwargs)

            return evicting

        self.policy = policy
        self.start = jax.jit(start, donate_argnums=(0, 1))
        self.register = jax.jit(register, donate_argnums=(0, 1))
        self.step = jax.jit(step, donate_argnums=(0, 1), static_argnames="max_blocks")
        self.resize_pool = jax.jit(resize_pool, static_argnums=3, static_argnames="max_blocks")
        self.extend = jax.jit(by_policy(sequences.extend), donate_argnums=1, static_argnames="max_blocks")
        self.unshare = jax.jit(by_policy(sequences.unshare), donate_argnums=1)
        self.reserve = jax.jit(by_policy(grants.reserve), donate_argnums=1, static_argnames="max_blocks")
        self.allocate = jax.jit(by_policy(pool.allocate), donate_argnums=1, static_argnames="max_blocks")
        self.evict = jax.jit(by_policy(pool.evict), donate_argnums=1, static_argnames="max_count")

    def priorities(self, values: abc.Sequence[int], size: int) -> NDArray[np.uint32] | None:
        """Returns priorities padded to u32[size], or None if nobody asks for them."""
        if self.policy.scores is None:
            return None
        out = np.zeros((size,), np.uint32)
        out[: len(values)] = values
        return out


@functools.cache
def of_policy(policy: EvictionPolicy) -> PolicyPrograms:
    """Returns the programs of a policy, each time the same ones, so that all pools of a policy share them."""
    return PolicyPrograms(policy)


stats = jax.jit(pool.stats)
match = jax.jit(pool.match)
check_generations = jax.jit(pool.check_generations)
acquire = jax.jit(pool.acquire, donate_argnums=0)
evict_named = jax.jit(_evict_named, donate_argnums=0)
free = jax.jit(pool.release, donate_argnums=0)
compact = jax.jit(pool.compact, donate_argnums=0)
rehash = jax.jit(pool.rehash)

release = jax.jit(sequences.release, donate_argnums=0)
fork = jax.jit(sequences.fork, donate_argnums=0)
trim = jax.jit(sequences.trim, donate_argnums=0, static_argnames="max_blocks")
adopt_rows = jax.jit(_adopt_rows)

inactive_blocks = jax.jit(resize.inactive_blocks, static_argnames="max_count")
