"""The paged path against a plain contiguous cache with the same weights, token for token."""

import re
import statistics
import time

import jax.numpy as jnp
import numpy as np
import pytest
from contiguous import ContiguousDecoder
from flax import nnx
from smollm2 import find_model, load_weights, read_config, read_gguf
from smollm2.engine import Engine

import kvbm_jax
from kvbm_jax.errors import ConfigError, OutOfBlocksError, SequenceTooLongError

BLOCK = 16
TEXT = (
    "The keeper climbed the stair with the lamp in one hand and the red book in the other, counting the steps under "
    "his breath as he had done every evening for eleven years. One hundred and ninety-six. The wind had gone round "
    "to the north-west, and the sea below the gallery was the colour of slate."
)


@pytest.fixture(scope="module")
def engine(model):
    return Engine(model, block_size=BLOCK, num_blocks=192, max_sequences=4, chunks=(16, 64))


@pytest.fixture(scope="module")
def weights():
    file = read_gguf(find_model())
    config = read_config(file)
    return config, load_weights(file, config)


@pytest.fixture(scope="module")
def contiguous(weights):
    return ContiguousDecoder(*weights, max_len=192)


@pytest.fixture(scope="module")
def ids(tokenizer):
    return tokenizer.encode(TEXT)


# Inside, on and one past a block boundary; one token; more than one chunk of prefill.
@pytest.mark.parametrize("length", [1, 5, 15, 16, 17, 32, 33, 64])
def test_greedy_tokens_equal_those_of_a_contiguous_cache(engine, contiguous, ids, length):
    expected, _ = contiguous.generate(ids[:length], 20)
    [answer] = engine.generate([ids[:length]], 20, salt=f"length {length}", ignore_eos=True)
    assert answer.num_cached == 0
    assert answer.tokens == expected


def test_rows_of_unequal_lengths_answer_as_each_alone(engine, contiguous, ids):
    prompts = [ids[:7], ids[:48], ids[3:20], ids[10:43]]
    answers = engine.generate(prompts, 20, salt="rows", ignore_eos=True)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.tokens == contiguous.generate(prompt, 20)[0]


@pytest.mark.parametrize("length", [31, 32, 33])
def test_a_wholly_cached_prompt_answers_as_a_cold_one(engine, ids, length):
    salt = f"again {length}"
    [cold] = engine.generate([ids[:length]], 20, salt=salt, ignore_eos=True)
    [warm] = engine.generate([ids[:length]], 20, salt=salt, ignore_eos=True)
    assert cold.num_cached == 0
    assert warm.num_cached == (length - 1) // BLOCK * BLOCK
    assert warm.tokens == cold.tokens


def test_an_answer_is_cached_too(engine, contiguous, ids):
    prompt = ids[:40]
    [first] = engine.generate([prompt], 30, salt="follow-up", ignore_eos=True)
    longer = prompt + first.tokens + ids[40:45]
    [second] = engine.generate([longer], 10, salt="follow-up", ignore_eos=True)
    # All but the newest token of the answer were fed, so their whole blocks are there.
    assert second.num_cached == (len(prompt) + 29) // BLOCK * BLOCK
    assert second.tokens == contiguous.generate(longer, 10)[0]


def test_other_salts_find_nothing(engine, ids):
    engine.generate([ids[:40]], 1, salt="tenant a")
    [other] = engine.generate([ids[:40]], 1, salt="tenant b")
    assert other.num_cached == 0


def test_logits_agree_with_those_of_a_contiguous_cache(engine, contiguous, model, ids):
    graph, params = nnx.split(model)

    def logits(cache, running, row, tokens):
        batch = kvbm_jax.step_batch(
            running, row[None], jnp.zeros((1,), jnp.int32), jnp.full((1,), 64), num_tokens=64, max_query_len=64
        )
        decoder = nnx.merge(graph, params)
        hidden, cache = decoder(tokens, batch, cache, attend=kvbm_jax.attend)
        return cache, decoder.logits(hidden[-1])

    with engine.manager.start(ids[:64], salt="logits") as seq:
        paged = engine.manager.run(logits, engine.manager.sequences, jnp.int32(seq.row), jnp.asarray(ids[:64]))
    np.testing.assert_allclose(paged, contiguous.generate(ids[:64], 1)[1], atol=1e-3, rtol=0)


