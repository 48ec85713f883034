"""Hashes of token blocks: the names under which blocks are shared, evicted, stored and announced.

A *sequence hash* names one block together with everything before it, so equal hashes mean equal prefixes. It
is 128 bits, kept as `uint32[4]` because the pool's arrays are 32 bits wide; the bytes of a hash are those
four words in little-endian order. Only whole blocks have a hash. A *block hash* names one block's tokens
alone, whatever stands before them; it is Dynamo's, 64 bits, and only events need it. This module runs on the
host, on numpy arrays: it is no part of a jitted program and knows nothing of pools or devices.

Axis legend: `S` tokens given, `N = S // block_size` whole blocks.

`blake3` (the default: cryptographic, so that a tenant who does not know another's salt cannot forge a prefix
of theirs). Each line below is one run of bytes, `||` joins them:

    key      = BLAKE3("kvbm_jax/v1/" || salt as UTF-8), 32 bytes
    hash     = first 16 bytes of BLAKE3 keyed with key, over  parent || tokens || extra
    parent     16 bytes    hash of the block before; zeros for the first block
    tokens      4 bytes    each token, unsigned little-endian
    extra                  empty if the block has neither LoRA nor multimodal input, else MessagePack, in its
                           shortest encodings, of [lora or nil, [[offset in block, hash bytes], ...] sorted]

`xxh3_64` (Dynamo's; fast, 64 bits, not to be used between tenants who do not trust each other):

    seed     = 1337 (+ XXH3_64(lora name, seed 0)) (+ XXH3_64(salt, seed 1)), modulo 2**64
    block    = XXH3_64(tokens, seed)
    sequence = block for the first block, else XXH3_64(parent, 8 bytes LE || block, 8 bytes LE, seed)
    in the pool: sequence, 8 bytes LE, then 8 zero bytes

An empty LoRA name means the base model, and an empty salt none, with both. On wires a hash is its first 8
bytes read as a little-endian integer (`to_wire`), which for `xxh3_64` is all of it.
`tests/golden/hashes.json` fixes both algorithms.
"""

import enum
import struct
from collections.abc import Sequence

import msgspec
import numpy as np
import xxhash
from blake3 import blake3
from numpy.typing import ArrayLike, NDArray

from kvbm_jax.errors import HashingError
from kvbm_jax.protocols import BlockKey

__all__ = [
    "HashAlgorithm",
    "Multimodal",
    "check_tokens",
    "hash_sequence",
    "hash_block",
    "block_hash",
    "block_hashes",
    "block_keys",
    "to_wire",
]

type Multimodal = Sequence[tuple[int, bytes]]
"""Multimodal input: (position of its placeholder token in the tokens given, hash of its content) pairs."""

_BLAKE3_CONTEXT = b"kvbm_jax/v1/"
_HASH_BYTES = 16
_FIRST_PARENT = bytes(_HASH_BYTES)
_DYNAMO_SEED = 1337
_UINT32_END = 1 << 32
_UINT64_END = 1 << 64
_TWO_UINT64 = struct.Struct("<QQ")


class HashAlgorithm(enum.StrEnum):
    """How a prefix is hashed; part of a cache's identity, so caches of different algorithms never mix."""

    BLAKE3 = "blake3"
    XXH3_64 = "xxh3_64"


def check_tokens(tokens: ArrayLike) -> NDArray[np.uint32]:
    """Returns tokens as `uint32[S]`.

    Raises:
      HashingError: They are not one-dimensional, or one is no integer in [0, 2**32).
    """
    return _as_uint32(tokens, "token")


