"""Reading request traces in Mooncake's schema (FAST '25): one JSON object a line.

    {"timestamp": 0, "input_length": 6758, "output_length": 500, "hash_ids": [0, 1, 2, ...]}

Only `hash_ids` matters to a replay: one id for each block of the input, prefix-chained, so that an equal id means an
equal whole prefix. Nothing is assumed about the size of a block or the range of the ids. Files may be gzipped, whatever
their name.
"""

import codecs
import gzip
import zlib
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

import msgspec
import numpy as np

from kvbm_jax.errors import TraceError

__all__ = ["Request", "read"]

_MAX_ID = 2**64 - 1
_GZIP = b"\x1f\x8b"


class Request(msgspec.Struct, frozen=True):
    """One line of a trace; fields that a replay does not need are optional."""

    hash_ids: list[int]
    timestamp: float = 0.0
    input_length: int = 0
    output_length: int = 0


def read(path: Path, *, limit: int | None = None) -> Iterator[np.ndarray]:
    """Yields the ids of each request, u64[blocks].

    Args:
      path: a file of JSON lines, plain or gzipped.
      limit: stop after this many requests.

    Raises:
      TraceError: if the file cannot be read or a line is not a request; names the file and the line.
    """
    decoder = msgspec.json.Decoder(Request)
    count = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if limit is not None and count >= limit:
                    return
                text = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not text.strip():
                    continue
                yield _ids(decoder, text, path, number)
                count += 1
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise TraceError(f"cannot read the trace {path}: {reason}") from error


def _open(path: Path) -> BufferedIOBase:
    with path.open("rb") as file:
        zipped = file.read(len(_GZIP)) == _GZIP
    return gzip.open(path) if zipped else path.open("rb")


def _ids(decoder: msgspec.json.Decoder[Request], line: bytes, path: Path, number: int) -> np.ndarray:
    try:
        ids = decoder.decode(line).hash_ids
    except (msgspec.DecodeError, RecursionError) as error:
        raise TraceError(f"{path}, line {number} is not a request: {error}") from error
    except UnicodeDecodeError as error:
        raise TraceError(f"{path}, line {number} is not UTF-8 text: {error.reason}") from error
    for i in ids:
        if not 0 <= i <= _MAX_ID:
            raise TraceError(f"{path}, line {number}: hash id {i} is out of range; ids lie in [0, 2**64)")
    return np.array(ids, np.uint64)
