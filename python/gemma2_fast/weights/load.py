"""A checkpoint on disk → its ModelSpec, its complete weights and what else it says about itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma2_fast.errors import ConfigError, FileFormatError, WeightsError
from gemma2_fast.spec import ModelSpec
from gemma2_fast.spec.families import spec_from_config, spec_from_gguf
from gemma2_fast.weights.deepmind import EMBEDDING, as_hugging_face
from gemma2_fast.weights.gguf import read_gguf
from gemma2_fast.weights.manifest import check_weights
from gemma2_fast.weights.mapped_file import drop_pages
from gemma2_fast.weights.names import (
    GGUF_OUTPUT,
    HF_IGNORED,
    HF_IGNORED_SUFFIX,
    HF_OUTPUT,
    gguf_names,
    hf_names,
    is_norm,
)
from gemma2_fast.weights.new_directory import UNFINISHED
from gemma2_fast.weights.origin import Origin
from gemma2_fast.weights.safetensors import read_safetensors_directory
from gemma2_fast.weights.strict_json import load_json_object
from gemma2_fast.weights.tensor import Tensor

CONFIG_FILE = "config.json"
MAX_JSON_BYTES = 64 * 2**20
_COMPARED_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Checkpoint:
    """weights: canonical name → tensor, complete and shape-checked; norm weights are w, never 1 + w.

    generation_config: the keys of generation_config.json, empty without one; eos_ids: end-of-text ids it or the
    configuration names. gguf_metadata: None for a directory. origin: None unless this package quantised the weights.
    """

    path: Path
    spec: ModelSpec
    weights: Mapping[str, Tensor]
    generation_config: Mapping[str, Any]
    eos_ids: tuple[int, ...]
    gguf_metadata: Mapping[str, Any] | None
    origin: Origin | None = None

    @property
    def num_weight_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.weights.values())

    @property
    def num_parameters(self) -> int:
        return sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in self.weights.values())

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_weight_bytes / self.num_parameters

    @property
    def matrix_formats(self) -> tuple[str, ...]:
        """Names of the formats its matrices are stored in, most bytes first."""
        totals: dict[str, int] = {}
        for tensor in self.weights.values():
            if len(tensor.shape) > 1:
                totals[tensor.format.name] = totals.get(tensor.format.name, 0) + tensor.num_bytes
        return tuple(sorted(totals, key=lambda name: -totals[name]))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a directory with config.json and safetensors, or a .gguf file. Weights stay memory-mapped."""
    if path.is_dir():
        return _load_directory(path)
    if path.suffix == ".safetensors":
        raise FileFormatError(f"{path} holds weights without their configuration; give the directory with config.json")
    return _load_gguf(path)


def _load_directory(directory: Path) -> Checkpoint:
    if not (directory / CONFIG_FILE).is_file():
        _explain_no_config(directory)
    config = read_json(directory / CONFIG_FILE)
    spec = spec_from_config(config)
    generation_path = directory / "generation_config.json"
    generation_config = read_json(generation_path) if generation_path.is_file() else {}

    files = read_safetensors_directory(directory)
    stored = as_hugging_face(files.tensors) if EMBEDDING in files.tensors else files.tensors
    names = hf_names(spec, stored)
    embedding = stored.get(names["embedding"])
    for output_name in HF_OUTPUT:
        output = stored.pop(output_name, None)
        if output is not None and embedding is not None:
            _check_tied(str(directory), output_name, output, embedding)
    weights = {name: stored.pop(theirs) for name, theirs in names.items() if theirs in stored}
    for name, tensor in stored.items():
        if not name.startswith(HF_IGNORED) and not name.endswith(HF_IGNORED_SUFFIX):
            weights[name] = tensor
    check_weights(spec, weights, str(directory))
    eos = generation_config.get("eos_token_id")
    eos_ids = _eos_ids(config.get("eos_token_id") if eos is None else eos, spec.vocab_size, directory)
    return Checkpoint(directory, spec, weights, generation_config, eos_ids, None, files.origin)


def _load_gguf(path: Path) -> Checkpoint:
    file = read_gguf(path)
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise WeightsError(f"{path}: missing: token_embd.weight, a matrix [vocab_size, width]")
    spec = spec_from_gguf(file.metadata, embedding.shape[0])
    stored = dict(file.tensors)
    output = stored.pop(GGUF_OUTPUT, None)
    if output is not None:
        _check_tied(str(path), GGUF_OUTPUT, output, embedding)
    names = gguf_names(spec)
    weights = {name: stored.pop(theirs) for name, theirs in names.items() if theirs in stored}
    weights.update(stored)
    check_weights(spec, weights, str(path))
    for name in weights:
        if is_norm(name):
            with np.errstate(invalid="ignore"):  # a NaN in the file is for the step that meets it to report
                weights[name] = Tensor.from_float32(weights[name].to_float32() - np.float32(1))
    keys = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
    eos = [file.metadata[key] for key in keys if key in file.metadata]
    return Checkpoint(path, spec, weights, {}, _eos_ids(eos, spec.vocab_size, path), file.metadata)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; FileFormatError when it holds anything else."""
    try:
        num_bytes = path.stat().st_size
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; a model directory needs it") from None
    if num_bytes > MAX_JSON_BYTES:
        raise FileFormatError(f"{path}: {num_bytes} bytes are more than the {MAX_JSON_BYTES} that JSON may have")
    return load_json_object(path.read_bytes(), str(path))


def _explain_no_config(directory: Path) -> None:
    """Raises where it is clear why the configuration is missing."""
    if directory.name.endswith(UNFINISHED):
        raise FileFormatError(
            f"{directory} is what a quantisation left that did not finish; delete it and run it again"
        )
    gguf_files = sorted(file.name for file in directory.glob("*.gguf"))
    if gguf_files:
        raise FileNotFoundError(f"{directory} has no {CONFIG_FILE}; did you mean {directory / gguf_files[0]}?")


def _check_tied(source: str, name: str, output: Tensor, embedding: Tensor) -> None:
    same_kind = (output.shape, output.format.name) == (embedding.shape, embedding.format.name)
    if not same_kind or not _equal_bytes(output, embedding):
        raise WeightsError(
            f"{source}: {name} differs from the embedding, but every Gemma ties the two; "
            "this is not a plain Gemma checkpoint"
        )


def _equal_bytes(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bytes, which need not stay in memory for it."""
    for first in range(0, one.num_bytes, _COMPARED_BYTES):
        part, other_part = (tensor.data[first : first + _COMPARED_BYTES] for tensor in (one, other))
        if not np.array_equal(part, other_part):
            return False
        drop_pages(part)
        drop_pages(other_part)
    return True


def _eos_ids(value: Any, vocab_size: int, source: Path) -> tuple[int, ...]:
    """`eos_token_id` may be absent, one id or a list."""
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size for item in ids):
        raise ConfigError(f"{source}: eos_token_id must be an id below {vocab_size} or a list of them, got {value!r}")
    return tuple(dict.fromkeys(ids))
