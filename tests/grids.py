"""Rows of blocks and of hashes as the padded arrays that verbs take."""

import jax.numpy as jnp
import numpy as np

__all__ = ["hash_grid", "id_grid", "key"]


def key(number):
    """The four words of a hash."""
    return (number, 1000 + number, 0, 7)


def id_grid(rows, shape, fill):
    """Block ids as i32[B, M] of that shape, padded with `fill`."""
    out = np.full(shape, fill, np.int32)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return jnp.asarray(out)


def hash_grid(rows, shape):
    """The hashes of numbers as u32[B, M, 4], padded with zeros."""
    out = np.zeros((*shape, 4), np.uint32)
    for i, row in enumerate(rows):
        for j, number in enumerate(row):
            out[i, j] = key(number)
    return jnp.asarray(out)
