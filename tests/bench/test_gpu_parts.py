"""Every part of `bench gpu` on a CPU: tiny shapes, Triton's interpreter, the imagined GPU. Results are checked as on a
card; the figures mean nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from gemma2_fast.bench import prepare, shapes
from gemma2_fast.bench.gpu import attention, cases, ceilings, models, ops, peers, random_weights, recurrent, small_cases
from gemma2_fast.bench.gpu.card import Card
from gemma2_fast.bench.gpu.ceilings import GpuCeilings
from gemma2_fast.bench.gpu.engine import GpuEngine, Sizes
from gemma2_fast.bench.gpu.rows import GpuRow, Missing
from gemma2_fast.engine import gpu as gpu_backend
from gemma2_fast.engine import memory, options
from gemma2_fast.errors import BackendError
from gemma2_fast.triton_kernels.specialisation import Specialisation
from gemma2_fast.triton_kernels.tuning import Tuned
from gemma2_fast.weights.manifest import check_weights
from tests.cuda.fake_gpu import FakeGpu, Launch, build_fake_driver, teach_bfloat16
from tests.cuda.models import PAGE, small_kernels
from tests.cuda.models import SMALL_BLOCKS as IMAGINED_BLOCKS

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
    monkeypatch.setattr(cases, "tuned", lambda op, arch, **shape: Tuned(SMALL_BLOCKS[op], 4, 2))
    monkeypatch.setattr(small_cases, "RULES", {"greedy": (0.0, None, 1.0), "top_k 8": (1.0, 8, 0.95)})
    monkeypatch.setattr(shapes, "VOCAB_SIZE", 5000)
    monkeypatch.setattr(ceilings, "STREAM_BLOCKS", ((1024, 4), (2048, 4)))
    monkeypatch.setattr(random_weights, "DRAWN_WEIGHTS", 10_007)
    monkeypatch.setattr(random_weights, "DRAWN_STRIPS", 211)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)


def test_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    found = ceilings.measure(CARD, stream_bytes=1 << 14, size=64)
    assert min(found.stream_bytes, found.copy_bytes, found.matmul_operations) > 0
    monkeypatch.setattr(ceilings, "stream", lambda blocks, sums, num_warps: sums.fill_(3))
    with pytest.raises(BackendError, match="the kernel that measures the read bandwidth summed to"):
        ceilings.measure(CARD, stream_bytes=1 << 14, size=64)


OPS = ops.OpsPlan(
    sizes=("tiny",),
    attention=(("tiny", None), ("tiny", 40)),
    context=100,
    batches=(1, 2),
    many_tokens=20,
    small_size="tiny",
    repeats=1,
)


def test_ops() -> None:
    rows = list(ops.rows(CARD, CEILINGS, OPS))
    assert [row.reason for row in rows if isinstance(row, Missing) and row.is_fault] == []
    found = [row for row in rows if isinstance(row, GpuRow)]
    assert {row.what for row in found} == {
        *(f"{op} {stored}" for op in ("matmul", "matmul_tiled", "embed") for stored in ("bfloat16", "int8", "int4")),
        "geglu", "attention_decode", "attention_prefill", "rms_norm_add", "rope", "sample",
    }  # fmt: skip
    assert sum(row.error is None for row in found) == 3  # of what is added up, a row a format
    assert {name for row in found for name in row.peers} == {"F.linear bfloat16", "FlexAttention"}
    assert all(not row.refused for row in found)


@pytest.mark.parametrize(
    ("module", "name", "what"),
    [
        (cases.matmul_kernel, "matmul", "matmul"),
        (cases.tiled_kernel, "matmul_tiled", "matmul_tiled"),
        (cases.geglu_kernel, "geglu", "geglu"),
        (attention, "attention_prefill", "attention_prefill"),
        (attention, "attention_decode", "attention_decode"),
        (small_cases.norm_kernel, "rms_norm_add", "rms_norm_add"),
        (small_cases.rope_kernel, "rope", "rope"),
        (small_cases.embed_kernel, "embed", "embed"),
        (small_cases.sample_kernel, "sample", "sample"),
    ],
)
def test_a_kernel_that_does_nothing_is_not_fast(
    module: Any, name: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose launch fails and nobody notices."""
    monkeypatch.setattr(module, name, lambda *_, **__: None)
    made = [make() for make in ops.cases(CARD, CEILINGS, OPS)]
    mine = [case for case in made if case.what.partition(" ")[0] == what]
    assert mine
    for case in mine:
        with pytest.raises(BackendError, match=f"{what}.*relative error"):
            ops.measure(CARD, case, 1, 0.0)


