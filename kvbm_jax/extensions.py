"""Parts that other installed packages bring, by entry point.

A package names what it offers in its own pyproject.toml; the name is then a value of the configuration.

    [project.entry-points."kvbm_jax.block_stores"]
    shelf = "my_package:open_shelf"

| group | key of the configuration | what is offered |
|---|---|---|
| `kvbm_jax.eviction_policies` | `eviction_policy` | an `EvictionPolicy`, or a function that returns one |
| `kvbm_jax.host_allocators` | `host_allocator` | a function without arguments that returns an `Allocator` |
| `kvbm_jax.block_stores` | `disk_store` | a function `(config, identity, block_bytes) -> BlockStore` of tier G3 or G4 |
| `kvbm_jax.offload_policies` | `offload_policy` | a function without arguments that returns an `OffloadPolicy` |
| `kvbm_jax.event_transports` | `events` | a function `(worker_id, url, metrics) -> EventSink` |
| `kvbm_jax.peer_networks` | `peers` | a function `(worker_id, url) -> PeerNetwork`, `url` being `events_url` |

Names of built-in parts cannot be taken over. Nothing is imported before a manager is made with it.
"""

import difflib
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, Final, NamedTuple

from kvbm_jax.errors import ConfigError, KvbmError

__all__ = ["BLOCK_STORES", "HOST_ALLOCATORS", "OFFLOAD_POLICIES", "PEER_NETWORKS", "Kind", "check_name", "load"]


class Kind(NamedTuple):
    """One kind of part."""

    what: str  # it is, in words
    group: str  # of entry points
    builtin: tuple[str, ...]  # names that this library has itself


HOST_ALLOCATORS: Final = Kind("host allocator", "kvbm_jax.host_allocators", ("anonymous", "huge_pages"))
BLOCK_STORES: Final = Kind("disk store", "kvbm_jax.block_stores", ("segments",))
OFFLOAD_POLICIES: Final = Kind("offload policy", "kvbm_jax.offload_policies", ("always",))
PEER_NETWORKS: Final = Kind("network of peers", "kvbm_jax.peer_networks", ("none", "nats"))


def check_name(kind: Kind, name: str) -> str:
    """Returns the name of a part as it is; loads nothing.

    Raises:
      ConfigError: if there is no such part.
    """
    if name in kind.builtin:
        return name
    offered = metadata.entry_points(group=kind.group).names
    if name not in offered:
        known = [*kind.builtin, *sorted(offered - set(kind.builtin))]
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
        hint = f" (the nearest is {nearest[0]!r})" if nearest else ""
        raise ConfigError(
            f"{name!r} is no {kind.what}; choose from {', '.join(known)}{hint}, or install a package that offers it by "
            f"an entry point of {kind.group}"
        )
    return name


def load[T](kind: Kind, name: str, use: Callable[[Any], T], *, methods: Sequence[str] = ()) -> T:
    """Loads a part that a package offers, and makes something of it.

    Args:
      kind: of part.
      name: one that is not built in.
      use: takes what the entry point names.
      methods: what the result must have.

    Raises:
      ConfigError: if there is none, it cannot be loaded or made, or it lacks a method.
    """
    entry = next(iter(metadata.entry_points(group=kind.group, name=check_name(kind, name))))
    where = f"the {kind.what} {name!r} ({entry.value})"
    try:
        made = use(entry.load())
    except KvbmError:
        raise
    except Exception as error:
        raise ConfigError(f"{where} cannot be loaded: {error}") from error
    lacking = [method for method in methods if not callable(getattr(made, method, None))]
    if lacking:
        raise ConfigError(f"{where} is a {type(made).__name__} without {', '.join(lacking)}")
    return made
