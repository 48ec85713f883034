"""The wheel alone in an empty environment: what a user gets, with nothing of this checkout in reach."""

import json
import os
import shutil
import subprocess
import sys

import pytest

import kvbm_jax

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

PROBE = """
import pathlib, kvbm_jax
root = pathlib.Path(kvbm_jax.__file__).parent
print(kvbm_jax.__version__, (root / "py.typed").exists(), root)
"""


def run(*argv, cwd, **env):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(argv, cwd=cwd, env=clean | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory, pytestconfig):
    """The bin folder of an environment that holds the wheel and what it asks for."""
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not on PATH, and this test builds and installs with it")
    folder = tmp_path_factory.mktemp("wheel")
    run(uv, "build", "--wheel", "--out-dir", folder, cwd=pytestconfig.rootpath)
    (wheel,) = folder.glob("kvbm_jax-*.whl")
    run(uv, "venv", "--python", sys.executable, folder / "env", cwd=folder)
    run(uv, "pip", "install", "--python", folder / "env/bin/python", wheel, cwd=folder)
    return folder / "env/bin"


def test_it_imports(empty_environment, tmp_path):
    version, typed, root = run(empty_environment / "python", "-W", "error", "-c", PROBE, cwd=tmp_path).split()
    assert version == kvbm_jax.__version__
    assert typed == "True"
    assert root.startswith(str(empty_environment.parent))


def test_every_module_imports_with_the_base_dependencies_or_names_the_extra(empty_environment, tmp_path):
    probe = (
        "import importlib, pkgutil, kvbm_jax.errors\n"
        "names = [m.name for m in pkgutil.walk_packages(kvbm_jax.__path__, 'kvbm_jax.')]\n"
        "for name in names:\n"
        "    if name == 'kvbm_jax.__main__': continue\n"
        "    try: importlib.import_module(name)\n"
        "    except kvbm_jax.errors.MissingDependencyError as error: print(name.split('.')[1], error)\n"
        "print(len(names))\n"
    )
    *refused, count = run(empty_environment / "python", "-W", "error", "-c", probe, cwd=tmp_path).splitlines()
    assert int(count) > 100
    assert {line.split()[0] for line in refused} == {"bench", "monitoring", "transfer", "transports"}
    assert all("pip install 'kvbm-jax[" in line for line in refused)


def test_the_doctor_runs_and_finds_no_extra(empty_environment, tmp_path):
    found = json.loads(run(empty_environment / "kvbm-jax", "doctor", "--json", cwd=tmp_path).splitlines()[-1])
    assert found["ok"]
    assert found["packages"]["jax"]
    assert found["packages"]["flax"] is found["packages"]["zmq"] is found["packages"]["nixl"] is None


def test_it_replays_a_trace(empty_environment, tmp_path):
    (tmp_path / "trace.jsonl").write_text('{"hash_ids": [1, 2]}\n{"hash_ids": [1, 2]}\n')
    out = run(empty_environment / "kvbm-jax", "replay", "trace.jsonl", "--num-blocks", "4", "--json", cwd=tmp_path)
    assert json.loads(out.splitlines()[-1])["hits"]["g1"] == 2
