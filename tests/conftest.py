"""What holds for every test: CPU unless a GPU run is asked for, strict rank promotion, no deadlines."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

GPU_SKIPS = pytest.StashKey[list[str]]()


def _asks_for_gpu(config: pytest.Config) -> bool:
    """True for a marker expression that selects tests marked `gpu`: `-m gpu`, `-m "gpu and not long"`."""
    words = str(config.option.markexpr).replace("(", " ").replace(")", " ").split()
    return any(word == "gpu" and (i == 0 or words[i - 1] != "not") for i, word in enumerate(words))


def pytest_configure(config: pytest.Config) -> None:
    if not _asks_for_gpu(config):
        os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported, and for the processes that tests start
    if config.cache is not None:
        # Compilation is most of what tests do, and the next run, or the next module, compiles the same programs.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(config.cache.mkdir("jax"))
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
    import jax

    jax.config.update("jax_numpy_rank_promotion", "raise")
    hypothesis.settings.register_profile("local", deadline=None)
    hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")
    config.stash[GPU_SKIPS] = []


def has_gpu() -> bool:
    """True if jax, as this run has configured it, drives an NVIDIA GPU."""
    import jax

    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Notes which tests want hardware; runs before `-m` deselects, so the sentinel can report those too."""
    config.stash[GPU_SKIPS] = [item.nodeid for item in items if item.get_closest_marker("gpu")]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not has_gpu():
        pytest.skip("needs an NVIDIA GPU, and jax finds none")


@pytest.fixture(scope="module", autouse=True)
def _programs_are_forgotten() -> Iterator[None]:
    """Lets compiled programs go before they are too many.

    Each takes several of the memory mappings that Linux allows a process, 65,530 by default; at the limit it crashes.
    """
    yield
    import jax

    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 20_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def tests_wanting_a_gpu(pytestconfig: pytest.Config) -> list[str]:
    """Node ids of the collected tests marked `gpu`, deselected ones included."""
    return pytestconfig.stash[GPU_SKIPS]


@pytest.fixture(scope="session")
def gpu_is_here() -> bool:
    return has_gpu()


@pytest.fixture
def workers(tmp_path, monkeypatch):
    """Makes workers that know each other; each hears those that were made before it."""
    from tiered import make  # it imports jax

    from kvbm_jax.peers import PeerNetwork
    from kvbm_jax.transfer.folder_discovery import FolderDiscovery

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with contextlib.ExitStack() as opened:
        made = []

        def work(**options):
            network = PeerNetwork(
                discovery=FolderDiscovery(tmp_path / "workers", ttl=3.0, heartbeat=0.05),
                events=[other.subscribe_events() for other in made],
                engine="tcp",
                **options.pop("network", {}),
            )
            values = {"enable_offload": True, "disk_budget": 0, "host_blocks": 32, "model_id": "tiny"}
            worker = make(network=network, worker_id=f"w{len(made)}", **(values | options))
            opened.callback(worker.close, 0)
            made.append(worker)
            return worker

        yield work
