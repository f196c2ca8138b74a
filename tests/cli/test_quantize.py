"""gemma2-fast quantize on small checkpoints, as a user sees it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma2_fast import __version__
from gemma2_fast.cli import main
from gemma2_fast.cli.quantize import source_name
from gemma2_fast.weights.load import load_checkpoint
from tests.weights.quantized_files import CONFIG, write_source

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "tiny-gemma")


def quantize(*arguments: str | Path) -> int:
    return main(["quantize", *map(str, arguments)])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_writes_a_copy_and_says_so(quantization: str, source: Path, tmp_path: Path, capsys: Capture) -> None:
    assert quantize(source, tmp_path / "q", "--quantization", quantization, "--num-threads", "2") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{tmp_path / 'q'}: {quantization}, 0.00 GB, ")
    origin = load_checkpoint(tmp_path / "q").origin
    assert origin is not None
    assert (origin.quantization, origin.source) == (quantization, "tiny-gemma, BF16")
    assert origin.tool_version == __version__


def test_quiet_says_nothing(source: Path, tmp_path: Path, capsys: Capture) -> None:
    assert quantize(source, tmp_path / "q", "--quantization", "int8", "--quiet") == 0
    assert capsys.readouterr() == ("", "")


def test_info_shows_format_bits_and_origin(source: Path, tmp_path: Path, capsys: Capture) -> None:
    quantize(source, tmp_path / "q", "--quantization", "int4", "--quiet")
    assert main(["info", str(tmp_path / "q"), "--max-seq-len", "64", "--quiet"]) == 0
    text = capsys.readouterr().out
    bits = load_checkpoint(tmp_path / "q").bits_per_weight
    assert 5 < bits < 10
    assert f"in INT4_G32, INT8_G128, {bits:.2f} bits a weight ({tmp_path / 'q'})" in text
    assert f"quantised     to int4 from tiny-gemma, BF16, by gemma2-fast {__version__}\n" in text
    assert "float32 activations, int8 in products with quantised weights" in text

    assert main(["info", str(tmp_path / "q"), "--max-seq-len", "64", "--quiet", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["model"]["origin"] == {
        "quantization": "int4",
        "source": "tiny-gemma, BF16",
        "tool_version": __version__,
    }
    assert shown["model"]["bits_per_weight"] == bits
    assert (shown["run"]["activations"], shown["run"]["quantization"]) == ("int8", None)


def test_info_of_a_model_to_be_quantised(source: Path, capsys: Capture) -> None:
    assert main(["info", str(source), "--max-seq-len", "64", "--quantization", "int8", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "in BF16, 16.1" in text  # bits a weight: the norms are float32
    assert "quantising    to int8 while loading, in memory\n" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "q", "--quantization", "int8"], "'absent' does not exist"),
        (["tiny-gemma", "tiny-gemma", "--quantization", "int8"], "is both source and destination"),
        (["tiny-gemma", "full", "--quantization", "int8"], "full exists and holds config.json"),
        (["tiny-gemma", "full", "--quantization", "int8", "--overwrite"], "holds 'notes.txt', which --overwrite"),
        (["tiny-gemma", "q", "--quantization", "int8", "--num-threads", "0"], "--num-threads must be a positive"),
        (["tiny-gemma", "q", "--quantization", "int8", "--num-threads", "99999"], "1 to 1024 threads, not 99999"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str], message: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("x")
    (tmp_path / "full" / "config.json").write_text("{}")
    assert quantize(*arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full", "tiny-gemma"]


@pytest.mark.parametrize("arguments", [["a", "b"], ["a", "b", "--quantization", "2"], ["a", "--quantization", "int8"]])
def test_wrong_usage(arguments: list[str], capsys: Capture) -> None:
    with pytest.raises(SystemExit) as caught:
        quantize(*arguments)
    assert caught.value.code == 2
    assert "usage: gemma2-fast quantize" in capsys.readouterr().err


def test_interrupting_leaves_nothing(tmp_path: Path) -> None:
    """A real Ctrl-C in a real process, while it writes."""
    source = write_source(tmp_path / "source", config={**CONFIG, "vocab_size": 1_000_000})
    command = [sys.executable, "-m", "gemma2_fast.cli", "quantize", str(source), str(tmp_path / "q")]
    process = subprocess.Popen([*command, "--quantization", "int4"], stderr=subprocess.PIPE, text=True, env=os.environ)
    deadline = time.monotonic() + 60
    while not (tmp_path / "q.unfinished" / "model.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_copy_names_its_hub_id_and_commit_but_no_path() -> None:
    snapshot = Path("/home/me/.cache/hub/models--google--gemma-2-2b/snapshots/0123456789abcdef0123")
    assert source_name("google/gemma-2-2b", snapshot) == "google/gemma-2-2b@0123456789ab"
    assert source_name("models/mine/", Path("models/mine/")) == "mine"
