"""Every part of `bench gpu` on a CPU: tiny shapes, Triton's interpreter, the imagined GPU. Results are checked as on a
card; the figures mean nothing."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma2_fast.bench import (
    gpu_attention,
    gpu_ceilings,
    gpu_decoders,
    gpu_models,
    gpu_ops,
    gpu_peers,
    gpu_small_cases,
    shapes,
)
from gemma2_fast.bench.gpu_card import Card, relative_error, seconds_of
from gemma2_fast.bench.gpu_ceilings import GpuCeilings
from gemma2_fast.bench.gpu_rows import GpuRow, Missing
from gemma2_fast.engine import gpu as gpu_backend
from gemma2_fast.engine import memory, options
from gemma2_fast.errors import BackendError
from tests.cuda.fake_gpu import FakeGpu, teach_bfloat16
from tests.cuda.models import PAGE, small_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

CARD = Card(torch.device("cpu"), arch=90, num_processors=2, l2_bytes=64)
CEILINGS = GpuCeilings(stream_bytes=3e12, copy_bytes=2.8e12, matmul_operations=8e14)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many threads as there are processors make tiny products slower; nothing is compiled."""
    teach_bfloat16(monkeypatch)
    monkeypatch.setitem(shapes.SIZES, "small", (2, 128, 128, 2, 1, 128, 144))
    monkeypatch.setitem(shapes.SIZES, "wide", (2, 128, 128, 2, 1, 256, 256))
    monkeypatch.setitem(shapes.SIZES, "tiny", (3, 64, 96, 4, 2, 16, 16))
    monkeypatch.setattr(shapes, "VOCAB_SIZE", 512)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_ceilings, "STREAM_BLOCKS", ((1024, 4), (2048, 4)))
    found = gpu_ceilings.measure(CARD, stream_bytes=1 << 14, size=64)
    assert min(found.stream_bytes, found.copy_bytes, found.matmul_operations) > 0
    monkeypatch.setattr(gpu_ceilings, "stream", lambda blocks, sums, num_warps: sums.fill_(3))
    with pytest.raises(BackendError, match="the kernel that measures the read bandwidth summed to"):
        gpu_ceilings.measure(CARD, stream_bytes=1 << 14, size=64)


OPS = gpu_ops.OpsPlan(
    sizes=("small",),
    attention=(("small", None), ("wide", 40)),
    context=130,
    batches=(1, 2),
    many_tokens=20,
    small_size="small",
    repeats=2,
)


def test_ops() -> None:
    rows = list(gpu_ops.rows(CARD, CEILINGS, OPS))
    assert [row.reason for row in rows if isinstance(row, Missing)] == []
    found = [row for row in rows if isinstance(row, GpuRow)]
    assert {row.what for row in found} == {
        "matmul bfloat16", "matmul int8", "matmul_tiled bfloat16", "matmul_tiled int8", "geglu", "attention_decode",
        "attention_prefill", "rms_norm_add", "rope", "embed", "sample",
    }  # fmt: skip
    assert all(row.error is not None for row in found if "all of a step" not in row.shape)
    assert all(not row.refused for row in found)
    assert {name for row in found for name in row.peers} == {"F.linear bfloat16", "FlexAttention"}
