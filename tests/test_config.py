import dataclasses
import json
import pathlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvbm_jax.config import CacheDtype, EventTransport, KvBlockManagerConfig
from kvbm_jax.controller.address import parse_address
from kvbm_jax.errors import ConfigError
from kvbm_jax.hashing import HashAlgorithm

pytestmark = pytest.mark.core


def load(toml=None, env=None, tmp_path=None, **overrides):
    path = None
    if toml is not None:
        path = tmp_path / "kvbm.toml"
        path.write_text(toml)
    return KvBlockManagerConfig.load(path, env or {}, **overrides)


def toml_of(value):
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {v}" for k, v in value.items()) + "}"
    return json.dumps(value)


def test_defaults():
    config = load()
    assert config == KvBlockManagerConfig()
    assert (config.block_size, config.gpu_memory_fraction, config.enable_offload) == (64, 0.9, False)
    assert (config.num_blocks, config.host_blocks, config.disk_budget) == (None, 0, None)
    assert config.hash_algorithm is HashAlgorithm.BLAKE3
    assert config.events is EventTransport.INPROC


def test_the_disk_tier_is_no_folder_shared_between_users(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere/cache")
    assert KvBlockManagerConfig().offload_path == pathlib.Path("/somewhere/cache/kvbm_jax")


def test_later_sources_win(tmp_path):
    toml = "block_size = 16\nnum_blocks = 100\nnum_layers = 2"
    config = load(toml, {"KVBM_NUM_BLOCKS": "200", "KVBM_NUM_LAYERS": "3"}, tmp_path, num_layers=4)
    assert (config.block_size, config.num_blocks, config.num_layers) == (16, 200, 4)
    assert load(toml, {"KVBM_NUM_BLOCKS": "200"}, tmp_path, num_blocks=None).num_blocks is None


def test_every_key_reads_from_file_and_environment_alike(tmp_path):
    values = {
        "block_size": 32,
        "num_layers": 2,
        "num_blocks": 7,
        "num_kv_heads": 3,
        "head_dim": 8,
        "dtype": "float32",
        "hash_algorithm": "xxh3_64",
        "gpu_memory_fraction": 0.5,
        "eviction_policy": "lineage",
        "enable_offload": True,
        "offload_path": "/data/kv",
        "offload_dtype": "int8",
        "host_blocks": 9,
        "disk_budget": 2**40,
        "model_id": "m/1",
        "host_allocator": "huge_pages",
        "disk_store": "segments",
        "offload_policy": "always",
        "events": "nats",
        "events_url": "nats://127.0.0.1:5557",
        "peers": "nats",
        "peer_address": "tcp://127.0.0.1:5600",
        "transfer_engine": "tcp",
        "transfer_backends": "UCX?num_workers=2, POSIX",
        "prefill_tokens_per_second": 900.5,
        "consolidate": "merged",
        "engine_events": ["tcp://127.0.0.1:5600", "ipc:///run/engine?replay=ipc:///run/replay"],
        "controller": "auto",
        "controller_token_file": "/run/token",
        "worker_id": "w-1",
        "quotas": {"a": 0.5, "b c": 70, "*": 1},
    }
    assert set(values) == {field.name for field in dataclasses.fields(KvBlockManagerConfig)}
    toml = {k: toml_of(v) for k, v in values.items()}
    from_file = load("\n".join(f"{k} = {v}" for k, v in toml.items()), None, tmp_path)
    texts = {k: toml[k] if isinstance(v, bool | dict | list) else str(v) for k, v in values.items()}
    from_env = load(env={f"KVBM_{k.upper()}": text for k, text in texts.items()})
    assert from_file == from_env == load(**values) == KvBlockManagerConfig(**values)
    assert from_file.as_dict() == values
    assert from_file.dtype is CacheDtype.FLOAT32
    assert json.loads(json.dumps(from_file.as_dict())) == values


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("enable_offload", "true", True),
        ("enable_offload", "FALSE", False),
        ("enable_offload", "1", True),
        ("enable_offload", "0", False),
        ("gpu_memory_fraction", "0.5", 0.5),
        ("gpu_memory_fraction", "1", 1.0),
        ("gpu_memory_fraction", "5e-1", 0.5),
        ("gpu_memory_fraction", ".25", 0.25),
        ("num_blocks", "0100", 100),
    ],
)
def test_text_that_is_read(name, text, value):
    found = getattr(load(env={f"KVBM_{name.upper()}": text}), name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("enable_offload", "yes", "true, false, 1 or 0"),
        ("enable_offload", "", "true, false, 1 or 0"),
        ("enable_offload", "2", "true, false, 1 or 0"),
        ("block_size", "64 ", "an integer >= 1"),
        ("block_size", "6_4", "an integer >= 1"),
        ("block_size", "64.0", "an integer >= 1"),
        ("block_size", "٦٤", "an integer >= 1"),
        ("block_size", "9" * 5000, "an integer >= 1"),
        ("block_size", "0", "an integer >= 1"),
        ("block_size", "-64", "an integer >= 1"),
        ("num_blocks", "", "an integer >= 1 and <= 2,147,483,647"),
        ("num_blocks", "none", "an integer >= 1"),
        ("gpu_memory_fraction", "0", "a number > 0 and <= 1"),
        ("gpu_memory_fraction", "1.01", "a number > 0 and <= 1"),
        ("gpu_memory_fraction", "nan", "a number > 0 and <= 1"),
        ("gpu_memory_fraction", "inf", "a number > 0 and <= 1"),
        ("gpu_memory_fraction", "1e999", "a number > 0 and <= 1"),
        ("gpu_memory_fraction", "90%", "a number > 0 and <= 1"),
        ("dtype", "int3", "one of bfloat16, float16, float32, int8, float8_e4m3fn"),
        ("hash_algorithm", "sha256", "one of blake3, xxh3_64"),
        ("events_url", "", "a string"),
        ("offload_path", "", "a path"),
        (
            "quotas",
            "",
            "a table from tenants to blocks (an integer >= 0) or parts of the pool (> 0 and <= 1)",
        ),
        ("quotas", "0.5", "a table"),
        ("quotas", "{a = 1", "a table"),
        ("quotas", "{a = 1}\nb = 2", "a table"),
        ("quotas", "{a = -1}", "a table"),
        ("quotas", "{a = 1.5}", "a table"),
        ("quotas", "{a = 0.0}", "a table"),
        ("quotas", "{a = nan}", "a table"),
        ("quotas", "{a = 2147483648}", "a table"),
        ("quotas", "{a = true}", "a table"),
        ("quotas", "{a = '1'}", "a table"),
        ("quotas", "{a = {b = 1}}", "a table"),
        ("quotas", "{a = 1, a = 2}", "a table"),
        ("engine_events", "tcp://127.0.0.1:1", "a list of strings"),
        ("engine_events", "[1]", "a list of strings"),
        ("consolidate", "both", "one of none, per_tier, merged"),
    ],
)
def test_a_bad_value_names_its_key_variable_value_and_range(name, text, allowed):
    variable = f"KVBM_{name.upper()}"
    with pytest.raises(ConfigError) as caught:
        load(env={variable: text})
    message = str(caught.value)
    assert f"{name} = " in message
    assert variable in message
    assert allowed in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("block_size", True),
        ("block_size", 64.0),
        ("block_size", "64"),
        ("block_size", None),
        ("enable_offload", 1),
        ("enable_offload", "true"),
        ("gpu_memory_fraction", "0.5"),
        ("gpu_memory_fraction", True),
        ("gpu_memory_fraction", float("nan")),
        ("gpu_memory_fraction", 10**400),
        ("worker_id", 3),
        ("offload_path", 3),
        ("dtype", np.float32),
        ("events", None),
        ("quotas", "{a = 1}"),
        ("quotas", {1: 1}),
        ("quotas", [("a", 1)]),
        ("engine_events", "tcp://127.0.0.1:1"),
        ("engine_events", [1]),
        ("engine_events", [""]),
        ("engine_events", None),
    ],
)
def test_arguments_are_typed_not_parsed(name, value):
    for make in (load, KvBlockManagerConfig):
        with pytest.raises(ConfigError, match=rf"^{name} = .*allowed is"):
            make(**{name: value})


