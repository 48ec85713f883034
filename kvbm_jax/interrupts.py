"""What is to be done when an interrupt (Ctrl-C, say) breaks into the middle of something."""

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["on_interrupt"]


@contextlib.contextmanager
def on_interrupt(act: Callable[[], object]) -> Iterator[None]:
    """Calls `act` when what is within ends by anything but an `Exception`, which passes untouched; raises it again."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            act()
        raise
