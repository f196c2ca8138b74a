"""Quantising a checkpoint: the copy is what the formats say, complete or not there, and needs little memory."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma2_fast.errors import CapacityError, FileFormatError, RequestError, WeightsError
from gemma2_fast.quant import FORMATS
from gemma2_fast.weights import new_directory, quantize, writer
from gemma2_fast.weights.load import load_checkpoint
from gemma2_fast.weights.mapped_file import drop_pages, map_file
from gemma2_fast.weights.origin import Origin
from gemma2_fast.weights.quantize import (
    QUANTIZATIONS,
    quantize_checkpoint,
    quantize_weights,
    quantized_format,
    stored_quantization,
)
from gemma2_fast.weights.tensor import Tensor
from tests.weights.quantized_files import CONFIG, write_source

ORIGIN = Origin("int8", "here", "0.1.0")


def run(source: Path, destination: Path, quantization: str = "int8", **options: Any) -> None:
    quantize_checkpoint(load_checkpoint(source), destination, Origin(quantization, "here", "0.1.0"), **options)


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


@pytest.mark.parametrize("format_name", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_the_copy_holds_the_same_weights_packed(quantization: str, format_name: str, tmp_path: Path) -> None:
    source = write_source(tmp_path / "source", format_name)
    run(source, tmp_path / "copy", quantization, num_threads=2)
    assert names_in(tmp_path / "copy") == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer_config.json",
    ]
    assert names_in(tmp_path) == ["copy", "source"]
    before, after = load_checkpoint(source), load_checkpoint(tmp_path / "copy")
    assert after.origin == Origin(quantization, "here", "0.1.0")
    assert (after.spec, after.eos_ids) == (before.spec, (1, 7))
    matrices = FORMATS["INT8_G128"] if quantization == "int8" else FORMATS["INT4_G32"]
    for name, tensor in before.weights.items():
        target = tensor.format if len(tensor.shape) == 1 else matrices
        target = FORMATS["INT8_G128"] if name == "embedding" else target
        expected = Tensor.from_float32(tensor.to_float32(), target)
        assert after.weights[name].format is target
        assert np.array_equal(after.weights[name].data, expected.data), name


def test_pieces_make_the_same_file_as_the_whole(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(source, tmp_path / "whole")
    monkeypatch.setattr(quantize, "PIECE_BYTES", 1)  # one strip at a time
    run(source, tmp_path / "pieces")
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "pieces")]
    assert files[0] == files[1]


def test_shards(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "copy", shard_bytes=20_000)
    assert len(list((tmp_path / "copy").glob("model-*-of-*.safetensors"))) > 2
    run(source, tmp_path / "single")
    one, other = load_checkpoint(tmp_path / "copy").weights, load_checkpoint(tmp_path / "single").weights
    assert {n: t.data.tobytes() for n, t in one.items()} == {n: t.data.tobytes() for n, t in other.items()}


def test_loading_and_writing_give_the_same_bytes(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "copy", "int4")
    written = load_checkpoint(tmp_path / "copy").weights
    loaded = quantize_weights(load_checkpoint(source).weights, "int4", 2, progress=False)
    assert {n: (t.format.name, t.data.tobytes()) for n, t in loaded.items()} == {
        n: (t.format.name, t.data.tobytes()) for n, t in written.items()
    }
    assert all(t.data.ctypes.data % 64 == 0 for t in loaded.values() if t.format.block_rows > 1)


def test_what_is_quantised_already_stays(source: Path) -> None:
    weights = quantize_weights(load_checkpoint(source).weights, "int8", 1, progress=False)
    again = quantize_weights(weights, "int4", 1, progress=False)
    assert all(again[name] is weights[name] for name in weights)


def test_which_tensors_are_quantised() -> None:
    assert quantized_format("embedding", (100, 96), "int4") is FORMATS["INT8_G128"]
    assert quantized_format("layers.0.mlp.up", (160, 96), "int4") is QUANTIZATIONS["int4"]
    assert quantized_format("layers.0.mlp.up", (160, 96), "int8") is FORMATS["INT8_G128"]
    for name, shape in {"final_norm": (96,), "recurrent.conv": (9, 1, 4), "recurrent.input_gate_bias": (2, 4)}.items():
        assert quantized_format(name, shape, "int8") is None
    assert stored_quantization(["INT8_G128"]) == "int8"
    assert stored_quantization(["INT8_G128", "INT4_G32"]) == "int4"
    assert stored_quantization(["BF16", "Q4_K"]) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(
    source: Path, tmp_path: Path, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "PIECE_BYTES", 1)  # the row is in the second piece
    checkpoint = load_checkpoint(source)
    values = checkpoint.weights["layers.1.mlp.down"].to_float32()
    values[70, 3] = bad
    weights = {**checkpoint.weights, "layers.1.mlp.down": Tensor.from_float32(values)}
    with pytest.raises(WeightsError, match="layers.1.mlp.down cannot be quantised: row 70 holds an infinity or a NaN"):
        quantize_weights(weights, "int8", 1, progress=False)
    broken = load_checkpoint(source)
    object.__setattr__(broken, "weights", weights)
    with pytest.raises(WeightsError, match=r"layers.1.mlp.down"):
        quantize_checkpoint(broken, tmp_path / "copy", ORIGIN)
    assert names_in(tmp_path) == ["source"]


def test_a_quantised_source_is_refused(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "copy")
    with pytest.raises(RequestError, match=r"copy is already quantised \(int8, from here\)"):
        run(tmp_path / "copy", tmp_path / "again")


def test_a_source_must_be_a_directory(tmp_path: Path, source: Path) -> None:
    checkpoint = load_checkpoint(source)
    object.__setattr__(checkpoint, "path", tmp_path / "model.gguf")
    with pytest.raises(RequestError, match="model.gguf is not a directory of safetensors files"):
        quantize_checkpoint(checkpoint, tmp_path / "copy", ORIGIN)


def test_source_and_destination_differ(source: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(source)
    for destination in (source, tmp_path / "link", source / ".." / "source"):
        with pytest.raises(RequestError, match="is both source and destination"):
            run(source, destination, overwrite=True)


def test_what_stands_there_is_kept_unless_it_may_be_overwritten(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    run(source, copy)  # an empty directory is as good as none
    with pytest.raises(RequestError, match=r"copy exists and holds .*config.json.* or --overwrite it"):
        run(source, copy, "int4")
    assert load_checkpoint(copy).origin == ORIGIN
    run(source, copy, "int4", overwrite=True)
    assert load_checkpoint(copy).origin == Origin("int4", "here", "0.1.0")
    assert names_in(tmp_path) == ["copy", "source"]


def test_overwriting_never_deletes_other_things(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    run(source, copy)
    (copy / "thesis.txt").write_text("years of work")
    (copy / "tokenizer_photos").mkdir()
    with pytest.raises(RequestError, match="copy holds 'thesis.txt', 'tokenizer_photos', which --overwrite does not"):
        run(source, copy, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(RequestError, match="file exists and is not a directory"):
        run(source, tmp_path / "file", overwrite=True)


def test_a_destination_around_the_source_is_refused(source: Path, tmp_path: Path) -> None:
    inner = source.rename(tmp_path / "inner")
    outer = tmp_path / "outer"
    outer.mkdir()
    inner = inner.rename(outer / "inner")
    with pytest.raises(RequestError, match="outer holds 'inner', which --overwrite does not delete"):
        run(inner, outer, overwrite=True)


@contextmanager
def failing_write(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> Iterator[None]:
    """The third tensor written raises `error` after its first piece."""
    whole, calls = quantize._quantized_pieces, iter(range(1000))

    def pieces(*args: Any) -> Iterator[np.ndarray]:
        for piece in whole(*args):
            if next(calls) == 3:
                raise error
            yield piece

    with monkeypatch.context() as patched:
        patched.setattr(quantize, "_quantized_pieces", pieces)
        yield


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (OSError(errno.ENOSPC, "No space left on device"), CapacityError, "the disk of .* is full; nothing was left"),
        (OSError(errno.EIO, "Input/output error"), OSError, "Input/output"),
    ],
)
def test_a_failure_leaves_what_was_there(
    error: BaseException,
    raised: type[BaseException],
    message: str | None,
    overwrite: bool,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = ["source"]
    if overwrite:
        run(source, tmp_path / "copy")
        before = ["copy", "source"]
    with failing_write(monkeypatch, error), pytest.raises(raised, match=message):
        run(source, tmp_path / "copy", "int4", overwrite=overwrite)
    assert names_in(tmp_path) == before
    if overwrite:
        assert load_checkpoint(tmp_path / "copy").origin == ORIGIN


def test_a_failed_rename_brings_the_old_one_back(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(source, tmp_path / "copy")
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if path.name.endswith(".unfinished"):
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="Input/output"):
        run(source, tmp_path / "copy", "int4", overwrite=True)
    assert names_in(tmp_path) == ["copy", "source"]
    assert load_checkpoint(tmp_path / "copy").origin == ORIGIN


def test_too_little_space_is_told_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = new_directory.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(new_directory.shutil, "disk_usage", lambda _: usage._replace(free=10**6))
    monkeypatch.setattr(quantize, "write_quantized", lambda *_: pytest.fail("it wrote"))
    with pytest.raises(CapacityError, match=r"copy takes 0.00 GB and .* has 0.00 GB free; make room"):
        run(source, tmp_path / "copy")
    assert names_in(tmp_path) == ["source"]


def killed_half_way(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a process leaves that is killed while it writes."""
    with monkeypatch.context() as patched:
        patched.setattr(new_directory.shutil, "rmtree", lambda *_, **__: None)
        patched.setattr(writer, "WRITE_BYTES", 64)
        with failing_write(patched, KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            run(source, tmp_path / "copy")
    return tmp_path / "copy.unfinished"


def test_a_half_written_directory_is_no_model_and_is_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = killed_half_way(source, tmp_path, monkeypatch)
    assert names_in(left) == ["model.safetensors"]
    with pytest.raises(FileFormatError, match="copy.unfinished is what a quantisation left that did not finish"):
        load_checkpoint(left)
    (left / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(FileFormatError, match="truncated"):
        load_checkpoint(left)
    run(source, tmp_path / "copy")
    assert names_in(tmp_path) == ["copy", "source"]


def test_what_is_not_ours_is_not_taken_for_a_leftover(source: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.unfinished").mkdir()
    (tmp_path / "copy.unfinished" / "novel.txt").write_text("chapter one")
    with pytest.raises(RequestError, match="copy.unfinished is in the way and holds 'novel.txt'"):
        run(source, tmp_path / "copy")
    assert names_in(tmp_path / "copy.unfinished") == ["novel.txt"]


def test_two_writers_do_not_meet(source: Path, tmp_path: Path) -> None:
    (tmp_path / "copy.unfinished").mkdir()
    other = os.open(tmp_path / "copy.unfinished", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)
    try:
        with pytest.raises(RequestError, match="is being written by another process"):
            run(source, tmp_path / "copy")
    finally:
        os.close(other)
    run(source, tmp_path / "copy")


def test_files_behind_links_are_copied(source: Path, tmp_path: Path) -> None:
    """As in the hub's cache."""
    (source / "config.json").rename(tmp_path / "blob")
    (source / "config.json").symlink_to(tmp_path / "blob")
    run(source, tmp_path / "copy")
    assert not (tmp_path / "copy" / "config.json").is_symlink()
    assert json.loads((tmp_path / "copy" / "config.json").read_text()) == CONFIG


def resident_kib(field: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))


def test_pages_of_a_mapped_file_can_be_dropped(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(32 * 2**20))
    content = map_file(tmp_path / "x", "any")
    view = content[100:-100]
    assert view.max() == 0
    before = resident_kib("RssFile")
    drop_pages(view)
    assert before - resident_kib("RssFile") > 30 * 1024
    assert view.max() == 0
    drop_pages(content[5:9])  # less than a page
    drop_pages(np.zeros(10**6, dtype=np.uint8))  # not mapped


MEMORY = """
import sys
from pathlib import Path
from gemma2_fast.weights.load import load_checkpoint
from gemma2_fast.weights.origin import Origin
from gemma2_fast.weights.quantize import quantize_checkpoint

def status(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field + ":"))

checkpoint = load_checkpoint(Path(sys.argv[1]))
before = status("VmHWM")
quantize_checkpoint(checkpoint, Path(sys.argv[2]), Origin("int4", "here", "1"), num_threads=2)
print(status("VmHWM") - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """An embedding of 128 MiB: neither it, nor what it becomes, is ever in memory as a whole."""
    source = write_source(tmp_path / "source", config={**CONFIG, "vocab_size": 700_000})
    arguments = [sys.executable, "-c", MEMORY, str(source), str(tmp_path / "copy")]
    run = subprocess.run(arguments, capture_output=True, text=True, check=True, env=os.environ)
    assert int(run.stdout) * 1024 < 3 * quantize.PIECE_BYTES
    assert load_checkpoint(tmp_path / "copy").weights["embedding"].num_bytes > 85 * 10**6
