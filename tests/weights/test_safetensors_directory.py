"""Checkpoints of one or many safetensors files, and every way an index can be wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from gemma2_fast.errors import FileFormatError
from gemma2_fast.weights.safetensors import read_safetensors_directory
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import write_safetensors

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def scalar(value: float) -> Tensor:
    return Tensor.from_float32(np.array([value], dtype=np.float32))


def write_index(directory: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 12}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Tensors a and b in the first shard, c in the second."""
    directory = tmp_path / "checkpoint"
    directory.mkdir()
    write_safetensors(directory / FIRST, {"a": scalar(1), "b": scalar(2)})
    write_safetensors(directory / SECOND, {"c": scalar(3)})
    write_index(directory, {"a": FIRST, "b": FIRST, "c": SECOND})
    return directory


def values(directory: Path) -> dict[str, float]:
    return {name: t.to_float32().item() for name, t in read_safetensors_directory(directory).tensors.items()}


def test_reads_one_file(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"a": scalar(1)})
    assert values(tmp_path) == {"a": 1}


def test_reads_shards(sharded: Path) -> None:
    assert values(sharded) == {"a": 1, "b": 2, "c": 3}


def test_one_file_goes_before_an_index(sharded: Path) -> None:
    write_safetensors(sharded / "model.safetensors", {"whole": scalar(9)})
    assert values(sharded) == {"whole": 9}


def test_follows_the_links_of_a_hub_cache(sharded: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    blobs = tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sharded.iterdir()):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    assert values(snapshot) == {"a": 1, "b": 2, "c": 3}
    (snapshot / "model.safetensors").symlink_to("../../blobs/gone")
    with pytest.raises(FileNotFoundError):
        values(snapshot)


@pytest.mark.parametrize(
    "shard",
    [
        "../checkpoint/" + FIRST,
        "../../etc/passwd",
        "/etc/passwd.safetensors",
        "sub/" + FIRST,
        "..\\" + FIRST,
        ".safetensors",
        "model.bin",
        "a\0.safetensors",
        "a\n.safetensors",
        "n" * 300 + ".safetensors",
        "",
        None,
        7,
        [FIRST],
    ],
)
def test_refuses_a_shard_that_is_not_a_plain_name(shard: object, sharded: Path) -> None:
    write_index(sharded, {"a": shard, "b": FIRST, "c": SECOND})
    with pytest.raises(FileFormatError, match=r"tensor 'a' lies in .*; expected the plain name of a .safetensors file"):
        values(sharded)


def test_names_every_missing_shard(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "x": "x.safetensors", "y": "y.safetensors"})
    with pytest.raises(
        FileFormatError, match=r"names 2 of 3 shards that are not beside it: x\.safetensors, y\.safetensors"
    ):
        values(sharded)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": FIRST, "b": SECOND, "c": SECOND}, f"holds tensor 'b', but .* expects it in {SECOND}"),
        ({"a": FIRST, "c": SECOND}, "holds tensor 'b', but model.safetensors.index.json does not list it"),
        ({"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND}, rf"their shards do not hold: 'd' \({SECOND}\)"),
        ({}, "weight_map must map tensor names to file names, got {}"),
        (None, "weight_map must map tensor names to file names, got None"),
        (["a"], "weight_map must map tensor names to file names"),
    ],
)
def test_index_and_shards_must_agree(weight_map: object, message: str, sharded: Path) -> None:
    write_index(sharded, weight_map)
    with pytest.raises(FileFormatError, match=message):
        values(sharded)


def test_refuses_a_tensor_in_two_shards(sharded: Path) -> None:
    write_safetensors(sharded / SECOND, {"b": scalar(4), "c": scalar(3)})
    with pytest.raises(FileFormatError, match=f"{SECOND} holds tensor 'b', but .* expects it in {FIRST}"):
        values(sharded)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is empty"),
        (b"[]", "expected a JSON object, got a list"),
        (b"{", "not JSON"),
        (b"\xff", "not UTF-8 at byte 0"),
        (b'{"weight_map": {"a": "a.safetensors", "a": "b.safetensors"}}', "the key 'a' stands there twice"),
        (b'{"metadata": {}}', "weight_map must map"),
    ],
)
def test_refuses_an_index_that_is_no_index(text: bytes, message: str, sharded: Path) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(text)
    with pytest.raises(FileFormatError, match=message) as caught:
        values(sharded)
    assert "model.safetensors.index.json" in str(caught.value)


def test_a_directory_without_weights_says_what_it_holds(tmp_path: Path) -> None:
    message = "holds neither model.safetensors nor model.safetensors.index.json"
    with pytest.raises(FileFormatError, match=f"{message}; download"):
        values(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "config.json").touch()
    with pytest.raises(FileFormatError, match=f"{message}; it does hold pytorch_model.bin$"):
        values(tmp_path)
    with pytest.raises(FileNotFoundError):
        values(tmp_path / "absent")
