"""The NNX decoder against a numpy one written from the other side.

The oracle takes the tensors as `gguf.GGUFReader` gives them and turns neighbouring dimensions (GGUF's own
rope), in float64, head by head; the model takes reordered rows and turns halves. They can only agree if
loading, permutation, rope, grouping and norms are all right.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import gguf
import gguf.quants
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from smollm2 import (
    Llama,
    ModelConfig,
    build_model,
    find_model,
    load_model,
    load_tokenizer,
    load_weights,
    read_config,
    read_gguf,
)

from kvbm_jax.errors import ConfigError


class Batch(NamedTuple):
    """A step without a cache: S tokens, each in a sequence and at a position of it."""

    positions: jax.Array  # shape=(S,), dtype=int32
    sequences: jax.Array  # shape=(S,), dtype=int32


def one_sequence(tokens: int) -> Batch:
    return Batch(jnp.arange(tokens, dtype=jnp.int32), jnp.zeros(tokens, jnp.int32))


def dense_attend(cache, layer, q, k, v, batch):
    """Causal attention of each sequence to itself, over the step's own tokens; no cache is touched."""
    S, H, D = q.shape
    K = k.shape[1]
    scores = jnp.einsum("skgd,tkd->kgst", q.reshape(S, K, H // K, D), k) * D**-0.5
    same = batch.sequences[:, None] == batch.sequences[None, :]
    seen = same & (batch.positions[:, None] >= batch.positions[None, :])
    weights = jax.nn.softmax(jnp.where(seen[None, None, :, :], scores, -jnp.inf), axis=-1)
    return jnp.einsum("kgst,tkd->skgd", weights, v).reshape(S, H, D), cache


def oracle_logits(tensor: Callable[[str], np.ndarray], config: ModelConfig, ids: list[int]) -> np.ndarray:
    """Logits float64[S, V] of one sequence; `tensor` gives raw GGUF weights, [out, in]."""
    S, D, group = len(ids), config.head_dim, config.num_heads // config.num_kv_heads
    angles = np.arange(S)[:, None] / config.rope_base ** (np.arange(0, D, 2) / D)[None, :]
    turns = np.exp(1j * angles)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * tensor(name)[None, :]

    def linear(x, name):
        return x @ tensor(name).T.astype(np.float64)

    def rope(x):
        pairs = np.ascontiguousarray(x).view(np.complex128) * turns
        return pairs.view(np.float64)

    x = tensor("token_embd.weight")[ids].astype(np.float64)
    for layer in range(config.num_layers):
        at = f"blk.{layer}"
        normed = norm(x, f"{at}.attn_norm.weight")
        q, k, v = (linear(normed, f"{at}.attn_{name}.weight") for name in "qkv")
        heads = []
        for head in range(config.num_heads):
            mine, theirs = slice(head * D, (head + 1) * D), slice(head // group * D, (head // group + 1) * D)
            scores = rope(q[:, mine]) @ rope(k[:, theirs]).T / np.sqrt(D)
            scores[np.triu_indices(S, 1)] = -np.inf
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights / weights.sum(-1, keepdims=True) @ v[:, theirs])
        x = x + linear(np.concatenate(heads, -1), f"{at}.attn_output.weight")
        normed = norm(x, f"{at}.ffn_norm.weight")
        gate = linear(normed, f"{at}.ffn_gate.weight")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(normed, f"{at}.ffn_up.weight"), f"{at}.ffn_down.weight")
    head = "token_embd.weight" if config.tied_embeddings else "output.weight"
    return linear(norm(x, "output_norm.weight"), head)


def raw_tensors(path) -> Callable[[str], np.ndarray]:
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    return lambda name: gguf.quants.dequantize(tensors[name].data, tensors[name].tensor_type)


def forward(graphdef, params, ids: jax.Array, batch: Batch) -> jax.Array:
    """Logits float32[S, V] of every token of the step."""
    model = nnx.merge(graphdef, params)
    hidden, cache = model(ids, batch, None, attend=dense_attend)
    assert cache is None
    return model.logits(hidden)


def logits_of(model: Llama, ids: list[int], batch: Batch | None = None) -> np.ndarray:
    graphdef, params = nnx.split(model)
    step = jax.jit(partial(forward, graphdef))
    return np.asarray(step(params, jnp.asarray(ids, jnp.int32), batch or one_sequence(len(ids))))


@pytest.fixture(scope="module")
def smollm2() -> tuple[Llama, ModelConfig]:
    return load_model()


@pytest.fixture(scope="module", params=["tied", "untied"])
def tiny(request, tmp_path_factory):
    """Path of a two-layer model with random float32 weights, 4 heads over 2 kv heads of 6."""
    path = tmp_path_factory.mktemp("gguf") / f"{request.param}.gguf"
    layers, heads, kv_heads, head_dim, hidden, ffn, vocab = 2, 4, 2, 6, 24, 40, 50
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(100.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([str(i) for i in range(vocab)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    random = np.random.default_rng(0)
    shapes = {"token_embd": (vocab, hidden), "output_norm": (hidden,)}
    if request.param == "untied":
        shapes["output"] = (vocab, hidden)
    for layer in range(layers):
        shapes |= {
            f"blk.{layer}.attn_norm": (hidden,),
            f"blk.{layer}.attn_q": (heads * head_dim, hidden),
            f"blk.{layer}.attn_k": (kv_heads * head_dim, hidden),
            f"blk.{layer}.attn_v": (kv_heads * head_dim, hidden),
            f"blk.{layer}.attn_output": (hidden, heads * head_dim),
            f"blk.{layer}.ffn_norm": (hidden,),
            f"blk.{layer}.ffn_gate": (ffn, hidden),
            f"blk.{layer}.ffn_up": (ffn, hidden),
            f"blk.{layer}.ffn_down": (hidden, ffn),
        }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(0, 0.4, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_smollm2_agrees_with_the_oracle(smollm2):
    model, config = smollm2
    ids = load_tokenizer().encode("The year 2024: naïve 東京")
    expected = oracle_logits(raw_tensors(find_model()), config, ids)
    assert np.abs(expected).max() > 10
    np.testing.assert_allclose(logits_of(model, ids), expected, rtol=0, atol=2e-3)


def test_smollm2_knows_the_capital_of_france(smollm2):
    graphdef, params = nnx.split(smollm2[0])
    tokenizer = load_tokenizer()
    prompt = tokenizer.encode("The capital of France is")
    step = jax.jit(partial(forward, graphdef))
    ids, batch = np.zeros(16, np.int32), one_sequence(16)
    ids[: len(prompt)] = prompt
    for end in range(len(prompt), 16):  # what lies behind a token is not seen by it
        ids[end] = step(params, jnp.asarray(ids), batch)[end - 1].argmax()
    assert "Paris" in tokenizer.decode(ids[len(prompt) :].tolist())


def test_tiny_models_agree_with_the_oracle(tiny):
    model, config = load_model(tiny)
    assert config.tied_embeddings == ("untied" not in tiny.name)
    ids = np.random.default_rng(1).integers(0, config.vocab_size, 17).tolist()
    expected = oracle_logits(raw_tensors(tiny), config, ids)
    np.testing.assert_allclose(logits_of(model, ids), expected, rtol=0, atol=1e-4)


def test_sequences_end_to_end_are_each_sequence_alone(tiny):
    model, _ = load_model(tiny)
    first, second = [3, 1, 4, 1, 5], [9, 2, 6]
    together = Batch(jnp.asarray([0, 1, 2, 3, 4, 0, 1, 2], jnp.int32), jnp.asarray([0] * 5 + [1] * 3, jnp.int32))
    alone = np.concatenate([logits_of(model, first), logits_of(model, second)])
    np.testing.assert_allclose(logits_of(model, first + second, together), alone, rtol=0, atol=1e-5)


def test_positions_turn_the_rope(tiny):
    model, _ = load_model(tiny)
    ids = [3, 1, 4, 1, 5]
    shifted = one_sequence(5)._replace(positions=jnp.arange(7, 12, dtype=jnp.int32))
    stretched = one_sequence(5)._replace(positions=jnp.arange(0, 10, 2, dtype=jnp.int32))
    np.testing.assert_allclose(logits_of(model, ids, shifted), logits_of(model, ids), rtol=0, atol=1e-4)
    assert np.abs(logits_of(model, ids, stretched) - logits_of(model, ids)).max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_what_attend_is_given_and_gives(tiny, dtype):
    model, config = load_model(tiny, dtype)
    batch = one_sequence(5)
    calls = []

    def attend(cache, layer, q, k, v, seen):
        calls.append((layer, q.shape, k.shape, v.shape, {q.dtype, k.dtype, v.dtype}))
        assert seen is batch
        return jnp.zeros_like(q), [*cache, layer]

    hidden, cache = model(jnp.zeros(5, jnp.int32), batch, [], attend=attend)
    assert cache == [0, 1]
    assert calls == [(layer, (5, 4, 6), (5, 2, 6), (5, 2, 6), {jnp.dtype(dtype)}) for layer in (0, 1)]
    assert (hidden.shape, hidden.dtype) == ((5, config.hidden_size), dtype)
    for last in (hidden, hidden[-1], hidden[None]):
        logits = model.logits(last)
        assert (logits.shape, logits.dtype) == ((*last.shape[:-1], config.vocab_size), jnp.float32)


def test_bfloat16_is_near_float32(tiny):
    ids = [3, 1, 4, 1, 5]
    exact, near = (logits_of(load_model(tiny, dtype)[0], ids) for dtype in (jnp.float32, jnp.bfloat16))
    assert np.corrcoef(exact.ravel(), near.ravel())[0, 1] > 0.999


def test_strict_promotion(tiny):
    with jax.numpy_dtype_promotion("strict"):
        assert np.isfinite(logits_of(load_model(tiny)[0], [3, 1, 4])).all()


def altered(path, change: dict[str, Any]) -> Llama:
    file = read_gguf(path)
    config = read_config(file)
    weights = {k: v for k, v in (load_weights(file, config) | change).items() if v is not None}
    return build_model(config, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.attn_k.weight": None}, "the model of 2 layers lacks the weights ['blk.1.attn_k.weight']"),
        (
            {"rope_freqs.weight": np.ones(3)},
            "1 weights have no place in this decoder, the first: ['rope_freqs.weight']",
        ),
    ],
)
def test_weights_that_are_not_this_decoder_are_refused(tiny, change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        altered(tiny, change)
