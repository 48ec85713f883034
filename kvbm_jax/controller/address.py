"""Where a controller listens."""

import ipaddress
import os
import urllib.parse
from pathlib import Path
from typing import NamedTuple

from kvbm_jax.addresses import public
from kvbm_jax.errors import ConfigError
from kvbm_jax.runtime_folder import runtime_folder

__all__ = ["SUFFIX", "Address", "check_token", "default_socket", "parse_address", "read_token"]

SUFFIX = ".sock"
_LONGEST_PATH = 107  # bytes of a Unix socket's path on Linux
_SHORTEST_TOKEN = 16


class Address(NamedTuple):
    """Of a Unix socket, or of a host and port."""

    path: Path | None
    host: str = ""
    port: int = 0

    @property
    def url(self) -> str:
        """As it is written."""
        if self.path is not None:
            return f"unix://{self.path}"
        return f"http://[{self.host}]:{self.port}" if ":" in self.host else f"http://{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach it."""
        if self.path is not None or self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_address(url: str) -> Address:
    """Reads an address.

    Raises:
      ConfigError: if it is none.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"{public(url)!r} is no address of a controller: {error}") from error
    if parts.scheme == "unix" and not parts.netloc and parts.path.startswith("/"):
        return Address(_checked(Path(urllib.parse.unquote(parts.path))))
    plain = parts.path in {"", "/"} and not (parts.query or parts.fragment or parts.username or parts.password)
    if parts.scheme == "http" and parts.hostname and port is not None and plain:
        return Address(None, parts.hostname, port)
    raise ConfigError(f"{public(url)!r} is no address of a controller; allowed are unix:///path and http://host:port")


def default_socket(worker_id: str) -> Path:
    """Returns where the controller of a worker listens if nothing else is said."""
    return _checked(runtime_folder() / (urllib.parse.quote(worker_id, safe="") + SUFFIX))


def read_token(path: Path) -> str:
    """Reads a bearer token from a file; blanks around it do not count.

    Raises:
      ConfigError: if the file cannot be read, or holds no token.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the controller's token: {path}: {error}") from error
    return check_token(token)


def check_token(token: str) -> str:
    """Returns a token as it is.

    Raises:
      ConfigError: if it is too short, or cannot be sent.
    """
    if len(token) < _SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigError(
            f"a controller's token has at least {_SHORTEST_TOKEN} printable ASCII characters and no space; this "
            f"one has {len(token)}: make one with `openssl rand -hex 32`"
        )
    return token


def _checked(path: Path) -> Path:
    if (length := len(os.fsencode(path))) > _LONGEST_PATH:
        raise ConfigError(f"{path} is {length} bytes long; a Unix socket's path has at most {_LONGEST_PATH}")
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r} has a zero byte in it, which a Unix socket's path cannot have")
    return path
