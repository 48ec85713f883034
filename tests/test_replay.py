"""Replays against the oracle, on synthetic traces and on the conversation trace."""

import gzip
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from oracle import OraclePool
from policy_oracles import LineageOracle, LruOracle, PriorityOracle, ScoredOracle, TinyLfuOracle
from shelves import Shelves
from synthetic import conversations, write

from kvbm_jax import policies, traces
from kvbm_jax.errors import ConfigError, TraceError
from kvbm_jax.replay import compare, replay, replay_requests
from kvbm_jax.types import Status

TRACES = Path(os.environ.get("KVBM_TRACES") or Path(__file__).parents[1] / ".." / "shared" / "traces")
CONVERSATION = TRACES / "mooncake_conversation.jsonl"


SCORED = policies.scored(lambda block: block.uses / (1 + block.age))
TWINS = {
    "lru": lambda n: LruOracle(),
    "lineage": lambda n: LineageOracle(),
    "priority": PriorityOracle,
    "tiny_lfu": TinyLfuOracle,
    "scored": lambda n: ScoredOracle(n, lambda uses, age, depth, priority: uses / (1 + age)),
}


def policy_of(name):
    return SCORED if name == "scored" else policies.named(name)


def as_arrays(requests):
    return [np.array(ids, np.uint64) for ids in requests]


def expected(requests, num_blocks, policy="lru", below=None):
    """Hits, evictions and rejected requests, by the rule in the traces' README; plays what lies `below`, if anything.

    That counts its own hits, by tier.
    """
    twin = TWINS[policy](num_blocks)
    pool = OraclePool(num_blocks, twin)
    hits = evictions = rejected = 0
    for ids in requests:
        keys = [(i % 2**32, i >> 32) if isinstance(i, int) else i for i in ids]  # its words, as the replay's hashes
        held = pool.match(keys)
        pool.acquire([held])
        hits += len(held)
        granted, (status,), evicted = pool.allocate([len(ids) - len(held)])
        evictions += len(evicted)
        if below is not None:
            below.hits.update(below.find(keys[len(held) :]))
            for _, key in evicted:
                below.offer(key)
        twin.hit(pool, held)
        told = []
        if status == Status.OK:
            named = list(zip(granted[0], keys[len(held) :], strict=True))
            entries = pool.register([named])[0]
            first, held = len(held), held + [block for block, _, _ in entries]
            for place, (block, new, _) in enumerate(entries, start=first):
                if new:
                    told.append((block, held[place - 1] if place else None, place, 2**32 - 1 - place))
        else:
            rejected += 1
        twin.registered(pool, told)
        pool.release([held])
    return hits, evictions, rejected


def check(requests, num_blocks, policy="lru"):
    result = replay_requests(as_arrays(requests), num_blocks, policy=policy_of(policy))
    assert (result.hits["g1"], result.evictions, result.rejected) == expected(requests, num_blocks, policy)
    assert (result.requests, result.block_refs) == (len(requests), sum(map(len, requests)))
    assert result.hit_rate == pytest.approx(result.hits["g1"] / max(result.block_refs, 1))
    return result


@pytest.mark.core
@pytest.mark.parametrize(("seed", "num_blocks"), [(0, 60), (1, 60), (2, 9), (3, 1000)])
def test_synthetic_conversations(seed, num_blocks):
    requests = conversations(seed, requests=300, longest=28)
    result = check(requests, num_blocks)
    assert result.hits["g1"] > 0
    assert (result.evictions > 0) == (num_blocks < 1000)
    assert (result.rejected > 0) == (num_blocks == 9)


@pytest.mark.core
@pytest.mark.parametrize("policy", [name for name in TWINS if name != "lru"])
def test_synthetic_conversations_by_every_policy(policy):
    result = check(conversations(0, requests=300, longest=26), 60, policy)
    assert result.evictions > 0


@pytest.mark.core
@pytest.mark.parametrize("policy", TWINS)
def test_tiers_below_a_device_of_every_policy(policy):
    requests = conversations(0, requests=300, longest=26)  # compiled above but for what tiers ask of the loop
    below = Shelves({"g2": 40, "g3": 500})
    below.hits = Counter()
    hits, evictions, rejected = expected(requests, 60, policy, below)
    result = replay_requests(as_arrays(requests), 60, host_blocks=40, disk_blocks=500, policy=policy_of(policy))
    assert (result.evictions, result.rejected) == (evictions, rejected)
    assert result.hits == {"g1": hits, **below.hits}
    assert min(result.hits.values()) > 0


