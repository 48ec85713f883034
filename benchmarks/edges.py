"""The part of `benchmarks.gpu` that times offload and onboard, through the staging arrays of the tiers.

They stand beside a plain copy of as many bytes between device memory and pinned host memory.

Axes: M blocks of a call, P bytes of a block.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import SHAPES, cache_of
from benchmarks.measuring import Clock, Row, seconds_of, tell
from kvbm_jax import cache as kv
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload.staging import StagingRing, onboard, rows_for, rows_of_array

_TARGET = 0.9


def edges(clock: Clock, *, tiny: bool) -> None:
    """Tells how fast blocks leave and enter the device."""
    count, repeats = (8, 2) if tiny else (512, 5)
    layout = KVLayout(2, 2 * count, **(SHAPES["gqa"] | ({"block_size": 8} if tiny else {})))
    cache = kv.KVCache(jax.jit(lambda: cache_of(0, layout))(), layout)
    ids = np.random.default_rng(0).permutation(2 * count)[:count].astype(np.int32)
    num_bytes = count * layout.block_bytes
    ring = StagingRing(layout)

    down = ring.gather(cache, ids)
    rows = np.zeros((rows_for(count, layout.block_bytes), layout.block_bytes), np.uint8)
    rows[:count] = np.concatenate([rows_of_array(array) for array in down])[:count]
    ring.release(down)
    empty = kv.init(layout)
    cache, _ = onboard(empty, ids, rows)
    back = ring.gather(cache, ids)
    same = np.array_equal(np.concatenate([rows_of_array(array) for array in back])[:count], rows[:count])
    ring.release(back)
    tell("check", name="blocks come back as they went down", passed=bool(same))

    def offload(_: int) -> Any:
        arrays = ring.gather(cache, ids)
        for array in arrays:
            rows_of_array(array)
        ring.release(arrays)
        return ()

    def come_up(_: int) -> Any:
        nonlocal cache
        cache, _none = onboard(cache, ids, rows)
        return cache

    device = next(iter(cache.arrays[0].devices()))
    on_device, pinned = (jax.sharding.SingleDeviceSharding(device, memory_kind=k) for k in ("device", "pinned_host"))
    source = jax.jit(lambda: jax.lax.iota(jnp.uint32, num_bytes // 4))()
    hosted = jax.block_until_ready(jax.device_put(source, pinned))
    for case, call, baseline, plain in (
        ("offload", offload, "device to pinned host", lambda _: jax.device_put(source, pinned)),
        ("onboard", come_up, "pinned host to device", lambda _: jax.device_put(hosted, on_device)),
    ):
        if clock.allows(case):
            row = Row(
                f"{case}, {count} blocks, {num_bytes / 2**20:,.0f} MiB",
                num_bytes,
                seconds_of(call, repeats),
                baseline,
                seconds_of(plain, repeats),
                None if tiny else _TARGET,
            )
            tell("row", **dataclasses.asdict(row))
