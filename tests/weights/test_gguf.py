"""The GGUF reader: bytes by hand, the gguf package as oracle, and every way a file can be wrong."""

from __future__ import annotations

import os
import time
import tracemalloc
from pathlib import Path

import gguf
import numpy as np
import pytest

from gemma2_fast.errors import FileFormatError
from gemma2_fast.quant import FORMATS
from gemma2_fast.weights.gguf import MAX_KEYS, MAX_STRINGS, MAX_TENSORS, read_gguf
from tests.weights import gguf_builder as b
from tests.weights.gguf_builder import Gguf, array, scalar, string, tensor, u32, u64

GGUF_FORMATS = [name for name, format in FORMATS.items() if format.gguf_type is not None]


def floats(*values: float) -> bytes:
    return np.array(values, dtype="<f4").tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_reads_bytes_a_reader_can_check(version: int, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    head = bytes.fromhex("47475546") + bytes([version, 0, 0, 0]) + u64(1) + u64(1)
    key = bytes.fromhex("01000000000000006b040000002a000000")  # k: u32 42
    # Tensor w, two dimensions, three fast and two slow, F32, at offset 0; the header's 74 bytes are padded to 96.
    info = bytes.fromhex("010000000000000077020000000300000000000000020000000000000000000000") + u64(0)
    path.write_bytes(head + key + info + bytes(96 - 24 - 17 - 41) + floats(1, 2, 3, 4, 5, 6))
    file = read_gguf(path)
    assert file.version == version
    assert file.metadata == {"k": 42}
    assert file.tensors["w"].to_float32().tolist() == [[1, 2, 3], [4, 5, 6]]
    assert not file.tensors["w"].data.flags.writeable


def test_reads_every_value_type(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    numbers = {
        "u1": (b.U8, 255),
        "i1": (b.I8, -128),
        "u2": (b.U16, 65535),
        "i2": (b.I16, -32768),
        "u4": (b.U32, 2**32 - 1),
        "i4": (b.I32, -(2**31)),
        "f4": (b.F32, 0.5),
        "?": (b.BOOL, True),
        "u8": (b.U64, 2**64 - 1),
        "i8": (b.I64, -(2**63)),
        "f8": (b.F64, 0.1),
    }
    keys = [scalar(dtype, kind, item) for dtype, (kind, item) in numbers.items()]
    keys += [array(dtype + "s", kind, [item, 1]) for dtype, (kind, item) in numbers.items()]
    keys += [scalar("text", b.STRING, "größe\0▁"), array("texts", b.STRING, ["", "▁a", "\n"]), array("none", b.I32, [])]
    path.write_bytes(Gguf(keys).to_bytes())
    metadata = read_gguf(path).metadata
    for dtype, (_, item) in numbers.items():
        assert metadata[dtype] == item
        assert type(metadata[dtype]) is type(item)
        stored = metadata[dtype + "s"]
        assert isinstance(stored, np.ndarray)
        assert stored.tolist() == [item, 1]
        assert stored.dtype == dtype
    assert metadata["text"] == "größe\0▁"
    assert metadata["texts"] == ["", "▁a", "\n"]
    assert len(metadata["none"]) == 0  # type: ignore[arg-type]


def write_with_gguf_package(path: Path) -> dict[str, np.ndarray]:
    """One tensor of every format, as raw blocks [rows, row bytes] by name; alignment 64."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_custom_alignment(64)
    writer.add_float32("gemma2.attn_logit_softcapping", 50.0)
    writer.add_token_list(["<pad>", "▁", "\N{GRINNING FACE}"])
    writer.add_token_scores([0.0, -1.0, -2.5])
    writer.add_add_bos_token(True)
    blocks = {}
    for name in GGUF_FORMATS:
        format = FORMATS[name]
        blocks[name] = rng.integers(0, 256, (3, 2 * format.block_bytes), dtype=np.uint8)
        writer.add_tensor(name, blocks[name], raw_dtype=gguf.GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return blocks


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    blocks = write_with_gguf_package(tmp_path / "x.gguf")
    file = read_gguf(tmp_path / "x.gguf")
    assert list(file.tensors) == GGUF_FORMATS
    for name, raw in blocks.items():
        assert file.tensors[name].shape == (3, 2 * FORMATS[name].block_weights)
        assert file.tensors[name].format is FORMATS[name]
        assert file.tensors[name].data.tobytes() == raw.tobytes()
        with np.errstate(all="ignore"):
            expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name])
        assert np.array_equal(file.tensors[name].to_float32(), expected, equal_nan=True)
    assert file.metadata["gemma2.attn_logit_softcapping"] == 50.0
    assert file.metadata["tokenizer.ggml.tokens"] == ["<pad>", "▁", "\N{GRINNING FACE}"]
    assert file.metadata["tokenizer.ggml.scores"].tolist() == [0.0, -1.0, -2.5]  # type: ignore[attr-defined]
    assert file.metadata["tokenizer.ggml.add_bos_token"] is True


def test_allows_gaps_and_any_order_of_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    infos = [tensor("late", [1], 0, 96), tensor("early", [2], 0, 0)]
    path.write_bytes(Gguf(tensors=infos, data=floats(1, 2) + bytes(88) + floats(3)).to_bytes())
    tensors = read_gguf(path).tensors
    assert (tensors["late"].to_float32().tolist(), tensors["early"].to_float32().tolist()) == ([3], [1, 2])


def test_large_vocabulary_parses_fast(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    tokens = [f"▁token{i}" for i in range(262_144)]
    path.write_bytes(Gguf([array("tokens", b.STRING, tokens), array("scores", b.F32, [0.5] * 262_144)]).to_bytes())
    started = time.process_time()
    metadata = read_gguf(path).metadata
    assert time.process_time() - started < 2
    assert metadata["tokens"] == tokens


W = tensor("w", [2], 0, 0)
DATA = floats(1, 2)
HUGE = (2**31, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1)


def alignment(type_id: int, item: object) -> bytes:
    return scalar("general.alignment", type_id, item)


# What is wrong → the file, and the part of the message that says so.
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "three bytes": (b"GGU", "the magic number takes 4 bytes and 3 are left"),
    "bad magic": (Gguf(magic=b"GGML").to_bytes(), "not a GGUF file: it starts with b'GGML', expected b'GGUF'"),
    "version 0": (Gguf(version=0).to_bytes(), "GGUF version 0; supported are 2 and 3: convert the model again"),
    "version 1": (Gguf(version=1).to_bytes(), "GGUF version 1; supported are 2 and 3: convert the model again"),
    "version 4": (Gguf(version=4).to_bytes(), "GGUF version 4; supported are 2 and 3$"),
    "big-endian": (Gguf(version=3 << 24).to_bytes(), "a big-endian GGUF file"),
    "no counts": (b"GGUF" + u32(3), "the number of tensors takes 8 bytes and 0 are left at byte 8"),
    "too many tensors": (Gguf(num_tensors=MAX_TENSORS + 1).to_bytes(), "claims 65537 tensors; at most 65536"),
    "too many keys": (Gguf(num_keys=MAX_KEYS + 1).to_bytes(), "claims 65537 metadata keys; at most 65536"),
    "fewer keys than counted": (Gguf(num_keys=1).to_bytes(), "the length of metadata key 0 takes 8 bytes"),
    "fewer tensors than counted": (Gguf(num_tensors=1).to_bytes(), "the length of the name of tensor 0 takes 8 bytes"),
    "key past the end": (Gguf([u64(40) + b"short"]).to_bytes(), "metadata key 0 takes 40 bytes and 5 are left"),
    "key not UTF-8": (Gguf([scalar(b"\xff", b.U8, 1)]).to_bytes(), "metadata key 0 is not UTF-8: .* at its byte 0"),
    "key twice": (Gguf([scalar("k", b.U8, 1)] * 2).to_bytes(), "the metadata key 'k' stands there twice"),
    "unknown value type": (Gguf([string("k") + u32(13) + u64(0)]).to_bytes(), "'k' has the unknown value type 13"),
    "value cut": (Gguf([string("k") + u32(b.U64) + b"\0"]).to_bytes(), "metadata 'k' takes 8 bytes and 1 are left"),
    "text not UTF-8": (Gguf([scalar("k", b.STRING, b"a\xc3(")]).to_bytes(), "'k' is not UTF-8: .* at its byte 1"),
    "bool of 2": (Gguf([scalar("k", b.BOOL, 2)]).to_bytes(), "'k' is a bool stored as 2; expected 0 or 1"),
    "array of bools of 2": (Gguf([array("k", b.BOOL, [1, 2])]).to_bytes(), "'k' holds a bool stored as 2"),
    "array of unknown type": (
        Gguf([string("k") + u32(b.ARRAY) + u32(99) + u64(0)]).to_bytes(),
        "'k' is an array of the unknown value type 99",
    ),
    "array of arrays": (
        Gguf([string("k") + u32(b.ARRAY) + u32(b.ARRAY) + u64(1)]).to_bytes(),
        "'k' is an array of arrays",
    ),
    "array cut": (
        Gguf([string("k") + u32(b.ARRAY) + u32(b.I32) + u64(2) + bytes(7)]).to_bytes(),
        "'k' takes 8 bytes and 7 are left",
    ),
    "too many strings": (
        Gguf([string("k") + u32(b.ARRAY) + u32(b.STRING) + u64(MAX_STRINGS + 1) + bytes(64)]).to_bytes(),
        f"'k' claims {MAX_STRINGS + 1} strings; 64 bytes are left",
    ),
    "strings fewer than counted": (
        Gguf([string("k") + u32(b.ARRAY) + u32(b.STRING) + u64(2) + string("longer than eight")]).to_bytes(),
        "entry 1 of metadata 'k' runs past the end",
    ),
    "last string past the end": (
        Gguf([string("k") + u32(b.ARRAY) + u32(b.STRING) + u64(2) + string("a") + u64(9) + b"eight..."]).to_bytes(),
        "entry 1 of metadata 'k' runs past the end",
    ),
    "array text not UTF-8": (
        Gguf([array("k", b.STRING, ["fine", b"\x80"])]).to_bytes(),
        "entry 1 of metadata 'k' is not UTF-8",
    ),
    "split model": (Gguf([scalar("split.count", b.U16, 3)]).to_bytes(), "one of 3 parts of a split model; merge them"),
    "alignment 0": (Gguf([alignment(b.U32, 0)], [W], DATA).to_bytes(), "power of two from 1 to 65536, got 0"),
    "alignment 48": (Gguf([alignment(b.U32, 48)], [W], DATA).to_bytes(), "power of two from 1 to 65536, got 48"),
    "alignment 2^31": (Gguf([alignment(b.U32, 2**31)], [W], DATA).to_bytes(), "power of two .*, got 2147483648"),
    "alignment 2^63": (
        Gguf([alignment(b.U64, 2**63)], [W], DATA).to_bytes(),
        "power of two .*, got 9223372036854775808",
    ),
    "alignment -32": (Gguf([alignment(b.I32, -32)], [W], DATA).to_bytes(), "power of two .*, got -32"),
    "alignment of text": (Gguf([alignment(b.STRING, "32")], [W], DATA).to_bytes(), "power of two .*, got '32'"),
    "alignment of bool": (Gguf([alignment(b.BOOL, 1)], [W], DATA).to_bytes(), "power of two .*, got True"),
    "alignment of float": (Gguf([alignment(b.F32, 32.0)], [W], DATA).to_bytes(), "power of two .*, got 32.0"),
    "name not UTF-8": (Gguf(tensors=[tensor(b"\xe2\x96", [1], 0, 0)]).to_bytes(), "name of tensor 0 is not UTF-8"),
    "name too long": (
        Gguf(tensors=[tensor("n" * 65537, [1], 0, 0)]).to_bytes(),
        "the name of tensor 0 claims 65537 bytes; at most 65536",
    ),
    "name twice": (
        Gguf(tensors=[W, tensor("w", [2], 0, 32)], data=DATA * 9).to_bytes(),
        "tensor 'w' stands there twice",
    ),
    "no dimensions": (
        Gguf(tensors=[tensor("w", [], 0, 0)], data=DATA).to_bytes(),
        "'w' has 0 dimensions; expected 1 to 4",
    ),
    "five dimensions": (Gguf(tensors=[tensor("w", [1] * 5, 0, 0)], data=DATA).to_bytes(), "'w' has 5 dimensions"),
    "empty dimension": (
        Gguf(tensors=[tensor("w", [2, 0], 0, 0)], data=DATA).to_bytes(),
        r"an empty dimension: \[2, 0\]",
    ),
    "unsupported types": (
        Gguf(tensors=[tensor("w", [256], 10, 0), W, tensor("v", [1], 2**32 - 1, 0)], data=DATA).to_bytes(),
        r"'w' \(type 10\), 'v' \(type 4294967295\); supported are F32 \(0\), F16 \(1\), BF16 \(30\), Q8_0 \(8\)",
    ),
    "row of broken blocks": (
        Gguf(tensors=[tensor("w", [640, 2], 12, 0)], data=bytes(720)).to_bytes(),
        "tensor 'w': a row of 640 weights cannot be stored as Q4_K: its blocks hold 256",
    ),
    "misaligned": (
        Gguf(tensors=[tensor("w", [1], 0, 4)], data=DATA).to_bytes(),
        "'w' starts at 4, not a multiple of .* 32",
    ),
    "misaligned for its own alignment": (
        Gguf([alignment(b.U32, 64)], [tensor("w", [1], 0, 32)], bytes(128), alignment=64).to_bytes(),
        "'w' starts at 32, not a multiple of the alignment 64",
    ),
    "data cut": (
        Gguf(tensors=[W], data=DATA[:-1]).to_bytes(),
        r"'w' \(F32 of shape \(2,\)\) ends at byte 8 of the data, which has 7",
    ),
    "no data": (Gguf(tensors=[W]).to_bytes(), "ends at byte 8 of the data, which has 0"),
    "overlap": (
        Gguf(tensors=[tensor("late", [8], 0, 32), tensor("early", [9], 0, 0)], data=bytes(64)).to_bytes(),
        "tensors 'early' and 'late' overlap",
    ),
    "same bytes twice": (
        Gguf(tensors=[W, tensor("v", [2], 0, 0)], data=DATA).to_bytes(),
        "tensors 'w' and 'v' overlap",
    ),
}
for size in HUGE:
    REFUSED |= {
        f"{size} tensors": (Gguf(num_tensors=size).to_bytes(), f"claims {size} tensors"),
        f"{size} keys": (Gguf(num_keys=size).to_bytes(), f"claims {size} metadata keys"),
        f"key of {size} bytes": (
            Gguf([u64(size) + b"k"]).to_bytes(),
            f"metadata key 0 claims {size} bytes; at most 65536",
        ),
        f"text of {size} bytes": (
            Gguf([string("k") + u32(b.STRING) + u64(size) + b"text"]).to_bytes(),
            f"metadata 'k' takes {size} bytes and 4 are left",
        ),
        f"array of {size} numbers": (
            Gguf([string("k") + u32(b.ARRAY) + u32(b.U32) + u64(size) + bytes(64)]).to_bytes(),
            f"metadata 'k' takes {4 * size} bytes and 64 are left",
        ),
        f"array of {size} strings": (
            Gguf([string("k") + u32(b.ARRAY) + u32(b.STRING) + u64(size) + bytes(64)]).to_bytes(),
            f"metadata 'k' claims {size} strings; 64 bytes are left",
        ),
        f"dimension of {size}": (
            Gguf(tensors=[tensor("w", [32, size], 8, 0)], data=bytes(34)).to_bytes(),
            f"ends at byte {34 * size} of the data, which has 34",
        ),
        f"product of {size} squared": (
            Gguf(tensors=[tensor("w", [size, size, size, size], 0, 0)], data=DATA).to_bytes(),
            f"ends at byte {4 * size**4} of the data, which has 8",
        ),
        f"offset of {size}": (
            Gguf(tensors=[tensor("w", [1], 0, size // 32 * 32)], data=DATA).to_bytes(),
            f"ends at byte {size // 32 * 32 + 4} of the data, which has 8",
        ),
    }


@pytest.mark.parametrize("case", REFUSED)
def test_refuses(case: str, tmp_path: Path) -> None:
    content, message = REFUSED[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(FileFormatError, match=message) as caught:
            read_gguf(path)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
    assert "x.gguf" in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = Gguf([array("k", b.STRING, ["a", "b"]), scalar("n", b.F32, 1.0)], [W], DATA).to_bytes()
    path = tmp_path / "x.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileFormatError):
            read_gguf(path)
    path.write_bytes(whole)
    assert read_gguf(path).tensors["w"].to_float32().tolist() == [1, 2]


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="is a directory; expected a GGUF file"):
        read_gguf(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileFormatError, match="is not a regular file"):
        read_gguf(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        read_gguf(tmp_path / "absent.gguf")
