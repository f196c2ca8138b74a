"""Tests that need a card are skipped, and counted, unless `make gpu` runs them; results stand beside their bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.cuda.conftest import driver_library as driver_library  # of the imagined GPU
from tests.gpu.places import GPU_WANTED
from tests.support.closeness import assert_rejected, error_over_bound

NO_GPU = "needs an NVIDIA GPU: run `make gpu`"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is None:
        return
    if not GPU_WANTED:
        pytest.skip(NO_GPU)
    if not torch.cuda.is_available():
        pytest.fail("GEMMA2_FAST_GPU=1 asks for a GPU, and torch sees none")


class Judge:
    """The bound of tests.support.closeness, by the dtype of what a kernel gave."""

    def __init__(self, record: Callable[[str, object], None]) -> None:
        self.record = record

    def close(self, actual: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor) -> None:
        ratio = error_over_bound(_row(actual), *map(_numbers, (actual, exact, plain)))
        self.record("error over bound", f"{ratio:.3g}")
        assert ratio <= 1.0, f"the error is {ratio:.3g} times its bound"

    def rejects(self, mutant: torch.Tensor, exact: torch.Tensor, plain: torch.Tensor, margin: float = 10.0) -> None:
        assert_rejected(_row(plain), *map(_numbers, (mutant, exact, plain)), margin)


def _row(values: torch.Tensor) -> str:
    return f"gpu {str(values.dtype).removeprefix('torch.')}"


def _numbers(values: torch.Tensor) -> Any:
    return values.double().cpu().numpy()


@pytest.fixture
def judge(record_property: Callable[[str, object], None]) -> Judge:
    return Judge(record_property)
