"""Whose cache it is: what must be equal before one run's blocks may be read by another.

A `CacheIdentity` travels with every stored segment, transfer and snapshot. Two caches of equal identity give equal
meaning to equal bytes; of anything else the data is refused by name. It says nothing of where blocks lie: number of
blocks, arrangement and sharding are the placement's business, and may differ between writer and reader.

    fingerprint = XXH3_128 of the canonical JSON (keys sorted, no whitespace, ASCII), 16 bytes big-endian

`tests/test_identity.py` fixes both.
"""

import dataclasses
import functools
import json
from typing import Any, Self

import xxhash

from kvbm_jax.errors import ConfigError
from kvbm_jax.hashing import HashAlgorithm
from kvbm_jax.layout import KVLayout

__all__ = ["IDENTITY_VERSION", "CacheIdentity"]

IDENTITY_VERSION = 1
_SCALE_FORMAT = "float32 per token and head"  # the one there is: see `kvbm_jax.layout`


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheIdentity:
    """What a cache's bytes mean.

    Attributes:
      model_id: Names the model and its weights.
      num_layers: Layers of the whole model.
      num_kv_heads: Key-value heads of the whole model.
      head_dim: Elements of a head.
      components: Arrays per layer: keys and values 2, an MLA latent 1.
      dtype: Name of the element type.
      block_size: Tokens of a block.
      hash_algorithm: How keys are made from tokens.
      scale_format: How quantised elements are scaled; None where they are not.
      version: Of this record.
    """

    model_id: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    components: int
    dtype: str
    block_size: int
    hash_algorithm: str
    scale_format: str | None = None
    version: int = IDENTITY_VERSION

    @classmethod
    def of(cls, layout: KVLayout, *, model_id: str, hash_algorithm: HashAlgorithm | str) -> Self:
        """Returns the identity of a cache that lies as `layout` says.

        Raises:
          ConfigError: The hash algorithm is unknown.
        """
        if hash_algorithm not in list(HashAlgorithm):
            known = ", ".join(HashAlgorithm)
            raise ConfigError(f"hash_algorithm = {str(hash_algorithm)!r}: allowed is one of {known}")
        return cls(
            model_id=model_id,
            num_layers=layout.num_layers,
            num_kv_heads=layout.num_kv_heads,
            head_dim=layout.head_dim,
            components=layout.components,
            dtype=layout.dtype,
            block_size=layout.block_size,
            hash_algorithm=str(hash_algorithm),
            scale_format=_SCALE_FORMAT if layout.quantized else None,
        )

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads `canonical_json` back.

        Raises:
          ConfigError: The text is no identity, or one of a version that this library does not know.
        """
        try:
            values: dict[str, Any] = json.loads(text)
            found = cls(**values)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"no cache identity: {error}") from error
        if found.version != IDENTITY_VERSION:
            raise ConfigError(f"cache identity of version {found.version!r}: known is {IDENTITY_VERSION}")
        return found

    def canonical_json(self) -> str:
        """Returns the fields as JSON of which there is exactly one: keys sorted, no whitespace, ASCII."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @functools.cached_property
    def fingerprint(self) -> bytes:
        """16 bytes that are equal for equal identities."""
        return xxhash.xxh3_128_digest(self.canonical_json().encode())

    def difference(self, other: "CacheIdentity") -> str:
        """Names each field that differs, this identity's value first; empty if none does."""
        mine, theirs = dataclasses.asdict(self), dataclasses.asdict(other)
        return ", ".join(f"{name}: {mine[name]!r} != {theirs[name]!r}" for name in mine if mine[name] != theirs[name])
