"""`load_kv` by bulk copies: each row comes from its slot, tokens of a component go in one run."""

import functools

import jax

from kvbm_jax.kernels.mosaic import rows
from kvbm_jax.kernels.mosaic.heads import by_heads

__all__ = ["load_kv", "refusal"]


def load_kv(array: jax.Array, slots: jax.Array) -> tuple[jax.Array, ...]:
    """See `kvbm_jax.kernels.load_kv`."""
    load = functools.partial(rows.load_rows, "load_kv")
    return by_heads(load, [(array, "NCTHD"), (slots, "S")], ["SHD"] * array.shape[1])


def refusal(array: jax.Array, slots: jax.Array) -> str | None:
    """Returns why the kernel cannot serve such a call, or None."""
    return rows.refusal(array, slots)
