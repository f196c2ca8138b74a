from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from gemma2_fast import Generator
from gemma2_fast.bench import prepare as prepare_module
from gemma2_fast.bench.engines import Engine, EngineSpec
from gemma2_fast.bench.prepare import MAKERS, peer_commands, prepare
from gemma2_fast.bench.shapes import config
from gemma2_fast.errors import BackendError
from gemma2_fast.spec.families import spec_from_config
from gemma2_fast.weights.load import load_checkpoint
from gemma2_fast.weights.manifest import manifest


def test_checkpoint_runs(tiny_checkpoint: Path) -> None:
    checkpoint = load_checkpoint(tiny_checkpoint)
    assert checkpoint.spec.vocab_size == 512
    assert checkpoint.matrix_formats == ("BF16",)
    values = checkpoint.weights["layers.1.mlp.up"].to_float32()
    assert values.shape == (96, 64)
    assert np.std(values) == pytest.approx(0.02, rel=0.05)
    assert len(np.unique(values)) > 1000
    with Generator.from_pretrained(tiny_checkpoint, num_threads=1, progress=False) as gen:
        assert len(gen.generate([5, 6, 7], max_tokens=3, ignore_eos=True).token_ids) == 3


@pytest.mark.parametrize(("quantization", "blocks"), [("int8", "INT8_G128"), ("int4", "INT4_G32")])
def test_quantised_checkpoint(tiny_size: str, tmp_path: Path, quantization: str, blocks: str) -> None:
    prepare(tmp_path, tiny_size, {}, quantization)
    assert [path.name for path in tmp_path.iterdir()] == [f"{tiny_size}-{quantization}"]
    checkpoint = load_checkpoint(tmp_path / f"{tiny_size}-{quantization}")
    assert set(checkpoint.matrix_formats) == {blocks, "INT8_G128"}
    assert checkpoint.weights["embedding"].format.name == "INT8_G128"
    values = checkpoint.weights["layers.1.mlp.up"].to_float32()
    assert np.std(values) == pytest.approx(0.02, rel=0.05)
    assert checkpoint.weights["final_norm"].format.name == "BF16"


def test_what_is_there_is_kept(tiny_checkpoint: Path, tiny_size: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.stat(tiny_checkpoint / "model.safetensors").st_mtime_ns
    prepare(tiny_checkpoint.parent, tiny_size, {})
    assert os.stat(tiny_checkpoint / "model.safetensors").st_mtime_ns == before
    out = capsys.readouterr().out
    assert "there already" in out
    assert "skipped, no --peer-python openvino=" in out


def test_a_run_that_was_cut_off_is_named(tiny_size: str, tmp_path: Path) -> None:
    (tmp_path / f"unfinished-{tiny_size}-hf").mkdir()
    with pytest.raises(BackendError, match="left from a run that was cut off"):
        prepare(tmp_path, tiny_size, {})


def test_commands_of_the_peers(tmp_path: Path) -> None:
    commands = {name: (kind, command) for kind, name, command in peer_commands(tmp_path / "2b-hf", "2b")}
    assert set(commands) == {
        "2b-q8_0.gguf",
        "2b-q4_0.gguf",
        "2b-openvino-int8",
        "2b-openvino-int4",
        "2b-ctranslate2-int8",
    }
    assert commands["2b-q4_0.gguf"] == (
        "llama_cpp",
        [str(MAKERS / "make_gguf.py"), str(tmp_path / "2b-hf" / "config.json"), "q4_0"],
    )
    assert commands["2b-openvino-int4"][1][-6:] == ["int4", "--group-size", "128", "--ratio", "1.0", "--sym"]
    assert all(Path(command[0]).is_file() for _, command in commands.values() if command[0].endswith(".py"))


def test_makers_know_gemma2_alone(tmp_path: Path) -> None:
    for size in ("gemma-2b", "recurrentgemma-2b"):
        assert not list(peer_commands(tmp_path / f"{size}-hf", size))


@pytest.mark.parametrize(
    ("size", "parameters"),
    [("2b", 2_614_341_888), ("gemma-2b", 2_506_172_416), ("recurrentgemma-2b", 2_682_862_080)],
)
def test_shapes_are_those_released(size: str, parameters: int) -> None:
    shapes = manifest(spec_from_config(config(size)))
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_recurrent_checkpoint_runs(tiny_recurrent_size: str, tmp_path: Path, quantization: str) -> None:
    """Random weights keep every logit finite and away from the soft cap."""
    prepare(tmp_path, tiny_recurrent_size, {}, quantization)
    path = tmp_path / f"{tiny_recurrent_size}-{quantization}"
    with Generator.from_pretrained(path, num_threads=1, progress=False) as gen:
        logits = gen.logits(list(range(100)))
    assert np.abs(logits).max() < 20
    assert np.std(logits) > 0.01


def test_a_peer_that_fails_leaves_nothing_under_its_name(
    tiny_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        prepare_module, "peer_commands", lambda *_: [("llama_cpp", "m.gguf", ["-c", "raise SystemExit(7)"])]
    )
    with pytest.raises(BackendError, match="ended with status 7"):
        prepare(tmp_path, tiny_size, {"llama_cpp": sys.executable})
    assert not (tmp_path / "m.gguf").exists()


def test_gguf_file_runs(tiny_size: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gguf", reason="the [test] extra brings gguf, which writes the file")
    monkeypatch.setattr(prepare_module, "peer_commands", lambda *arguments: list(peer_commands(*arguments))[:1])
    prepare(tmp_path, tiny_size, {"llama_cpp": sys.executable})
    path = tmp_path / f"{tiny_size}-q8_0.gguf"
    checkpoint = load_checkpoint(path)
    config = json.loads((tmp_path / f"{tiny_size}-hf" / "config.json").read_text())
    assert checkpoint.spec.model_width == config["hidden_size"]
    assert checkpoint.matrix_formats == ("Q8_0",)
    with Generator.from_pretrained(path, num_threads=1, progress=False) as gen:
        assert gen.generate([300, 301], max_tokens=2, ignore_eos=True).text is not None


def test_a_peer_is_checked_without_a_tokenizer(tiny_checkpoint: Path) -> None:
    settings = {"model": str(tiny_checkpoint), "threads": 1, "max_batch": 1, "max_context": 64, "options": {}}
    with Engine(EngineSpec("ours", "gemma2_fast", settings)) as engine:
        ids = engine.encode("three short words")
        assert len(ids) == 3
        assert len(engine.likeliest(ids)) == 5
