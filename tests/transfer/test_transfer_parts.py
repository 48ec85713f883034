"""Parts of transfers that need no other process."""

import pytest

from kvbm_jax.errors import ConfigError, LayoutError
from kvbm_jax.layout import LayoutKind
from kvbm_jax.transfer import Placement, Quarantine


class Clock:
    def __init__(self):
        self.now = 0

    def monotonic_ns(self):
        return self.now

    time_ns = monotonic_ns


def test_quarantine_ends():
    clock = Clock()
    quarantine = Quarantine(2, 10.0, clock=clock)
    quarantine.strike("a", "wrong")
    quarantine.clear("a")
    quarantine.strike("a", "wrong")
    assert not quarantine.holds("a")
    quarantine.strike("a", "wrong")
    assert quarantine.holds("a")
    assert not quarantine.holds("b")
    clock.now = 10_000_000_000
    assert not quarantine.holds("a")
    with pytest.raises(ConfigError, match="strikes = 0"):
        Quarantine(0)


@pytest.mark.parametrize("values", [(1, 0, LayoutKind.LAYER_STACKED), (0,), (1, -1)])
def test_placements_that_cannot_be(values):
    with pytest.raises(LayoutError):
        Placement(*values)
