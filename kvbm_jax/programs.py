"""The compiled verbs that the host's owner of a pool calls, and the few sizes that their arguments are padded to.

A program is compiled for each shape it sees: arguments of any length are padded to one of few sizes. Programs that
donate take the pool first. State lives on JAX's CPU device.
"""

from collections import abc
from dataclasses import replace
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from kvbm_jax import grants, pool, resize, sequences
from kvbm_jax import step as step_verb
from kvbm_jax.errors import ConfigError, KvbmError

__all__ = [
    "SEEDS",
    "adopt_rows",
    "allocate",
    "check_generations",
    "compact",
    "cpu_device",
    "evict",
    "extend",
    "fork",
    "free",
    "inactive_blocks",
    "match",
    "pad",
    "register",
    "rehash",
    "release",
    "reserve",
    "resize_pool",
    "round_up",
    "start",
    "stats",
    "step",
    "trim",
    "try_seeds",
    "unshare",
]

SEEDS: Final = 8
"""How many seeds of an index are tried before it is given up; that the first does not do is rare by itself."""


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


def pad(values: abc.Sequence[int] | NDArray[np.int32], fill: int, least: int = 32) -> NDArray[np.int32]:
    """Returns i32[F]: the values, and `fill` up to the padded size."""
    out = np.full((round_up(len(values), least),), fill, np.int32)
    out[: len(values)] = values
    return out


def _adopt_rows(old: sequences.SequenceBatch, new: sequences.SequenceBatch, mask: jax.Array) -> sequences.SequenceBatch:
    """Takes the rows under bool[B] from `new`, the others from `old`."""
    return replace(
        old,
        block_tables=jnp.where(mask[None, :, None], new.block_tables, old.block_tables),
        lengths=jnp.where(mask, new.lengths, old.lengths),
        num_blocks=jnp.where(mask, new.num_blocks, old.num_blocks),
    )


stats = jax.jit(pool.stats)
match = jax.jit(pool.match)
check_generations = jax.jit(pool.check_generations)
allocate = jax.jit(pool.allocate, donate_argnums=0, static_argnames="max_blocks")
free = jax.jit(pool.release, donate_argnums=0)
evict = jax.jit(pool.evict, donate_argnums=0, static_argnames="max_count")
compact = jax.jit(pool.compact, donate_argnums=0)
rehash = jax.jit(pool.rehash)

start = jax.jit(sequences.start, donate_argnums=0)
extend = jax.jit(sequences.extend, donate_argnums=0, static_argnames="max_blocks")
register = jax.jit(sequences.register, donate_argnums=0)
release = jax.jit(sequences.release, donate_argnums=0)
fork = jax.jit(sequences.fork, donate_argnums=0)
unshare = jax.jit(sequences.unshare, donate_argnums=0)
trim = jax.jit(sequences.trim, donate_argnums=0, static_argnames="max_blocks")
step = jax.jit(step_verb.step, donate_argnums=0, static_argnames="max_blocks")
reserve = jax.jit(grants.reserve, donate_argnums=0, static_argnames="max_blocks")
adopt_rows = jax.jit(_adopt_rows)

resize_pool = jax.jit(resize.resize, static_argnums=2, static_argnames="max_blocks")
inactive_blocks = jax.jit(resize.inactive_blocks, static_argnames="max_count")
