"""Random models of released shapes for every engine: speed needs shapes and formats, not trained weights."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma2_fast import __version__
from gemma2_fast.bench.shapes import SIZES, config
from gemma2_fast.errors import BackendError
from gemma2_fast.quant import FORMATS, Format
from gemma2_fast.quant.strips import SCALE_BYTES, STRIP_ROWS
from gemma2_fast.spec.families import spec_from_config
from gemma2_fast.weights.manifest import manifest
from gemma2_fast.weights.names import hf_names
from gemma2_fast.weights.origin import Origin
from gemma2_fast.weights.quantize import quantized_format
from gemma2_fast.weights.writer import TensorSource, write_quantized

__all__ = ["SIZES", "prepare", "random_blocks", "random_pieces"]

MAKERS = Path(__file__).resolve().parent / "makers"
BF16 = FORMATS["BF16"]
DEVIATION = 0.02
GAIN_DEVIATION = 0.1
PIECE_BYTES = 1 << 24

Bytes = NDArray[np.uint8]


def prepare(directory: Path, size: str, pythons: Mapping[str, str], quantization: str | None = None) -> None:
    """Make what is not there yet: the checkpoint, and from it a model for each peer whose python is given.

    With a quantization, a checkpoint quantised so and nothing else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    if quantization is not None:
        _make(directory / f"{size}-{quantization}", partial(write_quantized_checkpoint, size, quantization))
        return
    checkpoint = directory / f"{size}-hf"
    _make(checkpoint, partial(write_checkpoint, size))
    for kind, name, command in peer_commands(checkpoint, size):
        if kind in pythons:
            _make(directory / name, partial(_run, [pythons[kind], *command]))
        else:
            print(f"{name}: skipped, no --peer-python {kind}=… names the interpreter that can make it")


def peer_commands(checkpoint: Path, size: str) -> Iterator[tuple[str, str, list[str]]]:
    """Peer, name of its model, and the arguments of its python that make it; where to make it comes last.

    The makers know Gemma 2 alone; other checkpoints are for peers that read them as they are.
    """
    if config(size)["model_type"] != "gemma2":
        return
    for kind in ("q8_0", "q4_0"):
        command = [str(MAKERS / "make_gguf.py"), str(checkpoint / "config.json"), kind]
        yield "llama_cpp", f"{size}-{kind}.gguf", command
    export = ["-m", "optimum.commands.optimum_cli", "export", "openvino", "--model", str(checkpoint)]
    export += ["--task", "text-generation-with-past", "--weight-format"]
    yield "openvino", f"{size}-openvino-int8", [*export, "int8"]
    yield "openvino", f"{size}-openvino-int4", [*export, "int4", "--group-size", "128", "--ratio", "1.0", "--sym"]
    yield "ctranslate2", f"{size}-ctranslate2-int8", [str(MAKERS / "make_ctranslate2.py"), str(checkpoint)]


def write_checkpoint(size: str, directory: Path) -> None:
    """config.json and one file of random bfloat16 weights, drawn and written piece by piece."""
    shapes, names = _begin(size, directory)
    header: dict[str, object] = {}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + BF16.num_bytes(shape)
        header[names[name]] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    rng = np.random.default_rng(0)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            for piece in random_pieces(shape, BF16, rng):
                file.write(piece.data)


def write_quantized_checkpoint(size: str, quantization: str, directory: Path) -> None:
    """The same shape with random codes, tensor by tensor: no unquantised model is ever there, in memory or on disk."""
    shapes, names = _begin(size, directory)
    rng = np.random.default_rng(0)
    sources = {}
    for name, shape in shapes.items():
        stored = quantized_format(name, shape, quantization) or BF16
        sources[names[name]] = TensorSource(shape, stored, partial(random_pieces, shape, stored, rng))
    write_quantized(directory, sources, Origin(quantization, "random weights", __version__))


def _begin(size: str, directory: Path) -> tuple[Mapping[str, tuple[int, ...]], Mapping[str, str]]:
    """The directory with its config.json; shapes and names of the tensors by canonical name."""
    directory.mkdir()
    settings = config(size)
    (directory / "config.json").write_text(json.dumps(settings, indent=1), encoding="utf-8")
    spec = spec_from_config(settings)
    return manifest(spec), hf_names(spec, ())


def random_pieces(shape: tuple[int, ...], stored: Format, rng: np.random.Generator) -> Iterator[Bytes]:
    """The bytes of a random tensor in order, some at a time."""
    left = stored.num_bytes(shape) // stored.block_bytes
    while left:
        count = min(left, math.ceil(PIECE_BYTES / stored.block_bytes))
        left -= count
        if stored.block_rows > 1:
            yield random_blocks(count, stored, rng)
        else:
            deviation = GAIN_DEVIATION if len(shape) == 1 else DEVIATION
            yield _bfloat16(rng.standard_normal(count, dtype=np.float32) * np.float32(deviation))


def random_blocks(count: int, stored: Format, rng: np.random.Generator) -> Bytes:
    """Blocks of a format of strips: any codes, and one scale for all that gives the weights their deviation."""
    blocks = rng.integers(0, 256, (count, stored.block_bytes), dtype=np.uint8)
    blocks[:, -SCALE_BYTES:] = _block_scales(1.0)
    spread = float(np.std(stored.unpack(blocks[:1])))
    blocks[:, -SCALE_BYTES:] = _block_scales(DEVIATION / spread)
    return blocks.reshape(-1)


def _block_scales(scale: float) -> Bytes:
    return _bfloat16(np.full(STRIP_ROWS, scale, dtype=np.float32))


def _bfloat16(values: NDArray[np.float32]) -> Bytes:
    return ((values.view(np.uint32) + np.uint32(0x8000)) >> 16).astype("<u2").view(np.uint8)


def _make(target: Path, make: Callable[[Path], None]) -> None:
    """Makes it under another name first, so that what stands under its own is whole."""
    if target.exists():
        print(f"{target}: there already")
        return
    unfinished = target.with_name(f"unfinished-{target.name}")
    if unfinished.exists():
        raise BackendError(f"{unfinished} is left from a run that was cut off; remove it and start again")
    print(f"{target}: making it, which may take minutes", flush=True)
    make(unfinished)
    unfinished.rename(target)


def _run(command: Sequence[str], target: Path) -> None:
    done = subprocess.run([*command, str(target)], stdout=sys.stderr, check=False)
    if done.returncode:
        raise BackendError(f"{' '.join(command)} ended with status {done.returncode}; its messages are above")