def hash_sequence(
    tokens: ArrayLike,
    block_size: int,
    *,
    algorithm: HashAlgorithm = HashAlgorithm.BLAKE3,
    salt: str = "",
    lora_name: str | None = None,
    multimodal: Multimodal = (),
    parent: ArrayLike | None = None,
) -> NDArray[np.uint32]:
    """Hashes every whole block of a sequence, each chained to the one before.

    Hashing resumes: `hash_sequence(all)` equals `hash_sequence(head)` followed by `hash_sequence(tail,
    parent=last hash of head)` wherever the head ends on a block boundary.

    Args:
      tokens: Token ids, `[S]`, any sequence of integers or integer array; each in [0, 2**32). Tokens after
        the last whole block are checked but not hashed.
      block_size: Tokens per block.
      algorithm: Which of the two algorithms.
      salt: Sequences of different salts never share a hash. One per tenant isolates them.
      lora_name: The adapter whose weights produced the cache, or None for the base model.
      multimodal: Pairs (position in `tokens`, hash of the input that stands there). Positions count from the
        first token given, also when `parent` is. Refused with `xxh3_64`.
      parent: Hash of the block before the first token given, `uint32[4]`; None at the start of a sequence.

    Returns:
      Sequence hashes, `uint32[N, 4]`.

    Raises:
      HashingError: A token, the parent, the salt or a multimodal entry cannot be hashed.
    """
    words = _as_uint32(tokens, "token")
    chunks = _chunks(words, block_size)
    parent_bytes = None if parent is None else _parent_bytes(parent)
    match HashAlgorithm(algorithm):
        case HashAlgorithm.BLAKE3:
            _append_extras(chunks, len(words), block_size, lora_name or None, multimodal)
            digests = _blake3_chain(chunks, _utf8(salt, "salt"), parent_bytes)
            hashes = np.frombuffer(b"".join(digests), "<u4")
        case HashAlgorithm.XXH3_64:
            if multimodal:
                raise HashingError(
                    f"xxh3_64 cannot hash multimodal input ({len(multimodal)} entries given); use blake3"
                )
            wide = np.zeros((len(chunks), 2), "<u8")
            wide[:, 0] = _xxh3_chain(chunks, _dynamo_seed(salt, lora_name), parent_bytes)
            hashes = wide.reshape(-1).view("<u4")
    return hashes.astype(np.uint32).reshape(-1, 4)


def hash_block(
    tokens: ArrayLike,
    *,
    algorithm: HashAlgorithm = HashAlgorithm.BLAKE3,
    salt: str = "",
    lora_name: str | None = None,
    multimodal: Multimodal = (),
    parent: ArrayLike | None = None,
) -> NDArray[np.uint32]:
    """Hashes one block, all tokens given, chained to `parent`.

    Args:
      tokens: The block's token ids, `[block_size]`, at least one.
      algorithm: As in `hash_sequence`.
      salt: As in `hash_sequence`.
      lora_name: As in `hash_sequence`.
      multimodal: Pairs (offset in the block, hash of the input that stands there).
      parent: Hash of the block before, `uint32[4]`; None for the first.

    Returns:
      The sequence hash, `uint32[4]`.
    """
    words = _as_uint32(tokens, "token")
    hashes = hash_sequence(
        words,
        len(words),
        algorithm=algorithm,
        salt=salt,
        lora_name=lora_name,
        multimodal=multimodal,
        parent=parent,
    )
    return hashes.reshape(4)


def block_hash(tokens: ArrayLike, *, salt: str = "", lora_name: str | None = None) -> np.uint64:
    """Returns Dynamo's hash of one block's tokens alone, not chained: `tokens_hash` on its wire.

    Args:
      tokens: The block's token ids, `[block_size]`, at least one.
      salt: As in `hash_sequence`.
      lora_name: As in `hash_sequence`.
    """
    words = _as_uint32(tokens, "token")
    return np.uint64(block_hashes(words, len(words), salt=salt, lora_name=lora_name)[0])


def block_hashes(
    tokens: ArrayLike, block_size: int, *, salt: str = "", lora_name: str | None = None
) -> NDArray[np.uint64]:
    """Returns `block_hash` of every whole block, `uint64[N]`.

    Args:
      tokens: Token ids, `[S]`.
      block_size: Tokens per block.
      salt: As in `hash_sequence`.
      lora_name: As in `hash_sequence`.
    """
    chunks = _chunks(_as_uint32(tokens, "token"), block_size)
    return np.array(_xxh3_blocks(chunks, _dynamo_seed(salt, lora_name)), np.uint64)


def to_wire(hashes: ArrayLike) -> NDArray[np.uint64]:
    """Shortens hashes to the 64 bits that event wires carry: their first 8 bytes, little-endian.

    Args:
      hashes: Sequence hashes, `uint32[..., 4]`.

    Returns:
      `uint64[...]`.
    """
    words = np.asarray(hashes)
    if words.dtype != np.uint32 or words.ndim == 0 or words.shape[-1] != 4:
        raise HashingError(f"hashes must be uint32[..., 4]; these are {words.dtype}{list(words.shape)}")
    low, high = words[..., 0].astype(np.uint64), words[..., 1].astype(np.uint64)
    return np.asarray(low | (high << np.uint64(32)))


def _chunks(words: NDArray[np.uint32], block_size: int) -> list[bytes]:
    """The tokens of each whole block as bytes."""
    if block_size < 1:
        raise HashingError(f"a block holds at least 1 token; block_size is {block_size}")
    count = len(words) // block_size
    if not count:
        return []
    whole = np.ascontiguousarray(words[: count * block_size], "<u4")
    # As elements of a void type they are cut in one call; slices would take half as long as xxh3_64 itself.
    chunks: list[bytes] = whole.view(f"V{block_size * 4}").tolist()
    return chunks


