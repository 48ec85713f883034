"""`advance` in plain XLA: `kvbm_jax.grants.advance`."""

import jax

from kvbm_jax import grants
from kvbm_jax.sequences import SequenceBatch

__all__ = ["advance"]


def advance(
    running: SequenceBatch,
    grant: grants.Grant,
    lengths: jax.Array,
    num_tokens: jax.Array,
    begun: jax.Array,
    max_blocks: int,
) -> tuple[SequenceBatch, grants.Grant, jax.Array]:
    """See `kvbm_jax.kernels.advance`."""
    return grants.advance(running, grant, lengths, num_tokens, begun, max_blocks=max_blocks)
