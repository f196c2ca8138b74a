"""The convolution of recurrent layers over a ring of inputs, in Triton's interpreter, against float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gemma2_fast.triton_kernels.conv1d import conv1d
from tests.support.closeness import assert_close, assert_rejected
from tests.triton_kernels.recurrent_batch import Layer, RecurrentBatch

RAGGED = [(0, 1), (0, 9), (1, 3), (2, 0), (3, 1), (2, 2), (90, 6)]


def convolve(
    batch: RecurrentBatch, ring: Tensor | None = None, block: int = 32, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[T, R]; x lies beside the other branch, as the matrix product before leaves it."""
    layer = batch.layer
    x = batch.rows().to(dtype)[:, : layer.width]
    ring = (batch.ring() if ring is None else ring).to(dtype)
    before = ring.clone()
    out = torch.full(x.shape, torch.nan, dtype=dtype)
    conv1d(
        x, ring, batch.state_slot, batch.token_sequence, batch.positions, batch.context_tokens, layer.conv,
        layer.conv_bias, out, block=block,
    )  # fmt: skip
    torch.testing.assert_close(ring, before, rtol=0, atol=0, equal_nan=True)  # a later kernel writes it
    return out


def one_channel(lengths: list[tuple[int, int]], inputs: list[list[float]]) -> RecurrentBatch:
    """Taps 1000, 100, 10 and 1, the last for the token itself, and a bias of one half."""
    drawn = RecurrentBatch.make(Layer.make(1, 1), lengths)
    layer = replace(drawn.layer, conv=torch.tensor([[1000.0, 100, 10, 1]]), conv_bias=torch.tensor([0.5]))
    return replace(drawn, layer=layer, inputs=tuple(torch.tensor(rows)[:, None] for rows in inputs))


def test_by_hand() -> None:
    """Digits of the inputs side by side; of a sequence that begins, those before it count as zero and are NaN."""
    nan = torch.nan
    batch = one_channel(
        [(0, 5), (7, 2), (1, 3)], [[nan, nan, nan, 1, 2, 3, 4, 5], [6, 7, 8, 9, 1], [nan, nan, 2, 3, 4, 5]]
    )
    expected = [1.5, 12.5, 123.5, 1234.5, 2345.5, 6789.5, 7891.5, 23.5, 234.5, 2345.5]
    np.testing.assert_array_equal(convolve(batch).flatten(), expected)


@pytest.mark.parametrize(("num_blocks", "block_width", "block"), [(1, 16, 16), (2, 16, 16), (3, 16, 32), (1, 7, 16)])
def test_ragged_batches(num_blocks: int, block_width: int, block: int) -> None:
    """Whole blocks of channels and parts of them; every number of earlier tokens in the ring and in the step."""
    batch = RecurrentBatch.make(Layer.make(num_blocks, block_width), RAGGED)
    exact, usual = batch.convolved(torch.float64), batch.convolved(torch.float32)
    assert_close("conv1d", convolve(batch, block=block), exact, usual)


def test_mutants_are_rejected() -> None:
    batch = RecurrentBatch.make(Layer.make(), RAGGED)
    exact, usual = batch.convolved(torch.float64), batch.convolved(torch.float32)
    reversed_taps = replace(batch, layer=replace(batch.layer, conv=batch.layer.conv.flip(1)))
    no_bias = replace(batch, layer=replace(batch.layer, conv_bias=torch.zeros(batch.layer.width)))
    for mutant in (reversed_taps, no_bias):
        assert_rejected("conv1d", mutant.convolved(torch.float64), exact, usual)
    started = replace(batch, lengths=tuple((context + 4, new) for context, new in RAGGED), inputs=batch.inputs)
    assert_rejected("conv1d", started.convolved(torch.float64), exact, usual)
    long_ago = RecurrentBatch.make(Layer.make(), [(90, 6), (7, 2)])
    exact, usual = long_ago.convolved(torch.float64), long_ago.convolved(torch.float32)
    assert_close("conv1d", convolve(long_ago), exact, usual)
    for ring in (long_ago.ring().roll(1, 1), long_ago.ring().roll(1, 0)):
        assert_rejected("conv1d", convolve(long_ago, ring.nan_to_num()), exact, usual)


def test_half_precision_is_rounded_once() -> None:
    """Stored and given in 16 bits, computed in float32. Of bfloat16 the interpreter's own conversion is wrong."""
    drawn = RecurrentBatch.make(Layer.make(), RAGGED)
    batch = replace(drawn, inputs=tuple(rows.half().float() for rows in drawn.inputs))
    exact = batch.convolved(torch.float64)
    ours = convolve(batch, dtype=torch.float16)
    np.testing.assert_allclose(ours, exact, rtol=1.01 * 2.0**-11, atol=2.0**-20)
