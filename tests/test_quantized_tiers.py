"""Quantised blocks below the device: of a quantised cache bit for bit, of a plain one as 8 bits keep them."""

import jax
import numpy as np
import pytest
import quantized
from tiered import HOST, LAYERS, SIZE, disk, make, prompt, settle, slots_of

from kvbm_jax import ElementFormat, KVLayout
from kvbm_jax import cache as kv_cache
from kvbm_jax.config import CacheDtype
from kvbm_jax.errors import ConfigError
from kvbm_jax.offload import MemoryBlockStore
from kvbm_jax.offload.staging import StagingRing, onboard, rows_for, rows_of_array
from kvbm_jax.protocols import Tier

pytestmark = pytest.mark.core

INT8 = ElementFormat("int8", quantized=True)
WIDTH = 3 * SIZE + 1  # tokens of a prompt


@jax.jit
def _store(cache, data, slots):
    for layer in range(LAYERS):
        cache = kv_cache.store_kv(cache, layer, data[:, layer, :1], data[:, layer, 1:], slots)
    return cache, None


def data_of(tokens):
    """Keys and values of tokens, f32[S, LAYERS, 2, D]."""
    return np.random.default_rng(list(tokens)).normal(size=(len(tokens), LAYERS, 2, 2)).astype(np.float32)


def blocks_of(manager, seq):
    """The whole blocks of a sequence as they are, bytes and all."""
    table = np.asarray(manager.sequences.block_tables)[0, seq.row, : WIDTH // SIZE]
    return np.asarray(kv_cache.gather_blocks(manager.cache, table))


def serve(manager, tokens):
    """One request from start to release: where its tokens were found, and its blocks."""
    with manager.start(tokens) as seq:
        data, slots = data_of(tokens), slots_of(manager, seq).astype(np.int32)
        slots[: seq.num_cached] = manager.layout.num_slots
        manager.run(_store, data, slots)
        manager.register(seq)
        hits = {tier: count for tier, count in seq.hits.items() if count}
        return hits, blocks_of(manager, seq)


@pytest.mark.parametrize(("dtype", "tiers"), [("int8", HOST), ("float8_e4m3fn", None)], ids=["host", "disk"])
def test_blocks_of_a_quantised_cache_come_back_bit_for_bit(dtype, tiers, tmp_path):
    first, second = prompt(0, 3), prompt(100, 3)
    tiers = disk(tmp_path) if tiers is None else tiers | {"host_blocks": 8}
    tier = Tier.G2 if "host_blocks" in tiers else Tier.G3
    with make(4, dtype=dtype, **tiers) as manager:
        assert manager.layout.element_format == ElementFormat(dtype, quantized=True)
        _, blocks = serve(manager, first)
        assert blocks.dtype == np.uint8
        assert blocks.any(axis=1).all()
        serve(manager, second)
        settle(manager)
        hits, back = serve(manager, first)
        assert hits == {tier: 3 * SIZE}
        np.testing.assert_array_equal(back, blocks)
    if tier is Tier.G3:
        with make(4, dtype=dtype, **tiers) as manager:
            hits, back = serve(manager, first)
            assert hits == {tier: 3 * SIZE}
            np.testing.assert_array_equal(back, blocks)


def test_a_plain_cache_has_quantised_tiers():
    first, second = prompt(0, 3), prompt(100, 3)
    with make(4, dtype="bfloat16", offload_dtype="int8", host_blocks=8, **HOST) as manager:
        _, blocks = serve(manager, first)
        serve(manager, second)
        settle(manager)
        hits, back = serve(manager, first)
        assert hits == {Tier.G2: 3 * SIZE}
    assert back.dtype == blocks.dtype == jax.numpy.bfloat16
    expected = quantized.dequantize(*quantized.quantize(blocks, "int8"), "bfloat16")
    np.testing.assert_array_equal(back, expected)
    assert (back != blocks).any()


def test_blocks_of_another_format_are_not_read(tmp_path):
    tokens = prompt(0, 3)
    with make(4, dtype="bfloat16", offload_dtype="int8", **disk(tmp_path)) as manager:
        serve(manager, tokens)
    for offload_dtype, found in ((None, {}), ("float8_e4m3fn", {}), ("int8", {Tier.G3: 3 * SIZE})):
        with make(4, dtype="bfloat16", offload_dtype=offload_dtype, **disk(tmp_path)) as manager:
            assert serve(manager, tokens)[0] == found
            manager.clear()


def test_a_store_for_plain_blocks_does_not_fit():
    layout = KVLayout(LAYERS, 4, SIZE, 1, 2, "bfloat16")
    with pytest.raises(ConfigError, match=r"blocks of 64 bytes, the cache of 96; open it for this layout"):
        make(4, dtype="bfloat16", offload_dtype="int8", stores=[MemoryBlockStore(layout.block_bytes)])


@pytest.mark.parametrize(("dtype", "count"), [("bfloat16", 9), ("int8", 1)])
def test_staging_arrays_hold_quantised_blocks(dtype, count):
    layout = KVLayout(3, 40, 4, 2, 6).with_format(CacheDtype(dtype).element_format)
    tier = layout.with_format(INT8)
    rng = np.random.default_rng(count)
    cache = jax.tree.map(
        lambda array: jax.numpy.asarray(rng.integers(-9, 9, array.shape), array.dtype), kv_cache.init(layout)
    )
    blocks = rng.permutation(40)[:count].astype(np.int32)
    expected = np.asarray(kv_cache.gather_blocks(cache, blocks, element_format=INT8))
    arrays = StagingRing(tier).gather(cache, blocks)
    assert sum(array.nbytes for array in arrays) == rows_for(count, tier.block_bytes) * tier.block_bytes
    rows = np.concatenate([rows_of_array(array) for array in arrays])
    np.testing.assert_array_equal(rows[:count], expected)
    back, _ = onboard(cache, blocks, rows, INT8)
    again = np.asarray(kv_cache.gather_blocks(back, blocks, element_format=INT8))
    np.testing.assert_array_equal(again[:, : tier.payload_bytes], expected[:, : tier.payload_bytes])


def test_a_manager_stores_and_loads_a_layer_of_a_quantised_cache():
    with make(4, dtype="int8") as manager:
        [block] = manager.allocate_blocks(1)
        data = np.random.default_rng(0).normal(size=(2, SIZE, 1, 2)).astype(np.float32)
        manager.store_kv(block, 1, data)
        found = manager.load_kv(block, 1)
        np.testing.assert_array_equal(found, quantized.dequantize(*quantized.quantize(data, "int8")))
        assert not manager.load_kv(block, 0).any()