def test_numpy_scalars_are_numbers():
    config = KvBlockManagerConfig(block_size=np.int64(16), gpu_memory_fraction=np.float32(0.5))
    assert type(config.block_size) is int
    assert type(config.gpu_memory_fraction) is float


def test_unknown_keys_are_errors_that_name_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'blok_size' in arguments; the nearest is 'block_size'"):
        load(blok_size=3)
    with pytest.raises(ConfigError, match=r"unknown key 'host_block' in .*kvbm.toml; .*'host_blocks'"):
        load("host_block = 3", None, tmp_path)
    with pytest.raises(ConfigError, match=r"block_size = \{'a': 1\} \(from .*kvbm.toml\)"):
        load("[block_size]\na = 1", None, tmp_path)


def test_an_unknown_variable_is_one_warning_with_the_nearest_name():
    with pytest.warns(UserWarning, match="KVBM_BLOCKSIZE is ignored; the nearest is 'KVBM_BLOCK_SIZE'") as seen:
        load(env={"KVBM_BLOCKSIZE": "3", "KVBM_TRACES": "/traces", "HOME": "/"})
    assert len(seen) == 1
    assert seen[0].filename == __file__


def test_the_process_environment_is_the_default(monkeypatch):
    monkeypatch.setenv("KVBM_BLOCK_SIZE", "8")
    assert KvBlockManagerConfig.load().block_size == 8
    assert KvBlockManagerConfig().block_size == 64


