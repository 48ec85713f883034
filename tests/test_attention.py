"""Paged attention, every implementation, against dense attention in float64; and the step around it."""

import functools
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import quantized

from kvbm_jax import attention, kernels, sequences
from kvbm_jax import cache as kv_cache
from kvbm_jax.errors import LayoutError
from kvbm_jax.groups import Group
from kvbm_jax.kernels.quantize import quantize
from kvbm_jax.layout import KVLayout, LayoutKind

pytestmark = pytest.mark.core

IMPLEMENTATIONS = kernels.OPERATIONS["paged_attention"].implementations
D = 16
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def dense(queries, keys, values, first, *, scale, sliding_window=None, soft_cap=None):
    """Queries [Q, Hq, D] at positions from `first` on over keys and values [K, H, D], in float64."""
    queries, keys, values = (np.asarray(x, np.float64) for x in (queries, keys, values))
    share = queries.shape[1] // keys.shape[1]
    output = np.zeros_like(queries)
    for i, query in enumerate(queries):
        position = first + i
        oldest = 0 if sliding_window is None else max(position - sliding_window + 1, 0)
        seen = slice(oldest, position + 1)
        for head, q in enumerate(query):
            scores = keys[seen, head // share] @ q * scale
            if soft_cap is not None:
                scores = soft_cap * np.tanh(scores / soft_cap)
            weights = np.exp(scores - scores.max())
            output[i, head] = weights / weights.sum() @ values[seen, head // share]
    return output


@dataclass(frozen=True)
class Case:
    """Rows of a step: (tokens in the cache, of which new)."""

    rows: tuple[tuple[int, int], ...]
    query_heads: int = 4
    heads: int = 2
    block_size: int = 16
    padding: int = 3
    max_query_len: int = 40
    dtype: str = "float32"
    quantized: str | None = None  # dtype of the cache's elements, if they have scales
    seed: int = 0


@functools.cache
def jitted(**options):
    return jax.jit(functools.partial(kernels.paged_attention, **options))


@functools.cache
def build(case):
    """Arguments of the kernel, and the contexts; what no sequence has written is NaN or Inf."""
    rng = np.random.default_rng(case.seed)
    T, H = case.block_size, case.heads
    width = max(-(-context // T) for context, _ in case.rows) + 2
    owned = [-(-context // T) for context, _ in case.rows]
    num_blocks = sum(owned) + 4
    ids = rng.permutation(num_blocks)
    array = rng.choice([np.nan, np.inf, -np.inf], (num_blocks, 2, T, H, D)).astype(np.float32)
    tables = np.empty((len(case.rows), width), np.int32)
    contexts, used = [], 0
    for b, (context, _) in enumerate(case.rows):
        # Entries that are not in use name blocks of other tenants, and blocks that do not exist.
        tables[b] = rng.integers(0, num_blocks + 1, width)
        tables[b, : owned[b]] = ids[used : used + owned[b]]
        used += owned[b]
        kv = np.asarray(jnp.asarray(rng.standard_normal((context, 2, H, D)), case.dtype).astype(jnp.float32))
        if case.quantized:
            kv = quantized.dequantize(*quantized.quantize(kv, case.quantized))
        position = np.arange(context)
        array[tables[b, position // T], :, position % T] = kv
        contexts.append(kv)
    lens = [new for _, new in case.rows]
    queries = rng.standard_normal((sum(lens) + case.padding, case.query_heads, D)).astype(np.float32)
    queries[sum(lens) :] = np.nan
    starts = np.concatenate([[0], np.cumsum(lens)]).astype(np.int32)
    context_lens = np.array([context for context, _ in case.rows], np.int32)
    args = (jnp.array(queries, case.dtype), jnp.array(array, case.dtype), tables, context_lens, starts)
    return args, contexts


def with_scales(case, args):
    """The arguments with a quantised array; what is not finite in it has a scale that is not."""
    array = args[1]
    if not case.quantized:
        return args, {}
    rows = quantize(array, case.quantized)
    return (args[0], rows.payload, *args[2:]), {"scales": rows.scales}


def check(case, implementation, **options):
    args, contexts = build(case)
    run = jitted(max_query_len=case.max_query_len, implementation=implementation, **options)
    try:
        stored, scales = with_scales(case, args)
        output = run(*stored, **scales)
    except NotImplementedError as error:
        pytest.skip(f"{implementation}: {error}")
    assert output.dtype == jnp.dtype(case.dtype)
    output = np.asarray(output, np.float64)
    queries, starts = np.asarray(args[0], np.float64), args[4]
    options = {"scale": D**-0.5} | {name: value for name, value in options.items() if value is not None}
    for b, (context, new) in enumerate(case.rows):
        mine = slice(starts[b], starts[b + 1])
        if context:
            kv = contexts[b]
            expected = dense(queries[mine], kv[:, 0], kv[:, 1], context - new, **options)
        else:
            expected = 0  # a row without a context sees nothing
        tolerance = TOLERANCE[case.dtype]
        np.testing.assert_allclose(output[mine], expected, atol=tolerance, rtol=tolerance, err_msg=f"row {b}")
    np.testing.assert_array_equal(output[starts[-1] :], 0)


def ragged(block_size):
    """Decode and prefill mixed; contexts end inside, on and one past a block, and go on for several chunks."""
    T = block_size
    return ((2 * T - 1, 1), (2 * T, 7), (2 * T + 1, 1), (0, 0), (700, 1), (256, 3), (257, 0), (33, 33), (1, 1), (0, 1))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
class TestKernel:
    @pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)], ids=str)
    @pytest.mark.parametrize("block_size", [8, 16, 64])
    def test_ragged_rows(self, implementation, heads, block_size):
        check(Case(ragged(block_size), *heads, block_size), implementation)

    @pytest.mark.parametrize(
        "options",
        [
            {"sliding_window": 1},
            {"sliding_window": 100},
            {"sliding_window": 300, "soft_cap": 2.0},
            {"soft_cap": 0.5},
            {"scale": 1.7},
        ],
        ids=str,
    )
    def test_options(self, implementation, options):
        check(Case(ragged(16)), implementation, **options)

    def test_a_window_far_from_the_start_of_every_row(self, implementation):
        check(Case(((700, 1), (690, 5)), max_query_len=5), implementation, sliding_window=30)

    def test_bfloat16(self, implementation):
        check(Case(ragged(16), dtype="bfloat16"), implementation)

    @pytest.mark.parametrize(("dtype", "elements"), [("float32", "int8"), ("bfloat16", "float8_e4m3fn")])
    def test_quantised_caches(self, implementation, dtype, elements):
        check(Case(ragged(16), dtype=dtype, quantized=elements), implementation, sliding_window=300)

    @pytest.mark.parametrize("row", [(1, 1), (16, 16), (300, 9), (300, 0)])
    def test_one_row_alone(self, implementation, row):
        check(Case((row,), padding=18 - row[1], max_query_len=18), implementation)

    def test_pure_decode(self, implementation):
        rows = tuple((context, 1) for context in (1, 15, 16, 17, 255, 256, 257, 512))
        check(Case(rows, padding=0, max_query_len=1), implementation)

    def test_what_others_hold_changes_not_a_bit(self, implementation):
        case = Case(ragged(16))
        args, _ = build(case)
        run = jitted(max_query_len=case.max_query_len, implementation=implementation)
        array = np.asarray(args[1])
        clean = run(args[0], jnp.array(np.where(np.isfinite(array), array, 0)), *args[2:])
        np.testing.assert_array_equal(run(*args), clean)


# --- mistakes


def f32(*shape):
    return jnp.zeros(shape, jnp.float32)


def i32(*shape):
    return jnp.zeros(shape, jnp.int32)


def call(queries=(5, 4, D), array=(6, 2, 8, 2, D), tables=(3, 2), context_lens=(3,), starts=(4,), longest=2, **options):
    return jax.eval_shape(
        functools.partial(kernels.paged_attention, max_query_len=longest, **options),
        f32(*queries),
        f32(*array),
        i32(*tables),
        i32(*context_lens),
        i32(*starts),
    )


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"queries": (5, 3, D)}, ("[5, 3, 16]", "[6, 2, 8, 2, 16]", "multiple")),
        ({"queries": (5, 4, 8)}, ("[5, 4, 8]", "[6, 2, 8, 2, 16]")),
        ({"array": (6, 1, 8, 2, D)}, ("[6, 1, 8, 2, 16]",)),
        ({"context_lens": (2,)}, ("3 block tables", "[3]", "[2]")),
        ({"starts": (3,)}, ("3 block tables", "[4]", "[3]")),
        ({"scales": f32(6, 2, 8, 2, D)}, ("[6, 2, 8, 2, 16]", "[6, 2, 8, 2]")),
        ({"longest": 0}, ("max_query_len is 0", "[1, 5]")),
        ({"longest": 6}, ("max_query_len is 6", "[1, 5]")),
    ],
)
def test_mistakes_of_shape_raise_at_trace_time_with_both_numbers(change, parts):
    assert call().shape == (5, 4, D)
    with pytest.raises(LayoutError) as caught:
        call(**change)
    for part in parts:
        assert part in str(caught.value)


def test_an_implementation_that_does_not_exist_is_refused_by_name():
    with pytest.raises(NotImplementedError, match=r"paged_attention has no implementation 'triton'; there is .*xla"):
        call(implementation="triton")


# --- a step of a model


G, B, W, T, N, L, HQ, H = 2, 3, 4, 8, 16, 2, 4, 2


def running(lengths, seed=0):
    """Sequences with scattered tables, of which the two groups share no block."""
    ids = np.random.default_rng(seed).permutation(N)
    tables, used = np.full((G, B, W), N, np.int32), 0
    counts = [-(-n // T) for n in lengths]
    for g in range(G):
        for b, count in enumerate(counts):
            tables[g, b, :count] = ids[used : used + count]
            used += count
    return replace(
        sequences.init(B, W, block_size=T, pool_blocks=N, groups=(Group(),) * G),
        block_tables=jnp.array(tables),
        lengths=jnp.array(lengths, jnp.int32),
        num_blocks=jnp.array(counts, jnp.int32),
    )


def poisoned(kind):
    cache = kv_cache.init(KVLayout(L, N, T, H, D, "float32", kind))
    return jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), cache)


@functools.cache
def attend(layer, group):
    return jax.jit(functools.partial(attention.attend, group=group), static_argnums=1, donate_argnums=0)


@functools.cache
def step_batch(num_tokens, max_query_len):
    return jax.jit(functools.partial(attention.step_batch, num_tokens=num_tokens, max_query_len=max_query_len))


def qkv(counts, seed=0):
    """Queries, keys and values of each sequence, [tokens, heads, D]."""
    rng = np.random.default_rng(seed)
    return [tuple(rng.standard_normal((n, heads, D)).astype(np.float32) for heads in (HQ, H, H)) for n in counts]


def ragged_arrays(data, spans, num_tokens):
    """Rows' tokens `first : first + count`, one after the other, padded with NaN."""
    out = []
    for part in range(3):
        pieces = [data[b][part][first : first + count] for b, (first, count) in enumerate(spans)]
        joined = np.concatenate(pieces)
        pad = np.full((num_tokens - len(joined), *joined.shape[1:]), np.nan, np.float32)
        out.append(jnp.array(np.concatenate([joined, pad])))
    return out


@pytest.mark.parametrize("kind", [LayoutKind.LAYER_SEPARATE, LayoutKind.LAYER_STACKED])
@pytest.mark.parametrize("group", [0, 1])
def test_prefill_in_pieces_is_prefill_at_once(kind, group):
    lengths = [13, 16, 3]
    batch, data = running(lengths), qkv(lengths)
    rows, layer, size = jnp.arange(B, dtype=jnp.int32), 1, 36

    def run(cache, spans):
        first, counts = (jnp.array(column, jnp.int32) for column in zip(*spans, strict=True))
        step = step_batch(size, 16)(batch, rows, first, counts)
        output, cache = attend(layer, group)(cache, layer, *ragged_arrays(data, spans, size), step)
        ends = np.cumsum([count for _, count in spans])
        assert not np.asarray(output[int(ends[-1]) :]).any()
        return np.split(np.asarray(output), ends)[:B], cache

    whole, cache = run(poisoned(kind), [(0, n) for n in lengths])
    for b, (q, k, v) in enumerate(data):
        np.testing.assert_allclose(whole[b], dense(q, k, v, 0, scale=D**-0.5), atol=2e-5)

    pieces, other = [[] for _ in range(B)], poisoned(kind)
    for spans in ([(0, 5), (0, 0), (0, 1)], [(5, 3), (0, 16), (1, 2)], [(8, 5), (0, 0), (3, 0)]):
        outputs, other = run(other, spans)
        for b in range(B):
            pieces[b].append(outputs[b])
    for b in range(B):
        np.testing.assert_allclose(np.concatenate(pieces[b]), whole[b], atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, other, cache)  # unwritten slots are NaN in both


@pytest.mark.parametrize("kind", [LayoutKind.LAYER_SEPARATE, LayoutKind.LAYER_STACKED])
def test_attention_in_a_quantised_cache_is_that_over_what_it_loads(kind):
    lengths = [13, 16, 3]
    batch, data = running(lengths), qkv(lengths)
    cache = kv_cache.init(KVLayout(L, N, T, H, D, "int8", kind, quantized=True))
    cache = replace(cache, scales=tuple(jnp.full_like(scales, jnp.nan) for scales in cache.scales))
    step = step_batch(36, 16)(batch, jnp.arange(B, dtype=jnp.int32), i32(B), batch.lengths)
    spans = [(0, n) for n in lengths]
    output, cache = attend(1, 0)(cache, 1, *ragged_arrays(data, spans, 36), step)
    keys, values = (np.asarray(part) for part in kv_cache.load_kv(cache, 1, step.slots[0]))
    for q, mine in zip([q for q, _, _ in data], np.split(np.arange(sum(lengths)), np.cumsum(lengths)), strict=False):
        expected = dense(q, keys[mine], values[mine], 0, scale=D**-0.5)
        np.testing.assert_allclose(np.asarray(output)[mine], expected, atol=2e-5)
        assert np.abs(keys[mine] - np.concatenate([k for _, k, _ in data])[mine]).max() < 0.02


@pytest.mark.parametrize("group", [0, 1])
def test_a_decode_batch_is_a_step_batch_of_one_token_a_row(group):
    lengths = [9, 16, 17]
    batch, data = running(lengths), qkv(lengths)
    active = jnp.array([True, False, True])
    counts = active.astype(jnp.int32)
    kind = LayoutKind.LAYER_STACKED

    def prefilled():
        step = step_batch(48, 17)(batch, jnp.arange(B, dtype=jnp.int32), i32(B), batch.lengths - 1)
        spans = [(0, n - 1) for n in lengths]
        return attend(0, group)(poisoned(kind), 0, *ragged_arrays(data, spans, 48), step)[1]

    step = step_batch(B, 1)(batch, jnp.arange(B, dtype=jnp.int32), batch.lengths - 1, counts)
    decode = attention.decode_batch(batch, active)
    for name in ("slots", "positions"):
        packed, rows = getattr(step, name)[..., :2], getattr(decode, name)[..., jnp.array([0, 2])]
        np.testing.assert_array_equal(packed, rows)
    np.testing.assert_array_equal(step.context_lens, decode.context_lens)
    np.testing.assert_array_equal(decode.slots[:, 1], N * T)
    assert decode.last_tokens.tolist() == [0, 1, 2]
    assert step.last_tokens.tolist() == [0, 0, 1]

    last = [tuple(part[-1] for part in row) for row in data]
    by_row = [jnp.array(np.stack(parts)) for parts in zip(*last, strict=True)]
    packed = ragged_arrays(data, [(n - 1, int(c)) for n, c in zip(lengths, counts, strict=True)], B)
    decoded, cache = attend(0, group)(prefilled(), 0, *by_row, decode)
    stepped, other = attend(0, group)(prefilled(), 0, *packed, step)
    np.testing.assert_allclose(decoded[jnp.array([0, 2])], stepped[:2], atol=1e-6)
    assert not np.asarray(decoded[1]).any()
    jax.tree.map(np.testing.assert_array_equal, cache, other)
    for b in (0, 2):
        q, k, v = data[b]
        expected = dense(q[-1:], k, v, lengths[b] - 1, scale=D**-0.5)[0]
        np.testing.assert_allclose(decoded[b], expected, atol=2e-5)


def test_step_batch_lays_rows_one_after_the_other():
    batch = running([13, 16, 3])
    step = step_batch(8, 4)(
        batch, jnp.array([2, 0, B], jnp.int32), jnp.array([1, 9, 0], jnp.int32), jnp.array([2, 4, 0], jnp.int32)
    )
    assert step.query_starts.tolist() == [0, 2, 6, 6]
    assert step.positions.tolist() == [1, 2, 9, 10, 11, 12, 0, 0]
    assert step.context_lens.tolist() == [3, 13, 0]
    tables = np.asarray(batch.block_tables)
    for g in range(G):
        a, b = tables[g, 2, 0] * T, tables[g, 0, 1] * T
        assert step.slots[g].tolist() == [a + 1, a + 2, b + 1, b + 2, b + 3, b + 4, N * T, N * T]
    np.testing.assert_array_equal(step.block_tables[:, :2], tables[:, [2, 0]])


def test_layers_may_be_traced_in_a_scan():
    lengths = [9, 2, 1]
    batch, data = running(lengths), qkv(lengths)
    step = step_batch(16, 9)(batch, jnp.arange(B, dtype=jnp.int32), i32(B), batch.lengths)
    arrays = ragged_arrays(data, [(0, n) for n in lengths], 16)

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(cache):
        def body(cache, layer):
            output, cache = attention.attend(cache, layer, *arrays, step)
            return cache, output

        return jax.lax.scan(body, cache, jnp.arange(L, dtype=jnp.int32))

    scanned, outputs = scan(poisoned(LayoutKind.LAYER_STACKED))
    cache = poisoned(LayoutKind.LAYER_STACKED)
    for layer in range(L):
        output, cache = attend(layer, 0)(cache, layer, *arrays, step)
        np.testing.assert_allclose(outputs[layer], output, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, scanned, cache)
