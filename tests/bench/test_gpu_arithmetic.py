"""What `bench gpu` counts: bytes of a step, operations of a prompt, shares of a limit, bars. Expected numbers are
worked out by hand from the released configurations."""

from __future__ import annotations

import re
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from gemma2_fast.bench import gpu, traffic
from gemma2_fast.bench.gpu import models, ops, recurrent
from gemma2_fast.bench.gpu.attention import num_pairs, num_splits
from gemma2_fast.bench.gpu.bars import BARS, Bar, bars_of
from gemma2_fast.bench.gpu.card import Card, alternate, relative_error, state
from gemma2_fast.bench.gpu.cases import LINEAR, matrices
from gemma2_fast.bench.gpu.ceilings import GpuCeilings
from gemma2_fast.bench.gpu.models import one_of_each, spec_of, step_bytes
from gemma2_fast.bench.gpu.ops import whole_step
from gemma2_fast.bench.gpu.recurrent import batches
from gemma2_fast.bench.gpu.rows import GpuRow, Missing, cells, row_of, tally, text_table
from gemma2_fast.bench.record import record, write_record
from gemma2_fast.bench.report import markdown
from gemma2_fast.cli import main
from gemma2_fast.engine.cache_plan import CachePlan, plan_cache
from gemma2_fast.errors import BackendError

ROOT = Path(__file__).parents[2]
CEILINGS = GpuCeilings(stream_bytes=3e12, copy_bytes=2.8e12, matmul_operations=8e14)
H100 = Card(torch.device("cpu"), arch=90, num_processors=132, l2_bytes=50 << 20)


def cache(size: str) -> CachePlan:
    return plan_cache(
        spec_of(size), kv_dtype="bfloat16", max_seq_len=8192, max_sequences=1, max_step_tokens=2048, page_tokens=64
    )


@pytest.mark.parametrize(
    ("size", "gb", "gb_at_8k"), [("2b", 5.229, 0.6543), ("9b", 18.483, 2.1139), ("27b", 54.454, 2.3153)]
)
def test_bytes_of_a_decode_step(size: str, gb: float, gb_at_8k: float) -> None:
    """Weights once, the table as the head; half of the layers read 4096 keys at the most."""
    spec, plan = spec_of(size), cache(size)
    weights = step_bytes(spec, plan, "bfloat16", 0, 1)
    assert weights / 1e9 == pytest.approx(gb, abs=2e-3)
    assert (step_bytes(spec, plan, "bfloat16", 8192, 1) - weights) / 1e9 == pytest.approx(gb_at_8k, abs=1e-4)
    one, many = (step_bytes(spec, plan, "bfloat16", 128, batch) for batch in (1, 32))
    assert many - weights == 32 * (one - weights)


def test_bytes_of_quantized_weights() -> None:
    """2.614 * 10^9 weights in 8.125 bits; in 4.25 bits but for the table of 0.590 * 10^9, which stays in 8.125."""
    weights = {stored: step_bytes(spec_of("2b"), cache("2b"), stored, 0, 1) / 1e9 for stored in ("int8", "int4")}
    assert weights == pytest.approx({"int8": 2.655, "int4": 1.675}, abs=2e-3)


@pytest.mark.parametrize(("size", "tflop"), [("2b", 33.2), ("9b", 136.4), ("27b", 426.7)])
def test_operations_of_a_prompt(size: str, tflop: float) -> None:
    assert 8192 * traffic.block_operations(spec_of(size)) / 1e12 == pytest.approx(tflop, abs=0.06)


def test_layers_that_are_compared_with_the_reference() -> None:
    """A window and none; two recurrent layers and one of attention."""
    assert [len(one_of_each(spec_of(size)).layers) for size in ("9b", "gemma-2b", "recurrentgemma-2b")] == [2, 1, 3]


def test_batches_that_a_cache_holds() -> None:
    """A sequence of RecurrentGemma 2B takes 65 pages of 512 KiB and a state of 0.74 MB: 100 of them 3.48 GB."""

    def plan(limit_bytes: int) -> CachePlan:
        return plan_cache(
            spec_of("recurrentgemma-2b"), kv_dtype="bfloat16", max_seq_len=30_000, max_sequences=100,
            max_step_tokens=2048, page_tokens=64, limit_bytes=limit_bytes,
        )  # fmt: skip

    assert batches(plan(3_490_000_000), 128) == [1, 2, 4, 8, 16, 32, 64]
    assert batches(plan(3_490_000_000), 16) == [1, 2, 4, 8, 16]
    assert batches(plan(2_000_000_000), 128) == [1, 2, 4, 8, 16, 32]


