"""What must hold on a real GPU: the verbs give there what they give on the CPU, in place and without host syncs."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import kvbm_jax
from kvbm_jax import BlockManager, ElementFormat, KvBlockManagerConfig, KVLayout, cache, invariants, pool, sequences
from kvbm_jax.sizing import layout_of

pytestmark = pytest.mark.gpu


def on(platform, function, *args):
    """The outcome of a function on one platform, as host arrays."""
    device = jax.local_devices(backend=platform)[0]
    return jax.device_get(jax.jit(function)(*jax.device_put(args, device)))


def test_the_pool_on_the_gpu_equals_the_pool_on_the_cpu():
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**32, (40, 4, 8, 4), np.uint32) % 50  # many repeats

    def life(hashes):
        def step(state, step_hashes):
            found = pool.match(state, step_hashes, jnp.full((4,), 8, jnp.int32))
            state, _ = pool.acquire(state, found.block_ids)
            state, grant = pool.allocate(state, 8 - found.num_blocks, max_blocks=8)
            state, done = pool.register(state, grant.block_ids, step_hashes)
            state, _ = pool.release(state, done.block_ids)
            state, _ = pool.release(state, found.block_ids)
            return state, (found, grant, done)

        return jax.lax.scan(step, pool.init(100), hashes)

    on_gpu, on_cpu = on("gpu", life, hashes), on("cpu", life, hashes)
    jax.tree.map(np.testing.assert_array_equal, on_gpu, on_cpu)
    invariants.assert_holds(jax.tree.map(jnp.asarray, on_gpu[0]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_on_the_gpu_equals_attention_on_the_cpu(dtype):
    layout = KVLayout(1, 64, 16, 2, 64, dtype)
    rng = np.random.default_rng(1)
    x = rng.standard_normal((96, 12, 64)).astype(jnp.dtype(dtype))

    def attend(x):
        state, running = pool.init(64), sequences.init(3, 20, block_size=16, pool_blocks=64)
        counts = jnp.array([70, 0, 26], jnp.int32)
        no_hashes = jnp.zeros((3, 1, 4), jnp.uint32)
        rows = jnp.arange(3, dtype=jnp.int32)
        state, running, _ = sequences.start(state, running, rows, no_hashes, jnp.zeros((3,), jnp.int32), counts)
        batch = kvbm_jax.step_batch(running, rows, jnp.zeros((3,), jnp.int32), counts, num_tokens=96, max_query_len=70)
        return kvbm_jax.attend(cache.init(layout), 0, x[:, :8], x[:, 8:10], x[:, 10:], batch)

    with jax.default_matmul_precision("highest"):
        on_gpu, on_cpu = on("gpu", attend, x), on("cpu", attend, x)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(
        on_gpu[0].astype(np.float32), on_cpu[0].astype(np.float32), atol=tolerance, rtol=tolerance
    )
    jax.tree.map(np.testing.assert_array_equal, on_gpu[1], on_cpu[1])


def test_store_works_in_place():
    layout = KVLayout(1, 1024, 16, 8, 128)
    store = jax.jit(functools.partial(cache.store_kv, layer=0), donate_argnums=0)
    data, slots = jnp.ones((64, 8, 128), jnp.bfloat16), jnp.arange(64, dtype=jnp.int32)
    tensors = cache.init(layout)
    place = tensors.arrays[0].unsafe_buffer_pointer()
    tensors = store(tensors, keys=data, values=data, slots=slots)
    assert tensors.arrays[0].unsafe_buffer_pointer() == place


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_blocks_are_quantised_in_registers_as_in_xla(dtype):
    layout, ids = KVLayout(2, 64, 16, 8, 128), jnp.array([5, 64, 9, 0], jnp.int32)
    tier = layout.with_format(ElementFormat(dtype, quantized=True)).staging(4)
    rng = np.random.default_rng(2)
    arrays = tuple(jnp.array(rng.standard_normal(layout.array_shape), jnp.bfloat16) for _ in range(2))
    tensors, found = cache.KVCache(arrays, layout), {}
    for implementation in ("xla", "mosaic_gpu"):
        how = {"implementation": implementation, "element_format": tier.element_format}
        blocks = jax.jit(functools.partial(cache.gather_blocks, **how))(tensors, ids)
        back = jax.jit(functools.partial(cache.scatter_blocks, **how))(cache.init(layout), ids, blocks)
        found[implementation] = [np.asarray(array, np.float32) for array in back.arrays]
    # Quotients may differ in their last bit, and an element then by one step: amax / 127 of its row, or an eighth.
    step = 0.06 if dtype == "int8" else 0.6
    for one, other in zip(*found.values(), strict=True):
        np.testing.assert_allclose(one, other, atol=step)
        assert (one != other).mean() < 1e-3


def test_a_manager_keeps_its_pool_on_the_cpu_and_its_cache_on_the_gpu():
    config = KvBlockManagerConfig(block_size=16, num_layers=2, num_kv_heads=2, head_dim=64, gpu_memory_fraction=0.01)
    assert 1 < layout_of(config, step_bytes=1 << 30).num_blocks < layout_of(config).num_blocks
    with BlockManager(config) as manager:
        assert manager.layout.num_blocks > 1
        assert manager.cache.arrays[0].device.platform == "gpu"
        with manager.start(list(range(40))) as seq:
            assert manager.sequences.lengths.device.platform == "gpu"
            assert manager.register(seq) == 2
        assert manager.match(list(range(40))) == 32
