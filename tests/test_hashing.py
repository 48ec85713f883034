import json
import pathlib

import jax.numpy as jnp
import msgspec
import numpy as np
import pytest
from golden import make_hashes
from hypothesis import given
from hypothesis import strategies as st

from kvbm_jax.errors import HashingError
from kvbm_jax.hashing import HashAlgorithm, block_hash, block_hashes, hash_block, hash_sequence, to_wire

pytestmark = pytest.mark.core

GOLDEN = json.loads(pathlib.Path(make_hashes.FILE).read_text())
ALGORITHMS = tuple(HashAlgorithm)
tokens_of = st.lists(st.integers(0, 2**32 - 1), max_size=40)


def images_of(case):
    return [(position, bytes.fromhex(content)) for position, content in case.get("multimodal", ())]


def hash_golden(case, **changes):
    arguments = {
        "algorithm": HashAlgorithm(case["algorithm"]),
        "salt": case.get("salt", ""),
        "lora_name": case.get("lora_name"),
        "multimodal": images_of(case),
    }
    return hash_sequence(case["tokens"], case["block_size"], **(arguments | changes))


def rows(hashes):
    return [row.astype("<u4").tobytes().hex() for row in hashes]


@pytest.mark.parametrize("case", GOLDEN, ids=range(len(GOLDEN)))
def test_golden_hashes(case):
    assert rows(hash_golden(case)) == case["hashes"]


def test_golden_file_is_what_its_generator_writes():
    assert make_hashes.build() == GOLDEN


@pytest.mark.parametrize("case", [c for c in GOLDEN if "block_hashes" in c])
def test_golden_block_hashes(case):
    found = block_hashes(case["tokens"], case["block_size"], salt=case.get("salt", ""), lora_name=case.get("lora_name"))
    assert found.dtype == np.uint64
    assert found.tolist() == case["block_hashes"]


def test_dynamo_check_values():
    hashes = hash_sequence(range(1, 9), 4, algorithm=HashAlgorithm.XXH3_64)
    assert block_hash([1, 2, 3, 4]) == 14643705804678351452
    assert block_hash([5, 6, 7, 8]) == 16777012769546811212
    assert to_wire(hashes).tolist() == [14643705804678351452, 4945711292740353085]
    assert not hashes[:, 2:].any()


def test_extras_are_shortest_messagepack():
    for extra in ([None, [[0, b"\xff"]]], ["x" * 40, []], ["a", [[200, b"z" * 32]]]):
        assert msgspec.msgpack.encode(extra) == make_hashes.pack(extra)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(tokens=tokens_of, block_size=st.integers(1, 7), cut=st.integers(0, 40), salt=st.text(max_size=3))
