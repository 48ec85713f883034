"""Which implementation serves a call, and why not another."""

import logging

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh
from jax.sharding import PartitionSpec as P

from kvbm_jax import kernels
from kvbm_jax.kernels import configs, dispatch, target
from kvbm_jax.kernels.configs import CopyConfig, copy_config, using
from kvbm_jax.layout import KVLayout, LayoutKind

pytestmark = pytest.mark.core

STORE = kernels.OPERATIONS["store_kv"]


def store_args(heads=2, dim=64, dtype="bfloat16", tokens=4):
    shapes = [(6, 2, 8, heads, dim), (tokens, heads, dim)]
    array, rows = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    return array, (rows, rows), jax.ShapeDtypeStruct((tokens,), jnp.int32)


def on(kind, cores=132, platform="gpu"):
    return jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=AbstractDevice(kind, cores, platform)))


def test_on_the_cpu_it_is_xla_and_the_choice_says_why():
    choice = STORE.choose(None, *store_args())
    assert choice.implementation == "xla"
    assert choice.refusals == {"mosaic_gpu": "it needs an NVIDIA GPU"}
    with pytest.raises(NotImplementedError, match="mosaic_gpu cannot serve this store_kv: it needs an NVIDIA GPU"):
        STORE.choose("mosaic_gpu", *store_args())


@pytest.mark.parametrize("kind", ["NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA B200", "NVIDIA GB200"])
def test_on_hopper_and_later_it_is_mosaic(kind):
    with on(kind):
        assert STORE.choose(None, *store_args()).implementation == "mosaic_gpu"
        assert STORE.choose("xla", *store_args()).implementation == "xla"


@pytest.mark.parametrize(
    ("kind", "platform", "reason"),
    [
        ("NVIDIA A100-SXM4-80GB", "gpu", r"NVIDIA A100-SXM4-80GB has 8\.0"),
        ("NVIDIA Unheard-of", "gpu", "NVIDIA Unheard-of has 0.0"),
        ("TPU v5 lite", "tpu", "it needs an NVIDIA GPU"),
    ],
)
def test_on_other_devices_it_is_refused(kind, platform, reason):
    with on(kind, platform=platform):
        assert STORE.choose(None, *store_args()).implementation == "xla"
        with pytest.raises(NotImplementedError, match=reason):
            STORE.choose("mosaic_gpu", *store_args())


def test_in_a_shard_map_that_checks_types_it_is_refused():
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    specs = (P(None, None, None, "heads"), P(None, "heads"), P())
    choices = {}

    def choose(check):
        def inner(array, rows, slots):
            choices[check] = STORE.choose(None, array, (rows, rows), slots)
            return array

        array, (rows, _), slots = store_args()
        jax.eval_shape(
            jax.shard_map(inner, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=check), array, rows, slots
        )

    with target.interpreted():
        choose(check=True)
        choose(check=False)
    assert choices[True].refusals["mosaic_gpu"] == "it is called in a shard_map over heads that needs check_vma=False"
    assert choices[False].implementation == "mosaic_gpu"


def test_a_shape_is_refused_and_said_once(caplog):
    dispatch._say_once.cache_clear()
    args = store_args(heads=1, dim=4)
    with on("NVIDIA H100 80GB HBM3"), caplog.at_level(logging.WARNING, "kvbm_jax"):
        for _ in range(2):
            choice = STORE.choose(None, *args)
        assert choice.implementation == "xla"
        assert choice.refusals["mosaic_gpu"] == "a token of [1, 4] bfloat16 has 8 bytes, not a multiple of 16"
    assert [record.getMessage() for record in caplog.records] == [
        "store_kv runs in XLA: mosaic_gpu cannot serve it, for a token of [1, 4] bfloat16 has 8 bytes, "
        "not a multiple of 16"
    ]


@pytest.mark.parametrize(("block_size", "head_dim", "reason"), [(8, 512, "head_dim 512"), (3, 72, "432 bytes a head")])
def test_a_strided_copy_has_its_limits(block_size, head_dim, reason):
    layout = KVLayout(1, 4, block_size, 2, head_dim, "bfloat16")
    arrays = (jax.ShapeDtypeStruct(layout.array_shape, layout.dtype),)
    permute = kernels.OPERATIONS["permute_blocks"]
    with on("NVIDIA H100 80GB HBM3"):
        assert permute.choose(None, arrays, layout, layout.with_kind(LayoutKind.LAYER_STACKED)).implementation == (
            "mosaic_gpu"
        )
        refused = permute.choose(None, arrays, layout, layout.with_kind(LayoutKind.UNIVERSAL))
    assert reason in refused.refusals["mosaic_gpu"]


def test_configs_come_from_the_caller_then_the_table_then_the_rule(monkeypatch):
    table = {target.H100.kind: {"store_kv": {"2048": {"tile_bytes": 1024, "stages": 3, "blocks_per_core": 1}}}}
    monkeypatch.setattr(configs, "_tuned", lambda: table)
    tuned = CopyConfig(1024, 3, 1)
    assert copy_config("store_kv", 2048) == copy_config("store_kv", 1025) == tuned
    ruled = copy_config("store_kv", 2049)
    assert ruled != tuned
    assert copy_config("load_kv", 2049) == ruled
    with using(CopyConfig(64, 2, 1)):
        assert copy_config("store_kv", 2048) == CopyConfig(64, 2, 1)
    assert copy_config("store_kv", 2048) == tuned


def test_the_table_that_is_shipped_is_of_known_operations_and_fits():
    for operations in configs._tuned().values():
        for operation, units in operations.items():
            assert operation in kernels.OPERATIONS
            for unit, config in units.items():
                assert int(unit) == configs.bucket(int(unit))
                CopyConfig(**config)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"stages": 1}, "stages 2 to 16"), ({"tile_bytes": 65536}, "526,336 bytes of shared memory")],
)
def test_configs_that_do_not_fit_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CopyConfig(**fields)
