"""Who may connect: where a worker listens, the token that both ends know, TLS.

Every connection begins with both ends showing that they know the token, without sending it:

    client: its name, a nonce      server: a nonce, HMAC("server", name, nonces)      client: HMAC("client", ...)

On loopback the token is by default one of the user's own, in a file of the runtime folder that no other user can read:
processes of one user find each other, and those of others are refused. Who listens beyond loopback names a file with a
token. The exchange keeps strangers out; it hides and signs nothing of what follows, which TLS does.
"""

import contextlib
import hashlib
import hmac
import ipaddress
import os
import secrets
import ssl
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import msgspec

from kvbm_jax.errors import ConfigError, FrameError, TransferError
from kvbm_jax.runtime_folder import runtime_folder
from kvbm_jax.transfer.frames import Done, Frames, Message, Refused
from kvbm_jax.transfer.streams import Stream

__all__ = ["SocketConfig", "greet", "is_loopback", "welcome"]

PROTOCOL_VERSION = 1
_SHORTEST_TOKEN = 16
_FILES = ("token_file", "tls_cert", "tls_key", "tls_ca")
_LONGEST_GREETING = 1024  # bytes that are read of somebody who has shown nothing yet
_NONCE = 32


@dataclass(frozen=True, kw_only=True)
class SocketConfig:
    """Where a worker listens, and what it shows and asks of others.

    Raises:
      ConfigError: It would listen beyond loopback without a token file, or half of a TLS pair is missing.
    """

    host: str = "127.0.0.1"
    port: int = 0  # 0 for a free one
    advertise: str | None = None  # the host that peers are told, where it is another than `host`
    token_file: Path | None = None  # None, on loopback only: the user's own
    tls_cert: Path | None = None  # this worker's certificate; with it, every connection is TLS
    tls_key: Path | None = None
    tls_ca: Path | None = None  # certificates that peers are checked by; None: the system's
    patience: float = 10.0  # seconds that a peer may let us wait in the middle of something

    def __post_init__(self) -> None:
        if self.token_file is None and not is_loopback(self.host):
            raise ConfigError(
                f"host = {self.host!r} is not loopback: name a token_file, the same for all workers; make one with "
                f"`(umask 77; openssl rand -hex 32 > FILE)`"
            )
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ConfigError("tls_cert and tls_key go together; one of them is missing")
        if not 0 <= self.port < 65_536:
            raise ConfigError(f"port = {self.port}: allowed is 0 to 65535")
        if self.patience <= 0:
            raise ConfigError(f"patience = {self.patience}: allowed are seconds > 0")

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Reads an address, `tcp://host:port`; its query may have `advertise` and files: `token_file`, `tls_cert`, ...

        Raises:
          ConfigError: It is none, or asks for what is not known.
        """
        parts = urllib.parse.urlsplit(url)
        query = dict(urllib.parse.parse_qsl(parts.query, keep_blank_values=True))
        if parts.scheme != "tcp" or not parts.hostname:
            raise ConfigError(f"{url!r} is no address to listen at, such as tcp://127.0.0.1:5600")
        if unknown := sorted(query.keys() - {"advertise", *_FILES}):
            raise ConfigError(f"{url!r} asks for {', '.join(unknown)}; known are advertise, {', '.join(_FILES)}")
        try:
            port = parts.port or 0
        except ValueError as error:
            raise ConfigError(f"the port of {url!r} is none: {error}") from error
        files = {name: Path(query[name]) for name in _FILES if name in query}
        return cls(host=parts.hostname, port=port, advertise=query.get("advertise"), **files)  # type: ignore[arg-type]

    def token(self) -> bytes:
        """Returns the token.

        Raises:
          ConfigError: The file cannot be read, or holds none.
        """
        if self.token_file is None:
            return _read(_own_token())
        return _read(self.token_file)

    def server_tls(self) -> ssl.SSLContext | None:
        """Returns what connections are accepted with; None for none."""
        if self.tls_cert is None:
            return None
        with _files():
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.tls_ca)
            context.load_cert_chain(self.tls_cert, self.tls_key)
        if self.tls_ca is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def client_tls(self) -> ssl.SSLContext | None:
        """Returns what connections are made with; None for none."""
        if self.tls_cert is None:
            return None
        with _files():
            context = ssl.create_default_context(cafile=self.tls_ca)
            context.load_cert_chain(self.tls_cert, self.tls_key)
        return context


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches a host's address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Hello(Message, tag="hello", frozen=True):
    version: int
    name: str
    nonce: bytes


class _Challenge(Message, tag="challenge", frozen=True):
    nonce: bytes
    proof: bytes


class _Proof(Message, tag="proof", frozen=True):
    proof: bytes


_HELLO = msgspec.msgpack.Decoder(_Hello)
_CHALLENGE = msgspec.msgpack.Decoder(_Challenge | Refused)
_PROOF = msgspec.msgpack.Decoder(_Proof)
_WELCOME = msgspec.msgpack.Decoder(Done | Refused)


class _Said(NamedTuple):
    """What both proofs are of."""

    name: str
    client: bytes
    server: bytes

    def proof(self, token: bytes, role: str) -> bytes:
        fields = (role.encode(), self.name.encode(), self.client, self.server)
        return hmac.digest(token, b"".join(hashlib.sha256(part).digest() for part in fields), "sha256")


def greet(stream: Stream, token: bytes, name: str) -> None:
    """Shows a server that this end knows the token, and sees that the server does.

    Raises:
      TransferError: Either does not.
    """
    frames = Frames(stream, _LONGEST_GREETING)
    nonce = secrets.token_bytes(_NONCE)
    challenge: _Challenge = frames.ask(_Hello(PROTOCOL_VERSION, name, nonce), _CHALLENGE)
    said = _Said(name, nonce, challenge.nonce)
    if not hmac.compare_digest(challenge.proof, said.proof(token, "server")):
        raise TransferError("the peer does not know this worker's token; all workers are given the same")
    frames.ask(_Proof(said.proof(token, "client")), _WELCOME)


def welcome(stream: Stream, token: bytes) -> str:
    """Sees that a client knows the token, and returns the name it goes by.

    Raises:
      TransferError: It does not.
      FrameError: It speaks another language.
    """
    frames = Frames(stream, _LONGEST_GREETING)
    hello = frames.receive(_HELLO)
    if hello.version != PROTOCOL_VERSION or len(hello.nonce) != _NONCE:
        frames.send(Refused(f"version {PROTOCOL_VERSION} is spoken here"))
        raise FrameError(f"a peer speaks version {hello.version}; known is {PROTOCOL_VERSION}")
    said = _Said(hello.name, hello.nonce, secrets.token_bytes(_NONCE))
    frames.send(_Challenge(said.server, said.proof(token, "server")))
    shown = frames.receive(_PROOF).proof
    if not hmac.compare_digest(shown, said.proof(token, "client")):
        frames.send(Refused("the token is another"))
        raise TransferError(f"{hello.name!r} does not know this worker's token")
    frames.send(Done())
    return hello.name


def _read(path: Path) -> bytes:
    try:
        token = path.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"the token of workers: {path}: {error.strerror}") from error
    if len(token) < _SHORTEST_TOKEN:
        raise ConfigError(f"{path} holds {len(token)} bytes; a token has at least {_SHORTEST_TOKEN}")
    return token


def _own_token() -> Path:
    """Returns the file of this user's token; whoever comes first makes it, whole at once."""
    path = runtime_folder() / "transfer.token"
    if not path.exists():
        new = path.with_name(f"transfer.{secrets.token_hex(8)}")
        new.touch(mode=0o600)
        new.write_text(secrets.token_hex(32))
        with contextlib.suppress(FileExistsError):  # another process was faster: its token it is
            os.link(new, path)
        new.unlink()
    return path


@contextlib.contextmanager
def _files() -> Iterator[None]:
    try:
        yield
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"the TLS files of workers cannot be used: {error}") from error
