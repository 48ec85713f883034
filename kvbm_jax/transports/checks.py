"""Bounds of the numbers in this package's configurations."""

from kvbm_jax.errors import ConfigError

__all__ = ["check_above", "check_least"]


def check_least(config: object, **least: float) -> None:
    """Compares fields of a configuration with the least that each may be.

    Raises:
      ConfigError: One is less, or no number.
    """
    for name, low in least.items():
        if not getattr(config, name) >= low:
            raise ConfigError(f"{name} = {getattr(config, name)}: allowed is a number >= {low}")


def check_above(config: object, *names: str) -> None:
    """Sees to it that fields of a configuration are more than 0.

    Raises:
      ConfigError: One is not.
    """
    for name in names:
        if not getattr(config, name) > 0:
            raise ConfigError(f"{name} = {getattr(config, name)}: allowed is a number > 0")
