"""The folder where processes of one user find each other: sockets of controllers, the address of a shared server."""

import os
import stat
from pathlib import Path

from kvbm_jax.errors import ConfigError

__all__ = ["runtime_folder"]


def runtime_folder() -> Path:
    """Returns this user's folder, which no other user can write to; makes it if it is not there.

    Raises:
      ConfigError: if what stands there is not this user's own.
    """
    base = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(base) / "kvbm_jax" if base else Path("/tmp") / f"kvbm_jax-{os.getuid()}"  # noqa: S108 (checked below)
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError as error:
        raise ConfigError(f"{folder}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of your own") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(
            f"{folder} must be a folder of user {os.getuid()} with mode 700; it is {stat.filemode(found.st_mode)} of "
            f"user {found.st_uid}: remove it, or set XDG_RUNTIME_DIR"
        )
    return folder