def test_incremental_equals_whole(algorithm, tokens, block_size, cut, salt):
    kwargs = {"algorithm": algorithm, "salt": salt, "lora_name": "a" if cut % 2 else None}
    whole = hash_sequence(tokens, block_size, **kwargs)
    assert whole.shape == (len(tokens) // block_size, 4)
    assert whole.dtype == np.uint32
    split = min(cut, len(whole))
    head = hash_sequence(tokens[: split * block_size], block_size, **kwargs)
    parent = head[-1] if split else None
    tail = hash_sequence(tokens[split * block_size :], block_size, parent=parent, **kwargs)
    np.testing.assert_array_equal(np.concatenate([head, tail]), whole)


@given(tokens=st.lists(st.integers(0, 99), min_size=12, max_size=12), at=st.integers(0, 11))
def test_incremental_with_images_equals_whole(tokens, at):
    images = [(at, b"one"), (11, b"two")]
    whole = hash_sequence(tokens, 4, multimodal=images)
    head = hash_sequence(tokens[:8], 4, multimodal=[(p, h) for p, h in images if p < 8])
    tail = hash_sequence(tokens[8:], 4, multimodal=[(p - 8, h) for p, h in images if p >= 8], parent=head[-1])
    np.testing.assert_array_equal(np.concatenate([head, tail]), whole)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(tokens=st.lists(st.integers(0, 2**32 - 1), min_size=8, max_size=24), data=st.data())
def test_a_changed_token_changes_its_block_and_all_later_ones(algorithm, tokens, data):
    at = data.draw(st.integers(0, len(tokens) // 4 * 4 - 1))
    changed = list(tokens)
    changed[at] ^= 1
    before, after = (hash_sequence(t, 4, algorithm=algorithm) for t in (tokens, changed))
    same = (before == after).all(axis=1)
    assert same.tolist() == [block < at // 4 for block in range(len(tokens) // 4)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@given(salts=st.lists(st.text(max_size=8), min_size=2, max_size=2, unique=True), tokens=tokens_of)
def test_salts_never_meet(algorithm, salts, tokens):
    first, second = (set(rows(hash_sequence(tokens, 2, algorithm=algorithm, salt=s))) for s in salts)
    assert not first & second


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_lora_names_part_every_block_and_an_empty_name_is_the_base_model(algorithm):
    base, a, b, empty = (
        hash_sequence(range(12), 4, algorithm=algorithm, lora_name=name) for name in (None, "a", "b", "")
    )
    assert len({*rows(base), *rows(a), *rows(b)}) == 9
    np.testing.assert_array_equal(base, empty)


def test_an_image_parts_its_block_and_later_ones_but_not_the_text_before_it():
    plain = hash_sequence(range(12), 4)
    image = hash_sequence(range(12), 4, multimodal=[(5, b"cat")])
    other = hash_sequence(range(12), 4, multimodal=[(5, b"dog")])
    assert (plain == image).all(axis=1).tolist() == [True, False, False]
    assert (other == image).all(axis=1).tolist() == [True, False, False]


def test_images_in_any_order_hash_alike_and_ones_beyond_the_whole_blocks_do_not_count():
    images = [(1, b"b"), (1, b"a"), (9, b"tail")]
    np.testing.assert_array_equal(
        hash_sequence(range(10), 4, multimodal=images), hash_sequence(range(10), 4, multimodal=images[1::-1])
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_hash_block_is_one_step_of_hash_sequence(algorithm):
    whole = hash_sequence(range(8), 4, algorithm=algorithm)
    np.testing.assert_array_equal(hash_block(range(4), algorithm=algorithm), whole[0])
    np.testing.assert_array_equal(hash_block(range(4, 8), algorithm=algorithm, parent=whole[0]), whole[1])


@pytest.mark.parametrize(
    "tokens",
    [
        (1, 2, 3, 4),
        range(1, 5),
        np.arange(1, 5),
        np.arange(1, 5, dtype=np.uint64),
        np.arange(1, 5, dtype=np.int8),
        jnp.arange(1, 5),
        np.arange(1, 9, dtype=np.uint32).astype(">u4")[:4],
        np.arange(1, 9)[::-1][4:][::-1],
    ],
)
def test_any_integer_sequence_hashes_alike(tokens):
    np.testing.assert_array_equal(hash_sequence(tokens, 2), hash_sequence([1, 2, 3, 4], 2))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("tokens", [[], np.zeros(0, np.int32), [1, 2, 3]])
def test_no_whole_block_no_hash(algorithm, tokens):
    parent = hash_block([1], algorithm=algorithm)
    assert hash_sequence(tokens, 4, algorithm=algorithm).shape == (0, 4)
    assert hash_sequence(tokens, 4, algorithm=algorithm, parent=parent).shape == (0, 4)
    assert block_hashes(tokens, 4).shape == (0,)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, -5, 2], r"token -5 at position 1 is outside"),
        ([1, 2, 2**32], r"token 4294967296 at position 2 is outside"),
        (np.array([2**32], np.uint64), r"token 4294967296 at position 0"),
        (np.array([0, -1], np.int8), r"token -1 at position 1"),
        ([3, 2**80], r"token 1208925819614629174706176 at position 1"),
        ([2**63, -1], r"token 9223372036854775808 at position 0"),
        ([1, 2.0], r"token 2.0 at position 1 is no integer"),
        (["a"], r"token 'a' at position 0 is no integer"),
        ([True], r"token True at position 0 is no integer"),
        (np.array([1.5]), r"is no integer"),
        ([[1, 2]], r"shape \[1, 2\]"),
        (7, r"shape \[\]"),
    ],
)
def test_wrong_tokens_are_named_with_their_position(algorithm, tokens, message):
    with pytest.raises(HashingError, match=message):
        hash_sequence(tokens, 2, algorithm=algorithm)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"block_size": 0}, "block_size is 0"),
        ({"parent": [1, 2, 3]}, "4 words; this one has 3"),
        ({"parent": [1, 2, 3, -4]}, "parent word -4 at position 3"),
        ({"parent": [1, 2, 3, 4], "algorithm": HashAlgorithm.XXH3_64}, "no xxh3_64 hash"),
        ({"multimodal": [(4, b"x")]}, "position 4 is outside the 4 tokens"),
        ({"multimodal": [(-1, b"x")]}, "position -1 is outside"),
        ({"multimodal": [(0, b"")]}, "position 0 must be bytes"),
        ({"multimodal": [(0, "x")]}, "position 0 must be bytes"),
        ({"multimodal": [(0, b"x")], "algorithm": HashAlgorithm.XXH3_64}, "multimodal input.*use blake3"),
        ({"salt": "\ud800"}, "salt .* cannot be written as UTF-8"),
        ({"lora_name": "\ud800"}, "lora_name .* cannot be written as UTF-8"),
    ],
)
def test_wrong_arguments_are_named(kwargs, message):
    with pytest.raises(HashingError, match=message):
        hash_sequence(range(4), **({"block_size": 2} | kwargs))


def test_to_wire_keeps_the_leading_shape_and_refuses_other_arrays():
    hashes = np.array([[[1, 2, 3, 4]], [[0, 2**32 - 1, 0, 0]]], np.uint32)
    assert to_wire(hashes).tolist() == [[1 + (2 << 32)], [(2**32 - 1) << 32]]
    assert to_wire(hashes[0, 0]) == 1 + (2 << 32)
    for wrong in (hashes.astype(np.int64), hashes[..., :3], np.uint32(3)):
        with pytest.raises(HashingError, match="uint32"):
            to_wire(wrong)
