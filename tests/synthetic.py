"""Seeded traces for replays, in the schema of `kvbm_jax.traces`: conversations that grow and branch."""

import json
from pathlib import Path

import numpy as np

__all__ = ["conversations", "write"]


def conversations(
    seed: int, *, requests: int, users: int = 8, system_blocks: int = 3, longest: int = 40, id_bits: int = 64
) -> list[list[int]]:
    """Returns the prefix-chained block ids of each request.

    Users share one of two system prompts; each comes back with its history and some new blocks, starts over when the
    history outgrows `longest`, and now and then edits an earlier turn, which branches the chain.
    """
    rng = np.random.default_rng(seed)
    ids: dict[tuple[int, ...], int] = {}

    def chained(contents: list[int]) -> list[int]:
        prefixes = [tuple(contents[: i + 1]) for i in range(len(contents))]
        for prefix in prefixes:
            while prefix not in ids:
                number = int(rng.integers(0, 2**id_bits, dtype=np.uint64)) if id_bits == 64 else len(ids)
                ids[prefix] = number
        return [ids[prefix] for prefix in prefixes]

    histories: dict[int, list[int]] = {}
    out = []
    for _ in range(requests):
        user = int(rng.zipf(1.3)) % users  # some users come often
        history = histories.get(user, [])
        if not history or len(history) > longest:
            history = [int(rng.integers(2))] * system_blocks
        elif rng.random() < 0.2:
            history = history[: int(rng.integers(system_blocks, len(history) + 1))]
        history = history + rng.integers(10, 10**6, int(rng.integers(0, 6))).tolist()
        histories[user] = history
        out.append(chained(history))
    return out


def write(path: Path, requests: list[list[int]]) -> Path:
    """Writes requests as JSON lines and returns the path."""
    path.write_text("".join(json.dumps({"timestamp": 0, "hash_ids": ids}) + "\n" for ids in requests))
    return path