@pytest.mark.parametrize("part", [0, 1], ids=["codes", "factors"])
@pytest.mark.parametrize(
    ("module", "make"),
    [
        (cases.matmul_kernel, lambda: cases.matmul(CARD, CEILINGS, "tiny", "down", "int4")),
        (cases.tiled_kernel, lambda: cases.matmul_tiled(CARD, CEILINGS, "tiny", "down", "int4", 20)),
        (small_cases.embed_kernel, lambda: small_cases.embed(CARD, "tiny", 3, "int4")),
    ],
)
def test_int4_of_swapped_nibbles_is_wrong(module: Any, make: Any, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = module.__name__.rpartition(".")[2]
    right = getattr(module, name)

    def wrong(*given: Any, **how: Any) -> None:
        packed = [i for i, x in enumerate(given) if isinstance(x, torch.Tensor) and x.dtype == torch.uint8]
        swapped = {packed[part]: given[packed[part]] << 4 | given[packed[part]] >> 4}
        right(*(swapped.get(i, x) for i, x in enumerate(given)), **how)

    monkeypatch.setattr(module, name, wrong)
    case = make()
    with pytest.raises(BackendError, match="relative error"):
        ops.measure(CARD, case, 1, 0.0)


@pytest.mark.parametrize("mistake", [{"score_softcap": None}, {"window_keys": 39}, {"query_scale": 0.2}])
def test_attention_of_another_rule_is_wrong(mistake: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = attention.attention_prefill
    monkeypatch.setattr(attention, "attention_prefill", lambda *a, **how: right(*a, **{**how, **mistake}))
    case = attention.prefill(CARD, CEILINGS, "tiny", 100, 40)
    with pytest.raises(BackendError, match="relative error"):
        ops.measure(CARD, case, 1, 0.0)


def test_a_peer_that_fails_is_told_and_counts_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "CAP", 50.0)
    case = attention.prefill(CARD, CEILINGS, "tiny", 40, None)
    right = attention.flex_attention
    monkeypatch.setattr(attention, "flex_attention", lambda *a, **how: 1.1 * right(*a, **how))
    row = ops.measure(CARD, case, 1, deadline=float("inf"))
    assert row.ratio is None
    assert "its result is off by 0.1" in row.refused["FlexAttention"]
    assert ops.measure(CARD, case, 1, deadline=0.0).refused == {"FlexAttention": "no time was left"}
    assert not any(verdict.met for verdict in row.verdicts if "peer" in verdict.bar)


@pytest.fixture(scope="module")
def driver_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


TINY = {"width": 64, "mlp_width": 96, "head_dim": 16, "vocab_size": 128}


@pytest.fixture
def imagined(driver_library: Path, monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    """Its driver is where the engine looks for one."""
    monkeypatch.setitem(shapes.SIZES, "tiny", shapes.gemma2(**TINY, layers=2, heads=2, kv_heads=1, query_scalar=16))
    monkeypatch.setitem(shapes.SIZES, "tiny-recurrent", shapes.recurrent_gemma(**TINY, layers=3, heads=4, window=16))
    groups = {"COLS": 128}  # which int8 needs whole
    for op, sizes in {"matmul": {"ROWS": 128}, "matmul_tiled": SMALL_BLOCKS["matmul_tiled"]}.items():
        monkeypatch.setitem(IMAGINED_BLOCKS, op, {**sizes, **groups})
    for op in ("sample_scan", "sample_weigh", "sample_draw"):
        monkeypatch.setitem(IMAGINED_BLOCKS, op, {"BLOCK": 128})
    specs = map(models.spec_of, ("tiny", "tiny-recurrent"))
    gpu = FakeGpu(driver_library, [kernel for spec in specs for kernel in small_kernels(spec)])
    monkeypatch.setattr(options, "DRIVER_LIBRARY", gpu.path)
    monkeypatch.setattr(gpu_backend, "kernel_images", lambda arch: gpu.images())
    monkeypatch.setattr(memory, "GPU_PAGE_TOKENS", PAGE)
    for module in (models, recurrent):
        monkeypatch.setattr(module, "CHECKED_STEPS", 2)
    monkeypatch.setattr(peers, "CHECKED_TOKENS", 4)
    return gpu


DECODE = models.DecodePlan(
    "tiny", (4,), (2,), ("bfloat16", "int4"), steps=2, rounds=1, warmup_steps=1, checked_tokens=4
)


@pytest.mark.slow
def test_decode(imagined: FakeGpu) -> None:
    rows = list(models.decode_rows(CARD, CEILINGS, DECODE))
    formats = ("bfloat16", "int4")
    assert [row.what for row in rows] == [f"decode tiny {stored}" for stored in formats for _ in range(2)]
    for single, batch in zip(rows[::2], rows[1::2], strict=True):
        assert single.shape.startswith("context 4 to 6, batch 1, ")
        assert len(single.runs_us) == 2
        assert batch.tokens_per_s == pytest.approx(2e6 / batch.microseconds)


RECURRENT = recurrent.RecurrentPlan(
    "tiny-recurrent", (4, 9), 4, most_batch=2, steps=2, rounds=1, sampling_rounds=1, warmup_steps=1, checked_tokens=5
)


@pytest.mark.slow
def test_recurrent(imagined: FakeGpu) -> None:
    short, long, *sampled = recurrent.rows(CARD, CEILINGS, RECURRENT)
    assert short.shape.startswith("context 4 to 6, batch 1, ")
    assert long.shape.startswith("context 9 to 11, batch 1, ")
    assert (len(short.runs_us), short.peers) == (2, {})
    assert long.peers == {"itself after 4 tokens": pytest.approx(short.microseconds)}
    assert [row.shape.split(", ")[1] for row in sampled] == ["batch 1", "batch 2"]
    assert all("6000 tokens/s on a TPUv5e" in row.what for row in sampled)


@pytest.mark.slow
def test_prefill(imagined: FakeGpu) -> None:
    plan = models.PrefillPlan(("tiny",), tokens=6, repeats=2, checked_tokens=4)
    (row,) = models.prefill_rows(CARD, CEILINGS, plan)
    assert row.what == "prefill tiny bfloat16"
    assert row.tokens_per_s == pytest.approx(6e6 / row.microseconds)


@pytest.mark.slow
def test_peers(imagined: FakeGpu) -> None:
    plan = peers.PeersPlan("tiny", contexts=(4,), steps=2, rounds=2, warmup_steps=1)
    (row,) = peers.rows(CARD, CEILINGS, plan)
    assert row.refused == {}
    assert set(row.peers) == {peers.PLAIN, peers.TRANSFORMERS}
    assert len(row.runs_us) == 4


def test_kernels_that_compute_nothing_are_noticed(imagined: FakeGpu) -> None:
    imagined.computes = False
    with pytest.raises(BackendError, match="the logits"):
        models.check_against_reference(models.spec_of("tiny"), "bfloat16", 20)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "op"), [("tiny", "attention_decode"), ("tiny-recurrent", "rg_lru_step")])
