"""Parts of transfers that need no other process."""

import itertools

import numpy as np
import pytest

from kvbm_jax.errors import ConfigError, LayoutError
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout, LayoutKind
from kvbm_jax.transfer import Placement, Quarantine
from kvbm_jax.transfer.placement import convert


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


UNIVERSAL = LayoutKind.UNIVERSAL


@pytest.mark.parametrize(("dtype", "quantized"), [("bfloat16", False), ("int8", True)])
@pytest.mark.parametrize("source", [Placement(3, 1), Placement(3, 1, UNIVERSAL)], ids=["runs", "universal"])
@pytest.mark.parametrize(
    "target", [Placement(3, 1), Placement(2, 2), Placement(3, 1, UNIVERSAL), Placement(1, 3, UNIVERSAL)]
)
def test_every_element_and_scale_lands_where_the_layout_says(dtype, quantized, source, target):
    whole = KVLayout(2, 1, 4, 5, 3, dtype, quantized=quantized)
    identity = CacheIdentity.of(whole, model_id="toy", hash_algorithm="blake3")
    before, after = source.layout(identity), target.layout(identity)
    blocks = np.random.default_rng(0).integers(0, 256, (2, before.block_bytes), np.uint8)
    found = convert(blocks, identity, source, target)
    assert found.shape == (2, after.block_bytes)
    moved = target.first_head - source.first_head
    axes = [range(size) for size in (2, 2, 4, target.num_heads)]
    for layer, component, token, head in itertools.product(*axes):
        place = {"layer": layer, "block": 0, "component": component, "token": token}
        rows = [("byte_offset", 3 * whole.itemsize)] + ([("scale_offset", 4)] if quantized else [])
        for offset, width in rows:
            _, old = getattr(before, offset)(**place, head=head + moved)
            _, new = getattr(after, offset)(**place, head=head)
            np.testing.assert_array_equal(found[:, new : new + width], blocks[:, old : old + width])


def test_blocks_of_another_size_and_heads_that_are_not_there_are_refused():
    identity = CacheIdentity.of(KVLayout(1, 1, 2, 4, 2, "float32"), model_id="toy", hash_algorithm="blake3")
    with pytest.raises(LayoutError, match="in this placement each has 128 bytes"):
        convert(np.zeros((1, 64), np.uint8), identity, Placement(4), Placement(2))
    with pytest.raises(LayoutError, match="heads 2 to 4 are wanted; the peer has 0 to 3"):
        convert(np.zeros((1, 128), np.uint8), identity, Placement(4), Placement(3, 2))
