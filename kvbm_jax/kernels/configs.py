"""How kernels cut up their work: data, chosen by what was tuned for a device, else by rule.

`tuned.json`, beside this file, is written by `python -m benchmarks.gpu --tune`:

    {device kind: {operation: {bytes of a unit, a power of two: {field: value}}}}

A unit is what lies contiguous on both sides of a copy: a block of a layer, a token of a component.
"""

import contextlib
import functools
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from kvbm_jax.errors import ConfigError
from kvbm_jax.kernels import target

__all__ = ["SHARED_BYTES", "CopyConfig", "copy_config", "shared_bytes", "using"]

SHARED_BYTES: Final = 228 * 1024
"""Shared memory of a multiprocessor; Hopper and Blackwell alike."""

_RESERVED_BYTES: Final = 1024  # of them for each thread block, beside what it asks for
_MOST_BARRIERS = 16
_override: "list[CopyConfig]" = []


@dataclass(frozen=True)
class CopyConfig:
    """How a copy through shared memory is cut up.

    Raises:
      ConfigError: the thread blocks of a multiprocessor ask for more shared memory than it has, or a field is out of
        range.
    """

    tile_bytes: int = 16384  # most bytes of a tile
    stages: int = 4  # tiles of a thread block in flight, half of them loading
    blocks_per_core: int = 2  # thread blocks that share a multiprocessor

    def __post_init__(self) -> None:
        if self.tile_bytes < 1 or self.blocks_per_core < 1 or not 2 <= self.stages <= _MOST_BARRIERS:
            raise ConfigError(f"{self} is out of range: stages 2 to {_MOST_BARRIERS}, the others from 1")
        if (asked := shared_bytes(self.tile_bytes, self.stages, self.blocks_per_core)) > SHARED_BYTES:
            raise ConfigError(
                f"{self} asks for {asked:,} bytes of shared memory; a multiprocessor has {SHARED_BYTES:,}"
            )


def shared_bytes(tile_bytes: int, stages: int, blocks_per_core: int) -> int:
    """Returns the shared memory that the thread blocks of a multiprocessor take up."""
    return (tile_bytes * stages + _RESERVED_BYTES) * blocks_per_core


def copy_config(operation: str, unit_bytes: int) -> CopyConfig:
    """Returns how an operation copies units of so many bytes on the GPU that is traced for."""
    if _override:
        return _override[-1]
    gpu = target.current() or target.H100
    tuned = _tuned().get(gpu.kind, {}).get(operation, {}).get(str(bucket(unit_bytes)))
    return CopyConfig(**tuned) if tuned is not None else _by_rule(unit_bytes)


def bucket(unit_bytes: int) -> int:
    """The power of two under which units of such a size stand in the table."""
    return 1 << (max(unit_bytes, 1) - 1).bit_length()


@contextlib.contextmanager
def using(config: CopyConfig) -> Iterator[None]:
    """Programs traced within it copy like this, whatever the table says; for tuning and tests."""
    _override.append(config)
    try:
        yield
    finally:
        _override.pop()


def _by_rule(unit_bytes: int) -> CopyConfig:
    """Small units cost instructions, so that more thread blocks share the issuing; large ones want bytes in flight.

    An H100 moves 25 bytes a nanosecond and multiprocessor, and a load takes about a microsecond: about 32 KiB have to
    be on their way at any time.
    """
    if unit_bytes >= 8192:
        return CopyConfig(tile_bytes=16384, stages=4, blocks_per_core=3)
    if unit_bytes >= 1024:
        return CopyConfig(tile_bytes=8192, stages=4, blocks_per_core=6)
    return CopyConfig(tile_bytes=4096, stages=4, blocks_per_core=8)


@functools.cache
def _tuned() -> Mapping[str, Any]:
    table: Mapping[str, Any] = json.loads(importlib.resources.files(__package__).joinpath("tuned.json").read_text())
    return table
