"""Embedding rows, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma2_fast.triton_kernels.embed import embed
from tests.ops.plain import Floats
from tests.triton_kernels.stored_rows import StoredRows


@pytest.mark.parametrize("width", [1, 64, 130])
def test_rows_are_scaled(width: int) -> None:
    table = np.random.default_rng(width).standard_normal((7, width), np.float32)
    ids = np.array([6, 0, 3, 3], np.int32)
    out = torch.full((4, width), torch.nan)
    embed(torch.from_numpy(ids), torch.from_numpy(table), 1.5, out, block=64)
    np.testing.assert_array_equal(out.numpy(), table[ids] * np.float32(1.5))


def test_ids_that_the_step_before_chose() -> None:
    """Rows 2, 0 and 1 of what was chosen; row 1 has nothing, and what stands for it is not looked at."""
    table = np.random.default_rng(0).standard_normal((9, 64), np.float32)
    ids, chosen = np.array([4, -3, -1, -2, 0], np.int32), np.array([7, -1, 8], np.int32)
    out = torch.full((5, 64), torch.nan)
    embed(torch.from_numpy(ids), torch.from_numpy(table), 2.0, out, chosen=torch.from_numpy(chosen), block=64)
    expected = table[[4, 8, 7, 0, 0]] * np.float32(2)
    np.testing.assert_array_equal(out.numpy()[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])
    assert np.isfinite(out.numpy()[3]).all()


@pytest.mark.parametrize("name", ["INT8_G128", "INT4_G32"])
@pytest.mark.parametrize("width", [64, 128, 300])
def test_codes(name: str, width: int) -> None:
    stored = StoredRows.make(name, 70, width)
    ids = np.array([69, 1, 64], np.int32)

    def ours(weight: torch.Tensor, **others: torch.Tensor) -> Floats:
        out = torch.full((3, width), torch.nan)
        embed(torch.from_numpy(ids), weight, 2.0, out, **others, block=64)
        return out.numpy()

    exact = stored.exact[ids] * np.float32(2)
    np.testing.assert_array_equal(ours(**stored.arrays), exact)
    for wrong in stored.mutants():
        assert (ours(**wrong) != exact).any()
