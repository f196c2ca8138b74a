"""The safetensors reader: bytes by hand, the safetensors library as oracle, and every way a file can be wrong."""

from __future__ import annotations

import json
import os
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from gemma2_fast.errors import FileFormatError
from gemma2_fast.quant import FORMATS
from gemma2_fast.weights.safetensors import MAX_HEADER_BYTES, read_safetensors
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import write_safetensors


def file_bytes(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(dtype: str, shape: object, begin: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_bytes_a_reader_can_check(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "b": entry("BF16", [2, 1], 4, 8), "a": entry("F32", [1], 0, 4)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(header, bytes.fromhex("0000c03f803f00c0")))
    file = read_safetensors(path)
    assert file.metadata == {"format": "pt"}
    assert {name: (t.shape, t.format.name, t.to_float32().tolist()) for name, t in file.tensors.items()} == {
        "b": ((2, 1), "BF16", [[1.0], [-2.0]]),
        "a": ((1,), "F32", [1.5]),
    }


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "f32": rng.standard_normal((3, 5), dtype=np.float32),
        "f16": rng.standard_normal(7).astype(np.float16),
        "scalar": np.array(2.5, dtype=np.float32),
        "none": np.empty((0, 4), dtype=np.float32),
    }
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors", metadata={"über": "größe"})
    file = read_safetensors(tmp_path / "x.safetensors")
    assert file.metadata == {"über": "größe"}
    assert file.tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        assert file.tensors[name].shape == array.shape
        assert np.array_equal(file.tensors[name].to_float32(), array.astype(np.float32))


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pack = FORMATS["BF16"].pack
    assert pack is not None
    bfloat = Tensor((3, 3), FORMATS["BF16"], pack(rng.standard_normal((9, 1), dtype=np.float32)).reshape(-1))
    tensors = {
        "odd": bfloat,
        "wide": Tensor.from_float32(rng.standard_normal((2, 2), dtype=np.float32)),
        "empty": Tensor.from_float32(np.empty((2, 0), dtype=np.float32)),
    }
    path = tmp_path / "x.safetensors"
    write_safetensors(path, tensors, {"format": "pt"})
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.metadata() == {"format": "pt"}
        assert np.array_equal(file.get_tensor("wide"), tensors["wide"].to_float32())
        assert file.get_slice("odd").get_dtype() == "BF16"
    back = read_safetensors(path).tensors
    assert {name: (t.shape, t.format.name, t.data.tobytes()) for name, t in back.items()} == {
        name: (t.shape, t.format.name, t.data.tobytes()) for name, t in tensors.items()
    }
    assert back["wide"].data.ctypes.data % 4 == 0


def test_writing_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    quantised = Tensor((1, 32), FORMATS["Q8_0"], np.zeros(34, dtype=np.uint8))
    with pytest.raises(FileFormatError, match=r"tensor 'q' \(Q8_0\).*hold F32, F16, BF16"):
        write_safetensors(path, {"q": quantised})

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_safetensors(path, {"a": Tensor.from_float32(np.ones(3, dtype=np.float32))})
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("x.safetensors", b"old")]


def test_maps_the_file_without_copying(tmp_path: Path) -> None:
    path = tmp_path / "big.safetensors"
    header = file_bytes({"a": entry("F32", [1 << 26], 0, 1 << 28)})
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + (1 << 28))
    tracemalloc.start()
    try:
        tensor = read_safetensors(path).tensors["a"]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert tensor.num_bytes == 1 << 28
    assert not tensor.data.flags.writeable
    assert not tensor.data.flags.owndata
    path.unlink()
    assert tensor.data[-1] == 0  # the mapping outlives the file's name


TWO = {"a": entry("F32", [2], 0, 8), "b": entry("F32", [1], 8, 12)}
FLOAT = entry("F32", [1], 0, 4)

