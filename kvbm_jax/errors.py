"""Everything that kvbm_jax raises.

One tree under `KvbmError`; each class is also the builtin that fits, so that callers who do not know this
library catch what they expect. Messages carry the numbers and the remedy. Inside jitted code nothing is raised
at run time: outcomes are values (`kvbm_jax.types.Status`), and the host boundary turns them into these errors.
"""

__all__ = [
    "BenchError",
    "BlockStateError",
    "BusyError",
    "CacheLostError",
    "ConfigError",
    "EventDecodeError",
    "FrameError",
    "HashingError",
    "IdentityMismatchError",
    "InDoubtError",
    "InvariantError",
    "KvbmError",
    "LayoutError",
    "MissingDependencyError",
    "OutOfBlocksError",
    "PeerLostError",
    "QuotaExceededError",
    "SequenceTooLongError",
    "TraceError",
    "TransferError",
    "TransportError",
    "UnreadableSegmentError",
]


class KvbmError(Exception):
    """Base of all errors of this library."""


class ConfigError(KvbmError, ValueError):
    """A configuration key is unknown, of the wrong type, or out of range."""


class LayoutError(KvbmError, ValueError):
    """Shapes, dtypes or sizes do not fit the KV layout."""


class HashingError(KvbmError, ValueError):
    """Tokens, parent or extra keys cannot be hashed with the chosen algorithm."""


class OutOfBlocksError(KvbmError, MemoryError):
    """A request needs more blocks than are free or evictable."""


class QuotaExceededError(OutOfBlocksError):
    """A tenant would hold more blocks than its quota; what other tenants hold has no part in it."""


class SequenceTooLongError(KvbmError, ValueError):
    """A sequence would outgrow its block table, the pool or the model's context."""


class BlockStateError(KvbmError, RuntimeError):
    """A block was used in a state that does not allow it: freed twice, stale handle, not held."""


class BusyError(KvbmError, TimeoutError):
    """A manager did not come to a command in time; another thread was in a call of it, and nothing was done."""


class CacheLostError(KvbmError, RuntimeError):
    """A step failed after its cache had been donated; the cache is empty again and its prefixes are gone."""


class InvariantError(KvbmError, AssertionError):
    """The pool's bookkeeping breaks a conservation law; the message carries the numbers."""


class EventDecodeError(KvbmError, ValueError):
    """Bytes that are no event of the expected codec."""


class TransportError(KvbmError, ConnectionError):
    """A transport of events or a controller cannot be had: nobody there, credentials refused, an address taken."""


class TransferError(KvbmError, ConnectionError):
    """Blocks could not be moved between workers; the message says which part refused, and why."""


class PeerLostError(TransferError):
    """A worker cannot be reached, or went away in the middle; what it was to send is a miss."""


class InDoubtError(PeerLostError):
    """A sequence was given to a worker that did not confirm; it may go on there, and was released here."""


class FrameError(TransferError, ValueError):
    """Bytes on a connection between workers that are no frame of its protocol; the connection is closed."""


class IdentityMismatchError(KvbmError, ValueError):
    """A peer's blocks are of another model or layout; the message has both fingerprints and what differs."""


class TraceError(KvbmError, ValueError):
    """A trace file cannot be read, or a line of it is not a request."""


class BenchError(KvbmError, RuntimeError):
    """A measurement could not be made, or what was measured did not do what it should."""


class MissingDependencyError(KvbmError, ImportError):
    """An optional package is needed and absent; the message names the extra that brings it."""


class UnreadableSegmentError(KvbmError, ValueError):
    """A segment's record is missing, damaged, or of a format that this library does not know."""