def test_the_end_token_ends_an_answer(engine, tokenizer):
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}])
    [answer] = engine.generate([prompt], 40)
    assert answer.tokens[-1] == tokenizer.eos_id
    assert "Paris" in tokenizer.decode(answer.tokens)
    [longer] = engine.generate([prompt], 40, ignore_eos=True)
    assert len(longer.tokens) == 40
    assert longer.tokens[: len(answer.tokens)] == answer.tokens


def test_decode_works_in_place(engine):
    layer_bytes = engine.manager.layout.total_bytes // engine.manager.layout.num_layers
    assert engine._decode.memory_analysis().temp_size_in_bytes < layer_bytes
    shape = ",".join(str(size) for size in engine.manager.layout.array_shape)
    text = engine._decode.as_text()
    assert f"f32[{shape}]" in text
    assert not re.findall(rf"f32\[{shape}\]\S* copy\(.*", text)


def test_all_blocks_come_back(engine, ids):
    assert engine.manager.stats().held == 0
    with pytest.raises(SequenceTooLongError, match="exceed the model's context of 8192"):
        engine.generate([ids], 8192)
    with pytest.raises(SequenceTooLongError, match="192 blocks of 16"):
        engine.generate([ids * 50], 1)
    with pytest.raises(OutOfBlocksError):
        engine.generate([(ids * 20)[:1500], (ids * 20)[1:1501], (ids * 20)[2:1502]], 1)
    with pytest.raises(ConfigError, match="max_tokens is 0"):
        engine.generate([ids], 0)
    stream = engine.stream([ids], 64, ignore_eos=True)
    next(stream)
    stream.close()
    assert engine.manager.stats().held == 0


@pytest.mark.long
@pytest.mark.timeout(900)
def test_speed_beside_a_contiguous_cache_and_beside_no_cache(model, weights, tokenizer):
    """Ratios of medians of one interleaved round; the best of three counts, for neighbours slow some rounds down."""
    engine = Engine(model, block_size=BLOCK, num_blocks=512)
    contiguous = ContiguousDecoder(*weights, max_len=2048)
    ids = (tokenizer.encode(TEXT) * 30)[: 1504 + 48]
    steps = 33
    engine.generate([ids[:1504]], 1, salt="warm")
    engine.generate([ids[:1500]], steps, salt="decode", ignore_eos=True)
    cache, _ = contiguous.prefill(contiguous.init(), contiguous.params, jnp.asarray(ids[:1536]), jnp.int32(1500))
    cache, _ = contiguous.decode(cache, contiguous.params, jnp.int32(1), jnp.int32(1500), steps=steps - 1)

    def measure(part):
        nonlocal cache
        cold, warm, paged, plain = [], [], [], []
        for i in range(part, part + 5):
            cold.append(engine.generate([ids], 1, salt=f"cold {i}")[0].ttft_seconds)
            # The prefix is kept, the tail is new every time.
            tail = [(token + i) % 40000 for token in ids[1504:]]
            [answer] = engine.generate([ids[:1504] + tail], 1, salt="warm")
            assert answer.num_cached == 1504
            warm.append(answer.ttft_seconds)
            [answer] = engine.generate([ids[:1500]], steps, salt="decode", ignore_eos=True)
            paged.append(answer.decode_seconds)
            begun = time.perf_counter()
            cache, tokens = contiguous.decode(cache, contiguous.params, jnp.int32(1), jnp.int32(1500), steps=steps - 1)
            tokens.block_until_ready()
            plain.append(time.perf_counter() - begun)
        speedup = statistics.median(cold) / statistics.median(warm)
        relative = statistics.median(plain) / statistics.median(paged)
        print(
            f"time to first token, cold over warm: {speedup:.1f}; decode speed, paged over contiguous: {relative:.2f}"
        )
        return speedup, relative

    rounds = []
    for first in (0, 5, 10):
        rounds.append(measure(first))
        if rounds[-1][0] >= 12 and rounds[-1][1] >= 0.9:
            return
    pytest.fail(f"no round with a speed-up of 12 and 0.9 of the decode speed: {rounds}")