# What is wrong → the file, and the part of the message that says so.
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "shorter than a length": (b"\x02\0\0", "it has 3 bytes, a header length takes 8"),
    "not safetensors": (b"GGUF\x03\0\0\0" + bytes(64), "give a header of 14064895815 bytes"),
    "header too large": (
        (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}",
        "header of 100000001 bytes, the format allows 100000000",
    ),
    "header of 2^64 - 1": (b"\xff" * 8 + b"{}", "header of 18446744073709551615 bytes"),
    "truncated header": (file_bytes(TWO, bytes(12))[:40], "truncated: its header should have"),
    "no header": (bytes(8), "its header starts with b''"),
    "header of zeros": (file_bytes(bytes(16)), "its header starts with b'\\\\x00'"),
    "leading space": (file_bytes(b" {}"), "its header starts with b' '"),
    "array": (file_bytes(b"[]"), "its header starts with b'\\['"),
    "not JSON": (file_bytes(b"{no}"), "not JSON: Expecting property name"),
    "cut JSON": (file_bytes(b'{"a": '), "not JSON: Expecting value"),
    "two values": (file_bytes(b"{}{}"), "not JSON: Extra data"),
    "not UTF-8": (file_bytes(b'{"\xff":1}'), "not UTF-8 at byte 2"),
    "lone surrogate": (file_bytes(b'{"\\ud800":1}'), "not JSON: .*surrogates"),
    "NaN": (file_bytes(b'{"a": NaN}'), "NaN is not JSON"),
    "endless number": (file_bytes(b'{"a":' + b"9" * 5000 + b"}"), "not JSON: Exceeds the limit"),
    "nested": (file_bytes(b'{"a":' + b"[" * 100_000), "nested too deeply"),
    "name twice": (
        file_bytes(b'{"a":%s,"a":%s}' % ((json.dumps(FLOAT).encode(),) * 2), bytes(4)),
        "the key 'a' stands there twice",
    ),
    "dtype twice": (
        file_bytes(b'{"a":{"dtype":"F32","dtype":"F16","shape":[1],"data_offsets":[0,4]}}', bytes(4)),
        "the key 'dtype' stands there twice",
    ),
    "metadata not an object": (file_bytes({"__metadata__": ["pt"]}), r"__metadata__ must be an object, got \['pt'\]"),
    "metadata not text": (file_bytes({"__metadata__": {"step": 3}}), "'step' maps to 3"),
    "entry not an object": (file_bytes({"a": 3}), "'a' must have exactly dtype, shape and data_offsets, got 3"),
    "missing shape": (file_bytes({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)), "must have exactly dtype"),
    "unknown key": (file_bytes({"a": {**FLOAT, "stride": [1]}}, bytes(4)), "must have exactly dtype"),
    "dtype not text": (file_bytes({"a": {**FLOAT, "dtype": 4}}, bytes(4)), "dtype must be text, got 4"),
    "shape not a list": (file_bytes({"a": {**FLOAT, "shape": 1}}, bytes(4)), "shape must be a list of whole numbers"),
    "negative dimension": (file_bytes({"a": {**FLOAT, "shape": [-1]}}, bytes(4)), r"from 0 to .* got \[-1\]"),
    "fractional dimension": (file_bytes({"a": {**FLOAT, "shape": [1.0]}}, bytes(4)), r"got \[1.0\]"),
    "true as a dimension": (file_bytes({"a": {**FLOAT, "shape": [True]}}, bytes(4)), r"got \[True\]"),
    "dimension of 2^63": (file_bytes({"a": {**FLOAT, "shape": [1 << 63]}}, bytes(4)), "from 0 to 2\\^63 - 1"),
    "product of 2^64": (file_bytes({"a": entry("F32", [1 << 32, 1 << 32], 0, 0)}), "beyond any tensor"),
    "product of 2^64 + 1 weights": (
        file_bytes({"a": entry("F32", [274177, 67280421310721], 0, 4)}, bytes(4)),
        "beyond any tensor",
    ),
    "empty beside 2^62": (file_bytes({"a": entry("F32", [0, 1 << 62], 0, 0)}), "beyond any tensor"),
    "nine dimensions": (file_bytes({"a": entry("F32", [1] * 9, 0, 4)}, bytes(4)), "has 9 dimensions; at most 8"),
    "one offset": (
        file_bytes({"a": {**FLOAT, "data_offsets": [4]}}, bytes(4)),
        "must be \\[begin, end\\], got \\(4,\\)",
    ),
    "offsets turned round": (file_bytes({"a": entry("F32", [1], 4, 0)}, bytes(4)), r"data_offsets \[4, 0\] give -4"),
    "shape too large for its bytes": (file_bytes({"a": entry("F32", [2], 0, 4)}, bytes(4)), "takes 8 bytes.* give 4"),
    "dtype too large for its bytes": (file_bytes({"a": entry("F32", [2], 0, 4)}, bytes(4)), "takes 8 bytes"),
    "data cut": (file_bytes(TWO, bytes(11)), "'b' ends at byte 12 of the data, which has 11"),
    "data missing": (file_bytes(TWO), "'a' ends at byte 8 of the data, which has 0"),
    "offset near 2^63": (
        file_bytes({"a": entry("F32", [1], (1 << 63) - 5, (1 << 63) - 1)}, bytes(4)),
        "ends at byte 9223372036854775807",
    ),
    "trailing bytes": (file_bytes(TWO, bytes(13)), "has 1 bytes behind its last tensor"),
    "data without tensors": (file_bytes({}, bytes(4)), "has 4 bytes behind its last tensor"),
    "hole at the start": (file_bytes({"a": entry("F32", [1], 4, 8)}, bytes(8)), "'a' leaves a hole before it"),
    "hole between": (
        file_bytes({"a": FLOAT, "b": entry("F32", [1], 8, 12)}, bytes(12)),
        "'b' leaves a hole before it: it begins at byte 8 of the data, expected 4",
    ),
    "overlap": (file_bytes({"a": FLOAT, "b": entry("F32", [1], 2, 6)}, bytes(6)), "'b' overlaps the one before it"),
    "same bytes twice": (file_bytes({"a": FLOAT, "b": FLOAT}, bytes(4)), "'b' overlaps the one before it"),
    "unknown dtype": (
        file_bytes({"a": entry("F99", [1], 0, 4)}, bytes(4)),
        r"'a' \('F99'\); supported are F32, F16, BF16",
    ),
}
# The library takes a name's last entry, ignores unknown keys and leading space, and leaves dimensions to others.
ONLY_WE_REFUSE = {
    "leading space",
    "name twice",
    "unknown key",
    "nine dimensions",
    "dimension of 2^63",
    "empty beside 2^62",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=message) as caught:
        read_safetensors(path)
    assert "x.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 1000
    if case not in ONLY_WE_REFUSE:
        with pytest.raises((safetensors.SafetensorError, RecursionError)):
            safetensors.deserialize(content)