@pytest.mark.parametrize("text", ["block_size = ", b"\xff\xfe"])
def test_a_file_that_is_no_toml_is_named(tmp_path, text):
    path = tmp_path / "broken.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=r"broken\.toml"):
        KvBlockManagerConfig.load(path, {})


def test_an_absent_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.toml"):
        KvBlockManagerConfig.load(tmp_path / "absent.toml", {})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"host_blocks": 1}, "host_blocks = 1 but enable_offload = false"),
        ({"disk_budget": 1}, "disk_budget = 1 but enable_offload = false"),
        ({"enable_offload": True, "disk_budget": 0}, "there is no tier; set one of them"),
        ({"num_blocks": 2**25, "block_size": 64}, "2,147,483,648 slots"),
        ({"events_url": "tcp://h:1"}, "events_url = 'tcp://h:1' but events = inproc"),
        ({"events_url": "h:1", "events": "nats"}, "such as tcp://host:port"),
        ({"consolidate": "merged", "events": "none"}, "consolidate = merged but events = none"),
        ({"engine_events": ["tcp://h:1"]}, "but consolidate = none: an engine's events"),
        ({"engine_events": ["h:1"], "consolidate": "merged"}, "such as tcp://host:port"),
        ({"engine_events": ["tcp://h:1"] * 2, "consolidate": "merged"}, "each once"),
        ({"worker_id": ""}, "worker_id = ''"),
        ({"worker_id": "a b"}, "worker_id = 'a b'"),
        ({"worker_id": "a\n"}, "worker_id"),
    ],
)
def test_keys_that_contradict_each_other(values, message):
    with pytest.raises(ConfigError, match=message):
        KvBlockManagerConfig(**values)


def test_tier_sizes_are_accepted_with_offload_and_zero_without():
    assert KvBlockManagerConfig(enable_offload=True, host_blocks=5, disk_budget=6).host_blocks == 5
    assert KvBlockManagerConfig(host_blocks=0, disk_budget=0).disk_budget == 0


