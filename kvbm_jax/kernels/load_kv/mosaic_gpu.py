"""`load_kv` by bulk copies: each row comes from its slot, tokens of a component go in one run."""

import jax

from kvbm_jax.kernels.mosaic import rows

__all__ = ["load_kv", "refusal"]


def load_kv(array: jax.Array, slots: jax.Array) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.load_kv`."""
    return rows.load_rows("load_kv", array, slots)


def refusal(array: jax.Array, slots: jax.Array) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    return rows.refusal(array, slots)