def test_lists_every_unsupported_dtype(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = {"ids": entry("I64", [1], 0, 8), "w": entry("F64", [1], 8, 16), "ok": entry("F16", [1], 16, 18)}
    path.write_bytes(file_bytes(header | {"q": entry("F8_E4M3", [2], 18, 20)}, bytes(20)))
    with pytest.raises(
        FileFormatError, match=r"'ids' \('I64'\), 'w' \('F64'\), 'q' \('F8_E4M3'\); supported are F32"
    ) as e:
        read_safetensors(path)
    assert "'ok'" not in str(e.value)


def test_accepts_padding_behind_the_header_and_tensors_in_any_order(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    header = json.dumps({"b": TWO["b"], "none": entry("F32", [0], 8, 8), "a": TWO["a"]}).encode() + b" \n\t "
    path.write_bytes(file_bytes(header, np.arange(3, dtype="<f4").tobytes()))
    tensors = read_safetensors(path).tensors
    assert {name: t.to_float32().tolist() for name, t in tensors.items()} == {"a": [0, 1], "b": [2], "none": []}


def test_file_without_tensors_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(b"{}"))
    assert read_safetensors(path).tensors == {}


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="is a directory; expected a safetensors file"):
        read_safetensors(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="is not a regular file"):
        read_safetensors(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        read_safetensors(tmp_path / "absent")


@pytest.mark.parametrize(
    "header",
    [
        b'{"%s": 1}' % (b"n" * 4_000_000),
        b'{"a": "%s"}' % (b"v" * 4_000_000),
        b'{"a": {"dtype": "F32", "shape": [%s1], "data_offsets": [0, 4]}}' % (b"1," * 1_000_000),
        b'{"a": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"x": %s}' % b",".join([b'{"x":1,"x":1}']),
        b"{"
        + b",".join(b'"t%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % i for i in range(50_000))
        + b',"z":1}',
    ],
    ids=["long name", "long value", "long shape", "deep", "inner duplicate", "many tensors"],
)
def test_large_headers_fail_in_bounded_time_with_a_short_message(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(header, bytes(4)))
    started = time.process_time()
    with pytest.raises(FileFormatError) as caught:
        read_safetensors(path)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 1000
