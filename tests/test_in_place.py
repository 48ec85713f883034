"""Updates happen in place and cost no more for a larger pool: read off the compiled programs.

A verb that is compiled with its state donated copies no array of the pool's size, needs temporaries smaller than any
one of them, and gives back the buffers that it was given. Its jaxpr has no `while`, no `cond` and no callback.
"""

import functools
import math
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from kvbm_jax import attention, grants, invariants, policies, pool, quotas, sequences, step
from kvbm_jax import cache as kv_cache
from kvbm_jax.groups import Group
from kvbm_jax.layout import KVLayout, LayoutKind

pytestmark = pytest.mark.core

N = 50_000
ROWS, WIDTH = 4, 8
B, W, T, G = 16, 8, 16, 2

_BIG = re.compile(r"= \(?(\w+)\[([\d,]+)\]\S* (copy|copy-start|convert|transpose|broadcast|concatenate|pad)\(")


def big_copies(text, elements):
    """Instructions of a compiled program that make a new array of at least so many elements out of another."""
    found = []
    for line in text.splitlines():
        match = _BIG.search(line)
        if match and math.prod(map(int, match[2].split(","))) >= elements:
            found.append(line.strip()[:160])
    return found


def primitives(jaxpr):
    """Names of all primitives in a jaxpr and the jaxprs within it."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from primitives(inner)


def pointers(tree, elements):
    return {
        jax.tree_util.keystr(path): leaf.unsafe_buffer_pointer()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if leaf.size >= elements
    }


def check(verb, donated, *args, elements=N, temporaries=4 * N):
    """Compiles, inspects and runs `verb(donated, *args)`, which returns what it was given first.

    `temporaries` is by default less than the smallest array of the pool.
    """
    compiled = jax.jit(verb, donate_argnums=0).lower(donated, *args).compile()
    assert big_copies(compiled.as_text(), elements) == []
    assert compiled.memory_analysis().temp_size_in_bytes < temporaries
    before = pointers(donated, elements)
    assert before
    # A program may swap nothing: each buffer stays where it was.
    assert pointers(compiled(donated, *args)[0], elements) == before


def ids(shape=(ROWS, WIDTH)):
    return jnp.arange(math.prod(shape), dtype=jnp.int32).reshape(shape)


def hashes(shape=(ROWS, WIDTH)):
    return jnp.arange(math.prod(shape) * 4, dtype=jnp.uint32).reshape(*shape, 4)


def counts(*values):
    return jnp.array(values or [3] * ROWS, jnp.int32)


POOL = {
    "acquire": (pool.acquire, ids()),
    "allocate": (functools.partial(pool.allocate, max_blocks=WIDTH), counts()),
    "register": (pool.register, ids(), hashes()),
    "release": (pool.release, ids()),
    "evict": (functools.partial(pool.evict, max_count=64), jnp.int32(7)),
}
WHOLE = {  # work in proportion to the pool, by their docstrings
    "clear": (pool.clear,),
    "compact": (pool.compact,),
    "rehash": (pool.rehash, jnp.uint32(5)),
}
READS = {
    "match": (pool.match, hashes(), counts()),
    "check_generations": (pool.check_generations, ids((9,)), jnp.zeros((9,), jnp.uint32)),
    "release_room": (pool.release_room,),
    "stats": (pool.stats,),
}


@functools.cache
def used_pool():
    """A pool with reset, held and inactive blocks; never donated itself."""

    @jax.jit
    def use():
        state, grant = pool.allocate(pool.init(N), counts(8, 8, 8, 8), max_blocks=WIDTH)
        state, _ = pool.register(state, grant.block_ids, hashes())
        return pool.release(state, grant.block_ids[:2])[0]

    return use()


def fresh(tree):
    return jax.tree.map(jnp.copy, tree)


@pytest.mark.parametrize("name", POOL)
def test_verbs_of_the_pool_work_in_place(name):
    verb, *args = POOL[name]
    check(verb, fresh(used_pool()), *args)


@pytest.mark.parametrize("name", policies.NAMES)
def test_pool_and_memory_of_a_policy_stay_where_they_are(name):
    policy = policies.named(name)

    def verb(carry):
        state, memory = carry
        state, evicted = pool.evict(state, jnp.int32(7), max_count=64, scores=policies.bind(policy, memory))
        blocks = ids().reshape(-1)
        told = policies.Registered(blocks, blocks, blocks, blocks.astype(jnp.uint32))
        return (state, policy.hit(policy.registered(memory, state, told), state, blocks)), evicted

    carry = (fresh(used_pool()), policy.init(N))
    compiled = jax.jit(verb, donate_argnums=0).lower(carry).compile()
    copies = [line for line in big_copies(compiled.as_text(), N) if " copy(%carry" in line]
    assert copies == []
    before = pointers(carry, N)
    assert pointers(compiled(carry)[0], N) == before


@pytest.mark.long
def test_a_pool_under_quotas_stays_where_it_is():
    def verb(carry):
        charged, state, running = carry
        rows = counts(0, 1)
        asked = (hashes((2, WIDTH)), counts(3, 3), counts(20, 20))
        charged, state, running, result = quotas.start(charged, state, running, rows, rows, *asked)
        return (charged, state, running), result

    running = sequences.init(B, W, block_size=T, pool_blocks=N)
    carry = (quotas.init([N, N], num_blocks=N, max_sequences=B), fresh(used_pool()), running)
    compiled = jax.jit(verb, donate_argnums=0).lower(carry).compile()
    assert [line for line in big_copies(compiled.as_text(), N) if " copy(%carry" in line] == []
    before = pointers(carry[1], N)
    assert pointers(compiled(carry)[0][1], N) == before


@pytest.mark.parametrize("name", READS)
def test_what_only_reads_the_pool_copies_nothing(name):
    verb, *args = READS[name]
    compiled = jax.jit(verb).lower(used_pool(), *args).compile()
    assert big_copies(compiled.as_text(), N) == []
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * N


@pytest.mark.parametrize("name", ["allocate", "release"])
def test_temporaries_do_not_grow_with_the_pool(name):
    verb, *args = POOL[name]
    sizes = []
    for num_blocks in (20_000, 80_000):
        state = jax.eval_shape(functools.partial(pool.init, num_blocks))
        analysis = jax.jit(verb, donate_argnums=0).lower(state, *args).compile().memory_analysis()
        sizes.append(analysis.temp_size_in_bytes)
    groups = (262_144 - 65_536) // 1024  # of the queue: the one part of a pop that grows, by N / 512 integers
    assert sizes[1] - sizes[0] <= (16 * 4 * groups if name == "allocate" else 256)


def turn(state, wanted, tokens):
    state, grant = pool.allocate(state, wanted, max_blocks=WIDTH)
    state, registered = pool.register(state, grant.block_ids, tokens)
    state, status = pool.release(state, registered.block_ids)
    return state, status


def test_a_scan_of_allocate_register_and_release_works_in_place():
    wanted, tokens = jnp.stack([counts()] * 5), hashes((5, ROWS, WIDTH)).reshape(5, ROWS, WIDTH, 4)
    check(lambda state, *xs: jax.lax.scan(lambda s, x: turn(s, *x), state, xs), fresh(used_pool()), wanted, tokens)


# --- sequences and grants


@functools.cache
def running():
    state = used_pool()
    batch = sequences.init(B, W, block_size=T, pool_blocks=N, groups=(Group(),) * G)
    return state, batch


ROW_IDS = jnp.arange(ROWS, dtype=jnp.int32)


@functools.cache
def hybrid():
    state, batch = running()
    return state, replace(batch, groups=(Group(), Group(window=40)))


def slide(both, computed):
    state, batch, status = sequences.slide(*both, computed, max_blocks=2)
    return (state, batch), status


def start(both, *args):
    state, batch, result = sequences.start(*both, *args)
    return (state, batch), result


def extend(both, tokens):
    state, batch, result = sequences.extend(*both, tokens)
    return (state, batch), result


def register(both, *args):
    state, batch, result = sequences.register(*both, *args)
    return (state, batch), result


def release(both, rows):
    state, batch, result = sequences.release(*both, rows)
    return (state, batch), result


def reserve(both, count):
    state, result = grants.reserve(both[0], count, max_blocks=32)
    return (state, both[1]), result


def commit(both, grant, *args):
    state, batch, result = grants.commit(*both, grant, *args)
    return (state, batch), result


def give_back(both, grant):
    return (grants.give_back(both[0], grant), both[1]), ()


def a_step(both, plan):
    state, batch, result = step.step(*both, plan)
    return (state, batch), result


def a_plan():
    named = hashes()
    return step.StepPlan(
        ending=ROW_IDS + 4,
        starting=ROW_IDS,
        hashes=named,
        num_hashes=counts(),
        num_tokens=counts(100, 100, 100, 0),
        growing=ROW_IDS + 8,
        new_tokens=counts(),
        complete_rows=ROW_IDS + 8,
        complete_places=counts(0, 0, 0, 0),
        complete_hashes=named[0, :ROWS],
    )


def steps(both, plans):
    return jax.lax.scan(a_step, both, plans)


def a_grant():
    return grants.Grant(ids((32,)), jnp.int32(2), jnp.int32(9), jnp.int32(0))


SEQUENCES = {
    "start": (start, ROW_IDS, hashes(), counts(), counts(100, 100, 100, 0)),
    "extend": (extend, jnp.full((B,), 3, jnp.int32)),
    "register": (register, ROW_IDS, hashes(), counts(0, 0, 0, 0), counts()),
    "release": (release, ROW_IDS),
    "reserve": (reserve, jnp.int32(20)),
    "commit": (commit, a_grant(), ROW_IDS, hashes(), counts(0, 0, 0, 0), counts()),
    "give_back": (give_back, a_grant()),
    "step": (a_step, a_plan()),
    "scan of steps": (steps, jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), a_plan())),
}


HYBRID = {
    "slide": (slide, jnp.full((B,), 100, jnp.int32)),
    "start": SEQUENCES["start"],
    "release": SEQUENCES["release"],
    "step": (a_step, a_plan()._replace(num_computed=jnp.full((B,), 100, jnp.int32))),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_and_grants_work_in_place(name):
    verb, *args = SEQUENCES[name]
    check(verb, fresh(running()), *args)


@pytest.mark.parametrize("name", HYBRID)
def test_sequences_with_windows_work_in_place(name):
    verb, *args = HYBRID[name]
    check(verb, fresh(hybrid()), *args)


# --- no data-dependent control flow


def grant_loop(batch, grant, tokens):
    def body(carry, tokens):
        batch, grant, status = grants.extend(*carry, tokens)
        return (batch, grant), status

    return jax.lax.scan(body, (batch, grant), tokens)


STATELESS = {
    "invariants.check": lambda: (invariants.check, used_pool()),
    "grants.extend": lambda: (grant_loop, running()[1], a_grant(), jnp.ones((4, B), jnp.int32)),
    "slots": lambda: (sequences.slots, running()[1], ROW_IDS, ROW_IDS),
    "step_batch": lambda: (
        functools.partial(attention.step_batch, num_tokens=16, max_query_len=8),
        running()[1],
        ROW_IDS,
        counts(),
        counts(),
    ),
    "decode_batch": lambda: (attention.decode_batch, running()[1], jnp.ones((B,), bool)),
}
TRACED = {
    **{name: (lambda call=call: (call[0], used_pool(), *call[1:])) for name, call in (POOL | WHOLE | READS).items()},
    **{f"sequences {name}": (lambda call=call: (call[0], running(), *call[1:])) for name, call in SEQUENCES.items()},
    **{f"windows {name}": (lambda call=call: (call[0], hybrid(), *call[1:])) for name, call in HYBRID.items()},
    **STATELESS,
}


@pytest.mark.parametrize("name", TRACED)
def test_no_verb_has_data_dependent_control_flow_or_a_callback(name):
    verb, *args = TRACED[name]()
    names = set(primitives(jax.make_jaxpr(verb)(*args).jaxpr))
    assert names
    assert not {p for p in names if p in ("while", "cond") or "callback" in p or "infeed" in p or "outfeed" in p}


def test_the_walk_finds_what_is_hidden():
    def hidden(x):
        def body(_, y):
            return jax.lax.cond(
                y > 0, lambda z: jax.lax.while_loop(lambda v: v < 9, lambda v: v + 1, z), lambda z: z, y
            )

        return jax.jit(lambda y: jax.lax.fori_loop(0, 3, body, y))(x)

    assert {"scan", "cond", "while"} <= set(primitives(jax.make_jaxpr(hidden)(1).jaxpr))


def test_a_copy_is_found():
    x, i = jnp.zeros((N,)), jnp.int32(3)

    def write(x, i):
        return x.at[i].set(0)

    assert big_copies(jax.jit(write).lower(x, i).compile().as_text(), N)  # what is not donated is copied
    assert not big_copies(jax.jit(write, donate_argnums=0).lower(x, i).compile().as_text(), N)


# --- the cache


LAYERS, BLOCKS, HEADS, DIM, S = 2, 1024, 2, 16, 16
LAYER = BLOCKS * 2 * T * HEADS * DIM  # elements of one layer
KINDS = [LayoutKind.LAYER_SEPARATE, LayoutKind.LAYER_STACKED]
SCALES = {"elements": LAYER // DIM // 2, "temporaries": LAYER // 4}  # less than the scales of a layer, in elements


def data(*shape):
    return jnp.ones(shape, jnp.float32)


def cache_calls():
    kv = (data(S, HEADS, DIM), data(S, HEADS, DIM))
    batch = sequences.init(B, W, block_size=T, pool_blocks=BLOCKS)
    decode = attention.decode_batch(batch, jnp.ones((B,), bool))
    blocks = data(8, LAYERS, 2, T, HEADS, DIM)
    packed = jnp.ones((8, a_cache(KINDS[0], "int8", quantized=True).layout.block_bytes), jnp.uint8)

    def scatter(cache, at):
        return (kv_cache.scatter_blocks(cache, at, packed if cache.layout.quantized else blocks),)

    def attend(cache, batch):
        output, cache = attention.attend(cache, 1, data(B, 2 * HEADS, DIM), *kv, batch)
        return cache, output

    return {
        "store_kv": (lambda cache, slots: (kv_cache.store_kv(cache, 1, *kv, slots),), ids((S,))),
        "scatter_blocks": (scatter, ids((8,))),
        "copy_blocks": (lambda cache, at: (kv_cache.copy_blocks(cache, at, at + 4),), ids((8,))),
        "attend": (attend, decode),
    }


def a_cache(kind, dtype="float32", **options):
    return kv_cache.init(KVLayout(LAYERS, BLOCKS, T, HEADS, DIM, dtype, kind, **options))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", cache_calls())
def test_a_quantised_cache_is_updated_in_place_with_its_scales(name, kind):
    verb, *args = cache_calls()[name]
    # Attention has chunks of as many elements as there are scales; its cache is looked at as the plain ones are.
    limits = {"elements": LAYER // 2, "temporaries": LAYER} if name == "attend" else SCALES
    check(verb, a_cache(kind, "int8", quantized=True), *args, **limits)


def test_quantised_blocks_are_gathered_into_a_donated_array():
    cache = a_cache(KINDS[0], "int8", quantized=True)
    out = jnp.zeros((256, cache.layout.block_bytes), jnp.uint8)

    def gather(out, cache, at):
        return (kv_cache.gather_blocks(cache, at, out=out),)

    check(gather, out, cache, ids((256,)), elements=out.size // 2, temporaries=out.size)


@pytest.mark.parametrize(("kind", "dtype"), [(KINDS[0], "float32"), (KINDS[1], "float32"), (KINDS[1], "bfloat16")])
@pytest.mark.parametrize("name", cache_calls())
def test_the_cache_is_updated_in_place(name, kind, dtype):
    verb, *args = cache_calls()[name]
    check(verb, a_cache(kind, dtype), *args, elements=LAYER // 2, temporaries=LAYER)  # a quarter of a layer's bytes


def test_layers_in_a_scan_are_updated_in_place():
    attend = cache_calls()["attend"]

    def run(cache, batch):
        def body(cache, layer):
            output, cache = attention.attend(
                cache, layer, data(B, HEADS, DIM), data(B, HEADS, DIM), data(B, HEADS, DIM), batch
            )
            return cache, output

        return jax.lax.scan(body, cache, jnp.arange(LAYERS, dtype=jnp.int32))

    check(run, a_cache(LayoutKind.LAYER_STACKED), attend[1], elements=LAYER // 2, temporaries=LAYER)
