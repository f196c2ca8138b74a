"""The gated activation, in Triton's interpreter, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gemma2_fast.triton_kernels import geglu as kernel
from tests.ops import plain
from tests.ops.plain import Floats
from tests.support.closeness import assert_close, assert_rejected

# gelu(x) of a large negative x divides by infinity, which is meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2")


def geglu(gate: Floats, up: Floats, block: int = 64) -> Floats:
    out = torch.full(gate.shape, torch.nan)
    kernel.geglu(torch.from_numpy(np.concatenate([gate, up], axis=1)), out, block=block)
    return out.numpy()


def drawn(tokens: int, width: int) -> tuple[Floats, Floats]:
    rng = np.random.default_rng(width)
    return 3 * rng.standard_normal((tokens, width), np.float32), rng.standard_normal((tokens, width), np.float32)


def test_by_hand() -> None:
    """GELU keeps large numbers and drops large negative ones; far out nothing overflows."""
    gate = np.array([[0, 20, -20, 1e4, -1e4, 1]], np.float32)
    out = geglu(gate, np.array([[5, 2, 2, 1, 1, 1]], np.float32))
    np.testing.assert_array_equal(out[0, :5], [0, 40, 0, 1e4, 0])
    assert out[0, 5] == pytest.approx(0.8411920, abs=1e-6)


@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (2, 63), (3, 64), (1, 65), (5, 200)])
def test_shapes(tokens: int, width: int) -> None:
    gate, up = drawn(tokens, width)
    exact, usual = plain.exact_and_plain(plain.geglu, gate, up)
    assert_close("geglu triton", geglu(gate, up), exact, usual)


def test_mutants_are_rejected() -> None:
    gate, up = drawn(4, 100)
    exact, usual = plain.exact_and_plain(plain.geglu, gate, up)
    assert_rejected("geglu triton", plain.gelu_erf(gate) * up, exact, usual)
    assert_rejected("geglu triton", geglu(up, gate), exact, usual)


def test_half_precision_is_rounded_once() -> None:
    """Stored and given in 16 bits, computed in float32. Of bfloat16 the interpreter's own conversion is wrong."""
    gate, up = (part.astype(np.float16) for part in drawn(3, 100))
    out = torch.empty(3, 100, dtype=torch.float16)
    kernel.geglu(torch.from_numpy(np.concatenate([gate, up], axis=1)), out, block=64)
    exact = plain.geglu(gate.astype(np.float64), up.astype(np.float64))
    np.testing.assert_allclose(out.numpy(), exact, rtol=1.01 * 2.0**-11, atol=2.0**-24)