def _append_extras(
    chunks: list[bytes], num_tokens: int, block_size: int, lora_name: str | None, multimodal: Multimodal
) -> None:
    """Appends to each chunk, in place, the `extra` bytes of its block."""
    items: dict[int, list[tuple[int, bytes]]] = {}
    for position, content in multimodal:
        if not 0 <= position < num_tokens:
            raise HashingError(f"multimodal position {position} is outside the {num_tokens} tokens given")
        if not isinstance(content, bytes) or not content:
            raise HashingError(f"the multimodal hash at position {position} must be bytes, and not empty")
        block, offset = divmod(int(position), block_size)
        items.setdefault(block, []).append((offset, content))
    if lora_name is not None:
        _utf8(lora_name, "lora_name")
        lora_only = msgspec.msgpack.encode([lora_name, []])
        for block in range(len(chunks)):
            chunks[block] += lora_only if block not in items else b""
    for block, entries in items.items():
        if block < len(chunks):
            chunks[block] += msgspec.msgpack.encode([lora_name, sorted(entries)])


def _blake3_chain(chunks: list[bytes], salt: bytes, parent: bytes | None) -> list[bytes]:
    hasher = blake3(key=blake3(_BLAKE3_CONTEXT + salt).digest())
    # One hasher, reset before each block: a copy costs half as much as hashing 16 tokens.
    reset, update, digest = hasher.reset, hasher.update, hasher.digest
    current = _FIRST_PARENT if parent is None else parent
    digests = []
    for chunk in chunks:
        reset()
        update(current + chunk)
        current = digest(_HASH_BYTES)
        digests.append(current)
    return digests


def _xxh3_blocks(chunks: list[bytes], seed: int) -> list[int]:
    digest = xxhash.xxh3_64_intdigest
    return [digest(chunk, seed) for chunk in chunks]


def _xxh3_chain(chunks: list[bytes], seed: int, parent: bytes | None) -> list[int]:
    digest, pack = xxhash.xxh3_64_intdigest, _TWO_UINT64.pack
    if parent is None:
        first = _xxh3_blocks(chunks[:1], seed)
        current = first[0] if first else 0
    else:
        first = []
        current, beyond = _TWO_UINT64.unpack(parent)
        if beyond:
            raise HashingError(
                "the parent is no xxh3_64 hash (its last 8 bytes are not zero); use one of the same algorithm"
            )
    return first + [current := digest(pack(current, digest(chunk, seed)), seed) for chunk in chunks[len(first) :]]


def _dynamo_seed(salt: str, lora_name: str | None) -> int:
    seed = _DYNAMO_SEED
    if lora_name:
        seed += xxhash.xxh3_64_intdigest(_utf8(lora_name, "lora_name"), 0)
    if salt:
        seed += xxhash.xxh3_64_intdigest(_utf8(salt, "salt"), 1)
    return seed % _UINT64_END


def _as_uint32(values: ArrayLike, what: str) -> NDArray[np.uint32]:
    """Checks that `values` is one-dimensional, of integers in [0, 2**32), and converts it."""
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, np.uint32)
    if array.ndim != 1:
        raise HashingError(f"{what}s must be one-dimensional; these have shape {list(array.shape)}")
    if array.dtype == np.uint32:
        return array
    if array.dtype.kind not in "iu":  # floats, strings; or integers that fit no one dtype
        for position, value in enumerate(values if isinstance(values, Sequence) else array):
            if isinstance(value, bool | np.bool) or not isinstance(value, int | np.integer):
                raise HashingError(f"{what} {value!r} at position {position} is no integer")
            _check_range(int(value), position, what)
    bad = (array < 0) | (array >= _UINT32_END) if array.dtype.itemsize > 4 else array < 0
    if bad.any():
        position = int(bad.argmax())
        _check_range(int(array[position]), position, what)
    return array.astype(np.uint32)


def _check_range(value: int, position: int, what: str) -> None:
    if not 0 <= value < _UINT32_END:
        raise HashingError(f"{what} {value} at position {position} is outside [0, 2**32)")


def hash_bytes(words: NDArray[np.uint32]) -> bytes:
    """Returns a hash u32[4] as the 16 bytes that name its block in every tier."""
    return words.astype("<u4").tobytes()


def block_keys(hashes: NDArray[np.uint32]) -> list[BlockKey]:
    """Returns the keys of blocks of the first group, by their hashes u32[M, 4]."""
    return [BlockKey(hash_bytes(words)) for words in hashes]


def _parent_bytes(parent: ArrayLike) -> bytes:
    words = _as_uint32(parent, "parent word")
    if len(words) != 4:
        raise HashingError(f"a parent hash has 4 words; this one has {len(words)}")
    return words.astype("<u4", copy=False).tobytes()


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise HashingError(f"{what} {text!r} cannot be written as UTF-8") from error
