from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma2_fast.bench import peers
from gemma2_fast.bench.engines import EngineSpec
from gemma2_fast.bench.peers import agree, model_bytes, parse_peer, rows_of
from gemma2_fast.bench.record import read_record
from gemma2_fast.bench.rounds import Sample, Work
from gemma2_fast.cli import main

FAKE_WORKERS = Path(__file__).parent / "fake_workers"
LIMITS = {"read_bytes": 20.0, "float32_operations": 300.0, "int8_operations": 1200.0}


@pytest.fixture
def fake_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that say how fast they were: ours at 100 tokens or steps a second, peers as their options say."""
    our_engine, peer_engines = peers.our_engine, peers.peer_engines

    def our_fake(*arguments: Any) -> EngineSpec:
        spec = our_engine(*arguments)
        return replace(spec, settings={**spec.settings, "options": {"speed": 100.0}}, workers=FAKE_WORKERS)

    def fake_peers(*arguments: Any) -> list[EngineSpec]:
        fakes = []
        for spec in peer_engines(*arguments):
            options = {name: float(value) for name, value in spec.settings["options"].items()}
            options = {"speed": options.pop("speed", 50.0), **{name: int(value) for name, value in options.items()}}
            fakes.append(replace(spec, settings={**spec.settings, "options": options}, workers=FAKE_WORKERS))
        return fakes

    monkeypatch.setattr(peers, "our_engine", our_fake)
    monkeypatch.setattr(peers, "peer_engines", fake_peers)


def test_rows_by_hand() -> None:
    """Ours takes 1 and 2 s, the peer 3 and 4: it is 3 and 2 times slower, 2.5 in the median."""
    work = Work("decode", 64, 8, 10)
    seconds = [("gemma2_fast", 0, 1.0), ("slow", 0, 3.0), ("slow", 1, 4.0), ("gemma2_fast", 1, 2.0)]
    samples = [Sample(name, work, index, value, LIMITS) for name, index, value in seconds]
    ours, slow = rows_of(samples, {"gemma2_fast": 3e9, "slow": 3e9}, 1.0)
    assert (ours["engine"], ours["ratio"], ours["tokens_per_s"]) == ("gemma2_fast", 1, 60)
    assert (slow["engine"], slow["ratio"]) == ("slow", 2.5)
    assert ours["percent"] == {"read_bytes": pytest.approx(100 * (30 / 20 + 15 / 20) / 2)}


def test_prefill_is_compared_with_the_int8_peak() -> None:
    (row,) = rows_of([Sample("gemma2_fast", Work("prefill", 512), 0, 2.0, LIMITS)], {}, 3e9)
    assert row["percent"] == {"int8_operations": pytest.approx(64)}


def test_parse_peer() -> None:
    kind, model, options = parse_peer("openvino=models/2b,GROUP=128,env.ISA=AVX2")
    assert (kind, model, options) == ("openvino", "models/2b", {"GROUP": "128", "env.ISA": "AVX2"})


@pytest.mark.parametrize("text", ["vllm=m", "openvino", "openvino=", "openvino=m,GROUP"])
def test_parse_peer_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected K"):
        parse_peer(text)


def test_peer_settings() -> None:
    args = argparse.Namespace(
        threads=2,
        peer=[("openvino", "m", {"GROUP": "32"}), ("openvino", "m", {"env.ISA": "AVX2"}), ("llama_cpp", "g", {})],
        peer_python=[("openvino", "/elsewhere/python")],
    )
    first, second, third = peers.peer_engines(args, 8, 600)
    assert [spec.label for spec in (first, second, third)] == [
        "openvino,GROUP=32",
        "openvino,env.ISA=AVX2",
        "llama_cpp",
    ]
    assert (first.python, first.settings["options"], first.environment) == ("/elsewhere/python", {"GROUP": "32"}, {})
    assert (second.settings["options"], second.environment) == ({}, {"ISA": "AVX2"})
    assert third.settings == {"model": "g", "threads": 2, "max_batch": 8, "max_context": 600, "options": {}}
    assert third.python != "/elsewhere/python"


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ([(5, 9.0), (6, 8.0)], [(5, 7.0), (4, 6.9)], True),
        ([(5, 9.0), (6, 8.9)], [(6, 9.0), (5, 8.8)], True),
        ([(5, 9.0), (6, 8.0)], [(6, 9.0), (5, 8.8)], False),
        ([(5, 9.0), (6, 8.9)], [(6, 9.0), (7, 8.9)], False),
    ],
)
def test_agreement(mine: list[tuple[int, float]], theirs: list[tuple[int, float]], same: bool) -> None:
    assert agree(mine, theirs) is same


def test_model_bytes(tmp_path: Path) -> None:
    for name, size in (("openvino_model.bin", 5), ("model.bin", 3), ("a.safetensors", 2), ("b.safetensors", 2)):
        (tmp_path / name).write_bytes(bytes(size))
    found = {kind: model_bytes(EngineSpec(kind, kind, {"model": str(tmp_path)})) for kind in peers.PEERS[1:]}
    assert found == {"openvino": 5, "ctranslate2": 3, "transformers": 4, "recurrentgemma": 4}
    assert model_bytes(EngineSpec("llama_cpp", "llama_cpp", {"model": str(tmp_path / "model.bin")})) == 3


def test_model_bytes_in_another_dtype(tiny_checkpoint: Path) -> None:
    """The file holds two bytes a weight and a header."""
    settings = {"model": str(tiny_checkpoint), "options": {}}
    stored = model_bytes(EngineSpec("transformers", "transformers", settings))
    wider = model_bytes(EngineSpec("transformers", "transformers", settings | {"options": {"dtype": "float32"}}))
    assert 0 < stored - wider // 2 < 8192


def test_whole_comparison(
    tiny_checkpoint: Path, tmp_path: Path, fake_engines: None, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "peers.json"
    command = ["bench", "peers", str(tiny_checkpoint), "--peer", "llama_cpp=other.gguf", "--rounds", "3"]
    command += ["--peer", f"transformers={tiny_checkpoint},speed=25", "--prompt", "40", "--batches", "1,2"]
    assert main([*command, "--context", "8", "--steps", "4", "--threads", "1", "--json", str(path)]) == 0
    content = read_record(path)
    ratios = {(row["work"], row["batch"], row["engine"]): row["ratio"] for row in content["rows"]}
    assert ratios == {
        (work, batch, engine): pytest.approx(ratio)
        for work, batch in (("prefill", 1), ("decode", 1), ("decode", 2))
        for engine, ratio in (("gemma2_fast", 1), ("llama_cpp", 2), ("transformers,speed=25", 4))
    }
    assert all(len(row["seconds"]) == 3 for row in content["rows"])
    assert content["versions"]["llama_cpp"] == "1.0"
    engines = content["settings"]["engines"]
    assert engines["llama_cpp"]["check"] == "not compared: other weights"
    assert "are the same" in engines["transformers,speed=25"]["check"]
    assert "ours is 4.00 x" in capsys.readouterr().out


def test_a_peer_that_disagrees_is_not_timed(
    tiny_checkpoint: Path, fake_engines: None, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["bench", "peers", str(tiny_checkpoint), "--peer", f"transformers={tiny_checkpoint},first=9"]
    assert main([*command, "--context", "8", "--steps", "4"]) == 1
    assert "is not timed: after" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["peers"], "give our MODEL and at least one --peer"),
        (["peers", "m"], "give our MODEL and at least one --peer"),
    ],
)
def test_nothing_to_compare(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *command]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--peer", "vllm=m"], ["--peer-python", "vllm=python"], ["--size", "3b"]])
def test_wrong_usage(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "peers", "m", *option])
    assert ended.value.code == 2
