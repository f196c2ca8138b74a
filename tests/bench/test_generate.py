from __future__ import annotations

from pathlib import Path

import pytest

from gemma2_fast import Generator
from gemma2_fast.bench import traffic
from gemma2_fast.bench.generate import batch_works, line_of, row_of, single_works
from gemma2_fast.bench.record import read_record
from gemma2_fast.bench.rounds import Sample, Work
from gemma2_fast.cli import main

LIMITS = {"read_bytes": 20.0, "float32_operations": 300.0, "int8_operations": 1200.0}


def samples(work: Work, *seconds: float) -> list[Sample]:
    return [Sample("gemma2_fast", work, index, value, LIMITS) for index, value in enumerate(seconds)]


def test_decode_row_by_hand() -> None:
    """A step of 0.1 s that reads 1.5 GB: 15 GB/s of 20, and eight sequences make 80 tokens a second."""
    row = row_of(samples(Work("decode", 16, 8, 10), 2.0, 1.0, 0.5), 1 << 30, 1.5e9, 4e9)
    assert row["step_s"] == 0.1
    assert row["tokens_per_s"] == 80
    assert row["gb_per_s"] == 15
    assert row["percent"] == {"read_bytes": 75}
    assert row["limits"] == LIMITS
    assert "15.0 GB/s = 75 % of the read bandwidth (1.500 GB a step)" in line_of(row)


def test_prefill_row_by_hand() -> None:
    """512 tokens of 3 GOP in two seconds: 768 GOP/s."""
    row = row_of(samples(Work("prefill", 512), 1.0, 2.0, 3.0), 1 << 30, 1.5e9, 3e9)
    assert (row["tokens_per_s"], row["first_token_s"], row["gop_per_s"]) == (256, 2, 768)
    assert row["percent"] == {"int8_operations": 64, "float32_operations": 256}
    assert "64 % of the int8 peak" in line_of(row)


def test_works_leave_room_for_what_they_generate() -> None:
    works = single_works([128, 8192], [0, 8192], 32, 8192)
    assert [(work.kind, work.context) for work in works] == [
        ("prefill", 128),
        ("prefill", 8191),
        ("decode", 1),
        ("decode", 8159),
    ]
    assert [(work.context, work.batch) for work in batch_works([1, 8], 32)] == [(16, 1), (16, 8)]


def test_traffic_of_a_tiny_model(tiny_checkpoint: Path) -> None:
    """Four layers of width 64: query and output 64 x 64, key and value 32 x 64, three MLP matrices 96 x 64."""
    description = Generator.describe(tiny_checkpoint, kv_dtype="bfloat16")
    matrices = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64)
    gains = 64 * (4 * 4 + 1)
    assert traffic.block_operations(description.checkpoint.spec) == 2 * matrices
    assert traffic.weight_bytes(description, None) == 2 * (matrices + 512 * 64 + gains)
    cache = traffic.cache_of(description)
    token_bytes = (
        cache.paged[0].block_bytes("bfloat16", 32) / 32
    )  # of the two windowed layers, and of the two global ones
    assert token_bytes >= 2 * 2 * 2 * 16 * 2
    assert traffic.cache_bytes(cache, 100) == 100 * 2 * token_bytes
    # Beyond the window of 4096 only the two global layers read more.
    assert traffic.cache_bytes(cache, 5000) == (4096 + 5000) * token_bytes


def test_weight_bytes_after_quantisation(tiny_checkpoint: Path) -> None:
    """A block of 64 rows by 128 columns is 8192 codes and 64 bfloat16 scales, whole even where a matrix is not."""
    description = Generator.describe(tiny_checkpoint)
    strips = 4 * (1 + 1 + 1 + 1 + 2 + 2 + 1) + 512 // 64  # query, key, value, output, gate, up, down; the head
    gains = 2 * 64 * (4 * 4 + 1)
    assert traffic.weight_bytes(description, "int8") == strips * (8192 + 128) + gains
    in_int4 = strips - 512 // 64  # half as many bytes of codes, half a byte a factor of 32 columns
    assert traffic.weight_bytes(description, "int4") == in_int4 * (4096 + 128 + 128) + 8 * (8192 + 128) + gains


def test_whole_measurement(tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "generate.json"
    command = ["bench", "generate", str(tiny_checkpoint), "--threads", "1", "--prefill", "8,40", "--contexts", "0,30"]
    command += ["--batches", "1,3", "--steps", "4", "--rounds", "2", "--kv-dtype", "float32", "--json", str(path)]
    assert main(command) == 0
    content = read_record(path)
    assert content["kind"] == "generate"
    assert content["settings"]["threads"] == 1
    assert content["settings"]["options"] == {"kv_dtype": "float32"}
    assert set(content["versions"]) == {"gemma2_fast", "python", "numpy"}
    works = [(row["work"], row["context"], row["batch"]) for row in content["rows"]]
    assert works == [
        ("prefill", 8, 1),
        ("prefill", 40, 1),
        ("decode", 1, 1),
        ("decode", 30, 1),
        ("decode", 16, 1),
        ("decode", 16, 3),
    ]
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in content["rows"])
    assert all(row["tokens_per_s"] > 0 and row["peak_bytes"] > 1 << 20 for row in content["rows"])
    assert "peak memory with batches of up to 3" in capsys.readouterr().out


def test_a_missing_model_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "generate", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("gemma2-fast: error: ")


@pytest.mark.parametrize("option", [["--rounds", "0"], ["--batches", "1,x"], ["--contexts", "-1"], ["--steps", "2.5"]])
def test_wrong_counts_are_refused(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "generate", "m", *option])
    assert ended.value.code == 2
    assert "expected a whole number above 0" in capsys.readouterr().err