@pytest.mark.core
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("policy", TWINS)
def test_blocks_of_16_tokens(policy):
    """Conversations of 512-token blocks, cut into 16-token ones; the last block of a prompt has some of them."""
    rng = np.random.default_rng(8)
    coarse = conversations(8, requests=400, users=12, id_bits=32)
    requests = [[32 * i + part for i in ids for part in range(32)] for ids in coarse]
    requests = [ids[: len(ids) - int(rng.integers(0, 32))] for ids in requests]
    result = check(requests, 4_000, policy)
    assert result.hits["g1"] > 30_000
    assert result.evictions > 10_000


@pytest.mark.core
@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("policy", TWINS)
def test_twenty_synthetic_traces(policy):
    for seed in range(20):
        check(conversations(seed, requests=300, longest=26), (40, 60, 90, 140)[seed % 4], policy)


@pytest.mark.core
@pytest.mark.long
def test_a_comparison_is_of_single_replays(tmp_path):
    requests = conversations(6, requests=100, longest=26, id_bits=32)
    files = [write(tmp_path / "a.jsonl", requests[:60]), write(tmp_path / "b.jsonl", requests[60:])]
    told = []
    options = {"host_blocks": 20, "limit": 90, "shared_ids": True}
    rows = compare(files, [9, 60], ["lru", "priority"], progress=lambda *done: told.append(done), **options)
    assert [(row.policy, row.num_blocks) for row in rows] == [
        ("lru", 9), ("lru", 60), ("priority", 9), ("priority", 60)
    ]  # fmt: skip
    for row in rows:
        single = replay(files, row.num_blocks, policy=row.policy, **options)
        for part in ("requests", "block_refs", "hits", "hit_rate", "evictions", "rejected"):
            assert getattr(row.result, part) == getattr(single, part)
    assert told[-1] == (360, 360)
    assert told == sorted(told)
    with pytest.raises(ConfigError, match="'fifo' is no eviction policy; choose from lru, lineage"):
        compare(files, [9], ["lru", "fifo"])


