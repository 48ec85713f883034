"""Greedy, temperature and nucleus sampling: against a float64 sort, by counting, and by key."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from smollm2 import Sampler, nucleus, sample

from kvbm_jax.errors import ConfigError

SIZE = 37
LOGITS = jnp.asarray(np.random.default_rng(0).normal(0, 3, (4, SIZE)), jnp.float32)

jitted_nucleus = jax.jit(nucleus)


def kept(logits, top_p) -> np.ndarray:
    logits = jnp.asarray(logits, jnp.float32)
    return np.asarray(jitted_nucleus(logits, jnp.full((logits.shape[0], 1), top_p, jnp.float32)))


@given(
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 0.1, 1.0, 10.0, 100.0]),
    levels=st.sampled_from([2, 10, 2**16]),
    top_p=st.floats(0.015625, 1.0, width=32),
)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(seed, spread, levels, top_p):
    # Few levels make many equal logits, whose order at the edge is by token id.
    steps = np.random.default_rng(seed).integers(0, levels, (1, SIZE))
    logits = (steps / levels * spread).astype(np.float32)
    mask = kept(logits, top_p)[0]
    weights = np.exp(logits[0].astype(np.float64) - logits.max())
    probabilities = weights / weights.sum()
    order = np.argsort(-probabilities, kind="stable")
    count = mask.sum()
    assert count >= 1
    if top_p < 1.0:
        assert set(np.flatnonzero(mask)) == set(order[:count])
        assert probabilities[mask].sum() >= top_p - 1e-5
        assert probabilities[order[: count - 1]].sum() < top_p + 1e-5
    else:
        assert mask.all()


def test_equal_tokens_are_kept_from_the_first():
    assert np.flatnonzero(kept(np.zeros((1, 8)), 0.5)).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("top_p", [0.0, 1e-6, 0.1])
def test_at_least_one_token_is_kept(top_p):
    mask = kept(LOGITS, top_p)
    assert mask.sum(-1).tolist() == [1] * 4
    assert mask.argmax(-1).tolist() == LOGITS.argmax(-1).tolist()


def test_top_p_one_keeps_all_tokens_of_a_large_vocabulary():
    assert kept(np.random.default_rng(0).normal(0, 3, (1, 49152)), 1.0).all()


def test_greedy_takes_the_first_of_the_largest():
    logits = jnp.asarray([[1.0, 5.0, 5.0, 2.0], [7.0, 7.0, 7.0, 7.0], [-3.0, -2.0, -1.0, -1.0]], jnp.float32)
    key = jax.random.key(0)
    for chosen in (Sampler()(logits, key), sample(logits, key, 0.0, 1.0), sample(logits, key, 0.0, 0.5)):
        assert chosen.dtype == jnp.int32
        assert chosen.tolist() == [1, 0, 2]


def test_greedy_traces_nothing_but_an_argmax():
    jaxpr = jax.make_jaxpr(Sampler())(LOGITS, jax.random.key(0))
    assert [str(equation.primitive) for equation in jaxpr.eqns] == ["argmax"]


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.8), (2.0, 0.5)])
def test_frequencies_are_the_probabilities_of_the_nucleus(temperature, top_p):
    draws = 20_000
    logits = jnp.broadcast_to(LOGITS[:1], (draws, SIZE))
    chosen = np.asarray(jax.jit(Sampler(temperature, top_p))(logits, jax.random.key(1)))
    counts = np.bincount(chosen, minlength=SIZE)
    mask = kept(LOGITS[:1] / temperature, top_p)[0]
    weights = np.where(mask, np.exp(np.asarray(LOGITS[0], np.float64) / temperature), 0.0)
    expected = draws * weights / weights.sum()
    assert counts[~mask].sum() == 0
    assert (np.abs(counts - expected) <= 5 * np.sqrt(expected) + 1).all()


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.8, 1.0), (0.8, 0.9)])
def test_static_and_traced_settings_choose_alike(temperature, top_p):
    static, traced = jax.jit(Sampler(temperature, top_p)), jax.jit(sample)
    for seed in range(20):
        key = jax.random.key(seed)
        expected = traced(LOGITS, key, jnp.float32(temperature), jnp.float32(top_p))
        assert static(LOGITS, key).tolist() == expected.tolist()


def test_each_row_has_its_own_settings():
    logits = jnp.tile(LOGITS[:1], (300, 1))
    greedy_rows = jnp.arange(300) % 3 == 0
    narrow_rows = jnp.arange(300) % 3 == 1
    temperature = jnp.where(greedy_rows, 0.0, 3.0)
    top_p = jnp.where(narrow_rows, 1e-6, 1.0)
    chosen = np.asarray(sample(logits, jax.random.key(0), temperature, top_p))
    best = int(LOGITS[0].argmax())
    assert set(chosen[greedy_rows | narrow_rows]) == {best}
    assert len(set(chosen[~(greedy_rows | narrow_rows)])) > 5


def test_the_key_decides():
    sampler = jax.jit(Sampler(1.0, 0.95))
    logits = jnp.zeros((1, 1000), jnp.float32)
    drawn = [sampler(logits, jax.random.key(seed)).item() for seed in range(8)]
    assert drawn == [sampler(logits, jax.random.key(seed)).item() for seed in range(8)]
    assert len(set(drawn)) > 1


def test_rows_draw_independently():
    chosen = Sampler(1.0)(jnp.zeros((8, 1000), jnp.float32), jax.random.key(0))
    assert len(set(chosen.tolist())) > 1


@pytest.mark.parametrize("choose", [Sampler(0.9, 0.9), partial(sample, temperature=0.9, top_p=0.9)])
def test_usable_in_scan(choose):
    keys = jax.random.split(jax.random.key(0), 5)
    _, scanned = jax.lax.scan(lambda carry, key: (carry, choose(LOGITS, key)), None, keys)
    assert scanned.tolist() == [choose(LOGITS, key).tolist() for key in keys]


def test_strict_promotion():
    with jax.numpy_dtype_promotion("strict"):
        assert Sampler(0.9, 0.9)(LOGITS, jax.random.key(0)).shape == (4,)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, allowed are 0 for greedy and finite numbers from 0.001"),
        ({"temperature": 1e-38}, "temperature is 1e-38, allowed are"),
        ({"temperature": float("nan")}, "temperature is nan, allowed are"),
        ({"temperature": float("inf")}, "temperature is inf, allowed are"),
        ({"top_p": 0.0}, "top_p is 0.0, allowed are numbers in (0, 1]"),
        ({"top_p": 1.5}, "top_p is 1.5, allowed are"),
        ({"top_p": float("nan")}, "top_p is nan, allowed are"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Sampler(**settings)
