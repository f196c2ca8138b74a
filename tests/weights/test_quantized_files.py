"""Quantised files: what is written, that it is read back as it was, and every way its metadata can be wrong."""

from __future__ import annotations

import json
import mmap
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors

from gemma2_fast.errors import FileFormatError
from gemma2_fast.quant import FORMATS
from gemma2_fast.weights import writer
from gemma2_fast.weights.mapped_file import map_file
from gemma2_fast.weights.safetensors import read_safetensors, read_safetensors_directory
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import TensorSource, write_quantized
from tests.weights.quantized_files import ORIGIN, few_tensors, header_and_data, write_few, write_header

KEY = "gemma2_fast."


def test_the_metadata_says_what_a_reader_can_check(tmp_path: Path) -> None:
    header, data = header_and_data(write_few(tmp_path))
    assert header.pop("__metadata__") == {
        "gemma2_fast.format_version": "2",
        "gemma2_fast.quantization": "int4",
        "gemma2_fast.source": "google/gemma-2-2b, BF16",
        "gemma2_fast.tool_version": "0.1.0",
        "gemma2_fast.tensor.wide": "INT4_G32 65 33",
        "gemma2_fast.tensor.embed": "INT8_G128 3 130",
    }
    assert header == {
        "embed": {"dtype": "U8", "shape": [2 * 8320], "data_offsets": [0, 16640]},
        "wide": {"dtype": "U8", "shape": [2 * 4352], "data_offsets": [16640, 25344]},
        "long": {"dtype": "BF16", "shape": [32], "data_offsets": [25344, 25408]},
        "norm": {"dtype": "BF16", "shape": [5], "data_offsets": [25408, 25418]},
    }
    assert len(data) == 25418


def test_tensors_are_mapped_as_they_were_written(tmp_path: Path) -> None:
    path = write_few(tmp_path)
    file = read_safetensors(path)
    assert file.origin == ORIGIN
    for name, tensor in few_tensors().items():
        read = file.tensors[name]
        assert (read.shape, read.format) == (tensor.shape, tensor.format)
        assert np.array_equal(read.data, tensor.data)
        assert not read.data.flags.owndata
        assert read.data.ctypes.data % 64 == 0
    assert file.tensors["wide"].to_float32().shape == (65, 33)


def test_other_readers_see_bytes(tmp_path: Path) -> None:
    listed = dict(safetensors.deserialize(write_few(tmp_path).read_bytes()))
    assert {name: (t["dtype"], t["shape"]) for name, t in listed.items()} == {
        "wide": ("U8", [8704]),
        "embed": ("U8", [16640]),
        "norm": ("BF16", [5]),
        "long": ("BF16", [32]),
    }
    assert bytes(listed["wide"]["data"]) == few_tensors()["wide"].data.tobytes()


def test_shards_have_an_index_and_one_large_tensor_each(tmp_path: Path) -> None:
    write_few(tmp_path, shard_bytes=9000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    first, second, third = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3))
    assert index == {
        "metadata": {"total_size": 25418},
        "weight_map": {"norm": first, "wide": first, "embed": second, "long": third},
    }
    stored = read_safetensors_directory(tmp_path)
    assert stored.origin == ORIGIN
    assert {name: t.data.tobytes() for name, t in stored.tensors.items()} == {
        name: t.data.tobytes() for name, t in few_tensors().items()
    }


def test_shards_of_different_models_are_refused(tmp_path: Path) -> None:
    write_few(tmp_path, shard_bytes=9000)
    path = tmp_path / "model-00002-of-00003.safetensors"
    header, data = header_and_data(path)
    header["__metadata__"][KEY + "source"] = "another"
    write_header(path, header, data)
    with pytest.raises(FileFormatError, match="model-00001-of.* and model-00002-of.* different quantisations"):
        read_safetensors_directory(tmp_path)


