"""From a name to an eviction policy: the built-in ones, and those that installed packages offer.

A package offers one by an entry point of the group `kvbm_jax.eviction_policies`: an `EvictionPolicy`, or a function
without arguments that returns one.

    [project.entry-points."kvbm_jax.eviction_policies"]
    two_queues = "my_package:two_queues"

Its name is then a value of the configuration's `eviction_policy`. Built-in names cannot be taken over.
"""

import functools
from typing import Any, Final

from kvbm_jax import extensions, policies
from kvbm_jax.errors import ConfigError

__all__ = ["KIND", "find"]

KIND: Final = extensions.Kind("eviction policy", "kvbm_jax.eviction_policies", policies.NAMES)


@functools.cache
def find(name: str) -> policies.EvictionPolicy:
    """Returns the policy of a name, each time the same one, so that what is compiled with it is compiled once.

    Raises:
      ConfigError: if there is none, it cannot be loaded, or what is offered is no policy.
    """
    if name in policies.NAMES:
        return policies.named(name)
    return extensions.load(KIND, name, _policy_of)


def _policy_of(offered: Any) -> policies.EvictionPolicy:
    policy = offered if isinstance(offered, policies.EvictionPolicy) else offered()
    if not isinstance(policy, policies.EvictionPolicy):
        raise ConfigError(
            f"an eviction policy was to be loaded, and a {type(policy).__name__} is there; offer an EvictionPolicy, or "
            "a function without arguments that returns one"
        )
    return policy
