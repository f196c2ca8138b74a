"""Embedding rows, in Triton's interpreter."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma2_fast.triton_kernels.embed import embed


@pytest.mark.parametrize("width", [1, 64, 130])
def test_rows_are_scaled(width: int) -> None:
    table = np.random.default_rng(width).standard_normal((7, width), np.float32)
    ids = np.array([6, 0, 3, 3], np.int32)
    out = torch.full((4, width), torch.nan)
    embed(torch.from_numpy(ids), torch.from_numpy(table), 1.5, out, block=64)
    np.testing.assert_array_equal(out.numpy(), table[ids] * np.float32(1.5))


def test_codes_have_a_scale_a_group() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (5, 200)).astype(np.int8)
    scales = rng.uniform(0.01, 0.02, (5, 2)).astype(np.float32)
    ids = np.array([4, 1], np.int32)
    out = torch.full((2, 200), torch.nan)
    given = (torch.from_numpy(ids), torch.from_numpy(codes), 2.0, out, torch.from_numpy(scales))
    embed(*given, block=64)
    np.testing.assert_array_equal(out.numpy(), codes[ids] * np.repeat(scales, 128, axis=1)[ids, :200] * np.float32(2))