def test_turns_begin_with_another_one_each_round() -> None:
    calls: list[str] = []

    def turn(name: str) -> list[float]:
        calls.append(name)
        return [float(len(calls))]

    assert alternate({name: lambda name=name: turn(name) for name in "abc"}, 2) == {  # type: ignore[misc]
        "a": [1, 6], "b": [2, 4], "c": [3, 5],
    }  # fmt: skip
    assert "".join(calls) == "abcbca"


def test_pairs_that_attention_counts() -> None:
    assert num_pairs(4, None) == 1 + 2 + 3 + 4
    assert num_pairs(4, 2) == 1 + 2 + 2 + 2
    assert num_pairs(3, 8) == 6
    assert num_pairs(8192, None) / 1e6 == pytest.approx(33.6, abs=0.05)
    assert num_pairs(8192, 4096) / 1e6 == pytest.approx(25.2, abs=0.05)


def test_splits_of_decode_attention() -> None:
    """264 programs on 132 processors, none with less than a block of keys."""
    assert num_splits(H100, 4, 8192, 64) == 66
    assert num_splits(H100, 4, 128, 64) == 2
    assert num_splits(H100, 512, 8192, 64) == 1


def test_copies_keep_buffers_cold() -> None:
    """Between two uses of one, the others are touched: more than 100 MiB."""
    for num_bytes in (1 << 20, 30 << 20, 200 << 20):
        assert (H100.copies(num_bytes) - 1) * num_bytes >= 100 << 20
    assert H100.copies(1 << 20) == 101
    assert H100.copies(200 << 20) == 2


def test_a_row_by_hand() -> None:
    """3 GB in 2 ms are 1500 GB/s, half of what memory gives; the best peer took three times as long."""
    row = row_of(
        "matmul int8", "m", [0.001, 0.002, 0.004], limit=CEILINGS.bytes(3e9), tokens=8,
        peers={"a": 0.006, "b": 0.009}, bars=(Bar("percent", 50), Bar("percent", 50.1)),
    )  # fmt: skip
    assert (row.microseconds, row.rate, row.unit, row.ceiling) == pytest.approx((2000, 1500, "GB/s", 3000))  # type: ignore[comparison-overlap]
    assert row.percent == pytest.approx(50)
    assert row.ratio == pytest.approx(3)
    assert row.tokens_per_s == pytest.approx(4000)
    assert row.runs_us == [1000, 2000, 4000]
    assert [verdict.met for verdict in row.verdicts] == [True, False, True]
    assert row.verdicts[2].bar == "at least 1 x the best peer"
    assert tally([asdict(row)]) == "2 of 3 bars met"


def test_the_best_peer_counts() -> None:
    row = row_of("op", "s", [1e-3], peers={"slow": 2e-3, "fast": 0.9e-3})
    assert row.ratio == pytest.approx(0.9)
    assert [verdict.met for verdict in row.verdicts] == [False]


def test_a_peer_that_was_not_measured_meets_no_bar() -> None:
    row = row_of("op", "s", [1e-3], refused={"peer": "no time"}, bars=(Bar("ratio", 1.2),))
    assert [(verdict.value, verdict.met) for verdict in row.verdicts] == [(None, False)]


def test_tflops_of_attention_beside_its_bar() -> None:
    """8k, 16 heads of 256: 0.55 TFLOP, so 450 TFLOP/s are 1.22 ms."""
    operations = 4 * 16 * 256 * num_pairs(8192, None)
    bars = bars_of("attention_prefill head_dim 256")
    for seconds, met in ((1.221e-3, True), (1.225e-3, False)):
        row = row_of("a", "s", [seconds], limit=CEILINGS.operations(operations), peers={"flex": 1.0}, bars=bars)
        assert row.unit == "TFLOP/s"
        assert row.verdicts[0].met == met


def matmul_row(size: str, matrix: str, microseconds: float, stored: str = "bfloat16") -> GpuRow:
    rows, cols = matrices(size)[matrix]
    limit = CEILINGS.bytes(2.0 * rows * cols)
    shape = f"{size} {matrix} [{rows}, {cols}] x 1"
    return row_of(f"matmul {stored}", shape, [microseconds / 1e6], limit=limit, peers={LINEAR: 2 * microseconds / 1e6})


