import json
import time

import numpy as np
import pytest

from kvbm_jax.cli import main
from kvbm_jax.identity import CacheIdentity
from kvbm_jax.layout import KVLayout
from kvbm_jax.offload.segments import SegmentBlockStore
from kvbm_jax.protocols import BlockKey, BlockRecord

P = 3000
IDENTITY = CacheIdentity.of(KVLayout(1, 4, 4, 1, 6, "uint8"), model_id="toy", hash_algorithm="blake3")


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "tier"
    store = SegmentBlockStore(path, P, identity=IDENTITY, capacity_bytes=1 << 24, clock=time)
    for numbers in ((0, 1), (2,)):
        records = [BlockRecord(BlockKey(n.to_bytes(16, "little")), None, (n,)) for n in numbers]
        rows = np.random.default_rng(numbers).integers(0, 256, (len(numbers), P), np.uint8)
        store.put(records, rows).result(30)
    store.close()
    return path


def call(capsys, *argv):
    status = main(["inspect", *map(str, argv)])
    return status, capsys.readouterr().out


def flip(segment):
    """Flips a byte in the middle of the largest file, where the blocks are."""
    largest = max((f for f in segment.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[1000] ^= 1
    largest.write_bytes(data)


def test_segments_are_listed(folder, capsys):
    status, out = call(capsys, folder)
    assert status == 0
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [
        ["seg-000000000000", "ok", "2"],
        ["seg-000000000001", "ok", "1"],
    ]
    assert f"{IDENTITY.fingerprint.hex()[:12]} toy" in out


@pytest.mark.parametrize("verify", [False, True])
def test_as_json(folder, capsys, verify):
    status, out = call(capsys, folder, "--json", *["--verify"] * verify)
    data = json.loads(out.splitlines()[-1])
    assert status == 0
    assert data["ok"]
    assert (data["blocks"], data["live_bytes"], data["unreadable"]) == (3, 3 * P, 0)
    assert data["corrupt_blocks"] == (0 if verify else None)
    assert [s["corrupt_blocks"] for s in data["segments"]] == [0 if verify else None] * 2
    assert data["segments"][0]["identity"]["model_id"] == "toy"
    assert data["segments"][0]["fingerprint"] == IDENTITY.fingerprint.hex()


def test_a_corrupt_block_is_found_by_verifying(folder, capsys):
    flip(folder / "seg-000000000000")
    assert call(capsys, folder)[0] == 0
    status, out = call(capsys, folder, "--verify", "--json")
    data = json.loads(out.splitlines()[-1])
    assert status == 1
    assert not data["ok"]
    assert data["corrupt_blocks"] >= 1
    assert [s["status"] for s in data["segments"]] == ["corrupt", "ok"]
    status, out = call(capsys, folder, "--verify")
    assert status == 1
    assert "corrupt blocks" in out


def test_an_unreadable_segment_is_told(folder, capsys):
    (folder / "seg-000000000000" / "manifest.ocdbt").unlink()
    status, out = call(capsys, folder)
    assert status == 1
    assert "seg-000000000000    unreadable" in out


def test_an_empty_folder_and_one_that_is_not_there(tmp_path, capsys):
    assert call(capsys, tmp_path) == (0, f"no segments in {tmp_path}\n")
    assert main(["inspect", str(tmp_path / "nowhere")]) == 1
    assert "No such file or directory" in capsys.readouterr().err
