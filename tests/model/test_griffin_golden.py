"""DeepMind's RecurrentGemma, run by its own code (tests/golden), agrees with every backend; no mutant does."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gemma2_fast import Generator, _core
from gemma2_fast.reference import ReferenceModel
from gemma2_fast.weights.load import Checkpoint, load_checkpoint
from gemma2_fast.weights.tensor import Tensor
from gemma2_fast.weights.writer import write_safetensors
from tests.golden import griffin_model
from tests.support.mutants import RECURRENCE_MUTANTS, REFERENCE_MUTANTS, mutants_of

GOLDEN = Path(griffin_model.__file__).with_name("recurrent_gemma.npz")
EXACT_TOLERANCE = 1e-9
MUTANT_MARGIN = 100
GAP_MARGIN = 10

Logits = NDArray[np.float64]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with DeepMind's names and layouts."""
    path = tmp_path_factory.mktemp("griffin")
    (path / "config.json").write_text(json.dumps(griffin_model.config()))
    weights = {name: Tensor.from_float32(values) for name, values in griffin_model.weights().items()}
    write_safetensors(path / "model.safetensors", weights, {})
    return path


@pytest.fixture(scope="module")
def checkpoint(directory: Path) -> Checkpoint:
    return load_checkpoint(directory)


@pytest.fixture(scope="module")
def golden() -> Mapping[str, Logits]:
    with np.load(GOLDEN) as stored:
        return dict(stored)


IDS = {name: ids.tolist() for name, ids in griffin_model.tokens().items()}
# Packed documents and rows of a batch are sequences of their own here.
SEQUENCES = {
    "short": [IDS["short"]],
    "long": [IDS["long"]],
    "packed": [IDS["first"], IDS["second"]],
    "batch": [IDS["long"][: griffin_model.SHORT], IDS["short"]],
}


def kept_rows(name: str, logits: list[Logits]) -> Logits:
    """The logits [batch, rows, V] that the golden file keeps."""
    if name == "packed":
        logits = [np.concatenate(logits)]
    return np.stack([sequence[griffin_model.ROWS[name]] for sequence in logits])


def reference_logits(model: ReferenceModel, name: str) -> Logits:
    return kept_rows(name, [model.logits(ids).double().numpy() for ids in SEQUENCES[name]])


def largest_error(golden: Mapping[str, Logits], name: str, logits: Logits) -> float:
    assert logits.shape == golden[name].shape
    return float(np.abs(logits - golden[name]).max())


@pytest.mark.parametrize("name", SEQUENCES)
def test_reference_in_float64(checkpoint: Checkpoint, golden: Mapping[str, Logits], name: str) -> None:
    model = ReferenceModel(checkpoint.spec, checkpoint.weights, torch.float64)
    assert largest_error(golden, name, reference_logits(model, name)) <= EXACT_TOLERANCE


@pytest.mark.parametrize("name", SEQUENCES)
def test_reference_in_float32(checkpoint: Checkpoint, golden: Mapping[str, Logits], name: str) -> None:
    model = ReferenceModel(checkpoint.spec, checkpoint.weights, torch.float32)
    assert largest_error(golden, name, reference_logits(model, name)) <= 4 * golden[f"{name}_float32_error"]


@pytest.mark.parametrize("instruction_set", _core.instruction_sets())
def test_cpu(directory: Path, golden: Mapping[str, Logits], instruction_set: str) -> None:
    """The sequences of a case together, in steps that cut them."""
    with (
        Generator.from_pretrained(directory, instruction_set=instruction_set, max_step_tokens=21) as gen,
        ThreadPoolExecutor(2) as pool,
    ):
        assert gen.backend == "cpu"
        for name, sequences in SEQUENCES.items():
            logits = kept_rows(name, list(pool.map(gen.logits, sequences)))
            assert largest_error(golden, name, logits) <= 4 * golden[f"{name}_float32_error"], name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", griffin_model.GENERATED)
def test_generated_tokens(directory: Path, golden: Mapping[str, Logits], name: str, backend: str) -> None:
    """The same as DeepMind's own cache gives, past the window and the prompt, alone and in a batch."""
    expected = golden[f"{name}_generated"].tolist()
    for ids in expected:
        assert len(ids) == griffin_model.NEW_TOKENS
        assert len(set(ids)) >= 30, "a model that repeats itself proves nothing"
        assert len(set(ids[-50:])) >= 8, "nor does one that comes to do so"
    # No choice was close: each logit may be wrong by as much as elsewhere in this file, and by more.
    assert golden[f"{name}_smallest_gap"] >= GAP_MARGIN * 2 * 4 * golden[f"{name}_generated_float32_error"]
    with Generator.from_pretrained(directory, backend=backend, max_step_tokens=32) as gen:
        assert gen.backend == backend
        found = gen.generate(SEQUENCES[name], max_tokens=griffin_model.NEW_TOKENS, ignore_eos=True)
    assert [list(generation.token_ids) for generation in found] == expected


def test_mutants_are_far_away(checkpoint: Checkpoint, golden: Mapping[str, Logits]) -> None:
    """A hundred times what is allowed in float32. "window-1" is the window of transformers and of gemma.cpp."""
    threshold = MUTANT_MARGIN * 4 * golden["long_float32_error"]
    mutants = mutants_of(checkpoint.spec, checkpoint.weights)
    assert {"window-1", "full rotary", "gates transposed", "no biases of the layers"} <= {
        name for name, _, _ in mutants
    }
    for name, spec, weights in mutants:
        logits = reference_logits(ReferenceModel(spec, weights, torch.float64), "long")
        assert largest_error(golden, "long", logits) >= threshold, name
    model = ReferenceModel(checkpoint.spec, checkpoint.weights, torch.float64)
    for name, mutate in (REFERENCE_MUTANTS | RECURRENCE_MUTANTS).items():
        if name == "cap after mask":
            continue  # these scores have no cap
        with pytest.MonkeyPatch.context() as patch:
            mutate(patch)
            assert largest_error(golden, "long", reference_logits(model, "long")) >= threshold, name
