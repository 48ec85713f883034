"""Optional packages: what is missing is said with the extra that brings it.

with needs("zmq", "events over ZeroMQ"):
    import zmq
"""

import contextlib
from collections.abc import Iterator

from kvbm_jax.errors import MissingDependencyError

__all__ = ["needs"]


@contextlib.contextmanager
def needs(extra: str, what: str) -> Iterator[None]:
    """Imports in its body are of packages that the extra of ours brings, for what is named.

    Raises:
      MissingDependencyError: An import failed; the message names what needs it, the package and the extra.
    """
    try:
        yield
    except ImportError as error:
        raise MissingDependencyError(f"not installed: {what} ({error}); pip install 'kvbm-jax[{extra}]'") from error
