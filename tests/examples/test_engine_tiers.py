"""The engine with tiers below a small pool: answers stay, and first tokens come sooner than computed ones."""

import statistics

import pytest
from smollm2.engine import Engine
from tenants import drop_file_cache

from kvbm_jax.protocols import Tier

BLOCK = 16
TEXT = "The keeper climbed the stair with the lamp in one hand and the red book in the other, counting the steps. "


@pytest.fixture(scope="module")
def ids(tokenizer):
    return (tokenizer.encode(TEXT) * 80)[: 1504 + 48]


def tiers(folder, host_blocks):
    return {
        "enable_offload": True,
        "host_blocks": host_blocks,
        "disk_budget": 2 << 30,
        "offload_path": folder,
        "model_id": "smollm2",
    }


def settle(engine):
    """Waits for the moves under way, which would share the processor with what is timed."""
    mover = engine.manager._device.residency._engine._mover
    mover.settle()
    assert mover.wait_idle(60)


@pytest.mark.long
def test_answers_are_equal_from_every_tier_and_after_a_restart(model, ids, tmp_path):
    """Ten prompts in turn through a pool that holds one of them."""
    prompts = [ids[first : first + 100] for first in range(0, 1000, 100)]
    blocks = -(-(100 + 8) // BLOCK)
    options = {"block_size": BLOCK, "num_blocks": blocks, "chunks": (16, 128), "tiers": tiers(tmp_path, 3 * blocks)}
    engine = Engine(model, **options)
    expected = [engine.generate([prompt], 8, reuse=False, ignore_eos=True)[0].tokens for prompt in prompts]
    seen = set()
    for number in (*range(10), 8, 7, 0, 1, 9):
        [answer] = engine.generate([prompts[number]], 8, salt=str(number), ignore_eos=True)
        assert answer.tokens == expected[number]
        seen |= {tier for tier, tokens in answer.hits.items() if tokens}
    assert seen >= {Tier.G2, Tier.G3}
    engine.close()
    engine = Engine(model, **options)
    for number in (3, 9, 0):
        [answer] = engine.generate([prompts[number]], 8, salt=str(number), ignore_eos=True)
        assert answer.hits == {Tier.G1: 0, Tier.G3: 96}
        assert answer.tokens == expected[number]
    engine.close()


@pytest.mark.long
@pytest.mark.timeout(900)
def test_first_tokens_from_below_come_sooner_than_computed_ones(model, ids, tmp_path):
    """Ratios of medians of one interleaved round; the best of three counts, for neighbours slow some rounds down."""
    options = {"block_size": BLOCK, "num_blocks": 100, "chunks": (16, 48, 512), "tiers": tiers(tmp_path, 110)}
    engine = Engine(model, **options)

    def first_token(salt, tier=None):
        settle(engine)
        [answer] = engine.generate([ids], 1, salt=salt)
        found = {tier for tier, tokens in answer.hits.items() if tokens >= 1400}
        assert found == ({tier} if tier else set())
        return answer.ttft_seconds

    def measure(part):
        nonlocal engine
        seconds = {"cold": [], "host": [], "disk": [], "restart": []}
        for i in range(part, part + 4):
            seconds["cold"].append(first_token(f"base {i}"))
            first_token(f"second {i}")
            seconds["host"].append(first_token(f"base {i}", Tier.G2))
            for filler in ("third", "fourth", "fifth"):
                first_token(f"{filler} {i}")
            settle(engine)
            drop_file_cache(tmp_path)
            seconds["disk"].append(first_token(f"base {i}", Tier.G3))
        for i in range(part, part + 2):
            engine.close()
            engine = Engine(model, **options)
            drop_file_cache(tmp_path)
            seconds["restart"].append(first_token(f"base {i}", Tier.G3))
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        ratios = {name: medians["cold"] / value for name, value in medians.items() if name != "cold"}
        print("time to first token, cold over", {name: round(ratio, 1) for name, ratio in ratios.items()})
        return ratios

    rounds = []
    for part in (0, 4, 8):
        rounds.append(measure(part))
        if rounds[-1]["host"] >= 9 and rounds[-1]["disk"] >= 6 and rounds[-1]["restart"] >= 6:
            engine.close()
            return
    pytest.fail(f"no round with ratios of 9, 6 and 6: {rounds}")
