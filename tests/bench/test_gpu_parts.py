"""Every part of `bench gpu` on a CPU: tiny shapes, Triton's interpreter, the imagined GPU. Results are checked as on a
card; the figures mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma2_fast.bench import (
    gpu_attention,
    gpu_cases,
    gpu_ceilings,
    gpu_engine,
    gpu_models,
    gpu_ops,
    gpu_peers,
    gpu_random,
    gpu_small_cases,
    shapes,
)
from gemma2_fast.bench.gpu_card import Card
from gemma2_fast.bench.gpu_ceilings import GpuCeilings
from gemma2_fast.bench.gpu_rows import GpuRow, Missing
from gemma2_fast.engine import gpu as gpu_backend
from gemma2_fast.engine import memory, options
from gemma2_fast.errors import BackendError
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.tuning import Tuned
from gemma2_fast.weights.manifest import check_weights
from tests.cuda import models
from tests.cuda.fake_gpu import FakeGpu, Launch, build_fake_driver, teach_bfloat16
from tests.cuda.models import PAGE, small_kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2"),
    pytest.mark.filterwarnings("ignore:\nflex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # by the compiler of torch itself
]

CARD = Card(torch.device("cpu"), arch=90, num_processors=4, l2_bytes=64)
CEILINGS = GpuCeilings(stream_bytes=3e12, copy_bytes=2.8e12, matmul_operations=8e14)
SMALL_BLOCKS = {
    "matmul": {"ROWS": 128, "COLS": 128},
    "matmul_tiled": {"TILE_TOKENS": 32, "TILE_ROWS": 128, "COLS": 128},
    "attention_prefill": {"TILE": 32, "BLOCK": 32},
    "attention_decode": {"ROWS": 16, "BLOCK": 32},
}


@pytest.fixture(autouse=True)
def _small(tiny_size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, as the interpreter takes milliseconds for one, and nothing is compiled."""
    teach_bfloat16(monkeypatch)
    monkeypatch.setattr(gpu_cases, "tuned", lambda op, arch, **shape: Tuned(SMALL_BLOCKS[op], 4, 2))
    monkeypatch.setattr(gpu_small_cases, "RULES", {"greedy": (0.0, None, 1.0), "top_k 8": (1.0, 8, 0.95)})
    monkeypatch.setattr(gpu_ceilings, "STREAM_BLOCKS", ((1024, 4), (2048, 4)))
    monkeypatch.setattr(gpu_random, "DRAWN_WEIGHTS", 10_007)
    monkeypatch.setattr(gpu_random, "DRAWN_STRIPS", 211)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = gpu_ceilings.measure(CARD, stream_bytes=1 << 14, size=64)
    assert min(found.stream_bytes, found.copy_bytes, found.matmul_operations) > 0
    monkeypatch.setattr(gpu_ceilings, "stream", lambda blocks, sums, num_warps: sums.fill_(3))
    with pytest.raises(BackendError, match="the kernel that measures the read bandwidth summed to"):
        gpu_ceilings.measure(CARD, stream_bytes=1 << 14, size=64)


OPS = gpu_ops.OpsPlan(
    sizes=("tiny",),
    attention=(("tiny", None), ("tiny", 40)),
    context=100,
    batches=(1, 2),
    many_tokens=20,
    small_size="tiny",
    repeats=1,
)


