"""What `nsc` makes, made by hand: an operator, an account with JetStream, and users, as a NATS server trusts them."""

import base64
import hashlib
import json
import os
import time

import nkeys


def pair(kind=nkeys.PREFIX_BYTE_USER):
    """A new seed, and its public key as text."""
    seed = nkeys.encode_seed(os.urandom(32), kind)
    return seed, nkeys.from_seed(seed).public_key.decode()


def _coded(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def token(seed, subject, kind, times=None, **nats):
    """A JSON Web Token about a public key, signed by the owner of a seed."""
    signer = nkeys.from_seed(seed)
    claims = {"iat": int(time.time()), "iss": signer.public_key.decode(), "name": kind, "sub": subject}
    claims |= times or {}
    claims["nats"] = {"type": kind, "version": 2, **nats}
    claims["jti"] = base64.b32encode(hashlib.sha256(json.dumps(claims).encode()).digest()).rstrip(b"=").decode()
    parts = [_coded(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, claims)]
    text = ".".join(parts)
    return f"{text}.{_coded(signer.sign(text.encode()))}"


class Operator:
    """An operator with one account; `settings` is what a server is told of them."""

    def __init__(self):
        seed, public = pair(nkeys.PREFIX_BYTE_OPERATOR)
        _, system = pair(nkeys.PREFIX_BYTE_ACCOUNT)
        self._account, account = pair(nkeys.PREFIX_BYTE_ACCOUNT)
        limits = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf"), -1)
        stored = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)
        accounts = {
            account: token(seed, account, "account", limits=limits | stored | {"wildcards": True}),
            system: token(seed, system, "account", limits=limits),
        }
        self.settings = [
            f"operator: {token(seed, public, 'operator')}",
            f"system_account: {system}",
            "resolver: MEMORY",
            "resolver_preload: {",
            *(f"  {name}: {told}" for name, told in accounts.items()),
            "}",
        ]

    def credentials(self, times=None, **nats):
        """The text of a new user's file; `times` such as {"exp": seconds}."""
        seed, public = pair()
        limits = {"subs": -1, "data": -1, "payload": -1}
        told = token(self._account, public, "user", times, **limits | nats)
        return (
            f"-----BEGIN NATS USER JWT-----\n{told}\n------END NATS USER JWT------\n\n"
            f"-----BEGIN USER NKEY SEED-----\n{seed.decode()}\n------END USER NKEY SEED------\n"
        )
