"""Keeping updates in place: reads of a buffer come before the writes that replace it.

XLA may write an array in place of its donated or carried input only if every read of the old value happens first. It
does not look for such an order by itself: where a read and a scatter of one array are not tied together, it copies the
array, the whole pool, at every step. `fence` ties them. Verbs here pass the buffer together with everything that was
read from it, then write. The compiled text is tested for the absence of such copies.
"""

from typing import Any, cast

import jax

__all__ = ["fence"]


def fence[T](values: T) -> T:
    """Returns the pytree unchanged, with all of it computed before anything that uses the result.

    Scalars pass by: they are never written in place, and a barrier would copy each.
    """
    barrier: Any = jax.lax.optimization_barrier
    leaves, tree = jax.tree.flatten(values)
    arrays = iter(barrier([leaf for leaf in leaves if leaf.ndim]))
    return cast("T", jax.tree.unflatten(tree, [next(arrays) if leaf.ndim else leaf for leaf in leaves]))
