"""`store_kv` by bulk copies: tokens of a component come in one run, each row goes to its slot."""

from collections.abc import Sequence

import jax

from kvbm_jax.kernels.mosaic import rows
from kvbm_jax.kernels.mosaic.heads import by_heads

__all__ = ["refusal", "store_kv"]


def store_kv(array: jax.Array, data: Sequence[jax.Array], slots: jax.Array) -> jax.Array:
    """See `kvbm_jax.kernels.store_kv`."""

    def store(array: jax.Array, slots: jax.Array, *data: jax.Array) -> tuple[jax.Array]:
        return (rows.store_rows("store_kv", array, data, slots),)

    parts = [(component.astype(array.dtype), "SHD") for component in data]
    (stored,) = by_heads(store, [(array, "NCTHD"), (slots, "S"), *parts], ["NCTHD"])
    return stored


def refusal(array: jax.Array, data: Sequence[jax.Array], slots: jax.Array) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    return rows.refusal(array, slots)
