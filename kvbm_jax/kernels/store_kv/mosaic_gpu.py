"""`store_kv` by bulk copies: tokens of a component come in one run, each row goes to its slot."""

from collections.abc import Sequence

import jax

from kvbm_jax.kernels.mosaic import rows

__all__ = ["refusal", "store_kv"]


def store_kv(array: jax.Array, data: Sequence[jax.Array], slots: jax.Array) -> jax.Array:
    """See `kvbm_jax.kernels.store_kv`."""
    return rows.store_rows("store_kv", array, [component.astype(array.dtype) for component in data], slots)


def refusal(array: jax.Array, data: Sequence[jax.Array], slots: jax.Array) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    return rows.refusal(array, slots)