def test_products_of_a_whole_step() -> None:
    """26 layers of 10 + 20 + 30 + 40 microseconds, and the head's 50."""
    times = {"qkv": 10, "output": 20, "gate_up": 30, "down": 40, "head": 50}
    rows = [matmul_row("2b", matrix, us) for matrix, us in times.items()]
    whole = whole_step(rows, CEILINGS, "2b", "bfloat16")
    assert whole is not None
    assert whole.microseconds == pytest.approx(26 * 100 + 50)
    assert whole.num_bytes == pytest.approx(5.2286e9, rel=1e-4)
    assert whole.ratio == pytest.approx(2)
    assert whole_step(rows[1:], CEILINGS, "2b", "bfloat16") is None
    assert whole_step(rows, CEILINGS, "9b", "bfloat16") is None


def test_an_int4_step_has_an_int8_head() -> None:
    layers = [matmul_row("2b", matrix, 10, "int4") for matrix in ("qkv", "output", "gate_up", "down")]
    heads = [matmul_row("2b", "head", us, stored) for stored, us in (("int4", 1), ("int8", 50))]
    whole = whole_step([*layers, *heads], CEILINGS, "2b", "int4")
    assert whole is not None
    assert (whole.what, whole.microseconds) == ("matmul int4", pytest.approx(26 * 40 + 50))


def test_relative_error_sees_nan() -> None:
    exact = torch.tensor([3.0, 4.0])
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert not relative_error(torch.tensor([float("nan"), 4.0]), exact) <= 1


def test_every_bar_stands_in_the_list_of_results() -> None:
    text = (ROOT / "bench/results/README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| ([^|]+) \| ([^|]+) \| unmeasured \|$", text, flags=re.MULTILINE)
    wanted = [(name, " and ".join(bar.text for bar in bars)) for name, bars in BARS.items()]
    assert listed == [*wanted, ("every row with peers", "at least 1 x the best peer")]


def rows() -> list[GpuRow]:
    return [
        row_of("geglu", "9b [2048, 14336]", [1e-4], limit=CEILINGS.bytes(2.4e8), error=1e-3, bars=bars_of("geglu")),
        row_of("op", "s", [1e-3], peers={"flex": 2e-3}, refused={"other": "broken"}),
    ]


def test_table_and_report(tmp_path: Path) -> None:
    table = text_table([asdict(row) for row in rows()])
    assert "MISSED: at least 90 % of the ceiling" in table
    assert "tokens/s" not in table
    assert "flex 2000.0 µs, other not measured: broken" in cells(asdict(rows()[1]))
    settings = {"part": "ops", "not_measured": ["int4: no kernel"]}
    write_record(tmp_path / "gpu.json", record("gpu", settings, [asdict(row) for row in rows()]))
    assert main(["bench", "report", str(tmp_path / "gpu.json"), "--out", str(tmp_path), "--no-plots"]) == 0
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "## On a GPU" in text
    assert "| geglu | 9b [2048, 14336] | 100.0 |  | 2400 GB/s | 80.0 % of 3000 | 1.0e-03 |" in text
    assert "Not measured: int4: no kernel" in text
    assert markdown([], [])


def test_what_came_before_an_error_is_kept(capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> object:
        yield rows()[0]
        yield Missing("int4", is_fault=False)
        raise BackendError("the card is lost")

    found, missing = gpu.collect(broken())  # type: ignore[arg-type]
    assert [row["what"] for row in found] == ["geglu"]
    assert missing == [Missing("int4", is_fault=False), Missing("the card is lost", is_fault=True)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_fails_at_once(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "ops.json"
    assert main(["bench", "gpu", "ops", "--json", str(path)]) == 1
    assert "measures a CUDA GPU, and torch" in capsys.readouterr().err
    assert not path.exists()
    assert state() == {}


@pytest.mark.parametrize("part", [part for part in gpu.PARTS if part != "peers"])
def test_transformers_are_for_peers_alone(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    for name in ("peers", "decoders"):
        monkeypatch.delitem(sys.modules, f"gemma2_fast.bench.gpu.{name}", raising=False)
    for module, name in ((ops, "rows"), (recurrent, "rows"), (models, "decode_rows"), (models, "prefill_rows")):
        monkeypatch.setattr(module, name, lambda *_: iter("measured"))
    assert "".join(gpu.rows_of(part, H100, CEILINGS)) == "measured"  # type: ignore[arg-type]


def test_without_torch_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert main(["bench", "gpu", "peers"]) == 1
    assert "bench gpu peers needs torch, triton, transformers" in capsys.readouterr().err
