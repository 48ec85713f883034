"""Groups of layers in hybrid models: how far back each looks, and what a cached prefix must hold to serve all of them.

The layers of a group share one block table; all groups draw on one pool of equal-byte blocks. A group is what its
layers still need of the past. The first position that a token not yet computed can see decides which blocks those are:

    tokens      0 ........................ length
    full        [ 0 ][ 1 ][ 2 ][ 3 ][ 4 ][ 5 ]
    window                     [ 3 ][ 4 ][ 5 ]      the blocks before place 3 are passed: freed, N in the table
    state space                     [ 4 ][ 5 ]      the last whole block, which ends with the state, and the next

Axes: G groups, R rows, M hashes of a row, T tokens of a block, N blocks of the pool.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from kvbm_jax.errors import LayoutError

__all__ = ["Group", "first_places", "has_windows", "longest_hit"]


@dataclass(frozen=True)
class Group:
    """Layers that share a block table.

    Args:
      window: tokens that a query sees, its own included, so that the one at position p sees those from
        p - window + 1 on; None = all. Latent attention (MLA) is a full group whose blocks hold one component.

    Raises:
      LayoutError: if the window is not positive.
    """

    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise LayoutError(f"window is {self.window}; it must be at least 1, the query's own token, or None")

    @classmethod
    def state_space(cls, block_size: int) -> "Group":
        """Layers that carry a state: each block holds the state after its last token, and only the last is needed.

        That is a window of one whole block and the token after it.
        """
        return cls(window=block_size + 1)


def has_windows(groups: tuple[Group, ...]) -> bool:
    """Whether any group leaves blocks behind; static."""
    return any(group.window is not None for group in groups)


def first_places(groups: tuple[Group, ...], lengths: jax.Array, block_size: int) -> jax.Array:
    """Finds the first block that tokens from position `lengths` on can see, i32[G, ...] for lengths i32[...]."""
    places = [
        jnp.zeros_like(lengths) if group.window is None else jnp.maximum(lengths - (group.window - 1), 0) // block_size
        for group in groups
    ]
    return jnp.stack(places)


def longest_hit(
    groups: tuple[Group, ...], blocks: jax.Array, *, block_size: int, num_blocks: int
) -> tuple[jax.Array, jax.Array]:
    """Finds the longest prefix that every group can serve.

    A full group serves a prefix if all of its blocks are resident; a window group if those are that the tokens after
    the prefix can see.

    Args:
      groups: G of them.
      blocks: i32[R, G, M], the resident block of each hash, N where there is none.
      block_size: T.
      num_blocks: N.

    Returns:
      i32[R, G, M] the blocks to hold, padded with N where none is needed, and i32[R] the prefix in blocks.
    """
    asked = blocks.shape[2]
    place = jnp.arange(asked, dtype=jnp.int32)[None, None, :]
    miss = blocks == num_blocks
    missed = jnp.zeros((blocks.shape[0], asked), bool)  # by a full group
    for g, group in enumerate(groups):
        missed = missed | miss[:, g] if group.window is None else missed
    cached = jnp.min(jnp.where(missed, place[0], asked), axis=1, initial=asked).astype(jnp.int32)
    if not has_windows(groups):
        return jnp.where(place < cached[:, None, None], blocks, num_blocks), cached
    # A prefix that ends with place j is served if the last miss up to j lies before all that it needs.
    last_miss = jax.lax.cummax(jnp.where(miss, place, -1), axis=2)
    needed = first_places(groups, (place[0] + 1) * block_size, block_size)  # [G, 1, M]
    served = jnp.all(last_miss < needed.transpose(1, 0, 2), axis=1) & (place[0] < cached[:, None])
    cached = jnp.max(jnp.where(served, place[0] + 1, 0), axis=1, initial=0)
    first = first_places(groups, cached * block_size, block_size).T[:, :, None]
    return jnp.where((place >= first) & (place < cached[:, None, None]), blocks, num_blocks), cached