def test_only_whole_known_tensors_are_written(tmp_path: Path) -> None:
    gguf = Tensor((1, 32), FORMATS["Q8_0"], np.zeros(34, dtype=np.uint8))
    with pytest.raises(FileFormatError, match=r"tensor 'q' \(Q8_0\)"):
        write_quantized(tmp_path, {"q": TensorSource.of(gguf)}, ORIGIN)
    short = TensorSource((4,), FORMATS["F32"], lambda: [np.zeros(15, np.uint8)])
    with pytest.raises(FileFormatError, match="'w' of .* takes 16 bytes, its pieces have 15"):
        write_quantized(tmp_path, {"w": short}, ORIGIN)
    with pytest.raises(FileFormatError, match="may be called '__metadata__'"):
        write_quantized(tmp_path, {"__metadata__": TensorSource.of(few_tensors()["norm"])}, ORIGIN)


def said_of_mapping(path: Path, key: str) -> list[str]:
    """What the system says under a key of the process's mapping of the file."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match("[0-9a-f]+-", line):
            found = line.endswith(str(path))
        elif found and line.startswith(key + ":"):
            return line.split()[1:]
    raise AssertionError(f"{path} is not mapped")


def pmd_mapped_bytes(path: Path) -> int:
    """What of a mapping of the file, every page touched, lies on huge pages."""
    mapped = map_file(path, "any")
    assert mapped[:: mmap.PAGESIZE].sum() > 0
    return int(said_of_mapping(path, "FilePmdMapped")[0]) << 10


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="this system has no huge pages")
def test_a_mapping_asks_for_huge_pages(tmp_path: Path) -> None:
    """Which matters when the file comes from the disk: that cannot be had here, so only the request is looked at."""
    path = tmp_path / "file"
    path.write_bytes(bytes(8 << 20))
    mapped = map_file(path, "any")
    assert "hg" in said_of_mapping(path, "VmFlags")
    assert mapped.size == 8 << 20


def test_large_tensors_are_written_so_that_they_are_mapped_on_huge_pages(tmp_path: Path) -> None:
    data = np.random.default_rng(0).integers(1, 255, 48 << 20, np.uint8)
    pieces = [data[first : first + 3_000_001] for first in range(0, data.size, 3_000_001)]
    source = TensorSource((data.size // 4,), FORMATS["F32"], lambda: pieces)
    write_quantized(tmp_path, {"w": source}, ORIGIN)
    path = tmp_path / "model.safetensors"
    assert np.array_equal(read_safetensors(path).tensors["w"].data, data)
    if sys.platform == "linux":  # as many as of a file written in the way that suits this system best, here none maybe
        best = tmp_path / "best"
        with best.open("wb", buffering=0) as file:
            for first in range(0, data.size, 4 << 20):
                file.write(data[first : first + (4 << 20)])
        assert pmd_mapped_bytes(path) >= pmd_mapped_bytes(best) // 2


def test_pieces_are_joined_to_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "WRITE_BYTES", 4)
    pieces = [b"abcdefghi", b"", b"j", b"klm"]
    assert [bytes(block) for block in writer._joined(pieces)] == [b"abcd", b"efgh", b"ijkl", b"m"]


def change(**metadata: str | None) -> Callable[[dict[str, Any]], None]:
    """Sets or removes keys of our metadata; `tensor_x` stands for `tensor.x`."""

    def apply(header: dict[str, Any]) -> None:
        for name, value in metadata.items():
            key = KEY + name.replace("tensor_", "tensor.")
            if value is None:
                del header["__metadata__"][key]
            else:
                header["__metadata__"][key] = value

    return apply


def replace_entry(name: str, **fields: object) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].update(fields)


def rename(old: str, new: str) -> Callable[[dict[str, Any]], None]:
    return lambda header: header.update({new: header.pop(old)})


REFUSED: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "newer version": (
        change(format_version="3", tool_version="9.1"),
        "format version 3, written by gemma2-fast '9.1'; this gemma2-fast reads version 2: upgrade it",
    ),
    "older version": (
        change(format_version="1"),
        "format version 1, written by gemma2-fast '0.1.0'; this gemma2-fast reads version 2: quantise the model again",
    ),
    "no version": (change(format_version=None), "format_version must be a number, got None"),
    "version in words": (change(format_version="one"), "format_version must be a number, got 'one'"),
    "newer without its tool": (change(format_version="3", tool_version=None), "written by gemma2-fast 'unknown'"),
    "no source": (change(source=None), r"lacks \['gemma2_fast.source'\]"),
    "unknown key": (change(colour="red"), r"has the unknown \['gemma2_fast.colour'\]"),
    "unknown format": (
        change(tensor_wide="INT3_G64 65 33"),
        "'gemma2_fast.tensor.wide' names the unknown format 'INT3_G64'; known are INT8_G128, INT4_G32",
    ),
    "format without strips": (change(tensor_wide="Q8_0 65 33"), "the unknown format 'Q8_0'"),
    "no shape": (change(tensor_wide="INT4_G32"), "must be a format and two dimensions.* got 'INT4_G32'"),
    "three dimensions": (change(tensor_wide="INT4_G32 5 13 33"), "must be a format and two dimensions"),
    "negative dimension": (change(tensor_wide="INT4_G32 -65 33"), "must be a format and two dimensions"),
    "no rows": (change(tensor_wide="INT4_G32 0 33"), "must be a format and two dimensions"),
    "arabic digits": (change(tensor_wide="INT4_G32 ٦٥ 33"), "must be a format and two dimensions"),
    "beyond any matrix": (change(tensor_wide="INT4_G32 99999999 33"), "99999999 x 33 is beyond any matrix"),
    "beyond any number": (change(tensor_wide=f"INT4_G32 {'9' * 30} 33"), "must be a format and two dimensions"),
    "absent tensor": (change(tensor_ghost="INT8_G128 64 128"), "lists tensors that it does not hold: 'ghost'"),
    "renamed tensor": (rename("wide", "other"), "lists tensors that it does not hold: 'wide'"),
    "other rows": (
        change(tensor_wide="INT4_G32 64 33"),
        r"'wide': INT4_G32 of shape \(64, 33\) takes U8 \(4352,\), the file holds 'U8' \(8704,\)",
    ),
    "other format": (change(tensor_wide="INT8_G128 65 33"), r"takes U8 \(16640,\), the file holds 'U8' \(8704,\)"),
    "bytes of two dimensions": (replace_entry("wide", shape=[2, 4352]), r"the file holds 'U8' \(2, 4352\)"),
    "floats instead of bytes": (replace_entry("wide", dtype="F32", shape=[2176]), r"the file holds 'F32' \(2176,\)"),
    "bytes without a format": (change(tensor_wide=None), r"unsupported dtypes: 'wide' \('U8'\)"),
    "offsets past the end": (replace_entry("wide", data_offsets=[16640, 25345]), "takes 8704 bytes.*give 8705"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, tmp_path: Path) -> None:
    damage, message = REFUSED[case]
    path = write_few(tmp_path)
    header, data = header_and_data(path)
    damage(header)
    write_header(path, header, data)
    with pytest.raises(FileFormatError, match=message) as caught:
        read_safetensors(path)
    assert "model.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("num_bytes", [4, 100, 3000, 20000, -1])
def test_truncated_files_are_refused(num_bytes: int, tmp_path: Path) -> None:
    path = write_few(tmp_path)
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(FileFormatError, match="truncated|a header length takes 8"):
        read_safetensors(path)


def test_long_values_give_short_messages(tmp_path: Path) -> None:
    path = write_few(tmp_path)
    for field in ("format_version", "tensor_wide", "x" * 10**6):
        header, data = header_and_data(path)
        change(**{field: "9" * 10**6})(header)
        write_header(tmp_path / "long.safetensors", header, data)
        with pytest.raises(FileFormatError) as caught:
            read_safetensors(tmp_path / "long.safetensors")
        assert len(str(caught.value)) < 1000