@pytest.mark.core
def test_requests_of_every_width_and_one_larger_than_the_pool():
    rng = np.random.default_rng(4)
    long = [rng.integers(0, 2**63, n).tolist() for n in (31, 32, 33, 256, 257, 300, 1500)]
    requests = []
    for _ in range(3):
        for ids in (long[i] for i in rng.permutation(len(long))):
            requests += [ids, [], ids[:20], [*ids[: len(ids) // 2], 7, 8, 9]]
    result = check(requests, 1000)
    assert result.rejected >= 3
    assert result.hits["g1"] > 1000


@pytest.mark.core
def test_ids_that_repeat_within_a_request():
    check([[1, 2, 1, 3], [1, 2, 1, 3], [5, 5, 5], [5, 5]], 60)


@pytest.mark.core
def test_ids_use_all_64_bits():
    top = 2**64 - 1
    low, high = 7, 7 + 2**32  # equal in their lower half
    check([[top, low], [top, high], [0], [top, low], [low, top]], 60)


@pytest.mark.long
@pytest.mark.core
def test_hits_without_evictions_fill_the_queue_with_holes_over_and_over():
    # 900 blocks stay at the head of the queue while 30 others are hit again and again; nothing ever moves the head.
    requests = [list(range(900)), *[list(range(1000, 1030))] * 400]
    result = check(requests, 1000)
    assert result.hits["g1"] == 399 * 30


@pytest.mark.core
def test_nothing_to_replay():
    result = replay_requests([], 4)
    assert (result.requests, result.block_refs, result.hit_rate, result.us_per_request) == (0, 0, 0.0, 0.0)


@pytest.mark.core
@pytest.mark.parametrize("num_blocks", [0, -3])
def test_a_pool_has_blocks(num_blocks):
    with pytest.raises(ConfigError, match=f"num_blocks is {num_blocks}"):
        replay_requests([], num_blocks)


@pytest.mark.core
def test_files_are_one_stream_and_the_limit_counts_over_all(tmp_path):
    requests = conversations(5, requests=50, longest=28, id_bits=32)
    files = [write(tmp_path / "a.jsonl", requests[:30]), write(tmp_path / "b.jsonl", requests[30:])]
    for limit in (None, 10, 30, 31, 99):
        part = requests[:limit]
        result = replay(files, 60, limit=limit, shared_ids=True)
        assert result.requests == len(part)
        assert (result.hits["g1"], result.evictions, result.rejected) == expected(part, 60)
        apart = [[(n < 30, i) for i in ids] for n, ids in enumerate(part)]
        result = replay(files, 60, limit=limit)
        assert (result.hits["g1"], result.evictions, result.rejected) == expected(apart, 60)
    with pytest.raises(ConfigError, match="limit is 0"):
        replay(files, 60, limit=0)


@pytest.mark.core
def test_ids_of_different_files_do_not_meet_in_lower_tiers_either(tmp_path):
    ids = list(range(8))
    files = [write(tmp_path / name, [ids]) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    files.append(files[0])
    apart = replay(files, 8, host_blocks=8, disk_blocks=30)
    assert apart.hits == {"g1": 0, "g2": 0, "g3": 0}
    together = replay(files, 8, host_blocks=8, disk_blocks=30, shared_ids=True)
    assert together.hits == {"g1": 24, "g2": 0, "g3": 0}
    again = replay([files[0], files[1]], 8, host_blocks=8)
    assert again.evictions == 8


@pytest.mark.core
def test_a_gzipped_trace_is_read_whatever_its_name(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(gzip.compress(b'{"hash_ids": [1, 2]}\n{"hash_ids": [3]}\n'))
    assert [ids.tolist() for ids in traces.read(path)] == [[1, 2], [3]]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(TraceError, match=r"cannot read the trace .*trace\.jsonl"):
        list(traces.read(path))


@pytest.mark.core
def test_progress_is_told():
    told = []
    replay_requests(as_arrays([[1, 2]] * 600), 8, progress=lambda done, total: told.append((done, total)))
    assert told == [(256, 600), (512, 600), (600, 600)]


@pytest.mark.core
def test_a_trace_is_read_line_by_line(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"hash_ids": [1, 18446744073709551615], "timestamp": 1.5, "unknown": {}}\n\n  \n{"hash_ids": []}')
    found = list(traces.read(path))
    assert [ids.tolist() for ids in found] == [[1, 2**64 - 1], []]
    assert {ids.dtype for ids in found} == {np.dtype(np.uint64)}
    assert len(list(traces.read(path, limit=1))) == 1


@pytest.mark.core
@pytest.mark.parametrize(
    ("line", "part"),
    [
        (b"{}", "hash_ids"),
        (b"[1, 2]", "is not a request"),
        (b'{"hash_ids": [1', "is not a request"),
        (b'{"hash_ids": [1.5]}', "is not a request"),
        (b'{"hash_ids": "12"}', "is not a request"),
        (b'{"hash_ids": [3, -1]}', "hash id -1 is out of range"),
        (b'{"hash_ids": [18446744073709551616]}', "18446744073709551616"),
        (b'{"hash_ids": [1], "timestamp": "\xff"}', "line 3"),
        (b'{"hash_ids": [1], "more": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "is not a request"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line, part):
    path = tmp_path / "broken.jsonl"
    path.write_bytes(b'{"hash_ids": [1]}\n\n' + line + b"\n")
    with pytest.raises(TraceError) as caught:
        replay([path], 9)
    for word in (part, "broken.jsonl", "line 3"):
        assert word in str(caught.value)
    assert replay([path], 9, limit=1).requests == 1  # what comes after the limit is not read


@pytest.mark.core
def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "marked.jsonl"
    path.write_text('{"hash_ids": [1, 2]}\n', encoding="utf-8-sig")
    assert [ids.tolist() for ids in traces.read(path)] == [[1, 2]]


@pytest.mark.core
def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path in (tmp_path / "absent.jsonl", tmp_path):
        with pytest.raises(TraceError, match=f"cannot read the trace .*{path.name}"):
            replay([path], 9)


@pytest.mark.skipif(not CONVERSATION.exists(), reason=f"no conversation trace in {TRACES}; set KVBM_TRACES")
@pytest.mark.parametrize(
    ("num_blocks", "hits", "evictions"),
    [(1_000, 12_847, 274_653), (10_000, 61_046, 217_454), (50_000, 102_290, 136_210)],
)
def test_the_conversation_trace(num_blocks, hits, evictions):
    result = replay([CONVERSATION], num_blocks)
    assert (result.requests, result.rejected) == (12_031, 0)
    assert (result.hits, result.evictions) == ({"g1": hits, "g2": 0, "g3": 0}, evictions)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.skipif(not CONVERSATION.exists(), reason=f"no conversation trace in {TRACES}; set KVBM_TRACES")
@pytest.mark.parametrize("policy", TWINS)
@pytest.mark.parametrize(
    "num_blocks", [1_000, 10_000, *(pytest.param(n, marks=pytest.mark.soak) for n in (4_000, 50_000))]
)
def test_the_conversation_trace_by_every_policy(policy, num_blocks):
    requests = [ids.tolist() for ids in traces.read(CONVERSATION)]
    result = check(requests, num_blocks, policy)
    hits = {1_000: 12_847, 4_000: 24_964, 10_000: 61_046, 50_000: 102_290}[num_blocks]
    # Every sequence is released whole, tails first, so that the least recently released block is always a leaf.
    if policy in ("lru", "lineage"):
        assert result.hits["g1"] == hits
