"""From a name to an eviction policy: the built-in ones, and those that installed packages offer.

A package offers one by an entry point of the group `kvbm_jax.eviction_policies`: an `EvictionPolicy`, or a function
without arguments that returns one.

    [project.entry-points."kvbm_jax.eviction_policies"]
    two_queues = "my_package:two_queues"

Its name is then a value of the configuration's `eviction_policy`. Built-in names cannot be taken over.
"""

import difflib
import functools
from importlib import metadata
from typing import Final

from kvbm_jax import policies
from kvbm_jax.errors import ConfigError

__all__ = ["GROUP", "check_name", "find"]

GROUP: Final = "kvbm_jax.eviction_policies"


def check_name(name: str) -> str:
    """Returns the name of a policy as it is; loads nothing.

    Raises:
      ConfigError: if there is no such policy.
    """
    if name not in policies.NAMES:
        offered = metadata.entry_points(group=GROUP).names
        if name not in offered:
            known = [*policies.NAMES, *sorted(offered - set(policies.NAMES))]
            nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise ConfigError(
                f"{name!r} is no eviction policy; choose from {', '.join(known)} (the nearest is {nearest[0]!r}), or "
                f"install a package that offers it by an entry point of {GROUP}"
            )
    return name


@functools.cache
def find(name: str) -> policies.EvictionPolicy:
    """Returns the policy of a name, each time the same one, so that what is compiled with it is compiled once.

    Raises:
      ConfigError: if there is none, it cannot be loaded, or what is offered is no policy.
    """
    if check_name(name) in policies.NAMES:
        return policies.named(name)
    entry = next(iter(metadata.entry_points(group=GROUP, name=name)))
    try:
        offered = entry.load()
        policy = offered if isinstance(offered, policies.EvictionPolicy) else offered()
    except Exception as error:
        raise ConfigError(f"the eviction policy {name!r} ({entry.value}) cannot be loaded: {error}") from error
    if not isinstance(policy, policies.EvictionPolicy):
        raise ConfigError(
            f"the eviction policy {name!r} ({entry.value}) is a {type(policy).__name__}; offer an EvictionPolicy, or a "
            "function without arguments that returns one"
        )
    return policy
