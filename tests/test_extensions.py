"""Parts of another package, found by its entry points and used by name: one of each kind, in a manager that serves."""

import importlib
import importlib.metadata
import logging
import pathlib
import tomllib

import pytest

from kvbm_jax import KvBlockManagerConfig, eviction, extensions
from kvbm_jax.errors import ConfigError
from kvbm_jax.events import outlets
from kvbm_jax.protocols import Tier
from tests.tiered import disk, make, prompt, serve, settle

PACKAGE = pathlib.Path(__file__).parent / "extension"
DOCUMENT = pathlib.Path(extensions.__file__).parent.parent / "docs" / "extensions.md"
KINDS = [
    eviction.KIND,
    extensions.HOST_ALLOCATORS,
    extensions.BLOCK_STORES,
    extensions.OFFLOAD_POLICIES,
    outlets.KIND,
]


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch):
    """The package, with the metadata that installing it would write; returns its module."""
    project = tomllib.loads((PACKAGE / "pyproject.toml").read_text())["project"]
    about = tmp_path / "kvbm_extension-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    groups = [
        "\n".join([f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())])
        for group, entries in project["entry-points"].items()
    ]
    (about / "entry_points.txt").write_text("\n".join(groups) + "\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(PACKAGE)
    importlib.metadata.MetadataPathFinder.invalidate_caches()
    module = importlib.import_module("kvbm_extension")
    module.SINKS.clear()
    module.ALLOCATORS.clear()
    return module


def test_a_manager_of_other_peoples_parts_serves(tmp_path, package):
    parts = {
        "eviction_policy": "newest_first",
        "host_allocator": "counted",
        "disk_store": "shelf",
        "events": "list",
        "events_url": "anything at all",
        "worker_id": "w",
    }
    with make(max_sequences=2, **disk(tmp_path / "unused", host_blocks=2, **parts)) as manager:
        [allocator], [sink] = package.ALLOCATORS, package.SINKS
        assert allocator.held == 2 * 4096
        assert (sink.worker_id, sink.url) == ("w", "anything at all")
        first, second = prompt(0, 3), prompt(100, 3)
        serve(manager, first)
        serve(manager, second)
        serve(manager, prompt(200, 5))
        # What was registered last went first, by way of host memory to the shelf.
        assert manager.match(first) > manager.match(second)
        settle(manager)
        assert manager.tier_stats()[Tier.G2].blocks == 2
        assert manager.tier_stats()[Tier.G3].blocks == 2
        found = serve(manager, second)
        assert found[Tier.G2] + found[Tier.G3] == 12 - found.get(Tier.G1, 0)
        assert sum(len(batch) for batch in sink.batches) > 10
    assert sink.closed
    assert allocator.held == 0
    assert not (tmp_path / "unused").exists()


def test_an_offload_policy_says_what_goes_down(tmp_path):
    with make(max_sequences=2, enable_offload=True, host_blocks=16, disk_budget=0, offload_policy="heads") as manager:
        events = manager.subscribe_events()
        serve(manager, prompt(0, 3))
        serve(manager, prompt(100, 7))
        settle(manager)
        assert manager.tier_stats()[Tier.G2].blocks == 1
        kinds = [event.event_type.value for batch in events.drain() for event in batch]
        assert (kinds.count("deleted"), kinds.count("migrated")) == (2, 1)
        assert serve(manager, prompt(0, 3)) == {Tier.G2: 4}


def test_an_offload_policy_that_breaks_is_logged_and_loses_nothing(tmp_path, caplog):
    with make(max_sequences=2, enable_offload=True, host_blocks=16, disk_budget=0, offload_policy="failing") as manager:
        serve(manager, prompt(0, 3))
        with caplog.at_level(logging.ERROR, "kvbm_jax"):
            serve(manager, prompt(100, 7))
        settle(manager)
        assert "the offload policy failed on 3 blocks" in caplog.text
        assert serve(manager, prompt(0, 3)) == {Tier.G2: 12}


@pytest.mark.parametrize(
    ("key", "name", "message"),
    [
        (
            "host_allocator",
            "conted",
            r"no host allocator; choose from anonymous, huge_pages, counted, lacking \(the near",
        ),
        ("disk_store", "tape", "'tape' is no disk store; choose from segments, shelf"),
        ("offload_policy", "never", "'never' is no offload policy; choose from always, absent, failing, heads, unmade"),
        ("eviction_policy", "newest", r"no eviction policy; choose from lru, .*\(the nearest is 'newest_first'\)"),
        ("events", "kafka", "'kafka' is no event transport; choose from inproc, nats, zmq, none, list"),
    ],
)
def test_a_part_that_nobody_offers_is_refused_with_the_names_of_those_there_are(key, name, message):
    with pytest.raises(ConfigError, match=message):
        KvBlockManagerConfig(**{key: name})


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"host_allocator": "lacking"}, r"the host allocator 'lacking' \(.*\) is a Lacking without allocate, release"),
        ({"offload_policy": "unmade"}, r"the offload policy 'unmade' \(.*\) cannot be loaded: no such file"),
        ({"offload_policy": "absent"}, r"the offload policy 'absent' \(.*\) cannot be loaded: .*no attribute 'absent'"),
    ],
)
def test_a_part_that_cannot_be_had_is_an_error_of_the_configuration(parts, message):
    with pytest.raises(ConfigError, match=message):
        make(max_sequences=2, enable_offload=True, host_blocks=2, disk_budget=0, **parts)


def test_built_in_names_cannot_be_taken_over():
    with make(max_sequences=2, enable_offload=True, host_blocks=16, disk_budget=0) as manager:
        assert manager._device.residency._engine._policy is None


def test_every_kind_is_documented():
    for text in (DOCUMENT.read_text(), extensions.__doc__):
        for kind in KINDS:
            assert f"`{kind.group}`" in text
    fields = KvBlockManagerConfig.json_schema()["properties"]
    for key in ("eviction_policy", "host_allocator", "disk_store", "offload_policy", "events"):
        assert f"`{key}`" in DOCUMENT.read_text()
        assert "a package offers" in fields[key]["description"]
