"""Choice of an implementation: one table per operation, tried in order."""

from collections.abc import Callable, Mapping
from typing import Literal

__all__ = ["Implementation", "select"]

Implementation = Literal["xla", "mosaic_gpu", "tpu"]
"""Names of implementations; an operation may lack some."""


def select[**P, R](
    operation: str, table: Mapping[str, Callable[P, R]], implementation: Implementation | None
) -> Callable[P, R]:
    """Picks the function that serves an operation.

    Args:
      operation: its name, for the error.
      table: implementations by name, the best first; "xla" is always there.
      implementation: one of the names, or None for the first.

    Raises:
      NotImplementedError: if the operation has no such implementation.
    """
    if implementation is None:
        return next(iter(table.values()))
    if implementation not in table:
        raise NotImplementedError(
            f"{operation} has no implementation {implementation!r}; there is {', '.join(table)} (or None to choose)"
        )
    return table[implementation]
