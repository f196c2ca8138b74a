from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gemma2_fast import Generator
from gemma2_fast.bench import traffic
from gemma2_fast.bench.engines import Engine, EngineSpec
from gemma2_fast.bench.flat import line_of, slopes, speed_ratio
from gemma2_fast.bench.record import read_record
from gemma2_fast.bench.rounds import Sample, Work
from gemma2_fast.cli import main


def run_of(context: int, *seconds: float) -> list[Sample]:
    work = Work("decode", context, steps=10)
    return [Sample(str(context), work, index, value, {}) for index, value in enumerate(seconds)]


def series(*points: tuple[int, float, int]) -> list[dict[str, Any]]:
    return [
        {"tokens": tokens, "tokens_per_s": speed, "anonymous_bytes": memory, "part": "series"}
        for tokens, speed, memory in points
    ]


def test_ratio_pairs_the_rounds() -> None:
    """Against 1, 2 and 4 s: 2, 2 and 5 s are a half, 1 and 0.8 times as fast; the medians alone would say 1."""
    assert speed_ratio(run_of(30, 2, 2, 5), run_of(3, 1, 2, 4)) == 0.8


def test_slopes_by_hand() -> None:
    """From token 200 on, 2 tokens/s less and 800 bytes more every 100 tokens; what comes before is left out."""
    found = slopes(series((100, 900, 0), (200, 102, 1000), (300, 100, 1800), (400, 98, 2600)), 200)
    assert found["bytes_per_token"] == pytest.approx(8)
    assert found["speed_percent"] == pytest.approx(-200)
    assert "memory +8.0 bytes a token" in line_of({"part": "slope", **found})


def test_two_samples_make_a_slope() -> None:
    assert slopes(series((100, 9, 0), (200, 9, 0)), 150)["bytes_per_token"] is None
    assert slopes(series((100, 9, 0), (200, 9, 0)), 100)["bytes_per_token"] == 0


def test_traffic_of_recurrent_layers(tiny_recurrent_checkpoint: Path) -> None:
    """A step reads four layers' state of 64 values and three convolution inputs, and one layer's keys and values."""
    description = Generator.describe(tiny_recurrent_checkpoint, kv_dtype="float32", max_batch_size=1)
    cache = traffic.cache_of(description)
    state = 4 * 64 * 4 * 4
    token_bytes = 2 * 32 * 4  # a head of 16 is filled up to 32
    assert traffic.cache_bytes(cache, 10) == state + 10 * token_bytes
    assert traffic.cache_bytes(cache, 5000) == state + 17 * token_bytes
    # Four mixers of three 64 x 64 matrices, a 64 x 4 convolution and two gates of 4 x 16 x 16; one attention layer.
    mixers = 4 * (3 * 64 * 64 + 64 * 4 + 2 * 4 * 16 * 16) + 2 * 64 * 64 + 2 * 16 * 64
    assert traffic.block_operations(description.checkpoint.spec) == 2 * (mixers + 5 * 3 * 96 * 64)


def test_a_generation_goes_on_where_it_stopped(tiny_recurrent_checkpoint: Path) -> None:
    settings = {
        "model": str(tiny_recurrent_checkpoint),
        "threads": 1,
        "max_batch": 1,
        "max_context": 300,
        "options": {},
    }
    with Engine(EngineSpec("ours", "gemma2_fast", settings)) as engine:
        assert 1 << 20 < engine.anonymous_bytes < engine.peak_bytes
        engine.begin(3, 30)
        assert engine.advance(10) > 0
        assert engine.advance(20) > 0
        with pytest.raises(Exception, match="StopIteration"):
            engine.advance(1)


def test_whole_measurement(
    tiny_recurrent_checkpoint: Path,
    tiny_checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "flat.json"
    command = ["bench", "flat", str(tiny_recurrent_checkpoint), "--beside", str(tiny_checkpoint), "--threads", "1"]
    command += ["--prompts", "20,9000", "--steps", "8", "--contexts", "8,8190", "--context-steps", "4", "--rounds", "2"]
    command += ["--series-size", "tiny-recurrent", "--series-tokens", "250", "--series-samples", "5"]
    assert main([*command, "--json", str(path)]) == 0
    content = read_record(path)
    assert content["kind"] == "flat"
    rows = content["rows"]
    ours, other = tiny_recurrent_checkpoint.name, tiny_checkpoint.name
    placed = [(row["part"], row["model"], row["context"]) for row in rows if row["part"] in ("prompt", "context")]
    assert placed == [
        ("prompt", ours, 20),
        ("prompt", ours, 9000),
        ("context", ours, 8),
        ("context", ours, 8190),
        ("context", other, 8),
    ]
    short, long = rows[:2]
    # A ring of the window of 17 keys and a step of 512 tokens is 18 pages of 32, in each 32 elements for a head of 16.
    assert short["cache_bytes"] == long["cache_bytes"] == 18 * 32 * 2 * 32 * 2 + 4 * 64 * 4 * 4
    assert short["speed_ratio"] == 1
    assert long["speed_ratio"] == pytest.approx(
        sum(b / a for a, b in zip(long["seconds"], short["seconds"], strict=True)) / 2
    )
    assert len(long["seconds"]) == 2
    assert long["anonymous_bytes"] > 1 << 20
    *samples, slope = (row for row in rows if row["part"] in ("series", "slope"))
    assert [row["tokens"] for row in samples] == [50, 100, 150, 200, 250]
    assert (slope["part"], slope["first_token"]) == ("slope", 17 + 50)
    out = capsys.readouterr().out
    assert "not at context 8190, it ends at 8192 tokens" in out
    assert "bytes a token" in out


def test_parts_are_chosen(tiny_recurrent_size: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The series needs no model."""
    command = ["bench", "flat", "none", "--parts", "series", "--series-size", tiny_recurrent_size]
    assert main([*command, "--series-tokens", "20", "--series-samples", "2", "--json", str(tmp_path / "f.json")]) == 0
    assert {row["part"] for row in read_record(tmp_path / "f.json")["rows"]} == {"series", "slope"}
    assert "too few samples after token 27" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["bench", "flat", "none", "--parts", "all"])