def test_the_disk_tier_is_what_offloading_means_unless_there_is_another():
    assert KvBlockManagerConfig().disk_bytes == 0
    assert KvBlockManagerConfig(enable_offload=True).disk_bytes == 10 * 2**30
    assert KvBlockManagerConfig(enable_offload=True, host_blocks=5).disk_bytes == 0
    assert KvBlockManagerConfig(enable_offload=True, host_blocks=5, disk_budget=6).disk_bytes == 6


def test_tenants_have_the_limits_of_their_table(tmp_path):
    quotas = load("[quotas]\nacme = 0.29\nglobex = 20\n'*' = 0.001", None, tmp_path).quotas
    assert quotas == load(quotas={"*": 0.001, "globex": 20, "acme": 0.29}).quotas
    assert hash(quotas) == hash(load(quotas=quotas).quotas)
    limits = quotas.blocks(100)
    assert {name: limits[quotas.index(name)] for name in ("acme", "globex", "else", "")} == {
        "acme": 29,
        "globex": 20,
        "else": 1,
        "": 1,
    }
    assert load(quotas={"acme": 1}).quotas.index("globex") == 1  # nobody


@given(fraction=st.floats(0, 1, exclude_min=True), blocks=st.integers(1, 2**24))
def test_numbers_survive_the_environment(fraction, blocks):
    env = {"KVBM_GPU_MEMORY_FRACTION": repr(fraction), "KVBM_NUM_BLOCKS": str(blocks)}
    config = KvBlockManagerConfig.load(env=env)
    assert (config.gpu_memory_fraction, config.num_blocks) == (fraction, blocks)


def test_schema_and_record_tell_the_same_keys_and_defaults():
    schema = KvBlockManagerConfig.json_schema()
    assert not schema["additionalProperties"]
    properties = json.loads(json.dumps(schema))["properties"]
    defaults = KvBlockManagerConfig().as_dict()
    assert list(properties) == list(defaults)
    for name, told in properties.items():
        assert told["description"]
        if "default" in told:
            assert told["default"] == defaults[name]
    assert properties["block_size"] == {
        "description": "tokens per block",
        "type": "integer",
        "minimum": 1,
        "maximum": 2**31 - 1,
        "default": 64,
    }
    assert properties["gpu_memory_fraction"]["exclusiveMinimum"] == 0
    assert properties["events"]["default"] == "inproc"
    assert "default" not in properties["offload_path"]
    told = properties["engine_events"]
    assert (told["type"], told["items"], told["default"]) == ("array", {"type": "string"}, [])


@pytest.mark.parametrize("credentials", ["sesame", "user:sesame", "user:p@:/sesame", "sesame:"])
def test_credentials_of_addresses_are_shown_nowhere(credentials):
    url = f"nats://{credentials}@host:4222?tls_ca=/ca"
    config = KvBlockManagerConfig(events="nats", events_url=url)
    assert config.events_url == url
    assert config.as_dict()["events_url"] == "nats://...@host:4222?tls_ca=/ca"
    for values in ({"events_url": url}, {"events": "nats", "events_url": url.replace("://", ":")}):
        with pytest.raises(ConfigError, match=r"events_url = ") as caught:
            KvBlockManagerConfig(**values)
        assert "sesame" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"no address of a controller") as caught:
        parse_address(url)
    assert "sesame" not in f"{caught.value} {config} {dataclasses.replace(config, block_size=8)!r}"
    assert KvBlockManagerConfig(model_id="hf://a/b@main").as_dict()["model_id"] == "hf://a/b@main"
    assert eval(repr(KvBlockManagerConfig(block_size=8))) == KvBlockManagerConfig(block_size=8)


def test_a_configuration_is_frozen_and_replaceable():
    config = KvBlockManagerConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.block_size = 3
    with pytest.raises(ConfigError):
        dataclasses.replace(config, block_size=0)
    assert dataclasses.replace(config, block_size=8).block_size == 8
