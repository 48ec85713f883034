"""How fast the blocks of one sequence are hashed, each chained to the one before.

The baseline is the tightest plain loop over the package of the algorithm that gives the same array of hashes; it checks
nothing and knows no salt, LoRA name, multimodal input or parent. Before anything is timed, the two are compared.

Axes: S tokens, N whole blocks.
"""

import functools
import struct
import time
from collections.abc import Callable

import numpy as np
import xxhash
from blake3 import blake3
from numpy.typing import NDArray

from kvbm_jax.bench.timing import Row, Timing
from kvbm_jax.errors import BenchError
from kvbm_jax.hashing import HashAlgorithm, hash_sequence

__all__ = ["measure"]

_BLOCK_SIZES = (16, 64)
_DYNAMO_SEED = 1337

type _Hasher = Callable[[NDArray[np.uint32], int], NDArray[np.uint32]]


def measure(timing: Timing, num_tokens: int) -> list[Row]:
    """Times both algorithms, over blocks of 16 and of 64 tokens.

    Args:
      timing: how.
      num_tokens: S, at least 64.

    Raises:
      BenchError: The plain loop gave other hashes.
    """
    tokens = np.random.default_rng(0).integers(0, 1 << 32, num_tokens, np.uint32)
    rows = []
    for algorithm, plain, package in (
        (HashAlgorithm.BLAKE3, _plain_blake3, "blake3"),
        (HashAlgorithm.XXH3_64, _plain_xxh3, "xxhash"),
    ):
        ours = functools.partial(hash_sequence, algorithm=algorithm)
        for block_size in _BLOCK_SIZES:
            case = f"{algorithm} block {block_size}"
            wrong = int((ours(tokens, block_size) != plain(tokens, block_size)).any(axis=1).sum())
            if wrong:
                raise BenchError(f"{case}: {wrong} of {num_tokens // block_size} hashes differ from the plain loop's")
            trial = functools.partial(_seconds, ours, tokens, block_size)
            baseline_trial = functools.partial(_seconds, plain, tokens, block_size)
            rows.append(timing.compare(case, trial, f"plain loop over {package}", baseline_trial))
    return rows


def _seconds(hasher: _Hasher, tokens: NDArray[np.uint32], block_size: int) -> float:
    begun = time.perf_counter()
    hasher(tokens, block_size)
    return time.perf_counter() - begun


def _plain_blake3(tokens: NDArray[np.uint32], block_size: int) -> NDArray[np.uint32]:
    """Hashes u32[N, 4] of tokens u32[S]."""
    hasher = blake3(key=blake3(b"kvbm_jax/v1/").digest())
    reset, update, digest = hasher.reset, hasher.update, hasher.digest
    current = bytes(16)
    found = []
    for chunk in _cut(tokens, block_size):
        reset()
        update(current + chunk)
        current = digest(16)
        found.append(current)
    return np.frombuffer(b"".join(found), np.uint32).reshape(-1, 4)


def _plain_xxh3(tokens: NDArray[np.uint32], block_size: int) -> NDArray[np.uint32]:
    """Hashes u32[N, 4] of tokens u32[S], N at least 1."""
    digest, pack, seed = xxhash.xxh3_64_intdigest, struct.Struct("<QQ").pack, _DYNAMO_SEED
    first, *rest = _cut(tokens, block_size)
    current = digest(first, seed)
    found = np.zeros((1 + len(rest), 2), np.uint64)
    found[0, 0] = current
    found[1:, 0] = [current := digest(pack(current, digest(chunk, seed)), seed) for chunk in rest]
    return found.view(np.uint32)


def _cut(tokens: NDArray[np.uint32], block_size: int) -> list[bytes]:
    """The bytes of each whole block."""
    chunks: list[bytes] = tokens[: len(tokens) // block_size * block_size].view(f"V{block_size * 4}").tolist()
    return chunks
