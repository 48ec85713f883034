import dataclasses
import json

import pytest
import xxhash

from kvbm_jax.errors import ConfigError
from kvbm_jax.hashing import HashAlgorithm
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout, LayoutKind

pytestmark = pytest.mark.core

SMOLLM2 = CacheIdentity.of(
    KVLayout(num_layers=30, num_blocks=64, block_size=16, num_kv_heads=3, head_dim=64),
    model_id="SmolLM2-135M-Instruct",
    hash_algorithm=HashAlgorithm.BLAKE3,
)
GOLDEN_JSON = (
    '{"block_size":16,"components":2,"dtype":"bfloat16","hash_algorithm":"blake3","head_dim":64,'
    '"model_id":"SmolLM2-135M-Instruct","num_kv_heads":3,"num_layers":30,"scale_format":null,"version":1}'
)
GOLDEN_FINGERPRINT = "45738b699cc698412f28a5511fc06687"


def test_golden():
    assert SMOLLM2.canonical_json() == GOLDEN_JSON
    assert SMOLLM2.fingerprint.hex() == GOLDEN_FINGERPRINT
    assert SMOLLM2.fingerprint == xxhash.xxh3_128_digest(GOLDEN_JSON.encode())


def test_json_reads_back():
    assert CacheIdentity.from_json(SMOLLM2.canonical_json()) == SMOLLM2


def test_where_blocks_lie_is_no_part_of_it():
    elsewhere = KVLayout(30, 1024, 16, 3, 64, kind=LayoutKind.UNIVERSAL)
    same = CacheIdentity.of(elsewhere, model_id=SMOLLM2.model_id, hash_algorithm="blake3")
    assert same == SMOLLM2
    assert same.fingerprint == SMOLLM2.fingerprint
    assert same.difference(SMOLLM2) == ""


def test_scales_are_part_of_it():
    plain, scaled = (
        CacheIdentity.of(
            KVLayout(30, 64, 16, 3, 64, "int8", quantized=quantized), model_id="m", hash_algorithm="blake3"
        )
        for quantized in (False, True)
    )
    assert plain.scale_format is None
    assert plain.difference(scaled) == "scale_format: None != 'float32 per token and head'"


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(CacheIdentity)])
def test_each_field_changes_the_fingerprint_and_is_named(field):
    value = getattr(SMOLLM2, field)
    other = dataclasses.replace(SMOLLM2, **{field: value + 1 if isinstance(value, int) else f"{value}x"})
    assert other.fingerprint != SMOLLM2.fingerprint
    assert SMOLLM2.difference(other) == f"{field}: {value!r} != {getattr(other, field)!r}"


def test_an_unknown_algorithm_is_refused():
    with pytest.raises(ConfigError, match="hash_algorithm = 'md5': allowed is one of blake3, xxh3_64"):
        CacheIdentity.of(KVLayout(1, 1, 1, 1, 1), model_id="m", hash_algorithm="md5")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", json.dumps({"model_id": "m"}), '{"shoe_size":46}'])
def test_other_text_is_no_identity(text):
    with pytest.raises(ConfigError, match="no cache identity"):
        CacheIdentity.from_json(text)


def test_an_identity_of_another_version_is_refused():
    with pytest.raises(ConfigError, match="version 2: known is 1"):
        CacheIdentity.from_json(dataclasses.replace(SMOLLM2, version=2).canonical_json())
