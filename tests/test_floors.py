"""The floors of the design, enforced: a file imports only its own floor and lower; floor 0 is pure."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import kvbm_jax

pytestmark = pytest.mark.core

PACKAGE = pathlib.Path(kvbm_jax.__file__).parent
FACADE = ""

# First part of a module's name within the package: a package stands for all files in it.
FLOORS = {
    0: [
        "errors",
        "protocols",
        "types",
        "layout",
        "pool",
        "lru",
        "index",
        "ordering",
        "groups",
        "sequences",
        "grants",
        "resize",
        "policies",
        "quotas",
        "quota_policy",
        "bits",
        "padding",
        "selection",
        "sketch",
        "invariants",
    ],
    1: ["kernels", "cache", "attention", "step", "quota_step"],
    2: [
        "addresses",
        "closing",
        "hashing",
        "identity",
        "config",
        "events",
        "eviction",
        "extensions",
        "extras",
        "logs",
        "metrics",
        "runtime_folder",
        "tenants",
    ],
    3: ["offload", "transfer"],
    4: [
        "admission",
        "agreement",
        "block_pool",
        "calls",
        "event_flow",
        "handles",
        "interrupts",
        "ledger",
        "loops",
        "loose_blocks",
        "manager",
        "migration",
        "outcomes",
        "peers",
        "programs",
        "progress",
        "reblock",
        "residency",
        "resize_plan",
        "request_log",
        "roster",
        "device_cache",
        "device_tier",
        "sizing",
        "tenancy",
        "tiers",
        "turns",
        "upkeep",
        "connector",
        "snapshot",
        "controller",
        "replay",
        "traces",
    ],
    5: ["bench", "cli", "flax", "monitoring", "transports", "__main__"],
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
IMPURE = {"asyncio", "concurrent", "io", "logging", "os", "pathlib", "socket", "threading", "time"}
OPTIONAL = {
    "opentelemetry",
    "flax",
    "google",
    "matplotlib",
    "nats",
    "nixl",
    "nixl_cu12",
    "nixl_cu13",
    "orbax",
    "prometheus_client",
    "zmq",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file):
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor_of(module):
    """Floor of a module named within the package, or None if the table does not know it."""
    return FLOOR_OF.get(module.split(".")[0])


def imports_of(file):
    """Absolute names of the modules that a file imports, anywhere in it."""
    module = module_of(file)
    here = ["kvbm_jax", *module.split(".")] if module else ["kvbm_jax"]
    if file.name != "__init__.py":
        here = here[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) - node.level + 1]) if node.level else ""
            source = ".".join(part for part in (base, node.module) if part)
            if source == "kvbm_jax":
                yield from (f"kvbm_jax.{alias.name}" for alias in node.names)
            else:
                yield source


@pytest.mark.parametrize("file", FILES, ids=lambda file: module_of(file) or "kvbm_jax")
def test_imports_go_down(file):
    module = module_of(file)
    if module == FACADE:
        return
    floor = floor_of(module)
    assert floor is not None, f"{file.name}: module {module!r} stands on no floor; add it to FLOORS"
    for name in imports_of(file):
        root, _, within = name.partition(".")
        if root == "kvbm_jax":
            target = floor_of(within)
            if target is None:
                # The façade itself: what it re-exports has a floor of its own and is imported from there.
                allowed = within == "__version__" and floor == 5
                assert allowed, f"{module} imports {name}, which stands on no floor"
            else:
                assert target <= floor, f"{module} (floor {floor}) imports {name} (floor {target})"
        assert floor > 0 or root not in IMPURE, f"{module} is of floor 0 and imports {name}"
        assert floor > 1 or root not in {"blake3", "msgspec", "xxhash"}, f"{module} imports {name}"
        assert floor > 2 or root not in OPTIONAL, f"{module} (floor {floor}) imports {name}, an extra"


def test_every_floor_name_is_told_once():
    names = [name for names in FLOORS.values() for name in names]
    assert len(names) == len(set(names))


PROBE = """
import json, sys, threading
import kvbm_jax
backends = getattr(sys.modules.get("jax._src.xla_bridge"), "_backends", {})
print(json.dumps({"modules": sorted({name.split(".")[0] for name in sys.modules}),
                  "threads": threading.active_count(), "backends": len(backends)}))
"""


def test_importing_the_package_is_light_and_silent():
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE], capture_output=True, text=True, check=True, timeout=120
    )
    first, *rest = done.stdout.splitlines()
    assert not rest, "the import printed something"
    assert not done.stderr
    found = json.loads(first)
    assert not OPTIONAL & set(found["modules"])
    assert found["threads"] == 1
    assert found["backends"] == 0
