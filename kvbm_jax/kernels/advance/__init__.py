"""The bookkeeping of a decode step inside a compiled loop: blocks given back and taken, for all sequences at once."""

import jax

from kvbm_jax.grants import Grant
from kvbm_jax.kernels.advance import xla
from kvbm_jax.kernels.dispatch import Implementation, Operation
from kvbm_jax.sequences import SequenceBatch

__all__ = ["OPERATION", "advance"]

OPERATION = Operation(xla.advance, ("mosaic_gpu",))


def advance(
    running: SequenceBatch,
    grant: Grant,
    lengths: jax.Array,
    num_tokens: jax.Array,
    begun: jax.Array,
    *,
    max_blocks: int = 1,
    implementation: Implementation | None = None,
) -> tuple[SequenceBatch, Grant, jax.Array]:
    """Does what `kvbm_jax.grants.advance` does, in one launch where a kernel serves.

    Without drafts, `lengths` is `running.lengths`, and it does what `grants.extend` does.

    Raises:
      NotImplementedError: if there is no such implementation, or it cannot serve this call.
    """
    return OPERATION(implementation, running, grant, lengths, num_tokens, begun, max_blocks)
