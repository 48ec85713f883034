"""A warning about what may go wrong again and again: it is logged the first time."""

import logging

__all__ = ["FirstTime"]


class FirstTime:
    """Logs the first of like warnings; for one thread or several, of which two may come first.

    Args:
      log: where.
      message: for `%`, of the arguments of a call.
    """

    def __init__(self, log: logging.Logger, message: str) -> None:
        self._log = log
        self._message = f"{message} (later ones are not told)"
        self._told = False

    def __call__(self, *args: object) -> None:
        """Logs, if this is the first time."""
        if not self._told:
            self._told = True
            self._log.warning(self._message, *args)