def test_ops() -> None:
    rows = list(gpu_ops.rows(CARD, CEILINGS, OPS))
    assert [row.reason for row in rows if isinstance(row, Missing) and row.is_fault] == []
    found = [row for row in rows if isinstance(row, GpuRow)]
    assert {row.what for row in found} == {
        "matmul bfloat16", "matmul int8", "matmul_tiled bfloat16", "matmul_tiled int8", "geglu", "attention_decode",
        "attention_prefill", "rms_norm_add", "rope", "embed", "sample",
    }  # fmt: skip
    assert [row.error for row in found if row.error is None] == [None, None]  # of what is added up
    assert {name for row in found for name in row.peers} == {"F.linear bfloat16", "FlexAttention"}
    assert all(not row.refused for row in found)


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        (gpu_cases.matmul_kernel, "matmul", "matmul"),
        (gpu_cases.tiled_kernel, "matmul_tiled", "matmul_tiled"),
        (gpu_cases.geglu_kernel, "geglu", "geglu"),
        (gpu_attention, "attention_prefill", "attention_prefill"),
        (gpu_attention, "attention_decode", "attention_decode"),
        (gpu_small_cases.norm_kernel, "rms_norm_add", "rms_norm_add"),
        (gpu_small_cases.rope_kernel, "rope", "rope"),
        (gpu_small_cases.embed_kernel, "embed", "embed"),
        (gpu_small_cases.sample_kernel, "sample", "sample"),
    ],
)
def test_a_kernel_that_does_nothing_is_not_fast(
    module: Any, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose launch fails and nobody notices."""
    monkeypatch.setattr(module, name, lambda *_, **__: None)
    cases = [make() for make in gpu_ops.cases(CARD, CEILINGS, OPS)]
    mine = [case for case in cases if case.what.partition(" ")[0] == what]
    assert mine
    for case in mine:
        with pytest.raises(BackendError, match=f"{what}.*relative error"):
            gpu_ops.measure(CARD, case, 1, 0.0)


@pytest.mark.parametrize("mistake", [{"score_softcap": None}, {"window_keys": 39}, {"query_scale": 0.2}])
def test_attention_of_another_rule_is_wrong(mistake: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = gpu_attention.attention_prefill
    monkeypatch.setattr(gpu_attention, "attention_prefill", lambda *a, **how: right(*a, **{**how, **mistake}))
    case = gpu_attention.prefill(CARD, CEILINGS, "tiny", 100, 40)
    with pytest.raises(BackendError, match="relative error"):
        gpu_ops.measure(CARD, case, 1, 0.0)


def test_a_peer_that_fails_is_told_and_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_attention, "CAP", 50.0)
    case = gpu_attention.prefill(CARD, CEILINGS, "tiny", 40, None)
    right = gpu_attention.flex_attention
    monkeypatch.setattr(gpu_attention, "flex_attention", lambda *a, **how: 1.1 * right(*a, **how))
    row = gpu_ops.measure(CARD, case, 1, deadline=float("inf"))
    assert row.ratio is None
    assert "its result is off by 0.1" in row.refused["FlexAttention"]
    assert gpu_ops.measure(CARD, case, 1, deadline=0.0).refused == {"FlexAttention": "no time was left"}
    assert not any(verdict.met for verdict in row.verdicts if "peer" in verdict.bar)


@pytest.fixture(scope="module")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def imagined(driver_library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Its driver is where the engine looks for one."""
    tiny = {"layers": 2, "width": 64, "mlp_width": 96, "heads": 2, "kv_heads": 1, "head_dim": 16, "vocab_size": 128}
    monkeypatch.setitem(shapes.SIZES, "tiny", shapes.gemma2(**tiny, query_scalar=16))
    groups = {"COLS": 128}  # which int8 needs whole
    for op, sizes in {"matmul": {"ROWS": 128}, "matmul_tiled": SMALL_BLOCKS["matmul_tiled"]}.items():
        monkeypatch.setitem(models.SMALL_BLOCKS, op, {**sizes, **groups})
    for op in ("sample_scan", "sample_weigh", "sample_draw"):
        monkeypatch.setitem(models.SMALL_BLOCKS, op, {"BLOCK": 128})
    gpu = FakeGpu(driver_library, small_kernels(gpu_models.spec_of("tiny")))
    monkeypatch.setattr(options, "DRIVER_LIBRARY", gpu.path)
    monkeypatch.setattr(gpu_backend, "kernel_images", lambda arch: gpu.images())
    monkeypatch.setattr(memory, "GPU_PAGE_TOKENS", PAGE)
    monkeypatch.setattr(gpu_models, "CHECKED_STEPS", 2)
    monkeypatch.setattr(gpu_peers, "CHECKED_TOKENS", 4)
    return gpu


DECODE = gpu_models.DecodePlan(
    "tiny", (4,), (2,), ("bfloat16", "int8"), steps=2, rounds=1, warmup_steps=1, checked_tokens=4
)


@pytest.mark.slow
def test_decode(imagined: FakeGpu) -> None:
    rows = list(gpu_models.decode_rows(CARD, CEILINGS, DECODE))
    assert [row.what for row in rows] == [f"decode tiny {stored}" for stored in ("bfloat16", "int8") for _ in range(2)]
    for single, batch in (rows[:2], rows[2:]):
        assert isinstance(single, GpuRow)
        assert isinstance(batch, GpuRow)
        assert single.shape.startswith("context 4 to 6, batch 1, ")
        assert len(single.runs_us) == 2
        assert batch.tokens_per_s == pytest.approx(2e6 / batch.microseconds)


@pytest.mark.slow
def test_prefill(imagined: FakeGpu) -> None:
    plan = gpu_models.PrefillPlan(("tiny",), tokens=6, repeats=2, checked_tokens=4)
    (row,) = gpu_models.prefill_rows(CARD, CEILINGS, plan)
    assert row.what == "prefill tiny bfloat16"
    assert row.tokens_per_s == pytest.approx(6e6 / row.microseconds)


@pytest.mark.slow
def test_peers(imagined: FakeGpu) -> None:
    plan = gpu_peers.PeersPlan("tiny", contexts=(4,), steps=2, rounds=2, warmup_steps=1)
    (row,) = gpu_peers.rows(CARD, CEILINGS, plan)
    assert row.refused == {}
    assert set(row.peers) == {gpu_peers.PLAIN, gpu_peers.TRANSFORMERS}
    assert len(row.runs_us) == 4


def test_kernels_that_compute_nothing_are_noticed(imagined: FakeGpu) -> None:
    imagined.computes = False
    with pytest.raises(BackendError, match="the logits"):
        gpu_models.check_against_reference(gpu_models.spec_of("tiny"), "bfloat16", 20)


@pytest.mark.slow
def test_a_decode_step_without_attention_is_noticed(imagined: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = imagined._compute

    def all_but_attention(specialisation: Specialisation, kinds: dict[str, str], launch: Launch) -> None:
        if specialisation.op != "attention_decode":
            compute(specialisation, kinds, launch)

    monkeypatch.setattr(imagined, "_compute", all_but_attention)
    spec = gpu_models.spec_of("tiny")
    with (
        gpu_engine.GpuEngine(spec, gpu_random.random_tensors(spec, None), gpu_engine.Sizes(max_seq_len=64)) as engine,
        pytest.raises(BackendError, match="the likeliest tokens are not those of one prompt"),
    ):
        engine.check_decode(6, 3)


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    class Other:
        def logits(self, ids: Sequence[int]) -> torch.Tensor:
            return torch.tensor([1.0, 0.0])

        def decode(self, steps: int) -> list[float]:
            raise AssertionError("timed")

    with pytest.raises(BackendError, match="its logits are .* from ours"):
        gpu_peers.checked(Other(), [1], torch.tensor([1.0, 0.1]), 1)


def test_random_tensors_take_the_memory_of_the_largest() -> None:
    spec = gpu_models.spec_of("tiny")
    for quantization, name in ((None, "BF16"), ("int8", "INT8_G128"), ("int4", "INT4_G32")):
        weights = gpu_random.random_tensors(spec, quantization)
        check_weights(spec, weights, "random")
        gate, up = (weights[f"layers.0.mlp.{role}"] for role in ("gate", "up"))
        assert gate.format.name == name
        assert gate.data.base is up.data.base
        assert not (gate.to_float32() == up.to_float32()).all()
        assert 0.01 < gate.to_float32().std() < 0.04
        assert 0.05 < weights["final_norm"].to_float32().std() < 0.2