def test_a_decode_step_without_a_kernel_is_noticed(
    size: str, op: str, imagined: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = imagined._compute

    def all_but_one(specialisation: Specialisation, kinds: dict[str, str], launch: Launch) -> None:
        if specialisation.op != op:
            compute(specialisation, kinds, launch)

    monkeypatch.setattr(imagined, "_compute", all_but_one)
    monkeypatch.setattr(prepare, "DEVIATION", 64**-0.5)  # layers of 64 are felt as those of 2560 with 0.02
    spec = models.spec_of(size)
    with GpuEngine(spec, random_weights.random_tensors(spec, None), Sizes(max_seq_len=64, max_batch=2)) as engine:
        for batch in (1, 2):
            with pytest.raises(BackendError, match="the likeliest tokens are not those of one prompt"):
                engine.check_decode(6, 3, batch)


@pytest.mark.slow
def test_wrong_choices_are_noticed(imagined: FakeGpu, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = imagined._compute

    def and_choose_another(specialisation: Specialisation, kinds: dict[str, str], launch: Launch) -> None:
        compute(specialisation, kinds, launch)
        if specialisation.op == "sample_draw":
            imagined.tensor(int(launch.arguments["out"]), "i32")[0] = 3

    monkeypatch.setattr(imagined, "_compute", and_choose_another)
    spec = models.spec_of("tiny")
    with (
        GpuEngine(spec, random_weights.random_tensors(spec, None), Sizes(max_seq_len=64)) as engine,
        pytest.raises(BackendError, match="the device chooses other tokens than the host"),
    ):
        engine.check_decode(6, 2)


def test_a_peer_that_computes_something_else_is_not_timed() -> None:
    class Other:
        def logits(self, ids: Sequence[int]) -> torch.Tensor:
            return torch.tensor([1.0, 0.0])

        def decode(self, steps: int) -> list[float]:
            raise AssertionError("timed")

    with pytest.raises(BackendError, match="its logits are .* from ours"):
        peers.checked(Other(), [1], torch.tensor([1.0, 0.1]), 1)


def test_random_tensors_take_the_memory_of_the_largest() -> None:
    spec = models.spec_of("tiny")
    for quantization, name in ((None, "BF16"), ("int8", "INT8_G128"), ("int4", "INT4_G32")):
        weights = random_weights.random_tensors(spec, quantization)
        check_weights(spec, weights, "random")
        gate, up = (weights[f"layers.0.mlp.{role}"] for role in ("gate", "up"))
        assert gate.format.name == name
        assert gate.data.base is up.data.base
        assert not (gate.to_float32() == up.to_float32()).all()
        assert 0.01 < gate.to_float32().std() < 0.04
        assert 0.05 < weights["final_norm"].to_float32().std() < 0.2
