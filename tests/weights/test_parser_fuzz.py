"""Mutated weight files: each is refused by name or loads completely; GEMMA2_FAST_FUZZ_FILES sets how many."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors

from gemma2_fast.errors import CapacityError, FileFormatError
from gemma2_fast.quant import FORMATS
from gemma2_fast.weights.gguf import GgufFile, read_gguf
from gemma2_fast.weights.safetensors import SafetensorsFile, read_safetensors
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import write_safetensors
from tests.weights import gguf_builder as b
from tests.weights.parser_fuzz import (
    Outcome,
    check_tensors,
    fuzz_parser,
    gguf_fields,
    mutated_gguf,
    mutated_safetensors,
    num_fuzz_files,
)
from tests.weights.quantized_files import write_few


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()


def gguf_base() -> bytes:
    """A key of every type and a tensor of every format."""
    keys = [
        b.scalar("general.architecture", b.STRING, "gemma2"),
        b.scalar("general.alignment", b.U32, 32),
        b.scalar("flag", b.BOOL, 1),
        b.scalar("cap", b.F32, 50.0),
        b.scalar("wide", b.U64, 7),
        b.array("tokens", b.STRING, ["<pad>", "▁", "größe", ""]),
        b.array("scores", b.F32, [0.0, -1.0, -2.0, -3.0]),
        b.array("flags", b.BOOL, [0, 1]),
    ]
    tensors, data = [], b""
    for name, format in FORMATS.items():
        if format.gguf_type is None:
            continue
        data += bytes(-len(data) % 32)
        tensors.append(b.tensor(name, [2 * format.block_weights, 3], format.gguf_type, len(data)))
        data += random_bytes(6 * format.block_bytes)
    return b.Gguf(keys, tensors, data).to_bytes()


def safetensors_base(path: Path) -> bytes:
    tensors = {}
    for name, shape in {"F32": (3, 2), "F16": (4,), "BF16": (2, 2, 2), "scalar": (), "none": (0, 3)}.items():
        format = FORMATS.get(name, FORMATS["F32"])
        num_bytes = int(np.prod(shape, dtype=int)) * format.block_bytes
        tensors[name] = Tensor(shape, format, np.frombuffer(random_bytes(num_bytes), dtype=np.uint8))
    write_safetensors(path, tensors, {"format": "pt"})
    return path.read_bytes()


def report(kind: str, outcome: Outcome, capsys: pytest.CaptureFixture[str]) -> None:
    """Printed always, and neither half may be empty: a fuzzer whose files all fail at once tests nothing."""
    with capsys.disabled():
        print(f"\n{kind}: {outcome}")
    assert outcome.loaded + outcome.refused >= num_fuzz_files()
    assert min(outcome.loaded, outcome.refused) >= num_fuzz_files() // 20


def test_mutated_gguf_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.gguf"

    def use(file: GgufFile) -> None:
        check_tensors(file.tensors, path.stat().st_size)

    report("gguf", fuzz_parser(mutated_gguf(gguf_base()), read_gguf, use, path), capsys)


def test_mutated_safetensors_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    base = safetensors_base(path)

    def use(file: SafetensorsFile) -> None:
        check_tensors(file.tensors, path.stat().st_size)
        listed = safetensors.deserialize(path.read_bytes())
        library = {name: (tuple(tensor["shape"]), bytes(tensor["data"])) for name, tensor in listed}
        assert {name: (t.shape, t.data.tobytes()) for name, t in file.tensors.items()} == library

    report("safetensors", fuzz_parser(mutated_safetensors(base), read_safetensors, use, path), capsys)


def test_mutated_quantized_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.safetensors"
    base = write_few(tmp_path).read_bytes()

    def use(file: SafetensorsFile) -> None:
        check_tensors(file.tensors, path.stat().st_size)
        library = {name: bytes(tensor["data"]) for name, tensor in safetensors.deserialize(path.read_bytes())}
        assert {name: tensor.data.tobytes() for name, tensor in file.tensors.items()} == library

    report("quantised", fuzz_parser(mutated_safetensors(base), read_safetensors, use, path), capsys)


def test_the_unchanged_files_load(tmp_path: Path) -> None:
    path = tmp_path / "x"
    base = safetensors_base(path)
    check_tensors(read_safetensors(path).tensors, len(base))
    content = gguf_base()
    assert b"".join(gguf_fields(content)) == content
    path.write_bytes(content)
    check_tensors(read_gguf(path).tensors, len(content))


@pytest.mark.parametrize("fault", [ValueError("no"), IndexError("no"), CapacityError("no")])
def test_the_harness_sees_a_wrong_exception(fault: Exception, tmp_path: Path) -> None:
    def read(path: Path) -> None:
        if len(path.read_bytes()) % 3 == 0:
            raise fault
        raise FileFormatError(str(path))

    with pytest.raises(type(fault)):
        fuzz_parser(mutated_gguf(gguf_base()), read, lambda _: None, tmp_path / "x", 50)


def test_the_harness_sees_bytes_outside_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    size = len(safetensors_base(path))
    tensor = read_safetensors(path).tensors["F32"]
    with pytest.raises(AssertionError, match="F32"):
        check_tensors({"F32": Tensor((3, 3), tensor.format, tensor.data)}, size)
    with pytest.raises(AssertionError, match="F32"):
        check_tensors({"F32": Tensor((3, 2), tensor.format, tensor.data.copy())}, size)
