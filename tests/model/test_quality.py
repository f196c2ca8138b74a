"""What quantisation costs the real Gemma 3 270M on public-domain prose. `make quality` runs it over all of the texts.

Figures are relative to the demo's file dequantised to bfloat16. Differences are paired, token by token, and come with
their standard error: over few tokens a bound can only be held as far as that tells.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.support.quality import losses, report, windows, write_bf16, write_q4_0

pytestmark = pytest.mark.demo

NUM_WINDOWS = int(os.environ.get("GEMMA2_FAST_QUALITY_WINDOWS", "2"))
INT8_BOUND = 0.005
MODELS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "int8"},
    "int8, float activations": {"quantization": "int8", "activations": "float32"},
    "int4": {"quantization": "int4"},
    "Q4_0 of the gguf package": {},
}


class Measured:
    """Losses of a model over the windows, each measured when it is first asked for, and printed."""

    def __init__(self, directory: Path) -> None:
        self._paths = {"Q4_0 of the gguf package": directory / "q4_0.gguf"}
        self._bf16 = directory / "bf16"
        self._bf16.mkdir()
        write_bf16(self._bf16)
        write_q4_0(self._bf16, self._paths["Q4_0 of the gguf package"])
        self._windows = windows(NUM_WINDOWS)
        self._losses: dict[str, NDArray[np.float32]] = {}

    def __getitem__(self, name: str) -> NDArray[np.float32]:
        if name not in self._losses:
            path = self._paths.get(name, self._bf16)
            self._losses[name] = losses(path, self._windows, **MODELS[name])
            print("\n" + report(name, self._losses[name], self["bf16"]))
        return self._losses[name]

    def difference(self, name: str, to: str = "bf16") -> tuple[float, float]:
        """Its mean over the tokens, in nats, and the standard error."""
        values = self[name].astype(np.float64) - self[to]
        return float(values.mean()), float(values.std() / len(values) ** 0.5)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    return Measured(tmp_path_factory.mktemp("quality"))


def test_the_baseline_reads_english(measured: Measured) -> None:
    assert len(measured["bf16"]) > 900 * NUM_WINDOWS
    assert 2.5 < measured["bf16"].mean() < 4.0  # a vocabulary of 262,144 chosen blindly costs 12.5


@pytest.mark.parametrize("name", ["int8", "int8, float activations"])
def test_int8_costs_little(measured: Measured, name: str) -> None:
    mean, error = measured.difference(name)
    assert mean <= INT8_BOUND + (0 if NUM_WINDOWS > 20 else 2 * error)


def test_int4_is_no_worse_than_q4_0(measured: Measured) -> None:
    mean, error = measured.difference("int4", to="Q4_0 of the gguf package")
    assert mean <= 2 * error
    lost, _ = measured.difference("int4")
    assert lost > INT8_BOUND  # four bits do cost something: the texts can tell
