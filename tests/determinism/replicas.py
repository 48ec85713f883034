"""Runs a seeded trace of steps on one device and on a mesh of all, replicated; compares every leaf of every replica."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from kvbm_jax import pool, sequences
from kvbm_jax.step import StepPlan, step

BLOCKS, ROWS, WIDTH, SIZE, STEPS, STARTS, COMPLETE = 24, 4, 6, 4, 60, 2, 12


def names(number, count):
    """Hashes of the first blocks of prompt `number`; prompts of one parity share the first two."""
    heads = [number % 2 if block < 2 else 10 + number for block in range(count)]
    return [[head, block, 7, 7] for block, head in enumerate(heads)]


def main() -> None:
    rng = np.random.default_rng(0)
    mesh = jax.make_mesh((jax.device_count(),), ("replica",), axis_types=(jax.sharding.AxisType.Auto,))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    fresh = (pool.init(BLOCKS), sequences.init(ROWS, WIDTH, block_size=SIZE, pool_blocks=BLOCKS))
    compiled = jax.jit(step, donate_argnums=(0, 1))
    compact = jax.jit(pool.compact, donate_argnums=0)
    alone = jax.device_put(fresh, jax.devices()[0], may_alias=False)
    spread = jax.device_put(fresh, everywhere, may_alias=False)

    running: dict[int, int] = {}
    evictions = hits = 0
    for _ in range(STEPS):
        ending = [row for row in running if rng.random() < 0.4]
        for row in ending:
            del running[row]
        starting = [row for row in range(ROWS) if row not in running][:STARTS]
        plan = StepPlan(
            np.array([*ending, *[ROWS] * (ROWS - len(ending))], np.int32),
            np.array([*starting, *[ROWS] * (STARTS - len(starting))], np.int32),
            np.zeros((STARTS, WIDTH, 4), np.uint32),
            np.zeros((STARTS,), np.int32),
            np.zeros((STARTS,), np.int32),
            np.full((1,), ROWS, np.int32),
            np.zeros((1,), np.int32),
            np.full((COMPLETE,), ROWS, np.int32),
            np.zeros((COMPLETE,), np.int32),
            np.zeros((COMPLETE, 4), np.uint32),
        )
        place = 0
        for nth, row in enumerate(starting):
            running[row] = number = int(rng.integers(8))
            count = int(rng.integers(2, WIDTH))
            plan.hashes[nth, :count] = names(number, count)
            plan.num_hashes[nth], plan.num_tokens[nth] = count, count * SIZE + 1
            for block, name in enumerate(names(number, count)):
                plan.complete_rows[place], plan.complete_places[place], plan.complete_hashes[place] = row, block, name
                place += 1
        results = []
        for state, batch in (alone, spread):
            results.append(compiled(compact(state), batch, jax.device_put(plan, state.num_reset.sharding)))
        alone, spread = results[0][:2], results[1][:2]
        evictions += int(results[0][2].evicted.num_blocks)
        hits += int(jnp.sum(results[0][2].num_cached)) // SIZE

    wrong = 0
    for one, all_of_it in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        assert len(all_of_it.addressable_shards) == jax.device_count()
        for shard in all_of_it.addressable_shards:
            wrong += np.asarray(shard.data).tobytes() != np.asarray(one).tobytes()
    told = {"devices": jax.device_count(), "steps": STEPS, "evictions": evictions, "hits": hits}
    print(json.dumps({**told, "replicas_that_differ": wrong}))


if __name__ == "__main__":
    main()
