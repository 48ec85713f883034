"""How many blocks fit: of the device's memory, less what is in use, less what a real compiled step needs."""

import functools

import jax
import jax.numpy as jnp
import pytest

import kvbm_jax
from kvbm_jax import cache, sequences
from kvbm_jax.config import KvBlockManagerConfig
from kvbm_jax.errors import ConfigError
from kvbm_jax.layout import KVLayout
from kvbm_jax.sizing import layout_of, step_bytes

pytestmark = pytest.mark.core

BLOCK_BYTES = 2 * 2 * 16 * 4 * 8 * 2  # layers, keys and values, tokens, heads, head dim, bfloat16


class Device:
    """Tells of memory as a GPU does."""

    def __init__(self, **stats):
        self.stats = stats or None

    def memory_stats(self):
        return self.stats

    def __str__(self):
        return "gpu:0"


def config(**values):
    return KvBlockManagerConfig(**({"block_size": 16, "num_layers": 2, "num_kv_heads": 4, "head_dim": 8} | values))


def blocks(limit, in_use, step=0, **values):
    device = Device(bytes_limit=limit * BLOCK_BYTES, bytes_in_use=in_use * BLOCK_BYTES, peak_bytes_in_use=1 << 60)
    return layout_of(config(**values), step_bytes=step * BLOCK_BYTES, device=device).num_blocks


def test_the_cache_takes_its_part_of_what_weights_and_step_leave():
    assert blocks(1000, 0) == 900
    assert blocks(1000, 400) == 540
    assert blocks(1000, 400, 100) == 450
    assert blocks(1000, 400, 100, gpu_memory_fraction=1.0) == 500
    assert blocks(1000, 400, 599, gpu_memory_fraction=1.0) == 1
    assert blocks(1001, 400, 100) == 450, "rounded down"


def test_bytes_are_those_of_the_element_format():
    device = Device(bytes_limit=1000 * BLOCK_BYTES, bytes_in_use=0)
    assert layout_of(config(dtype="float32", gpu_memory_fraction=1.0), device=device).num_blocks == 500


def test_slots_stay_within_32_bits():
    assert blocks(10**9, 0) == (2**31 - 1) // 16


def test_num_blocks_is_taken_as_it_is_whatever_the_device_has():
    assert blocks(1, 1, num_blocks=7) == 7


@pytest.mark.parametrize(("in_use", "step"), [(1000, 0), (0, 1000), (900, 200), (999, 0)])
def test_no_room_is_told_with_the_numbers(in_use, step):
    with pytest.raises(
        ConfigError, match=rf"gpu:0 has {1000 * BLOCK_BYTES:,}, of which {in_use * BLOCK_BYTES:,} are in use"
    ):
        blocks(1000, in_use, step)


def test_what_cannot_be_known_is_asked_for():
    for device in (Device(), Device(bytes_in_use=5)):
        with pytest.raises(ConfigError, match=r"gpu:0 reports no memory limit .*; set num_blocks"):
            layout_of(config(), device=device)
    with pytest.raises(ConfigError, match=r"num_blocks is unset and cpu:0 reports no memory limit .*; set num_blocks"):
        layout_of(config())
    with pytest.raises(ConfigError, match="step_bytes = -1"):
        layout_of(config(), step_bytes=-1, device=Device(bytes_limit=1, bytes_in_use=0))


def decode(tensors, running, queries, tail):
    batch = kvbm_jax.decode_batch(running, jnp.ones((4,), bool))
    for layer in range(2):
        out, tensors = kvbm_jax.attend(tensors, layer, queries, queries[:, :2], queries[:, 2:4], batch)
        queries = queries + jnp.tanh(out)
    return tensors, queries, jnp.sort(tail)


@functools.cache
def compiled(num_blocks, tail=64):
    """A step of four sequences of at most 8 blocks, over caches of any size."""
    layout = KVLayout(2, num_blocks, 16, 2, 8, dtype="float32")
    tensors = jax.eval_shape(lambda: cache.init(layout))
    running = jax.eval_shape(
        lambda: sequences.init(max_sequences=4, max_blocks=8, block_size=16, pool_blocks=num_blocks)
    )
    rest = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 4, 8), (tail,))]
    return jax.jit(decode, donate_argnums=0).lower(tensors, running, *rest).compile()


def test_a_steps_bytes_do_not_grow_with_the_cache():
    small, large = step_bytes(compiled(64)), step_bytes(compiled(4096))
    assert 4 * 4 * 8 * 4 < small < KVLayout(2, 64, 16, 2, 8, dtype="float32").total_bytes
    assert small == large


def test_the_most_demanding_program_counts():
    assert step_bytes() == 0
    little, much = compiled(64), compiled(64, tail=1 << 16)
    assert step_bytes(little, much) == step_bytes(much) > step_bytes(little)
    assert step_bytes(much) >= 4 << 16
