"""Tenants by name: the limits that a configuration gives them, and the numbers that the pool knows them by.

A limit is a number of blocks, or a part of the pool. The name `*` stands for all tenants that have no limit of their
own, together; without it they have none. What limits mean is said in `kvbm_jax.quotas`.

    [quotas]
    acme = 0.5      # half of the pool
    globex = 2000   # blocks
    "*" = 0.25      # everybody else, together
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

__all__ = ["OTHERS", "TenantBlocks", "TenantQuotas"]

OTHERS: Final = "*"
"""All tenants that have no limit of their own."""

_MOST: Final = 2**31 - 1


class TenantBlocks(NamedTuple):
    """Blocks of one tenant on the device; see `kvbm_jax.quotas`."""

    held: int  # by its running sequences
    resident: int  # held and cached
    limit: int


@dataclass(frozen=True)
class TenantQuotas(Mapping[str, int | float]):
    """The limit of each tenant that has one: blocks if it is an integer, else a part of the pool."""

    limits: tuple[tuple[str, int | float], ...]  # by name

    @classmethod
    def of(cls, table: Mapping[Any, Any]) -> Self | None:
        """Returns the quotas that a table gives, None if it is no such table."""
        for name, limit in table.items():
            if not isinstance(name, str) or isinstance(limit, bool) or not isinstance(limit, int | float):
                return None
            if not (0 <= limit <= _MOST if isinstance(limit, int) else 0 < limit <= 1):
                return None
        return cls(tuple(sorted(table.items())))

    def __getitem__(self, name: str) -> int | float:
        return dict(self.limits)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(name for name, _ in self.limits)

    def __len__(self) -> int:
        return len(self.limits)

    def index(self, tenant: str) -> int:
        """Returns the number of a tenant: its own, or that of `*`, or the number of limits if it has none."""
        names = list(self)
        return next((names.index(name) for name in (tenant, OTHERS) if name in names), len(names))

    def blocks(self, num_blocks: int) -> list[int]:
        """Returns the limit of each tenant in a pool of so many blocks; a part of it is at least one block."""
        # A part such as 0.29 of 100 is less than 29 by a rounding error.
        return [limit if isinstance(limit, int) else max(int(limit * num_blocks + 1e-6), 1) for _, limit in self.limits]
